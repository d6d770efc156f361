//! The estimate: every byte of a run as a named term, and the peak as the largest of three phases.
//!
//! The terms and the phases are counted in [`terms`]. The form follows the model of activations in Korthikanti et al. 2022
//! (arXiv 2205.05198): the loss and a block's activations never live at the same time, so a sum of everything would be
//! too much.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};
use tune_recipe::{Dtype, Layers, Method, Optimizer, RunSpec, TargetModules};

use crate::reference::{Reference, reference};
use crate::{Calibration, FLEX, Shape, WeightBytes, terms};

/// What the estimate depends on.
#[derive(Clone, Debug, PartialEq)]
pub struct PlanInput {
    /// What the model is called.
    pub model: String,
    /// Its dimensions.
    pub shape: Shape,
    /// Its weights as the run holds them.
    pub weights: WeightBytes,
    /// Training method.
    pub method: Method,
    /// Rank of the adapters.
    pub rank: u64,
    /// Linear layers with adapters.
    pub target_modules: TargetModules,
    /// Blocks with adapters.
    pub layers: Layers,
    /// Longest sequence, in tokens.
    pub sequence_len: u64,
    /// Sequences that go through the model at once.
    pub micro_batch_size: u64,
    /// Micro-batches whose gradients are added up.
    pub gradient_accumulation_steps: u64,
    /// Optimizer, with the type of its state.
    pub optimizer: Optimizer,
    /// Type in which the gradients of a step are kept.
    pub gradient_dtype: Dtype,
    /// Type in which the inputs of blocks that run again are kept.
    pub block_input_dtype: Dtype,
    /// Type in which activations are computed.
    pub dtype: Dtype,
    /// Whether adapters drop inputs while they train: then blocks compute in `f32` and keep each mask.
    pub dropout: bool,
    /// Blocks that keep their activations for backward; of the others only the input is kept, and they run again.
    pub kept_blocks: u64,
    /// What is known of the rows, once they are read.
    pub data: Option<DataFacts>,
    /// What only measurement knows.
    pub calibration: Calibration,
    /// Bytes that the run may use, if that is known.
    pub budget_bytes: Option<u64>,
}

/// What is known of a run's rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DataFacts {
    /// Rows, validation included.
    pub rows: u64,
    /// Tokens of all rows.
    pub row_tokens: u64,
    /// Tokens of the longest row.
    pub longest: u64,
    /// Tokens of the largest micro-batch of the run.
    pub tokens: u64,
    /// Most trained positions of a micro-batch.
    pub targets: u64,
}

impl PlanInput {
    /// A run at the usual settings over a model of this shape and these weights: rank 16 on all linear layers, one row of
    /// 2,048 tokens at a time, gradients accumulated, AdamW in 32 bits, `f32` arithmetic, blocks run again in backward.
    pub fn of(model: String, shape: Shape, weights: WeightBytes, method: Method) -> Self {
        Self {
            model,
            shape,
            weights,
            method,
            rank: 16,
            target_modules: TargetModules::AllLinear,
            layers: Layers::All,
            sequence_len: 2048,
            micro_batch_size: 1,
            gradient_accumulation_steps: 2,
            optimizer: Optimizer::Adamw,
            gradient_dtype: Dtype::F32,
            block_input_dtype: Dtype::F32,
            dtype: Dtype::F32,
            dropout: false,
            kept_blocks: 0,
            data: None,
            calibration: FLEX,
            budget_bytes: None,
        }
    }

