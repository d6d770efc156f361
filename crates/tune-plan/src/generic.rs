//! Training memory of any catalogue model under any trainer, byte by byte: to check the formulas against published
//! measurements of others, and to answer for architectures and devices that this version does not train on.
//!
//! ```text
//! static = base weights + trained weights + optimizer state
//! loss   = static + kept for backward + logits             (+ gradients, where several steps are added up)
//! block  = static + gradients and kept, whichever way they weigh most + one block + one dequantised matrix
//! step   = static + gradients
//! peak   = max(loss, block, step) · (1 + overhead) + runtime
//! ```
//!
//! Backward goes from the last block to the first. Gradients appear as what was kept goes away, so the worst moment of
//! the block phase is at one end. What a block keeps, in elements a token (after Korthikanti et al. 2022, arXiv
//! 2205.05198, for fused norms, an attention that keeps no scores, and no dropout):
//!
//! | block | elements |
//! |---|---|
//! | plain | 4 d + 2 q + 2 k + 4 f, and one a head |
//! | norms on q and k | + q + k |
//! | four norms | + 2 d |
//! | norm on v | + k |
//! | gate on the output | + 2 q |
//! | experts | 4 f becomes 4 (active · f_expert + f_shared) + active · d |
//! | delta net | 4 d + 2 (2 k + v) + 2 v + 4 f, and in 32 bits 7 v + 3 · 64 heads + heads · dim² / 64 |
//!
//! Departures: temporaries of the optimizer are not counted, nor are scores of an attention without a fused kernel.

use tune_recipe::Method;

use crate::catalogue::CatalogueModel;
use crate::estimate::{Basis, Estimate, MemoryPlan, PhaseBytes, Term, plus_permille, product};
use crate::layout::{AttentionPart, LayerGroup, Layout, Mixer};
use crate::reference::reference;
use crate::weights::nf4_bytes;

/// How a trainer holds things.
#[derive(Clone, Debug, PartialEq)]
pub struct Trainer {
    /// How the frozen linear layers are stored; `None` when every weight is trained.
    pub base: Option<BaseType>,
    /// Rank of the adapters on the seven linear layers of a block; not read when every weight is trained.
    pub rank: u64,
    /// Bytes of a trained parameter.
    pub parameter_bytes: u64,
    /// Bytes of its gradient.
    pub gradient_bytes: u64,
    /// 32nds of a byte of its optimizer state: 256 for AdamW in 32 bits, 128 in 16, 65 in 8 with scales.
    pub optimizer_32nds: u64,
    /// Bytes of an activation.
    pub activation_bytes: u64,
    /// Norms compute in 32 bits and keep their input so.
    pub norms_keep_32_bits: bool,
    /// What is kept for backward.
    pub kept: Kept,
    /// The loss.
    pub loss: Loss,
    /// Gradients of several steps are added up.
    pub accumulates: bool,
    /// Each gradient is used and dropped as soon as it is there.
    pub steps_in_backward: bool,
    /// Thousandths of all, for what the allocator wastes.
    pub overhead_permille: u64,
    /// Bytes of the driver and the program.
    pub runtime_bytes: u64,
}

/// How frozen linear layers are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BaseType {
    /// 16 bits.
    Bf16,
    /// NF4 with double quantisation.
    Nf4,
}

/// What is kept for backward.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kept {
    /// All that every block needs.
    Everything,
    /// The input of each block.
    BlockInputs,
    /// The input of each block, in another memory.
    Elsewhere,
}

/// How the loss is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Loss {
    /// Positions whose logits exist at once; 0 for all.
    pub chunk: u64,
    /// Bytes of one of their logits, with everything made of it.
    pub bytes_per_logit: u64,
    /// 16-bit logits of all positions are kept as well.
    pub keeps_all: bool,
}

impl Trainer {
    /// QLoRA as most trainers run it: NF4 linear layers, 16-bit embedding, adapters and AdamW in 32 bits, block
    /// checkpointing, fused attention, a loss in chunks of 512.
    pub fn qlora(rank: u64) -> Self {
        Self {
            base: Some(BaseType::Nf4),
            rank,
            parameter_bytes: 4,
            gradient_bytes: 4,
            optimizer_32nds: 256,
            activation_bytes: 2,
            norms_keep_32_bits: false,
            kept: Kept::BlockInputs,
            loss: Loss { chunk: 512, bytes_per_logit: 12, keeps_all: false },
            accumulates: true,
            steps_in_backward: false,
            overhead_permille: 50,
            runtime_bytes: 500_000_000,
        }
    }

