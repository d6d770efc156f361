//! Constants that cannot be counted, only measured. All of them stand here.
//!
//! `tune bench memory` measures them on a machine: it trains small models of 2 and of 4 blocks and of two vocabularies,
//! each in a process of its own. The peak is linear in both, so what is left beside the counted terms gives the
//! constants. Until then those shipped here serve.

use serde::{Deserialize, Serialize};

/// Measured constants of one backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Calibration {
    /// Threads that compute.
    pub threads: u64,
    /// The program itself: pages of its code and libraries, stacks, small blocks of the heap.
    pub process_bytes: u64,
    /// Tokenizer and its index, per token of the vocabulary.
    pub bytes_per_vocabulary_entry: u64,
    /// The same while it is read from a GGUF file.
    pub bytes_per_entry_of_gguf: u64,
    /// The same while it is read from a `tokenizer.json`.
    pub bytes_per_entry_of_json: u64,
    /// Of weights that a task of a product packs at once: more where the processor multiplies tiles of `bf16`.
    pub packed_bytes: u64,
    /// Of factors that a thread widens to `f32`, where the processor does not multiply `bf16`.
    pub widened_bytes: u64,
    /// Half-width of the range around what is not exact, in thousandths of it.
    pub margin_permille: u64,
    /// Measured on this machine, not shipped.
    #[serde(default)]
    pub measured_here: bool,
}

/// burn's pure-Rust CPU backend, measured on two cores; see docs/memory-measured.md.
pub const FLEX: Calibration = Calibration {
    threads: 2,
    process_bytes: 17 << 20,
    bytes_per_vocabulary_entry: 230,
    bytes_per_entry_of_gguf: 400,
    bytes_per_entry_of_json: 1300,
    packed_bytes: 384 << 10,
    widened_bytes: 0,
    margin_permille: 50,
    measured_here: false,
};

impl Calibration {
    /// Where the constants come from, for people.
    pub fn origin(&self) -> &'static str {
        if self.measured_here { "measured on this machine" } else { "shipped constant" }
    }
}
