//! Frozen linear layer with a LoRA update beside it, as one operation.
//!
//! ```text
//! y = x Wᵀ + s h Bᵀ        h = x Aᵀ
//! dh = s dy B              dx = dy W + dh A        dA = dhᵀ x        dB = s dyᵀ h
//! ```
//!
//! x `[tokens, d_in]`; W `[d_out, d_in]` frozen; A `[rank, d_in]`; B `[d_out, rank]`; h `[tokens, rank]`;
//! y `[tokens, d_out]`. Hu et al. 2021, arXiv 2106.09685, eq. 3. `W + s B A` is never formed.
//! Saved: x, A and B (shared with the graph), h, and a reference to the stored weight.

use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, Dispatch, Flex, TensorMetadata, backend_extension};
use burn::tensor::Tensor;
use burn_flex::FlexTensor;

use crate::FrozenWeight;
use crate::cpu::{self, Target, Threads, Unwritten, View, multiply, multiply_add};

/// `x Wᵀ + scale · (x Aᵀ) Bᵀ` with a frozen W.
///
/// # Shapes
/// `x` `[tokens, d_in]`, `w` `[d_out, d_in]`, `a` `[rank, d_in]`, `b` `[d_out, rank]` -> `[tokens, d_out]`
///
/// # Panics
/// When the shapes do not agree.
pub fn lora_linear(x: Tensor<2>, w: &FrozenWeight, a: Tensor<2>, b: Tensor<2>, scale: f32) -> Tensor<2> {
    let [tokens, d_in] = x.dims();
    let [rank, a_d_in] = a.dims();
    assert_eq!(w.cols(), d_in, "lora_linear: d_in of {w:?} for x [{tokens}, {d_in}]");
    assert_eq!(a_d_in, d_in, "lora_linear: d_in of A [{rank}, {a_d_in}] for x [{tokens}, {d_in}]");
    assert_eq!(b.dims(), [w.rows(), rank], "lora_linear: B for {w:?} and A [{rank}, {a_d_in}]");
    // A trained pair beside a plain input: the input is a constant of the same graph.
    let x = if a.is_autodiff() { x.autodiff() } else { x };
    let (x, a, b) = (x.into_dispatch(), a.into_dispatch(), b.into_dispatch());
    Tensor::from_dispatch(<Dispatch as LoraLinear>::lora_linear(x, w.clone(), a, b, scale))
}

/// [`lora_linear`] in plain tensor operations, with the whole weight decoded.
pub fn reference(x: Tensor<2>, w: &FrozenWeight, a: Tensor<2>, b: Tensor<2>, scale: f32) -> Tensor<2> {
    let base = crate::frozen_linear::reference(x.clone(), w);
    base + x.matmul(a.transpose()).matmul(b.transpose()).mul_scalar(scale)
}

/// The differentiable operation.
#[backend_extension(Flex, Autodiff)]
pub(crate) trait LoraLinear: Backend {
    fn lora_linear(
        x: FloatTensor<Self>,
        w: FrozenWeight,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        scale: f32,
    ) -> FloatTensor<Self>;
}

/// The kernels of one backend.
pub(crate) trait LoraLinearKernels: Backend {
    /// y and h.
    fn forward(
        x: FloatTensor<Self>,
        w: &FrozenWeight,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        scale: f32,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);
    /// The gradients that `wanted` asks for.
    fn backward(saved: Saved<Self>, dy: FloatTensor<Self>, wanted: Wanted) -> LoraGradients<Self>;
}

/// What backward needs.
#[derive(Clone, Debug)]
pub(crate) struct Saved<B: Backend> {
    x: FloatTensor<B>,
    w: FrozenWeight,
    a: FloatTensor<B>,
    b: FloatTensor<B>,
    h: FloatTensor<B>,
    scale: f32,
}

/// Which of the inputs are in the graph.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wanted {
    x: bool,
    a: bool,
    b: bool,
}