    /// The same over 16-bit weights.
    pub fn lora(rank: u64) -> Self {
        Self { base: Some(BaseType::Bf16), ..Self::qlora(rank) }
    }

    /// Every weight: 16-bit weights and gradients, AdamW in 32 bits with 32-bit copies of the weights.
    pub fn full() -> Self {
        Self { base: None, parameter_bytes: 6, gradient_bytes: 2, ..Self::qlora(0) }
    }
}

/// The plan of a published model under a trainer as most are, for architectures that this version does not train.
pub fn generic_plan(
    model: &CatalogueModel,
    method: Method,
    rank: u64,
    sequence_len: u64,
    batch: u64,
    budget_bytes: Option<u64>,
) -> MemoryPlan {
    let (trainer, bits) = match method {
        Method::Full => (Trainer::full(), 16),
        Method::Lora => (Trainer::lora(rank), 16),
        Method::Qlora => (Trainer::qlora(rank), 4),
    };
    let parameters = model.layout.parameters();
    let estimate = generic(&model.layout, &trainer, sequence_len, batch);
    MemoryPlan {
        model: model.name.clone(),
        parameters,
        method,
        reference: reference(method, bits, parameters, false),
        fits: budget_bytes.map(|budget| estimate.upper_bytes <= budget),
        estimate,
        kept_blocks: Some(0),
        budget_bytes,
    }
}

/// The memory of a step over `batch` sequences of `sequence_len` tokens, on the device that computes.
pub fn generic(layout: &Layout, trainer: &Trainer, sequence_len: u64, batch: u64) -> Estimate {
    let tokens = sequence_len.saturating_mul(batch);
    let split = layout.split();
    // Looked up only, so it stays in main memory; a trained one cannot.
    let on_device = split.total() - if trainer.base.is_some() { split.embedding_per_layer } else { 0 };
    let matrices = split.linears + split.experts;
    let trained = match trainer.base {
        Some(_) => trainer.rank.saturating_mul(layout.adapter_parameters_per_rank()),
        None => split.total(),
    };
    let base = trainer.base.map_or(0, |base| match base {
        BaseType::Bf16 => 2 * on_device,
        BaseType::Nf4 => nf4_bytes(matrices) + 2 * (on_device - matrices),
    });

    let e = trainer.activation_bytes;
    let blocks = layout.blocks().max(1);
    let inputs = product(&[blocks, tokens, layout.hidden_size, e]);
    let saved = |group: &LayerGroup| saved_bytes(layout, group, trainer);
    let everything = layout
        .layers
        .iter()
        .fold(0, |sum: u64, group| sum.saturating_add(product(&[group.count, tokens, saved(group)])));
    let (kept_name, kept) = match trainer.kept {
        Kept::Everything => ("activations", everything),
        Kept::BlockInputs => ("block inputs", inputs),
        Kept::Elsewhere => ("block inputs", 0),
    };
    let made_again = trainer.kept != Kept::Everything;
    let of_block = |group: &LayerGroup| {
        let again = if made_again { saved(group) } else { 0 };
        let passing = e * 2 * (layout.hidden_size + mlp_width(group));
        (product(&[tokens, again]), product(&[tokens, passing]), dequantised(layout, group, trainer))
    };
    let largest =
        layout.layers.iter().map(of_block).max_by_key(|(a, b, c)| a.saturating_add(*b).saturating_add(*c));
    let (again, passing, decoded) = largest.unwrap_or_default();

    let gradients = product(&[trained, trainer.gradient_bytes]);
    let gradients = if trainer.steps_in_backward { gradients / blocks } else { gradients };
    let chunk = if trainer.loss.chunk == 0 { tokens } else { trainer.loss.chunk.min(tokens) };
    let all = if trainer.loss.keeps_all { product(&[tokens, layout.vocab_size, 2]) } else { 0 };
    let logits = product(&[chunk, layout.vocab_size, trainer.loss.bytes_per_logit]).saturating_add(all);

    let term = |name, bytes, formula: String| Term { name, bytes, formula };
    let terms = vec![
        term("base weights", base, format!("{on_device} parameters on the device")),
        term(
            "trained weights",
            product(&[trained, trainer.parameter_bytes]),
            format!("{} bytes × {trained}", trainer.parameter_bytes),
        ),
        term(
            "optimizer state",
            product(&[trained, trainer.optimizer_32nds]) / 32,
            format!("{} bytes × {trained}", trainer.optimizer_32nds as f64 / 32.0),
        ),
        term("gradients", gradients, format!("{} bytes × {trained}", trainer.gradient_bytes)),
        term(kept_name, kept, format!("{blocks} blocks × {tokens} tokens")),
        term("block activations", again, format!("1 block × {tokens} tokens")),
        term("block gradients", passing, format!("1 block × {tokens} tokens")),
        term("decoded weights", decoded, "one matrix".into()),
        term("logits", logits, format!("{chunk} positions × {}", layout.vocab_size)),
        term("runtime", trainer.runtime_bytes, "driver and program".into()),
    ];
    let fixed = sum(&[terms[0].bytes, terms[1].bytes, terms[2].bytes]);
    let walk = if trainer.accumulates {
        gradients.saturating_add(kept)
    } else {
        (gradients / blocks).saturating_add(kept).max(gradients.saturating_add(kept / blocks))
    };
    let so_far = if trainer.accumulates { gradients } else { 0 };
    let phase = |name, bytes: u64, terms: &[&'static str]| PhaseBytes {
        name,
        bytes: plus_permille(bytes, trainer.overhead_permille).saturating_add(trainer.runtime_bytes),
        terms: ["base weights", "trained weights", "optimizer state", "runtime"]
            .iter()
            .chain(terms)
            .copied()
            .collect(),
    };
    let phases = vec![
        phase("loss", sum(&[fixed, so_far, kept, logits]), &[kept_name, "logits"]),
        phase(
            "block",
            sum(&[fixed, walk, again, passing, decoded]),
            &["gradients", kept_name, "block activations", "block gradients", "decoded weights"],
        ),
        phase("step", sum(&[fixed, gradients]), &["gradients"]),
    ];
    let peak = phases.iter().max_by_key(|phase| phase.bytes);
    let peak_bytes = peak.map_or(0, |phase| phase.bytes);
    Estimate {
        basis: Basis::Detailed,
        peak_bytes,
        upper_bytes: plus_permille(peak_bytes, UNCALIBRATED_PERMILLE),
        peak_phase: peak.map(|phase| phase.name),
        trainable_parameters: Some(trained),
        tokens: Some(tokens),
        terms,
        phases,
    }
}

