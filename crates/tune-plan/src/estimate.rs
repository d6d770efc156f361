//! The estimate: every byte of a run as a named term, and the peak as the largest of three phases.
//!
//! ```text
//! static = base weights + adapters + optimizer state + process
//! loss   = static + gradients so far + block inputs + loss, with the gradient of a trained head
//! block  = static + gradients + block inputs + activations of the kept blocks, or of one + one block's gradients
//! step   = static + gradients, since AdamW changes parameters and moments in place
//! peak   = max(loss, block, step)
//! ```
//!
//! The loss and a block's activations never live at the same time, so a sum of everything would be too much. The
//! form follows the model of activations in Korthikanti et al. 2022 (arXiv 2205.05198); the counts are those of
//! our own operations, which save for backward only what is listed at [`saved_bytes`].

use serde::Serialize;
use tune_recipe::{Dtype, Layers, Method, RunSpec, TargetModules};

use crate::calibration::Calibration;
use crate::reference::{Reference, reference};
use crate::{FLEX, Shape, WeightBytes};

/// Bytes of an adapter's element, a gradient or a moment, and of the residual stream.
const F32: u64 = 4;

/// Bytes of an activation between two operations in `bf16`.
const BF16: u64 = 2;

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
    /// Type in which activations are computed.
    pub dtype: Dtype,
    /// Whether adapters drop inputs while they train: then blocks compute in `f32` and keep each mask.
    pub dropout: bool,
    /// Blocks that keep their activations for backward; of the others only the input is kept, and they run again.
    pub kept_blocks: u64,
    /// Bytes that the run may use, if that is known.
    pub budget_bytes: Option<u64>,
}

impl PlanInput {
    /// The input of a resolved recipe over a model of this shape and these weights.
    pub fn from_spec(
        spec: &RunSpec,
        model: String,
        shape: Shape,
        weights: WeightBytes,
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
            dtype: spec.model.dtype,
            dropout: spec.adapter.lora_dropout > 0.0 && spec.adapter.method != Method::Full,
            kept_blocks: if spec.train.gradient_checkpointing { 0 } else { shape.num_hidden_layers },
            budget_bytes,
        }
    }

    /// The same with as many kept blocks as fit in the budget, unless `spec` says how many. Without a known budget
    /// none: what does not fit would end the run.
    #[must_use]
    pub fn keep_what_fits(self, spec: &RunSpec) -> Self {
        if spec.origins.is_written("train.gradient_checkpointing") {
            return self;
        }
        let with = |kept_blocks| Self { kept_blocks, ..self.clone() };
        let fits = |kept_blocks| estimate(&with(kept_blocks)).fits.unwrap_or(false);
        let all = self.shape.num_hidden_layers;
        if fits(all) {
            return with(all);
        }
        // From one on and below all of them, more kept blocks never need less memory.
        let (mut fitting, mut too_many) = (0, all);
        while too_many - fitting > 1 {
            let middle = fitting.midpoint(too_many);
            if fits(middle) { fitting = middle } else { too_many = middle }
        }
        with(fitting)
    }

    /// Tokens that go through the model at once.
    pub fn tokens(&self) -> u64 {
        self.sequence_len.saturating_mul(self.micro_batch_size)
    }
}

/// One named part of the memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Term {
    /// What it is.
    pub name: &'static str,
    /// Its bytes.
    pub bytes: u64,
    /// How they come about.
    pub formula: String,
}

/// Memory at the worst moment of one phase of a step.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PhaseBytes {
    /// `loss`, `block` or `step`.
    pub name: &'static str,
    /// Its bytes, unused room in the allocator included.
    pub bytes: u64,
    /// Names of the terms that live then.
    pub terms: Vec<&'static str>,
}

/// What an estimate rests on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Basis {
    /// The dimensions of the model, term by term.
    Detailed,
    /// Only the reference table, because nothing but a size is known.
    Reference,
}

/// Predicted memory of a run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Estimate {
    /// What it rests on.
    pub basis: Basis,
    /// Predicted peak of resident memory.
    pub peak_bytes: u64,
    /// Upper end of the range; the verdict compares this one.
    pub upper_bytes: u64,
    /// The phase of the peak.
    pub peak_phase: Option<&'static str>,
    /// Parameters that are trained.
    pub trainable_parameters: Option<u64>,
    /// Tokens that go through the model at once.
    pub tokens: Option<u64>,
    /// The parts.
    pub terms: Vec<Term>,
    /// The phases.
    pub phases: Vec<PhaseBytes>,
}

