//! Parameters of a layer: frozen in their stored form, or trained as `f32` tensors.

use std::sync::Arc;

use burn::backend::Flex;
use burn::tensor::{Device, Tensor, TensorData};
use burn_flex::FlexTensor;
use rayon::prelude::*;
use tune_quant::{BlockType, ByteView, RowOrder, SharedBytes, StoredMatrix};

use crate::{FrozenVector, FrozenWeight, cpu};

/// A matrix `[d_out, d_in]`.
#[derive(Clone, Debug)]
#[allow(clippy::large_enum_variant, reason = "a handle; a model has a few for each layer")]
pub enum Weight {
    /// Shared, in its stored form, outside every graph.
    Frozen(FrozenWeight),
    /// `f32`; products with `bf16` factors round it as they read it.
    Trained(Tensor<2>),
}

impl Weight {
    /// Rows: the output features of a linear layer, or the vocabulary of an embedding.
    pub fn rows(&self) -> usize {
        match self {
            Self::Frozen(weight) => weight.rows(),
            Self::Trained(tensor) => tensor.dims()[0],
        }
    }

    /// Columns: the input features of a linear layer, or the width of an embedding.
    pub fn cols(&self) -> usize {
        match self {
            Self::Frozen(weight) => weight.cols(),
            Self::Trained(tensor) => tensor.dims()[1],
        }
    }

    /// The values as they are now, outside every graph. Of a trained matrix it is a view on the same memory: as long
    /// as it lives, an optimizer step has to copy the matrix instead of changing it in place.
    pub fn stored(&self) -> FrozenWeight {
        match self {
            Self::Frozen(weight) => weight.clone(),
            Self::Trained(tensor) => view(tensor).into(),
        }
    }

    /// The values as a tensor: of a trained matrix the tensor itself, of a frozen one a copy that is decoded for the caller.
    pub fn tensor(&self, device: &Device) -> Tensor<2> {
        match self {
            Self::Frozen(weight) => weight.decode(device),
            Self::Trained(tensor) => tensor.clone(),
        }
    }

    /// Lets what is mapped from a file leave memory until it is read again.
    pub fn release(&self) {
        if let Self::Frozen(weight) = self {
            weight.matrix().release();
        }
    }

    /// The tensor, if this is trained.
    pub fn trained(&self) -> Option<&Tensor<2>> {
        match self {
            Self::Frozen(_) => None,
            Self::Trained(tensor) => Some(tensor),
        }
    }

    /// The same, if it is to be changed.
    pub fn trained_mut(&mut self) -> Option<&mut Tensor<2>> {
        match self {
            Self::Frozen(_) => None,
            Self::Trained(tensor) => Some(tensor),
        }
    }

    /// The same matrix; if it is trained, as a leaf of a fresh autodiff graph.
    #[must_use]
    pub fn tracked(&self) -> Self {
        match self {
            Self::Frozen(_) => self.clone(),
            Self::Trained(tensor) => Self::Trained(leaf(tensor)),
        }
    }

    /// The same matrix, trained from the values it has now.
    #[must_use]
    pub fn unfrozen(&self, device: &Device) -> Self {
        match self {
            Self::Frozen(weight) => {
                let (rows, cols) = (weight.rows(), weight.cols());
                let mut values = vec![0.0; rows * cols];
                let decoded = values.par_chunks_exact_mut(cols.max(1)).enumerate();
                decoded.with_min_len(16).for_each(|(row, out)| weight.matrix().decode_row(row, out));
                weight.matrix().release();
                Self::Trained(Tensor::from_data(TensorData::new(values, [rows, cols]), device))
            }
            Self::Trained(_) => self.clone(),
        }
    }
}

impl From<FrozenWeight> for Weight {
    fn from(weight: FrozenWeight) -> Self {
        Self::Frozen(weight)
    }
}

impl From<StoredMatrix> for Weight {
    fn from(matrix: StoredMatrix) -> Self {
        Self::Frozen(matrix.into())
    }
}

/// A vector, such as a bias or the gain of a norm.
#[derive(Clone, Debug)]
#[allow(clippy::large_enum_variant, reason = "a handle; a model has a few for each layer")]
pub enum Vector {
    /// Shared, outside every graph.
    Frozen(FrozenVector),
    /// `f32` `[1, len]`.
    Trained(Tensor<2>),
}

