//! A GGUF LoRA adapter, read back as what PEFT would call it.
//!
//! The file has one `alpha` and scales each pair by `alpha / r` with the rank of that pair. Pairs of a smaller rank than
//! the largest are filled up with zeros, so that one rank and one scale hold for all of them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use tune_quant::{RowOrder, StoredMatrix};

use super::{GgufFile, TensorInfo, names};
use crate::peft::{Adapter, AdapterConfig, Factor, LoraWeights};
use crate::{FormatError, ModelConfig};

/// Whether the metadata of a GGUF file say that it is an adapter.
pub fn is_adapter(file: &GgufFile) -> bool {
    file.metadata().string("general.type") == Some("adapter")
}

/// Reads the adapter at `path`, made for a base of this configuration; rows come back in Hugging Face order.
///
/// # Errors
/// A file that is no LoRA adapter for this architecture, or pairs that do not fit each other.
pub fn read_adapter(path: &Path, config: &ModelConfig) -> Result<Adapter, FormatError> {
    let file = GgufFile::open(path)?;
    let metadata = file.metadata();
    let alpha = metadata.get("adapter.lora.alpha").and_then(super::Value::as_float);
    let (true, Some(alpha)) = (is_adapter(&file), alpha) else {
        return Err(FormatError::damaged(
            path,
            "general.type and adapter.lora.alpha do not say that it is a LoRA",
        ));
    };
    let architecture = metadata.string("general.architecture").unwrap_or_default();
    if architecture != names::architecture_name(config.architecture) {
        return Err(FormatError::damaged(path, format!("it is made for architecture \"{architecture}\"")));
    }
    let mut layers = BTreeMap::new();
    for tensor in file.tensors() {
        let Some(stem) = tensor.name.strip_suffix(".lora_a") else {
            if tensor.name.ends_with(".lora_b") {
                continue;
            }
            return Err(FormatError::tensor(&tensor.name, "it is no part of a LoRA adapter"));
        };
        let weight = names::to_hf(config.architecture, stem);
        let module = weight.as_deref().and_then(|name| name.strip_suffix(".weight"));
        let (Some(weight), Some(module)) = (&weight, module) else {
            return Err(FormatError::tensor(&tensor.name, "the architecture has no such layer"));
        };
        layers.insert(module.to_owned(), pair(&file, stem, tensor, names::row_order(config, weight))?);
    }
    if layers.is_empty() {
        return Err(FormatError::damaged(path, "the adapter has no layers"));
    }
    let r = layers.values().map(|lora| lora.r).max().unwrap_or(1);
    for lora in layers.values_mut() {
        fill_up(lora, r);
    }
    let targets: BTreeSet<&str> = layers.keys().filter_map(|module| module.rsplit('.').next()).collect();
    let target_modules = targets.into_iter().map(str::to_owned).collect();
    let config = AdapterConfig { r, lora_alpha: alpha, target_modules, ..AdapterConfig::default() };
    Ok(Adapter { config, layers })
}

fn pair(file: &GgufFile, stem: &str, a: &TensorInfo, order: RowOrder) -> Result<LoraWeights, FormatError> {
    let name_b = format!("{stem}.lora_b");
    let b = file.tensor(&name_b).ok_or_else(|| FormatError::tensor(&name_b, "it is missing"))?;
    let (&[d_in, r], &[r_of_b, d_out]) = (&a.dims[..], &b.dims[..]) else {
        return Err(FormatError::tensor(&a.name, "a pair has two dimensions each"));
    };
    if r != r_of_b || r == 0 {
        let reason = format!("its rank is {r}, that of {name_b} {r_of_b}");
        return Err(FormatError::tensor(&a.name, reason));
    }
    let factor = |tensor: &TensorInfo, rows, cols, order| {
        StoredMatrix::from_blocks(tensor.block_type, rows, cols, file.data(tensor)?, order)
            .map(Factor::Stored)
            .ok_or_else(|| FormatError::tensor(&tensor.name, "its bytes do not fill its rows"))
    };
    Ok(LoraWeights {
        r,
        d_in,
        d_out,
        a: factor(a, r, d_in, RowOrder::Natural)?,
        b: factor(b, d_out, r, order)?,
    })
}

/// The same update at rank `r`.
fn fill_up(lora: &mut LoraWeights, r: usize) {
    if lora.r == r {
        return;
    }
    let factor = r as f32 / lora.r as f32;
    lora.a.to_mut().resize(r * lora.d_in, 0.0);
    let mut b = vec![0.0; lora.d_out * r];
    for (wide, narrow) in b.chunks_exact_mut(r).zip(lora.b.values().chunks_exact(lora.r)) {
        wide.iter_mut().zip(narrow).for_each(|(wide, narrow)| *wide = factor * narrow);
    }
    (lora.r, lora.b) = (r, b.into());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_smaller_rank_is_filled_up_without_changing_the_update() {
        let mut lora =
            LoraWeights { r: 1, d_in: 2, d_out: 2, a: vec![1.0, 2.0].into(), b: vec![3.0, 4.0].into() };
        fill_up(&mut lora, 2);
        assert_eq!(
            (lora.r, &lora.a.values()[..], &lora.b.values()[..]),
            (2, &[1.0, 2.0, 0.0, 0.0][..], &[6.0, 0.0, 8.0, 0.0][..])
        );
    }
}
