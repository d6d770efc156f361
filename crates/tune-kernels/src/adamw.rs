//! The step of AdamW in one pass over parameter, gradient and moments, and the norm of a gradient.
//!
//! ```text
//! m ← β₁ m + (1 − β₁) g          v ← β₂ v + (1 − β₂) g²
//! p ← p · (1 − lr λ) − lr / (1 − β₁ᵗ) · m / (√v / √(1 − β₂ᵗ) + ε)
//! ```
//!
//! Loshchilov and Hutter 2019, arXiv 1711.05101, algorithm 2; order of operations as in `torch.optim.AdamW`.
//! Outside every graph. Tensors that nobody else holds are changed where they are.

use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, Dispatch, Flex, backend_extension};
use burn::tensor::Tensor;
use burn_flex::FlexTensor;
use rayon::prelude::*;

use crate::cpu::{self, vectorised};

/// The factors of one step, the same for all parameters.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWFactors {
    /// β₁.
    pub beta1: f32,
    /// β₂.
    pub beta2: f32,
    /// 1 − β₁, not rounded before it is subtracted.
    pub one_minus_beta1: f32,
    /// 1 − β₂, likewise: in `f32` the difference would be off by 5e-5 of itself.
    pub one_minus_beta2: f32,
    /// 1 − lr λ.
    pub decay: f32,
    /// lr / (1 − β₁ᵗ).
    pub step_size: f32,
    /// √(1 − β₂ᵗ).
    pub second_correction: f32,
    /// ε.
    pub epsilon: f32,
}

/// Takes one step; returns parameter, m and v.
///
/// # Panics
/// When the shapes differ.
pub fn adamw(
    parameter: Tensor<2>,
    gradient: Tensor<2>,
    m: Tensor<2>,
    v: Tensor<2>,
    factors: AdamWFactors,
) -> (Tensor<2>, Tensor<2>, Tensor<2>) {
    let shape = parameter.dims();
    assert_eq!([gradient.dims(), m.dims(), v.dims()], [shape; 3], "adamw: shapes of gradient and moments");
    let (p, m, v) = <Dispatch as AdamW>::adamw(
        parameter.into_dispatch(),
        gradient.into_dispatch(),
        m.into_dispatch(),
        v.into_dispatch(),
        factors,
    );
    (Tensor::from_dispatch(p), Tensor::from_dispatch(m), Tensor::from_dispatch(v))
}

/// The sum of the squares of all elements, in a fixed order.
pub fn sum_of_squares(x: &Tensor<2>) -> f64 {
    let x = x.clone().into_dispatch();
    let sums = Tensor::<1>::from_dispatch(<Dispatch as AdamW>::sums_of_squares(x));
    sums.into_data().iter::<f32>().map(f64::from).sum()
}

/// The operations, for plain devices.
#[backend_extension(Flex)]
pub(crate) trait AdamW: Backend {
    fn adamw(
        parameter: FloatTensor<Self>,
        gradient: FloatTensor<Self>,
        m: FloatTensor<Self>,
        v: FloatTensor<Self>,
        factors: AdamWFactors,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>);
    /// Of each chunk of elements.
    fn sums_of_squares(x: FloatTensor<Self>) -> FloatTensor<Self>;
}

/// Elements that are worth a thread's while.
const CHUNK: usize = 16 * 1024;

impl AdamW for Flex {
    fn adamw(
        parameter: FlexTensor,
        gradient: FlexTensor,
        m: FlexTensor,
        v: FlexTensor,
        factors: AdamWFactors,
    ) -> (FlexTensor, FlexTensor, FlexTensor) {
        // A view of a larger buffer is copied: the loop goes over whole buffers.
        let [mut parameter, mut m, mut v] = [parameter, m, v].map(|tensor| {
            let whole =
                tensor.is_contiguous() && cpu::values::<f32>(&tensor).len() * 4 == tensor.bytes().len();
            if whole { tensor } else { FlexTensor::from_data(tensor.into_data()) }
        });
        let gradient = cpu::contiguous(gradient);
        let gradients: &[f32] = cpu::values(&gradient);
        parameter
            .storage_mut::<f32>()
            .par_chunks_mut(CHUNK)
            .zip(gradients.par_chunks(CHUNK))
            .zip(m.storage_mut::<f32>().par_chunks_mut(CHUNK))
            .zip(v.storage_mut::<f32>().par_chunks_mut(CHUNK))
            .for_each(|(((p, g), m), v)| step(p, g, m, v, factors));
        (parameter, m, v)
    }

    fn sums_of_squares(x: FlexTensor) -> FlexTensor {
        let x = cpu::contiguous(x);
        let sums: Vec<f32> = cpu::values::<f32>(&x).par_chunks(CHUNK).map(|x| cpu::dot(x, x)).collect();
        let chunks = sums.len();
        cpu::from_values(sums, [chunks])
    }
}

vectorised! {
    pub(crate) fn step(p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32], f: AdamWFactors) {
        for (((p, g), m), v) in p.iter_mut().zip(g).zip(m).zip(v) {
            *m = *m * f.beta1 + *g * f.one_minus_beta1;
            *v = *v * f.beta2 + *g * *g * f.one_minus_beta2;
            let denominator = v.sqrt() / f.second_correction + f.epsilon;
            *p = *p * f.decay - *m / denominator * f.step_size;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{random, values};

    #[test]
    fn equals_the_formula_and_leaves_shared_tensors_alone() {
        let [p, g, m] = [1, 2, 3].map(|seed| random(seed, [130, 257]));
        let v = random(4, [130, 257]).abs();
        let factors = AdamWFactors {
            beta1: 0.9,
            beta2: 0.99,
            one_minus_beta1: 0.1,
            one_minus_beta2: 0.01,
            decay: 0.999,
            step_size: 0.1,
            second_correction: 0.5,
            epsilon: 1e-3,
        };
        let before = values(p.clone());
        let (got_p, got_m, got_v) = adamw(p.clone(), g.clone(), m.clone(), v.clone(), factors);
        assert_eq!(values(p), before);
        let inputs = values(g).into_iter().zip(values(m)).zip(values(v));
        let results = values(got_p).into_iter().zip(values(got_m)).zip(values(got_v));
        for ((((g, m), v), p), ((got_p, got_m), got_v)) in inputs.zip(before).zip(results) {
            let m = m * 0.9 + g * 0.1;
            let v = v * 0.99 + g * g * 0.01;
            let p = p * 0.999 - m / (v.sqrt() / 0.5 + 1e-3) * 0.1;
            assert!([got_p - p, got_m - m, got_v - v].iter().all(|error| error.abs() < 1e-5));
        }
    }

    #[test]
    fn squares_of_several_chunks() {
        let x = random(1, [100, 1000]);
        let want: f64 = values(x.clone()).iter().map(|x| f64::from(*x) * f64::from(*x)).sum();
        assert!((sum_of_squares(&x) - want).abs() < 1e-5 * want);
    }
}
