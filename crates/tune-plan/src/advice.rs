//! What to change so that a run fits, and how far one that fits can grow.
//!
//! A change is something that a recipe can say. [`Question::ways`] tries them in the order of [`Knob`], least harm
//! first, and counts every proposal again: what it returns fits. [`Question::room`] asks the other way round.

use serde::{Deserialize, Serialize};
use tune_formats::gguf;
use tune_recipe::{Dtype, Layers, Method, Optimizer};

use crate::estimate::{MemoryPlan, PlanInput, estimate};
use crate::memory::Pool;
use crate::{WeightBytes, catalogue, from_shape};

/// A run, and what of it may change.
#[derive(Clone, Debug)]
#[allow(clippy::struct_excessive_bools, reason = "each is a question of its own")]
pub struct Question {
    /// The run. Without a budget there is nothing to ask.
    pub input: PlanInput,
    /// Which memory the budget is.
    pub pool: Pool,
    /// As many blocks keep their activations as fit; else `input` says how many.
    pub keeps_what_fits: bool,
    /// `lora_alpha`, where it is written: a lower rank keeps `lora_alpha / r`.
    pub lora_alpha: Option<f64>,
    /// The weights as NF4, or as stored where they are quantised already.
    pub four_bit: Option<WeightBytes>,
    /// Longest context of the model.
    pub context: Option<u64>,
    /// A shorter sequence would make the data unusable.
    pub sequence_is_fixed: bool,
    /// The adapter may get a lower rank.
    pub rank_may_change: bool,
    /// Only some blocks may carry adapters.
    pub layers_may_change: bool,
    /// Another model may take the place of this one.
    pub model_may_change: bool,
}

/// One change of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "change", rename_all = "snake_case")]
pub enum Change {
    /// Every block runs again in backward.
    GradientCheckpointing,
    /// Fewer sequences at once, and as many in a step as before.
    MicroBatch {
        /// Sequences that go through the model at once.
        micro_batch_size: u64,
        /// Micro-batches of a step.
        gradient_accumulation_steps: u64,
    },
    /// AdamW's moments in 8 bits.
    EightBitOptimizer,
    /// The inputs of blocks that run again in 16 bits.
    SixteenBitInputs,
    /// The gradients of a step in 16 bits.
    SixteenBitGradients,
    /// Adapters drop nothing.
    NoDropout,
    /// Shorter sequences.
    SequenceLen {
        /// The longest, in tokens.
        sequence_len: u64,
    },
    /// A lower rank.
    Rank {
        /// The rank.
        r: u64,
        /// The numerator of the scale, where the recipe writes one.
        lora_alpha: Option<f64>,
    },
    /// Adapters on the upper blocks only.
    Layers {
        /// The lowest block with adapters.
        first: u64,
        /// The highest.
        last: u64,
    },
    /// The base in four bits.
    FourBit,
    /// Adapters over the base in four bits, in place of all weights.
    Adapters,
    /// A smaller model.
    Model {
        /// Its name, as `model.base` takes it.
        name: String,
    },
}

/// Changes which together make a run fit.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Way {
    /// The changes, least harm first.
    pub changes: Vec<Change>,
    /// Upper end of the estimate with them, of the memory that the verdict compares.
    pub needed_bytes: u64,
    /// The same as `SECTION.KEY=VALUE`, for `--set` and for the recipe.
    pub settings: Vec<String>,
    /// The same as options of `tune plan --model`; absent where there is no such option.
    pub options: Option<String>,
}

/// How far one quantity can grow with all others as they are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Room {
    /// `sequence_len`, `micro_batch_size` or `r`.
    pub name: String,
    /// Its value in this run.
    pub now: u64,
    /// The largest value that fits.
    pub most: u64,
    /// What ends it there: memory, or something else first.
    pub limit: Limit,
}

/// What ends the growth of a quantity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Limit {
    /// One more would not fit.
    Memory,
    /// The longest context that the model was made for.
    Context,
    /// The largest value that the option takes, or that anybody would want.
    Option,
}

/// What can be changed, least harm first: results stay the same down to the micro-batch, and within noise down to the
/// gradients, the training changes down to the layers, the base after that.
#[derive(Clone, Copy, PartialEq)]
enum Knob {
    GradientCheckpointing,
    MicroBatch,
    EightBitOptimizer,
    SixteenBitInputs,
    SixteenBitGradients,
    NoDropout,
    SequenceLen,
    Rank,
    Layers,
    FourBit,
    Adapters,
    Model,
}

