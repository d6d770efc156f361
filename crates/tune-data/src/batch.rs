//! Samples → micro-batches without padding, in an order drawn from the seed.
//!
//! All documents of a micro-batch stand one after the other on one token axis; attention stays inside each, and
//! positions restart in each. Packing therefore changes how many tokens a micro-batch holds, never what is
//! computed for a token.

use std::ops::Range;

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

use crate::pack::pack;
use crate::{DataError, Sample};

/// The target of a token without loss.
pub const IGNORED: i32 = -100;

/// Documents that go through the model at once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MicroBatch {
    /// Token ids of all documents, one after the other. `[tokens]`
    pub input_ids: Vec<u32>,
    /// `targets[t]`: id of the token after `t` in the same document where that is trained, else [`IGNORED`].
    /// `[tokens]`
    pub targets: Vec<i32>,
    /// Tokens of each document, in order and without gaps.
    pub documents: Vec<Range<usize>>,
}

/// How samples are put together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchOptions {
    /// Longest row, in tokens.
    pub sequence_len: usize,
    /// Rows per micro-batch.
    pub micro_batch_size: usize,
    /// A row holds as many samples as fit; otherwise one.
    pub packing: bool,
    /// Draw a new order each epoch; otherwise the order is that of the samples.
    pub shuffle: bool,
    /// Seed of the order.
    pub seed: u64,
}

/// Puts samples together into micro-batches.
#[derive(Clone, Debug)]
pub struct Batcher {
    samples: Vec<Sample>,
    options: BatchOptions,
}

/// The samples of one micro-batch, by position.
pub type BatchPlan = Vec<usize>;

impl MicroBatch {
    /// Samples one after the other.
    pub fn of<'a>(samples: impl IntoIterator<Item = &'a Sample>) -> Self {
        let mut batch = Self { input_ids: Vec::new(), targets: Vec::new(), documents: Vec::new() };
        for sample in samples {
            let start = batch.input_ids.len();
            batch.input_ids.extend_from_slice(&sample.input_ids);
            let next = sample.input_ids.iter().zip(&sample.trained).skip(1);
            batch.targets.extend(next.map(|(id, trained)| if *trained { *id as i32 } else { IGNORED }));
            if !sample.is_empty() {
                batch.targets.push(IGNORED);
                batch.documents.push(start..batch.input_ids.len());
            }
        }
        batch
    }

    /// Number of tokens.
    pub fn len(&self) -> usize {
        self.input_ids.len()
    }

    /// There are no tokens.
    pub fn is_empty(&self) -> bool {
        self.input_ids.is_empty()
    }

    /// Number of prediction targets.
    pub fn trained_tokens(&self) -> usize {
        self.targets.iter().filter(|target| **target != IGNORED).count()
    }
}

impl Batcher {
    /// A batcher over `samples`.
    ///
    /// # Errors
    /// A sample longer than `sequence_len`.
    pub fn new(samples: Vec<Sample>, options: BatchOptions) -> Result<Self, DataError> {
        let sequence_len = options.sequence_len;
        if let Some(index) = samples.iter().position(|sample| sample.len() > sequence_len) {
            return Err(DataError::SampleTooLong { index, len: samples[index].len(), sequence_len });
        }
        Ok(Self { samples, options })
    }

    /// The same samples with another number of rows per micro-batch.
    pub fn set_micro_batch_size(&mut self, micro_batch_size: usize) {
        self.options.micro_batch_size = micro_batch_size;
    }

    /// The samples.
    pub fn samples(&self) -> &[Sample] {
        &self.samples
    }

    /// The micro-batches of an epoch, every sample in exactly one of them. The same seed and epoch give the same
    /// plan.
    pub fn epoch(&self, epoch: u64) -> Vec<BatchPlan> {
        let mut order: Vec<usize> = (0..self.samples.len()).collect();
        let mut random = ChaCha8Rng::seed_from_u64(self.options.seed);
        // an own stream per epoch: any epoch can be drawn without those before it
        random.set_stream(epoch);
        if self.options.shuffle {
            order.shuffle(&mut random);
        }
        let rows = self.rows(&order, self.options.shuffle.then_some(&mut random));
        rows.chunks(self.options.micro_batch_size.max(1)).map(<[_]>::concat).collect()
    }

