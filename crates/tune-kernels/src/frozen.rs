//! Parameters that are never trained: shared, in their stored form, outside every autodiff graph.

use std::fmt;
use std::ops::Deref;
use std::sync::Arc;

use burn::tensor::{Device, Tensor, TensorData};
use tune_quant::StoredMatrix;

/// A frozen matrix `[d_out, d_in]` in the form in which it is stored. Cloning shares it.
#[derive(Clone)]
pub struct FrozenWeight(Arc<StoredMatrix>);

impl FrozenWeight {
    /// A frozen weight over a stored matrix.
    pub fn new(matrix: Arc<StoredMatrix>) -> Self {
        Self(matrix)
    }

    /// Rows: the output features of a linear layer, or the vocabulary of an embedding.
    pub fn rows(&self) -> usize {
        self.0.rows()
    }

    /// Columns: the input features of a linear layer, or the width of an embedding.
    pub fn cols(&self) -> usize {
        self.0.cols()
    }

    /// The stored matrix.
    pub fn matrix(&self) -> &Arc<StoredMatrix> {
        &self.0
    }

    /// The whole weight as a tensor `[rows, cols]`. For small ones, tests and references: training never does this.
    pub fn decode(&self, device: &Device) -> Tensor<2> {
        let mut values = vec![0.0; self.rows() * self.cols()];
        for (row, out) in values.chunks_exact_mut(self.cols().max(1)).enumerate() {
            self.0.decode_row(row, out);
        }
        Tensor::from_data(TensorData::new(values, [self.rows(), self.cols()]), device)
    }
}

impl From<StoredMatrix> for FrozenWeight {
    fn from(matrix: StoredMatrix) -> Self {
        Self(Arc::new(matrix))
    }
}

impl fmt::Debug for FrozenWeight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FrozenWeight({} [{}, {}])", self.0.type_name(), self.rows(), self.cols())
    }
}

/// A frozen vector in `f32`, such as the gain of a norm. Cloning shares it.
#[derive(Clone)]
pub struct FrozenVector(Arc<[f32]>);

impl FrozenVector {
    /// The vector as a tensor, for references.
    pub fn tensor(&self, device: &Device) -> Tensor<1> {
        Tensor::from_data(TensorData::new(self.0.to_vec(), [self.0.len()]), device)
    }
}

impl Deref for FrozenVector {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.0
    }
}

impl From<Vec<f32>> for FrozenVector {
    fn from(values: Vec<f32>) -> Self {
        Self(values.into())
    }
}

impl fmt::Debug for FrozenVector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FrozenVector([{}])", self.0.len())
    }
}
