//! Generation, sampling, loss and perplexity; how far two models agree, and what their layers are fed.

mod agreement;
mod generate;
mod input_moments;
mod perplexity;
mod sampler;

pub use agreement::{Agreement, compare, top_logprobs};
pub use generate::{Generation, StopReason, generate};
pub use input_moments::{BlockMoments, Moments};
pub use perplexity::{Evaluation, evaluate};
pub use sampler::{Sampler, SamplerConfig};
