//! Supervised fine-tuning. [`sft`] is the run, read top to bottom; the other files are what it is made of.

mod adapter;
pub mod checkpoint;
mod error;
mod event;
mod gradients;
mod optim;
mod run_folder;
mod schedule;
mod sft;
mod steps;

pub use adapter::parameters;
pub use error::TrainError;
pub use event::{Event, StepMetrics};
pub use gradients::{GradientSum, Pass, loss_and_gradients};
pub use optim::{AdamW, AdamWConfig, Moments, clip_grad_norm};
pub use run_folder::RunFolder;
pub use schedule::Schedule;
pub use sft::{Finish, MemoryLimit, Outcome, Setup, arithmetic, quantization, sft};
pub use steps::{LargestMicroBatch, largest_micro_batch};
