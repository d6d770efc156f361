//! Stored blocks decoded in registers, sixteen values at a time. Layouts as in `tune-quant`, whose scalar decoders
//! are the reference: every value has the same bits.

#![allow(
    clippy::inline_always,
    reason = "a vector instruction is one only where it is inlined into a function compiled for its set"
)]

use super::Sums;
use super::lanes::Lanes;

/// A storage type with blocks of `BYTES` bytes.
pub(super) trait Block<const BYTES: usize> {
    /// Values of a block, a multiple of 32.
    const LEN: usize;

    /// Adds to `sums` the products with the values of `block`, the first of which is in column `col`.
    fn add_to<S: Lanes, const M: usize>(block: &[u8; BYTES], col: usize, sums: &mut Sums<S, M>);
}

pub(super) struct F32;
pub(super) struct F16;
pub(super) struct Bf16;
pub(super) struct Q4_0;
pub(super) struct Q4_1;
pub(super) struct Q5_0;
pub(super) struct Q5_1;
pub(super) struct Q8_0;
pub(super) struct Q4K;
pub(super) struct Q5K;
pub(super) struct Q6K;

impl Block<128> for F32 {
    const LEN: usize = 32;

    #[inline(always)]
    fn add_to<S: Lanes, const M: usize>(block: &[u8; 128], col: usize, sums: &mut Sums<S, M>) {
        for (i, bytes) in block.as_chunks::<64>().0.iter().enumerate() {
            let values: [f32; 16] = std::array::from_fn(|j| f32::from_le_bytes(*part(bytes, 4 * j)));
            sums.add(col, i, S::load(&values));
        }
    }
}

impl Block<64> for F16 {
    const LEN: usize = 32;

    #[inline(always)]
    fn add_to<S: Lanes, const M: usize>(block: &[u8; 64], col: usize, sums: &mut Sums<S, M>) {
        sums.add(col, 0, S::from_halves(part(block, 0)));
        sums.add(col, 1, S::from_halves(part(block, 32)));
    }
}

impl Block<64> for Bf16 {
    const LEN: usize = 32;

    #[inline(always)]
    fn add_to<S: Lanes, const M: usize>(block: &[u8; 64], col: usize, sums: &mut Sums<S, M>) {
        sums.add(col, 0, S::from_bf16(part(block, 0)));
        sums.add(col, 1, S::from_bf16(part(block, 32)));
    }
}

impl Block<18> for Q4_0 {
    const LEN: usize = 32;

    #[inline(always)]
    fn add_to<S: Lanes, const M: usize>(block: &[u8; 18], col: usize, sums: &mut Sums<S, M>) {
        let scale = S::splat_half(*part(block, 0));
        let ramp = S::ramp(scale, scale.mul(S::splat(-8.0)));
        let codes = S::unsigned(part(block, 2));
        sums.add(col, 0, S::nibble_value(ramp, codes));
        sums.add(col, 1, S::nibble_value(ramp, S::shift_right::<4>(codes)));
    }
}

impl Block<20> for Q4_1 {
    const LEN: usize = 32;

    #[inline(always)]
    fn add_to<S: Lanes, const M: usize>(block: &[u8; 20], col: usize, sums: &mut Sums<S, M>) {
        let ramp = S::ramp(S::splat_half(*part(block, 0)), S::splat_half(*part(block, 2)));
        let codes = S::unsigned(part(block, 4));
        sums.add(col, 0, S::nibble_value(ramp, codes));
        sums.add(col, 1, S::nibble_value(ramp, S::shift_right::<4>(codes)));
    }
}

impl Block<22> for Q5_0 {
    const LEN: usize = 32;

    #[inline(always)]
    fn add_to<S: Lanes, const M: usize>(block: &[u8; 22], col: usize, sums: &mut Sums<S, M>) {
        let scale = S::splat_half(*part(block, 0));
        let offset = scale.mul(S::splat(-16.0));
        add_five_bits(scale, offset, part(block, 2), part(block, 6), col, sums);
    }
}

impl Block<24> for Q5_1 {
    const LEN: usize = 32;

    #[inline(always)]
    fn add_to<S: Lanes, const M: usize>(block: &[u8; 24], col: usize, sums: &mut Sums<S, M>) {
        let (scale, offset) = (S::splat_half(*part(block, 0)), S::splat_half(*part(block, 2)));
        add_five_bits(scale, offset, part(block, 4), part(block, 8), col, sums);
    }
}

/// `scale · q + offset` for the codes q of a Q5_0 or Q5_1 block.
#[inline(always)]
fn add_five_bits<S: Lanes, const M: usize>(
    scale: S,
    offset: S,
    fifth: &[u8; 4],
    codes: &[u8; 16],
    col: usize,
    sums: &mut Sums<S, M>,
) {
    let codes = S::unsigned(codes);
    let halves = [S::and(codes, 15), S::shift_right::<4>(codes)];
    for (i, low_bits) in halves.into_iter().enumerate() {
        let fifth = u16::from_le_bytes(*part(fifth, 2 * i));
        let codes = S::or(low_bits, S::bit_as_16(fifth));
        sums.add(col, i, S::to_floats(codes).mul_add(scale, offset));
    }
}

impl Block<34> for Q8_0 {
    const LEN: usize = 32;

