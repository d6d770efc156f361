//! Writes loss and adapter gradients of given token ids, for comparison with other programs:
//! `cargo run --release -p tune-train --example gradients BASE ADAPTER TOKENS.json f32|bf16 OUT.safetensors`.
//!
//! BASE: a GGUF file or a Hugging Face directory. ADAPTER: a PEFT folder. TOKENS.json: a list of documents, each a
//! list of token ids; every token after a document's first is trained, and the loss is their mean. OUT holds each
//! gradient, `f32`, under the name of its parameter in a PEFT file, and `loss` `[1]`. `tests/parity/real_gradients.py`
//! runs it.

#![allow(missing_docs)]

use std::path::Path;

use burn::tensor::Device;
use miette::{Context, IntoDiagnostic, bail};
use safetensors::tensor::{Dtype, TensorView};
use tune_data::MicroBatch;
use tune_formats::peft;
use tune_kernels::Arithmetic;
use tune_models::Quantization;
use tune_train::{loss_and_gradients, parameters};

fn main() -> miette::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [base, adapter, tokens, arithmetic, out] = arguments.as_slice() else {
        bail!("usage: gradients BASE ADAPTER TOKENS.json f32|bf16 OUT.safetensors");
    };
    let arithmetic = match arithmetic.as_str() {
        "f32" => Arithmetic::F32,
        "bf16" => Arithmetic::Bf16,
        other => bail!("{other}: expected f32 or bf16"),
    };
    let json = std::fs::read(tokens).into_diagnostic().wrap_err_with(|| tokens.clone())?;
    let documents: Vec<Vec<u32>> = serde_json::from_slice(&json).into_diagnostic()?;

    let base = tune_formats::open(Path::new(base))?;
    let model = tune_models::load(&base, Quantization::Keep, &Device::flex())?;
    let mut model = model.with_arithmetic(arithmetic);
    model.attach_weights(&peft::read(Path::new(adapter))?, 0.0)?;
    let batch = batch(&documents);
    if let Some(id) = batch.input_ids.iter().find(|id| **id as usize >= model.config().vocab_size) {
        bail!("token {id} in a vocabulary of {}", model.config().vocab_size);
    }
    let scale = 1.0 / batch.trained_tokens().max(1) as f64;
    let (loss, gradients) = loss_and_gradients(&model, &batch, scale, 0, None);

    let mut tensors = vec![("loss".to_string(), vec![1], (loss as f32).to_le_bytes().to_vec())];
    for ((name, _), gradient) in parameters(&mut model).iter().zip(&gradients) {
        let bytes = gradient.to_data().iter::<f32>().flat_map(f32::to_le_bytes).collect();
        tensors.push((format!("base_model.model.{name}"), gradient.dims().to_vec(), bytes));
    }
    let views = tensors
        .iter()
        .map(|(name, shape, bytes)| Ok((name, TensorView::new(Dtype::F32, shape.clone(), bytes)?)))
        .collect::<Result<Vec<_>, safetensors::SafeTensorError>>()
        .into_diagnostic()?;
    safetensors::serialize_to_file(views, None, Path::new(out)).into_diagnostic()
}

fn batch(documents: &[Vec<u32>]) -> MicroBatch {
    let mut batch = MicroBatch { input_ids: Vec::new(), targets: Vec::new(), documents: Vec::new() };
    for ids in documents {
        let start = batch.input_ids.len();
        batch.input_ids.extend(ids);
        batch
            .targets
            .extend(ids.iter().skip(1).map(|id| *id as i32).chain((!ids.is_empty()).then_some(-100)));
        batch.documents.push(start..batch.input_ids.len());
    }
    batch
}