    /// The input of a resolved recipe over a model of this shape and these weights, on the machine of this calibration.
    pub fn from_spec(
        spec: &RunSpec,
        model: String,
        shape: Shape,
        weights: WeightBytes,
        calibration: Calibration,
        budget_bytes: Option<u64>,
    ) -> Self {
        Self {
            model,
            shape,
            weights,
            method: spec.adapter.method,
            rank: spec.adapter.r as u64,
            target_modules: spec.adapter.target_modules.clone(),
            layers: spec.adapter.layers.clone(),
            sequence_len: spec.data_options.sequence_len as u64,
            micro_batch_size: spec.train.micro_batch_size as u64,
            gradient_accumulation_steps: spec.train.gradient_accumulation_steps as u64,
            optimizer: spec.train.optimizer,
            gradient_dtype: spec.train.gradient_dtype,
            block_input_dtype: spec.train.block_input_dtype,
            dtype: spec.model.dtype,
            dropout: spec.adapter.lora_dropout > 0.0 && spec.adapter.method != Method::Full,
            kept_blocks: if spec.train.gradient_checkpointing { 0 } else { shape.num_hidden_layers },
            data: None,
            calibration,
            budget_bytes,
        }
    }

    /// The same with the most kept blocks whose plan `fits`.
    pub(crate) fn keep_what(self, fits: impl Fn(&MemoryPlan) -> bool) -> Self {
        let with = |kept_blocks| Self { kept_blocks, ..self.clone() };
        let fits = |kept_blocks| self.budget_bytes.is_some() && fits(&estimate(&with(kept_blocks)));
        let all = self.shape.num_hidden_layers;
        if fits(all) {
            return with(all);
        }
        // From one on and below all of them, more kept blocks never need less memory.
        let (mut fitting, mut too_many) = (0, all);
        while too_many.saturating_sub(fitting) > 1 {
            let middle = fitting.midpoint(too_many);
            if fits(middle) { fitting = middle } else { too_many = middle }
        }
        with(fitting)
    }

    /// Parameters that are trained.
    pub fn trained_parameters(&self) -> u64 {
        match self.method {
            Method::Full => self.shape.parameters(),
            Method::Lora | Method::Qlora => {
                let per_rank = self.shape.adapter_parameters_per_rank(&self.target_modules, &self.layers);
                self.rank.saturating_mul(per_rank)
            }
        }
    }

    /// Tokens that go through the model at once, at most.
    pub fn tokens(&self) -> u64 {
        let most = self.sequence_len.saturating_mul(self.micro_batch_size);
        self.data.map_or(most, |data| data.tokens.min(most))
    }
}

/// One named part of the memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Term {
    /// What it is.
    pub name: Cow<'static, str>,
    /// Its bytes.
    pub bytes: u64,
    /// How they come about.
    pub formula: String,
}

/// Memory at the worst moment of one phase of a step.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PhaseBytes {
    /// `load`, `loss`, `block` or `step`.
    pub name: Cow<'static, str>,
    /// Its bytes, unused room in the allocator included.
    pub bytes: u64,
    /// Names of the terms that live then.
    pub terms: Vec<Cow<'static, str>>,
}

/// What an estimate rests on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Basis {
    /// The dimensions of the model, term by term.
    Detailed,
    /// Only the reference table, because nothing but a size is known.
    Reference,
}

/// Predicted memory of a run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Estimate {
    /// What it rests on.
    pub basis: Basis,
    /// Predicted peak of resident memory.
    pub peak_bytes: u64,
    /// Upper end of the range; the verdict compares this one.
    pub upper_bytes: u64,
    /// The phase of the peak.
    pub peak_phase: Option<Cow<'static, str>>,
    /// Parameters that are trained.
    pub trainable_parameters: Option<u64>,
    /// Tokens that go through the model at once.
    pub tokens: Option<u64>,
    /// The parts.
    pub terms: Vec<Term>,
    /// The phases.
    pub phases: Vec<PhaseBytes>,
}

impl Estimate {
    /// What of the peak follows from the sizes of model and batch alone. The rest is counted from our operations, or measured.
    pub fn exact_bytes(&self) -> u64 {
        let peak = self.phases.iter().find(|phase| Some(&phase.name) == self.peak_phase.as_ref());
        peak.map_or(0, |phase| terms::exact_bytes(&self.terms, phase))
    }
}

