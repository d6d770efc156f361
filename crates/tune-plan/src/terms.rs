//! What lives when: every byte of a run as a named term, and the phases that they add up to: reading the tokenizer, and
//! three of a step.
//!
//! ```text
//! static = base weights + adapters + optimizer state + process + tokenizer + rows + task buffers
//! load   = process + tokenizer while it is read
//! loss   = static + gradients so far + block inputs + kept activations + hidden states + logits
//! block  = static + gradients + block inputs + activations + what passes through one block's backward
//! step   = static + gradients, since AdamW changes parameters and moments in place
//! ```
//!
//! Every count follows our own operations (`tune-kernels`), whose buffers are exactly as large as their values: the
//! allocator (`tune-memory`) keeps freed ones and never more than the peak. So a phase is a sum, without a factor for
//! a heap. What only measurement knows, the program's own pages and its tokenizer, is in [`Calibration`].

use tune_recipe::{Dtype, Method, Optimizer};

use crate::estimate::{PhaseBytes, PlanInput, Term, product};

/// Bytes of an adapter's element, a gradient or a moment, and of the residual stream.
const F32: u64 = 4;

/// Bytes of an activation between two operations in `bf16`.
const BF16: u64 = 2;

/// Positions whose logits exist at the same time in `f32`; in `bf16` twice as many. `LOSS_CHUNK` of `tune-train`.
const LOSS_CHUNK: u64 = 128;

/// Logits of a group, of which `bf16` keeps a maximum and a sum. `GROUP` of `tune-kernels`.
const GROUP: u64 = 32;

/// Most columns and rows of a task of a product, rows whose sums it makes at once, and the tasks that a product is cut into
/// for each thread. `MOST_COLUMNS`, `MOST_ROWS`, `ROWS_AT_ONCE` and `TASKS_PER_THREAD` of `tune-kernels`.
const TILE_COLUMNS: u64 = 320;
const TILE_ROWS: u64 = 2048;
const ROWS_AT_ONCE: u64 = 128;
const TASKS_PER_THREAD: u64 = 2;

/// Scratch space beside the packed weights of a task.
const SCRATCH: u64 = 24 << 10;

/// Queries of a key head that one task of attention takes through backward. `TASK_QUERIES` of `tune-kernels`.
const TASK_QUERIES: u64 = 768;

/// Bytes that a product in `f32` packs in each thread.
const PACKED_FLOATS: u64 = 1 << 20;

/// Values of a decoded panel in `f32`. `PANEL_FLOATS` of `tune-kernels`.
const PANEL_FLOATS: u64 = 512 << 10;

/// Moments of 8 bits that share a scale. `BLOCK` of `tune-train`'s optimizer.
const SCALED_MOMENTS: u64 = 256;

/// Values of the smallest tensor whose moments have 8 bits. `LEAST_8BIT` of `tune-train`'s optimizer.
const LEAST_8BIT: u64 = 4096;

/// Bytes of a row beside its tokens: two vectors with their headers on the heap, and where it comes from.
const ROW: u64 = 48 + 32 + 16;

/// Terms that follow from the sizes of the model and the batch alone.
const EXACT: [&str; 8] = [
    "base weights",
    "weights",
    "adapters",
    "optimizer state",
    "gradients",
    "gradients of a block",
    "block inputs",
    "rotary table",
];

/// What of a phase is exact. The rest is counted from our operations, or measured.
pub(crate) fn exact_bytes(terms: &[Term], phase: &PhaseBytes) -> u64 {
    let exact = terms.iter().filter(|term| EXACT.contains(&&*term.name) && phase.terms.contains(&term.name));
    exact.fold(0, |sum: u64, term| sum.saturating_add(term.bytes))
}

/// Terms, and which of them live in which phase.
pub(crate) struct Counted {
    /// Every term of the run.
    pub(crate) terms: Vec<Term>,
    /// The phases, each the sum of its terms.
    pub(crate) phases: Vec<PhaseBytes>,
}