/// dx, dA and dB, as wanted.
pub(crate) struct LoraGradients<B: Backend> {
    x: Option<FloatTensor<B>>,
    a: Option<FloatTensor<B>>,
    b: Option<FloatTensor<B>>,
}

impl LoraLinear for Flex {
    fn lora_linear(x: FlexTensor, w: FrozenWeight, a: FlexTensor, b: FlexTensor, scale: f32) -> FlexTensor {
        Self::forward(x, &w, a, b, scale).0
    }
}

impl LoraLinearKernels for Flex {
    fn forward(
        x: FlexTensor,
        w: &FrozenWeight,
        a: FlexTensor,
        b: FlexTensor,
        scale: f32,
    ) -> (FlexTensor, FlexTensor) {
        let (x, a, b) = (cpu::contiguous(x), cpu::contiguous(a), cpu::contiguous(b));
        let (x, a, b) = (matrix(&x), matrix(&a), matrix(&b));
        let (tokens, rank, d_out) = (x.rows(), a.rows(), w.rows());

        let h = product([tokens, rank], 1.0, x, a.t());
        let h_view = View::new(&h, tokens, rank);
        let mut y = Unwritten::new(tokens * d_out);
        cpu::times_transposed(x, w.matrix(), y.slots(), |rows, y| {
            multiply_add(y, scale, h_view, b.slice_rows(rows).t(), Threads::All);
        });
        // SAFETY: the product has written every element.
        #[allow(unsafe_code)]
        let y = unsafe { y.written() };
        (cpu::from_values(y, [tokens, d_out]), cpu::from_values(h, [tokens, rank]))
    }

    fn backward(saved: Saved<Self>, dy: FlexTensor, wanted: Wanted) -> LoraGradients<Self> {
        let Saved { x, w, a, b, h, scale } = saved;
        let [x, a, b, h, dy] = [x, a, b, h, dy].map(cpu::contiguous);
        let (x, a, b, h, dy) = (matrix(&x), matrix(&a), matrix(&b), matrix(&h), matrix(&dy));
        let (tokens, d_in, rank, d_out) = (x.rows(), x.cols(), a.rows(), w.rows());

        let dh = if wanted.x || wanted.a { product([tokens, rank], scale, dy, b) } else { Vec::new() };
        let dh = || View::new(&dh, tokens, rank);
        let dx = wanted.x.then(|| {
            let mut dx = Unwritten::new(tokens * d_in);
            let mut sum = cpu::times(dy, w.matrix(), dx.slots());
            multiply_add(&mut sum, 1.0, dh(), a, Threads::All);
            // SAFETY: the product has written every element.
            #[allow(unsafe_code)]
            let dx = unsafe { dx.written() };
            cpu::from_values(dx, [tokens, d_in])
        });
        let da = wanted.a.then(|| cpu::from_values(product([rank, d_in], 1.0, dh().t(), x), [rank, d_in]));
        let db = wanted.b.then(|| cpu::from_values(product([d_out, rank], scale, dy.t(), h), [d_out, rank]));
        LoraGradients { x: dx, a: da, b: db }
    }
}

fn matrix(tensor: &FlexTensor) -> View<'_> {
    let [rows, cols] = tensor.shape().dims();
    View::new(cpu::values(tensor), rows, cols)
}

fn product([rows, cols]: [usize; 2], scale: f32, a: View, b: View) -> Vec<f32> {
    let mut out = Unwritten::new(rows * cols);
    multiply(Target::new(out.slots(), rows, cols), scale, a, b, Threads::All);
    // SAFETY: the product has written every element.
    #[allow(unsafe_code)]
    unsafe {
        out.written()
    }
}

impl<B: LoraLinearKernels, C: CheckpointStrategy> LoraLinear for Autodiff<B, C> {
    fn lora_linear(
        x: FloatTensor<Self>,
        w: FrozenWeight,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        scale: f32,
    ) -> FloatTensor<Self> {
        let (x, x_node) = x.into_parts();
        let (a, a_node) = a.into_parts();
        let (b, b_node) = b.into_parts();
        let (y, h) = B::forward(x.clone(), &w, a.clone(), b.clone(), scale);
        match LoraLinearBackward.prepare::<C>([x_node, a_node, b_node]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish(Saved { x, w, a, b, h, scale }, y),
            OpsKind::UnTracked(prep) => prep.finish(y),
        }
    }
}

