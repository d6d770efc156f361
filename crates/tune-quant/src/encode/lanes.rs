//! Vectors of `f32` on which the encoders are written once and compiled for each instruction set.
//!
//! Every operation is the IEEE one, lane by lane, and nothing is fused or reordered. A lane therefore computes exactly
//! what a scalar loop computes, which is what makes the encoded bytes independent of the processor: sixteen blocks are
//! encoded side by side, one a lane, instead of one block in pieces whose sums would have to be reassociated.

use std::ops::{Add, Div, Mul, Sub};

/// Blocks or sub-blocks that are encoded side by side; every vector width divides it.
pub(super) const SIDE_BY_SIDE: usize = 16;

/// One value of each of the blocks side by side.
#[derive(Clone, Copy)]
#[repr(align(64))]
pub(super) struct Column(pub(super) [f32; SIDE_BY_SIDE]);

impl Column {
    pub(super) const ZERO: Self = Self([0.0; SIDE_BY_SIDE]);
}

/// `1.5 · 2^23`: added to a number below 2^22 in magnitude, it leaves that number rounded to the nearest integer, ties
/// to even, in the low bits of the sum.
pub(super) const ROUNDING: f32 = 12_582_912.0;

/// A vector of [`LANES`](Self::LANES) singles.
pub(super) trait Lanes:
    Copy + Add<Output = Self> + Sub<Output = Self> + Mul<Output = Self> + Div<Output = Self>
{
    /// Its width, which divides [`SIDE_BY_SIDE`].
    const LANES: usize;
    /// What a comparison yields.
    type Mask: Copy;

    fn splat(value: f32) -> Self;
    /// The first [`LANES`](Self::LANES) of the values.
    fn load_values(values: &[f32]) -> Self;
    /// Lanes `at..at + LANES` of a column.
    fn load(column: &Column, at: usize) -> Self;
    fn store(self, column: &mut Column, at: usize);
    /// Stores the integers of numbers from −128 to 255, truncated, as bytes.
    fn store_bytes(self, bytes: &mut [u8; SIDE_BY_SIDE], at: usize);
    /// Stores the low four bits of the integers of numbers from 0 to 255, truncated: `low` in low nibbles, `high` in high
    /// ones.
    fn store_nibbles(low: Self, high: Self, bytes: &mut [u8; SIDE_BY_SIDE], at: usize);

    fn abs(self) -> Self;
    fn with_sign_of(self, other: Self) -> Self;
    fn sqrt(self) -> Self;
    fn min(self, other: Self) -> Self;
    fn max(self, other: Self) -> Self;
    /// To the nearest integer, ties to even; the number is below 2^22 in magnitude.
    fn round(self) -> Self;
    /// As [`round`](Self::round), and for all other numbers what [`nearest_int`] says.
    fn nearest_int(self) -> Self;

    fn less(self, other: Self) -> Self::Mask;
    fn equal(self, other: Self) -> Self::Mask;
    fn differs(self, other: Self) -> Self::Mask;
    fn both(a: Self::Mask, b: Self::Mask) -> Self::Mask;
    fn any(mask: Self::Mask) -> bool;
    /// Bit i for lane i.
    fn bits(mask: Self::Mask) -> u32;
    /// `a` where the mask is set, else `b`.
    fn select(mask: Self::Mask, a: Self, b: Self) -> Self;

    /// The lanes of both in turn: a₀ b₀ a₁ b₁ …, first and second half.
    fn interleave(self, other: Self) -> (Self, Self);

    /// The rank of the nearest of sixteen levels, and that level; the last for what is not a number.
    fn nearest_level(self, levels: &Levels) -> (Self, Self);
}

/// Sixteen rising levels and the midpoints between them.
pub(super) struct Levels {
    pub(super) levels: [f32; 16],
    /// The midpoints as a binary search tree: node n has the children 2n and 2n + 1; node 0 is unused.
    pub(super) tree: [f32; 16],
}

impl Levels {
    pub(super) const fn new(levels: [f32; 16]) -> Self {
        let mut tree = [0.0; 16];
        let mut node = 1_usize;
        while node < 16 {
            // The nodes of a depth split the sixteen ranks evenly; a node's midpoint lies below its right half.
            let depth = node.ilog2();
            let right = (2 * (node - (1 << depth)) + 1) * (8 >> depth);
            tree[node] = f32::midpoint(levels[right - 1], levels[right]);
            node += 1;
        }
        Self { levels, tree }
    }
}

/// Rounding as the reference does it, by reading the low bits of `v + ROUNDING`. Where `v` is 2^22 or more in
/// magnitude, infinite or not a number, these bits hold something else, which decides codes of blocks with extreme
/// ratios between values.
#[inline(always)]
pub(super) fn nearest_int(v: f32) -> i32 {
    ((v + ROUNDING).to_bits() & 0x007F_FFFF) as i32 - 0x0040_0000
}

