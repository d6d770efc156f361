//! The step of AdamW with moments of 8 bits.
//!
//! ```text
//! block of 256 values:  a = max |x|        code(x) = the nearest of 256 levels to x / a        x ≈ level · a
//! ```
//!
//! Dettmers et al. 2022, arXiv 2110.02861: blockwise quantisation with dynamic levels, decade by decade below the
//! largest value of a block, signed for m and unsigned for v; levels and block length are bitsandbytes'. The step is
//! [`adamw`](crate::adamw)'s, in `f32`: a block's moments are decoded, changed, used and encoded again, so nothing larger
//! than a block is ever decoded. 2 + 2 · 4 / 256 bytes a parameter.
//!
//! Departures from bitsandbytes: weight decay comes before the update, as in torch; and a second moment that is not zero
//! never becomes the level zero, where the next step would divide by ε.

use std::sync::LazyLock;

use burn::backend::Flex;
use burn::tensor::Tensor;
use burn_flex::FlexTensor;
use rayon::prelude::*;

use crate::AdamWFactors;
use crate::adamw::step;
use crate::cpu;
use crate::weight::flex;

/// Values that share a scale.
pub const BLOCK: usize = 256;

/// Both moments of one parameter in 8 bits, row after row.
#[derive(Clone, Debug, PartialEq)]
pub struct Moments8bit {
    /// The first.
    pub m: Codes,
    /// The second.
    pub v: Codes,
}

/// Values in 8 bits.
#[derive(Clone, Debug, PartialEq)]
pub struct Codes {
    /// A level for each value.
    pub codes: Vec<u8>,
    /// The largest absolute value of each block of [`BLOCK`].
    pub absmax: Vec<f32>,
}

impl Moments8bit {
    /// Zeros for `len` parameters.
    pub fn zeros(len: usize) -> Self {
        let zeros = |map: &DynamicMap| Codes {
            codes: vec![map.code(0.0); len],
            absmax: vec![0.0; len.div_ceil(BLOCK)],
        };
        Self { m: zeros(&SIGNED), v: zeros(&UNSIGNED) }
    }

    /// The values of both moments, for tests and to compare with.
    pub fn decode(&self) -> (Vec<f32>, Vec<f32>) {
        (self.m.decode(&SIGNED), self.v.decode(&UNSIGNED))
    }
}

impl Codes {
    fn decode(&self, map: &DynamicMap) -> Vec<f32> {
        let blocks = self.codes.chunks(BLOCK).zip(&self.absmax);
        blocks
            .flat_map(|(codes, a)| codes.iter().map(move |code| map.levels[usize::from(*code)] * a))
            .collect()
    }
}

/// Takes one step and returns the parameter; the moments change where they are.
///
/// # Panics
/// When the shapes differ.
pub fn adamw_8bit(
    parameter: Tensor<2>,
    gradient: &Tensor<2>,
    moments: &mut Moments8bit,
    factors: AdamWFactors,
) -> Tensor<2> {
    let shape = parameter.dims();
    assert_eq!(gradient.dims(), shape, "adamw_8bit: shape of the gradient");
    assert_eq!(moments.m.codes.len(), shape[0] * shape[1], "adamw_8bit: moments of {shape:?}");
    let gradient = flex(gradient);
    let mut parameter = whole(parameter);
    let Moments8bit { m, v } = moments;
    parameter
        .storage_mut::<f32>()
        .par_chunks_mut(BLOCK)
        .zip(cpu::values::<f32>(&gradient).par_chunks(BLOCK))
        .zip(m.codes.par_chunks_mut(BLOCK).zip(&mut m.absmax))
        .zip(v.codes.par_chunks_mut(BLOCK).zip(&mut v.absmax))
        .with_min_len(64)
        .for_each(|(((p, g), m), v)| step_of_block(p, g, m, v, factors));
    Tensor::from_primitive::<Flex>(parameter)
}

/// The buffer of `tensor`, which nobody else holds, or a copy of its part of a larger one.
fn whole(tensor: Tensor<2>) -> FlexTensor {
    let primitive =
        tensor.try_into_primitive::<Flex>().expect("parameters are plain tensors of the CPU backend");
    let whole =
        primitive.is_contiguous() && cpu::values::<f32>(&primitive).len() * 4 == primitive.bytes().len();
    if whole { primitive } else { FlexTensor::from_data(primitive.into_data()) }
}

fn step_of_block(
    p: &mut [f32],
    g: &[f32],
    (m_codes, m_absmax): (&mut [u8], &mut f32),
    (v_codes, v_absmax): (&mut [u8], &mut f32),
    factors: AdamWFactors,
) {
    let (mut m, mut v) = ([0.0; BLOCK], [0.0; BLOCK]);
    let (m, v) = (&mut m[..p.len()], &mut v[..p.len()]);
    for (value, code) in m.iter_mut().zip(&*m_codes) {
        *value = SIGNED.levels[usize::from(*code)] * *m_absmax;
    }
    for (value, code) in v.iter_mut().zip(&*v_codes) {
        *value = UNSIGNED.levels[usize::from(*code)] * *v_absmax;
    }
    step(p, g, m, v, factors);
    SIGNED.encode(m, m_codes, m_absmax);
    UNSIGNED.encode(v, v_codes, v_absmax);
    let zero = UNSIGNED.code(0.0);
    for (code, value) in v_codes.iter_mut().zip(&*v) {
        *code += u8::from(*code == zero && *value > 0.0);
    }
}

