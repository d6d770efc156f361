//! Loss and perplexity over the trained tokens of some documents.
//!
//! ```text
//! loss = − Σ log p(target) / N          perplexity = e^loss
//! ```

use burn::tensor::{Int, Tensor};
use tune_data::MicroBatch;
use tune_kernels::token_losses;
use tune_models::{Layout, Llama};

/// Sum of the losses of `tokens` targets. Evaluations of parts add up to that of the whole.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Evaluation {
    /// Σ −log p(target), in nats.
    pub loss_sum: f64,
    /// Number of targets N.
    pub tokens: usize,
}

impl Evaluation {
    /// Mean loss, in nats per token; `NaN` without tokens.
    pub fn loss(&self) -> f64 {
        self.loss_sum / self.tokens as f64
    }

    /// e^loss.
    pub fn perplexity(&self) -> f64 {
        self.loss().exp()
    }
}

impl std::ops::AddAssign for Evaluation {
    fn add_assign(&mut self, other: Self) {
        self.loss_sum += other.loss_sum;
        self.tokens += other.tokens;
    }
}

/// Evaluates `model` on one micro-batch, without dropout and without a graph.
pub fn evaluate(model: &Llama, batch: &MicroBatch) -> Evaluation {
    let trained = batch.targets.iter().enumerate().filter(|(_, target)| **target >= 0);
    let (positions, targets): (Vec<i32>, Vec<u32>) = trained.map(|(i, t)| (i as i32, *t as u32)).unzip();
    if targets.is_empty() {
        return Evaluation::default();
    }
    let hidden = model.hidden(&batch.input_ids, &Layout::documents(&batch.documents));
    let positions = Tensor::<1, Int>::from_data(positions.as_slice(), model.device());
    let losses = token_losses(hidden.select(0, positions), &model.head(), &targets, model.arithmetic());
    Evaluation { loss_sum: losses.iter().map(|loss| f64::from(*loss)).sum(), tokens: losses.len() }
}
