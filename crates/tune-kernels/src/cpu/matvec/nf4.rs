//! NF4 rows decoded in registers.

#![allow(
    clippy::inline_always,
    reason = "a vector instruction is one only where it is inlined into a function compiled for its set"
)]

use tune_quant::nf4::{self, Nf4Parts};

use super::Sums;
use super::blocks::part;
use super::lanes::Lanes;

/// Adds to `sums` the products with the values of the row that begins with block `first_block`; rows are whole
/// blocks.
#[inline(always)]
pub(super) fn add_row<S: Lanes, const M: usize>(
    parts: &Nf4Parts,
    map: &[f32; 256],
    first_block: usize,
    blocks: usize,
    sums: &mut Sums<S, M>,
) {
    let bytes = parts.packed[first_block * nf4::BLOCK / 2..].as_chunks::<{ nf4::BLOCK / 2 }>().0;
    for (i, bytes) in bytes[..blocks].iter().enumerate() {
        let block = first_block + i;
        let nested = parts.nested_absmax[block / nf4::NESTED_BLOCK];
        let absmax = map[usize::from(parts.absmax_codes[block])] * nested + parts.offset;
        let table = S::load(&nf4::CODES).mul(S::splat(absmax));
        for run in 0..4 {
            let values = S::lookup(table, S::nibbles_high_first(*part(bytes, 8 * run)));
            sums.add(i * nf4::BLOCK, run, values);
        }
    }
}
