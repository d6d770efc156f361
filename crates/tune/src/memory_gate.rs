//! The gate before every run: the estimate against what the run may use.

use std::fmt::Write as _;
use std::path::Path;

use indicatif::HumanBytes;
use serde_json::json;
use tune_data::Batcher;
use tune_formats::BaseModel;
use tune_plan::advice::{Change, Question, Way};
use tune_plan::memory::Pool;
use tune_plan::{DataFacts, MemoryPlan, PlanInput, Shape, Term};
use tune_recipe::{Budget, Method, OnExceed, Overlong, Quantization, RunSpec};
use tune_train::{MemoryLimit, Outcome, RunFolder, largest_micro_batch};

use crate::disk_room::{self, Tensors};
use crate::exit::{DoesNotFit, OverBudget};
use crate::{calibration, inputs, machine};

/// A plan that has passed.
pub struct Gate {
    input: PlanInput,
    plan: MemoryPlan,
    /// Blocks that do not keep their activations.
    made_again: u64,
    /// What was changed so that the run fits, as `SECTION.KEY=VALUE`.
    fitted: Vec<String>,
    notes: Vec<String>,
}

/// How a run starts.
#[derive(Clone, Debug)]
pub enum Start {
    /// From the beginning.
    Fresh,
    /// From a checkpoint, with what was changed when the run began: only with the same settings can it go on.
    Resumed(Vec<String>),
}

impl Start {
    /// The resumed run in `folder`, whose `plan.json` says what was changed when it began. The values are put into
    /// `spec`, unless the command line names others.
    pub fn resumed(plan: &Path, spec: &mut RunSpec) -> Self {
        let text = std::fs::read_to_string(plan).unwrap_or_default();
        let plan: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
        let fitted = plan["fitted"].as_array().into_iter().flatten().filter_map(|setting| setting.as_str());
        let fitted: Vec<String> = fitted.map(str::to_owned).collect();
        for setting in &fitted {
            if let Some((path, value)) = setting.split_once('=')
                && !spec.origins.is_from_command_line(path)
            {
                spec.change(path, value, "to fit in memory when the run began");
            }
        }
        Self::Resumed(fitted)
    }
}

/// Compares the estimate for `spec` over `base` with the memory that the run may use. Under `on_exceed = "fit"`
/// `spec`, and with it the micro-batches of the rows to train on and of those held out, is changed until it fits, with the
/// least harm; a run that goes on keeps the values it began with.
pub fn check(
    spec: &mut RunSpec,
    base: &BaseModel,
    mut rows: [&mut Batcher; 2],
    start: Start,
) -> miette::Result<Gate> {
    let question = question(spec, base, &rows)?;
    let plan = question.plan();
    let fits = plan.fits.unwrap_or(true);
    match (spec.memory.on_exceed, start) {
        (_, Start::Resumed(fitted)) if fits => Ok(Gate::new(&question, plan, fitted, Vec::new())),
        (_, Start::Fresh) if fits => Ok(Gate::new(&question, plan, Vec::new(), Vec::new())),
        (OnExceed::Warn, start) => {
            let fitted = match start {
                Start::Fresh => Vec::new(),
                Start::Resumed(fitted) => fitted,
            };
            let note = "the run may not fit in memory (memory.on_exceed = \"warn\")".into();
            Ok(Gate::new(&question, plan, fitted, vec![note]))
        }
        (OnExceed::Fit, Start::Fresh) => {
            let ways = question.ways();
            let Some(way) = ways.first() else { return Err(refusal(&plan, &ways, false).into()) };
            for (path, value) in way.changes.iter().flat_map(Change::settings) {
                spec.change(path, &value, "to fit in memory");
            }
            spec.refine(&inputs::facts(base))?;
            for batcher in &mut rows {
                batcher.set_micro_batch_size(spec.train.micro_batch_size);
            }
            let question = self::question(spec, base, &rows)?;
            let plan = question.plan();
            if plan.fits == Some(false) {
                return Err(refusal(&plan, &question.ways(), false).into());
            }
            let notes = way.settings.iter().map(|setting| format!("{setting}, to fit in memory")).collect();
            Ok(Gate::new(&question, plan, way.settings.clone(), notes))
        }
        (OnExceed::Fit | OnExceed::Refuse, start) => {
            Err(refusal(&plan, &question.ways(), matches!(start, Start::Resumed(_))).into())
        }
    }
}

