//! Constants that cannot be counted, only measured. All of them stand here.
//!
//! A calibration run: train one step of a model with 2 and with 4 blocks at the same width, tokens and
//! vocabulary, and read the peak of resident memory of each. It is linear in the number of blocks, so the two give
//! the slope (checked against the counted terms) and the constant; two vocabularies give the bytes per logit.

/// Measured constants of one backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Calibration {
    /// The process before the first tensor: code, thread stacks, tokenizer tables outside of the vocabulary.
    pub process_bytes: u64,
    /// Tokenizer and its index, per token of the vocabulary.
    pub bytes_per_vocabulary_entry: u64,
    /// Positions whose logits exist at the same time in `f32`; in `bf16` twice as many.
    pub loss_chunk: u64,
    /// Eighths of a byte per logit of a chunk in `f32`: logits, and their gradient in place.
    pub eighths_of_bytes_per_logit_f32: u64,
    /// The same in `bf16`, with a maximum and a sum for each 32 logits.
    pub eighths_of_bytes_per_logit_bf16: u64,
    /// Scratch into which rows of frozen weights are decoded.
    pub panel_bytes: u64,
    /// Unused room in the allocator, in thousandths of what is allocated.
    pub fragmentation_permille: u64,
    /// Half-width of the range around the estimate, in thousandths of what is not exact.
    pub margin_permille: u64,
}

/// burn's pure-Rust CPU backend. Process and vocabulary: `tune data` on SmolLM2 (49152 tokens) peaks at 49 MiB. The others
/// are bounds from reading our operations; `docs/LOG.md` compares whole runs with the estimate.
pub const FLEX: Calibration = Calibration {
    process_bytes: 24 << 20,
    bytes_per_vocabulary_entry: 512,
    loss_chunk: 128,
    eighths_of_bytes_per_logit_f32: 64,
    eighths_of_bytes_per_logit_bf16: 18,
    panel_bytes: 4 << 20,
    fragmentation_permille: 50,
    margin_permille: 100,
};
