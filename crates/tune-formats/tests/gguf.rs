//! Reading and writing GGUF, on tiny files.

mod tiny;

use std::path::Path;

use miette::Diagnostic;
use tiny::{D_MODEL, HEAD_DIM, KV_HEADS};
use tune_formats::gguf::{GgufFile, GgufWriter, Metadata, Value, hyper_parameters};
use tune_formats::{FormatError, RopeScaling, TokenType, TokenizerFiles, open};
use tune_quant::{BlockType, RowOrder};

fn temporary() -> tempfile::TempDir {
    tempfile::tempdir().expect("temporary directory")
}

fn parse(bytes: Vec<u8>) -> Result<GgufFile, FormatError> {
    GgufFile::from_bytes(Path::new("tiny.gguf"), bytes)
}

/// The error of opening the tiny model after a change to its metadata.
fn open_with(change: impl FnOnce(&mut Metadata)) -> Result<tune_formats::BaseModel, FormatError> {
    let dir = temporary();
    let path = dir.path().join("tiny.gguf");
    let mut metadata = tiny::metadata();
    change(&mut metadata);
    tiny::write(&path, &metadata, &tiny::specs());
    open(&path)
}

fn failure(result: Result<tune_formats::BaseModel, FormatError>) -> String {
    match result {
        Ok(_) => panic!("it was opened"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn what_is_written_is_read() {
    let dir = temporary();
    let path = dir.path().join("tiny.gguf");
    let mut metadata = tiny::metadata();
    for (key, value) in [
        ("x.u8", Value::U8(250)),
        ("x.i8", Value::I8(-3)),
        ("x.u16", Value::U16(65_000)),
        ("x.i16", Value::I16(-300)),
        ("x.i32", Value::I32(-70_000)),
        ("x.u64", Value::U64(u64::MAX)),
        ("x.i64", Value::I64(i64::MIN)),
        ("x.f64", Value::F64(0.1)),
        ("x.flags", vec![true, false].into()),
        ("x.bytes", vec![1_u8, 2].into()),
        ("x.floats", vec![0.5_f32, -0.5].into()),
        ("x.doubles", vec![0.1_f64].into()),
        ("x.longs", vec![-1_i64].into()),
        ("x.empty", Vec::<String>::new().into()),
    ] {
        metadata.set(key, value);
    }
    let specs = tiny::specs();
    tiny::write(&path, &metadata, &specs);

    let file = GgufFile::open(&path).expect("opened");
    assert_eq!(file.metadata(), &metadata);
    assert_eq!(file.tensors().len(), specs.len());
    for (tensor, spec) in file.tensors().iter().zip(&specs) {
        assert_eq!(
            (&tensor.name, &tensor.dims, tensor.block_type),
            (&spec.name, &spec.dims, spec.block_type)
        );
        assert_eq!(&file.data(tensor).expect("data")[..], tiny::bytes(spec));
    }
    // Writing what was read gives the same file.
    let copy = dir.path().join("copy.gguf");
    let mut writer = GgufWriter::create(&copy, file.metadata(), specs).expect("created");
    for tensor in file.tensors() {
        writer.write(&tensor.name, &file.data(tensor).expect("data")).expect("written");
    }
    writer.finish().expect("finished");
    assert_eq!(std::fs::read(&copy).expect("copy"), std::fs::read(&path).expect("original"));
}

#[test]
fn a_tiny_model_opens() {
    let dir = temporary();
    let path = dir.path().join("tiny.gguf");
    tiny::write(&path, &tiny::metadata(), &tiny::specs());
    let base = open(&path).expect("opened");
    assert_eq!(base.name, "Tiny");
    assert_eq!((base.config.head_dim, base.config.num_key_value_heads), (HEAD_DIM, KV_HEADS));
    assert_eq!(base.config.rms_norm_eps.to_bits(), 1e-5_f64.to_bits());
    assert_eq!(base.config.rope_theta.to_bits(), 1e5_f64.to_bits());
    assert!(base.config.tie_word_embeddings && base.config.rope_scaling.is_none());
    assert_eq!(base.chat_template.as_deref(), Some("{{ messages }}"));
    let special = &base.special;
    assert_eq!((special.bos, special.eos, special.pad, special.eot), (Some(1), Some(2), Some(2), Some(2)));
    assert_eq!((special.eos_ids.as_slice(), special.add_bos), (&[0, 2][..], false));
    let TokenizerFiles::Gguf(tokenizer) = &base.tokenizer else { panic!("not from GGUF") };
    assert_eq!(*tokenizer.tokens, tiny::TOKENS);
    assert_eq!(
        tokenizer.token_types[..4].to_vec(),
        [TokenType::Control; 3].into_iter().chain([TokenType::Normal]).collect::<Vec<_>>()
    );

    let weights = &base.weights;
    assert_eq!(weights.shape("model.layers.0.mlp.down_proj.weight"), Some(vec![tiny::D_MODEL, tiny::D_FF]));
    assert_eq!(weights.shape("model.layers.0.post_attention_layernorm.weight"), Some(vec![D_MODEL]));
    assert_eq!(weights.shape("lm_head.weight"), None);
    assert!(weights.matrix("model.norm.weight").is_err() && weights.vector("lm_head.weight").is_err());
    assert_eq!(weights.vector("model.norm.weight").expect("norm")[1].to_bits(), (1.0_f32 / 64.0).to_bits());
}

#[test]
fn q_and_k_are_addressed_in_hugging_face_order() {
    let dir = temporary();
    let path = dir.path().join("tiny.gguf");
    tiny::write(&path, &tiny::metadata(), &tiny::specs());
    let base = open(&path).expect("opened");
    // Stored rows hold their own number, so Hugging Face row 1 of a head of width 8 is stored row 2.
    for (name, expected) in [("q_proj", 8 + 2), ("k_proj", 8 + 2), ("v_proj", 8 + 1)] {
        let matrix = base.weights.matrix(&format!("model.layers.0.self_attn.{name}.weight")).expect("matrix");
        let mut row = vec![0.0; D_MODEL];
        matrix.decode_row(8 + 1, &mut row);
        assert!((row[0] - expected as f32).abs() < 0.05, "{name}: {}", row[0]);
        assert_eq!(matrix.row_order() == RowOrder::Natural, name == "v_proj");
    }
}

#[test]
fn fused_qkv_is_taken_apart() {
    let dir = temporary();
    let path = dir.path().join("tiny.gguf");
    let mut specs = tiny::specs();
    let rows = (tiny::HEADS + 2 * KV_HEADS) * HEAD_DIM;
    specs.retain(|spec| !["attn_q", "attn_k", "attn_v"].iter().any(|part| spec.name.contains(part)));
    specs.push(tiny::spec("blk.0.attn_qkv.weight", &[D_MODEL, rows], BlockType::F32));
    specs.push(tiny::spec("blk.0.attn_qkv.bias", &[rows], BlockType::F32));
    tiny::write(&path, &tiny::metadata(), &specs);
    let base = open(&path).expect("opened");
    assert!(base.config.attention_bias);
    let v = base.weights.matrix("model.layers.0.self_attn.v_proj.weight").expect("matrix");
    let mut row = vec![0.0; D_MODEL];
    v.decode_row(0, &mut row);
    assert_eq!((v.rows(), row[0] as usize), (KV_HEADS * HEAD_DIM, (tiny::HEADS + KV_HEADS) * HEAD_DIM));
    let k = base.weights.vector("model.layers.0.self_attn.k_proj.bias").expect("bias");
    let first = tiny::HEADS * HEAD_DIM;
    assert_eq!((k.len(), (k[1] * 64.0) as usize), (KV_HEADS * HEAD_DIM, first + 2));
}

#[test]
fn rope_freqs_become_factors() {
    let dir = temporary();
    let path = dir.path().join("tiny.gguf");
    let mut specs = tiny::specs();
    specs.push(tiny::spec("rope_freqs.weight", &[HEAD_DIM / 2], BlockType::F32));
    let mut metadata = tiny::metadata();
    metadata.set("llama.rope.scaling.factor", 2_f32.into());
    let mut writer = GgufWriter::create(&path, &metadata, specs.clone()).expect("created");
    for spec in &specs {
        let bytes = match spec.name.as_str() {
            "rope_freqs.weight" => [1_f32, 1.0, 4.0, 8.0].iter().flat_map(|x| x.to_le_bytes()).collect(),
            _ => tiny::bytes(spec),
        };
        writer.write(&spec.name, &bytes).expect("written");
    }
    writer.finish().expect("finished");
    let base = open(&path).expect("opened");
    assert_eq!(base.config.rope_scaling, Some(RopeScaling::Factors(vec![2.0, 2.0, 8.0, 16.0])));
}

#[test]
fn the_configuration_survives_its_own_metadata() {
    let config = open_with(|_| ()).expect("opened").config;
    let described = hyper_parameters(&config);
    let again = open_with(|metadata| {
        metadata.retain(|key| !key.starts_with("llama."));
        for (key, value) in described.iter() {
            metadata.set(key, value.clone());
        }
    });
    assert_eq!(again.expect("opened").config, config);
}

#[test]
fn the_digest_follows_the_weights_only() {
    let digest = |change: fn(&mut Metadata)| open_with(change).expect("opened").digest().expect("digest");
    let original = digest(|_| ());
    assert_eq!(original.len(), 64);
    assert_eq!(original, digest(|metadata| metadata.set("general.name", "Renamed".into())));

    let dir = temporary();
    let path = dir.path().join("tiny.gguf");
    let specs = tiny::specs();
    let mut writer = GgufWriter::create(&path, &tiny::metadata(), specs.clone()).expect("created");
    for spec in &specs {
        let mut bytes = tiny::bytes(spec);
        if spec.name == "blk.0.ffn_up.weight" {
            bytes[2] ^= 1;
        }
        writer.write(&spec.name, &bytes).expect("written");
    }
    writer.finish().expect("finished");
    assert_ne!(original, open(&path).expect("opened").digest().expect("digest"));
}

#[test]
fn defaults_are_those_of_llama_cpp() {
    let base = open_with(|metadata| {
        metadata.retain(|key| {
            !["rope", "bos", "eos", "token_type", ".pre", "chat"].iter().any(|part| key.contains(part))
        });
    })
    .expect("opened");
    assert_eq!(base.config.rope_theta.to_bits(), 10_000_f64.to_bits());
    // gpt2's bos and eos default to 11, which this vocabulary does not have.
    assert_eq!((base.special.bos, base.special.eos, base.special.eot), (None, None, Some(2)));
    assert_eq!(base.chat_template, None);
}

#[test]
fn unusable_metadata_is_listed_at_once() {
    let text = failure(open_with(|metadata| {
        metadata.remove("llama.context_length");
        metadata.remove("llama.attention.layer_norm_rms_epsilon");
        metadata.set("llama.rope.scaling.type", "yarn".into());
        metadata.set("llama.embedding_length", (-32_i32).into());
        metadata.set("llama.expert_count", 8_u32.into());
    }));
    for part in
        ["context_length is missing", "epsilon is missing", "yarn", "embedding_length is I32(-32)", "experts"]
    {
        assert!(text.contains(part), "{part} in {text}");
    }
    let text = failure(open_with(|metadata| {
        metadata.remove("tokenizer.ggml.model");
        metadata.set("tokenizer.ggml.token_type", vec![1_i32].into());
    }));
    assert!(
        text.contains("tokenizer.ggml.model is missing") && text.contains("has 1 values, expected 6"),
        "{text}"
    );
}

#[test]
fn other_architectures_are_named_with_the_supported_ones() {
    let Err(error) = open_with(|metadata| metadata.set("general.architecture", "mamba".into())) else {
        panic!("opened");
    };
    assert!(error.to_string().contains("\"mamba\""), "{error}");
    assert_eq!(error.help().expect("help").to_string(), "supported architectures: llama");
    let text = failure(open_with(|metadata| metadata.set("general.type", "adapter".into())));
    assert!(text.contains("\"adapter\", expected \"model\""), "{text}");
}

#[test]
fn tensors_that_do_not_fit_are_listed_at_once() {
    let dir = temporary();
    let path = dir.path().join("tiny.gguf");
    let mut specs = tiny::specs();
    specs.retain(|spec| !spec.name.contains("ffn_up") && !spec.name.contains("output_norm"));
    specs[2].dims[1] /= 2;
    specs.push(tiny::spec("blk.0.attn_q_norm.weight", &[HEAD_DIM], BlockType::F32));
    tiny::write(&path, &tiny::metadata(), &specs);
    let text = failure(open(&path));
    for part in [
        "blk.0.ffn_up.weight: missing, expected [64, 32]",
        "output_norm.weight: missing, expected [32]",
        "blk.0.attn_q.weight: expected [32, 32], got [16, 32]",
        "blk.0.attn_q_norm.weight: unexpected, [8]",
    ] {
        assert!(text.contains(part), "{part} in {text}");
    }
}

#[test]
fn other_files_are_recognised() {
    for (start, help) in [
        (&b"version https://git-lfs.github.com/spec/v1\n"[..], "git lfs pull"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"PK\x03\x04 and so on", "zip archive"),
        (b"\x40\0\0\0\0\0\0\0{\"__metadata__\":{}}", "safetensors"),
        (b"something else entirely", "GGUF file"),
    ] {
        let error = parse(start.to_vec()).expect_err("not GGUF");
        assert!(matches!(error, FormatError::NotGguf { .. }), "{error}");
        assert!(error.help().expect("help").to_string().contains(help), "{help}");
    }
    assert!(matches!(parse(Vec::new()), Err(FormatError::Truncated { .. })));
    assert!(matches!(parse(b"GG".to_vec()), Err(FormatError::Truncated { .. })));
}

#[test]
fn versions_and_byte_orders() {
    let mut bytes = tiny::model_bytes();
    bytes[4] = 2;
    assert!(parse(bytes.clone()).is_ok(), "version 2 has the same layout");
    for version in [0, 1, 4] {
        bytes[4] = version;
        let error = parse(bytes.clone()).expect_err("unknown version");
        assert!(
            matches!(error, FormatError::GgufVersion { version: v, .. } if v == u32::from(version)),
            "{error}"
        );
    }
    bytes[4..8].copy_from_slice(&3_u32.to_be_bytes());
    assert!(matches!(parse(bytes), Err(FormatError::GgufBigEndian { .. })));
}

#[test]
fn every_truncation_is_an_error_and_trailing_padding_is_optional() {
    let bytes = tiny::model_bytes();
    let file = parse(bytes.clone()).expect("whole");
    // The last tensor's size is a multiple of the alignment, so the file ends with its last byte.
    assert_eq!(file.tensors().last().expect("tensors").byte_len() % 32, 0);
    for len in 0..bytes.len() {
        assert!(parse(bytes[..len].to_vec()).is_err(), "{len} of {} bytes", bytes.len());
    }
    let error = parse(bytes[..bytes.len() - 1].to_vec()).expect_err("one byte short");
    let expected = format!("truncated: {} bytes, expected at least {}", bytes.len() - 1, bytes.len());
    assert!(error.to_string().contains(&expected), "{error}");
    assert!(error.to_string().contains("output_norm.weight"), "{error}");
}

#[test]
fn broken_rules_are_named() {
    let bytes = tiny::model_bytes();
    let find =
        |needle: &[u8]| bytes.windows(needle.len()).position(|window| window == needle).expect("present");
    let change = |position: usize, with: &[u8]| {
        let mut bytes = bytes.clone();
        bytes[position..position + with.len()].copy_from_slice(with);
        parse(bytes).expect_err("broken").to_string()
    };
    let key = find(b"tokenizer.ggml.bos_token_id");
    let text = change(key, b"tokenizer.ggml.eos_token_id");
    assert!(text.contains("tokenizer.ggml.eos_token_id occurs twice"), "{text}");

    let name = find(b"blk.0.attn_k.weight");
    let text = change(name, b"blk.0.attn_q.weight");
    assert!(text.contains("tensor blk.0.attn_q.weight occurs twice"), "{text}");

    // After the name: u32 dimension count, u64 dimensions, u32 type, u64 offset.
    let after = name + b"blk.0.attn_k.weight".len();
    let text = change(after, &5_u32.to_le_bytes());
    assert!(text.contains("5 dimensions, expected 1 to 4"), "{text}");
    let text = change(after + 4, &33_u64.to_le_bytes());
    assert!(text.contains("offset"), "{text}");
    let text = change(after + 4, &u64::MAX.to_le_bytes());
    assert!(text.contains("dimension of -1"), "{text}");
    let text = change(after + 4, &(i64::MAX as u64).to_le_bytes());
    assert!(text.contains("too large"), "{text}");
    let text = change(after + 20, &16_u32.to_le_bytes());
    assert!(text.contains("blk.0.attn_k.weight: IQ2_XXS"), "{text}");
    let text = change(after + 20, &999_u32.to_le_bytes());
    assert!(text.contains("unknown type 999"), "{text}");
    let text = change(after + 24, &64_u64.to_le_bytes());
    assert!(text.contains("is at offset 64, expected"), "{text}");

    // Forged counts: of tensors, of metadata, of an array, of a string.
    for position in [8, 16] {
        for count in [u64::MAX, i64::MAX as u64, 1 << 40] {
            let text = change(position, &count.to_le_bytes());
            assert!(text.contains("truncated") || text.contains("negative"), "{text}");
        }
    }
    let merges = find(b"tokenizer.ggml.merges") + b"tokenizer.ggml.merges".len();
    for count in [u64::MAX, 1 << 30, 1 << 20] {
        let text = change(merges + 8, &count.to_le_bytes());
        assert!(text.contains("elements") || text.contains("truncated") || text.contains("string"), "{text}");
    }
    let text = change(merges, &9_u32.to_le_bytes().map(|byte| byte + 90));
    assert!(text.contains("unknown type"), "{text}");
    let text = change(merges + 4, &9_u32.to_le_bytes());
    assert!(text.contains("array of array"), "{text}");
    let text = change(merges + 16, &u64::MAX.to_le_bytes());
    assert!(text.contains("string of"), "{text}");
    let text = change(merges + 24, &[0xff, 0xfe]);
    assert!(text.contains("not UTF-8"), "{text}");
}

#[test]
fn alignment_is_honoured_and_checked() {
    let dir = temporary();
    let path = dir.path().join("aligned.gguf");
    let mut metadata = tiny::metadata();
    metadata.set("general.alignment", 64_u32.into());
    tiny::write(&path, &metadata, &tiny::specs());
    let file = GgufFile::open(&path).expect("opened");
    for (tensor, spec) in file.tensors().iter().zip(&tiny::specs()) {
        assert_eq!(&file.data(tensor).expect("data")[..], tiny::bytes(spec));
    }
    for bad in [Value::U32(48), Value::U32(0), Value::U64(32)] {
        metadata.set("general.alignment", bad);
        let error = GgufWriter::create(&path, &metadata, tiny::specs()).err().expect("refused");
        assert!(error.to_string().contains("general.alignment"), "{error}");
    }
    let bytes = std::fs::read(&path).expect("read");
    let at = bytes.windows(17).position(|window| window == b"general.alignment").expect("present") + 17 + 4;
    let mut bytes = bytes;
    bytes[at] = 48;
    let error = parse(bytes).expect_err("48 is no power of two");
    assert!(error.to_string().contains("U32(48), expected a u32 that is a power of two"), "{error}");
}

#[test]
fn the_writer_refuses_what_the_format_cannot_hold() {
    let dir = temporary();
    let path = dir.path().join("x.gguf");
    let specs = vec![
        tiny::spec(&"n".repeat(64), &[32], BlockType::F32),
        tiny::spec("rows", &[33, 2], BlockType::Q8_0),
        tiny::spec("zero", &[0], BlockType::F32),
        tiny::spec("twice", &[1], BlockType::F32),
        tiny::spec("twice", &[1], BlockType::F32),
    ];
    let error = GgufWriter::create(&path, &Metadata::new(), specs).err().expect("refused").to_string();
    for part in ["64 bytes", "33 values, expected a multiple of 32 for Q8_0", "zero", "twice occurs twice"] {
        assert!(error.contains(part), "{part} in {error}");
    }

    let specs = vec![tiny::spec("a", &[4], BlockType::F32), tiny::spec("b", &[4], BlockType::F32)];
    let mut writer = GgufWriter::create(&path, &Metadata::new(), specs).expect("created");
    assert!(writer.write("b", &[0; 16]).is_err(), "a comes first");
    writer.write("a", &[0; 8]).expect("half of a");
    assert!(writer.write("a", &[0; 9]).is_err(), "too long");
    writer.write("a", &[0; 8]).expect("the other half");
    let error = writer.finish().expect_err("b is missing").to_string();
    assert!(error.contains("tensor b has 0 bytes, expected 16"), "{error}");
    assert_eq!(std::fs::read_dir(dir.path()).expect("listed").count(), 0, "nothing is left behind");
}

#[test]
fn split_files_are_joined() {
    let dir = temporary();
    let part = |number: usize| dir.path().join(format!("tiny-{number:05}-of-00003.gguf"));
    let specs = tiny::specs();
    let write = |number: usize, total: i32, no: u16| {
        let mut metadata = if number == 1 { tiny::metadata() } else { Metadata::new() };
        metadata.set("split.no", no.into());
        metadata.set("split.count", 3_u16.into());
        metadata.set("split.tensors.count", total.into());
        let range = [0..4, 4..8, 8..specs.len()][number - 1].clone();
        tiny::write(&part(number), &metadata, &specs[range]);
    };
    let total = specs.len() as i32;
    write(1, total, 0);
    write(2, total, 1);
    let text = failure(open(&part(1)));
    assert!(text.contains("tiny-00003-of-00003.gguf"), "{text}");
    write(3, total, 2);

    let whole = dir.path().join("whole.gguf");
    tiny::write(&whole, &tiny::metadata(), &specs);
    let (joined, whole) = (open(&part(1)).expect("joined"), open(&whole).expect("whole"));
    assert_eq!(joined.config, whole.config);
    assert_eq!(joined.digest().expect("digest"), whole.digest().expect("digest"));
    let tune_formats::Source::Gguf(file) = &joined.source else { panic!("not GGUF") };
    assert!(file.parts().len() == 3 && file.metadata().get("split.count").is_none());

    let text = failure(open(&part(2)));
    assert!(text.contains("not the first part"), "{text}");
    write(3, total, 1);
    assert!(failure(open(&part(1))).contains("split.no"));
    write(3, total, 2);
    write(1, total + 1, 0);
    assert!(failure(open(&part(1))).contains("expected 12"));
    write(1, total, 0);
    let renamed = dir.path().join("renamed.gguf");
    std::fs::copy(part(1), &renamed).expect("copied");
    assert!(failure(open(&renamed)).contains("does not end in -00001-of-00003.gguf"));
}