/// Counts the memory of a run on the CPU backend.
pub(crate) fn count(input: &PlanInput) -> Counted {
    let input = &bounded(input);
    let mut counting = Counting { input, sizes: Sizes::of(input), terms: Vec::new() };
    let always = counting.always();
    let load = counting.load();
    let phases = vec![
        counting.phase("load", &[], load),
        counting.phase("loss", &always, counting.loss()),
        counting.phase("block", &always, counting.block()),
        counting.phase("step", &always, counting.step()),
    ];
    Counted { terms: counting.terms, phases }
}

/// The same with numbers that no model has cut down to some that no machine has either, so that sums of a few of them stay
/// within 64 bits.
fn bounded(input: &PlanInput) -> PlanInput {
    const FAR: u64 = 1 << 44;
    let s = &input.shape;
    PlanInput {
        shape: crate::Shape {
            vocab_size: s.vocab_size.min(FAR),
            hidden_size: s.hidden_size.min(FAR),
            intermediate_size: s.intermediate_size.min(FAR),
            num_attention_heads: s.num_attention_heads.min(1 << 22),
            num_key_value_heads: s.num_key_value_heads.min(1 << 22),
            head_dim: s.head_dim.min(1 << 22),
            ..*s
        },
        rank: input.rank.min(FAR),
        sequence_len: input.sequence_len.min(FAR),
        ..input.clone()
    }
}

/// Sizes that several terms share.
struct Sizes {
    trained: u64,
    /// Of them in one block.
    trained_of_a_block: u64,
    tokens: u64,
    /// Positions that reach the loss.
    targets: u64,
    /// Blocks that backward goes through.
    blocks: u64,
    /// Of them those that keep their activations.
    kept: u64,
    /// Bytes a token that a kept block saves.
    saved: u64,
}

impl Sizes {
    fn of(input: &PlanInput) -> Self {
        let shape = &input.shape;
        let trained = input.trained_parameters();
        let (outside, blocks, of) = match input.method {
            Method::Full => (shape.embedding_parameters(), shape.num_hidden_layers, shape.num_hidden_layers),
            Method::Lora | Method::Qlora => {
                (0, shape.traversed_layers(&input.layers), shape.adapted_layers(&input.layers))
            }
        };
        let tokens = input.tokens();
        Self {
            trained,
            trained_of_a_block: trained.saturating_sub(outside) / of.max(1),
            tokens,
            targets: input.data.map_or(tokens, |data| data.targets.min(tokens)),
            blocks,
            kept: input.kept_blocks.min(blocks),
            saved: saved_bytes(input),
        }
    }
}

/// A term that lives in a phase.
type Named = (&'static str, u64, String);

struct Counting<'a> {
    input: &'a PlanInput,
    sizes: Sizes,
    terms: Vec<Term>,
}

