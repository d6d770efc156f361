//! A GGUF model of a given shape with random weights: to measure memory and speed with, and to test. It has learned
//! nothing.
//!
//! ```text
//! norms 1        biases 0        matrices N(0, 0.02²), those that write to the residual stream N(0, 0.02² / 2 n_layers)
//! ```
//!
//! As GPT-2 and Llama begin (Radford et al. 2019, section 2.3), so that activations and gradients have the sizes of a
//! real model. Departure: a matrix is not drawn value by value. For each storage type 2¹⁸ values are drawn and encoded
//! once, and matrices are put together from these blocks in random order, as fast as memory: encoding the 32 billion
//! weights of a 30B model would take an hour. Blocks repeat, so nothing but shapes, types and sizes of the values is to
//! be concluded from such a model.

use std::collections::HashMap;
use std::path::Path;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use tune_formats::gguf::{GgufWriter, Metadata, TensorSpec, hyper_parameters, names};
use tune_formats::{ModelConfig, TokenType, expected_tensors};
use tune_quant::BlockType;

use crate::file_type::{FileType, ModelShape};
use crate::gguf_metadata::{self, QUANTIZATION_VERSION};
use crate::staging::Staged;
use crate::{ExportError, ExportEvent};

/// What to make.
#[derive(Clone, Copy)]
pub struct RandomModel<'a> {
    /// `general.name`.
    pub name: &'a str,
    /// Its shape.
    pub config: &'a ModelConfig,
    /// What its matrices are stored as.
    pub file_type: FileType,
    /// The `tokenizer.*` keys: of another model, or [`byte_tokenizer`].
    pub tokenizer: &'a Metadata,
    /// Decides every weight.
    pub seed: u64,
}

/// The fewest tokens that [`byte_tokenizer`] has.
pub const BYTE_TOKENS: usize = 3 + 256;

/// Standard deviation of a matrix: `initializer_range` of Llama.
const DEVIATION: f32 = 0.02;

/// Values that are drawn and encoded for each type and deviation.
const POOL: usize = 1 << 18;

/// Values that stay together: those of a block, and of small blocks some.
const PIECE: usize = 32;

/// Bytes that a thread fills from one stream of random numbers.
const RUN: usize = 1 << 20;

/// Bytes that are put together before they are written.
const SHEET: usize = 32 * RUN;

/// Writes `model` to `out`, one part of a tensor after another: memory does not grow with the model. The same model,
/// shape, type and seed give the same bytes.
///
/// # Errors
/// Too little space, or a file that cannot be written; nothing is left behind then.
pub fn write_random_model(
    model: &RandomModel<'_>,
    out: &Path,
    progress: &mut dyn FnMut(ExportEvent),
) -> Result<(), ExportError> {
    let metadata = metadata(model);
    let tensors = planned(model);
    let specs: Vec<TensorSpec> = tensors.iter().map(|(spec, _)| spec.clone()).collect();
    let size = gguf_metadata::byte_len(&metadata) + specs.iter().map(padded_len).sum::<u64>();
    let staged = Staged::file(out, size)?;
    progress(ExportEvent::Started { tensors: tensors.len(), bytes: size });

    let mut pools: HashMap<(BlockType, u32), Pool> = HashMap::new();
    let mut writer = GgufWriter::create(staged.path(), &metadata, specs)?;
    let mut sheet = Vec::new();
    for (index, (spec, values)) in tensors.iter().enumerate() {
        let len = spec.byte_len().unwrap_or_default();
        match *values {
            Values::Constant(value) => writer.write(&spec.name, &value.to_le_bytes().repeat(len / 4))?,
            Values::Normal(deviation) => {
                let key = (spec.block_type, deviation.to_bits());
                let pool =
                    pools.entry(key).or_insert_with(|| Pool::new(spec.block_type, deviation, model.seed));
                let mut rng = ChaCha8Rng::seed_from_u64(model.seed);
                rng.set_stream(1 + index as u64);
                let step = pool.whole_pieces(SHEET);
                for start in (0..len).step_by(step) {
                    sheet.resize(step.min(len - start), 0);
                    pool.fill(&mut sheet, rng.random());
                    writer.write(&spec.name, &sheet)?;
                }
            }
        }
        progress(ExportEvent::Wrote { done: index + 1, tensors: tensors.len() });
    }
    writer.finish()?;
    staged.publish()
}