/// 256 levels in [-1, 1] or [0, 1], in rising order, and a way to the nearest one.
struct DynamicMap {
    levels: [f32; 256],
    /// Between each level and the next.
    midpoints: [f32; 256],
    /// The lowest code for values whose `bf16` bits, cut off, are the index: of positive and of negative values. Levels
    /// lie further apart than two neighbouring `bf16`, so the code of a value is this one or the next.
    positive: Vec<u8>,
    negative: Vec<u8>,
}

static SIGNED: LazyLock<DynamicMap> = LazyLock::new(|| DynamicMap::new(true));
static UNSIGNED: LazyLock<DynamicMap> = LazyLock::new(|| DynamicMap::new(false));

/// `bf16` bits of 1.
const ONE: usize = 0x3F80;

impl DynamicMap {
    fn new(signed: bool) -> Self {
        let levels = levels(signed);
        // Behind the last level nothing comes.
        let midpoints =
            std::array::from_fn(|i| if i < 255 { levels[i].midpoint(levels[i + 1]) } else { f32::INFINITY });
        let lowest = |value: f32| midpoints.partition_point(|midpoint| *midpoint < value) as u8;
        let positive = (0..=ONE as u32).map(|bits| lowest(f32::from_bits(bits << 16))).collect();
        // The value of a cell that is farthest from zero is the lowest.
        let negative = (0..=ONE as u32).map(|bits| lowest(-f32::from_bits(bits << 16 | 0xFFFF))).collect();
        Self { levels, midpoints, positive, negative }
    }

    /// The code of a value in [-1, 1].
    fn code(&self, x: f32) -> u8 {
        let cell = (x.abs().to_bits() >> 16) as usize;
        let cells = if x < 0.0 { &self.negative } else { &self.positive };
        let lowest = cells[cell.min(ONE)];
        lowest + u8::from(x > self.midpoints[usize::from(lowest)])
    }

    fn encode(&self, values: &[f32], codes: &mut [u8], absmax: &mut f32) {
        *absmax = values.iter().fold(0.0, |most: f32, x| most.max(x.abs()));
        let inverse = if *absmax > 0.0 { 1.0 / *absmax } else { 0.0 };
        for (code, x) in codes.iter_mut().zip(values) {
            *code = self.code((x * inverse).clamp(-1.0, 1.0));
        }
    }
}

/// Seven decades, the lowest with one level (two, unsigned), each with twice as many as the one below: the middles of
/// equal parts of 0.1 to 1 of the decade. Then 0 and 1.
fn levels(signed: bool) -> [f32; 256] {
    let mut levels = vec![0.0, 1.0];
    for decade in 0..7 {
        let parts = if signed { 1 << decade } else { 2 << decade };
        let boundary = |i: i32| 0.1 + 0.9 * f64::from(i) / f64::from(parts);
        for i in 0..parts {
            let level = (10_f64.powi(decade - 6) * boundary(i).midpoint(boundary(i + 1))) as f32;
            levels.push(level);
            levels.extend(signed.then_some(-level));
        }
    }
    levels.sort_by(f32::total_cmp);
    levels.try_into().unwrap_or_else(|_| unreachable!("2 · (2⁷ - 1) + 2 levels"))
}

/// The same step in plain loops, with the nearest level found by looking at all: what the fast one is compared with.
pub fn reference(p: &mut [f32], g: &[f32], moments: &mut Moments8bit, f: AdamWFactors) {
    let (m, v) = moments.decode();
    let mut next = [Vec::new(), Vec::new()];
    for (i, p) in p.iter_mut().enumerate() {
        let m = m[i] * f.beta1 + g[i] * f.one_minus_beta1;
        let v = v[i] * f.beta2 + g[i] * g[i] * f.one_minus_beta2;
        *p = *p * f.decay - m / (v.sqrt() / f.second_correction + f.epsilon) * f.step_size;
        next[0].push(m);
        next[1].push(v);
    }
    let [m, v] = next;
    moments.m = nearest(&m, &levels(true), false);
    moments.v = nearest(&v, &levels(false), true);
}

