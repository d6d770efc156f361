//! How far two models agree on the tokens that come next.
//!
//! ```text
//! KL(p ‖ q) = Σⱼ p[j] (log p[j] − log q[j])      at one position, in nats
//! top-1     = share of positions with the same most likely token
//! retention = (PPL_base − PPL_export) / (PPL_base − PPL_trained)
//! ```
//!
//! p of the reference, q of the other model; positions are those whose next token is a target of the data, so that
//! prompts do not dilute what was trained. Logits `[positions, vocab]` exist for a few positions at a time.

use burn::tensor::{Int, Tensor};
use rayon::prelude::*;
use tune_data::MicroBatch;
use tune_models::{Layout, Llama};

use crate::Evaluation;

/// Positions whose logits exist at once.
const CHUNK: usize = 32;

/// Sums over the compared positions. Those of parts add up to those of the whole.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Agreement {
    /// Σ KL(reference ‖ other), in nats.
    pub kl_sum: f64,
    /// Positions with the same most likely token.
    pub same_top1: usize,
    /// Loss of the reference.
    pub reference: Evaluation,
    /// Loss of the other model.
    pub other: Evaluation,
}

impl Agreement {
    /// Positions compared.
    pub fn tokens(&self) -> usize {
        self.reference.tokens
    }

    /// Mean KL, in nats; `NaN` without positions.
    pub fn mean_kl(&self) -> f64 {
        self.kl_sum / self.tokens() as f64
    }

    /// Share of positions with the same most likely token.
    pub fn top1(&self) -> f64 {
        self.same_top1 as f64 / self.tokens() as f64
    }

    /// The part of the fine-tune that the other model has, where the reference is the trained model: 1 for all of it, 0
    /// for the base. `None` where training has not lowered the perplexity, and there is nothing to keep.
    pub fn retention(&self, base: &Evaluation) -> Option<f64> {
        let gain = base.perplexity() - self.reference.perplexity();
        (gain > 0.0).then(|| (base.perplexity() - self.other.perplexity()) / gain)
    }
}

impl std::ops::AddAssign for Agreement {
    fn add_assign(&mut self, other: Self) {
        self.kl_sum += other.kl_sum;
        self.same_top1 += other.same_top1;
        self.reference += other.reference;
        self.other += other.other;
    }
}

/// Compares `other` with `reference` on the targets of one micro-batch.
///
/// # Panics
/// When the vocabularies differ.
pub fn compare(reference: &Llama, other: &Llama, batch: &MicroBatch) -> Agreement {
    let (positions, targets) = targets(batch);
    let hidden = [reference, other].map(|model| hidden_at(model, batch, &positions));
    let mut agreement = Agreement::default();
    for start in (0..positions.len()).step_by(CHUNK) {
        let rows = start..(start + CHUNK).min(positions.len());
        let [p, q] = [0, 1].map(|i| logits([reference, other][i], &hidden[i], rows.clone()));
        let vocab = p.len() / rows.len();
        assert_eq!(p.len(), q.len(), "two models with the same vocabulary");
        let of_rows: Vec<Agreement> = p
            .par_chunks_exact(vocab)
            .zip(q.par_chunks_exact(vocab))
            .zip(&targets[rows])
            .map(|((p, q), target)| of_logits(p, q, *target as usize))
            .collect();
        for row in of_rows {
            agreement += row;
        }
    }
    agreement
}

/// The `n` most likely next tokens at each target of a micro-batch, with their log-probabilities, falling.
pub fn top_logprobs(model: &Llama, batch: &MicroBatch, n: usize) -> Vec<Vec<(u32, f64)>> {
    let (positions, _) = targets(batch);
    let hidden = hidden_at(model, batch, &positions);
    let mut all = Vec::with_capacity(positions.len());
    for start in (0..positions.len()).step_by(CHUNK) {
        let rows = start..(start + CHUNK).min(positions.len());
        let logits = logits(model, &hidden, rows.clone());
        let vocab = logits.len() / rows.len();
        all.par_extend(logits.par_chunks_exact(vocab).map(|logits| {
            let log_sum = log_sum(logits);
            let mut ids: Vec<u32> = (0..vocab as u32).collect();
            let falling =
                |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
            if n < vocab {
                ids.select_nth_unstable_by(n, falling);
                ids.truncate(n);
            }
            ids.sort_unstable_by(falling);
            ids.into_iter().map(|id| (id, f64::from(logits[id as usize]) - log_sum)).collect()
        }));
    }
    all
}