/// Reference, estimate and verdict. Its JSON form is a stable interface.
#[derive(Clone, Debug, PartialEq, Serialize)]
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
    let estimate = Counted::new(input, &FLEX).estimate();
    // Pages that were only read once give way under pressure: they count for what is seen, not for what fits.
    let needed = estimate.upper_bytes - input.weights.passing.min(estimate.upper_bytes);
    MemoryPlan {
        model: input.model.clone(),
        parameters,
        method: input.method,
        reference: reference(input.method, input.weights.linear_bits, parameters, false),
        fits: input.budget_bytes.map(|budget| needed <= budget),
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
            terms: vec![Term { name: "reference figure", bytes, formula: reference.formula.clone() }],
            phases: Vec::new(),
        },
        reference,
        kept_blocks: None,
        budget_bytes,
    }
}

/// Bytes per token that one block keeps for backward.
///
/// d `hidden_size`, q and k the widths of all query and key heads, f `intermediate_size`. In `bf16`: the input of
/// both norms over its root mean square (2 d), q, k, v and the attention's output (2 q + 2 k), gate and up (2 f),
/// `x Aᵀ` of each adapter; and in `f32` a value a token for each head and norm. u of a projection is made again. For
/// arithmetic in `f32` see [`saved_elements`].
pub(crate) fn saved_bytes(input: &PlanInput) -> u64 {
    let s = &input.shape;
    if computes_in_f32(input) {
        return product(&[saved_elements(input), F32]);
    }
    let halves = 2 * s.hidden_size + 2 * s.q() + 2 * s.kv() + 2 * s.intermediate_size + adapted_ranks(input);
    let floats = s.num_attention_heads + 2;
    BF16 * halves + F32 * floats
}

/// Whether blocks compute in `f32`: the fused operations in `bf16` know no dropout.
fn computes_in_f32(input: &PlanInput) -> bool {
    input.dtype == Dtype::F32 || input.dropout
}

/// Ranks of a block's adapters, added up.
fn adapted_ranks(input: &PlanInput) -> u64 {
    if input.method == Method::Full {
        return 0;
    }
    let linears = input.shape.block_linears();
    let adapted = linears.iter().filter(|(name, ..)| input.target_modules.contains(name)).count();
    input.rank.saturating_mul(adapted as u64)
}

/// 32-bit numbers per token that the plain operations of one block save for backward.
///
/// d `hidden_size`, q and k the widths of all query and key heads, f `intermediate_size`: the residual stream in
/// front of the MLP and the block's output (2 d), rotated q, k, v and the attention's output (2 q + 2 k), gate and
/// up (2 f). A frozen linear saves nothing; an adapter saves its input, once for all that share it, and `x Aᵀ`; one with
/// dropout its own mask and masked input. A trained gain saves the normed input (2 d).
fn saved_elements(input: &PlanInput) -> u64 {
    let (s, full) = (&input.shape, input.method == Method::Full);
    let has = |names: &[&str]| full || names.iter().any(|name| input.target_modules.contains(name));
    let (d, f) = (s.hidden_size, s.intermediate_size);
    let mut elements = 2 * d + 2 * s.q() + 2 * s.kv() + 2 * f + s.num_attention_heads + 2;
    for (targets, width) in
        [(&["q_proj", "k_proj", "v_proj"][..], d), (&["gate_proj", "up_proj"], d), (&["down_proj"], f)]
    {
        elements += if has(targets) && !input.dropout { width } else { 0 };
    }
    if input.dropout {
        let linears = s.block_linears();
        let adapted = linears.iter().filter(|(name, ..)| input.target_modules.contains(name));
        elements += 2 * adapted.map(|(_, _, d_in)| d_in).sum::<u64>();
    }
    if full {
        elements += 2 * d;
    }
    if s.qk_norm {
        elements += s.q() + s.kv();
    }
    elements.saturating_add(adapted_ranks(input))
}

