//! Which micro-batches make up which optimizer step. Decided before the first step, from data and seed alone,
//! so that a resumed run continues the very same list.

use tune_data::{Batcher, MicroBatchPlan};
use tune_recipe::Train;

/// One optimizer step.
pub struct Step {
    /// Its micro-batches; their gradients are summed.
    pub micro_batches: Vec<MicroBatchPlan>,
    /// Passes over the data completed with it.
    pub epoch: f64,
}

/// All steps of a run: `max_steps` of them, or `num_epochs` passes. An epoch's last step may be smaller.
///
/// The step with the longest micro-batch comes first: a run that does not fit in memory fails at once instead of
/// hours later.
pub fn steps(batcher: &Batcher, train: &Train) -> Vec<Step> {
    let mut steps = Vec::new();
    for epoch in 0.. {
        let micro_batches = batcher.epoch(epoch);
        let left = if train.max_steps.is_some() { 1.0 } else { (train.num_epochs - epoch as f64).min(1.0) };
        if left <= 0.0 || micro_batches.is_empty() {
            break;
        }
        let count = (left * micro_batches.len() as f64).ceil() as usize;
        let whole = micro_batches.len() as f64;
        let mut done = 0;
        for group in micro_batches[..count].chunks(train.gradient_accumulation_steps.max(1)) {
            done += group.len();
            steps.push(Step {
                micro_batches: group.to_vec(),
                epoch: epoch as f64 + done as f64 / whole,
            });
        }
        if train.max_steps.is_some_and(|most| steps.len() >= most) {
            break;
        }
    }
    steps.truncate(train.max_steps.unwrap_or(usize::MAX));
    longest_first(&mut steps);
    steps
}

fn longest_first(steps: &mut [Step]) {
    let longest = |step: &Step| step.micro_batches.iter().map(MicroBatchPlan::tokens).max().unwrap_or(0);
    let at = (0..steps.len()).rev().max_by_key(|i| longest(&steps[*i]));
    if let Some(at) = at.filter(|at| *at > 0) {
        let (first, rest) = steps.split_at_mut(at);
        std::mem::swap(&mut first[0].micro_batches, &mut rest[0].micro_batches);
    }
}
