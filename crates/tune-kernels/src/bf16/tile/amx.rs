//! Tiles of 32 × 32 sums in the tile registers of AMX, multiplied by `tdpbf16ps`.
//!
//! ```text
//! tmm0 tmm1     tmm4            tmm6 tmm7
//! tmm2 tmm3  +=  tmm5  ·                        16 rows of sums each; 16 pairs of a row of A; 16 pairs of 16 columns of B
//! ```
//!
//! A row of a panel is a row of `tmm6` beside one of `tmm7`, so all tiles are read where they lie. Rows and pairs
//! that are left over have tiles of their size. While a row of tiles is made, the rows of A for the next are asked for.
//! Departures from AVX-512: sums of one pair are not rounded in between, and denormal factors and sums count as zeros.
//!
//! Compilers know these instructions on nightly only, hence assembly. Intel 64 and IA-32 Architectures
//! Optimization Reference Manual, chapter 20; Linux, Documentation/arch/x86/xstate.rst.

use std::arch::asm;
use std::ops::Range;

use half::bf16;

use super::{PairedRows, Panels, Part, WIDTH};
use crate::cpu::prefetch;

/// Rows of the largest tile.
pub(super) const HEIGHT: usize = 2 * TILE_ROWS;

/// Rows of a tile register, and pairs that one multiplication sums over.
const TILE_ROWS: usize = 16;

/// # Safety
/// The processor has tiles for `bf16`, and the system allows them. The rows of each part have `count` rows of as many pairs as its
/// panels, and `sums` as many rows of [`WIDTH`] values for each panel.
pub(super) unsafe fn multiply(
    count: usize,
    parts: &[Part],
    sums: *mut f32,
    sum_stride: usize,
    accumulate: bool,
) {
    for (i, Part { rows, panels }) in parts.iter().enumerate() {
        let accumulate = accumulate || i > 0;
        if panels.pairs() > 0 {
            // SAFETY: passed on to the caller.
            unsafe { multiply_part(count, *rows, *panels, sums, sum_stride, accumulate) };
        } else if !accumulate {
            for row in 0..count {
                // SAFETY: as above.
                unsafe { sums.add(row * sum_stride).write_bytes(0, panels.count() * WIDTH) };
            }
        }
    }
}

/// # Safety
/// As [`multiply`], for one part; and there is a pair at least.
unsafe fn multiply_part(
    count: usize,
    rows: PairedRows,
    panels: Panels,
    sums: *mut f32,
    sum_stride: usize,
    accumulate: bool,
) {
    let (rows, row_stride) = (rows.values.as_ptr(), rows.stride);
    let mut shapes = Shapes::NONE;
    let whole = panels.pairs() / TILE_ROWS * TILE_ROWS;
    for (pairs, step) in [(0..whole, TILE_ROWS), (whole..panels.pairs(), panels.pairs() - whole)] {
        if pairs.is_empty() {
            continue;
        }
        let accumulate = accumulate || pairs.start > 0;
        let (depth, panels) = (2 * pairs.start, panels.slice(pairs));
        for top in (0..count).step_by(HEIGHT) {
            let height = HEIGHT.min(count - top);
            shapes.become_those_of(height, step);
            let next = top + height..count.min(top + height + HEIGHT);
            for (i, (panel, left)) in panels.each().zip((0..).step_by(WIDTH)).enumerate() {
                for row in share_of(&next, i, panels.count()) {
                    // SAFETY: the caller vouches for the rows.
                    prefetch(unsafe {
                        std::slice::from_raw_parts(rows.add(row * row_stride + depth), 2 * panels.pairs())
                    });
                }
                // SAFETY: the caller vouches for the rows and the sums, of which the shapes are.
                unsafe {
                    let tile = Tile {
                        rows: rows.add(top * row_stride + depth).cast(),
                        row_stride: row_stride * size_of::<bf16>(),
                        panel: panel.as_ptr().cast(),
                        steps: panel.len() / step,
                        sums: sums.add(top * sum_stride + left).cast(),
                        sum_stride: sum_stride * size_of::<f32>(),
                        accumulate,
                    };
                    if height > TILE_ROWS { tile.multiply_two() } else { tile.multiply_one() }
                }
            }
        }
    }
    Shapes::release();
}

/// Part `i` of `count` of `rows`.
fn share_of(rows: &Range<usize>, i: usize, count: usize) -> Range<usize> {
    rows.start + rows.len() * i / count..rows.start + rows.len() * (i + 1) / count
}

/// The shapes of the tile registers, as `ldtilecfg` takes them.
#[derive(PartialEq)]
#[repr(C, align(64))]
struct Shapes {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

impl Shapes {
    const NONE: Self =
        Self { palette: 0, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };

