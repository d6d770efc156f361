//! Every instruction set of this processor against the scalar reference, bit for bit, and `bf16` against the reference
//! rounded by the `half` crate.

use std::ops::Range;

use half::bf16;
use tune_quant::{BlockType, ByteView, InstructionSet, Nf4, RowOrder, StoredMatrix};

#[test]
fn random_blocks_of_every_type() {
    let mut random = random_bytes(1);
    for block_type in BlockType::ALL {
        // random scales are now and then infinite, NaN or subnormal; lengths leave every remainder by 32 values
        for blocks in (0..70).chain([4000]) {
            let bytes = take(&mut random, blocks * block_type.block_bytes());
            check(block_type, &bytes);
        }
    }
}

#[test]
fn halves_as_values_and_as_scales() {
    let halves: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
    check(BlockType::F16, &halves);
    check(BlockType::BF16, &halves);
    let mut random = random_bytes(2);
    for (block_type, at) in [
        (BlockType::Q4_0, &[0][..]),
        (BlockType::Q4_1, &[0, 2]),
        (BlockType::Q5_0, &[0]),
        (BlockType::Q5_1, &[0, 2]),
        (BlockType::Q8_0, &[0]),
        (BlockType::IQ4NL, &[0]),
        (BlockType::IQ4XS, &[0]),
        (BlockType::Q2K, &[80, 82]),
        (BlockType::Q3K, &[108]),
        (BlockType::Q4K, &[0, 2]),
        (BlockType::Q5K, &[0, 2]),
        (BlockType::Q6K, &[208]),
    ] {
        for &at in at {
            let mut block = take(&mut random, block_type.block_bytes());
            // of the types with long blocks, every 13th
            let step = if block_type.block_len() > 32 { 13 } else { 1 };
            let blocks: Vec<u8> = (0..=u16::MAX)
                .step_by(step)
                .flat_map(|half| {
                    block[at..at + 2].copy_from_slice(&half.to_le_bytes());
                    block.clone()
                })
                .collect();
            check(block_type, &blocks);
        }
    }
}

#[test]
fn singles_round_as_half_does_it() {
    let upper = [0u32, 1, 0x007F, 0x0080, 0x0081, 0x3F80, 0x3F81, 0x7F7F, 0x7F80, 0x7F81, 0x7FC0];
    let lower = [0u32, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF];
    let bits =
        upper.iter().flat_map(|u| lower.iter().flat_map(move |l| [0, 0x8000].map(|s| (u | s) << 16 | l)));
    check(BlockType::F32, &bits.flat_map(u32::to_le_bytes).collect::<Vec<_>>());
}

#[test]
fn every_exponent_of_mxfp4_with_every_code() {
    let codes: Vec<u8> = (0..16).map(|code| code << 4 | (15 - code)).collect();
    let blocks: Vec<u8> = (0..=255).flat_map(|e| [vec![e], codes.clone()].concat()).collect();
    check(BlockType::MXFP4, &blocks);
}

#[test]
fn nf4_over_any_range() {
    let magnitude = |i: usize| [1.0, 1e-38, 0.0, 3e38][i / 4096 % 4];
    let values: Vec<f32> = (0..20_011).map(|i| (i as f32 * 0.7).sin() * magnitude(i)).collect();
    let nf4 = Nf4::quantize(&values);
    let (mut want, mut rounded) = (vec![0.0f32; values.len()], vec![bf16::ZERO; values.len()]);
    nf4.decode_with(InstructionSet::PORTABLE, 0, &mut want);
    want.iter().zip(&mut rounded).for_each(|(want, rounded)| *rounded = bf16::from_f32(*want));
    for instructions in InstructionSet::available() {
        for (start, len) in
            [(0, 20_011), (64, 64), (1, 63), (63, 2), (5, 7), (65, 1000), (128, 19_883), (19_999, 12)]
        {
            let name = format!("{} {len} values from {start}", instructions.name());
            let mut singles = vec![f32::NAN; len];
            nf4.decode_with(instructions, start, &mut singles);
            assert_eq!(bits_f32(&singles), bits_f32(&want[start..start + len]), "{name}");
            let mut halves = vec![bf16::NAN; len];
            nf4.decode_with(instructions, start, &mut halves);
            assert_eq!(bits_bf16(&halves), bits_bf16(&rounded[start..start + len]), "{name}");
        }
    }
}

