//! The gate before every run: the estimate against what the run may use.

use std::fmt::Write as _;

use indicatif::HumanBytes;
use serde_json::json;
use tune_data::Batcher;
use tune_formats::BaseModel;
use tune_plan::{DataFacts, MemoryPlan, PlanInput, Shape};
use tune_recipe::{Budget, Method, OnExceed, RunSpec};
use tune_train::{MemoryLimit, Outcome, RunFolder, largest_micro_batch};

use crate::exit::{DoesNotFit, OverBudget};
use crate::machine;

/// A plan that has passed.
pub struct Gate {
    plan: MemoryPlan,
    /// Blocks that do not keep their activations.
    made_again: u64,
    notes: Vec<String>,
}

/// Compares the estimate for `spec` over `base` with the memory that the run may use. Under `on_exceed = "fit"`
/// the micro-batch of `spec`, and with it that of the rows to train on and of those held out, is made smaller until it
/// fits.
pub fn check(spec: &mut RunSpec, base: &BaseModel, rows: [&mut Batcher; 2]) -> miette::Result<Gate> {
    let budget = match spec.memory.budget {
        Budget::Auto => machine::usable_memory(),
        Budget::Bytes(bytes) => Some(bytes),
    };
    let weights = tune_plan::from_model(base, spec.model.quantization)?;
    let on_exceed = spec.memory.on_exceed;
    let mut notes: Vec<String> = crate::calibration::note().into_iter().collect();
    let shape = Shape::from(&base.config);
    let blocks = match spec.adapter.method {
        Method::Full => shape.num_hidden_layers,
        Method::Lora | Method::Qlora => shape.traversed_layers(&spec.adapter.layers),
    };
    let mut rows = rows;
    loop {
        let mut input = PlanInput::from_spec(spec, base.name.clone(), shape, weights, budget);
        input.data = Some(facts(spec, &rows)?);
        input.calibration = crate::calibration::current();
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
                for batcher in &mut rows {
                    batcher.set_micro_batch_size(spec.train.micro_batch_size);
                }
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

    /// The content of `plan.json`, after the run with what was measured: the peak of resident memory, and the most in
    /// large blocks in each phase.
    pub fn json(&self, measured_peak: Option<u64>, blocks: &[(&str, u64)]) -> String {
        let mut plan = serde_json::to_value(&self.plan).unwrap_or_default();
        if let (Some(object), Some(peak)) = (plan.as_object_mut(), measured_peak) {
            let blocks: serde_json::Map<_, _> =
                blocks.iter().map(|(phase, bytes)| ((*phase).to_string(), json!(bytes))).collect();
            object.insert("measured".into(), json!({ "peak_bytes": peak, "block_bytes": blocks }));
        }
        serde_json::to_string_pretty(&plan).unwrap_or_default() + "\n"
    }

    /// What the run is held to while it goes on. Under `on_exceed = "warn"` it is only told.
    pub fn limit(&self, on_exceed: OnExceed) -> Option<MemoryLimit> {
        let bytes = self.plan.budget_bytes?;
        Some(MemoryLimit { bytes, stops: on_exceed != OnExceed::Warn })
    }

    /// What a run says that was stopped because it used more than it may.
    pub fn over_budget(&self, peak_bytes: u64, outcome: &Outcome, folder: &RunFolder) -> OverBudget {
        let budget = self.plan.budget_bytes.unwrap_or_default();
        let saved = match outcome.steps {
            0 => "the first step was not finished, and nothing is lost".to_string(),
            n => format!("step {n} is saved"),
        };
        let mut changes = vec![format!("memory.budget from {} up, if there is more", HumanBytes(peak_bytes))];
        if self.kept_blocks() > 0 {
            changes.push("train.gradient_checkpointing=true".into());
        }
        let recipe = folder.recipe();
        OverBudget {
            used: HumanBytes(peak_bytes).to_string(),
            budget: HumanBytes(budget).to_string(),
            beyond: HumanBytes(peak_bytes.saturating_sub(budget)).to_string(),
            planned: HumanBytes(self.peak_bytes()).to_string(),
            saved,
            help: format!(
                "go on with: tune train {} --set {}\nor start over with a smaller train.micro_batch_size or \
                 data_options.sequence_len; `tune bench memory` makes plans exact for this machine",
                recipe.display(),
                changes.join(", or --set "),
            ),
        }
    }
}

fn facts(spec: &RunSpec, rows: &[&mut Batcher; 2]) -> miette::Result<DataFacts> {
    let [train, held_out] = rows;
    let samples = || train.samples().iter().chain(held_out.samples());
    let largest = largest_micro_batch(train, held_out, &spec.train)?;
    Ok(DataFacts {
        rows: samples().count() as u64,
        row_tokens: samples().map(|sample| sample.len() as u64).sum(),
        longest: samples().map(|sample| sample.len() as u64).max().unwrap_or(0),
        tokens: largest.tokens as u64,
        targets: largest.targets as u64,
    })
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
