//! Sixteen floats at once: what decoding a stored block in registers needs, for each instruction set.

#![allow(
    clippy::inline_always,
    reason = "a vector instruction is one only where it is inlined into a function compiled for its set"
)]

use half::{bf16, f16};

/// Sixteen `f32` lanes.
///
/// The instruction sets with fused multiply-add all give the same bits; [`Portable`] rounds twice instead.
pub(super) trait Lanes: Copy {
    /// Sixteen integers, in the same lanes.
    type Codes: Copy;
    /// What [`nibble_value`](Self::nibble_value) needs to know of a scale and an offset.
    type Ramp: Copy;

    fn splat(value: f32) -> Self;
    fn load(values: &[f32; 16]) -> Self;
    fn store(self, values: &mut [f32; 16]);
    fn mul(self, factor: Self) -> Self;
    /// `self · factor + addend`.
    fn mul_add(self, factor: Self, addend: Self) -> Self;
    fn add(self, other: Self) -> Self;
    /// The sum of all lanes, in a fixed order: halves, quarters, eighths, sixteenths.
    fn sum(self) -> f32;

    /// The little-endian half-precision number in all lanes.
    fn splat_half(half: [u8; 2]) -> Self;
    /// Sixteen little-endian half-precision numbers.
    fn from_halves(bytes: &[u8; 32]) -> Self;
    /// Sixteen little-endian `bf16` numbers.
    fn from_bf16(bytes: &[u8; 32]) -> Self;

    /// Sixteen unsigned bytes.
    fn unsigned(bytes: &[u8; 16]) -> Self::Codes;
    /// Sixteen signed bytes.
    fn signed(bytes: &[u8; 16]) -> Self::Codes;
    /// The sixteen nibbles of eight bytes, the high one of each byte first, with other bits above them.
    fn nibbles_high_first(bytes: [u8; 8]) -> Self::Codes;
    /// 16 in the lanes whose bit is set, else 0.
    fn bit_as_16(bits: u16) -> Self::Codes;
    /// Bits `SHIFT ..` of each code; of a code that is not negative.
    fn shift_right<const SHIFT: u32>(codes: Self::Codes) -> Self::Codes;
    /// Each code times `2^SHIFT`.
    fn shift_left<const SHIFT: u32>(codes: Self::Codes) -> Self::Codes;
    fn and(codes: Self::Codes, mask: u32) -> Self::Codes;
    fn or(codes: Self::Codes, other: Self::Codes) -> Self::Codes;
    /// The codes as numbers.
    fn to_floats(codes: Self::Codes) -> Self;

    /// Prepares `scale · code + offset` for codes from 0 to 15. All sixteen values must be exact before the
    /// offset is added, so that fused and separate rounding agree.
    fn ramp(scale: Self, offset: Self) -> Self::Ramp;
    /// `scale · code + offset` for the low nibble of each code.
    fn nibble_value(ramp: Self::Ramp, codes: Self::Codes) -> Self;
    /// The entry of `table` at the low nibble of each code.
    fn lookup(table: Self, codes: Self::Codes) -> Self;
}

/// Sixteen lanes in plain Rust. The compiler vectorises it for the baseline of the target.
#[derive(Clone, Copy)]
pub(super) struct Portable([f32; 16]);

impl Portable {
    #[inline(always)]
    fn zip(self, other: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        Self(std::array::from_fn(|i| f(self.0[i], other.0[i])))
    }
}

impl Lanes for Portable {
    type Codes = [i32; 16];
    type Ramp = (Self, Self);

    #[inline(always)]
    fn splat(value: f32) -> Self {
        Self([value; 16])
    }

    #[inline(always)]
    fn load(values: &[f32; 16]) -> Self {
        Self(*values)
    }

    #[inline(always)]
    fn store(self, values: &mut [f32; 16]) {
        *values = self.0;
    }

    #[inline(always)]
    fn mul(self, factor: Self) -> Self {
        self.zip(factor, |a, b| a * b)
    }

    #[inline(always)]
    fn mul_add(self, factor: Self, addend: Self) -> Self {
        // Without the instruction, `f32::mul_add` is a slow library call.
        let fused = cfg!(any(target_feature = "fma", target_arch = "aarch64"));
        let term = |i: usize| {
            let (a, b, c) = (self.0[i], factor.0[i], addend.0[i]);
            if fused { a.mul_add(b, c) } else { a * b + c }
        };
        Self(std::array::from_fn(term))
    }

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        self.zip(other, |a, b| a + b)
    }

    #[inline(always)]
    fn sum(self) -> f32 {
        let mut lanes = self.0;
        for width in [8, 4, 2, 1] {
            for i in 0..width {
                lanes[i] += lanes[i + width];
            }
        }
        lanes[0]
    }

    #[inline(always)]
    fn splat_half(half: [u8; 2]) -> Self {
        Self::splat(f16::from_le_bytes(half).to_f32_const())
    }

    #[inline(always)]
    fn from_halves(bytes: &[u8; 32]) -> Self {
        Self(std::array::from_fn(|i| f16::from_le_bytes([bytes[2 * i], bytes[2 * i + 1]]).to_f32_const()))
    }

    #[inline(always)]
    fn from_bf16(bytes: &[u8; 32]) -> Self {
        Self(std::array::from_fn(|i| bf16::from_le_bytes([bytes[2 * i], bytes[2 * i + 1]]).to_f32_const()))
    }

    #[inline(always)]
    fn unsigned(bytes: &[u8; 16]) -> Self::Codes {
        bytes.map(i32::from)
    }

    #[inline(always)]
    fn signed(bytes: &[u8; 16]) -> Self::Codes {
        bytes.map(|byte| i32::from(byte as i8))
    }

    #[inline(always)]
    fn nibbles_high_first(bytes: [u8; 8]) -> Self::Codes {
        std::array::from_fn(|i| i32::from(bytes[i / 2]) >> (4 * (1 - i % 2)))
    }

    #[inline(always)]
    fn bit_as_16(bits: u16) -> Self::Codes {
        std::array::from_fn(|i| i32::from(bits >> i & 1) << 4)
    }

    #[inline(always)]
    fn shift_right<const SHIFT: u32>(codes: Self::Codes) -> Self::Codes {
        codes.map(|code| code >> SHIFT)
    }

    #[inline(always)]
    fn shift_left<const SHIFT: u32>(codes: Self::Codes) -> Self::Codes {
        codes.map(|code| code << SHIFT)
    }

    #[inline(always)]
    fn and(codes: Self::Codes, mask: u32) -> Self::Codes {
        codes.map(|code| code & mask as i32)
    }

    #[inline(always)]
    fn or(codes: Self::Codes, other: Self::Codes) -> Self::Codes {
        std::array::from_fn(|i| codes[i] | other[i])
    }

    #[inline(always)]
    fn to_floats(codes: Self::Codes) -> Self {
        Self(codes.map(|code| code as f32))
    }

    #[inline(always)]
    fn ramp(scale: Self, offset: Self) -> Self::Ramp {
        (scale, offset)
    }

    #[inline(always)]
    fn nibble_value((scale, offset): Self::Ramp, codes: Self::Codes) -> Self {
        Self::to_floats(Self::and(codes, 15)).mul_add(scale, offset)
    }

    #[inline(always)]
    fn lookup(table: Self, codes: Self::Codes) -> Self {
        Self(codes.map(|code| table.0[code as usize & 15]))
    }
}