#[test]
fn ranges_of_columns_in_both_row_orders() {
    let (rows, cols) = (12, 768);
    let mut random = random_bytes(3);
    for block_type in BlockType::ALL {
        let bytes = take(&mut random, rows * block_type.row_bytes(cols).unwrap());
        for order in [RowOrder::Natural, RowOrder::RotaryInterleaved { head_dim: 6 }] {
            let bytes = ByteView::from(bytes.clone());
            check_ranges(&StoredMatrix::from_blocks(block_type, rows, cols, bytes, order).unwrap());
        }
    }
    // rows of NF4 begin and end inside blocks
    for cols in [768, 130, 33] {
        let values: Vec<f32> = (0..rows * cols).map(|i| (i as f32 * 0.3).cos()).collect();
        check_ranges(&StoredMatrix::from_f32(rows, cols, &values).to_nf4());
    }
}

fn check_ranges(matrix: &StoredMatrix) {
    let (cols, step) = (matrix.cols(), matrix.block_len());
    let ranges: [Range<usize>; 5] = [
        0..cols,
        0..step.min(cols),
        cols / step * step..cols,
        cols / 2 / step * step..cols,
        step.min(cols)..cols,
    ];
    for row in 0..matrix.rows() {
        let mut want = vec![0.0; cols];
        matrix.decode_with(InstructionSet::PORTABLE, row, 0..cols, &mut want);
        let mut whole = vec![f32::NAN; cols];
        matrix.decode_row(row, &mut whole);
        for col in 0..cols {
            assert!(same(whole[col], want[col]), "{} row {row} column {col}", matrix.type_name());
        }
        for range in ranges.clone() {
            let mut got = vec![bf16::NAN; range.len()];
            matrix.columns(range.clone()).decode_bf16(row, &mut got);
            let want: Vec<bf16> = want[range.clone()].iter().map(|v| bf16::from_f32(*v)).collect();
            assert_eq!(quiet(&got), quiet(&want), "{} row {row} columns {range:?}", matrix.type_name());
        }
    }
}

/// Decodes `bytes` to both types by all instructions.
fn check(block_type: BlockType, bytes: &[u8]) {
    let len = bytes.len() / block_type.block_bytes() * block_type.block_len();
    let mut want = vec![0.0f32; len];
    block_type.decode_with(InstructionSet::PORTABLE, bytes, &mut want);
    let rounded: Vec<bf16> = want.iter().map(|v| bf16::from_f32(*v)).collect();
    let mut want_halves = vec![bf16::ZERO; len];
    block_type.decode_with(InstructionSet::PORTABLE, bytes, &mut want_halves);
    assert_eq!(quiet(&want_halves), quiet(&rounded), "{} rounded", block_type.name());
    for instructions in InstructionSet::available() {
        let mut singles = vec![f32::NAN; len];
        block_type.decode_with(instructions, bytes, &mut singles);
        let mut halves = vec![bf16::NAN; len];
        block_type.decode_with(instructions, bytes, &mut halves);
        for i in 0..len {
            let name = || format!("{} {} value {i} of {len}", instructions.name(), block_type.name());
            assert!(same(singles[i], want[i]), "{}: {} instead of {}", name(), singles[i], want[i]);
            let (got, want) = (halves[i], want_halves[i]);
            assert!(same(got.to_f32(), want.to_f32()), "{}: {got} instead of {want}", name());
        }
    }
}

/// Equal in every bit, or both NaN: which NaN an operation on two of them gives is not defined.
fn same(a: f32, b: f32) -> bool {
    a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan())
}

fn bits_f32(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

fn bits_bf16(values: &[bf16]) -> Vec<u16> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// The bits, with one NaN for all: values stored as BF16 are copied, and rounding makes a NaN quiet.
fn quiet(values: &[bf16]) -> Vec<u16> {
    values.iter().map(|v| if v.is_nan() { bf16::NAN.to_bits() } else { v.to_bits() }).collect()
}

fn take(random: &mut impl Iterator<Item = u8>, count: usize) -> Vec<u8> {
    random.take(count).collect()
}

/// The upper bytes of a linear congruential generator.
fn random_bytes(seed: u64) -> impl Iterator<Item = u8> {
    let step =
        |s: &u64| Some(s.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407));
    std::iter::successors(Some(seed), step).skip(3).map(|s| (s >> 56) as u8)
}
