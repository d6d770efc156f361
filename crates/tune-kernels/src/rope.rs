//! Rotary position embedding, in the half-split layout of Hugging Face models.
//!
//! ```text
//! y₁ = x₁ cos θ - x₂ sin θ        y₂ = x₂ cos θ + x₁ sin θ        θ[t, j] = position(t) · ω[j]
//! dx: the same with -θ
//! ```
//!
//! x, y `[tokens, heads · head_dim]`; x₁ and x₂ are the first and second half of each head; cos and sin
//! `[tokens, head_dim / 2]`. Su et al. 2021, arXiv 2104.09864, eq. 34 (there with interleaved halves).
//! Saved: the table, which is shared.

use std::mem::MaybeUninit;
use std::ops::Range;
use std::sync::Arc;

use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, Dispatch, Flex, TensorMetadata, backend_extension};
use burn::tensor::{Device, Tensor, TensorData};
use burn_flex::FlexTensor;

use crate::cpu::{self, Unwritten, for_each, vectorised};

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

    /// Cosines and sines of the tokens `range`, `[tokens, head_dim / 2]` each.
    pub(crate) fn angles(&self, range: Range<usize>) -> (&[f32], &[f32]) {
        let range = range.start * self.half..range.end * self.half;
        (&self.cos[range.clone()], &self.sin[range])
    }

    /// Cosines and sines as tensors `[tokens, 1, head_dim / 2]`.
    fn tensors(&self, device: &Device) -> (Tensor<3>, Tensor<3>) {
        let shape = [self.tokens, 1, self.half];
        (
            Tensor::from_data(TensorData::new(self.cos.to_vec(), shape), device),
            Tensor::from_data(TensorData::new(self.sin.to_vec(), shape), device),
        )
    }
}

/// Rotates every head of `x` by the angles of its token.
///
/// # Shapes
/// `x` `[tokens, heads · head_dim]` -> the same
///
/// # Panics
/// When the table has another number of tokens, or its head does not divide the features.
pub fn rope(x: Tensor<2>, table: &RotaryTable) -> Tensor<2> {
    let [tokens, features] = x.dims();
    assert_eq!(table.tokens(), tokens, "rope: tokens of the table for x [{tokens}, {features}]");
    assert!(
        table.half > 0 && features.is_multiple_of(table.head_dim()),
        "rope: heads of {} in x [{tokens}, {features}]",
        table.head_dim()
    );
    Tensor::from_dispatch(<Dispatch as Rope>::rope(x.into_dispatch(), table.clone()))
}

/// [`rope`] in plain tensor operations.
pub fn reference(x: Tensor<2>, table: &RotaryTable) -> Tensor<2> {
    let [tokens, features] = x.dims();
    let (half, heads) = (table.half, features / table.head_dim());
    let (cos, sin) = table.tensors(&x.device());
    let x = x.reshape([tokens, heads, 2 * half]);
    let (low, high) = (x.clone().narrow(2, 0, half), x.narrow(2, half, half)); // [tokens, heads, half]
    let rotated_low = low.clone() * cos.clone() - high.clone() * sin.clone();
    let rotated_high = high * cos + low * sin;
    Tensor::cat(vec![rotated_low, rotated_high], 2).reshape([tokens, features])
}

/// The differentiable operation.
#[backend_extension(Flex, Autodiff)]
pub(crate) trait Rope: Backend {
    fn rope(x: FloatTensor<Self>, table: RotaryTable) -> FloatTensor<Self>;
}

