//! Base and adapter, one row at a time.
//!
//! ```text
//! W' = W + s · B A
//! ```
//!
//! W `[d_out, d_in]` as stored and decoded to `f32`, A `[r, d_in]`, B `[d_out, r]`; the sum is formed in `f32` and
//! rounded once, when it is encoded: to the nearest values or with error feedback, on a grid of its own or on the
//! base's. W + ΔW exists for a few rows only.

use std::borrow::Cow;
use std::ops::{Deref, Range};

use rayon::prelude::*;
use tune_formats::peft::{Adapter, LoraWeights};
use tune_formats::{BaseModel, FormatError, TensorProblem};
use tune_quant::{BlockType, ByteView, Grid, RowOrder, Storage, StoredMatrix, largest_magnitude};

use crate::ExportError;
use crate::error_feedback::ErrorFeedback;
use crate::stored_update::Effect;

const EMBEDDING: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";

/// Values that are merged and encoded together: enough for all cores, little beside a model.
const CHUNK_VALUES: usize = 1 << 20;

/// No type of this crate overflows where all values are below it: the largest half is 64 times as much, and no search
/// gives a scale or a minimum so many times the values.
const SURELY_FINITE: f32 = 1024.0;

/// Values that one thread encodes at a time: encoders work on several blocks side by side, and short rows hold few.
const BATCH_VALUES: usize = 1 << 14;

/// The tensors of a merged model, in the order of the forward pass.
pub(crate) fn tensors<'a>(
    base: &'a BaseModel,
    adapter: &'a Adapter,
) -> Result<Vec<MergedTensor<'a>>, ExportError> {
    check(base, adapter)?;
    let mut names: Vec<String> =
        base.weights.names().into_iter().filter(|name| place(name).is_some()).collect();
    // A head that is trained apart from the embedding it was tied to becomes a tensor of its own.
    if base.config.tie_word_embeddings && adapter.layers.contains_key("lm_head") {
        names.push(HEAD.to_owned());
    }
    names.sort_by_key(|name| (place(name), name.clone()));
    names.into_iter().map(|name| MergedTensor::new(base, adapter, name)).collect()
}

/// One tensor of the merged model, under its Hugging Face name.
pub(crate) struct MergedTensor<'a> {
    pub(crate) name: String,
    pub(crate) values: Values<'a>,
}

/// How merged values become codes.
#[derive(Clone, Copy)]
pub(crate) enum Rounding<'a> {
    /// As the encoder of the type does it, scales included: what `llama-quantize` would write.
    Refit,
    /// To the nearest values of the base's grid, where the type stays.
    BaseGrid,
    /// With error feedback: on the base's grid where the type stays, else on the encoder's.
    Feedback(&'a ErrorFeedback),
}

/// The values of a tensor.
pub(crate) enum Values<'a> {
    /// Norms and biases; adapters do not change them.
    Vector(Vec<f32>),
    /// Everything else.
    Matrix(MergedMatrix<'a>),
}

/// A matrix of the base with the update of its adapter, if it has one.
pub(crate) struct MergedMatrix<'a> {
    base: StoredMatrix,
    update: Option<(f32, &'a LoraWeights)>,
}

/// A merged matrix while its rows are read.
pub(crate) struct MergedRows<'m> {
    matrix: &'m MergedMatrix<'m>,
    update: Option<Update<'m>>,
}

/// s · B A.
struct Update<'m> {
    scale: f32,
    a: Cow<'m, [f32]>,
    b: Cow<'m, [f32]>,
}

impl<'a> MergedTensor<'a> {
    fn new(base: &BaseModel, adapter: &'a Adapter, name: String) -> Result<Self, ExportError> {
        let stored = if name == HEAD && base.config.tie_word_embeddings { EMBEDDING } else { &name };
        let values = if base.weights.shape(stored).is_some_and(|shape| shape.len() == 1) {
            Values::Vector(base.weights.vector(stored)?)
        } else {
            let module = name.strip_suffix(".weight").unwrap_or(&name);
            let update =
                adapter.layers.get(module).map(|lora| (adapter.config.scale_of(lora.r) as f32, lora));
            Values::Matrix(MergedMatrix { base: base.weights.matrix(stored)?, update })
        };
        Ok(Self { name, values })
    }

