//! The estimate: every byte of a run as a named term, and the peak as the largest of three phases.
//!
//! ```text
//! static = base weights + adapters + optimizer state + process
//! loss   = static + gradients so far + block inputs + loss
//! block  = static + gradients + block inputs + one block's activations and gradients
//! step   = static + gradients + temporaries of AdamW
//! peak   = max(loss, block, step)
//! ```
//!
//! The loss and a block's activations never live at the same time, so a sum of everything would be too much. The
//! form follows the model of activations in Korthikanti et al. 2022 (arXiv 2205.05198); the counts are those of
//! our own operations, which save for backward only what is listed in [`saved_elements`].

use serde::Serialize;
use tune_recipe::{Layers, Method, RunSpec, TargetModules};

use crate::calibration::Calibration;
use crate::reference::{Reference, reference};
use crate::{FLEX, Shape, WeightBytes};

/// Bytes of an activation, gradient or moment.
const F32: u64 = 4;

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
    /// Only block inputs are kept, and blocks run again in backward.
    pub gradient_checkpointing: bool,
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
            gradient_checkpointing: spec.train.gradient_checkpointing,
            budget_bytes,
        }
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
        budget_bytes,
    }
}

/// 32-bit numbers per token that the operations of one block save for backward.
///
/// d `hidden_size`, q and k the widths of all query and key heads, f `intermediate_size`: the residual stream in
/// front of the MLP and the block's output (2 d), rotated q, k, v and the attention's output (2 q + 2 k), gate and
/// up (2 f). A frozen linear saves nothing; an adapter saves its input, once for all that share it, and `x Aᵀ`.
pub(crate) fn saved_elements(input: &PlanInput) -> u64 {
    let (s, full) = (&input.shape, input.method == Method::Full);
    let has = |names: &[&str]| full || names.iter().any(|name| input.target_modules.contains(name));
    let (d, f) = (s.hidden_size, s.intermediate_size);
    let mut elements = 2 * d + 2 * s.q() + 2 * s.kv() + 2 * f + s.num_attention_heads + 2;
    for (targets, width) in
        [(&["q_proj", "k_proj", "v_proj"][..], d), (&["gate_proj", "up_proj"], d), (&["down_proj"], f)]
    {
        elements += if has(targets) { width } else { 0 };
    }
    if s.qk_norm {
        elements += s.q() + s.kv();
    }
    if !full {
        let adapted =
            s.block_linears().iter().filter(|(name, ..)| input.target_modules.contains(name)).count();
        elements += input.rank * adapted as u64;
    }
    elements
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
            self.push("gradient sum", product(&[F32, n]), format!("accumulation: 4 bytes × {n}"));
        }
        let process = c.process_bytes.saturating_add(product(&[c.bytes_per_vocabulary_entry, vocab]));
        self.push("process", process, format!("program, tokenizer of {vocab} entries"));
        self.push("decoded weights", c.panel_bytes, "a panel of rows at a time".into());
    }

    fn count_activations(&mut self) {
        let (input, c, s) = (self.input, self.calibration, self.input.shape);
        let tokens = input.tokens();
        let (d, f, vocab) = (s.hidden_size, s.intermediate_size, s.vocab_size);
        let layers = match input.method {
            Method::Full => s.num_hidden_layers,
            Method::Lora | Method::Qlora => s.traversed_layers(&input.layers),
        };
        let saved = saved_elements(input);
        if input.gradient_checkpointing {
            let bytes = product(&[layers, tokens, d, F32]);
            self.push("block inputs", bytes, format!("{layers} blocks × {tokens} tokens × {d} × 4 bytes"));
            let bytes = product(&[tokens, saved, F32]);
            self.push("block activations", bytes, format!("1 block × {tokens} tokens × {saved} × 4 bytes"));
        } else {
            let bytes = product(&[layers, tokens, saved, F32]);
            self.push("activations", bytes, format!("{layers} blocks × {tokens} tokens × {saved} × 4 bytes"));
        }
        let passing = 2 * d + 2 * f;
        let bytes = product(&[tokens, passing, F32]);
        self.push("block gradients", bytes, format!("{tokens} tokens × {passing} × 4 bytes"));

        let chunk = c.loss_chunk.min(tokens);
        let logits = product(&[chunk, vocab, c.bytes_per_logit]);
        self.push("logits", logits, format!("{chunk} positions × {vocab} × {} bytes", c.bytes_per_logit));
        // Output of the blocks, its trained rows, those normalised, and the gradients of the three.
        let bytes = product(&[6, tokens, d, F32]);
        self.push("hidden states of the loss", bytes, format!("6 × {tokens} tokens × {d} × 4 bytes"));

        let widest = s.block_linears().into_iter().map(|(_, d_out, d_in)| d_out.max(d_in)).max().unwrap_or(0);
        let tensor = match input.method {
            Method::Full => product(&[vocab, d]),
            Method::Lora | Method::Qlora => product(&[input.rank, widest]),
        };
        self.push("temporaries of AdamW", product(&[4, tensor, F32]), format!("4 × 4 bytes × {tensor}"));
    }

    fn push(&mut self, name: &'static str, bytes: u64, formula: String) {
        self.terms.push(Term { name, bytes, formula });
    }

    fn estimate(self) -> Estimate {
        const LOSS: [&str; 2] = ["logits", "hidden states of the loss"];
        const BLOCK: [&str; 3] = ["gradients", "block activations", "block gradients"];
        const BACKWARD: [&str; 2] = ["block inputs", "activations"];
        const STEP: [&str; 2] = ["gradients", "temporaries of AdamW"];
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
        let phases = [
            phase("loss", &[&LOSS, &BACKWARD]),
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
fn product(factors: &[u64]) -> u64 {
    factors.iter().fold(1, |product: u64, factor| product.saturating_mul(*factor))
}

fn plus_permille(bytes: u64, permille: u64) -> u64 {
    let more = u128::from(bytes) * u128::from(1000 + permille) / 1000;
    u64::try_from(more).unwrap_or(u64::MAX)
}