/// Terms by name, and what of them lives in which phase.
struct Counted<'a> {
    input: &'a PlanInput,
    calibration: &'a Calibration,
    trained: u64,
    terms: Vec<Term>,
}

impl<'a> Counted<'a> {
    fn new(input: &'a PlanInput, calibration: &'a Calibration) -> Self {
        let trained = match input.method {
            Method::Full => input.shape.parameters(),
            Method::Lora | Method::Qlora => {
                input.rank * input.shape.adapter_parameters_per_rank(&input.target_modules, &input.layers)
            }
        };
        let mut counted = Self { input, calibration, trained, terms: Vec::new() };
        counted.count_static();
        counted.count_activations();
        counted
    }

    fn count_static(&mut self) {
        let (input, n, c) = (self.input, self.trained, self.calibration);
        let vocab = input.shape.vocab_size;
        if input.method == Method::Full {
            self.push("weights", product(&[F32, n]), format!("4 bytes × {n}"));
            self.push(
                "pages read once",
                input.weights.held,
                "the base, until its weights are decoded".into(),
            );
        } else {
            let w = input.weights;
            self.push("base weights", w.held, format!("as held, {:.2} bits a weight", w.bits_per_weight()));
            self.push("adapters", product(&[F32, n]), format!("4 bytes × {n}"));
            if w.passing > 0 {
                self.push("pages read once", w.passing, "16-bit weights that became NF4".into());
            }
        }
        self.push("optimizer state", product(&[2 * F32, n]), format!("AdamW: 2 × 4 bytes × {n}"));
        self.push("gradients", product(&[F32, n]), format!("4 bytes × {n}"));
        if input.gradient_accumulation_steps > 1 {
            // A block's gradients are added to the sum before those of the next one are made.
            let n = self.trained_of_a_block();
            self.push("gradients of a block", product(&[F32, n]), format!("accumulation: 4 bytes × {n}"));
        }
        let process = c.process_bytes.saturating_add(product(&[c.bytes_per_vocabulary_entry, vocab]));
        self.push("process", process, format!("program, tokenizer of {vocab} entries"));
        self.push("decoded weights", c.panel_bytes, "a panel at a time in each thread".into());
    }

    fn count_activations(&mut self) {
        let (input, c, s) = (self.input, self.calibration, self.input.shape);
        let tokens = input.tokens();
        let (d, f, vocab) = (s.hidden_size, s.intermediate_size, s.vocab_size);
        let layers = match input.method {
            Method::Full => s.num_hidden_layers,
            Method::Lora | Method::Qlora => s.traversed_layers(&input.layers),
        };
        let saved = saved_bytes(input);
        let kept = input.kept_blocks.min(layers);
        if kept < layers {
            let made_again = layers - kept;
            let bytes = product(&[made_again, tokens, d, F32]);
            self.push(
                "block inputs",
                bytes,
                format!("{made_again} blocks × {tokens} tokens × {d} × 4 bytes"),
            );
        }
        if kept == 0 {
            // Kept blocks are gone when backward comes to the others.
            let bytes = product(&[tokens, saved]);
            self.push("block activations", bytes, format!("1 block × {tokens} tokens × {saved} bytes"));
        }
        let bytes = product(&[kept, tokens, saved]);
        self.push("activations", bytes, format!("{kept} blocks × {tokens} tokens × {saved} bytes"));
        let passing = if computes_in_f32(input) { F32 * (2 * d + 2 * f) } else { F32 * 3 * d + BF16 * 4 * f };
        // The transposed gradient of a projection's output.
        let passing = passing + if input.method == Method::Full { BF16 * 2 * f } else { 0 };
        let bytes = product(&[tokens, passing]);
        self.push("block gradients", bytes, format!("{tokens} tokens × {passing} bytes"));

        let (chunk, per_logit) = match input.dtype {
            Dtype::F32 => (c.loss_chunk.min(tokens), c.eighths_of_bytes_per_logit_f32),
            Dtype::Bf16 => ((2 * c.loss_chunk).min(tokens), c.eighths_of_bytes_per_logit_bf16),
        };
        let logits = product(&[chunk, vocab, per_logit]) / 8;
        let bytes = per_logit as f64 / 8.0;
        self.push("logits", logits, format!("{chunk} positions × {vocab} × {bytes} bytes"));
        if input.method == Method::Full {
            let bytes = product(&[vocab, d, F32]);
            self.push("gradient of the head", bytes, format!("{vocab} × {d} × 4 bytes"));
            if input.dtype == Dtype::Bf16 {
                let bytes = product(&[chunk, vocab, BF16]);
                self.push("transposed logits", bytes, format!("{chunk} positions × {vocab} × 2 bytes"));
            }
        }
        // Output of the blocks, its trained rows, those normalised, and the gradients of the three.
        let bytes = product(&[6, tokens, d, F32]);
        self.push("hidden states of the loss", bytes, format!("6 × {tokens} tokens × {d} × 4 bytes"));
    }