/// What the gate asks: what the run needs over these rows, and what of it may change without asking the user. Not the
/// base, and not whether all weights are trained.
fn question(spec: &RunSpec, base: &BaseModel, rows: &[&mut Batcher; 2]) -> miette::Result<Question> {
    let budget = match spec.memory.budget {
        Budget::Auto => machine::usable_memory(),
        Budget::Bytes(bytes) => Some(bytes),
    };
    let weights = tune_plan::from_model(base, spec.model.quantization)?;
    let shape = Shape::from(&base.config);
    let mut input =
        PlanInput::from_spec(spec, base.name.clone(), shape, weights, calibration::current(), budget);
    input.data = Some(facts(spec, rows)?);
    let four_bit = match spec.adapter.method {
        Method::Full => None,
        Method::Lora | Method::Qlora => Some(tune_plan::from_model(base, Quantization::Nf4)?),
    };
    Ok(Question {
        keeps_what_fits: !spec.origins.is_written("train.gradient_checkpointing"),
        lora_alpha: spec.origins.is_written("adapter.lora_alpha").then_some(spec.adapter.lora_alpha),
        four_bit,
        sequence_is_fixed: spec.data_options.overlong == Overlong::Error,
        // An adapter to go on with has its rank and its layers.
        layers_may_change: spec.adapter.init_adapter.is_none(),
        rank_may_change: spec.adapter.init_adapter.is_none(),
        ..Question::about(input, Pool::Shared)
    })
}

impl Gate {
    fn new(question: &Question, plan: MemoryPlan, fitted: Vec<String>, notes: Vec<String>) -> Self {
        let blocks = match question.input.method {
            Method::Full => question.input.shape.num_hidden_layers,
            Method::Lora | Method::Qlora => question.input.shape.traversed_layers(&question.input.layers),
        };
        let made_again = blocks.saturating_sub(plan.kept_blocks.unwrap_or(0));
        Self { input: question.input.clone(), made_again, plan, fitted, notes }
    }

    /// What the run writes, without the rows that are kept already.
    pub fn disk(&self, spec: &RunSpec, base: &BaseModel) -> Vec<Term> {
        disk_room::terms(&self.input, spec, Tensors { shape: &self.input.shape, base: Some(base) }, None)
    }

    /// Whether the rows must be read again, because sequences became shorter.
    pub fn shortens_rows(&self) -> bool {
        self.fitted.iter().any(|setting| setting.starts_with("data_options."))
    }

    /// Predicted peak in bytes.
    pub fn peak_bytes(&self) -> u64 {
        self.plan.estimate.peak_bytes
    }

    /// What of the predicted peak follows from the sizes of model and batch alone.
    pub fn exact_bytes(&self) -> u64 {
        self.plan.estimate.exact_bytes()
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
        if let Some(object) = plan.as_object_mut() {
            object.insert("fitted".into(), json!(self.fitted));
            if let Some(peak) = measured_peak {
                let blocks: serde_json::Map<_, _> =
                    blocks.iter().map(|(phase, bytes)| ((*phase).to_string(), json!(bytes))).collect();
                object.insert("measured".into(), json!({ "peak_bytes": peak, "block_bytes": blocks }));
            }
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

/// Why the run does not start, and what would let it.
fn refusal(plan: &MemoryPlan, ways: &[Way], is_resumed: bool) -> DoesNotFit {
    let largest = plan.estimate.terms.iter().max_by_key(|term| term.bytes);
    let mut help =
        largest.map_or(String::new(), |t| format!("largest part: {}, {}\n", t.name, HumanBytes(t.bytes)));
    if is_resumed {
        help.push_str(
            "a run goes on only with the settings that it began with: give it more memory (memory.budget), or start \
             over with --resume never",
        );
    } else if ways.is_empty() {
        help.push_str("no change of this recipe is enough: take a smaller base, or one of fewer bits");
    } else {
        let lines = ways.iter().map(Way::as_set);
        help.push_str("it fits with any of these, the one of least harm first:\n  ");
        help.push_str(&lines.collect::<Vec<_>>().join("\n  "));
        help.push_str("\nor with memory.on_exceed = \"fit\", which takes the first");
    }
    DoesNotFit {
        needed: HumanBytes(Pool::Shared.needed_bytes(plan)).to_string(),
        budget: HumanBytes(plan.budget_bytes.unwrap_or_default()).to_string(),
        help,
    }
}