/// Half-width of the range, where no constant was measured.
const UNCALIBRATED_PERMILLE: u64 = 100;

/// Bytes a token that one block keeps for backward.
fn saved_bytes(layout: &Layout, group: &LayerGroup, trainer: &Trainer) -> u64 {
    let (d, e) = (layout.hidden_size, trainer.activation_bytes);
    let residual = 4 * d + if group.norms == 4 { 2 * d } else { 0 };
    let mlp = match &group.mlp.experts {
        None => 4 * group.mlp.width,
        Some(experts) => 4 * mlp_width(group) + experts.active * d,
    };
    let in_32_bits = if trainer.norms_keep_32_bits { 4 * d * group.norms } else { 0 };
    in_32_bits
        + match &group.mixer {
            Mixer::Attention(attention) => {
                let (q, k) = (attention.q(), attention.kv());
                let part = |part, elements| if attention.has(part) { elements } else { 0 };
                let parts = part(AttentionPart::QkNorm, q + k)
                    + part(AttentionPart::ValueNorm, k)
                    + part(AttentionPart::OutputGate, 2 * q);
                e * (residual + 2 * q + 2 * k + mlp + parts) + 4 * attention.heads
            }
            Mixer::DeltaNet(net) => {
                let states = net.v_heads * net.head_dim * net.head_dim / 64;
                let recurrence = 7 * net.v() + 3 * net.v_heads * 64 + states;
                e * (residual + 2 * net.convolved() + 2 * net.v() + mlp) + 4 * recurrence
            }
        }
}

/// Width of what a token goes through.
fn mlp_width(group: &LayerGroup) -> u64 {
    group.mlp.width + group.mlp.experts.as_ref().map_or(0, |experts| experts.active * experts.width)
}

/// The largest matrix that is made from 4 bits, in 16.
fn dequantised(layout: &Layout, group: &LayerGroup, trainer: &Trainer) -> u64 {
    if trainer.base != Some(BaseType::Nf4) {
        return 0;
    }
    let linears = layout.linears(group);
    2 * linears.iter().map(|linear| linear.d_out * linear.d_in).max().unwrap_or(0)
}

fn sum(terms: &[u64]) -> u64 {
    terms.iter().fold(0, |sum: u64, term| sum.saturating_add(*term))
}