/// Positions with a target, and the targets.
fn targets(batch: &MicroBatch) -> (Vec<i32>, Vec<u32>) {
    let trained = batch.targets.iter().enumerate().filter(|(_, target)| **target >= 0);
    trained.map(|(i, target)| (i as i32, *target as u32)).unzip()
}

/// `[positions, d_model]` behind the final norm.
fn hidden_at(model: &Llama, batch: &MicroBatch, positions: &[i32]) -> Tensor<2> {
    let hidden = model.hidden(&batch.input_ids, &Layout::documents(&batch.documents));
    hidden.select(0, Tensor::<1, Int>::from_data(positions, model.device()))
}

fn logits(model: &Llama, hidden: &Tensor<2>, rows: std::ops::Range<usize>) -> Vec<f32> {
    let [_, d_model] = hidden.dims();
    model.logits(hidden.clone().slice([rows, 0..d_model])).into_data().iter::<f32>().collect()
}

fn of_logits(p: &[f32], q: &[f32], target: usize) -> Agreement {
    let (log_sum_p, log_sum_q) = (log_sum(p), log_sum(q));
    let kl = p.iter().zip(q).map(|(p, q)| {
        let log_p = f64::from(*p) - log_sum_p;
        log_p.exp() * (log_p - (f64::from(*q) - log_sum_q))
    });
    let loss =
        |logits: &[f32], log_sum| Evaluation { loss_sum: log_sum - f64::from(logits[target]), tokens: 1 };
    Agreement {
        kl_sum: kl.sum(),
        same_top1: usize::from(largest(p) == largest(q)),
        reference: loss(p, log_sum_p),
        other: loss(q, log_sum_q),
    }
}

/// log Σ exp, of terms whose largest is 1.
fn log_sum(logits: &[f32]) -> f64 {
    let maximum = logits.iter().fold(f32::NEG_INFINITY, |max, v| max.max(*v));
    let sum: f64 = logits.iter().map(|v| f64::from(v - maximum).exp()).sum();
    f64::from(maximum) + sum.ln()
}

fn largest(logits: &[f32]) -> usize {
    (1..logits.len()).fold(0, |best, i| if logits[i] > logits[best] { i } else { best })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_agrees_with_itself_and_kl_is_that_of_its_definition() {
        let p = [1.0, 3.0, -2.0, 0.5];
        let same = of_logits(&p, &p.map(|v| v + 7.0), 1);
        assert!(same.kl_sum.abs() < 1e-6 && same.same_top1 == 1, "{same:?}");
        assert!((same.reference.loss() - same.other.loss()).abs() < 1e-6);

        let (half, quarter) = ([2_f32.ln(), 0.0, 0.0], [0.0, 2_f32.ln(), 0.0]);
        let moved = of_logits(&half, &quarter, 0);
        // ½ log 2 + ¼ log ½ + 0
        assert!((moved.kl_sum - 0.25 * 2_f64.ln()).abs() < 1e-6, "{moved:?}");
        assert_eq!(moved.same_top1, 0);
        assert!((moved.reference.loss() - 2_f64.ln()).abs() < 1e-6);
        assert!((moved.other.loss() - 4_f64.ln()).abs() < 1e-6);
    }

    #[test]
    fn retention_is_one_for_the_trained_model_and_zero_for_the_base() {
        let of = |perplexity: f64| Evaluation { loss_sum: perplexity.ln(), tokens: 1 };
        let base = of(20.0);
        let against =
            |other| Agreement { reference: of(4.0), other, ..Agreement::default() }.retention(&base);
        for (other, wanted) in [(of(4.0), 1.0), (base, 0.0), (of(12.0), 0.5)] {
            assert!((against(other).expect("training has helped") - wanted).abs() < 1e-9);
        }
        let useless = Agreement { reference: of(30.0), ..Agreement::default() };
        assert_eq!(useless.retention(&base), None);
    }
}