    /// Shape, row-major.
    pub(crate) fn shape(&self) -> Vec<usize> {
        match &self.values {
            Values::Vector(values) => vec![values.len()],
            Values::Matrix(matrix) => vec![matrix.rows(), matrix.cols()],
        }
    }

    /// Encodes the tensor with its rows in `order` and gives the bytes, a few rows at a time, to `write`. Pages of base and
    /// adapter are released; those of bytes that are given on as they are stored, by whoever gets them.
    pub(crate) fn encode(
        &self,
        block_type: BlockType,
        rounding: Rounding<'_>,
        order: RowOrder,
        mut write: impl FnMut(ByteView) -> Result<(), ExportError>,
    ) -> Result<Effect, ExportError> {
        match &self.values {
            Values::Vector(values) => {
                let mut ordered = values.clone();
                for (row, &value) in values.iter().enumerate() {
                    ordered[order.stored_row(row)] = value;
                }
                let mut bytes = Vec::new();
                block_type.encode(&ordered, &mut bytes);
                let mut decoded = vec![0.0; values.len()];
                block_type.decode(&bytes, &mut decoded);
                self.check_finite(&ordered, &decoded, block_type)?;
                write(bytes.into())?;
                Ok(Effect::default())
            }
            Values::Matrix(matrix) => {
                if let Some(stored) = matrix.unchanged(block_type, order) {
                    let row_bytes = stored.len() / matrix.rows().max(1);
                    for rows in matrix.chunks() {
                        let bytes = stored.slice(rows.start * row_bytes..rows.end * row_bytes);
                        let Some(bytes) = bytes else { continue };
                        bytes.prepare();
                        write(bytes)?;
                    }
                    return Ok(Effect::default());
                }
                let hf_rows = rows_as_stored(order, matrix.rows());
                let matrix = matrix.read();
                let mut effect = Effect::default();
                for chunk in matrix.chunks() {
                    let (bytes, of_chunk) =
                        self.encode_rows(&matrix, block_type, rounding, &hf_rows[chunk])?;
                    effect += of_chunk;
                    write(bytes.into())?;
                }
                matrix.release();
                Ok(effect)
            }
        }
    }

    /// Encodes these Hugging Face rows, one after the other, on all cores.
    fn encode_rows(
        &self,
        matrix: &MergedRows<'_>,
        block_type: BlockType,
        rounding: Rounding<'_>,
        hf_rows: &[usize],
    ) -> Result<(Vec<u8>, Effect), ExportError> {
        let row_bytes = block_type.row_bytes(matrix.cols()).ok_or_else(|| {
            let reason =
                format!("rows of {} values are not whole {} blocks", matrix.cols(), block_type.name());
            FormatError::Tensor { name: self.name.clone(), reason }
        })?;
        let rows = (BATCH_VALUES / matrix.cols().max(1)).max(1);
        let mut bytes = vec![0; hf_rows.len() * row_bytes];
        let effect = bytes
            .par_chunks_mut((rows * row_bytes).max(1))
            .zip(hf_rows.par_chunks(rows))
            .map_init(Scratch::default, |scratch, (out, rows)| {
                self.encode_batch(matrix, block_type, rounding, rows, scratch, out)
            })
            .try_reduce(Effect::default, |a, b| Ok(a + b))?;
        Ok((bytes, effect))
    }

