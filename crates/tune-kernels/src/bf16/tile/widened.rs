//! Tiles for processors that do not multiply `bf16`: factors become `f32` first, each once for many products, and fused
//! multiply-adds sum them in the same order as `vdpbf16ps` does, one addend after the other.
//!
//! A row of A serves all panels and a panel all rows, so widening them is some hundredth of the work, and what is packed and
//! stored stays half as large. The tile is [`Lanes::HEIGHT`] rows of two registers: 6 × 16 with AVX2, 12 × 32 with
//! AVX-512 F, and in plain Rust, which becomes NEON on aarch64, 6 × 16 again.

#![allow(clippy::inline_always, reason = "compiled for the registers of the caller")]

use super::{PanelRow, Part, WIDTH};
use crate::cpu::{Buffer, with_buffers};

/// Depth of what stays in the first-level cache while all rows are multiplied with it: of 16 columns, 16 KiB.
const DEPTH: usize = 256;

/// Sums `parts`, as [`multiply_parts`](super::multiply_parts) says.
///
/// # Safety
/// The rows of each part have `count` rows of as many pairs as its panels, and `sums` as many rows of [`WIDTH`] values for
/// each panel.
pub(super) unsafe fn multiply(
    registers: Registers,
    count: usize,
    parts: &[Part],
    sums: *mut f32,
    sum_stride: usize,
    accumulate: bool,
) {
    with_buffers(|factors: &mut Factors| match registers {
        // SAFETY: passed on to the caller; whoever names the registers of a processor knows that it has them.
        #[cfg(target_arch = "x86_64")]
        Registers::Avx512 => unsafe { x86::avx512(factors, count, parts, sums, sum_stride, accumulate) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Registers::Avx2 => unsafe { x86::avx2(factors, count, parts, sums, sum_stride, accumulate) },
        // SAFETY: as above.
        Registers::Plain => unsafe {
            make_sums::<Plain>(factors, count, parts, sums, sum_stride, accumulate);
        },
    });
}

/// What a tile is kept in.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Registers {
    /// Those of the target that the program was compiled for.
    Plain,
    /// With FMA.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

#[cfg(test)]
impl Registers {
    /// Those of this processor, whatever its products of `bf16` are made with.
    pub(super) fn available() -> Vec<Self> {
        let mut available = vec![Self::Plain];
        #[cfg(target_arch = "x86_64")]
        {
            use crate::cpu::InstructionSet;
            let widest = InstructionSet::best();
            available.extend((widest >= InstructionSet::Avx2).then_some(Self::Avx2));
            available.extend((widest >= InstructionSet::Avx512).then_some(Self::Avx512));
        }
        available
    }
}

/// Both factors in `f32`.
#[derive(Default)]
struct Factors {
    /// Rows of A.
    rows: Buffer<f32>,
    /// The columns of B that a tile reads, each row of them after the one before.
    columns: Buffer<f32>,
}

/// A register of `f32`.
trait Lanes {
    type Register: Copy;
    /// Values of a register.
    const COUNT: usize;
    /// Rows of the largest tile: two registers of sums for each, two of B and one of A.
    const HEIGHT: usize;

    unsafe fn splat(value: f32) -> Self::Register;
    unsafe fn load(from: *const f32) -> Self::Register;
    unsafe fn store(to: *mut f32, values: Self::Register);
    /// `sum + a b`, rounded once where the processor does that.
    unsafe fn multiply_add(a: Self::Register, b: Self::Register, sum: Self::Register) -> Self::Register;
}

/// # Safety
/// As [`multiply`]; and the processor has the registers.
#[inline(always)]
unsafe fn make_sums<L: Lanes>(
    factors: &mut Factors,
    count: usize,
    parts: &[Part],
    sums: *mut f32,
    sum_stride: usize,
    accumulate: bool,
) {
    let width = 2 * L::COUNT;
    for (i, Part { rows, panels }) in parts.iter().enumerate() {
        let depth = 2 * panels.pairs();
        // not a multiple of so much that rows drive each other out of the first-level cache
        let stride = depth + 16;
        let widened = factors.rows.take(count * stride);
        for (row, out) in rows.values.chunks(rows.stride.max(1)).zip(widened.chunks_exact_mut(stride)) {
            for (value, out) in row[..depth].iter().zip(out) {
                *out = f32::from_bits(u32::from(value.to_bits()) << 16);
            }
        }
        let columns = factors.columns.take(DEPTH.min(depth) * width);
        for left in (0..panels.columns).step_by(width) {
            for first in (0..depth.max(1)).step_by(DEPTH) {
                let depth = DEPTH.min(depth - first);
                let panel = &panels.panel(left / WIDTH)[first / 2..][..depth / 2];
                widen_columns::<L>(panel, left % WIDTH, columns);
                let accumulate = accumulate || i > 0 || first > 0;
                let mut top = 0;
                while top < count {
                    // tiles of about the same height
                    let height = (count - top).div_ceil((count - top).div_ceil(L::HEIGHT));
                    // SAFETY: `widened` has `count` rows of so many values, `columns` as many rows of `width`; the caller
                    // vouches for the sums.
                    unsafe {
                        let rows = (depth, widened.as_ptr().add(top * stride + first), stride);
                        let sums = (sums.add(top * sum_stride + left), sum_stride);
                        tile_of::<L>(height, rows, columns.as_ptr(), sums, accumulate);
                    }
                    top += height;
                }
            }
        }
    }
}

/// The columns of a panel from `left` on that a tile reads.
#[inline(always)]
fn widen_columns<L: Lanes>(panel: &[PanelRow], left: usize, columns: &mut [f32]) {
    // so many that the compiler makes registers of them
    const STEP: usize = 8;
    let width = 2 * L::COUNT;
    for (pair, out) in panel.iter().zip(columns.chunks_exact_mut(2 * width)) {
        let pair = pair.0[left..left + width].as_chunks::<STEP>().0;
        let (even, odd) = out.split_at_mut(width);
        let (even, odd) = (even.as_chunks_mut::<STEP>().0, odd.as_chunks_mut::<STEP>().0);
        for (i, both) in pair.iter().enumerate() {
            let both = *both;
            for j in 0..STEP {
                even[i][j] = f32::from_bits(both[j] << 16);
            }
            for j in 0..STEP {
                odd[i][j] = f32::from_bits(both[j] & 0xFFFF_0000);
            }
        }
    }
}

/// A tile of `height` rows.
///
/// # Safety
/// As [`tile`].
#[inline(always)]
unsafe fn tile_of<L: Lanes>(
    height: usize,
    rows: (usize, *const f32, usize),
    columns: *const f32,
    sums: (*mut f32, usize),
    accumulate: bool,
) {
    macro_rules! by_height {
        ($($height:literal)*) => {
            match height {
                // SAFETY: passed on to the caller.
                $($height if $height <= L::HEIGHT => unsafe { tile::<L, $height>(rows, columns, sums, accumulate) },)*
                _ => unreachable!("a tile has 1 to {} rows", L::HEIGHT),
            }
        };
    }
    by_height!(1 2 3 4 5 6 7 8 9 10 11 12);
}

/// `ROWS` rows of A, of so many values, `stride` apart, times as many rows of two registers. What is accumulated is summed on
/// from what was stored, so that it does not matter where a sum is interrupted.
///
/// # Safety
/// There are as many values; and the processor has the registers.
#[inline(always)]
#[allow(clippy::needless_range_loop, reason = "rows and halves in registers, by number")]
unsafe fn tile<L: Lanes, const ROWS: usize>(
    (depth, rows, stride): (usize, *const f32, usize),
    columns: *const f32,
    (sums, sum_stride): (*mut f32, usize),
    accumulate: bool,
) {
    // SAFETY: the caller vouches for all that is read and written.
    unsafe {
        let mut tile = [[L::splat(0.0); 2]; ROWS];
        if accumulate {
            for i in 0..ROWS {
                for h in 0..2 {
                    tile[i][h] = L::load(sums.add(i * sum_stride + h * L::COUNT));
                }
            }
        }
        for k in 0..depth {
            let b = columns.add(2 * k * L::COUNT);
            let b = [L::load(b), L::load(b.add(L::COUNT))];
            for i in 0..ROWS {
                let a = L::splat(*rows.add(i * stride + k));
                for h in 0..2 {
                    tile[i][h] = L::multiply_add(a, b[h], tile[i][h]);
                }
            }
        }
        for i in 0..ROWS {
            for h in 0..2 {
                L::store(sums.add(i * sum_stride + h * L::COUNT), tile[i][h]);
            }
        }
    }
}

/// Eight values, as the compiler sees fit.
struct Plain;

impl Lanes for Plain {
    type Register = [f32; 8];
    const COUNT: usize = 8;
    const HEIGHT: usize = 6;

    #[inline(always)]
    unsafe fn splat(value: f32) -> [f32; 8] {
        [value; 8]
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> [f32; 8] {
        // SAFETY: the caller vouches for eight values.
        unsafe { from.cast::<[f32; 8]>().read() }
    }

    #[inline(always)]
    unsafe fn store(to: *mut f32, values: [f32; 8]) {
        // SAFETY: as above.
        unsafe { to.cast::<[f32; 8]>().write(values) }
    }

    #[inline(always)]
    unsafe fn multiply_add(a: [f32; 8], b: [f32; 8], mut sum: [f32; 8]) -> [f32; 8] {
        for i in 0..8 {
            // a function call where the target has no such instruction
            sum[i] = if cfg!(any(target_feature = "neon", target_feature = "fma")) {
                a[i].mul_add(b[i], sum[i])
            } else {
                sum[i] + a[i] * b[i]
            };
        }
        sum
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{
        __m256, __m512, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_set1_ps, _mm256_storeu_ps, _mm512_fmadd_ps,
        _mm512_loadu_ps, _mm512_set1_ps, _mm512_storeu_ps,
    };

    use super::{Factors, Lanes, Part, make_sums};

    macro_rules! registers {
        ($(#[$meta:meta])* $name:ident, $function:ident, $features:literal, $register:ident, $count:literal, $height:literal:
            $splat:ident $load:ident $store:ident $multiply_add:ident) => {
            $(#[$meta])*
            struct $name;

            impl Lanes for $name {
                type Register = $register;
                const COUNT: usize = $count;
                const HEIGHT: usize = $height;

                #[inline(always)]
                unsafe fn splat(value: f32) -> $register {
                    // SAFETY: the caller has the instructions.
                    unsafe { $splat(value) }
                }

                #[inline(always)]
                unsafe fn load(from: *const f32) -> $register {
                    // SAFETY: the caller has the instructions, and vouches for the values.
                    unsafe { $load(from) }
                }

                #[inline(always)]
                unsafe fn store(to: *mut f32, values: $register) {
                    // SAFETY: as above.
                    unsafe { $store(to, values) }
                }

                #[inline(always)]
                unsafe fn multiply_add(a: $register, b: $register, sum: $register) -> $register {
                    // SAFETY: the caller has the instructions.
                    unsafe { $multiply_add(a, b, sum) }
                }
            }

            /// # Safety
            /// As [`make_sums`].
            #[target_feature(enable = $features)]
            pub(super) unsafe fn $function(
                factors: &mut Factors,
                count: usize,
                parts: &[Part],
                sums: *mut f32,
                sum_stride: usize,
                accumulate: bool,
            ) {
                // SAFETY: passed on to the caller.
                unsafe { make_sums::<$name>(factors, count, parts, sums, sum_stride, accumulate) }
            }
        };
    }

    registers!(
        /// Sixteen registers: twelve of sums.
        Avx2, avx2, "avx2,fma", __m256, 8, 6:
        _mm256_set1_ps _mm256_loadu_ps _mm256_storeu_ps _mm256_fmadd_ps
    );
    registers!(
        /// Thirty-two: 24 of sums.
        Avx512, avx512, "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma", __m512, 16, 12:
        _mm512_set1_ps _mm512_loadu_ps _mm512_storeu_ps _mm512_fmadd_ps
    );
}