#[derive(Debug)]
struct LoraLinearBackward;

impl<B: LoraLinearKernels> Backward<B, 3> for LoraLinearBackward {
    type State = Saved<B>;

    fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, _: &mut Checkpointer) {
        let dy = grads.consume::<B>(&ops.node);
        let [x, a, b] = ops.parents;
        let wanted = Wanted { x: x.is_some(), a: a.is_some(), b: b.is_some() };
        let gradients = B::backward(ops.state, dy, wanted);
        for (node, gradient) in [(x, gradients.x), (a, gradients.a), (b, gradients.b)] {
            if let (Some(node), Some(gradient)) = (node, gradient) {
                grads.register::<B>(node.id, gradient);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tune_quant::{BlockType, StoredMatrix};

    use super::*;
    use crate::testing::{assert_close, assert_gradients, frozen, random, uniform, values};

    fn assert_equals_the_reference(tokens: usize, rank: usize, w: &FrozenWeight) {
        assert_gradients(
            &[random(1, [tokens, w.cols()]), random(2, [rank, w.cols()]), random(3, [w.rows(), rank])],
            |inputs| lora_linear(inputs[0].clone(), w, inputs[1].clone(), inputs[2].clone(), 0.5),
            |inputs| reference(inputs[0].clone(), w, inputs[1].clone(), inputs[2].clone(), 0.5),
        );
    }

    #[test]
    fn equals_the_reference() {
        for (tokens, rank, d_out, d_in) in [(0, 2, 3, 4), (1, 1, 1, 1), (3, 4, 7, 5), (33, 8, 50, 31)] {
            let w = StoredMatrix::from_f32(d_out, d_in, &uniform(4, d_out * d_in));
            assert_equals_the_reference(tokens, rank, &w.into());
        }
        assert_equals_the_reference(20, 16, &frozen(BlockType::Q4_0, [3000, 256])); // several panels
    }

    #[test]
    fn a_frozen_pair_still_passes_the_gradient_to_x() {
        let w = frozen(BlockType::Q8_0, [8, 32]);
        let (a, b) = (random(2, [2, 32]), random(3, [8, 2]));
        let gradient_of_x = |operation: &dyn Fn(Tensor<2>) -> Tensor<2>| {
            let x = random(1, [5, 32]).autodiff().require_grad();
            let gradients = operation(x.clone()).sum().backward();
            values(x.grad(&gradients).expect("gradient of x"))
        };
        let (a, b) = (a.autodiff(), b.autodiff());
        let got = gradient_of_x(&|x| lora_linear(x, &w, a.clone(), b.clone(), 2.0));
        let want = gradient_of_x(&|x| reference(x, &w, a.clone(), b.clone(), 2.0));
        assert_close("gradient of x", &got, &want, 1e-5);
    }

    #[test]
    fn a_plain_input_is_a_constant_of_the_graph() {
        let w = frozen(BlockType::Q8_0, [8, 32]);
        let (x, a) = (random(1, [5, 32]), random(2, [2, 32]).autodiff().require_grad());
        let b = random(3, [8, 2]).autodiff().require_grad();
        let gradients = lora_linear(x, &w, a.clone(), b.clone(), 1.0).sum().backward();
        assert!(a.grad(&gradients).is_some() && b.grad(&gradients).is_some());
    }

    #[test]
    #[should_panic(expected = "B for FrozenWeight(Q8_0 [8, 32]) and A [2, 32]")]
    fn a_pair_of_different_ranks_is_refused() {
        let w = frozen(BlockType::Q8_0, [8, 32]);
        lora_linear(random(1, [5, 32]), &w, random(2, [2, 32]), random(3, [8, 3]), 1.0);
    }
}
