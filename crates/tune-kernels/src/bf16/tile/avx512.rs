//! Tiles of 12 × 32 sums in the registers of AVX-512, multiplied by `vdpbf16ps` with all parts of a sum before they are
//! stored, and of 12 × 16 where the last panel is no wider, as those of low-rank pairs are; columns transposed in registers.

use std::arch::x86_64::{
    __m512bh, __m512i, _mm512_dpbf16_ps, _mm512_load_si512, _mm512_loadu_ps, _mm512_loadu_si512,
    _mm512_maskz_loadu_epi32, _mm512_set1_epi32, _mm512_setzero_ps, _mm512_setzero_si512,
    _mm512_shuffle_i32x4, _mm512_store_si512, _mm512_storeu_ps, _mm512_unpackhi_epi32, _mm512_unpackhi_epi64,
    _mm512_unpacklo_epi32, _mm512_unpacklo_epi64,
};
use std::mem::transmute;

use half::bf16;

use super::{PanelRow, Part, WIDTH};

/// Rows of the largest tile.
pub(super) const HEIGHT: usize = 12;

/// # Safety
/// The rows of each part have `count` rows of as many pairs as its panels, and `sums` as many rows of [`WIDTH`] values for
/// each panel.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
pub(super) unsafe fn multiply(
    count: usize,
    parts: &[Part],
    sums: *mut f32,
    sum_stride: usize,
    accumulate: bool,
) {
    macro_rules! by_height {
        ($height:expr, $columns:expr, $arguments:tt, $($literal:literal)*) => {
            match ($height, $columns > HALF) {
                // SAFETY: passed on to the caller.
                $(
                    ($literal, true) => unsafe { tile::<$literal, 2> $arguments },
                    ($literal, false) => unsafe { tile::<$literal, 1> $arguments },
                )*
                _ => unreachable!("a tile has 1 to {HEIGHT} rows"),
            }
        };
    }
    let panels = parts.first().map_or(0, |part| part.panels.count());
    let columns = parts.first().map_or(0, |part| part.panels.columns);
    let mut top = 0;
    while top < count {
        // tiles of about the same height
        let height = (count - top).div_ceil((count - top).div_ceil(HEIGHT));
        for panel in 0..panels {
            // SAFETY: the caller vouches for the sums.
            let sums = unsafe { sums.add(top * sum_stride + panel * WIDTH) };
            let columns = columns - panel * WIDTH;
            by_height!(height, columns, (parts, top, panel, sums, sum_stride, accumulate), 12 11 10 9 8 7 6 5 4 3 2 1);
        }
        top += height;
    }
}

/// Columns of a register.
const HALF: usize = WIDTH / 2;

/// The sums of `ROWS` rows from `top` on and the first `HALVES` halves of the panel `panel`. What is accumulated is summed
/// on from what was stored, so that it does not matter where a sum is interrupted.
#[allow(clippy::needless_range_loop, reason = "rows and halves in registers, by number")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn tile<const ROWS: usize, const HALVES: usize>(
    parts: &[Part],
    top: usize,
    panel: usize,
    sums: *mut f32,
    sum_stride: usize,
    accumulate: bool,
) {
    let mut tile = [[_mm512_setzero_ps(); HALVES]; ROWS];
    if accumulate {
        for i in 0..ROWS {
            for h in 0..HALVES {
                // SAFETY: the caller vouches for the sums of each row.
                tile[i][h] = unsafe { _mm512_loadu_ps(sums.add(i * sum_stride + HALF * h)) };
            }
        }
    }
    for Part { rows, panels } in parts {
        let (stride, panel) = (rows.stride, panels.panel(panel));
        // SAFETY: the caller vouches for the rows.
        let rows = unsafe { rows.values.as_ptr().add(top * stride) };
        for (p, b) in panel.iter().enumerate() {
            // SAFETY: a panel row is 128 aligned bytes; the caller vouches for the pairs of each row. Every bit
            // pattern is a vector of bf16.
            unsafe {
                let mut halves = [transmute::<__m512i, __m512bh>(_mm512_setzero_si512()); HALVES];
                for (h, half) in halves.iter_mut().enumerate() {
                    *half =
                        transmute::<__m512i, __m512bh>(_mm512_load_si512(b.0.as_ptr().add(HALF * h).cast()));
                }
                for i in 0..ROWS {
                    let pair = rows.add(i * stride + 2 * p).cast::<i32>().read_unaligned();
                    let pair = transmute::<__m512i, __m512bh>(_mm512_set1_epi32(pair));
                    for h in 0..HALVES {
                        tile[i][h] = _mm512_dpbf16_ps(tile[i][h], halves[h], pair);
                    }
                }
            }
        }
    }
    for i in 0..ROWS {
        for h in 0..HALVES {
            // SAFETY: as above.
            unsafe { _mm512_storeu_ps(sums.add(i * sum_stride + HALF * h), tile[i][h]) };
        }
    }
}

