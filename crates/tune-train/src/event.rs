//! What a run tells its caller while it goes on. The caller draws; the run prints nothing.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// One thing that happened.
#[derive(Clone, Debug)]
pub enum Event {
    /// Adapters are in place and the steps are known.
    Started {
        /// Optimizer steps of the whole run.
        total_steps: usize,
        /// Steps already taken when the run was resumed.
        resumed_from: usize,
        /// Parameters that are trained.
        trainable_parameters: usize,
        /// Parameters of the base.
        base_parameters: u64,
    },
    /// A part of a step is done: after each block, forward and backward. A step of a large model takes minutes.
    Progress {
        /// The optimizer step that is being made.
        step: usize,
        /// How much of it, from 0 to 1.
        share: f64,
    },
    /// An optimizer step was taken. Its line is in `metrics.jsonl`.
    Step(StepMetrics),
    /// A checkpoint is safely on disk.
    Saved {
        /// Its folder.
        path: PathBuf,
    },
    /// More memory is resident than the run may use. Told once.
    OverBudget {
        /// Peak of resident memory.
        peak_bytes: u64,
        /// What the run may use.
        budget_bytes: u64,
    },
    /// Validation has not improved for as long as the recipe allows.
    StoppedEarly {
        /// The last step.
        step: usize,
    },
}

/// One line of `metrics.jsonl`: an optimizer step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepMetrics {
    /// Optimizer steps taken, this one included.
    pub step: usize,
    /// Passes over the training rows completed with this step.
    pub epoch: f64,
    /// Mean loss over the trained tokens of this step, in nats.
    pub loss: f64,
    /// Learning rate of this step.
    pub learning_rate: f64,
    /// L2 norm of all adapter gradients before clipping.
    pub grad_norm: f64,
    /// Tokens that went through the model in this step.
    pub tokens: usize,
    /// Tokens that were prediction targets in this step.
    pub trained_tokens: usize,
    /// Speed of this step.
    pub tokens_per_second: f64,
    /// Peak resident memory so far; absent where the system does not tell.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peak_memory_bytes: Option<u64>,
    /// Seconds of training so far, interruptions not counted.
    pub elapsed_s: f64,
    /// Mean loss over the trained tokens of the validation rows, where it was measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub val_loss: Option<f64>,
    /// The same before the first step, in the line of that step.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub val_loss_before: Option<f64>,
}