impl Counting<'_> {
    /// Adds what is not there yet to the terms, and sums up.
    fn phase(&mut self, name: &'static str, always: &[Named], of_phase: Vec<Named>) -> PhaseBytes {
        let mut bytes = 0u64;
        let mut names = Vec::new();
        for (term, size, formula) in always.iter().cloned().chain(of_phase).filter(|(_, size, _)| *size > 0) {
            bytes = bytes.saturating_add(size);
            names.push(term.into());
            if !self.terms.iter().any(|known| known.name == term) {
                self.terms.push(Term { name: term.into(), bytes: size, formula });
            }
        }
        PhaseBytes { name: name.into(), bytes, terms: names }
    }

    fn always(&self) -> Vec<Named> {
        let (input, n, c) = (self.input, self.sizes.trained, &self.input.calibration);
        let (vocab, w) = (input.shape.vocab_size, input.weights);
        let mut terms = Vec::new();
        if input.method == Method::Full {
            terms.push(("weights", product(&[F32, n]), format!("4 bytes × {n}")));
        } else {
            let formula = format!("as held, {:.2} bits a weight", w.bits_per_weight());
            terms.push(("base weights", w.held, formula));
            terms.push(("adapters", product(&[F32, n]), format!("4 bytes × {n}")));
        }
        let (bytes, formula) = moments(input);
        terms.push(("optimizer state", bytes, format!("AdamW: 2 × {formula}")));
        terms.push(("process", c.process_bytes, c.origin().to_string()));
        let tokenizer = product(&[c.bytes_per_vocabulary_entry, vocab]);
        terms.push((
            "tokenizer",
            tokenizer,
            format!("{} bytes × {vocab} entries", c.bytes_per_vocabulary_entry),
        ));
        if let Some(data) = input.data {
            let bytes = product(&[ROW, data.rows]).saturating_add(product(&[5, data.row_tokens]));
            terms.push(("rows", bytes, format!("{} rows, {} tokens × 5 bytes", data.rows, data.row_tokens)));
        }
        terms.push(self.task_buffers());
        terms
    }

    /// Buffers that each thread keeps from one task to the next.
    fn task_buffers(&self) -> Named {
        let (input, threads) = (self.input, self.input.calibration.threads);
        let s = &input.shape;
        let floats = product(&[threads, PACKED_FLOATS]).saturating_add(product(&[F32, PANEL_FLOATS]));
        let of_floats = format!("a panel of decoded rows, and {threads} threads × 1 MiB");
        if input.dtype == Dtype::F32 {
            return ("task buffers", floats, of_floats);
        }
        let sums = self.largest_sums();
        let factors = input
            .calibration
            .packed_bytes
            .saturating_add(input.calibration.widened_bytes)
            .saturating_add(SCRATCH);
        let tile = sums.saturating_add(factors);
        // Of the longest document, in the backward of attention: keys twice and values; and in f32 the gradients of both,
        // unless the document is so long that they are made in parts.
        let (longest, dim) = (input.data.map_or(input.sequence_len, |data| data.longest), s.head_dim);
        let group = (s.num_attention_heads / s.num_key_value_heads.max(1)).max(1);
        let whole = longest.min(TASK_QUERIES / group);
        let attention = product(&[longest, dim, 3 * BF16]).saturating_add(product(&[whole, dim, 2 * F32]));
        let bytes = product(&[threads, tile.saturating_add(attention)]);
        let formula = format!(
            "{threads} threads × ({} KiB of sums + {} KiB + ({longest} × 6 + {whole} × 8) × {dim})",
            sums >> 10,
            factors >> 10
        );
        if computes_in_f32(input) {
            // blocks in f32, the loss in bf16
            return ("task buffers", bytes.saturating_add(floats), format!("{formula}, {of_floats}"));
        }
        ("task buffers", bytes, formula)
    }

    /// Bytes of the sums that a task of a product holds, at most: those of some rows, or of all rows while a factor that is
    /// too deep to be packed at once goes by.
    fn largest_sums(&self) -> u64 {
        let (input, tokens, threads) = (self.input, self.sizes.tokens, self.input.calibration.threads);
        let s = &input.shape;
        let (d, f, q, qkv, vocab) =
            (s.hidden_size, s.intermediate_size, s.q(), s.q() + 2 * s.kv(), s.vocab_size);
        let chunk = (2 * LOSS_CHUNK).min(self.sizes.targets);
        // rows, depth and columns: forward and the gradient of the input, then the head's
        let mut products = vec![
            (tokens, d, 2 * f),
            (tokens, d, qkv),
            (tokens, q, d),
            (tokens, f, d),
            (tokens, 2 * f, d),
            (tokens, qkv, d),
            (tokens, d, q),
            (tokens, d, f),
            (chunk, d, vocab),
            (chunk, vocab, d),
        ];
        if input.method == Method::Full {
            products.extend([(2 * f, tokens, d), (d, tokens, f), (qkv, tokens, d), (vocab, chunk, d)]);
        }
        let sums = products.into_iter().map(|(rows, depth, columns)| {
            let of_a_task = columns.div_ceil(TASKS_PER_THREAD * threads.max(1));
            let columns = of_a_task.next_multiple_of(32).min(TILE_COLUMNS);
            let waits = product(&[depth, columns, BF16]) > input.calibration.packed_bytes;
            product(&[rows.min(if waits { TILE_ROWS } else { ROWS_AT_ONCE }), columns, F32])
        });
        sums.max().unwrap_or(0)
    }

    /// Before anything of a model is in memory: of a large vocabulary and a small model it is the most.
    fn load(&self) -> Vec<Named> {
        let (c, vocab) = (&self.input.calibration, self.input.shape.vocab_size);
        let per_entry = if self.input.weights.has_json_tokenizer {
            c.bytes_per_entry_of_json
        } else {
            c.bytes_per_entry_of_gguf
        };
        let reading = product(&[per_entry, vocab]);
        vec![
            ("process", c.process_bytes, c.origin().to_string()),
            ("tokenizer while read", reading, format!("{per_entry} bytes × {vocab} entries")),
        ]
    }

    /// Hidden states, and either a chunk of logits or the gradients behind them, whichever is more.
    fn loss(&self) -> Vec<Named> {
        let (input, sizes, s) = (self.input, &self.sizes, self.input.shape);
        let (tokens, targets) = (sizes.tokens, sizes.targets);
        let (d, vocab) = (s.hidden_size, s.vocab_size);
        let mut terms = self.kept();
        if input.gradient_accumulation_steps > 1 {
            terms.push(self.gradients());
        }
        // The output of the blocks; of its trained positions themselves, normalised, and the gradient of that.
        let hidden = product(&[F32, d, tokens.saturating_add(targets.saturating_mul(3))]);
        terms.push((
            "hidden states of the loss",
            hidden,
            format!("({tokens} + 3 × {targets}) tokens × {d} × 4 bytes"),
        ));
        let (chunk, per_logit, formula) = match input.dtype {
            Dtype::F32 => (LOSS_CHUNK.min(targets), product(&[vocab, F32]), "4 bytes".to_string()),
            Dtype::Bf16 => {
                let groups = product(&[vocab.div_ceil(GROUP), 2 * F32]);
                (
                    (2 * LOSS_CHUNK).min(targets),
                    product(&[vocab, BF16]).saturating_add(groups),
                    "2.25 bytes".into(),
                )
            }
        };
        let logits = product(&[chunk, per_logit]);
        // Behind the head: the gradients of the trained positions, of the norm's input, and of all positions.
        let behind = product(&[F32, d, tokens.saturating_add(targets)]);
        if input.method != Method::Full && behind > logits {
            terms.push((
                "gradients of the loss",
                behind,
                format!("({tokens} + {targets}) tokens × {d} × 4 bytes"),
            ));
            return terms;
        }
        terms.push(("logits", logits, format!("{chunk} positions × {vocab} × {formula}")));
        if input.method == Method::Full {
            let bytes = product(&[vocab, d, F32]);
            terms.push(("gradient of the head", bytes, format!("{vocab} × {d} × 4 bytes")));
            if input.dtype == Dtype::Bf16 {
                let bytes = product(&[chunk, vocab, BF16]);
                terms.push(("transposed logits", bytes, format!("{chunk} positions × {vocab} × 2 bytes")));
            }
        }
        terms
    }

    /// Backward where most of it lives: at its begin, where all kept blocks still do, or at its end, where all
    /// gradients do.
    fn block(&self) -> Vec<Named> {
        let (input, sizes, s) = (self.input, &self.sizes, self.input.shape);
        let (d, f) = (s.hidden_size, s.intermediate_size);
        let of_a_block = || {
            let n = sizes.trained_of_a_block;
            ("gradients of a block", product(&[F32, n]), format!("4 bytes × {n}"))
        };
        let made_again = || {
            let bytes = product(&[sizes.tokens, sizes.saved]);
            ("block activations", bytes, format!("1 block × {} tokens × {} bytes", sizes.tokens, sizes.saved))
        };
        let mut begin = self.kept();
        if sizes.kept == 0 {
            begin.push(made_again());
        }
        begin.push(of_a_block());
        if input.gradient_accumulation_steps > 1 {
            begin.push(self.gradients());
        }
        let end = vec![made_again(), self.gradients()];
        let sum = |terms: &[Named]| terms.iter().fold(0u64, |sum, (_, bytes, _)| sum.saturating_add(*bytes));
        let mut terms = if sum(&end) > sum(&begin) { end } else { begin };
        // Down's: the gradient of the block's output and its rounded copy, the product behind the activation, made
        // again, and the gradients of gate and up. In f32 no copies.
        let passing = if computes_in_f32(input) { F32 * (d + 2 * f) } else { F32 * d + BF16 * (d + 3 * f) };
        // The transposed gradient of a projection's output.
        let passing = passing + if input.method == Method::Full { BF16 * 2 * f } else { 0 };
        let bytes = product(&[sizes.tokens, passing]);
        terms.push(("block gradients", bytes, format!("{} tokens × {passing} bytes", sizes.tokens)));
        terms
    }

    fn step(&self) -> Vec<Named> {
        vec![self.gradients()]
    }

    fn gradients(&self) -> Named {
        let (n, size) = (self.sizes.trained, bytes_of(self.input.gradient_dtype));
        ("gradients", product(&[size, n]), format!("{size} bytes × {n}"))
    }

    /// What backward will need of the blocks, and the table of angles.
    fn kept(&self) -> Vec<Named> {
        let Sizes { tokens, blocks, kept, saved, .. } = self.sizes;
        let (d, dim) = (self.input.shape.hidden_size, self.input.shape.head_dim);
        let again = blocks - kept;
        let size = bytes_of(self.input.block_input_dtype);
        let inputs = product(&[again, tokens, d, size]);
        vec![
            ("block inputs", inputs, format!("{again} blocks × {tokens} tokens × {d} × {size} bytes")),
            (
                "activations",
                product(&[kept, tokens, saved]),
                format!("{kept} blocks × {tokens} tokens × {saved} bytes"),
            ),
            ("rotary table", product(&[tokens, dim, F32]), format!("{tokens} tokens × {dim} × 4 bytes")),
        ]
    }
}

