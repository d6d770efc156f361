//! NF4 with double quantisation, as bitsandbytes stores it.
//!
//! ```text
//! w[i] = code[q_i] · absmax[i / 64]
//! absmax[b] = map[a_b] · nested_absmax[b / 256] + offset
//! ```
//!
//! The 16 codes are the quantiles of a normal distribution, scaled to [−1, 1]; the map of 256 entries is the
//! "dynamic" 8-bit type. Dettmers et al. 2023, arXiv 2305.14314, section 3; 2021, arXiv 2110.02861, section 1.3.
//! Blocks run over the flattened matrix, across row ends; the last one may be shorter. 4.127 bits per weight.

use std::sync::LazyLock;

use crate::{Decoded, InstructionSet};

/// Values that share one scale.
pub const BLOCK: usize = 64;
/// Scales that share one nested scale.
pub const NESTED_BLOCK: usize = 256;

/// The values of the codes, ascending.
pub const CODES: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// A value above `MIDPOINTS[i]` rounds to a code above `i`. bitsandbytes writes the midpoints as decimals of its
/// own, which are not in every case the nearest single to the mean of two codes.
const MIDPOINTS: [f32; 15] = [
    -0.848_096_4,
    -0.610_632_9,
    -0.459_995_27,
    -0.339_679_42,
    -0.234_607_41,
    -0.137_911_74,
    -0.045_525,
    0.039_790_15,
    0.120_255_25,
    0.203_521_25,
    0.292_013_76,
    0.389_312_54,
    0.501_663_4,
    0.642_786_9,
    0.861_478_4,
];

/// The two values of each byte, first element (high nibble) first: one load instead of two shifts and two loads.
static PAIRS: [[f32; 2]; 256] = pairs();

/// Values quantised to NF4 with double-quantised scales.
#[derive(Clone, Debug)]
pub struct Nf4 {
    len: usize,
    /// Element 2k in the high nibble of byte k, element 2k + 1 in the low one.
    packed: Vec<u8>,
    absmax_codes: Vec<u8>,
    nested_absmax: Vec<f32>,
    offset: f32,
}

impl Nf4 {
    /// Quantises `values`.
    pub fn quantize(values: &[f32]) -> Self {
        let mut quantizer = Nf4Quantizer::with_capacity(values.len());
        quantizer.push(values);
        quantizer.finish()
    }

    /// Number of values.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no values.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The stored arrays, as a kernel on another device needs them.
    pub fn parts(&self) -> Nf4Parts<'_> {
        Nf4Parts {
            packed: &self.packed,
            absmax_codes: &self.absmax_codes,
            nested_absmax: &self.nested_absmax,
            offset: self.offset,
        }
    }

    /// Bytes of codes and scales.
    pub fn stored_bytes(&self) -> usize {
        self.packed.len() + self.absmax_codes.len() + 4 * (self.nested_absmax.len() + 1)
    }

    /// Decodes the values `first_element..first_element + out.len()`, exactly or rounded to `bf16`.
    ///
    /// # Panics
    ///
    /// If the range reaches beyond the last value.
    pub fn decode<T: Decoded>(&self, first_element: usize, out: &mut [T]) {
        self.decode_with(InstructionSet::best(), first_element, out);
    }

    /// [`decode`](Self::decode) by other instructions than the fastest, to compare and to measure.
    pub fn decode_with<T: Decoded>(&self, instructions: InstructionSet, first_element: usize, out: &mut [T]) {
        assert!(
            first_element <= self.len && out.len() <= self.len - first_element,
            "values {first_element}..+{} of {}",
            out.len(),
            self.len
        );
        let head_len = (first_element.next_multiple_of(BLOCK) - first_element).min(out.len());
        let (head, rest) = out.split_at_mut(head_len);
        self.decode_part_of_block(first_element, head);
        let first_block = first_element.div_ceil(BLOCK);
        let (blocks, tail) = rest.as_chunks_mut::<BLOCK>();
        let packed =
            self.packed[(first_block * BLOCK / 2).min(self.packed.len())..].as_chunks::<{ BLOCK / 2 }>().0;
        instructions.decode_nf4(packed, self.scales(first_block), blocks);
        let tail_start = (first_block + blocks.len()) * BLOCK;
        self.decode_part_of_block(tail_start, tail);
    }

    /// Decodes a run of values that lies within one block, at any start.
    fn decode_part_of_block<T: Decoded>(&self, first_element: usize, out: &mut [T]) {
        let Some(scale) = self.scales(first_element / BLOCK).next().filter(|_| !out.is_empty()) else {
            return;
        };
        for (i, value) in (first_element..).zip(out) {
            *value = T::from_f32(PAIRS[usize::from(self.packed[i / 2])][i % 2] * scale);
        }
    }

    /// The scales of the blocks from `first_block` on.
    #[inline]
    fn scales(&self, first_block: usize) -> impl Iterator<Item = f32> {
        let map = dynamic_map();
        let codes = &self.absmax_codes[first_block.min(self.absmax_codes.len())..];
        codes.iter().zip(first_block..).map(|(&code, block)| {
            map[usize::from(code)] * self.nested_absmax[block / NESTED_BLOCK] + self.offset
        })
    }
}

