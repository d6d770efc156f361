//! Generation, sampling, loss and perplexity.

mod generate;
mod perplexity;
mod sampler;

pub use generate::{Generation, StopReason, generate};
pub use perplexity::{Evaluation, evaluate};
pub use sampler::{Sampler, SamplerConfig};