const KNOBS: [Knob; 12] = [
    Knob::GradientCheckpointing,
    Knob::MicroBatch,
    Knob::EightBitOptimizer,
    Knob::SixteenBitInputs,
    Knob::SixteenBitGradients,
    Knob::NoDropout,
    Knob::SequenceLen,
    Knob::Rank,
    Knob::Layers,
    Knob::FourBit,
    Knob::Adapters,
    Knob::Model,
];

/// Shorter sequences than this train little.
const SHORTEST_SEQUENCE: u64 = 256;
/// Sequence lengths are multiples of this.
const SEQUENCE_STEP: u64 = 64;
/// Ranks are multiples of this, and 1 and 2.
const RANK_STEP: u64 = 4;
/// `adapter.r` ends here.
const LARGEST_RANK: u64 = 4096;
/// Nobody looks further than this for a batch or, where the context is unknown, for a sequence.
const FAR: u64 = 1 << 20;

impl Question {
    /// A question about a run of which nothing but its sizes may change.
    pub fn about(input: PlanInput, pool: Pool) -> Self {
        Self {
            input,
            pool,
            keeps_what_fits: false,
            lora_alpha: None,
            four_bit: None,
            context: None,
            sequence_is_fixed: false,
            rank_may_change: true,
            layers_may_change: false,
            model_may_change: false,
        }
    }

    /// The plan of this run, with as many kept blocks as fit where that is left to `tune`.
    pub fn plan(&self) -> MemoryPlan {
        let fits = |plan: &MemoryPlan| self.fits(plan);
        let input =
            if self.keeps_what_fits { self.input.clone().keep_what(fits) } else { self.input.clone() };
        let mut plan = estimate(&input);
        plan.fits = self.input.budget_bytes.map(|_| self.fits(&plan));
        plan
    }

    /// Ways to make the run fit: the one of least harm, then single changes that are enough alone. None when it fits
    /// already, or when nothing is enough.
    pub fn ways(&self) -> Vec<Way> {
        if self.input.budget_bytes.is_none() || self.fit_with(&[]) {
            return Vec::new();
        }
        let mut ways: Vec<Vec<Change>> = self.least_harm().into_iter().collect();
        for knob in KNOBS {
            if let Some(change) = self.first_fitting(&[], knob) {
                let alone = vec![change];
                if !ways.contains(&alone) {
                    ways.push(alone);
                }
            }
        }
        ways.into_iter().map(|changes| self.way(changes)).collect()
    }

    /// How far sequence, batch and rank can grow, each alone.
    pub fn room(&self) -> Vec<Room> {
        if self.input.budget_bytes.is_none() || !self.fit_with(&[]) {
            return Vec::new();
        }
        let input = &self.input;
        let context = self.context.unwrap_or(FAR);
        let context_limit = if self.context.is_some() { Limit::Context } else { Limit::Option };
        let mut room = vec![
            self.grow("sequence_len", input.sequence_len, context, context_limit, |input, n| {
                input.sequence_len = n;
            }),
            self.grow("micro_batch_size", input.micro_batch_size, FAR, Limit::Option, |input, n| {
                input.micro_batch_size = n;
            }),
        ];
        if input.method != Method::Full {
            room.push(self.grow("r", input.rank, LARGEST_RANK, Limit::Option, |input, n| input.rank = n));
        }
        room
    }

    /// The run with these changes.
    #[must_use]
    pub fn with(&self, changes: &[Change]) -> Self {
        let mut changed = self.clone();
        for change in changes {
            changed.apply(change);
        }
        changed
    }

