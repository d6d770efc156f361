//! What a run writes, in bytes.

use crate::estimate::{PlanInput, Term};
use crate::format_bytes;
use crate::terms::moments;
use tune_recipe::Method;

/// Bytes of a `f32`, the type of adapters, trained weights and moments on disk.
const F32: u64 = 4;
/// Configuration and headers beside the tensors of a folder, rounded up.
const SMALL_FILES: u64 = 64 << 10;

/// What the space depends on beside the run itself.
#[derive(Clone, Debug, Default)]
pub struct Writes {
    /// Checkpoints kept.
    pub save_total_limit: u64,
    /// How often the run saves, where that is known.
    pub saves: Option<u64>,
    /// Targets of the export.
    pub exports: Vec<Term>,
    /// Tokenised rows kept between runs.
    pub token_cache: Option<u64>,
}

/// The terms. A new checkpoint is whole before the oldest is removed, so one more than the limit is there for a moment.
pub fn disk(input: &PlanInput, writes: &Writes) -> Vec<Term> {
    let trained = input.trained_parameters();
    let (moments, _) = moments(input);
    let checkpoint = trained.saturating_mul(F32).saturating_add(moments).saturating_add(SMALL_FILES);
    let kept = writes.save_total_limit.max(1);
    let count = kept.saturating_add(1).min(writes.saves.unwrap_or(u64::MAX)).max(1);
    let what = match input.method {
        Method::Full => "weights",
        Method::Lora | Method::Qlora => "adapter",
    };
    let mut terms = vec![Term {
        name: "checkpoints".into(),
        bytes: checkpoint.saturating_mul(count),
        formula: format!("{count} × ({what}, 4 bytes × {trained}, and moments, {})", format_bytes(moments)),
    }];
    terms.push(match input.method {
        Method::Full => Term {
            name: "model folder".into(),
            bytes: trained.saturating_mul(F32).saturating_add(SMALL_FILES),
            formula: format!("4 bytes × {trained}"),
        },
        Method::Lora | Method::Qlora => Term {
            name: "adapter folder".into(),
            bytes: trained.saturating_mul(F32).saturating_add(SMALL_FILES),
            formula: format!("4 bytes × {trained}"),
        },
    });
    terms.extend(writes.exports.iter().cloned());
    if let Some(bytes) = writes.token_cache {
        terms.push(Term { name: "token cache".into(), bytes, formula: "kept rows, ids and targets".into() });
    }
    terms
}
