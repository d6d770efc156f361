//! Logits of tiny random Llamas, equal to those of transformers in float32.
//!
//! Fixtures and tolerance: `tests/parity/README.md`.

use std::ops::Range;
use std::path::{Path, PathBuf};

use burn::tensor::Device;
use safetensors::SafeTensors;
use tune_models::{Layout, Llama, Quantization};

const TOLERANCE: f32 = 1e-4;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/parity")
}

fn model(name: &str) -> Llama {
    let base = tune_formats::open(&fixtures().join("models").join(name)).expect("fixture model opens");
    tune_models::load(&base, Quantization::Keep, &Device::flex()).expect("fixture model loads")
}

struct Expected {
    bytes: Vec<u8>,
}

impl Expected {
    fn open(name: &str) -> Self {
        let path = fixtures().join("logits").join(format!("{name}.safetensors"));
        Self { bytes: std::fs::read(path).expect("fixture logits") }
    }

    fn words(&self, name: &str) -> Vec<[u8; 4]> {
        let tensors = SafeTensors::deserialize(&self.bytes).expect("safetensors");
        let tensor = tensors.tensor(name).expect("tensor of the fixture");
        tensor.data().chunks_exact(4).map(|word| word.try_into().expect("four bytes")).collect()
    }

    fn tokens(&self, name: &str) -> Vec<u32> {
        self.words(name).into_iter().map(|word| i32::from_le_bytes(word) as u32).collect()
    }

    fn logits(&self, name: &str) -> Vec<f32> {
        self.words(name).into_iter().map(f32::from_le_bytes).collect()
    }
}

fn logits(model: &Llama, tokens: &[u32], documents: &[Range<usize>]) -> Vec<f32> {
    let hidden = model.hidden(tokens, &Layout::documents(documents));
    model.logits(hidden).into_data().iter::<f32>().collect()
}

fn assert_close(what: &str, got: &[f32], want: &[f32]) {
    assert_eq!(got.len(), want.len(), "{what}: number of values");
    let worst = got.iter().zip(want).enumerate().max_by(|(_, a), (_, b)| {
        (a.0 - a.1).abs().total_cmp(&(b.0 - b.1).abs())
    });
    let (at, (got, want)) = worst.expect("values");
    let difference = (got - want).abs();
    assert!(difference <= TOLERANCE, "{what}[{at}]: got {got}, want {want}, tolerance {TOLERANCE}");
}

fn check(name: &str) {
    let (model, expected) = (model(name), Expected::open(name));
    let documents: Vec<Vec<u32>> = (0..3).map(|i| expected.tokens(&format!("tokens_{i}"))).collect();
    for (i, tokens) in documents.iter().enumerate() {
        let got = logits(&model, tokens, &[0..tokens.len()]);
        assert_close(&format!("{name} document {i}"), &got, &expected.logits(&format!("logits_{i}")));
    }

    let packed = expected.tokens("tokens_packed");
    let mut ranges = Vec::new();
    for document in &documents {
        let start = ranges.last().map_or(0, |range: &Range<usize>| range.end);
        ranges.push(start..start + document.len());
    }
    assert_close(&format!("{name} packed"), &logits(&model, &packed, &ranges), &expected.logits("logits_packed"));
}

#[test]
fn tied_llama_equals_transformers() {
    check("llama-tied");
}

#[test]
fn llama3_rope_scaling_equals_transformers() {
    check("llama-llama3-rope");
}

#[test]
fn untied_sharded_bfloat16_llama_equals_transformers() {
    check("llama-untied-bf16-sharded");
}

#[test]
fn a_cache_fed_in_pieces_gives_the_same_logits() {
    let (model, expected) = (model("llama-tied"), Expected::open("llama-tied"));
    let (tokens, want) = (expected.tokens("tokens_2"), expected.logits("logits_2"));
    let vocab = model.config().vocab_size;
    let mut cache = model.kv_cache(tokens.len());
    let mut done = 0;
    for piece in [5, 1, 1, 20, 6] {
        let hidden = model.hidden_cached(&tokens[done..done + piece], &mut cache);
        let got: Vec<f32> = model.logits(hidden).into_data().iter::<f32>().collect();
        assert_close(&format!("tokens from {done}"), &got, &want[done * vocab..(done + piece) * vocab]);
        done += piece;
    }
    assert_eq!((done, cache.remaining()), (tokens.len(), 0));
}

#[test]
fn nf4_on_load_changes_the_logits_a_little() {
    let base = tune_formats::open(&fixtures().join("models/llama-untied-bf16-sharded")).expect("opens");
    let quantised = tune_models::load(&base, Quantization::Nf4, &Device::flex()).expect("loads");
    let expected = Expected::open("llama-untied-bf16-sharded");
    let tokens = expected.tokens("tokens_2");
    let got = logits(&quantised, &tokens, &[0..tokens.len()]);
    let want = expected.logits("logits_2");
    let energy = |values: &mut dyn Iterator<Item = f32>| values.map(|v| f64::from(v * v)).sum::<f64>();
    let error = energy(&mut got.iter().zip(&want).map(|(g, w)| g - w)) / energy(&mut want.iter().copied());
    assert!(error > 1e-6, "quantisation had no effect");
    assert!(error < 0.1, "relative squared error of the logits is {error}");
}
