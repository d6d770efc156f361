//! What a run writes, and whether the disk has room for it.

use std::path::{Path, PathBuf};

use tune_export::{Dimensions, ExportTarget};
use tune_formats::BaseModel;
use tune_plan::disk::{Writes, disk};
use tune_plan::{PlanInput, Shape, Term, format_bytes};
use tune_recipe::RunSpec;

use crate::exit::NoRoom;

/// A model's dimensions, and its files where they are at hand.
#[derive(Clone, Copy)]
pub struct Tensors<'a> {
    pub shape: &'a Shape,
    pub base: Option<&'a BaseModel>,
}

/// What the run of `spec` writes. `tokens` of the rows are known once they are read.
pub fn terms(input: &PlanInput, spec: &RunSpec, model: Tensors<'_>, tokens: Option<u64>) -> Vec<Term> {
    let exports = spec.export.targets.iter().map(|target| export(target, input, model)).collect();
    let writes = Writes {
        save_total_limit: spec.checkpoint.save_total_limit as u64,
        saves: saves(spec),
        exports,
        // An id and whether it is trained; one file for each recipe and data.
        token_cache: tokens.map(|tokens| tokens.saturating_mul(5)),
    };
    disk(input, &writes)
}

/// Refuses a run whose files would not fit where it writes them. What is there already of an earlier part of the same
/// run is written anew, so nothing is taken off.
pub fn check(folder: &Path, terms: &[Term]) -> Result<(), NoRoom> {
    let Some(available) = available(folder) else { return Ok(()) };
    let needed = terms.iter().fold(0, |sum: u64, term| sum.saturating_add(term.bytes));
    if needed <= available {
        return Ok(());
    }
    let parts = terms.iter().map(|term| format!("{} {}", term.name, format_bytes(term.bytes)));
    Err(NoRoom {
        needed: format_bytes(needed),
        folder: folder.display().to_string(),
        available: format_bytes(available),
        help: format!(
            "{}\nmake room, write elsewhere (--out DIR), or keep less: checkpoint.save_total_limit, export.targets",
            parts.collect::<Vec<_>>().join(", ")
        ),
    })
}

/// Free bytes where `folder` is or will be. `None` where the system does not tell.
fn available(folder: &Path) -> Option<u64> {
    let absolute = std::path::absolute(folder).ok()?;
    let existing: PathBuf = absolute.ancestors().find(|path| path.is_dir())?.into();
    fs4::available_space(existing).ok()
}

/// How often the run saves, where the recipe says how many steps it has.
fn saves(spec: &RunSpec) -> Option<u64> {
    let steps = spec.train.max_steps? as u64;
    Some(match spec.checkpoint.save_steps as u64 {
        0 => 1,
        every => steps.div_ceil(every),
    })
}

fn export(target: &str, input: &PlanInput, model: Tensors<'_>) -> Term {
    let shape = model.shape;
    let term = |bytes: u64, formula: String| Term { name: format!("export {target}").into(), bytes, formula };
    let parameters = input.trained_parameters();
    let adapter = || term(parameters.saturating_mul(4), format!("4 bytes × {parameters}"));
    match target.parse::<ExportTarget>() {
        Ok(ExportTarget::Gguf(file_type)) => {
            let dimensions = Dimensions {
                num_hidden_layers: shape.num_hidden_layers as usize,
                num_attention_heads: shape.num_attention_heads as usize,
                num_key_value_heads: shape.num_key_value_heads as usize,
                vocab_size: shape.vocab_size as usize,
                hidden_size: shape.hidden_size as usize,
                tied: shape.tied,
            };
            let linears = shape.block_linears();
            let bytes = dimensions.gguf_bytes(file_type, &linears, shape.vector_parameters());
            let metadata = shape.vocab_size.saturating_mul(BYTES_PER_TOKEN);
            term(
                bytes.saturating_add(metadata),
                format!("every tensor in its type of {file_type}, and the tokenizer"),
            )
        }
        Ok(ExportTarget::Safetensors) => {
            let is_32_bit = model.base.is_some_and(|_| input.weights.linear_bits >= 32);
            let width = if is_32_bit || input.method == tune_recipe::Method::Full { 4 } else { 2 };
            let count = shape.parameters();
            term(count.saturating_mul(width), format!("{width} bytes × {count}"))
        }
        // The adapter alone, in a file or in a folder or in Ollama's store.
        _ => adapter(),
    }
}

/// A token of a GGUF tokenizer with its length, score and type, and its share of the merges.
const BYTES_PER_TOKEN: u64 = 48;