    /// Encodes a few rows into `out`.
    fn encode_batch(
        &self,
        matrix: &MergedRows<'_>,
        block_type: BlockType,
        rounding: Rounding<'_>,
        rows: &[usize],
        scratch: &mut Scratch,
        out: &mut [u8],
    ) -> Result<Effect, ExportError> {
        let Scratch { base, merged, decoded } = scratch;
        let cols = matrix.cols();
        let unchanged: Option<Vec<&[u8]>> =
            rows.iter().map(|&row| matrix.unchanged_row(row, block_type)).collect();
        if let Some(stored) = unchanged {
            out.copy_from_slice(&stored.concat());
            return Ok(Effect::default());
        }
        let base = if let Some(stored) = matrix.stored_floats(rows) {
            stored
        } else {
            base.resize(rows.len() * cols, 0.0);
            for (base, &row) in base.chunks_exact_mut(cols).zip(rows) {
                matrix.base.decode_row(row, base);
            }
            base
        };
        let merged = if matrix.is_changed() {
            merged.clear();
            merged.extend_from_slice(base);
            for (merged, &row) in merged.chunks_exact_mut(cols).zip(rows) {
                matrix.add_update(row, merged);
            }
            &merged[..]
        } else {
            base
        };
        let grids = match rounding {
            Rounding::Refit => Vec::new(),
            Rounding::BaseGrid | Rounding::Feedback(_) => matrix.grids(block_type, rows, merged),
        };
        match rounding {
            Rounding::BaseGrid if !grids.is_empty() => put_codes(&grids, &nearest_codes(&grids, merged), out),
            Rounding::Feedback(feedback) if !grids.is_empty() => {
                put_codes(&grids, &feedback.codes(&grids, merged), out);
            }
            _ => block_type.encode_into(merged, out),
        }
        if !matrix.is_changed() && largest_magnitude(merged) < SURELY_FINITE {
            return Ok(Effect::default());
        }
        decoded.resize(merged.len(), 0.0);
        block_type.decode(out, decoded);
        self.check_finite(merged, decoded, block_type)?;
        Ok(if matrix.is_changed() { Effect::of_rows(base, merged, decoded) } else { Effect::default() })
    }

    fn check_finite(
        &self,
        values: &[f32],
        decoded: &[f32],
        block_type: BlockType,
    ) -> Result<(), ExportError> {
        let not_finite = |when: String, help: &str| {
            Err(ExportError::NotFinite { tensor: self.name.clone(), when, help: help.to_owned() })
        };
        if !largest_magnitude(values).is_finite() {
            return not_finite(
                "in the base or the adapter".to_owned(),
                "the training run diverged or the base is damaged: train again with a lower learning rate",
            );
        }
        if largest_magnitude(decoded).is_finite() {
            return Ok(());
        }
        let largest = largest_magnitude(values);
        not_finite(
            format!("as {}: its largest magnitude is {largest}", block_type.name()),
            "export a type with the range of a single: --to gguf:bf16 or --to gguf:f32",
        )
    }
}

