//! SwiGLU.
use burn::tensor::{Tensor, activation};

/// `y = silu(gate) · up`.
pub fn swiglu(gate: Tensor<2>, up: Tensor<2>) -> Tensor<2> {
    reference(gate, up)
}

/// The same in plain tensor operations.
pub fn reference(gate: Tensor<2>, up: Tensor<2>) -> Tensor<2> {
    activation::silu(gate) * up
}