impl Vector {
    /// Number of values.
    pub fn len(&self) -> usize {
        match self {
            Self::Frozen(values) => values.len(),
            Self::Trained(tensor) => tensor.dims()[1],
        }
    }

    /// Whether there are no values.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// A copy of the values as they are now, outside every graph.
    pub fn values(&self) -> FrozenVector {
        match self {
            Self::Frozen(values) => values.clone(),
            Self::Trained(tensor) => cpu::values::<f32>(&flex(tensor)).to_vec().into(),
        }
    }

    /// The tensor, if this is trained.
    pub fn trained(&self) -> Option<&Tensor<2>> {
        match self {
            Self::Frozen(_) => None,
            Self::Trained(tensor) => Some(tensor),
        }
    }

    /// The same, if it is to be changed.
    pub fn trained_mut(&mut self) -> Option<&mut Tensor<2>> {
        match self {
            Self::Frozen(_) => None,
            Self::Trained(tensor) => Some(tensor),
        }
    }

    /// The same vector; if it is trained, as a leaf of a fresh autodiff graph.
    #[must_use]
    pub fn tracked(&self) -> Self {
        match self {
            Self::Frozen(_) => self.clone(),
            Self::Trained(tensor) => Self::Trained(leaf(tensor)),
        }
    }

    /// The same vector, trained from the values it has now.
    #[must_use]
    pub fn unfrozen(&self, device: &Device) -> Self {
        match self {
            Self::Frozen(values) => Self::Trained(values.tensor(device).unsqueeze()),
            Self::Trained(_) => self.clone(),
        }
    }
}

impl From<Vec<f32>> for Vector {
    fn from(values: Vec<f32>) -> Self {
        Self::Frozen(values.into())
    }
}

impl From<FrozenVector> for Vector {
    fn from(values: FrozenVector) -> Self {
        Self::Frozen(values)
    }
}

fn leaf(tensor: &Tensor<2>) -> Tensor<2> {
    tensor.clone().autodiff().require_grad()
}

/// The values of a tensor, with or without a graph, in one run.
pub(crate) fn flex(tensor: &Tensor<2>) -> FlexTensor {
    let plain = if tensor.is_autodiff() { tensor.clone().inner() } else { tensor.clone() };
    let primitive = plain.try_into_primitive::<Flex>();
    cpu::contiguous(primitive.expect("the tensors of this crate are those of the CPU backend"))
}

/// A tensor of `f32` as a stored matrix over the same memory.
fn view(tensor: &Tensor<2>) -> StoredMatrix {
    let [rows, cols] = tensor.dims();
    let values = flex(tensor);
    let start = values.layout().start_offset() * size_of::<f32>();
    let end = start + rows * cols * size_of::<f32>();
    ByteView::new(Arc::new(TensorBytes(values)), start..end)
        .and_then(|bytes| StoredMatrix::from_blocks(BlockType::F32, rows, cols, bytes, RowOrder::Natural))
        .unwrap_or_else(|| panic!("the memory of a [{rows}, {cols}] tensor of f32"))
}

struct TensorBytes(FlexTensor);

impl SharedBytes for TensorBytes {}

impl AsRef<[u8]> for TensorBytes {
    fn as_ref(&self) -> &[u8] {
        self.0.bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{random, values};

    #[test]
    fn a_trained_matrix_is_stored_as_it_stands_without_a_copy() {
        let tensor = random(1, [5, 7]);
        let weight = Weight::Trained(tensor.clone());
        let stored = weight.stored();
        assert_eq!(values(stored.decode(&tensor.device())), values(tensor.clone()));
        assert_eq!(stored.matrix().row_blocks(0).unwrap().1.as_ptr(), flex(&tensor).bytes().as_ptr());
        assert_eq!(values(weight.tracked().stored().decode(&tensor.device())), values(tensor));
    }

    #[test]
    fn parts_of_a_tensor_are_read_where_they_lie() {
        let tensor = random(1, [6, 4]);
        for part in [tensor.clone().narrow(0, 2, 3), tensor.clone().narrow(1, 1, 2), tensor.transpose()] {
            let stored = Weight::Trained(part.clone()).stored();
            assert_eq!(values(stored.decode(&part.device())), values(part));
        }
    }
}
