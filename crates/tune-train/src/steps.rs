//! Which micro-batches make up which optimizer step. Decided before the first step, from data and seed alone,
//! so that a resumed run continues the very same list.

use tune_data::{BatchPlan, Batcher, Sample};
use tune_recipe::Train;

use crate::TrainError;

/// Decades of training, and still a list that fits in memory.
const MOST_STEPS: usize = 10_000_000;

/// One optimizer step.
pub(crate) struct Step {
    /// Its micro-batches; their gradients are summed.
    pub micro_batches: Vec<BatchPlan>,
    /// Passes over the data completed with it.
    pub epoch: f64,
}

/// The most that any micro-batch of a run has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct LargestMicroBatch {
    /// Tokens.
    pub tokens: usize,
    /// Prediction targets.
    pub targets: usize,
}

/// What the largest micro-batches of a run over `batcher` have, and of the validation over `held_out`. Lengths are known
/// before the first step, and so is the order.
pub fn largest_micro_batch(
    batcher: &Batcher,
    held_out: &Batcher,
    train: &Train,
) -> Result<LargestMicroBatch, TrainError> {
    let mut largest = LargestMicroBatch::default();
    let mut note = |samples: &[Sample], plan: &BatchPlan| {
        let sum = |of: fn(&Sample) -> usize| plan.iter().map(|index| of(&samples[*index])).sum::<usize>();
        largest.tokens = largest.tokens.max(sum(Sample::len));
        largest.targets = largest.targets.max(sum(Sample::trained_tokens));
    };
    for step in steps(batcher, train)? {
        step.micro_batches.iter().for_each(|plan| note(batcher.samples(), plan));
    }
    held_out.epoch(0).iter().for_each(|plan| note(held_out.samples(), plan));
    Ok(largest)
}

/// All steps of a run: `max_steps` of them, or `num_epochs` passes. An epoch's last step may be smaller.
///
/// The step with the longest micro-batch comes first: a run that does not fit in memory fails at once instead of
/// hours later.
pub(crate) fn steps(batcher: &Batcher, train: &Train) -> Result<Vec<Step>, TrainError> {
    let in_an_epoch = batcher.epoch(0).len() as f64 / train.gradient_accumulation_steps.max(1) as f64;
    let asked = train.max_steps.map_or(train.num_epochs * in_an_epoch, |most| most as f64);
    if asked > MOST_STEPS as f64 {
        return Err(TrainError::TooManySteps { steps: asked, most: MOST_STEPS });
    }
    let mut steps = Vec::new();
    for epoch in 0u64.. {
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
            steps.push(Step { micro_batches: group.to_vec(), epoch: epoch as f64 + done as f64 / whole });
        }
        if train.max_steps.is_some_and(|most| steps.len() >= most) {
            break;
        }
    }
    steps.truncate(train.max_steps.unwrap_or(usize::MAX));
    longest_first(&mut steps, batcher.samples());
    Ok(steps)
}

fn longest_first(steps: &mut [Step], samples: &[Sample]) {
    let tokens = |plan: &BatchPlan| plan.iter().map(|index| samples[*index].len()).sum::<usize>();
    let longest = |step: &Step| step.micro_batches.iter().map(tokens).max().unwrap_or(0);
    // The first of the longest, so that a list that begins with one keeps its order.
    if let Some(at) = (0..steps.len()).rev().max_by_key(|at| longest(&steps[*at])).filter(|at| *at > 0) {
        let (before, after) = steps.split_at_mut(at);
        std::mem::swap(&mut before[0].micro_batches, &mut after[0].micro_batches);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tune_data::BatchOptions;

    fn batcher(lengths: &[usize]) -> Batcher {
        let samples = lengths.iter().map(|len| Sample::new(vec![1; *len], vec![true; *len])).collect();
        let options =
            BatchOptions { sequence_len: 64, micro_batch_size: 1, packing: false, shuffle: true, seed: 3 };
        Batcher::new(samples, options).expect("short samples")
    }

    fn train(num_epochs: f64, max_steps: Option<usize>, accumulation: usize) -> Train {
        Train { num_epochs, max_steps, gradient_accumulation_steps: accumulation, ..Train::default() }
    }

    #[test]
    fn epochs_end_with_a_smaller_step_and_may_be_fractions() {
        let data = batcher(&[8; 10]);
        let sizes = |epochs| {
            let steps = steps(&data, &train(epochs, None, 4)).expect("few");
            steps.iter().map(|step| step.micro_batches.len()).collect::<Vec<_>>()
        };
        assert_eq!(sizes(1.0), [4, 4, 2]);
        assert_eq!(sizes(1.5), [4, 4, 2, 4, 1]);
        let last = steps(&data, &train(1.5, None, 4)).expect("few").pop().expect("steps");
        assert!((last.epoch - 1.5).abs() < 1e-12);
    }

    #[test]
    fn max_steps_replaces_epochs_and_draws_each_epoch_anew() {
        let data = batcher(&[8; 6]);
        let steps = steps(&data, &train(0.1, Some(5), 3)).expect("few");
        assert_eq!(steps.len(), 5);
        let epoch = |at: usize| [&steps[at], &steps[at + 1]].map(|step| step.micro_batches.concat()).concat();
        let (mut first, mut second) = (epoch(0), epoch(2));
        assert_ne!(first, second, "the second epoch has the order of the first");
        first.sort_unstable();
        second.sort_unstable();
        assert_eq!(first, second);
    }

    #[test]
    fn the_longest_micro_batch_comes_first() {
        let lengths = [5, 9, 60, 7, 8, 6];
        let data = batcher(&lengths);
        let steps = steps(&data, &train(1.0, None, 2)).expect("few");
        assert!(steps[0].micro_batches.contains(&vec![2]));
        let mut all: Vec<usize> = steps.iter().flat_map(|step| step.micro_batches.concat()).collect();
        all.sort_unstable();
        assert_eq!(all, [0, 1, 2, 3, 4, 5]);
    }

    #[test]
    fn no_rows_give_no_steps() {
        assert!(steps(&batcher(&[]), &train(3.0, None, 2)).expect("none").is_empty());
    }

    #[test]
    fn absurdly_many_steps_are_refused_before_they_fill_memory() {
        for absurd in [train(1e15, None, 1), train(1.0, Some(1_000_000_000_000), 1)] {
            let refused = steps(&batcher(&[8, 8]), &absurd);
            assert!(matches!(refused, Err(TrainError::TooManySteps { .. })));
        }
    }
}
