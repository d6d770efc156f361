//! Rotary position embedding, half-split layout.
use std::sync::Arc;

use burn::tensor::{Device, Tensor, TensorData};

/// Cosines and sines of the rotary angles, one row per token. Cloning shares it.
#[derive(Clone, Debug)]
pub struct RotaryTable {
    tokens: usize,
    half: usize,
    cos: Arc<[f32]>,
    sin: Arc<[f32]>,
}

impl RotaryTable {
    /// The table for tokens at `positions`: angle `[t, j] = positions[t] · inverse_frequencies[j]`, in `f32`.
    /// Cosines and sines are multiplied by `attention_factor` (1 unless the scaling method has one).
    pub fn new(positions: &[u32], inverse_frequencies: &[f32], attention_factor: f32) -> Self {
        let angles = || positions.iter().flat_map(|p| inverse_frequencies.iter().map(move |f| *p as f32 * f));
        Self {
            tokens: positions.len(),
            half: inverse_frequencies.len(),
            cos: angles().map(|angle| angle.cos() * attention_factor).collect(),
            sin: angles().map(|angle| angle.sin() * attention_factor).collect(),
        }
    }

    /// Tokens, the rows of the table.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Features of a head: twice the number of frequencies.
    pub fn head_dim(&self) -> usize {
        2 * self.half
    }

    fn tensors(&self, device: &Device) -> (Tensor<3>, Tensor<3>) {
        let shape = [self.tokens, 1, self.half];
        (
            Tensor::from_data(TensorData::new(self.cos.to_vec(), shape), device),
            Tensor::from_data(TensorData::new(self.sin.to_vec(), shape), device),
        )
    }
}

/// Rotates the heads of `x`.
pub fn rope(x: Tensor<2>, table: &RotaryTable) -> Tensor<2> {
    reference(x, table)
}

/// The same in plain tensor operations.
pub fn reference(x: Tensor<2>, table: &RotaryTable) -> Tensor<2> {
    let [tokens, features] = x.dims();
    let (half, heads) = (table.half, features / table.head_dim());
    let (cos, sin) = table.tensors(&x.device());
    let x = x.reshape([tokens, heads, 2 * half]);
    let (low, high) = (x.clone().narrow(2, 0, half), x.narrow(2, half, half));
    let rotated_low = low.clone() * cos.clone() - high.clone() * sin.clone();
    let rotated_high = high * cos + low * sin;
    Tensor::cat(vec![rotated_low, rotated_high], 2).reshape([tokens, features])
}
