//! A tiny Llama as a GGUF file, written by the writer under test.

#![allow(dead_code, unreachable_pub, reason = "each test binary uses a part")]

use std::path::{Path, PathBuf};

use tune_formats::gguf::{GgufWriter, Metadata, TensorSpec, Value};
use tune_quant::BlockType::{self, F16, F32, Q8_0};

pub const D_MODEL: usize = 32;
pub const D_FF: usize = 64;
pub const HEADS: usize = 4;
pub const KV_HEADS: usize = 2;
pub const HEAD_DIM: usize = 8;
pub const VOCAB: usize = 6;
pub const TOKENS: [&str; VOCAB] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a", "b", "ab"];

/// Path of a committed fixture.
pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/parity").join(name)
}

pub fn metadata() -> Metadata {
    let mut metadata = Metadata::new();
    let mut set = |key: &str, value: Value| metadata.set(key, value);
    set("general.architecture", "llama".into());
    set("general.type", "model".into());
    set("general.name", "Tiny".into());
    set("llama.context_length", 128_u32.into());
    set("llama.embedding_length", (D_MODEL as u32).into());
    set("llama.block_count", 1_u32.into());
    set("llama.feed_forward_length", (D_FF as u32).into());
    set("llama.attention.head_count", (HEADS as u32).into());
    set("llama.attention.head_count_kv", (KV_HEADS as u32).into());
    set("llama.attention.layer_norm_rms_epsilon", 1e-5_f32.into());
    set("llama.rope.freq_base", 100_000_f32.into());
    set("tokenizer.ggml.model", "gpt2".into());
    set("tokenizer.ggml.pre", "smollm".into());
    set("tokenizer.ggml.tokens", TOKENS.map(str::to_owned).to_vec().into());
    set("tokenizer.ggml.token_type", vec![3_i32, 3, 3, 1, 1, 1].into());
    set("tokenizer.ggml.merges", vec!["a b".to_owned()].into());
    set("tokenizer.ggml.bos_token_id", 1_u32.into());
    set("tokenizer.ggml.eos_token_id", 2_u32.into());
    set("tokenizer.ggml.padding_token_id", 2_u32.into());
    set("tokenizer.ggml.add_bos_token", false.into());
    set("tokenizer.chat_template", "{{ messages }}".into());
    metadata
}

pub fn spec(name: &str, dims: &[usize], block_type: BlockType) -> TensorSpec {
    TensorSpec { name: name.into(), dims: dims.into(), block_type }
}

pub fn specs() -> Vec<TensorSpec> {
    let (q, kv) = (HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM);
    vec![
        spec("token_embd.weight", &[D_MODEL, VOCAB], Q8_0),
        spec("blk.0.attn_norm.weight", &[D_MODEL], F32),
        spec("blk.0.attn_q.weight", &[D_MODEL, q], F32),
        spec("blk.0.attn_k.weight", &[D_MODEL, kv], F16),
        spec("blk.0.attn_v.weight", &[D_MODEL, kv], Q8_0),
        spec("blk.0.attn_output.weight", &[q, D_MODEL], Q8_0),
        spec("blk.0.ffn_norm.weight", &[D_MODEL, 1], F32),
        spec("blk.0.ffn_gate.weight", &[D_MODEL, D_FF], Q8_0),
        spec("blk.0.ffn_up.weight", &[D_MODEL, D_FF], Q8_0),
        spec("blk.0.ffn_down.weight", &[D_FF, D_MODEL], Q8_0),
        spec("output_norm.weight", &[D_MODEL], F32),
    ]
}

/// The values of a tensor: row number and column number are both visible in them.
pub fn values(spec: &TensorSpec) -> Vec<f32> {
    let cols = spec.dims[0];
    let count = spec.dims.iter().product();
    (0..count).map(|i: usize| (i / cols) as f32 + (i % cols) as f32 / 64.0).collect()
}

pub fn bytes(spec: &TensorSpec) -> Vec<u8> {
    let mut out = Vec::new();
    spec.block_type.encode(&values(spec), &mut out);
    out
}

pub fn write(path: &Path, metadata: &Metadata, specs: &[TensorSpec]) {
    let mut writer = GgufWriter::create(path, metadata, specs.to_vec()).expect("created");
    for spec in specs {
        writer.write(&spec.name, &bytes(spec)).expect("written");
    }
    writer.finish().expect("finished");
}

/// The bytes of a complete tiny model.
pub fn model_bytes() -> Vec<u8> {
    let dir = tempfile::tempdir().expect("temporary directory");
    let path = dir.path().join("tiny.gguf");
    write(&path, &metadata(), &specs());
    std::fs::read(&path).expect("read back")
}
