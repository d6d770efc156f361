//! The codecs against ggml's quantiser in C, the Python `gguf` package and a plain numpy NF4; fixtures by
//! `tests/parity/generate_encoders.py` and `generate_quant.py`.

use std::path::PathBuf;

use serde_json::Value;
use sha2::{Digest, Sha256};
use tune_quant::nf4::dynamic_map;
use tune_quant::{BlockType, Nf4};

const DIGEST_BLOCKS: usize = 400;
/// What the Python package encodes.
const ENCODED_IN_PYTHON: [BlockType; 8] = [
    BlockType::F32,
    BlockType::F16,
    BlockType::BF16,
    BlockType::Q4_0,
    BlockType::Q4_1,
    BlockType::Q5_0,
    BlockType::Q5_1,
    BlockType::Q8_0,
];

#[test]
fn every_type_decodes_the_reference_blocks_exactly() {
    for block_type in BlockType::ALL {
        let fixture = fixture(&format!("decode_{}.bin", block_type.name()));
        let blocks = fixture.len() / (block_type.block_bytes() + 4 * block_type.block_len());
        let (bytes, want) = fixture.split_at(blocks * block_type.block_bytes());
        let want: Vec<f32> = want.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
        let mut got = vec![f32::NAN; want.len()];
        block_type.decode(bytes, &mut got);
        for (i, (got, want)) in got.iter().zip(&want).enumerate() {
            let (block, value) = (i / block_type.block_len(), i % block_type.block_len());
            let name = block_type.name();
            assert_eq!(
                got.to_bits(),
                want.to_bits(),
                "{name} block {block} value {value}: {got}, want {want}"
            );
        }
    }
}

#[test]
fn every_type_decodes_many_blocks_exactly() {
    let digests = json("digests.json");
    for block_type in BlockType::ALL {
        let mut bytes: Vec<u8> =
            lcg().take(DIGEST_BLOCKS * block_type.block_bytes()).map(|x| (x >> 16) as u8).collect();
        for block in bytes.chunks_exact_mut(block_type.block_bytes()) {
            for &at in exponent_bytes(block_type) {
                block[at] &= 0xBF;
            }
        }
        let mut values = vec![f32::NAN; DIGEST_BLOCKS * block_type.block_len()];
        block_type.decode(&bytes, &mut values);
        let name = format!("decode_{}", block_type.name());
        assert_eq!(digests[&name], sha256_f32(&values), "{name}");
    }
}

#[test]
fn encoders_write_the_bytes_of_the_python_package() {
    let digests = json("digests.json");
    let many: Vec<f32> = random_values(32 * DIGEST_BLOCKS);
    for block_type in ENCODED_IN_PYTHON {
        let fixture = fixture(&format!("encode_{}.bin", block_type.name()));
        let bytes_per_32 = block_type.row_bytes(32).unwrap();
        let blocks = fixture.len() / (128 + bytes_per_32);
        let (values, want) = fixture.split_at(blocks * 128);
        let values: Vec<f32> = values.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
        for (i, (values, want)) in values.chunks(32).zip(want.chunks(bytes_per_32)).enumerate() {
            let mut got = vec![];
            block_type.encode(values, &mut got);
            assert_eq!(got, want, "{} block {i} of {values:?}", block_type.name());
        }
        let mut got = vec![];
        block_type.encode(&many, &mut got);
        let name = format!("encode_{}", block_type.name());
        assert_eq!(digests[&name], sha256(&got), "{name}");
    }
}

#[test]
fn encoders_write_the_bytes_of_ggml_in_edge_cases() {
    let values = fixture("encode_edges.bin");
    let values: Vec<f32> = values.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
    for block_type in quantised_types() {
        let want = fixture(&format!("encode_edges_{}.bin", block_type.name()));
        let bytes_per_256 = block_type.row_bytes(256).unwrap();
        assert_eq!(want.len(), values.len() / 256 * bytes_per_256);
        for (i, (values, want)) in values.chunks(256).zip(want.chunks(bytes_per_256)).enumerate() {
            let mut got = vec![];
            block_type.encode(values, &mut got);
            assert_eq!(got, want, "{} block {i} of {values:?}", block_type.name());
        }
        // and side by side with others
        let mut got = vec![];
        block_type.encode(&values, &mut got);
        assert!(got == want, "{}", block_type.name());
    }
}

