//! Base and adapter merged into one GGUF file.

use std::hash::Hasher;
use std::path::Path;
use std::sync::Arc;

use tune_formats::gguf::{GgufFile, GgufWriter, Metadata, TensorSpec, names};
use tune_formats::{BaseModel, RopeScaling, Source};
use tune_quant::{BlockType, RowOrder};

use crate::error_feedback::ErrorFeedback;
use crate::file_type::{FileType, ModelShape};
use crate::merge::{self, MergedTensor, Rounding, Values};
use crate::staging::Staged;
use crate::stored_update::Effect;
use crate::verify::Differences;
use crate::{ExportError, ExportEvent, ExportRequest, InputMoments, MergeRoute, Written, gguf_metadata};

/// Divisors of the rotary frequencies; no Hugging Face model stores them as a tensor.
const ROPE_FREQS: &str = "rope_freqs.weight";

pub(crate) fn write(
    request: &ExportRequest<'_>,
    file_type: FileType,
    notes: &mut Vec<String>,
    progress: &mut dyn FnMut(ExportEvent),
) -> Result<Written, ExportError> {
    let base = request.base;
    let metadata = gguf_metadata::of_model(request, file_type)?;
    let tensors = planned(base, merge::tensors(base, request.adapter)?, file_type)?;
    let specs: Vec<TensorSpec> = tensors.iter().map(|tensor| tensor.spec.clone()).collect();
    let size = gguf_metadata::byte_len(&metadata)
        + specs.iter().map(|spec| spec.byte_len().unwrap_or_default() as u64 + 128).sum::<u64>();
    let staged = Staged::file(request.out, size)?;
    progress(ExportEvent::Started { tensors: tensors.len(), bytes: size });

    let mut writer = GgufWriter::create(staged.path(), &metadata, specs)?;
    let mut effect = Effect::default();
    let mut feedbacks = Feedbacks::new(request);
    let mut digests = vec![None; tensors.len()];
    for (done, tensor) in (1..).zip(&tensors) {
        let TensorSpec { name, block_type, .. } = &tensor.spec;
        let rounding = match (request.options.route, feedbacks.of(tensor)) {
            (_, Some(feedback)) => Rounding::Feedback(feedback),
            (MergeRoute::Rtn, None) => Rounding::BaseGrid,
            (MergeRoute::Refit | MergeRoute::Gptq, None) => Rounding::Refit,
        };
        let mut written = RowDigests::new(tensor);
        effect += tensor.merged.encode(*block_type, rounding, tensor.order, |bytes| {
            if matches!(rounding, Rounding::Feedback(_)) {
                written.push(&bytes);
            }
            Ok(writer.append(name, bytes)?)
        })?;
        digests[done - 1] = written.finish();
        progress(ExportEvent::Wrote { done, tensors: tensors.len() });
    }
    writer.finish()?;
    let plain = match request.options.route {
        MergeRoute::Rtn => Rounding::BaseGrid,
        MergeRoute::Refit | MergeRoute::Gptq => Rounding::Refit,
    };
    Differences::find(request, staged.path(), notes, |differences| {
        verify(staged.path(), &metadata, &tensors, (plain, &digests), differences, progress)
    })?;
    staged.publish()?;
    Ok(Written { tensors: tensors.len(), stored_update: effect.stored_update() })
}

/// A tensor and how it lies in the file.
struct PlannedTensor<'a> {
    merged: MergedTensor<'a>,
    spec: TensorSpec,
    order: RowOrder,
}

fn planned<'a>(
    base: &BaseModel,
    merged: Vec<MergedTensor<'a>>,
    file_type: FileType,
) -> Result<Vec<PlannedTensor<'a>>, ExportError> {
    let config = &base.config;
    let tied = !merged.iter().any(|tensor| tensor.name == "lm_head.weight");
    let model = ModelShape::new(config, tied);
    let mut planned = Vec::with_capacity(merged.len() + 1);
    if let Some(factors) = rope_factors(base)? {
        planned.push(PlannedTensor {
            spec: TensorSpec {
                name: ROPE_FREQS.to_owned(),
                dims: vec![factors.len()],
                block_type: BlockType::F32,
            },
            order: RowOrder::Natural,
            merged: MergedTensor { name: ROPE_FREQS.to_owned(), values: Values::Vector(factors) },
        });
    }
    for tensor in merged {
        // Names without a GGUF counterpart were left out when the tensors were listed.
        let Some(name) = names::to_gguf(config.architecture, &tensor.name) else { continue };
        let shape = tensor.shape();
        let block_type = file_type.of_tensor(&name, &shape, model);
        let spec = TensorSpec { name, dims: shape.iter().rev().copied().collect(), block_type };
        planned.push(PlannedTensor { order: names::row_order(config, &tensor.name), spec, merged: tensor });
    }
    Ok(planned)
}

/// The error feedback of one tensor after the other. Layers with the same input share it, and only one is held.
struct Feedbacks<'a> {
    request: &'a ExportRequest<'a>,
    moments: Option<Arc<InputMoments>>,
    feedback: Option<ErrorFeedback>,
}

impl<'a> Feedbacks<'a> {
    fn new(request: &'a ExportRequest<'a>) -> Self {
        Self { request, moments: None, feedback: None }
    }