/// Decodes whole blocks; the scalar reference.
pub(crate) fn decode_blocks<T: Decoded>(
    packed: &[[u8; BLOCK / 2]],
    scales: impl Iterator<Item = f32>,
    out: &mut [[T; BLOCK]],
) {
    for ((packed, scale), out) in packed.iter().zip(scales).zip(out) {
        for (pair, &byte) in out.as_chunks_mut::<2>().0.iter_mut().zip(packed) {
            *pair = PAIRS[usize::from(byte)].map(|code| T::from_f32(code * scale));
        }
    }
}

/// The stored arrays of an [`Nf4`].
#[derive(Clone, Copy, Debug)]
pub struct Nf4Parts<'a> {
    /// `ceil(len / 2)` bytes: element 2k in the high nibble of byte k, element 2k + 1 in the low one.
    pub packed: &'a [u8],
    /// Per block of [`BLOCK`] values, the index of its scale in [`dynamic_map`].
    pub absmax_codes: &'a [u8],
    /// Per [`NESTED_BLOCK`] scales, their own scale.
    pub nested_absmax: &'a [f32],
    /// Added to every scale.
    pub offset: f32,
}

/// Quantises a vector that arrives in pieces of any length, so that no caller needs all of it in `f32`.
#[derive(Debug, Default)]
pub struct Nf4Quantizer {
    len: usize,
    packed: Vec<u8>,
    absmax: Vec<f32>,
    /// Values of a block not yet complete.
    pending: Vec<f32>,
}

impl Nf4Quantizer {
    /// A quantiser with room for `len` values.
    pub fn with_capacity(len: usize) -> Self {
        Self {
            packed: Vec::with_capacity(len.div_ceil(2)),
            absmax: Vec::with_capacity(len.div_ceil(BLOCK)),
            ..Self::default()
        }
    }

    /// Appends `values`.
    pub fn push(&mut self, mut values: &[f32]) {
        self.len += values.len();
        if !self.pending.is_empty() {
            let (head, rest) = values.split_at(values.len().min(BLOCK - self.pending.len()));
            self.pending.extend_from_slice(head);
            values = rest;
            if self.pending.len() < BLOCK {
                return;
            }
            let pending = std::mem::take(&mut self.pending);
            self.push_block(&pending);
        }
        let blocks = values.chunks_exact(BLOCK);
        self.pending.extend_from_slice(blocks.remainder());
        for block in blocks {
            self.push_block(block);
        }
    }

    /// The quantised vector; this is where the scales are quantised, for their mean is known only now.
    pub fn finish(mut self) -> Nf4 {
        if !self.pending.is_empty() {
            let pending = std::mem::take(&mut self.pending);
            self.push_block(&pending);
        }
        let offset = mean(&self.absmax);
        let mut absmax_codes = Vec::with_capacity(self.absmax.len());
        let mut nested_absmax = Vec::with_capacity(self.absmax.len().div_ceil(NESTED_BLOCK));
        for block in self.absmax.chunks_mut(NESTED_BLOCK) {
            for absmax in block.iter_mut() {
                *absmax -= offset;
            }
            let absmax = largest_magnitude(block);
            let inverse = inverse_or_zero(absmax);
            nested_absmax.push(absmax);
            absmax_codes.extend(block.iter().map(|a| nearest_in_map(a * inverse)));
        }
        Nf4 { len: self.len, packed: self.packed, absmax_codes, nested_absmax, offset }
    }

    fn push_block(&mut self, block: &[f32]) {
        let absmax = largest_magnitude(block);
        let inverse = inverse_or_zero(absmax);
        let code = |x: f32| nearest_code(x * inverse);
        self.packed
            .extend(block.chunks(2).map(|pair| code(pair[0]) << 4 | pair.get(1).map_or(0, |&x| code(x))));
        self.absmax.push(absmax);
    }
}

