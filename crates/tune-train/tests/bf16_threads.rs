//! Training in `bf16` over quantised weights gives the same bits with any number of threads, with and without
//! checkpointing, and heeds dropout. The model is wide enough that every product is split.

use burn::tensor::{Device, Tensor, TensorData};
use tune_adapters::{Dropout, LoraConfig, Targets};
use tune_data::MicroBatch;
use tune_formats::{Architecture, FormatError, ModelConfig, Weights};
use tune_kernels::Arithmetic;
use tune_models::{Llama, Quantization};
use tune_quant::{BlockType, RowOrder, StoredMatrix};
use tune_train::{loss_and_gradients, parameters};

const DOCUMENTS: [usize; 3] = [170, 5, 125];

/// Weights that depend on nothing but their shapes, as `Q4_0`.
struct Invented<'a>(&'a ModelConfig);

impl Weights for Invented<'_> {
    fn names(&self) -> Vec<String> {
        Vec::new()
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        if name.ends_with("bias") {
            return None;
        }
        if name.contains("norm") {
            return Some(vec![self.0.hidden_size]);
        }
        let linears = self.0.block_linears();
        let linear = linears.iter().find(|(linear, ..)| name.contains(linear));
        let (rows, cols) =
            linear.map_or((self.0.vocab_size, self.0.hidden_size), |(_, rows, cols)| (*rows, *cols));
        Some(vec![rows, cols])
    }

    fn matrix(&self, name: &str) -> Result<StoredMatrix, FormatError> {
        let shape = self.shape(name).expect("a matrix");
        let scale = 1.5 / (shape[1] as f32).sqrt();
        let values: Vec<f32> = uniform(seed(name), shape[0] * shape[1]).map(|v| v * scale).collect();
        let mut bytes = Vec::new();
        BlockType::Q4_0.encode(&values, &mut bytes);
        let stored =
            StoredMatrix::from_blocks(BlockType::Q4_0, shape[0], shape[1], bytes.into(), RowOrder::Natural);
        Ok(stored.expect("whole rows"))
    }

    fn vector(&self, name: &str) -> Result<Vec<f32>, FormatError> {
        Ok(uniform(seed(name), self.0.hidden_size).map(|v| 1.0 + 0.2 * v).collect())
    }
}

fn seed(name: &str) -> u64 {
    name.bytes().fold(7, |seed, byte| seed * 31 % 1_000_003 + u64::from(byte))
}

/// Values in [-1, 1) that depend only on `seed`.
fn uniform(seed: u64, len: usize) -> impl Iterator<Item = f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    (0..len).map(move |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    })
}

fn model(arithmetic: Arithmetic, dropout: f64) -> Llama {
    let config = ModelConfig {
        architecture: Architecture::Llama,
        vocab_size: 5003,
        hidden_size: 320,
        intermediate_size: 864,
        num_hidden_layers: 2,
        num_attention_heads: 5,
        num_key_value_heads: 1,
        head_dim: 64,
        rms_norm_eps: 1e-5,
        rope_theta: 1e4,
        rope_scaling: None,
        max_position_embeddings: 512,
        tie_word_embeddings: true,
        attention_bias: false,
    };
    let device = Device::flex();
    let model = Llama::load(&config, &Invented(&config), Quantization::Keep, &device).expect("loads");
    let mut model = model.with_arithmetic(arithmetic);
    let targets = Targets::new(&["all-linear".to_string()], None, config.num_hidden_layers).expect("targets");
    model.attach(&LoraConfig { rank: 12, alpha: 24.0, use_rslora: false, dropout }, &targets, 3);
    for (seed, (name, parameter)) in parameters(&mut model).into_iter().enumerate() {
        if name.contains("lora_B") {
            let shape = parameter.dims();
            let values = uniform(seed as u64, shape[0] * shape[1]).map(|v| 0.05 * v).collect();
            *parameter = Tensor::from_data(TensorData::new::<f32, _>(values, shape), &device);
        }
    }
    model
}

fn batch() -> MicroBatch {
    let mut batch = MicroBatch { input_ids: Vec::new(), targets: Vec::new(), documents: Vec::new() };
    for len in DOCUMENTS {
        let start = batch.input_ids.len();
        let ids: Vec<u32> = uniform(len as u64, len).map(|v| ((v + 1.0) * 2500.0) as u32).collect();
        batch.input_ids.extend(&ids);
        batch.targets.extend(ids.iter().skip(1).map(|id| *id as i32).chain([-100]));
        batch.documents.push(start..start + len);
    }
    batch
}

/// Loss and all gradients, one after the other.
fn step(model: &Llama, kept_blocks: usize, dropout: Option<Dropout>) -> Vec<f32> {
    let (loss, gradients) = loss_and_gradients(model, &batch(), 1e-2, kept_blocks, dropout);
    let values = gradients.iter().flat_map(|g| g.to_data().iter::<f32>().collect::<Vec<_>>());
    [loss as f32].into_iter().chain(values).collect()
}

fn assert_same_bits(what: &str, got: &[f32], want: &[f32]) {
    let same = got.iter().zip(want).filter(|(got, want)| got.to_bits() == want.to_bits()).count();
    assert_eq!((same, got.len()), (want.len(), want.len()), "equal values {what}");
}

#[test]
fn the_same_bits_with_any_number_of_threads_and_of_kept_blocks() {
    let model = model(Arithmetic::Bf16, 0.0);
    let with_threads = |threads: usize, kept_blocks: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool of threads");
        pool.install(|| step(&model, kept_blocks, None))
    };
    let want = with_threads(1, 0);
    assert!(want.iter().all(|value| value.is_finite()) && want.iter().any(|value| *value != 0.0));
    for (threads, kept_blocks) in [(1, usize::MAX), (2, 0), (3, 1), (3, usize::MAX)] {
        let what = format!("with {threads} threads, {kept_blocks} blocks kept");
        assert_same_bits(&what, &with_threads(threads, kept_blocks), &want);
    }
}

#[test]
fn dropout_is_the_same_as_in_f32() {
    // The loss is larger than all gradients together.
    let error = |got: &[f32], want: &[f32]| {
        let (got, want) = (&got[1..], &want[1..]);
        let squares = got.iter().zip(want).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>();
        (squares / want.iter().map(|b| f64::from(*b).powi(2)).sum::<f64>()).sqrt()
    };
    let key = Some(Dropout { key: 9 });
    let want = step(&model(Arithmetic::F32, 0.5), 0, key);
    let model = model(Arithmetic::Bf16, 0.5);
    let (dropped, whole) = (step(&model, 0, key), step(&model, 0, None));
    assert!(error(&dropped, &want) < 0.01, "{}", error(&dropped, &want));
    assert!(error(&whole, &want) > 0.3, "{}", error(&whole, &want));
    assert_same_bits("with every block kept", &step(&model, usize::MAX, key), &dropped);
}
