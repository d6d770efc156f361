//! Nanoseconds per weight that [`StoredMatrix`] takes to decode, for every type, output and instruction set.
//!
//! `cargo run --release -p tune-quant --example decode_speed [TYPE]`
//!
//! The matrix fits the second-level cache. Each figure is the shortest of many short runs, so that time lost to other
//! processes does not count.
#![allow(clippy::print_stdout)] // the table is what it is for

use std::hint::black_box;
use std::time::{Duration, Instant};

use half::bf16;
use tune_quant::{BlockType, ByteView, Decoded, InstructionSet, RowOrder, StoredMatrix};

const ROWS: usize = 64;
const COLS: usize = 2048;
/// Values decoded by one call.
const TILE: usize = 512;

fn main() {
    let only = std::env::args().nth(1);
    let sets: Vec<_> = InstructionSet::available().collect();
    let columns: Vec<String> = ["bf16", "f32"]
        .iter()
        .flat_map(|out| sets.iter().map(move |set| format!("{out} {}", set.name())))
        .collect();
    println!("{:<8}{}", "", columns.iter().map(|c| format!("{c:>16}")).collect::<String>());
    for matrix in matrices().filter(|m| only.as_ref().is_none_or(|only| only == m.type_name())) {
        let halves = sets.iter().map(|set| nanoseconds_per_weight(&matrix, *set, bf16::ZERO));
        let halves: Vec<f64> = halves.collect();
        let singles = sets.iter().map(|set| nanoseconds_per_weight(&matrix, *set, 0f32));
        let figures = halves.into_iter().chain(singles).map(|ns| format!("{ns:>16.3}"));
        println!("{:<8}{}", matrix.type_name(), figures.collect::<String>());
    }
}

fn matrices() -> impl Iterator<Item = StoredMatrix> {
    let blocks = BlockType::ALL.into_iter().filter_map(|block_type| {
        let len = ROWS * block_type.row_bytes(COLS)?;
        let bytes: Vec<u8> = (0..len).map(|i| (i.wrapping_mul(0x9E37_79B1) >> 24) as u8 & 0x3F).collect();
        StoredMatrix::from_blocks(block_type, ROWS, COLS, ByteView::from(bytes), RowOrder::Natural)
    });
    let values: Vec<f32> = (0..ROWS * COLS).map(|i| (i as f32 * 0.37).sin()).collect();
    blocks.chain([StoredMatrix::from_f32(ROWS, COLS, &values).to_nf4()])
}

fn nanoseconds_per_weight<T: Decoded>(matrix: &StoredMatrix, instructions: InstructionSet, zero: T) -> f64 {
    // on a cache line, as stores that cross one take longer
    let mut out = [zero; TILE + 32];
    let aligned = out.as_ptr().align_offset(64);
    let out = &mut out[aligned..aligned + TILE];
    let run = |out: &mut [T]| {
        let start = Instant::now();
        for row in 0..ROWS {
            for col in (0..COLS).step_by(TILE) {
                matrix.decode_with(instructions, row, col..col + TILE, out);
                black_box(&mut *out);
            }
        }
        start.elapsed()
    };
    let shortest = (0..300).map(|_| run(out)).min().unwrap_or(Duration::ZERO);
    shortest.as_secs_f64() * 1e9 / (ROWS * COLS) as f64
}