/// The signed 8-bit map of the scales, ascending: seven decades with 1, 2, 4, … 64 values per sign, and 0 and 1.
pub fn dynamic_map() -> &'static [f32; 256] {
    static MAP: LazyLock<[f32; 256]> = LazyLock::new(build_dynamic_map);
    &MAP
}

fn build_dynamic_map() -> [f32; 256] {
    let mut map = [0.0; 256];
    map[255] = 1.0;
    let mut next = 0;
    for decade in 0..7u8 {
        let intervals = 1u16 << decade;
        let power = 10f32.powi(i32::from(decade) - 6);
        let boundary = |k: u16| boundary(k, intervals);
        for k in 0..intervals {
            let value = boundary(k).midpoint(boundary(k + 1)) * power;
            (map[next], map[next + 1]) = (value, -value);
            next += 2;
        }
    }
    map.sort_by(f32::total_cmp);
    map
}

/// Point `k` of `intervals + 1` equally spaced ones on [0.1, 1], counted from the nearer end and rounded once, as
/// torch does.
fn boundary(k: u16, intervals: u16) -> f32 {
    let step = (1.0 - 0.1) / f32::from(intervals);
    if k < intervals.div_ceil(2) {
        step.mul_add(f32::from(k), 0.1)
    } else {
        (-step).mul_add(f32::from(intervals - k), 1.0)
    }
}

const fn pairs() -> [[f32; 2]; 256] {
    let mut pairs = [[0.0; 2]; 256];
    let mut byte = 0;
    while byte < 256 {
        pairs[byte] = [CODES[byte >> 4], CODES[byte & 15]];
        byte += 1;
    }
    pairs
}

/// The mean in double precision: a sum of thousands of singles loses digits, and torch sums pairwise.
fn mean(values: &[f32]) -> f32 {
    if values.is_empty() {
        return 0.0;
    }
    (values.iter().map(|&v| f64::from(v)).sum::<f64>() / values.len() as f64) as f32
}

fn largest_magnitude(values: &[f32]) -> f32 {
    values.iter().fold(0.0, |max: f32, v| max.max(v.abs()))
}

fn inverse_or_zero(x: f32) -> f32 {
    if x == 0.0 { 0.0 } else { 1.0 / x }
}

fn nearest_code(x: f32) -> u8 {
    MIDPOINTS.iter().map(|&midpoint| u8::from(x > midpoint)).sum()
}

fn nearest_in_map(x: f32) -> u8 {
    let map = dynamic_map();
    let above = map.partition_point(|&v| v < x).min(255);
    let nearest = if above > 0 && x - map[above - 1] < map[above] - x { above - 1 } else { above };
    nearest as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_range_decodes_as_the_whole() {
        let values: Vec<f32> = (0..1000).map(|i| (i as f32 * 0.7).sin() * (1.0 + (i / 64) as f32)).collect();
        let nf4 = Nf4::quantize(&values);
        let mut whole = vec![0.0; values.len()];
        nf4.decode(0, &mut whole);
        for (start, len) in
            [(0, 1), (1, 63), (5, 7), (63, 2), (64, 64), (65, 200), (700, 300), (999, 1), (1000, 0)]
        {
            let mut part = vec![f32::NAN; len];
            nf4.decode(start, &mut part);
            assert_eq!(part, whole[start..start + len], "{len} values from {start}");
        }
    }

    #[test]
    fn pieces_quantise_as_the_whole() {
        let values: Vec<f32> = (0..777).map(|i| (i as f32).cos()).collect();
        let whole = Nf4::quantize(&values);
        for piece in [1, 7, 64, 100, 776] {
            let mut quantizer = Nf4Quantizer::default();
            values.chunks(piece).for_each(|v| quantizer.push(v));
            let pieces = quantizer.finish();
            assert_eq!((pieces.len(), &pieces.packed), (whole.len(), &whole.packed), "pieces of {piece}");
            assert_eq!(pieces.absmax_codes, whole.absmax_codes, "pieces of {piece}");
        }
    }

    #[test]
    fn zeros_and_equal_blocks_stay_finite() {
        for (values, want) in [(vec![0.0; 130], 0.0), (vec![-2.0; 130], -2.0)] {
            let mut out = vec![f32::NAN; values.len()];
            Nf4::quantize(&values).decode(0, &mut out);
            assert_eq!(out, vec![want; values.len()]);
        }
    }
}
