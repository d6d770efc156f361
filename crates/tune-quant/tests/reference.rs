//! The codecs against the Python `gguf` package and a plain numpy NF4; fixtures by `tests/parity/generate_quant.py`.

use std::path::PathBuf;

use serde_json::Value;
use sha2::{Digest, Sha256};
use tune_quant::nf4::dynamic_map;
use tune_quant::{BlockType, Nf4};

const DIGEST_BLOCKS: usize = 400;

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
fn every_encoder_writes_the_reference_bytes() {
    let digests = json("digests.json");
    let many: Vec<f32> = random_values(32 * DIGEST_BLOCKS);
    for block_type in BlockType::ALL.into_iter().filter(|t| t.can_encode()) {
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