/// Reference, estimate and verdict. Its JSON form is a stable interface.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MemoryPlan {
    /// What the model is called.
    pub model: String,
    /// Its parameters.
    pub parameters: u64,
    /// Training method.
    pub method: Method,
    /// The rule of thumb.
    pub reference: Reference,
    /// The count.
    pub estimate: Estimate,
    /// Blocks that keep their activations; unknown when only a size is known.
    pub kept_blocks: Option<u64>,
    /// Bytes that the run may use, if that is known.
    pub budget_bytes: Option<u64>,
    /// Whether the run fits; unknown without a budget.
    pub fits: Option<bool>,
}

/// Counts the memory of a run on the CPU backend.
pub fn estimate(input: &PlanInput) -> MemoryPlan {
    let parameters = input.shape.parameters();
    let counted = terms::count(input);
    let peak = counted.phases.iter().max_by_key(|phase| phase.bytes);
    let peak_bytes = peak.map_or(0, |phase| phase.bytes);
    let mut estimate = Estimate {
        basis: Basis::Detailed,
        peak_bytes,
        upper_bytes: peak_bytes,
        peak_phase: peak.map(|phase| phase.name.clone()),
        trainable_parameters: Some(input.trained_parameters()),
        tokens: Some(input.tokens()),
        terms: counted.terms,
        phases: counted.phases,
    };
    let exact = estimate.exact_bytes();
    let rest = permille(peak_bytes - exact, input.calibration.margin_permille).max(LEAST_MARGIN_BYTES);
    let margin = permille(exact, EXACT_MARGIN_PERMILLE).saturating_add(rest);
    estimate.upper_bytes = peak_bytes.saturating_add(margin);
    MemoryPlan {
        model: input.model.clone(),
        parameters,
        method: input.method,
        reference: reference(input.method, input.weights.linear_bits, parameters, false),
        fits: input.budget_bytes.map(|budget| estimate.upper_bytes <= budget),
        estimate,
        kept_blocks: Some(input.kept_blocks.min(input.shape.num_hidden_layers)),
        budget_bytes: input.budget_bytes,
    }
}

/// The plan when only a size is known: the reference figure stands in for the estimate.
pub fn rough(model: String, reference: Reference, budget_bytes: Option<u64>) -> MemoryPlan {
    let bytes = reference.gb.saturating_mul(1_000_000_000);
    MemoryPlan {
        model,
        parameters: reference.parameters,
        method: reference.method,
        fits: budget_bytes.map(|budget| bytes <= budget),
        estimate: Estimate {
            basis: Basis::Reference,
            peak_bytes: bytes,
            upper_bytes: bytes,
            peak_phase: None,
            trainable_parameters: None,
            tokens: None,
            terms: vec![Term { name: "reference figure".into(), bytes, formula: reference.formula.clone() }],
            phases: Vec::new(),
        },
        reference,
        kept_blocks: None,
        budget_bytes,
    }
}

/// A product that stops at the largest number instead of overflowing: the inputs come from people.
pub(crate) fn product(factors: &[u64]) -> u64 {
    factors.iter().fold(1, |product: u64, factor| product.saturating_mul(*factor))
}

/// Half-width of the range around bytes that follow from the model's sizes alone, in thousandths: pages at the ends of blocks.
const EXACT_MARGIN_PERMILLE: u64 = 5;

/// Least half-width of the range around all else: what the program itself takes differs that much between runs.
const LEAST_MARGIN_BYTES: u64 = 4 << 20;

/// `bytes` and so many thousandths of it.
pub(crate) fn plus_permille(bytes: u64, more: u64) -> u64 {
    bytes.saturating_add(permille(bytes, more))
}

/// So many thousandths of `bytes`.
pub(crate) fn permille(bytes: u64, permille: u64) -> u64 {
    u64::try_from(u128::from(bytes) * u128::from(permille) / 1000).unwrap_or(u64::MAX)
}
