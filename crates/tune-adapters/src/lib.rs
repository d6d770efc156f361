//! Low-rank updates beside frozen linear layers. Knows tensors, not models.

mod lora;
mod targets;

pub use lora::{Dropout, Lora, LoraConfig};
pub use targets::{LINEARS, TargetError, Targets};