fn nearest(values: &[f32], levels: &[f32; 256], keeps_positive: bool) -> Codes {
    let mut codes = Vec::new();
    let mut absmax = Vec::new();
    for block in values.chunks(BLOCK) {
        let a = block.iter().fold(0.0, |most: f32, x| most.max(x.abs()));
        absmax.push(a);
        for x in block {
            let scaled = if a > 0.0 { x * (1.0 / a) } else { 0.0 };
            let allowed = |level: f32| !(keeps_positive && *x > 0.0) || level > 0.0;
            let distance = |i: &usize| (levels[*i] - scaled).abs();
            let best =
                (0..256).filter(|i| allowed(levels[*i])).min_by(|a, b| distance(a).total_cmp(&distance(b)));
            codes.push(best.unwrap_or_default() as u8);
        }
    }
    Codes { codes, absmax }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{random, values};

    const FACTORS: AdamWFactors = AdamWFactors {
        beta1: 0.9,
        beta2: 0.999,
        one_minus_beta1: 0.1,
        one_minus_beta2: 0.001,
        decay: 0.9999,
        step_size: 1e-2,
        second_correction: 0.1,
        epsilon: 1e-8,
    };

    #[test]
    fn levels_are_those_of_the_paper() {
        for (signed, lowest, smallest) in [(true, -0.992_968_75_f32, 5.5e-7_f32), (false, 0.0, 3.25e-7)] {
            let levels = levels(signed);
            assert!(levels.windows(2).all(|pair| pair[0] < pair[1]));
            assert!((levels[0] - lowest).abs() < 1e-6, "{}", levels[0]);
            assert!((levels[255] - 1.0).abs() < 1e-9);
            let positive = levels.iter().copied().filter(|level| *level > 0.0).fold(1.0, f32::min);
            assert!((positive / smallest - 1.0).abs() < 1e-5, "{positive}");
        }
    }

    #[test]
    fn the_nearest_level_is_found_for_any_value() {
        for (map, signed) in [(&*SIGNED, true), (&*UNSIGNED, false)] {
            let levels = levels(signed);
            let near = |x: f32, code: u8| {
                let distance = |level: f32| (level - x).abs();
                let best = levels.iter().map(|level| distance(*level)).fold(f32::INFINITY, f32::min);
                assert!(distance(levels[usize::from(code)]) <= best, "{x}: code {code}");
            };
            let magnitudes = (0..200_000).map(|i| 10_f32.powf(-8.0 * i as f32 / 200_000.0));
            for x in magnitudes.chain([0.0, f32::MIN_POSITIVE, 1e-40]) {
                near(x, map.code(x));
                if signed {
                    near(-x, map.code(-x));
                }
            }
        }
    }

    /// Rounding may go to either side of a midpoint: at most one value in a thousand differs, and by one level.
    #[test]
    fn steps_equal_the_reference() {
        let shape = [7, 1000]; // a last block that is not whole
        let len = shape[0] * shape[1];
        let mut p = random(1, shape);
        let mut want = values(p.clone());
        let (mut moments, mut wanted) = (Moments8bit::zeros(len), Moments8bit::zeros(len));
        for seed in 2..6 {
            let g = random(seed, shape).powi_scalar(3).mul_scalar(1e-3);
            reference(&mut want, &values(g.clone()), &mut wanted, FACTORS);
            p = adamw_8bit(p, &g, &mut moments, FACTORS);
            for (got, want) in [(&moments.m, &wanted.m), (&moments.v, &wanted.v)] {
                let differs = got.codes.iter().zip(&want.codes).filter(|(a, b)| a != b).count();
                assert!(differs <= len / 1000, "{differs} of {len} codes differ");
                assert!(got.codes.iter().zip(&want.codes).all(|(a, b)| a.abs_diff(*b) <= 1));
            }
            moments = wanted.clone();
            let got = values(p.clone());
            assert!(
                got.iter().zip(&want).all(|(a, b)| (a - b).abs() <= 1e-6),
                "parameters after seed {seed}"
            );
            p = Tensor::from_data(burn::tensor::TensorData::new(want.clone(), shape), &p.device());
        }
    }

    #[test]
    fn a_small_second_moment_does_not_vanish() {
        let shape = [1, 256];
        let mut g = vec![1e-6_f32; 256];
        g[0] = 1.0;
        let g = Tensor::from_data(burn::tensor::TensorData::new(g, shape), &random(1, shape).device());
        let mut moments = Moments8bit::zeros(256);
        adamw_8bit(random(1, shape), &g, &mut moments, FACTORS);
        assert!(moments.decode().1.iter().all(|v| *v > 0.0));
    }

    #[test]
    fn moments_stay_within_half_a_level() {
        let shape = [16, 256];
        let g = random(3, shape);
        let mut moments = Moments8bit::zeros(16 * 256);
        adamw_8bit(random(1, shape), &g, &mut moments, FACTORS);
        let (m, v) = moments.decode();
        for (block, g) in values(g).chunks(BLOCK).enumerate() {
            let largest = g.iter().fold(0.0, |most: f32, x| most.max(x.abs()));
            for (i, g) in g.iter().enumerate() {
                // Decades are parted at tenths: below the first, levels are at most 1/64 of a decade apart, half of it.
                let error = (m[block * BLOCK + i] - 0.1 * g).abs() / (0.1 * largest);
                assert!(error < 0.0071, "m off by {error} of the largest");
                let error = (v[block * BLOCK + i] - 0.001 * g * g).abs() / (0.001 * largest * largest);
                assert!(error < 0.0036, "v off by {error} of the largest");
            }
        }
    }
}
