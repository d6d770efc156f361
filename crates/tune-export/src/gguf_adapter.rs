//! The adapter alone as a GGUF file, applied by llama.cpp and Ollama over the unchanged base.
//!
//! ```text
//! y = W x + (alpha / r) · B (A x)
//! ```
//!
//! with one `alpha` for the file and r taken from each pair. An rsLoRA adapter gets alpha·√r; where layers have ranks of
//! their own, what that leaves goes into their B. Rows of B are permuted as the rows of their base tensor are.

use std::path::Path;

use tune_formats::FormatError;
use tune_formats::gguf::{GgufFile, GgufWriter, Metadata, TensorSpec, names};
use tune_formats::peft::LoraWeights;
use tune_quant::{BlockType, RowOrder};

use crate::staging::Staged;
use crate::verify::Differences;
use crate::{ExportError, ExportEvent, ExportRequest, Written, gguf_metadata, merge};

pub(crate) fn write(
    request: &ExportRequest<'_>,
    notes: &mut Vec<String>,
    progress: &mut dyn FnMut(ExportEvent),
) -> Result<Written, ExportError> {
    let (alpha, pairs) = pairs(request)?;
    let metadata = gguf_metadata::of_adapter(request, alpha);
    let specs: Vec<TensorSpec> = pairs.iter().flat_map(Pair::specs).collect();
    let size = gguf_metadata::byte_len(&metadata)
        + specs.iter().map(|spec| spec.byte_len().unwrap_or_default() as u64 + 128).sum::<u64>();
    let staged = Staged::file(request.out, size)?;
    let count = specs.len();
    progress(ExportEvent::Started { tensors: count, bytes: size });

    let mut writer = GgufWriter::create(staged.path(), &metadata, specs)?;
    for (done, pair) in (1..).zip(&pairs) {
        for (spec, values) in pair.specs().iter().zip([pair.lora.a.values(), pair.stored_b().into()]) {
            let mut bytes = Vec::new();
            BlockType::F32.encode(&values, &mut bytes);
            writer.append(&spec.name, bytes.into())?;
        }
        progress(ExportEvent::Wrote { done: 2 * done, tensors: count });
    }
    writer.finish()?;
    Differences::find(request, staged.path(), notes, |differences| {
        verify(staged.path(), &metadata, &pairs, differences)?;
        progress(ExportEvent::Verified { done: count, tensors: count });
        Ok(())
    })?;
    staged.publish()?;
    Ok(Written { tensors: count, stored_update: None })
}

/// One adapted layer.
struct Pair<'a> {
    /// GGUF name of the base tensor, `.weight` included.
    name: String,
    lora: &'a LoraWeights,
    order: RowOrder,
    /// What a loader's `alpha / r` lacks of the layer's scale; 1 but for rsLoRA with several ranks.
    factor: f32,
}

impl Pair<'_> {
    /// A `[r, d_in]` and B `[d_out, r]`, dimensions in file order.
    fn specs(&self) -> [TensorSpec; 2] {
        let LoraWeights { r, d_in, d_out, .. } = *self.lora;
        [("lora_a", vec![d_in, r]), ("lora_b", vec![r, d_out])].map(|(suffix, dims)| TensorSpec {
            name: format!("{}.{suffix}", self.name),
            dims,
            block_type: BlockType::F32,
        })
    }

    /// B with its rows where the base tensor has them.
    fn stored_b(&self) -> Vec<f32> {
        let (r, b) = (self.lora.r, self.lora.b.values());
        merge::rows_as_stored(self.order, self.lora.d_out)
            .into_iter()
            .flat_map(|row| &b[row * r..(row + 1) * r])
            .map(|value| value * self.factor)
            .collect()
    }
}

/// The layers and the `alpha` of the file.
fn pairs<'a>(request: &ExportRequest<'a>) -> Result<(f32, Vec<Pair<'a>>), ExportError> {
    let ExportRequest { base, adapter, .. } = *request;
    merge::check(base, adapter)?;
    let alpha = adapter.config.scale() * adapter.config.r as f64;
    let mut problems = Vec::new();
    let mut pairs = Vec::new();
    for (module, lora) in &adapter.layers {
        let weight = format!("{module}.weight");
        if base.weights.shape(&weight).is_none() {
            problems.push(format!(
                "{module}: the base uses its embedding as head, so there is no tensor to adapt"
            ));
            continue;
        }
        match names::to_gguf(base.config.architecture, &weight) {
            Some(name) if name.len() + ".lora_a".len() < 64 => {
                let order = names::row_order(&base.config, &weight);
                let factor = (adapter.config.scale_of(lora.r) * lora.r as f64 / alpha) as f32;
                pairs.push(Pair { name, lora, order, factor });
            }
            _ => problems.push(format!("{module}: GGUF has no name for it")),
        }
    }
    if pairs.is_empty() && problems.is_empty() {
        problems.push("the adapter has no layers".to_owned());
    }
    let alpha = alpha as f32;
    if alpha == 0.0 || !alpha.is_finite() {
        problems.push(format!("lora_alpha: {alpha}, which loaders take for a scale of 1"));
    }
    if !problems.is_empty() {
        return Err(ExportError::NotAGgufAdapter { problems });
    }
    pairs.iter().try_for_each(check_finite)?;
    Ok((alpha, pairs))
}

fn check_finite(pair: &Pair<'_>) -> Result<(), ExportError> {
    let (a, b) = (pair.lora.a.values(), pair.lora.b.values());
    if a.iter().chain(b.iter()).all(|v| v.is_finite()) {
        return Ok(());
    }
    Err(ExportError::NotFinite {
        tensor: pair.name.clone(),
        when: "in the adapter".to_owned(),
        help: "the training run diverged: train again with a lower learning rate".to_owned(),
    })
}

/// Reads the file back and compares every value with the adapter's, row by row in Hugging Face order.
fn verify(
    path: &Path,
    metadata: &Metadata,
    pairs: &[Pair<'_>],
    differences: &mut Differences,
) -> Result<(), ExportError> {
    let file = GgufFile::open(path)?;
    differences.metadata(file.metadata(), metadata);
    if file.tensors().len() != 2 * pairs.len() {
        differences.push(format!("there are {} tensors, expected {}", file.tensors().len(), 2 * pairs.len()));
    }
    for pair in pairs {
        let [a, b] = pair.specs();
        differences.values(&a.name, &values(&file, &a)?, &pair.lora.a.values());
        let stored = values(&file, &b)?;
        let r = pair.lora.r;
        for (row, wanted) in pair.lora.b.values().chunks_exact(r).enumerate() {
            let start = pair.order.stored_row(row) * r;
            let wanted: Vec<f32> = wanted.iter().map(|value| value * pair.factor).collect();
            differences.values(&b.name, stored.get(start..start + r).unwrap_or_default(), &wanted);
        }
    }
    Ok(())
}

/// The values of a tensor as they lie in the file; none where it is not there as specified.
fn values(file: &GgufFile, spec: &TensorSpec) -> Result<Vec<f32>, FormatError> {
    let found = file.tensor(&spec.name).filter(|t| t.dims == spec.dims && t.block_type == spec.block_type);
    let Some(tensor) = found else { return Ok(Vec::new()) };
    let mut values = vec![0.0; tensor.elements()];
    tensor.block_type.decode(&file.data(tensor)?, &mut values);
    Ok(values)
}