    /// The tokens of a micro-batch.
    pub fn micro_batch(&self, plan: &[usize]) -> MicroBatch {
        MicroBatch::of(plan.iter().filter_map(|index| self.samples.get(*index)))
    }

    /// The largest micro-batch that can be put together, longest documents first: what fits, fits for the rest of
    /// the run.
    pub fn longest(&self) -> MicroBatch {
        let mut order: Vec<usize> = (0..self.samples.len()).collect();
        order.sort_by_key(|&index| (std::cmp::Reverse(self.samples[index].len()), index));
        let mut rows = self.rows(&order, None);
        rows.sort_by_key(|row| std::cmp::Reverse(row.iter().map(|&i| self.samples[i].len()).sum::<usize>()));
        rows.truncate(self.options.micro_batch_size.max(1));
        self.micro_batch(&rows.concat())
    }

    /// Upper bound on the tokens of any micro-batch.
    pub fn max_tokens(&self) -> usize {
        let longest = self.samples.iter().map(Sample::len).max().unwrap_or(0);
        let total: usize = self.samples.iter().map(Sample::len).sum();
        let row = if self.options.packing { self.options.sequence_len } else { longest };
        total.min(row * self.options.micro_batch_size.max(1))
    }

    fn rows(&self, order: &[usize], random: Option<&mut ChaCha8Rng>) -> Vec<Vec<usize>> {
        if !self.options.packing {
            return order.iter().map(|index| vec![*index]).collect();
        }
        let mut rows = pack(order, |index| self.samples[index].len(), self.options.sequence_len);
        if let Some(random) = random {
            // packing puts the fullest rows first; their order must not follow their lengths
            rows.shuffle(random);
        }
        rows
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn options(packing: bool) -> BatchOptions {
        BatchOptions { sequence_len: 32, micro_batch_size: 2, packing, shuffle: true, seed: 7 }
    }

    /// Samples with ids that are unique in the whole set.
    fn samples(masks: &[Vec<bool>]) -> Vec<Sample> {
        let mut next = 0;
        let sample = |mask: &Vec<bool>| {
            let ids: Vec<u32> = (next..next + mask.len() as u32).collect();
            next += mask.len() as u32;
            Sample::new(ids, mask.clone())
        };
        masks.iter().map(sample).collect()
    }

    fn masks() -> impl Strategy<Value = Vec<Vec<bool>>> {
        proptest::collection::vec(proptest::collection::vec(any::<bool>(), 1..=32), 0..60)
    }

    proptest! {
        #[test]
        fn no_token_is_lost_or_doubled(masks in masks(), packing: bool, size in 1usize..4, shuffle: bool, seed: u64, epoch in 0u64..3) {
            let samples = samples(&masks);
            let options = BatchOptions { sequence_len: 32, micro_batch_size: size, packing, shuffle, seed };
            let batcher = Batcher::new(samples.clone(), options).unwrap();
            let plans = batcher.epoch(epoch);
            let batches: Vec<_> = plans.iter().map(|plan| batcher.micro_batch(plan)).collect();

            let mut ids: Vec<_> = batches.iter().flat_map(|batch| batch.input_ids.clone()).collect();
            ids.sort_unstable();
            let total: usize = samples.iter().map(Sample::len).sum();
            prop_assert_eq!(ids, (0..total as u32).collect::<Vec<_>>());

            let mut targets: Vec<_> = batches.iter().flat_map(|batch| batch.targets.clone()).filter(|t| *t != IGNORED).collect();
            targets.sort_unstable();
            let expected: Vec<_> = samples.iter()
                .flat_map(|sample| sample.input_ids.iter().zip(&sample.trained))
                .filter(|(_, trained)| **trained).map(|(id, _)| *id as i32).collect();
            prop_assert_eq!(targets, expected);

            for batch in &batches {
                prop_assert!(batch.len() <= batcher.max_tokens());
                prop_assert_eq!(batch.targets.len(), batch.len());
                if !packing { prop_assert!(batch.documents.len() <= size); }
                let mut end = 0;
                for document in &batch.documents {
                    prop_assert_eq!(document.start, end);
                    end = document.end;
                    prop_assert_eq!(batch.targets[end - 1], IGNORED);
                }
                prop_assert_eq!(end, batch.len());
            }
            prop_assert_eq!(&batcher.epoch(epoch), &plans);
        }
    }

    #[test]
    fn packing_changes_neither_documents_nor_targets() {
        let masks: Vec<Vec<bool>> = (1..=20).map(|len| (0..len).map(|i| i % 3 != 0).collect()).collect();
        let documents = |packing| {
            let batcher = Batcher::new(samples(&masks), options(packing)).unwrap();
            let mut documents: Vec<_> = batcher
                .epoch(3)
                .iter()
                .map(|plan| batcher.micro_batch(plan))
                .flat_map(|batch| {
                    let cut = |range: &Range<usize>| {
                        (batch.input_ids[range.clone()].to_vec(), batch.targets[range.clone()].to_vec())
                    };
                    batch.documents.iter().map(cut).collect::<Vec<_>>()
                })
                .collect();
            documents.sort();
            documents
        };
        assert_eq!(documents(true), documents(false));
    }

    #[test]
    fn epochs_differ_and_repeat() {
        let masks = vec![vec![true; 10]; 30];
        let batcher = Batcher::new(samples(&masks), options(false)).unwrap();
        assert_ne!(batcher.epoch(0), batcher.epoch(1));
        let again = Batcher::new(samples(&masks), options(false)).unwrap();
        assert_eq!(batcher.epoch(1), again.epoch(1));
        let other = Batcher::new(samples(&masks), BatchOptions { seed: 8, ..options(false) }).unwrap();
        assert_ne!(batcher.epoch(0), other.epoch(0));
        let ordered =
            Batcher::new(samples(&masks), BatchOptions { shuffle: false, ..options(false) }).unwrap();
        assert_eq!(ordered.epoch(5).concat(), (0..30).collect::<Vec<_>>());
    }

    #[test]
    fn targets_are_the_next_trained_token() {
        let sample = Sample::new(vec![5, 6, 7, 8], vec![true, false, true, true]);
        let batch = MicroBatch::of([&sample, &Sample::new(vec![9], vec![true]), &sample]);
        assert_eq!(batch.input_ids, [5, 6, 7, 8, 9, 5, 6, 7, 8]);
        assert_eq!(batch.targets, [-100, 7, 8, -100, -100, -100, 7, 8, -100]);
        assert_eq!(batch.documents, [0..4, 4..5, 5..9]);
        assert_eq!(batch.trained_tokens(), 4);
    }

    #[test]
    fn the_longest_batch_is_an_upper_bound_without_packing() {
        let masks: Vec<Vec<bool>> = [3, 30, 4, 31, 5].map(|len| vec![true; len]).to_vec();
        let batcher = Batcher::new(samples(&masks), options(false)).unwrap();
        assert_eq!(batcher.longest().len(), 61);
        let batcher = Batcher::new(samples(&masks), options(true)).unwrap();
        assert_eq!(batcher.longest().documents.len(), 2);
        assert!(batcher.longest().len() <= batcher.max_tokens());
    }

    #[test]
    fn a_sample_that_does_not_fit_is_refused() {
        let error = Batcher::new(samples(&[vec![true; 33]]), options(true)).unwrap_err();
        assert_eq!(error.to_string(), "sample 0 has 33 tokens, expected at most sequence_len = 32");
    }
}
