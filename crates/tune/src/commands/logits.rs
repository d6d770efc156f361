//! `tune logits`: the logits of given token ids, in the format of `tests/e2e/README.md`.

use std::path::PathBuf;
use std::process::ExitCode;

use burn::tensor::Tensor;
use miette::IntoDiagnostic;
use safetensors::tensor::{Dtype, TensorView};
use tune_models::Layout;

use crate::exit::UsageError;
use crate::model::{self, ModelArgs};

/// Positions whose logits are computed at once.
const CHUNK: usize = 64;

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// JSON: a list of documents, each a list of token ids
    #[arg(long, value_name = "FILE")]
    tokens: PathBuf,
    /// Safetensors file to write: `tokens_0`, `logits_0`, …
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
}

pub fn run(args: &Args) -> miette::Result<ExitCode> {
    let json = std::fs::read(&args.tokens).into_diagnostic()?;
    let documents: Vec<Vec<u32>> = serde_json::from_slice(&json).into_diagnostic()?;
    let opened = model::open(&args.model)?;
    let vocab = opened.model.config().vocab_size;
    if documents.iter().flatten().any(|id| *id as usize >= vocab) {
        let message = format!("an id is not below the vocabulary size {vocab}");
        return Err(UsageError::report(message, "use ids of this model's tokenizer"));
    }

    let mut buffers: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = Vec::new();
    for (number, ids) in documents.iter().enumerate() {
        let whole = 0..ids.len();
        let hidden = opened.model.hidden(ids, &Layout::documents(&[whole]));
        let [tokens, d_model] = hidden.dims();
        let mut logits = Vec::with_capacity(tokens * vocab * 4);
        for start in (0..tokens).step_by(CHUNK) {
            let rows: Tensor<2> = hidden.clone().slice([start..(start + CHUNK).min(tokens), 0..d_model]);
            logits.extend(opened.model.logits(rows).into_data().iter::<f32>().flat_map(f32::to_le_bytes));
        }
        let ids = ids.iter().flat_map(|id| (*id as i32).to_le_bytes()).collect();
        buffers.push((format!("tokens_{number}"), Dtype::I32, vec![tokens], ids));
        buffers.push((format!("logits_{number}"), Dtype::F32, vec![tokens, vocab], logits));
    }
    let views = buffers
        .iter()
        .map(|(name, dtype, shape, data)| Ok((name, TensorView::new(*dtype, shape.clone(), data)?)))
        .collect::<Result<Vec<_>, safetensors::SafeTensorError>>()
        .into_diagnostic()?;
    safetensors::serialize_to_file(views, None, &args.out).into_diagnostic()?;
    Ok(ExitCode::SUCCESS)
}