impl MergedMatrix<'_> {
    pub(crate) fn rows(&self) -> usize {
        self.base.rows()
    }

    pub(crate) fn cols(&self) -> usize {
        self.base.cols()
    }

    /// The type in which the base stores it; `None` for types without blocks of their own.
    pub(crate) fn base_type(&self) -> Option<BlockType> {
        self.base.row_blocks(0).map(|(block_type, _)| block_type)
    }

    /// The grids of some rows: the base's where the type stays, else those that the encoder of the type gives the
    /// merged values. None for floats.
    fn grids(&self, block_type: BlockType, rows: &[usize], merged: &[f32]) -> Vec<Grid> {
        let of_row = |(&row, merged): (&usize, &[f32])| match self.base.row_blocks(row) {
            Some((stored_type, bytes)) if stored_type == block_type => Grid::of(block_type, bytes),
            _ => {
                let mut bytes = Vec::new();
                block_type.encode(merged, &mut bytes);
                Grid::of(block_type, &bytes)
            }
        };
        rows.iter().zip(merged.chunks_exact(self.cols().max(1))).filter_map(of_row).collect()
    }

    /// Whether the adapter changes it.
    pub(crate) fn is_changed(&self) -> bool {
        self.update.is_some()
    }

    /// Ranges of rows of a size that fits in memory many times over.
    fn chunks(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let (rows, step) = (self.rows(), (CHUNK_VALUES / self.cols().max(1)).max(1));
        (0..rows).step_by(step).map(move |start| start..rows.min(start + step))
    }

    /// The stored bytes, where neither adapter nor encoding changes them and the rows stay in their order.
    fn unchanged(&self, block_type: BlockType, order: RowOrder) -> Option<&ByteView> {
        match self.base.storage() {
            Storage::Blocks { block_type: stored_type, bytes }
                if *stored_type == block_type && self.base.row_order() == order && !self.is_changed() =>
            {
                Some(bytes)
            }
            _ => None,
        }
    }

    /// The values of rows that are stored as floats, one after the other.
    fn stored_floats(&self, rows: &[usize]) -> Option<&[f32]> {
        let (values, order) = (self.base.as_f32()?, self.base.row_order());
        let first = order.stored_row(*rows.first()?);
        let follow = (first..).zip(rows).all(|(stored, &row)| order.stored_row(row) == stored);
        let cols = self.cols();
        values.get(first * cols..(first + rows.len()) * cols).filter(|_| follow)
    }

    /// The stored bytes of a row that neither the adapter nor the encoding changes.
    fn unchanged_row(&self, row: usize, block_type: BlockType) -> Option<&[u8]> {
        let (stored_type, bytes) = self.base.row_blocks(row)?;
        (!self.is_changed() && stored_type == block_type).then_some(bytes)
    }

    /// Lets the pages of base and adapter leave memory: it has been read. Those of the base are many, so a thread of the
    /// pool does it while what comes next begins.
    pub(crate) fn release(&self) {
        let base = self.base.clone();
        rayon::spawn(move || base.release());
        if let Some((_, lora)) = self.update {
            lora.a.release();
            lora.b.release();
        }
    }

    /// The matrix with its factors at hand: those of 16 bits are decoded for as long as it is read.
    pub(crate) fn read(&self) -> MergedRows<'_> {
        let update =
            self.update.map(|(scale, lora)| Update { scale, a: lora.a.values(), b: lora.b.values() });
        MergedRows { matrix: self, update }
    }
}

impl<'m> Deref for MergedRows<'m> {
    type Target = MergedMatrix<'m>;

    fn deref(&self) -> &Self::Target {
        self.matrix
    }
}

impl MergedRows<'_> {
    /// Row `row` of W'.
    pub(crate) fn merged_row(&self, row: usize, values: &mut [f32]) {
        self.base.decode_row(row, values);
        self.add_update(row, values);
    }

    fn add_update(&self, row: usize, values: &mut [f32]) {
        let Some(Update { scale, a, b }) = &self.update else { return };
        let rank = a.len() / self.cols();
        let weights = &b[row * rank..(row + 1) * rank];
        for (weight, a) in weights.iter().zip(a.chunks_exact(self.cols())) {
            let weight = scale * weight;
            for (value, a) in values.iter_mut().zip(a) {
                *value += weight * a;
            }
        }
    }
}

/// The codes of the values that are nearest to these, a grid a row.
fn nearest_codes(grids: &[Grid], merged: &[f32]) -> Vec<u8> {
    let rows = grids.iter().zip(merged.chunks_exact(merged.len() / grids.len()));
    rows.flat_map(|(grid, row)| row.iter().enumerate().map(|(j, value)| grid.nearest(j, *value).0)).collect()
}

/// The rows with these codes, one a value.
fn put_codes(grids: &[Grid], codes: &[u8], out: &mut [u8]) {
    let (cols, row_bytes) = (codes.len() / grids.len(), out.len() / grids.len());
    for ((grid, codes), out) in
        grids.iter().zip(codes.chunks_exact(cols)).zip(out.chunks_exact_mut(row_bytes))
    {
        out.copy_from_slice(&grid.with_codes(codes));
    }
}