/// For processors without a vector type below: plain arrays, which the compiler vectorises as it can.
#[derive(Clone, Copy)]
pub(super) struct Portable([f32; 8]);

impl Portable {
    #[inline(always)]
    #[allow(clippy::inline_always)] // takes the instruction set of the caller
    fn zip(self, other: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        Self(std::array::from_fn(|i| f(self.0[i], other.0[i])))
    }
}

macro_rules! portable_operator {
    ($($operator:ident $method:ident $symbol:tt),*) => {$(
        impl $operator for Portable {
            type Output = Self;

            #[inline(always)]
            fn $method(self, other: Self) -> Self {
                self.zip(other, |a, b| a $symbol b)
            }
        }
    )*};
}

portable_operator!(Add add +, Sub sub -, Mul mul *, Div div /);

#[allow(clippy::inline_always)] // takes the instruction set of the caller
#[allow(clippy::float_cmp)] // as the vectors do
impl Lanes for Portable {
    const LANES: usize = 8;
    type Mask = [bool; 8];

    #[inline(always)]
    fn splat(value: f32) -> Self {
        Self([value; 8])
    }

    #[inline(always)]
    fn load_values(values: &[f32]) -> Self {
        Self(std::array::from_fn(|i| values[i]))
    }

    #[inline(always)]
    fn load(column: &Column, at: usize) -> Self {
        Self::load_values(&column.0[at..])
    }

    #[inline(always)]
    fn store(self, column: &mut Column, at: usize) {
        column.0[at..at + 8].copy_from_slice(&self.0);
    }

    #[inline(always)]
    fn store_bytes(self, bytes: &mut [u8; SIDE_BY_SIDE], at: usize) {
        bytes[at..at + 8].copy_from_slice(&self.0.map(|v| v as i32 as u8));
    }

    #[inline(always)]
    fn store_nibbles(low: Self, high: Self, bytes: &mut [u8; SIDE_BY_SIDE], at: usize) {
        for (i, byte) in bytes[at..at + 8].iter_mut().enumerate() {
            *byte = low.0[i] as u8 & 15 | (high.0[i] as u8) << 4;
        }
    }

    #[inline(always)]
    fn abs(self) -> Self {
        Self(self.0.map(f32::abs))
    }

    #[inline(always)]
    fn with_sign_of(self, other: Self) -> Self {
        self.zip(other, f32::copysign)
    }

    #[inline(always)]
    fn sqrt(self) -> Self {
        Self(self.0.map(f32::sqrt))
    }

    #[inline(always)]
    fn min(self, other: Self) -> Self {
        self.zip(other, |a, b| if a < b { a } else { b })
    }

    #[inline(always)]
    fn max(self, other: Self) -> Self {
        self.zip(other, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    fn round(self) -> Self {
        Self(self.0.map(|v| (v + ROUNDING) - ROUNDING))
    }

    #[inline(always)]
    fn nearest_int(self) -> Self {
        Self(self.0.map(|v| nearest_int(v) as f32))
    }

    #[inline(always)]
    fn less(self, other: Self) -> [bool; 8] {
        std::array::from_fn(|i| self.0[i] < other.0[i])
    }

    #[inline(always)]
    fn equal(self, other: Self) -> [bool; 8] {
        std::array::from_fn(|i| self.0[i] == other.0[i])
    }

    #[inline(always)]
    fn differs(self, other: Self) -> [bool; 8] {
        std::array::from_fn(|i| self.0[i] != other.0[i])
    }

    #[inline(always)]
    fn both(a: [bool; 8], b: [bool; 8]) -> [bool; 8] {
        std::array::from_fn(|i| a[i] && b[i])
    }

    #[inline(always)]
    fn any(mask: [bool; 8]) -> bool {
        mask.contains(&true)
    }

    #[inline(always)]
    fn bits(mask: [bool; 8]) -> u32 {
        mask.iter().rev().fold(0, |bits, &lane| bits << 1 | u32::from(lane))
    }

    #[inline(always)]
    fn select(mask: [bool; 8], a: Self, b: Self) -> Self {
        Self(std::array::from_fn(|i| if mask[i] { a.0[i] } else { b.0[i] }))
    }

    #[inline(always)]
    fn interleave(self, other: Self) -> (Self, Self) {
        let half = |from: usize| Self(std::array::from_fn(|i| [self, other][i % 2].0[from + i / 2]));
        (half(0), half(4))
    }

    #[inline(always)]
    fn nearest_level(self, levels: &Levels) -> (Self, Self) {
        let ranks = self.0.map(|v| {
            let mut node = 1;
            for _ in 0..4 {
                let is_below = v < levels.tree[node];
                node = 2 * node + usize::from(!is_below);
            }
            node - 16
        });
        (Self(ranks.map(|rank| rank as f32)), Self(ranks.map(|rank| levels.levels[rank])))
    }
}