/// # Safety
/// `columns` has [`WIDTH`] columns of `2 · panel.len()` values, `stride` apart.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
#[allow(clippy::cast_ptr_alignment, reason = "loads of any alignment")]
pub(super) unsafe fn pack_columns(columns: *const bf16, stride: usize, panel: &mut [PanelRow]) {
    for (block, rows) in panel.chunks_mut(16).enumerate() {
        let mask = if rows.len() == 16 { u16::MAX } else { (1 << rows.len()) - 1 };
        for half in 0..WIDTH / 16 {
            let mut lines = [_mm512_setzero_si512(); 16];
            for (j, line) in lines.iter_mut().enumerate() {
                // SAFETY: the caller vouches for the pairs of each column; the mask leaves out all others.
                *line = unsafe {
                    let pairs = columns.add((half * 16 + j) * stride + block * 32).cast::<i32>();
                    if mask == u16::MAX {
                        _mm512_loadu_si512(pairs.cast())
                    } else {
                        _mm512_maskz_loadu_epi32(mask, pairs)
                    }
                };
            }
            for (row, line) in rows.iter_mut().zip(transpose(&lines)) {
                // SAFETY: half a panel row is 64 aligned bytes.
                unsafe { _mm512_store_si512(row.0.as_mut_ptr().add(half * 16).cast(), line) };
            }
        }
    }
}

/// Transposes 16 × 16 values of 32 bits.
#[target_feature(enable = "avx512f")]
fn transpose(lines: &[__m512i; 16]) -> [__m512i; 16] {
    let mut a = *lines;
    for i in 0..8 {
        (a[2 * i], a[2 * i + 1]) = (
            _mm512_unpacklo_epi32(lines[2 * i], lines[2 * i + 1]),
            _mm512_unpackhi_epi32(lines[2 * i], lines[2 * i + 1]),
        );
    }
    // b[4g + c]: column c of each 4 × 4 block of rows 4g .. 4g + 4, one block in each 128-bit lane
    let mut b = a;
    for g in 0..4 {
        b[4 * g] = _mm512_unpacklo_epi64(a[4 * g], a[4 * g + 2]);
        b[4 * g + 1] = _mm512_unpackhi_epi64(a[4 * g], a[4 * g + 2]);
        b[4 * g + 2] = _mm512_unpacklo_epi64(a[4 * g + 1], a[4 * g + 3]);
        b[4 * g + 3] = _mm512_unpackhi_epi64(a[4 * g + 1], a[4 * g + 3]);
    }
    let mut out = b;
    for c in 0..4 {
        let (even_low, odd_low) = (
            _mm512_shuffle_i32x4::<0b10_00_10_00>(b[c], b[4 + c]),
            _mm512_shuffle_i32x4::<0b11_01_11_01>(b[c], b[4 + c]),
        );
        let (even_high, odd_high) = (
            _mm512_shuffle_i32x4::<0b10_00_10_00>(b[8 + c], b[12 + c]),
            _mm512_shuffle_i32x4::<0b11_01_11_01>(b[8 + c], b[12 + c]),
        );
        out[c] = _mm512_shuffle_i32x4::<0b10_00_10_00>(even_low, even_high);
        out[8 + c] = _mm512_shuffle_i32x4::<0b11_01_11_01>(even_low, even_high);
        out[4 + c] = _mm512_shuffle_i32x4::<0b10_00_10_00>(odd_low, odd_high);
        out[12 + c] = _mm512_shuffle_i32x4::<0b11_01_11_01>(odd_low, odd_high);
    }
    out
}