/// The Hugging Face row that each stored row holds.
pub(crate) fn rows_as_stored(order: RowOrder, rows: usize) -> Vec<usize> {
    let mut held = vec![0; rows];
    for row in 0..rows {
        held[order.stored_row(row)] = row;
    }
    held
}

/// Every module of the adapter must be a linear layer of the base, in its shape. A head that is tied to the embedding
/// counts as one.
pub(crate) fn check(base: &BaseModel, adapter: &Adapter) -> Result<(), FormatError> {
    if adapter.layers.contains_key("model.embed_tokens") {
        let reason = "adapters of the embedding are not supported".to_owned();
        return Err(FormatError::Tensor { name: "model.embed_tokens".to_owned(), reason });
    }
    let Some(head) = adapter.layers.get("lm_head").filter(|_| base.config.tie_word_embeddings) else {
        return adapter.check_base(base);
    };
    let mut rest = adapter.clone();
    rest.layers.remove("lm_head");
    rest.check_base(base)?;
    let (expected, found) = (base.weights.shape(EMBEDDING), Some(vec![head.d_out, head.d_in]));
    if expected == found {
        return Ok(());
    }
    let problems = vec![TensorProblem { name: "lm_head".to_owned(), expected, found }];
    Err(FormatError::OtherBase { help: "pass the base that the adapter was trained on".to_owned(), problems })
}

/// Where a tensor comes in the forward pass; `None` for tensors that no engine reads, such as stored rotary tables.
fn place(name: &str) -> Option<(u8, usize, usize)> {
    match name {
        EMBEDDING => Some((0, 0, 0)),
        "model.norm.weight" => Some((2, 0, 0)),
        HEAD => Some((3, 0, 0)),
        _ => {
            let (layer, part) = name.strip_prefix("model.layers.")?.split_once('.')?;
            let known = part.starts_with("self_attn.")
                || part.starts_with("mlp.")
                || part.ends_with("layernorm.weight");
            let within = BLOCK.iter().position(|known| part.contains(known)).unwrap_or(BLOCK.len());
            (known && !part.contains("rotary_emb")).then_some((1, layer.parse().ok()?, within))
        }
    }
}

/// The order within a block: layers with the same input come one after the other.
const BLOCK: [&str; 9] = [
    "input_layernorm",
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "post_attention_layernorm",
    "gate_proj",
    "up_proj",
    "down_proj",
];

/// Buffers of one thread.
#[derive(Default)]
struct Scratch {
    base: Vec<f32>,
    merged: Vec<f32>,
    decoded: Vec<f32>,
}

#[cfg(test)]
mod tests {
    use tune_formats::ModelConfig;

    use super::*;

    #[test]
    fn order_is_that_of_the_forward_pass() {
        let mut names = [
            HEAD.to_owned(),
            "model.norm.weight".to_owned(),
            format!("{}.weight", ModelConfig::linear_path(10, "q_proj")),
            format!("{}.weight", ModelConfig::linear_path(2, "up_proj")),
            "model.layers.2.input_layernorm.weight".to_owned(),
            EMBEDDING.to_owned(),
            format!("{}.weight", ModelConfig::linear_path(2, "k_proj")),
        ];
        names.sort_by_key(|name| (place(name), name.clone()));
        assert_eq!(names[0], EMBEDDING);
        assert_eq!(names[2], "model.layers.2.self_attn.k_proj.weight");
        assert_eq!(names[4], "model.layers.10.self_attn.q_proj.weight");
        assert_eq!(names[6], HEAD);
        assert_eq!(place("model.layers.0.self_attn.rotary_emb.inv_freq"), None);
    }

    #[test]
    fn stored_rows_are_the_inverse() {
        let order = RowOrder::RotaryInterleaved { head_dim: 8 };
        let held = rows_as_stored(order, 16);
        assert_eq!(held[..8], [0, 4, 1, 5, 2, 6, 3, 7]);
        assert!((0..16).all(|row| held[order.stored_row(row)] == row));
    }
}