    fn apply(&mut self, change: &Change) {
        let input = &mut self.input;
        match change {
            Change::GradientCheckpointing => input.kept_blocks = 0,
            Change::MicroBatch { micro_batch_size, gradient_accumulation_steps } => {
                input.micro_batch_size = *micro_batch_size;
                input.gradient_accumulation_steps = *gradient_accumulation_steps;
            }
            Change::EightBitOptimizer => input.optimizer = Optimizer::Adamw8bit,
            Change::SixteenBitInputs => input.block_input_dtype = Dtype::Bf16,
            Change::SixteenBitGradients => input.gradient_dtype = Dtype::Bf16,
            Change::NoDropout => input.dropout = false,
            Change::SequenceLen { sequence_len } => input.sequence_len = *sequence_len,
            Change::Rank { r, .. } => input.rank = *r,
            Change::Layers { first, last } => {
                input.layers = Layers::Only((*first as usize..=*last as usize).collect());
            }
            Change::FourBit | Change::Adapters => {
                input.method = Method::Qlora;
                input.weights = self.four_bit.unwrap_or(input.weights);
            }
            Change::Model { name } => {
                if let Some((model, shape)) = catalogue::find(name).and_then(|m| Some((m, m.shape()?))) {
                    input.model.clone_from(&model.name);
                    input.shape = shape;
                    input.weights = from_shape(&shape, input.method);
                    input.layers = Layers::All;
                    if input.kept_blocks > 0 {
                        input.kept_blocks = shape.num_hidden_layers;
                    }
                }
            }
        }
    }

    fn fits(&self, plan: &MemoryPlan) -> bool {
        self.input.budget_bytes.is_none_or(|budget| self.pool.needed_bytes(plan) <= budget)
    }

    /// Whether the run fits with these changes.
    fn fit_with(&self, changes: &[Change]) -> bool {
        self.input.budget_bytes.is_some_and(|budget| self.with(changes).needed_bytes() <= budget)
    }

    /// The least that the run needs, in the memory that the budget is.
    fn needed_bytes(&self) -> u64 {
        let needed = |kept_blocks| {
            let plan = estimate(&PlanInput { kept_blocks, ..self.input.clone() });
            self.pool.needed_bytes(&plan)
        };
        if self.keeps_what_fits {
            // One kept block may need less than none: backward begins with its activations instead of making them again.
            needed(0).min(needed(1)).min(needed(self.input.shape.num_hidden_layers))
        } else {
            needed(self.input.kept_blocks)
        }
    }

    /// The changes of least harm: as far as needed with the first knob, and on with the next where it is not enough.
    /// Then everything that turned out unnecessary is taken back, from the most harmful on.
    fn least_harm(&self) -> Option<Vec<Change>> {
        let mut chosen: Vec<(Knob, Change)> = Vec::new();
        let changes = |chosen: &[(Knob, Change)]| -> Vec<Change> {
            chosen.iter().map(|(_, change)| change.clone()).collect()
        };
        for knob in KNOBS {
            let so_far = changes(&chosen);
            if let Some(change) = self.first_fitting(&so_far, knob) {
                chosen.push((knob, change));
                break;
            }
            if let Some(furthest) = self.candidates(knob).pop() {
                let further = [&so_far[..], std::slice::from_ref(&furthest)].concat();
                if self.with(&further).needed_bytes() < self.with(&so_far).needed_bytes() {
                    chosen.push((knob, furthest));
                }
            }
        }
        if !self.fit_with(&changes(&chosen)) {
            return None;
        }
        for i in (0..chosen.len()).rev() {
            let (knob, _) = chosen[i];
            let mut others = chosen.clone();
            others.remove(i);
            if self.fit_with(&changes(&others)) {
                chosen = others;
            } else if let Some(change) = self.first_fitting(&changes(&others), knob) {
                chosen[i].1 = change;
            }
        }
        Some(changes(&chosen))
    }

    /// The smallest change with `knob` that fits beside `others`.
    fn first_fitting(&self, others: &[Change], knob: Knob) -> Option<Change> {
        let candidates = self.candidates(knob);
        let fits = |change: &Change| self.fit_with(&[others, std::slice::from_ref(change)].concat());
        // From one candidate to the next the run never needs more.
        let first = candidates.partition_point(|change| !fits(change));
        candidates.get(first).filter(|change| fits(change)).cloned()
    }