/// A vocabulary in which a text has one token for each of its bytes, for a model with `vocab_size` tokens: unknown,
/// begin, end, the bytes, and tokens that no text has.
///
/// # Panics
/// When `vocab_size` is below [`BYTE_TOKENS`].
pub fn byte_tokenizer(vocab_size: usize) -> Metadata {
    assert!(vocab_size >= BYTE_TOKENS, "a vocabulary of {vocab_size} tokens for all bytes");
    let special = [("<unk>", TokenType::Unknown), ("<s>", TokenType::Control), ("</s>", TokenType::Control)];
    let special = special.map(|(text, kind)| (text.to_owned(), kind));
    let bytes = (0..=255).map(|byte: u8| (format!("<0x{byte:02X}>"), TokenType::Byte));
    let unused = (0..vocab_size - BYTE_TOKENS).map(|i| (format!("<unused_{i}>"), TokenType::Unused));
    let (tokens, types): (Vec<String>, Vec<i32>) =
        special.into_iter().chain(bytes).chain(unused).map(|(text, kind)| (text, kind.to_ggml())).unzip();

    let mut keys = Metadata::new();
    let mut set = |key: &str, value| keys.set(format!("tokenizer.ggml.{key}"), value);
    set("model", "llama".into());
    set("pre", "default".into());
    set("scores", vec![0.0_f32; tokens.len()].into());
    set("tokens", tokens.into());
    set("token_type", types.into());
    for (key, id) in [("unknown_token_id", 0_u32), ("bos_token_id", 1), ("eos_token_id", 2)] {
        set(key, id.into());
    }
    set("add_bos_token", true.into());
    set("add_eos_token", false.into());
    set("add_space_prefix", false.into());
    keys
}

fn metadata(model: &RandomModel<'_>) -> Metadata {
    let mut metadata = hyper_parameters(model.config);
    metadata.set("general.type", "model".into());
    metadata.set("general.name", model.name.into());
    metadata.set("general.description", format!("random weights, seed {}", model.seed).into());
    for (key, value) in model.tokenizer.iter().filter(|(key, _)| key.starts_with("tokenizer.")) {
        metadata.set(key, value.clone());
    }
    metadata.set("general.quantization_version", QUANTIZATION_VERSION.into());
    metadata.set("general.file_type", model.file_type.number().into());
    metadata
}

/// The values of a tensor.
#[derive(Clone, Copy)]
enum Values {
    /// All the same, in `f32`.
    Constant(f32),
    /// Normally distributed with this deviation.
    Normal(f32),
}

/// Every tensor of the file and its values.
fn planned(model: &RandomModel<'_>) -> Vec<(TensorSpec, Values)> {
    let config = model.config;
    let shape = ModelShape::new(config, config.tie_word_embeddings);
    let tensors = expected_tensors(config).into_iter().filter_map(|(hf, dims)| {
        let name = names::to_gguf(config.architecture, &hf)?;
        let block_type = model.file_type.of_tensor(&name, &dims, shape);
        let part = hf.rsplit('.').nth(1).unwrap_or_default();
        let writes_to_residual = matches!(part, "o_proj" | "down_proj");
        let values = match dims.len() {
            1 => Values::Constant(if part.contains("norm") { 1.0 } else { 0.0 }),
            _ if writes_to_residual => {
                Values::Normal(DEVIATION / (2.0 * config.num_hidden_layers as f32).sqrt())
            }
            _ => Values::Normal(DEVIATION),
        };
        Some((TensorSpec { name, dims: dims.into_iter().rev().collect(), block_type }, values))
    });
    tensors.collect()
}

/// Bytes of a tensor, of its entry in the list and of padding, at most.
fn padded_len(spec: &TensorSpec) -> u64 {
    spec.byte_len().unwrap_or_default() as u64 + 128
}

/// Encoded values to put matrices together from.
struct Pool {
    bytes: Vec<u8>,
    piece_bytes: usize,
}

impl Pool {
    fn new(block_type: BlockType, deviation: f32, seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let values: Vec<f32> =
            (0..POOL / 2).flat_map(|_| normal_pair(&mut rng)).map(|x| x * deviation).collect();
        let mut bytes = Vec::new();
        block_type.encode(&values, &mut bytes);
        let piece = PIECE.max(block_type.block_len());
        Self { bytes, piece_bytes: piece / block_type.block_len() * block_type.block_bytes() }
    }

    /// As many bytes of `bytes` as are whole pieces: no block is torn between two runs.
    fn whole_pieces(&self, bytes: usize) -> usize {
        bytes / self.piece_bytes * self.piece_bytes
    }