#[test]
fn encoders_write_the_bytes_of_ggml_in_many_blocks() {
    let digests = json("encode_digests.json");
    let count = 256 * 200;
    let heavy: Vec<f32> = random_values(3 * count).as_chunks().0.iter().map(|[a, b, c]| a * b * c).collect();
    let scaled: Vec<f32> = heavy.iter().enumerate().map(|(i, v)| v * scale_of(i)).collect();
    for (sample, values) in [("uniform", random_values(count)), ("heavy", heavy), ("scaled", scaled)] {
        for block_type in quantised_types() {
            let name = block_type.name();
            let mut got = vec![];
            block_type.encode(&values, &mut got);
            assert_eq!(digests[name][sample], sha256(&got), "{name} {sample}");
        }
    }
}

/// 512 values of the generator through the reference library in C: bytes, and the values they decode to.
#[test]
fn published_digests_of_512_values() {
    let values = random_values(512);
    assert_eq!(sha256_f32(&values), "1f3209499f457885a9718a82de7eebd51145c24fa8088d3d4646751ed6e05462");
    let bytes_and_values = [
        (BlockType::F16, "80ca079a11e1559552354f26fecacb03b25ab7e5815d98542bd236b1613043d4", ""),
        (BlockType::BF16, "b16c17b568391a39526c5fff5482154eec90c8876ef722c923d401a008b514ab", ""),
        (
            BlockType::Q4_0,
            "30cbaec3b016a726bfb0fec047bd781fc4d0bf2b2d22a356672351f582d041b3",
            "73c3d521aea201bce2870d7589e0e9669cdbfc5e0e6c270c4f75ff81af64916a",
        ),
        (
            BlockType::Q4_1,
            "b608515a3031f6b57f8cca6cd62abc8b3de8cbc9c0f2c12a43acf683b39dd067",
            "5a02399b8f67618948f9094882a442aacc40214f775ce9f14fa8b23046b681e8",
        ),
        (
            BlockType::Q5_0,
            "55d9a65a8dd6f61d10a77380d63f286ec40b58c75b08488e792b983183c44bcb",
            "ef84a2ddcec783b03fc91884443b8a9fa8c000fbaf4e5c2315a5f4ac82859280",
        ),
        (
            BlockType::Q5_1,
            "8848b0461d7086758312584a94e3ff7e5d2f1cf5cbe42d728e501a2850fba85c",
            "d2dd90d40b77e39335db19ce02374468de1b5fda5795570c41c9a801f72578f5",
        ),
        (
            BlockType::Q8_0,
            "23af4e8891a4df66d6de5a3b69cfbd6c99bf304b5c71159aa16a7e2c03e6b9cc",
            "3ca6f145418ff1af9e3d31aa642526b37c5e3b94a24ef2aa690976bedcda476d",
        ),
        (
            BlockType::Q2K,
            "01083766daa691896bbc1e9da9e8370336203b15c1cccbfc68954433936c6a83",
            "d2778869c3a355dd19d220ce65d294280dc3193d5e918441537ec7cfe498141c",
        ),
        (
            BlockType::Q3K,
            "cd1dccc8c550103993684719964daad55d43ef032486d26463ad4bec60cc59d4",
            "cf1bfbd9345f73925bdb80a7ebf1eae5f1a9df81e7d13a5dc22d12f7805b5819",
        ),
        (
            BlockType::Q4K,
            "025b5f1c121881de1db63f9e9b391db6920dd9f9fe1185c257e77fd077fe0dde",
            "6749dfb5da06315a1841b273660b224b0683357177f87ff24dcfeac737571b4e",
        ),
        (
            BlockType::Q5K,
            "39dabe8ffe206f06e6c6c7c617bd9e587123552b726df005fc8c02296f19b4aa",
            "ac456db1a7218293e97405309f7ab99caef5c285e7d7bce628acb2621b42227b",
        ),
        (
            BlockType::Q6K,
            "294d7f0ad68539d4a0901061c17d93596d1f713f46acc691aeb3a9f9a3c78335",
            "dc575610e659d9913f17f2eb828f695b4f037007529378d56c031b8f2d88a22f",
        ),
        (
            BlockType::IQ4NL,
            "dc911f62ef13b2a8561da571dfb3975690b88d8a1a3c1a3cf8fa341e8f9a983b",
            "64babfee9e08288d431632f395425940dffc44fe2e9f0e36c94a1049947be7b6",
        ),
        (
            BlockType::MXFP4,
            "c2ca68a3737fb88a46250e75cc0325cd83fff845b9a44d1ec8c84fe133dc484e",
            "a2d142bbb1d4c382150c24a517a15631350025e1dfb992b84bd9a8ee56a00816",
        ),
    ];
    for (block_type, want_bytes, want_values) in bytes_and_values {
        let mut bytes = vec![];
        block_type.encode(&values, &mut bytes);
        assert_eq!(sha256(&bytes), want_bytes, "bytes of {}", block_type.name());
        if !want_values.is_empty() {
            let mut decoded = vec![0.0; values.len()];
            block_type.decode(&bytes, &mut decoded);
            assert_eq!(sha256_f32(&decoded), want_values, "values of {}", block_type.name());
        }
    }
}