    /// What a knob can be turned to, smallest change first.
    fn candidates(&self, knob: Knob) -> Vec<Change> {
        let input = &self.input;
        let adapters = input.method != Method::Full;
        let sixteen_bit = input.weights.linear_bits >= 16 && self.four_bit.is_some();
        let only = |holds: bool, change: Change| if holds { vec![change] } else { Vec::new() };
        match knob {
            Knob::GradientCheckpointing => {
                only(!self.keeps_what_fits && input.kept_blocks > 0, Change::GradientCheckpointing)
            }
            Knob::MicroBatch => {
                let effective = input.micro_batch_size.saturating_mul(input.gradient_accumulation_steps);
                divisors_below(effective, input.micro_batch_size)
                    .map(|micro_batch_size| Change::MicroBatch {
                        micro_batch_size,
                        gradient_accumulation_steps: effective / micro_batch_size,
                    })
                    .collect()
            }
            Knob::EightBitOptimizer => only(input.optimizer == Optimizer::Adamw, Change::EightBitOptimizer),
            Knob::SixteenBitInputs => only(input.block_input_dtype == Dtype::F32, Change::SixteenBitInputs),
            Knob::SixteenBitGradients => {
                only(input.gradient_dtype == Dtype::F32, Change::SixteenBitGradients)
            }
            Knob::NoDropout => only(input.dropout, Change::NoDropout),
            Knob::SequenceLen if self.sequence_is_fixed => Vec::new(),
            Knob::SequenceLen => {
                let longest = input.sequence_len.saturating_sub(1).min(FAR) / SEQUENCE_STEP;
                (SHORTEST_SEQUENCE / SEQUENCE_STEP..=longest)
                    .rev()
                    .map(|n| Change::SequenceLen { sequence_len: n * SEQUENCE_STEP })
                    .collect()
            }
            Knob::Rank if adapters && self.rank_may_change => {
                let stepped = (1..=input.rank.saturating_sub(1).min(LARGEST_RANK) / RANK_STEP).rev();
                let ranks = stepped.map(|n| n * RANK_STEP).chain([2, 1]).filter(|r| *r < input.rank);
                let alpha = |r: u64| self.lora_alpha.map(|alpha| alpha * r as f64 / input.rank as f64);
                ranks.map(|r| Change::Rank { r, lora_alpha: alpha(r) }).collect()
            }
            Knob::Layers if adapters && self.layers_may_change && input.layers == Layers::All => {
                // At least a quarter of the blocks: fewer have little to say.
                let last = input.shape.num_hidden_layers.saturating_sub(1).min(FAR);
                (1..=last - last / 4).map(|first| Change::Layers { first, last }).collect()
            }
            Knob::FourBit => only(adapters && sixteen_bit, Change::FourBit),
            Knob::Adapters => only(!adapters && self.four_bit.is_some(), Change::Adapters),
            Knob::Model if self.model_may_change => {
                let trainable = catalogue::catalogue()
                    .iter()
                    .filter(|model| gguf::names::architecture(&model.architecture).is_some());
                let mut smaller: Vec<(u64, &str)> = trainable
                    .filter_map(|model| Some((model.shape()?.parameters(), &*model.alias)))
                    .filter(|(parameters, _)| *parameters < input.shape.parameters() / 10 * 9)
                    .collect();
                smaller.sort_by_key(|(parameters, _)| std::cmp::Reverse(*parameters));
                smaller.into_iter().map(|(_, name)| Change::Model { name: name.into() }).collect()
            }
            Knob::Rank | Knob::Layers | Knob::Model => Vec::new(),
        }
    }

    fn way(&self, changes: Vec<Change>) -> Way {
        let settings = changes.iter().flat_map(Change::settings);
        let options: Option<Vec<String>> = changes.iter().map(Change::option).collect();
        Way {
            needed_bytes: self.with(&changes).needed_bytes(),
            settings: settings.map(|(path, value)| format!("{path}={value}")).collect(),
            options: options.map(|options| options.join(" ")),
            changes,
        }
    }

    fn grow(&self, name: &str, now: u64, cap: u64, at_cap: Limit, set: impl Fn(&mut PlanInput, u64)) -> Room {
        let fits = |n: u64| {
            let mut grown = self.clone();
            set(&mut grown.input, n);
            grown.fit_with(&[])
        };
        let room = |most, limit| Room { name: name.into(), now, most, limit };
        if cap <= now {
            return room(now, at_cap);
        }
        if fits(cap) {
            return room(cap, at_cap);
        }
        let (mut most, mut too_much) = (now, cap);
        while too_much - most > 1 {
            let middle = most.midpoint(too_much);
            if fits(middle) { most = middle } else { too_much = middle }
        }
        room(most, Limit::Memory)
    }
}