    /// Fills `out` with pieces; `seed` decides which.
    fn fill(&self, out: &mut [u8], seed: u64) {
        let pieces = self.bytes.len() / self.piece_bytes;
        out.par_chunks_mut(self.whole_pieces(RUN)).enumerate().for_each(|(stream, out)| {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            rng.set_stream(stream as u64);
            for four in out.chunks_mut(4 * self.piece_bytes) {
                let mut bits: u64 = rng.random();
                for out in four.chunks_mut(self.piece_bytes) {
                    let start = (bits & 0xffff) as usize % pieces * self.piece_bytes;
                    out.copy_from_slice(&self.bytes[start..start + out.len()]);
                    bits >>= 16;
                }
            }
        });
    }
}

/// Two independent values of N(0, 1) (Box and Muller 1958).
fn normal_pair(rng: &mut impl Rng) -> [f32; 2] {
    let radius = (-2.0 * (1.0 - rng.random::<f64>()).ln()).sqrt();
    let (sin, cos) = (std::f64::consts::TAU * rng.random::<f64>()).sin_cos();
    [(radius * cos) as f32, (radius * sin) as f32]
}

#[cfg(test)]
mod tests {
    use std::fs;

    use tune_formats::Architecture;

    use super::*;

    fn config() -> ModelConfig {
        ModelConfig {
            architecture: Architecture::Llama,
            vocab_size: 300,
            hidden_size: 256,
            intermediate_size: 768,
            num_hidden_layers: 2,
            num_attention_heads: 4,
            num_key_value_heads: 2,
            head_dim: 64,
            rms_norm_eps: 1e-5,
            rope_theta: 10_000.0,
            rope_scaling: None,
            max_position_embeddings: 512,
            tie_word_embeddings: false,
            attention_bias: false,
        }
    }

    fn write(out: &Path, file_type: FileType, seed: u64) {
        let tokenizer = byte_tokenizer(300);
        let config = config();
        let model = RandomModel { name: "random", config: &config, file_type, tokenizer: &tokenizer, seed };
        write_random_model(&model, out, &mut |_| {}).expect("written");
    }

    #[test]
    fn every_type_opens_with_its_shape_and_the_deviation_it_should_have() {
        let dir = tempfile::tempdir().expect("temporary directory");
        for file_type in FileType::ALL {
            let out = dir.path().join(format!("{file_type}.gguf"));
            write(&out, file_type, 7);
            let base = tune_formats::open(&out).expect("a whole model");
            assert_eq!(base.config, config(), "{file_type}");
            for (name, wanted) in [
                ("model.layers.1.mlp.up_proj.weight", DEVIATION),
                ("model.layers.0.mlp.down_proj.weight", DEVIATION / 2.0),
                ("lm_head.weight", DEVIATION),
            ] {
                let matrix = base.weights.matrix(name).expect("there");
                let mut row = vec![0.0; matrix.cols()];
                let (mut sum, mut squares, mut count) = (0.0, 0.0, 0.0);
                for i in 0..matrix.rows() {
                    matrix.decode_row(i, &mut row);
                    for x in &row {
                        sum += f64::from(*x);
                        squares += f64::from(*x) * f64::from(*x);
                        count += 1.0;
                    }
                }
                let (mean, deviation) = (sum / count, f64::sqrt(squares / count));
                let wanted = f64::from(wanted);
                assert!(mean.abs() < 0.03 * wanted, "{file_type} {name}: mean {mean}");
                assert!((deviation / wanted - 1.0).abs() < 0.1, "{file_type} {name}: deviation {deviation}");
            }
            assert!(
                base.weights
                    .vector("model.norm.weight")
                    .expect("there")
                    .iter()
                    .all(|x| x.to_bits() == 1.0_f32.to_bits())
            );
        }
    }

    #[test]
    fn the_seed_decides_every_byte() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let bytes = |name: &str, seed| {
            let out = dir.path().join(name);
            write(&out, FileType::Q4_0, seed);
            fs::read(out).expect("read")
        };
        let first = bytes("a", 1);
        assert_eq!(first, bytes("b", 1));
        assert_ne!(first, bytes("c", 2));
    }

    #[test]
    fn runs_begin_with_a_whole_piece() {
        let pool = Pool::new(BlockType::Q4_0, 1.0, 3);
        let mut out = vec![0; 2 * RUN + 18 * 5];
        let len = out.len() / 18 * 18;
        out.truncate(len);
        pool.fill(&mut out, 1);
        let known: std::collections::HashSet<&[u8]> = pool.bytes.chunks(18).collect();
        assert!(out.chunks(18).all(|block| known.contains(block)));
    }
}
