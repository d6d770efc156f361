//! Flex tensors as slices, and slices as flex tensors.

use burn::tensor::{Element, Shape, TensorData};
use burn_flex::FlexTensor;
use bytemuck::Pod;

/// `tensor` with its values in one run, copied only if they are not.
pub(crate) fn contiguous(tensor: FlexTensor) -> FlexTensor {
    if tensor.is_contiguous() { tensor } else { tensor.to_contiguous() }
}

/// The values of a contiguous tensor of `T`.
pub(crate) fn values<T: Element + Pod>(tensor: &FlexTensor) -> &[T] {
    match tensor.as_slice::<T>() {
        Some(values) => values,
        None => panic!("expected a contiguous {:?} tensor, got {tensor:?}", T::dtype()),
    }
}

/// A tensor over `values`.
pub(crate) fn from_values<T: Element, const D: usize>(values: Vec<T>, shape: [usize; D]) -> FlexTensor {
    FlexTensor::from_data(TensorData::new(values, Shape::new(shape)))
}
