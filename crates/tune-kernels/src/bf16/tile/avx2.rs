//! Columns transposed in the registers of AVX2.

use std::arch::x86_64::{
    __m256i, _mm256_loadu_si256, _mm256_permute2x128_si256, _mm256_setzero_si256, _mm256_store_si256,
    _mm256_unpackhi_epi32, _mm256_unpackhi_epi64, _mm256_unpacklo_epi32, _mm256_unpacklo_epi64,
};

use half::bf16;

use super::{PanelRow, WIDTH};

/// Pairs of a register.
const LANES: usize = 8;

/// # Safety
/// `columns` has [`WIDTH`] columns of `2 · panel.len()` values, `stride` apart.
#[target_feature(enable = "avx2")]
#[allow(clippy::cast_ptr_alignment, reason = "loads of any alignment")]
pub(super) unsafe fn pack_columns(columns: *const bf16, stride: usize, panel: &mut [PanelRow]) {
    let (blocks, rest) = panel.as_chunks_mut::<LANES>();
    for (block, rows) in blocks.iter_mut().enumerate() {
        for left in (0..WIDTH).step_by(LANES) {
            let mut lines = [_mm256_setzero_si256(); LANES];
            for (j, line) in lines.iter_mut().enumerate() {
                // SAFETY: the caller vouches for the pairs of each column.
                *line = unsafe {
                    _mm256_loadu_si256(columns.add((left + j) * stride + block * 2 * LANES).cast())
                };
            }
            for (row, line) in rows.iter_mut().zip(transpose(&lines)) {
                // SAFETY: a quarter of a panel row is 32 aligned bytes.
                unsafe { _mm256_store_si256(row.0.as_mut_ptr().add(left).cast(), line) };
            }
        }
    }
    let first = blocks.len() * LANES;
    for (pair, row) in (first..).zip(rest) {
        for (j, both) in row.0.iter_mut().enumerate() {
            // SAFETY: the caller vouches for the pairs of each column.
            *both = unsafe { columns.add(j * stride + 2 * pair).cast::<u32>().read_unaligned() };
        }
    }
}

/// Transposes 8 × 8 values of 32 bits.
#[target_feature(enable = "avx2")]
fn transpose(lines: &[__m256i; LANES]) -> [__m256i; LANES] {
    let mut a = *lines;
    for i in 0..4 {
        (a[2 * i], a[2 * i + 1]) = (
            _mm256_unpacklo_epi32(lines[2 * i], lines[2 * i + 1]),
            _mm256_unpackhi_epi32(lines[2 * i], lines[2 * i + 1]),
        );
    }
    // b[4g + c]: column c of each 4 × 4 block of rows 4g .. 4g + 4, one block in each half
    let mut b = a;
    for g in 0..2 {
        b[4 * g] = _mm256_unpacklo_epi64(a[4 * g], a[4 * g + 2]);
        b[4 * g + 1] = _mm256_unpackhi_epi64(a[4 * g], a[4 * g + 2]);
        b[4 * g + 2] = _mm256_unpacklo_epi64(a[4 * g + 1], a[4 * g + 3]);
        b[4 * g + 3] = _mm256_unpackhi_epi64(a[4 * g + 1], a[4 * g + 3]);
    }
    let mut out = b;
    for c in 0..4 {
        out[c] = _mm256_permute2x128_si256::<0x20>(b[c], b[4 + c]);
        out[4 + c] = _mm256_permute2x128_si256::<0x31>(b[c], b[4 + c]);
    }
    out
}