/// Both moments of all trained parameters, in memory and in a checkpoint, and the formula of one.
pub(crate) fn moments(input: &PlanInput) -> (u64, String) {
    let n = input.trained_parameters();
    if input.optimizer == Optimizer::Adamw {
        return (product(&[2 * F32, n]), format!("4 bytes × {n}"));
    }
    let (mut parameters, mut scales) = (0u64, 0u64);
    for (count, size) in matrices(input).into_iter().filter(|(_, size)| *size >= LEAST_8BIT) {
        parameters = parameters.saturating_add(product(&[count, size]));
        scales = scales.saturating_add(product(&[count, size.div_ceil(SCALED_MOMENTS)]));
    }
    // norms, biases and small matrices
    let floats = scales.saturating_add(n.saturating_sub(parameters));
    let one = product(&[F32, floats]).saturating_add(parameters);
    let formula = format!("(1 byte × {parameters} + 4 × ({scales} scales + {} others))", floats - scales);
    (product(&[2, one]), formula)
}

/// How many trained matrices of each size there are.
fn matrices(input: &PlanInput) -> Vec<(u64, u64)> {
    let s = &input.shape;
    let linears = s.block_linears();
    if input.method == Method::Full {
        let embeddings = (if s.tied { 1 } else { 2 }, product(&[s.vocab_size, s.hidden_size]));
        let linears = linears.map(|(_, d_out, d_in)| (s.num_hidden_layers, product(&[d_out, d_in])));
        return linears.into_iter().chain([embeddings]).collect();
    }
    let (layers, rank) = (s.adapted_layers(&input.layers), input.rank);
    let adapted = linears.into_iter().filter(|(name, ..)| input.target_modules.contains(name));
    adapted.flat_map(|(_, d_out, d_in)| [d_in, d_out].map(|d| (layers, product(&[rank, d])))).collect()
}

fn bytes_of(dtype: Dtype) -> u64 {
    match dtype {
        Dtype::F32 => F32,
        Dtype::Bf16 => BF16,
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