#[test]
fn nf4_with_double_quantisation_equals_numpy() {
    let want = json("nf4.json");
    assert_eq!(dynamic_map()[..], floats(&want["dynamic_map"]));
    let len = want["len"].as_u64().unwrap() as usize;
    let values: Vec<f32> =
        random_values(len).iter().enumerate().map(|(i, v)| v * (1 + i / 64 % 7) as f32).collect();
    let nf4 = Nf4::quantize(&values);
    assert_eq!(nf4.len(), len);
    assert_eq!(nf4.stored_bytes(), len.div_ceil(2) + len.div_ceil(64) + 4 * (len.div_ceil(64 * 256) + 1));
    let parts = nf4.parts();
    assert_eq!([parts.offset][..], floats(&want["offset"]));
    assert_eq!(parts.nested_absmax, floats(&want["nested_absmax"]));
    assert_eq!(want["packed_sha256"], sha256(parts.packed));
    assert_eq!(want["absmax_codes_sha256"], sha256(parts.absmax_codes));
    let mut decoded = vec![f32::NAN; len];
    nf4.decode(0, &mut decoded);
    assert_eq!(decoded[..8], floats(&want["decoded_head"]));
    assert_eq!(want["decoded_sha256"], sha256_f32(&decoded));
}

#[test]
fn geometry_is_consistent() {
    for block_type in BlockType::ALL {
        assert_eq!(BlockType::from_ggml_id(block_type.ggml_id()), Some(block_type));
        assert_eq!(BlockType::from_name(&block_type.name().to_lowercase()), Some(block_type));
        assert_eq!(block_type.row_bytes(768), Some(768 / block_type.block_len() * block_type.block_bytes()));
        assert_eq!(block_type.row_bytes(33).is_some(), block_type.block_len() == 1, "{}", block_type.name());
    }
    assert_eq!(BlockType::from_ggml_id(4), None);
    assert_eq!(BlockType::from_name("q4"), None);
}

/// Offsets in a block of the bytes that hold the exponent of a scale or value.
#[allow(clippy::match_same_arms)]
fn exponent_bytes(block_type: BlockType) -> &'static [usize] {
    match block_type {
        BlockType::F32 => &[3],
        BlockType::F16 | BlockType::BF16 | BlockType::Q4_0 | BlockType::Q5_0 | BlockType::Q8_0 => &[1],
        BlockType::IQ4NL | BlockType::IQ4XS => &[1],
        BlockType::Q4_1 | BlockType::Q5_1 | BlockType::Q4K | BlockType::Q5K => &[1, 3],
        BlockType::Q2K => &[81, 83],
        BlockType::Q3K => &[109],
        BlockType::Q6K => &[209],
        BlockType::MXFP4 => &[0],
    }
}

fn quantised_types() -> impl Iterator<Item = BlockType> {
    BlockType::ALL.into_iter().filter(|t| t.is_quantized() && t.can_encode())
}

/// A power of two for each sub-block, and outliers.
fn scale_of(i: usize) -> f32 {
    let power = (i / 16 % 31) as i32 - 20;
    2_f32.powi(power) * if i.is_multiple_of(97) { 64.0 } else { 1.0 }
}

fn random_values(count: usize) -> Vec<f32> {
    lcg().take(count).map(|x| (x as f32 - 8_388_608.0) / 8_388_608.0).collect()
}

/// The high 24 bits of each state of a linear congruential generator.
fn lcg() -> impl Iterator<Item = u32> {
    let step = |s: u32| s.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
    std::iter::successors(Some(step(1)), move |&s| Some(step(s))).map(|s| s >> 8)
}

fn sha256_f32(values: &[f32]) -> String {
    sha256(&values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>())
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().fold(String::new(), |hex, byte| hex + &format!("{byte:02x}"))
}

fn floats(value: &Value) -> Vec<f32> {
    match value {
        Value::Array(items) => items.iter().flat_map(floats).collect(),
        other => vec![other.as_f64().unwrap() as f32],
    }
}

fn json(name: &str) -> Value {
    serde_json::from_slice(&fixture(name)).unwrap()
}

fn fixture(name: &str) -> Vec<u8> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name);
    std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}