/// The kernel of one backend.
pub(crate) trait RopeKernels: Backend {
    /// `x` turned by the angles of the table, or back by them.
    fn rotate(x: FloatTensor<Self>, table: &RotaryTable, direction: Direction) -> FloatTensor<Self>;
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Direction {
    Forward,
    Back,
}

impl Rope for Flex {
    fn rope(x: FlexTensor, table: RotaryTable) -> FlexTensor {
        Self::rotate(x, &table, Direction::Forward)
    }
}

impl RopeKernels for Flex {
    fn rotate(x: FlexTensor, table: &RotaryTable, direction: Direction) -> FlexTensor {
        let x = cpu::contiguous(x);
        let shape: [usize; 2] = x.shape().dims();
        let sign = match direction {
            Direction::Forward => 1.0,
            Direction::Back => -1.0,
        };
        let mut y = Unwritten::new(shape[0] * shape[1]);
        let (width, half) = (shape[1].max(1), table.half.max(1));
        let angles = [&table.cos, &table.sin].map(|angles| angles.chunks(ROWS_OF_A_TASK * half));
        let rows = cpu::values::<f32>(&x).chunks(ROWS_OF_A_TASK * width);
        let rows = rows.zip(y.slots().chunks_mut(ROWS_OF_A_TASK * width));
        let [cos, sin] = angles;
        for_each(rows.zip(cos.zip(sin)).collect(), |((x, y), (cos, sin))| {
            let rows = x.chunks_exact(width).zip(y.chunks_exact_mut(width));
            for ((x, y), (cos, sin)) in rows.zip(cos.chunks_exact(half).zip(sin.chunks_exact(half))) {
                rotate_token(x, y, cos, sin, sign);
            }
        });
        // SAFETY: the loop has written every row.
        #[allow(unsafe_code)]
        let y = unsafe { y.written() };
        cpu::from_values(y, shape)
    }
}

/// Rows that are worth a thread's while.
const ROWS_OF_A_TASK: usize = 16;

vectorised! {
    fn rotate_token(x: &[f32], y: &mut [MaybeUninit<f32>], cos: &[f32], sin: &[f32], sign: f32) {
        let half = cos.len();
        for (x, y) in x.chunks_exact(2 * half).zip(y.chunks_exact_mut(2 * half)) {
            let (x_low, x_high) = x.split_at(half);
            let (y_low, y_high) = y.split_at_mut(half);
            let (x, y) = (x_low.iter().zip(x_high), y_low.iter_mut().zip(y_high));
            for (((x_low, x_high), (y_low, y_high)), (cos, sin)) in x.zip(y).zip(cos.iter().zip(sin)) {
                let sin = sin * sign;
                y_low.write(x_low * cos - x_high * sin);
                y_high.write(x_high * cos + x_low * sin);
            }
        }
    }
}

impl<B: RopeKernels, C: CheckpointStrategy> Rope for Autodiff<B, C> {
    fn rope(x: FloatTensor<Self>, table: RotaryTable) -> FloatTensor<Self> {
        let (x, node) = x.into_parts();
        let y = B::rotate(x, &table, Direction::Forward);
        match RopeBackward.prepare::<C>([node]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish(table, y),
            OpsKind::UnTracked(prep) => prep.finish(y),
        }
    }
}

#[derive(Debug)]
struct RopeBackward;

impl<B: RopeKernels> Backward<B, 1> for RopeBackward {
    type State = RotaryTable;

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let dy = grads.consume::<B>(&ops.node);
        let [x_node] = ops.parents;
        if let Some(node) = x_node {
            grads.register::<B>(node.id, B::rotate(dy, &ops.state, Direction::Back));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, assert_gradients, random, values};

    fn table(tokens: u32, half: usize) -> RotaryTable {
        let positions: Vec<u32> = (0..tokens).map(|t| t * 7 % 23).collect();
        let frequencies: Vec<f32> = (0..half).map(|j| 10_000_f32.powf(-(j as f32) / half as f32)).collect();
        RotaryTable::new(&positions, &frequencies, 1.0)
    }

    #[test]
    fn equals_the_reference() {
        for (tokens, heads, half) in [(0, 1, 2), (1, 1, 1), (5, 3, 4), (40, 2, 33)] {
            let table = table(tokens as u32, half);
            assert_gradients(
                &[random(1, [tokens, heads * 2 * half])],
                |inputs| rope(inputs[0].clone(), &table),
                |inputs| reference(inputs[0].clone(), &table),
            );
        }
    }

    #[test]
    fn position_zero_leaves_x_as_it_is() {
        let x = random(1, [1, 8]);
        assert_eq!(values(rope(x.clone(), &RotaryTable::new(&[0], &[1.0, 0.1], 1.0))), values(x));
    }

    #[test]
    fn scores_depend_on_the_distance_only() {
        let score = |query: u32, key: u32| {
            let table = RotaryTable::new(&[query, key], &[1.0, 0.3, 0.01], 1.0);
            let rotated = values(rope(random(3, [2, 6]), &table));
            rotated[..6].iter().zip(&rotated[6..]).map(|(q, k)| q * k).sum::<f32>()
        };
        assert_close("score", &[score(9, 4)], &[score(105, 100)], 1e-4);
    }
}
