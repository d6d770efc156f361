//! The gate before every run: the estimate against what the run may use.

use std::fmt::Write as _;

use indicatif::HumanBytes;
use serde_json::json;
use tune_data::Sample;
use tune_formats::BaseModel;
use tune_plan::{MemoryPlan, PlanInput, Shape};
use tune_recipe::{Budget, Method, OnExceed, RunSpec};

use crate::exit::DoesNotFit;
use crate::machine;

/// A plan that has passed.
pub struct Gate {
    plan: MemoryPlan,
    /// Blocks that do not keep their activations.
    made_again: u64,
    notes: Vec<String>,
}

/// Compares the estimate for `spec` over `base` with the memory that the run may use. Under `on_exceed = "fit"`
/// the micro-batch of `spec` is made smaller until it fits.
pub fn check(spec: &mut RunSpec, base: &BaseModel, rows: &[Sample]) -> miette::Result<Gate> {
    let budget = match spec.memory.budget {
        Budget::Auto => machine::usable_memory(),
        Budget::Bytes(bytes) => Some(bytes),
    };
    let weights = tune_plan::from_model(base, spec.model.quantization)?;
    let on_exceed = spec.memory.on_exceed;
    let mut notes = Vec::new();
    let shape = Shape::from(&base.config);
    let blocks = match spec.adapter.method {
        Method::Full => shape.num_hidden_layers,
        Method::Lora | Method::Qlora => shape.traversed_layers(&spec.adapter.layers),
    };
    loop {
        let mut input = PlanInput::from_spec(spec, base.name.clone(), shape, weights, budget);
        input.sequence_len = longest_row(spec, rows);
        let plan = tune_plan::estimate(&input.keep_what_fits(spec));
        let fits = plan.fits.unwrap_or(true);
        match on_exceed {
            _ if fits => {
                return Ok(Gate {
                    made_again: blocks.saturating_sub(plan.kept_blocks.unwrap_or(0)),
                    plan,
                    notes,
                });
            }
            OnExceed::Warn => {
                notes.push("the run may not fit in memory (memory.on_exceed = \"warn\")".into());
                return Ok(Gate {
                    made_again: blocks.saturating_sub(plan.kept_blocks.unwrap_or(0)),
                    plan,
                    notes,
                });
            }
            OnExceed::Fit if spec.shrink_micro_batch() => {
                notes.push(format!("micro_batch_size is now {}", spec.train.micro_batch_size));
            }
            OnExceed::Fit | OnExceed::Refuse => return Err(refusal(spec, &plan).into()),
        }
    }
}

impl Gate {
    /// Predicted peak in bytes.
    pub fn peak_bytes(&self) -> u64 {
        self.plan.estimate.peak_bytes
    }

    /// Blocks that keep their activations for backward.
    pub fn kept_blocks(&self) -> usize {
        self.plan.kept_blocks.map_or(0, |blocks| blocks as usize)
    }

    /// One line for people, and one for each thing that was changed.
    pub fn summary(&self) -> String {
        let budget = match self.plan.budget_bytes {
            Some(budget) => format!("of {} usable", HumanBytes(budget)),
            None => "; this system does not tell how much is usable".into(),
        };
        let mut text = format!("plan      {} at the peak {budget}", HumanBytes(self.peak_bytes()));
        if self.made_again > 0 {
            write!(text, "\n          {} blocks run again in backward, to save memory", self.made_again).ok();
        }
        for note in &self.notes {
            text.push_str("\n          ");
            text.push_str(note);
        }
        text
    }

    /// The content of `plan.json`, after the run with what was measured.
    pub fn json(&self, measured_peak: Option<u64>) -> String {
        let mut plan = serde_json::to_value(&self.plan).unwrap_or_default();
        if let (Some(object), Some(peak)) = (plan.as_object_mut(), measured_peak) {
            object.insert("measured".into(), json!({ "peak_bytes": peak }));
        }
        serde_json::to_string_pretty(&plan).unwrap_or_default() + "\n"
    }
}

/// Tokens of the longest row that a micro-batch can have.
fn longest_row(spec: &RunSpec, rows: &[Sample]) -> u64 {
    let longest = rows.iter().map(Sample::len).max().unwrap_or(0);
    let total: usize = rows.iter().map(Sample::len).sum();
    let row = if spec.data_options.packing { spec.data_options.sequence_len } else { longest };
    row.min(total) as u64
}

fn refusal(spec: &RunSpec, plan: &MemoryPlan) -> DoesNotFit {
    let mut changes = Vec::new();
    if spec.train.micro_batch_size > 1 {
        changes.push("--set train.micro_batch_size=1 (the effective batch stays)");
    }
    if !spec.train.gradient_checkpointing {
        changes.push("--set train.gradient_checkpointing=true (or \"auto\")");
    }
    changes.extend([
        "a shorter data_options.sequence_len",
        "a smaller adapter.r",
        "a base of fewer bits",
        "memory.budget, if the machine has more to give",
    ]);
    let terms = plan.estimate.terms.iter().max_by_key(|term| term.bytes);
    let largest =
        terms.map_or(String::new(), |t| format!("largest part: {}, {}\n", t.name, HumanBytes(t.bytes)));
    DoesNotFit {
        needed: HumanBytes(plan.estimate.upper_bytes).to_string(),
        budget: HumanBytes(plan.budget_bytes.unwrap_or_default()).to_string(),
        help: format!("{largest}try, in this order: {}", changes.join("; ")),
    }
}
