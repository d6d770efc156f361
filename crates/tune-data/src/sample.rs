//! One sequence of tokens and which of them the model learns to predict.

/// A tokenised document.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Sample {
    /// Token ids.
    pub input_ids: Vec<u32>,
    /// `trained[i]`: token `i` is a prediction target. As long as `input_ids`; the first is always `false`,
    /// because nothing comes before it to predict it from.
    pub trained: Vec<bool>,
}

impl Sample {
    /// A sample with this mask, whose first token is never a target.
    ///
    /// The mask is cut or filled with `false` to the length of the ids.
    pub fn new(input_ids: Vec<u32>, mut trained: Vec<bool>) -> Self {
        trained.resize(input_ids.len(), false);
        if let Some(first) = trained.first_mut() {
            *first = false;
        }
        Self { input_ids, trained }
    }

    /// Length in tokens.
    pub fn len(&self) -> usize {
        self.input_ids.len()
    }

    /// There are no tokens.
    pub fn is_empty(&self) -> bool {
        self.input_ids.is_empty()
    }

    /// Number of prediction targets.
    pub fn trained_tokens(&self) -> usize {
        self.trained.iter().filter(|trained| **trained).count()
    }

    /// The first `len` tokens.
    pub(crate) fn truncate(&mut self, len: usize) {
        self.input_ids.truncate(len);
        self.trained.truncate(len);
    }

    /// Pieces of at most `len` tokens. Each begins with the last token of the one before as context, so that no
    /// target is lost; pieces without a target are left out.
    pub(crate) fn split(self, len: usize) -> Vec<Self> {
        if self.len() <= len || len < 2 {
            return vec![self];
        }
        let starts = (0..self.len() - 1).step_by(len - 1);
        let pieces = starts.map(|start| {
            let end = (start + len).min(self.len());
            Self::new(self.input_ids[start..end].to_vec(), self.trained[start..end].to_vec())
        });
        pieces.filter(|piece| piece.trained.contains(&true)).collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn splitting_keeps_every_target_once(mask in proptest::collection::vec(any::<bool>(), 0..200), len in 2usize..40) {
            let sample = Sample::new((0..mask.len() as u32).collect(), mask);
            let targets = |sample: &Sample| -> Vec<(u32, u32)> {
                (1..sample.len())
                    .filter(|&i| sample.trained[i])
                    .map(|i| (sample.input_ids[i - 1], sample.input_ids[i]))
                    .collect()
            };
            let pieces = sample.clone().split(len);
            prop_assert!(pieces.iter().all(|piece| piece.len() <= len));
            prop_assert_eq!(pieces.iter().flat_map(targets).collect::<Vec<_>>(), targets(&sample));
        }
    }
}
