//! Flex tensors as slices, and slices as flex tensors.

use burn::tensor::{Shape, TensorData};
use burn_flex::FlexTensor;

/// `tensor` with its values in one run, copied only if they are not.
pub(crate) fn contiguous(tensor: FlexTensor) -> FlexTensor {
    if tensor.is_contiguous() { tensor } else { tensor.to_contiguous() }
}

/// The values of a contiguous `f32` tensor.
pub(crate) fn values(tensor: &FlexTensor) -> &[f32] {
    match tensor.as_slice::<f32>() {
        Some(values) => values,
        None => panic!("expected a contiguous f32 tensor, got {tensor:?}"),
    }
}

/// A tensor over `values`.
pub(crate) fn from_values<const D: usize>(values: Vec<f32>, shape: [usize; D]) -> FlexTensor {
    FlexTensor::from_data(TensorData::new(values, Shape::new(shape)))
}