    /// Parameters of a block that are trained.
    fn trained_of_a_block(&self) -> u64 {
        let s = &self.input.shape;
        let outside = match self.input.method {
            Method::Full => s.embedding_parameters(),
            Method::Lora | Method::Qlora => 0,
        };
        self.trained.saturating_sub(outside) / s.num_hidden_layers.max(1)
    }

    fn push(&mut self, name: &'static str, bytes: u64, formula: String) {
        self.terms.push(Term { name, bytes, formula });
    }

    fn estimate(self) -> Estimate {
        const LOSS: [&str; 4] =
            ["logits", "transposed logits", "gradient of the head", "hidden states of the loss"];
        const BLOCK: [&str; 4] =
            ["gradients", "gradients of a block", "block activations", "block gradients"];
        const BACKWARD: [&str; 2] = ["block inputs", "activations"];
        const STEP: [&str; 1] = ["gradients"];
        let only_in =
            |name: &str| [&LOSS[..], &BLOCK, &BACKWARD, &STEP].iter().any(|names| names.contains(&name));
        let phase = |name: &'static str, parts: &[&[&str]]| {
            let lives =
                |term: &&Term| !only_in(term.name) || parts.iter().any(|names| names.contains(&term.name));
            let terms: Vec<&Term> = self.terms.iter().filter(lives).collect();
            let exact = |term: &&Term| ["base weights", "pages read once", "process"].contains(&term.name);
            let sum = |exactly: bool| {
                let of_kind = terms.iter().filter(|term| exact(term) == exactly);
                of_kind.fold(0, |sum: u64, term| sum.saturating_add(term.bytes))
            };
            let (fixed, allocated) = (sum(true), sum(false));
            let allocated = plus_permille(allocated, self.calibration.fragmentation_permille);
            let upper = fixed.saturating_add(plus_permille(allocated, self.calibration.margin_permille));
            let names = terms.iter().map(|term| term.name).collect();
            (PhaseBytes { name, bytes: fixed.saturating_add(allocated), terms: names }, upper)
        };
        // From the second micro-batch on.
        let accumulates = self.input.gradient_accumulation_steps > 1;
        let phases = [
            phase("loss", if accumulates { &[&LOSS, &BACKWARD, &STEP] } else { &[&LOSS, &BACKWARD] }),
            phase("block", &[&BLOCK, &BACKWARD]),
            phase("step", &[&STEP]),
        ];
        let upper_bytes = phases.iter().map(|(_, upper)| *upper).max().unwrap_or(0);
        let phases = phases.map(|(phase, _)| phase);
        let peak = phases.iter().max_by_key(|phase| phase.bytes);
        Estimate {
            basis: Basis::Detailed,
            peak_bytes: peak.map_or(0, |phase| phase.bytes),
            upper_bytes,
            peak_phase: peak.map(|phase| phase.name),
            trainable_parameters: Some(self.trained),
            tokens: Some(self.input.tokens()),
            terms: self.terms,
            phases: phases.to_vec(),
        }
    }
}

/// A product that stops at the largest number instead of overflowing: the inputs come from people.
pub(crate) fn product(factors: &[u64]) -> u64 {
    factors.iter().fold(1, |product: u64, factor| product.saturating_mul(*factor))
}

pub(crate) fn plus_permille(bytes: u64, permille: u64) -> u64 {
    let more = u128::from(bytes) * u128::from(1000 + permille) / 1000;
    u64::try_from(more).unwrap_or(u64::MAX)
}