    #[inline(always)]
    fn add_to<S: Lanes, const M: usize>(block: &[u8; 34], col: usize, sums: &mut Sums<S, M>) {
        let scale = S::splat_half(*part(block, 0));
        sums.add(col, 0, S::to_floats(S::signed(part(block, 2))).mul(scale));
        sums.add(col, 1, S::to_floats(S::signed(part(block, 18))).mul(scale));
    }
}

impl Block<144> for Q4K {
    const LEN: usize = 256;

    #[inline(always)]
    fn add_to<S: Lanes, const M: usize>(block: &[u8; 144], col: usize, sums: &mut Sums<S, M>) {
        let [scales, offsets] = scales_and_offsets::<S>(part(block, 0));
        for c in 0..4 {
            let low = S::ramp(S::splat(scales[2 * c]), S::splat(offsets[2 * c]));
            let high = S::ramp(S::splat(scales[2 * c + 1]), S::splat(offsets[2 * c + 1]));
            for l in 0..2 {
                let codes = S::unsigned(part(block, 16 + 32 * c + 16 * l));
                sums.add(col, 4 * c + l, S::nibble_value(low, codes));
                sums.add(col, 4 * c + 2 + l, S::nibble_value(high, S::shift_right::<4>(codes)));
            }
        }
    }
}

impl Block<176> for Q5K {
    const LEN: usize = 256;

    #[inline(always)]
    fn add_to<S: Lanes, const M: usize>(block: &[u8; 176], col: usize, sums: &mut Sums<S, M>) {
        let [scales, offsets] = scales_and_offsets::<S>(part(block, 0));
        let mut fifth = [S::unsigned(part(block, 16)), S::unsigned(part(block, 32))];
        for c in 0..4 {
            for (l, fifth) in fifth.iter_mut().enumerate() {
                let codes = S::unsigned(part(block, 48 + 32 * c + 16 * l));
                let low = S::or(S::and(codes, 15), S::and(S::shift_left::<4>(*fifth), 16));
                let high = S::or(S::shift_right::<4>(codes), S::and(S::shift_left::<3>(*fifth), 16));
                for (half, codes) in [low, high].into_iter().enumerate() {
                    let (scale, offset) = (scales[2 * c + half], offsets[2 * c + half]);
                    let values = S::to_floats(codes).mul_add(S::splat(scale), S::splat(offset));
                    sums.add(col, 4 * c + 2 * half + l, values);
                }
                *fifth = S::shift_right::<2>(*fifth);
            }
        }
    }
}

impl Block<210> for Q6K {
    const LEN: usize = 256;

    #[inline(always)]
    fn add_to<S: Lanes, const M: usize>(block: &[u8; 210], col: usize, sums: &mut Sums<S, M>) {
        let mut scales = [0.0; 16];
        S::to_floats(S::signed(part(block, 192))).mul(S::splat_half(*part(block, 208))).store(&mut scales);
        for c in 0..2 {
            for l in 0..2 {
                let low = [0, 1].map(|t| S::unsigned(part(block, 64 * c + 32 * t + 16 * l)));
                let mut upper = S::unsigned(part(block, 128 + 32 * c + 16 * l));
                for t in 0..4 {
                    let nibbles = if t < 2 { S::and(low[t], 15) } else { S::shift_right::<4>(low[t - 2]) };
                    let codes = S::or(nibbles, S::and(S::shift_left::<4>(upper), 48));
                    let at = 8 * c + 2 * t + l;
                    let centred = S::to_floats(codes).add(S::splat(-32.0));
                    sums.add(col, at, centred.mul(S::splat(scales[at])));
                    upper = S::shift_right::<2>(upper);
                }
            }
        }
    }
}

/// The scales of the eight sub-blocks of a Q4_K or Q5_K block, and their minima with the sign turned, each in the
/// first eight places. `head` is d · dmin · twelve bytes of 6-bit numbers.
#[inline(always)]
fn scales_and_offsets<S: Lanes>(head: &[u8; 16]) -> [[f32; 16]; 2] {
    let word = |i: usize| u32::from_le_bytes(*part(head, 4 + 4 * i));
    let [a, b, c] = [word(0), word(1), word(2)];
    // four numbers in each word, one a byte
    let scales = [a & 0x3F3F_3F3F, c & 0x0F0F_0F0F | (a >> 2) & 0x3030_3030];
    let minima = [b & 0x3F3F_3F3F, (c >> 4) & 0x0F0F_0F0F | (b >> 2) & 0x3030_3030];
    let of = |[low, high]: [u32; 2], factor: S| {
        let mut bytes = [0; 16];
        bytes[..4].copy_from_slice(&low.to_le_bytes());
        bytes[4..8].copy_from_slice(&high.to_le_bytes());
        let mut values = [0.0; 16];
        S::to_floats(S::unsigned(&bytes)).mul(factor).store(&mut values);
        values
    };
    let minimum = S::splat_half(*part(head, 2)).mul(S::splat(-1.0));
    [of(scales, S::splat_half(*part(head, 0))), of(minima, minimum)]
}

/// `N` bytes of a block from `start` on.
#[inline(always)]
pub(super) fn part<const N: usize>(block: &[u8], start: usize) -> &[u8; N] {
    block[start..].first_chunk().expect("a part lies inside its block")
}