    /// For up to [`HEIGHT`] rows, of which one multiplication takes `pairs` pairs.
    fn become_those_of(&mut self, height: usize, pairs: usize) {
        let mut wanted = Self { palette: 1, ..Self::NONE };
        let (top, bottom) = (height.min(TILE_ROWS), height.saturating_sub(TILE_ROWS));
        let a_bytes = 4 * pairs;
        let of_tiles = [
            (top, 64),
            (top, 64),
            (bottom, 64),
            (bottom, 64),
            (top, a_bytes),
            (bottom, a_bytes),
            (pairs, 64),
            (pairs, 64),
        ];
        for (tile, (rows, bytes)) in of_tiles.into_iter().enumerate().filter(|(_, (rows, _))| *rows > 0) {
            (wanted.rows[tile], wanted.row_bytes[tile]) = (rows as u8, bytes as u16);
        }
        if *self != wanted {
            *self = wanted;
            // SAFETY: 64 bytes of a valid configuration; the caller has made sure of the instruction.
            unsafe {
                asm!("ldtilecfg [{}]", in(reg) &raw const *self, options(nostack, readonly, preserves_flags),
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _);
            }
        }
    }

    /// Leaves the registers as they were, so that the system need not save them.
    fn release() {
        // SAFETY: as above.
        unsafe {
            asm!("tilerelease", options(nostack, nomem, preserves_flags),
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _);
        }
    }
}

/// One tile of sums and its factors; strides in bytes.
struct Tile {
    rows: *const u8,
    row_stride: usize,
    panel: *const u8,
    steps: usize,
    sums: *mut u8,
    sum_stride: usize,
    accumulate: bool,
}

/// Bytes of a row of a panel, and of [`TILE_ROWS`] of them.
const PANEL_STRIDE: usize = 4 * WIDTH;
const PANEL_STEP: usize = TILE_ROWS * PANEL_STRIDE;

impl Tile {
    /// Two tiles one above the other.
    ///
    /// # Safety
    /// The tile registers are configured, and have the shapes of this tile.
    unsafe fn multiply_two(self) {
        // SAFETY: the shapes keep all reads and writes to what the caller vouches for.
        unsafe {
            asm!(
                "test {accumulate:e}, {accumulate:e}",
                "jz 2f",
                "tileloadd tmm0, [{sums} + {sum_stride}]",
                "tileloadd tmm1, [{sums} + {sum_stride} + 64]",
                "tileloadd tmm2, [{low_sums} + {sum_stride}]",
                "tileloadd tmm3, [{low_sums} + {sum_stride} + 64]",
                "jmp 3f",
                "2:",
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "3:",
                "tileloadd tmm6, [{panel} + {panel_stride}]",
                "tileloadd tmm4, [{rows} + {row_stride}]",
                "tileloadd tmm7, [{panel} + {panel_stride} + 64]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm5, [{low_rows} + {row_stride}]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "add {rows}, 64",
                "add {low_rows}, 64",
                "add {panel}, {panel_step}",
                "dec {steps}",
                "jnz 3b",
                "tilestored [{sums} + {sum_stride}], tmm0",
                "tilestored [{sums} + {sum_stride} + 64], tmm1",
                "tilestored [{low_sums} + {sum_stride}], tmm2",
                "tilestored [{low_sums} + {sum_stride} + 64], tmm3",
                accumulate = in(reg) u32::from(self.accumulate),
                sums = in(reg) self.sums,
                low_sums = in(reg) self.sums.wrapping_add(TILE_ROWS * self.sum_stride),
                sum_stride = in(reg) self.sum_stride,
                rows = inout(reg) self.rows => _,
                low_rows = inout(reg) self.rows.wrapping_add(TILE_ROWS * self.row_stride) => _,
                row_stride = in(reg) self.row_stride,
                panel = inout(reg) self.panel => _,
                panel_stride = in(reg) PANEL_STRIDE,
                panel_step = const PANEL_STEP,
                steps = inout(reg) self.steps => _,
                options(nostack),
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            );
        }
    }

    /// One tile, of up to [`TILE_ROWS`] rows.
    ///
    /// # Safety
    /// As for [`multiply_two`](Self::multiply_two).
    unsafe fn multiply_one(self) {
        // SAFETY: the shapes keep all reads and writes to what the caller vouches for.
        unsafe {
            asm!(
                "test {accumulate:e}, {accumulate:e}",
                "jz 2f",
                "tileloadd tmm0, [{sums} + {sum_stride}]",
                "tileloadd tmm1, [{sums} + {sum_stride} + 64]",
                "jmp 3f",
                "2:",
                "tilezero tmm0",
                "tilezero tmm1",
                "3:",
                "tileloadd tmm6, [{panel} + {panel_stride}]",
                "tileloadd tmm4, [{rows} + {row_stride}]",
                "tileloadd tmm7, [{panel} + {panel_stride} + 64]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "add {rows}, 64",
                "add {panel}, {panel_step}",
                "dec {steps}",
                "jnz 3b",
                "tilestored [{sums} + {sum_stride}], tmm0",
                "tilestored [{sums} + {sum_stride} + 64], tmm1",
                accumulate = in(reg) u32::from(self.accumulate),
                sums = in(reg) self.sums,
                sum_stride = in(reg) self.sum_stride,
                rows = inout(reg) self.rows => _,
                row_stride = in(reg) self.row_stride,
                panel = inout(reg) self.panel => _,
                panel_stride = in(reg) PANEL_STRIDE,
                panel_step = const PANEL_STEP,
                steps = inout(reg) self.steps => _,
                options(nostack),
                out("tmm0") _, out("tmm1") _, out("tmm4") _, out("tmm6") _, out("tmm7") _,
            );
        }
    }
}
