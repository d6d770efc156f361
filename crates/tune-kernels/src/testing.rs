//! What the operations' tests share: seeded inputs, and the comparison of a fast operation with its reference.

use burn::tensor::{Device, Tensor, TensorData};
use tune_quant::{BlockType, RowOrder, StoredMatrix};

use crate::FrozenWeight;

/// `len` values in [-1, 1) that depend only on `seed` (SplitMix64).
pub(crate) fn uniform(seed: u64, len: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0xA076_1D64_78BD_642F);
    let mut next = || {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (z ^ (z >> 31)) >> 40
    };
    (0..len).map(|_| next() as f32 / (1 << 23) as f32 - 1.0).collect()
}

/// A tensor of [`uniform`] values on the plain CPU device.
pub(crate) fn random(seed: u64, shape: [usize; 2]) -> Tensor<2> {
    Tensor::from_data(TensorData::new(uniform(seed, shape[0] * shape[1]), shape), &Device::flex())
}

pub(crate) fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().iter::<f32>().collect()
}

/// Asserts that `got` and `want` agree within `tolerance` of the largest value of `want`.
pub(crate) fn assert_close(what: &str, got: &[f32], want: &[f32], tolerance: f32) {
    assert_eq!(got.len(), want.len(), "{what}: number of values");
    let scale = want.iter().fold(1e-6_f32, |a, b| a.max(b.abs()));
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        let error = (got - want).abs();
        assert!(error <= tolerance * scale, "{what}[{i}]: got {got}, want {want}, largest {scale}");
    }
}

/// Compares `fast` with `reference`: the output on a plain device and on an autodiff device, the gradient of
/// every input under a random weighting of the output, and along a random direction a central difference.
pub(crate) fn assert_gradients(
    inputs: &[Tensor<2>],
    fast: impl Fn(&[Tensor<2>]) -> Tensor<2>,
    reference: impl Fn(&[Tensor<2>]) -> Tensor<2>,
) {
    const TOLERANCE: f32 = 1e-5;
    let want = reference(inputs);
    let shape = want.dims();
    let want = values(want);
    let plain = fast(inputs);
    assert_eq!(plain.dims(), shape, "shape of the output");
    assert_close("output", &values(plain), &want, TOLERANCE);
    if inputs.iter().any(|input| input.dims().contains(&0)) || want.is_empty() {
        return;
    }

    let weighting = random(77, shape);
    let gradients = |operation: &dyn Fn(&[Tensor<2>]) -> Tensor<2>| {
        let tracked: Vec<_> = inputs.iter().map(|x| x.clone().autodiff().require_grad()).collect();
        let y = operation(&tracked);
        assert_close("output under autodiff", &values(y.clone().inner()), &want, TOLERANCE);
        let gradients = (y * weighting.clone().autodiff()).sum().backward();
        let of_input = |x: &Tensor<2>| values(x.grad(&gradients).expect("a gradient for each input"));
        tracked.iter().map(of_input).collect::<Vec<_>>()
    };
    let (got, want) = (gradients(&fast), gradients(&reference));
    for (i, (got, want)) in got.iter().zip(&want).enumerate() {
        assert_close(&format!("gradient of input {i}"), got, want, TOLERANCE);
    }

    for (i, gradient) in got.iter().enumerate() {
        let step = 1e-2;
        let direction = random(90 + i as u64, inputs[i].dims());
        let objective = |sign: f32| {
            let mut moved = inputs.to_vec();
            moved[i] = moved[i].clone() + direction.clone() * (sign * step);
            let y = values(fast(&moved));
            y.iter().zip(values(weighting.clone())).map(|(y, w)| f64::from(*y) * f64::from(w)).sum::<f64>()
        };
        let difference = (objective(1.0) - objective(-1.0)) / f64::from(2.0 * step);
        let terms = gradient.iter().zip(values(direction)).map(|(g, d)| f64::from(*g) * f64::from(d));
        let (slope, size) = terms.fold((0.0, 1e-3), |(sum, size), term| (sum + term, size + term.abs()));
        assert!(
            (slope - difference).abs() <= 5e-3 * size,
            "central difference of input {i}: gradient says {slope}, difference is {difference}"
        );
    }
}

/// A weight of [`uniform`] values, stored as `block_type`; for a type that cannot be encoded, of arbitrary blocks.
pub(crate) fn frozen(block_type: BlockType, [rows, cols]: [usize; 2]) -> FrozenWeight {
    let mut bytes = Vec::new();
    if block_type.can_encode() {
        block_type.encode(&uniform(11, rows * cols), &mut bytes);
    } else {
        // Bytes below 0x38 make every half-precision scale positive and at most 0.5; an MXFP4 block begins with
        // an exponent, biased by 127.
        let len = rows * block_type.row_bytes(cols).expect("whole blocks in each row");
        bytes.extend(uniform(11, len).iter().map(|value| ((value + 1.0) * 28.0) as u8));
        if block_type == BlockType::MXFP4 {
            bytes.iter_mut().step_by(block_type.block_bytes()).for_each(|exponent| *exponent = 126);
        }
    }
    let matrix = StoredMatrix::from_blocks(block_type, rows, cols, bytes.into(), RowOrder::Natural);
    matrix.expect("whole blocks in each row").into()
}
