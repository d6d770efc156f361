//! Logits of tiny random Llamas, equal to those of transformers in float32.
//!
//! Fixtures and tolerance: `tests/parity/README.md`.

use std::ops::Range;
use std::path::{Path, PathBuf};

use burn::tensor::Device;
use safetensors::SafeTensors;
use tune_formats::peft::{self, Adapter, Factor};
use tune_formats::{FormatError, Weights};
use tune_kernels::Arithmetic;
use tune_models::{Layout, Llama, Quantization};
use tune_quant::{BlockType, RowOrder, StoredMatrix};

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
    let worst = got
        .iter()
        .zip(want)
        .enumerate()
        .max_by(|(_, a), (_, b)| (a.0 - a.1).abs().total_cmp(&(b.0 - b.1).abs()));
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
    assert_close(
        &format!("{name} packed"),
        &logits(&model, &packed, &ranges),
        &expected.logits("logits_packed"),
    );
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

/// The adapter with factors as a file of `block_type` holds them.
fn stored(mut adapter: Adapter, block_type: BlockType) -> Adapter {
    for lora in adapter.layers.values_mut() {
        for (factor, rows, cols) in [(&mut lora.a, lora.r, lora.d_in), (&mut lora.b, lora.d_out, lora.r)] {
            let mut bytes = Vec::new();
            block_type.encode(&factor.values(), &mut bytes);
            let matrix = StoredMatrix::from_blocks(block_type, rows, cols, bytes.into(), RowOrder::Natural);
            *factor = Factor::Stored(matrix.expect("whole rows"));
        }
    }
    adapter
}

#[test]
fn an_adapter_that_stays_in_its_file_answers_bit_for_bit_as_one_of_tensors() {
    let expected = Expected::open("llama-tied");
    let tokens = expected.tokens("tokens_2");
    let plain = peft::read(&fixtures().join("peft/plain/final")).expect("fixture adapter");
    let in_file = [BlockType::F32, BlockType::F16, BlockType::BF16].map(|t| stored(plain.clone(), t));
    for adapter in [plain].into_iter().chain(in_file) {
        for arithmetic in [Arithmetic::F32, Arithmetic::Bf16] {
            let mut model = model("llama-tied").with_arithmetic(arithmetic);
            let base = logits(&model, &tokens, &[0..tokens.len()]);
            model.attach_weights(&adapter, 0.0).expect("it fits");
            assert!(model.blocks().iter().all(tune_models::Block::is_trained));
            let tensors = logits(&model, &tokens, &[0..tokens.len()]);
            model.attach_frozen(&adapter).expect("it fits");
            assert!(
                !model.blocks().iter().any(tune_models::Block::is_trained)
                    && model.parameters_mut().is_empty()
            );
            assert_eq!(logits(&model, &tokens, &[0..tokens.len()]), tensors);
            assert_ne!(tensors, base, "the adapter has no effect");
        }
    }
}

/// The weights of another model with every block linear rounded to NF4 and held as float32.
struct Rounded(Box<dyn Weights>);

impl Weights for Rounded {
    fn names(&self) -> Vec<String> {
        self.0.names()
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.0.shape(name)
    }

    fn matrix(&self, name: &str) -> Result<StoredMatrix, FormatError> {
        let stored = self.0.matrix(name)?;
        if !name.contains("_proj") {
            return Ok(stored);
        }
        let rounded = stored.to_nf4();
        let mut values = vec![0.0; rounded.rows() * rounded.cols()];
        for (row, out) in values.chunks_exact_mut(rounded.cols()).enumerate() {
            rounded.decode_row(row, out);
        }
        Ok(StoredMatrix::from_f32(rounded.rows(), rounded.cols(), &values))
    }

    fn vector(&self, name: &str) -> Result<Vec<f32>, FormatError> {
        self.0.vector(name)
    }
}

#[test]
fn nf4_on_load_equals_the_same_weights_rounded_beforehand() {
    let open = || tune_formats::open(&fixtures().join("models/llama-untied-bf16-sharded")).expect("opens");
    let device = Device::flex();
    let quantised = tune_models::load(&open(), Quantization::Nf4, &device).expect("loads");
    let base = open();
    let rounded = Rounded(base.weights);
    let rounded = Llama::load(&base.config, &rounded, Quantization::Keep, &device).expect("loads");

    let expected = Expected::open("llama-untied-bf16-sharded");
    let tokens = expected.tokens("tokens_2");
    let got = logits(&quantised, &tokens, &[0..tokens.len()]);
    assert_close("NF4", &got, &logits(&rounded, &tokens, &[0..tokens.len()]));
    let original = expected.logits("logits_2");
    assert!(got.iter().zip(&original).any(|(a, b)| (a - b).abs() > 0.01), "quantisation had no effect");
}