impl Way {
    /// The settings as options of the command line.
    pub fn as_set(&self) -> String {
        let settings = self.settings.iter().map(|setting| match setting.contains('"') {
            true => format!("--set '{setting}'"),
            false => format!("--set {setting}"),
        });
        settings.collect::<Vec<_>>().join(" ")
    }
}

impl Change {
    /// Path and value of what a recipe says for it, the value in TOML.
    pub fn settings(&self) -> Vec<(&'static str, String)> {
        match self {
            Self::GradientCheckpointing => vec![("train.gradient_checkpointing", "true".into())],
            Self::MicroBatch { micro_batch_size, gradient_accumulation_steps } => vec![
                ("train.micro_batch_size", micro_batch_size.to_string()),
                ("train.gradient_accumulation_steps", gradient_accumulation_steps.to_string()),
            ],
            Self::EightBitOptimizer => vec![("train.optimizer", "\"adamw_8bit\"".into())],
            Self::SixteenBitInputs => vec![("train.block_input_dtype", "\"bf16\"".into())],
            Self::SixteenBitGradients => vec![("train.gradient_dtype", "\"bf16\"".into())],
            Self::NoDropout => vec![("adapter.lora_dropout", "0.0".into())],
            Self::SequenceLen { sequence_len } => {
                vec![("data_options.sequence_len", sequence_len.to_string())]
            }
            Self::Rank { r, lora_alpha } => {
                let alpha = lora_alpha.map(|alpha| ("adapter.lora_alpha", format!("{alpha:?}")));
                std::iter::once(("adapter.r", r.to_string())).chain(alpha).collect()
            }
            Self::Layers { first, last } => vec![("adapter.layers", format!("\"{first}-{last}\""))],
            Self::FourBit => four_bit("\"nf4\""),
            Self::Adapters => four_bit("\"auto\""),
            Self::Model { name } => vec![("model.base", format!("\"{name}\""))],
        }
    }

    /// What `tune plan --model` takes for it.
    pub fn option(&self) -> Option<String> {
        match self {
            Self::MicroBatch { micro_batch_size, .. } => Some(format!("--batch {micro_batch_size}")),
            Self::SequenceLen { sequence_len } => Some(format!("--seq {sequence_len}")),
            Self::Rank { r, .. } => Some(format!("--rank {r}")),
            Self::FourBit | Self::Adapters => Some("--method qlora".into()),
            Self::Model { name } => Some(format!("--model {name}")),
            Self::GradientCheckpointing
            | Self::EightBitOptimizer
            | Self::SixteenBitInputs
            | Self::SixteenBitGradients
            | Self::NoDropout
            | Self::Layers { .. } => None,
        }
    }

    /// What it costs, in a few words.
    pub fn cost(&self) -> &'static str {
        match self {
            Self::GradientCheckpointing => "the same result, slower",
            Self::MicroBatch { .. } => "the same effective batch",
            Self::EightBitOptimizer => "moments in 8 bits, the same within noise",
            Self::SixteenBitInputs | Self::SixteenBitGradients => "gradients within 1 %",
            Self::NoDropout => "no dropout",
            Self::SequenceLen { .. } => "shorter sequences",
            Self::Rank { .. } => "a smaller adapter",
            Self::Layers { .. } => "adapters on the upper blocks only",
            Self::FourBit => "the base in four bits",
            Self::Adapters => "adapters instead of all weights",
            Self::Model { .. } => "another model",
        }
    }
}

fn four_bit(quantization: &str) -> Vec<(&'static str, String)> {
    vec![("adapter.type", "\"qlora\"".into()), ("model.quantization", quantization.into())]
}

/// Divisors of `n` below `limit`, from the largest down.
fn divisors_below(n: u64, limit: u64) -> impl Iterator<Item = u64> {
    // In pairs, so that a number of any size takes few steps.
    let root = n.isqrt().min(FAR);
    let small = (1..=root).filter(move |d| n.is_multiple_of(*d));
    let mut divisors: Vec<u64> = small.flat_map(|d| [d, n / d]).filter(|d| *d < limit).collect();
    divisors.sort_unstable_by(|a, b| b.cmp(a));
    divisors.dedup();
    divisors.into_iter()
}