    fn of(&mut self, tensor: &PlannedTensor<'_>) -> Option<&ErrorFeedback> {
        let options = &self.request.options;
        let (MergeRoute::Gptq, Values::Matrix(matrix)) = (options.route, &tensor.merged.values) else {
            return None;
        };
        let block_type = tensor.spec.block_type;
        let is_copied = !matrix.is_changed() && matrix.base_type() == Some(block_type);
        if is_copied || !block_type.is_quantized() {
            return None;
        }
        let module = tensor.merged.name.strip_suffix(".weight")?;
        let moments = options.activations.and_then(|moments| moments(module))?;
        if !self.moments.as_ref().is_some_and(|held| Arc::ptr_eq(held, &moments)) {
            self.feedback = (moments.d_in == matrix.cols()).then(|| ErrorFeedback::new(&moments)).flatten();
            self.moments = Some(moments);
        }
        self.feedback.as_ref()
    }
}

/// A number for each row of a tensor, taken from what was written, to compare with what is read.
struct RowDigests {
    row_bytes: usize,
    order: RowOrder,
    rows: Vec<u64>,
}

impl RowDigests {
    fn new(tensor: &PlannedTensor<'_>) -> Self {
        let cols = tensor.spec.dims.first().copied().unwrap_or_default();
        let row_bytes = tensor.spec.block_type.row_bytes(cols).unwrap_or_default().max(1);
        Self { row_bytes, order: tensor.order, rows: Vec::new() }
    }

    /// Takes whole rows, in the order of the file.
    fn push(&mut self, bytes: &[u8]) {
        self.rows.extend(bytes.chunks_exact(self.row_bytes).map(row_digest));
    }

    /// In Hugging Face order; `None` where nothing was pushed.
    fn finish(self) -> Option<Vec<u64>> {
        let stored_row = |row| self.rows[self.order.stored_row(row)];
        (!self.rows.is_empty()).then(|| (0..self.rows.len()).map(stored_row).collect())
    }
}

/// Tells rows apart within one run of the program.
pub(crate) fn row_digest(bytes: &[u8]) -> u64 {
    let mut hasher = std::hash::DefaultHasher::new();
    hasher.write(bytes);
    hasher.finish()
}

/// The values of `rope_freqs.weight`. Linear scaling is metadata and has none.
fn rope_factors(base: &BaseModel) -> Result<Option<Vec<f32>>, ExportError> {
    if let Source::Gguf(file) = &base.source {
        let Some(tensor) = file.tensor(ROPE_FREQS) else { return Ok(None) };
        let mut factors = vec![0.0; tensor.elements()];
        tensor.block_type.decode(&file.data(tensor)?, &mut factors);
        return Ok(Some(factors));
    }
    match base.config.rope_scaling {
        Some(RopeScaling::Llama3 { .. } | RopeScaling::Factors(_)) => Ok(base.config.rope_factors()),
        Some(RopeScaling::Linear { .. }) | None => Ok(None),
    }
}

/// Reads the file back through the project's own reader and compares all of it with what was meant: metadata, the
/// list of tensors, and every row in Hugging Face order.
fn verify(
    path: &Path,
    metadata: &Metadata,
    tensors: &[PlannedTensor<'_>],
    (plain, digests): (Rounding<'_>, &[Option<Vec<u64>>]),
    differences: &mut Differences,
    progress: &mut dyn FnMut(ExportEvent),
) -> Result<(), ExportError> {
    let model = tune_formats::open(path)?;
    let file = GgufFile::open(path)?;
    differences.metadata(file.metadata(), metadata);
    let found: Vec<TensorSpec> = file
        .tensors()
        .iter()
        .map(|t| TensorSpec { name: t.name.clone(), dims: t.dims.clone(), block_type: t.block_type })
        .collect();
    if found.iter().ne(tensors.iter().map(|tensor| &tensor.spec)) {
        differences.push("the list of tensors is another one");
        return Ok(());
    }
    for ((done, tensor), digests) in (1..).zip(tensors).zip(digests) {
        let TensorSpec { name, block_type, .. } = &tensor.spec;
        match &tensor.merged.values {
            Values::Vector(values) => {
                let found = match file.tensor(name) {
                    Some(info) if name == ROPE_FREQS => {
                        let mut found = vec![0.0; info.elements()];
                        info.block_type.decode(&file.data(info)?, &mut found);
                        found
                    }
                    _ => model.weights.vector(&tensor.merged.name)?,
                };
                differences.values(name, &found, values);
            }
            // Codes chosen with feedback are not chosen again: they cost more than everything else.
            Values::Matrix(_) if digests.is_some() => {
                let found = model.weights.matrix(&tensor.merged.name)?;
                for (row, wanted) in digests.iter().flatten().enumerate() {
                    differences.row_digest(name, row, found.row_blocks(row), (*block_type, *wanted));
                }
            }
            Values::Matrix(_) => {
                let found = model.weights.matrix(&tensor.merged.name)?;
                let row_bytes = block_type.row_bytes(found.cols()).unwrap_or(1);
                let mut row = 0;
                tensor.merged.encode(*block_type, plain, RowOrder::Natural, |bytes| {
                    for wanted in bytes.chunks_exact(row_bytes) {
                        differences.row(name, row, found.row_blocks(row), (*block_type, wanted));
                        row += 1;
                    }
                    bytes.release();
                    Ok(())
                })?;
                found.release();
            }
        }
        progress(ExportEvent::Verified { done, tensors: tensors.len() });
    }
    Ok(())
}
