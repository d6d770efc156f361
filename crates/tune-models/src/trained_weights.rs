//! The weights of a model that is trained in full, for whoever reads weights by name.

use std::collections::BTreeMap;

use tune_formats::{FormatError, Weights};
use tune_kernels::{FrozenVector, FrozenWeight};
use tune_quant::StoredMatrix;

/// Trained weights by Hugging Face name, as they were when this was made: matrices share the memory of the model.
pub struct TrainedWeights {
    matrices: BTreeMap<String, FrozenWeight>,
    vectors: BTreeMap<String, FrozenVector>,
}

impl TrainedWeights {
    pub(crate) fn new(
        matrices: BTreeMap<String, FrozenWeight>,
        vectors: BTreeMap<String, FrozenVector>,
    ) -> Self {
        Self { matrices, vectors }
    }
}

impl Weights for TrainedWeights {
    fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = self.matrices.keys().chain(self.vectors.keys()).cloned().collect();
        names.sort();
        names
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        let matrix = self.matrices.get(name).map(|matrix| vec![matrix.rows(), matrix.cols()]);
        matrix.or_else(|| Some(vec![self.vectors.get(name)?.len()]))
    }

    fn matrix(&self, name: &str) -> Result<StoredMatrix, FormatError> {
        let matrix = self.matrices.get(name).ok_or_else(|| missing(name))?;
        Ok(StoredMatrix::clone(matrix.matrix()))
    }

    fn vector(&self, name: &str) -> Result<Vec<f32>, FormatError> {
        self.vectors.get(name).map(|values| values.to_vec()).ok_or_else(|| missing(name))
    }
}

fn missing(name: &str) -> FormatError {
    FormatError::Tensor { name: name.to_owned(), reason: "is not a parameter of this model".to_owned() }
}
