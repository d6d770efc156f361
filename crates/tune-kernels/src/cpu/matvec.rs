//! Products of a few rows of x with a stored matrix, straight from its blocks.
//!
//! ```text
//! y[t, i] = Σ_j x[t, j] W[i, j]
//! ```
//!
//! For up to [`MAX_ROWS`] rows reading and decoding W is most of the work, so no decoded value is ever written to
//! memory: a block is decoded in registers, sixteen values at a time, multiplied with x in `f32`, and forgotten.
//! What is decoded is decoded exactly and x is not rounded, so results differ from those of other paths only in the
//! order of sums. That order is the same for any number of threads.
//!
//! The decoders are written once, over [`Lanes`], for AVX-512, AVX2 with FMA, and plain Rust; the widest that the
//! processor has is chosen at run time.

#![allow(
    clippy::inline_always,
    reason = "a vector instruction is one only where it is inlined into a function compiled for its set"
)]

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod blocks;
mod lanes;
mod nf4;

use tune_quant::nf4::{Nf4Parts, dynamic_map};
use tune_quant::{BlockType, Storage, StoredMatrix};

use super::instruction_set::InstructionSet;
use super::math::dot;
use blocks::{Bf16, Block, F16, F32, Q4_0, Q4_1, Q4K, Q5_0, Q5_1, Q5K, Q6K, Q8_0};
use lanes::{Lanes, Portable};

/// The most rows of x that one pass over W serves.
pub(crate) const MAX_ROWS: usize = 4;

/// Columns of the shortest block: x is padded with zeros to a multiple of it.
const PADDING: usize = 32;

/// Sixteen columns of x in one cache line: across two, a load takes twice as long.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; 16]);

/// Up to [`MAX_ROWS`] rows of x, ready to meet rows of W.
pub(crate) struct FewRows {
    tokens: usize,
    d_in: usize,
    lines: Vec<Line>,
    set: InstructionSet,
}

impl FewRows {
    /// One to [`MAX_ROWS`] rows of `d_in` values.
    pub(crate) fn new<'a>(x: impl Iterator<Item = &'a [f32]>, d_in: usize) -> Self {
        Self::on(InstructionSet::best(), x, d_in)
    }

    fn on<'a>(set: InstructionSet, x: impl Iterator<Item = &'a [f32]>, d_in: usize) -> Self {
        let mut lines = Vec::new();
        let mut tokens = 0;
        for row in x {
            assert_eq!(row.len(), d_in, "columns of row {tokens} of x");
            let (whole, rest) = row.as_chunks::<16>();
            lines.extend(whole.iter().copied().map(Line));
            let mut last = Line([0.0; 16]);
            last.0[..rest.len()].copy_from_slice(rest);
            lines.push(last);
            tokens += 1;
            lines.resize(tokens * d_in.next_multiple_of(PADDING) / 16, Line([0.0; 16]));
        }
        assert!((1..=MAX_ROWS).contains(&tokens), "{tokens} rows of x");
        Self { tokens, d_in, lines, set }
    }

    /// Writes the products with the rows of `w` from `first` on: for each, one with every row of x.
    pub(crate) fn times(&self, w: &StoredMatrix, first: usize, products: &mut [f32]) {
        let Self { tokens, d_in, .. } = *self;
        assert_eq!(w.cols(), d_in, "columns of W and x");
        assert!(products.len().is_multiple_of(tokens) && first + products.len() / tokens <= w.rows());
        let job = Job { w, first, tokens, products };
        let x = |t: usize| {
            let lines = self.lines.len() / tokens;
            &self.lines[t.min(tokens - 1) * lines..][..lines]
        };
        match tokens {
            1 => run(self.set, job, [x(0)]),
            _ => run(self.set, job, [x(0), x(1), x(2), x(3)]),
        }
    }
}

/// Rows of W, and where their products with `tokens` rows of x go.
struct Job<'a> {
    w: &'a StoredMatrix,
    first: usize,
    tokens: usize,
    products: &'a mut [f32],
}

fn run<const M: usize>(set: InstructionSet, job: Job, x: [&[Line]; M]) {
    assert!(set <= InstructionSet::best(), "{set:?} on a processor with {:?}", InstructionSet::best());
    // SAFETY: the processor has the set.
    #[allow(unsafe_code)]
    unsafe {
        match set {
            InstructionSet::Portable => portable(job, x),
            #[cfg(target_arch = "x86_64")]
            InstructionSet::Avx2 => avx2(job, x),
            #[cfg(target_arch = "x86_64")]
            InstructionSet::Avx512 | InstructionSet::Amx => avx512(job, x),
            #[cfg(not(target_arch = "x86_64"))]
            InstructionSet::Avx2 | InstructionSet::Avx512 | InstructionSet::Amx => portable(job, x),
        }
    }
}

/// The functions of one instruction set: one for every storage type, and the choice between them.
macro_rules! of_instruction_set {
    ($(#[$meta:meta])* $name:ident, $lanes:ty) => {
        /// # Safety
        /// The processor has the instruction set.
        #[allow(unsafe_code)]
        unsafe fn $name<const M: usize>(job: Job, x: [&[Line]; M]) {
            $(#[$meta])*
            fn block_rows<B: Block<BYTES>, const BYTES: usize, const M: usize>(
                job: Job,
                bytes: &[u8],
                x: [&[Line]; M],
            ) {
                times_block_rows::<$lanes, B, BYTES, M>(job, bytes, x);
            }
            $(#[$meta])*
            fn nf4_rows<const M: usize>(job: Job, parts: &Nf4Parts, x: [&[Line]; M]) {
                times_nf4_rows::<$lanes, M>(job, parts, x);
            }
            // SAFETY: the caller has asked the processor.
            #[allow(unsafe_code, unused_unsafe)]
            unsafe {
                match job.w.storage() {
                    Storage::Blocks { block_type, bytes } => match block_type {
                        BlockType::F32 => block_rows::<F32, 128, M>(job, bytes, x),
                        BlockType::F16 => block_rows::<F16, 64, M>(job, bytes, x),
                        BlockType::BF16 => block_rows::<Bf16, 64, M>(job, bytes, x),
                        BlockType::Q4_0 => block_rows::<Q4_0, 18, M>(job, bytes, x),
                        BlockType::Q4_1 => block_rows::<Q4_1, 20, M>(job, bytes, x),
                        BlockType::Q5_0 => block_rows::<Q5_0, 22, M>(job, bytes, x),
                        BlockType::Q5_1 => block_rows::<Q5_1, 24, M>(job, bytes, x),
                        BlockType::Q8_0 => block_rows::<Q8_0, 34, M>(job, bytes, x),
                        BlockType::Q4K => block_rows::<Q4K, 144, M>(job, bytes, x),
                        BlockType::Q5K => block_rows::<Q5K, 176, M>(job, bytes, x),
                        BlockType::Q6K => block_rows::<Q6K, 210, M>(job, bytes, x),
                        _ => times_decoded_rows(job, x),
                    },
                    Storage::Nf4(nf4) if job.w.cols().is_multiple_of(tune_quant::nf4::BLOCK) => {
                        nf4_rows(job, &nf4.parts(), x);
                    }
                    Storage::Nf4(_) => times_decoded_rows(job, x),
                }
            }
        }
    };
}

of_instruction_set!(portable, Portable);
#[cfg(target_arch = "x86_64")]
of_instruction_set!(
    #[target_feature(enable = "avx2,fma,f16c")]
    avx2,
    avx2::Avx2
);
#[cfg(target_arch = "x86_64")]
of_instruction_set!(
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    avx512,
    avx512::Avx512
);

#[inline(always)]
fn times_block_rows<S: Lanes, B: Block<BYTES>, const BYTES: usize, const M: usize>(
    Job { w, first, tokens, products }: Job,
    bytes: &[u8],
    x: [&[Line]; M],
) {
    let row_bytes = bytes.len() / w.rows();
    let order = w.row_order();
    for (i, products) in products.chunks_exact_mut(tokens).enumerate() {
        let start = order.stored_row(first + i) * row_bytes;
        let (blocks, rest) = bytes[start..start + row_bytes].as_chunks::<BYTES>();
        let mut sums = Sums::<S, M>::new(x);
        for (i, block) in blocks.iter().enumerate() {
            B::add_to(block, i * B::LEN, &mut sums);
        }
        if !rest.is_empty() {
            // the end of a row of F32, F16 or BF16: bytes of zero are zeros
            let mut block = [0; BYTES];
            block[..rest.len()].copy_from_slice(rest);
            B::add_to(&block, blocks.len() * B::LEN, &mut sums);
        }
        sums.write(products);
    }
}

#[inline(always)]
fn times_nf4_rows<S: Lanes, const M: usize>(
    Job { w, first, tokens, products }: Job,
    parts: &Nf4Parts,
    x: [&[Line]; M],
) {
    let (map, blocks) = (dynamic_map(), w.cols() / tune_quant::nf4::BLOCK);
    for (i, products) in products.chunks_exact_mut(tokens).enumerate() {
        let mut sums = Sums::<S, M>::new(x);
        nf4::add_row(parts, map, (first + i) * blocks, blocks, &mut sums);
        sums.write(products);
    }
}

/// For the storage types without a decoder here: each row is decoded into the first-level cache.
fn times_decoded_rows<const M: usize>(Job { w, first, tokens, products }: Job, x: [&[Line]; M]) {
    let cols = w.cols();
    let mut row = vec![0.0; cols];
    for (i, products) in products.chunks_exact_mut(tokens).enumerate() {
        w.decode_row(first + i, &mut row);
        for (product, x) in products.iter_mut().zip(x) {
            *product = dot(&as_floats(x)[..cols], &row);
        }
    }
}

fn as_floats(lines: &[Line]) -> &[f32] {
    // SAFETY: a line is sixteen floats and nothing else.
    #[allow(unsafe_code)]
    unsafe {
        std::slice::from_raw_parts(lines.as_ptr().cast(), 16 * lines.len())
    }
}

/// The products of one row of W with M rows of x, as far as they have been added up.
struct Sums<'a, S, const M: usize> {
    x: [&'a [Line]; M],
    /// Runs of even and odd number apart, so that two additions are under way at once.
    chains: [[S; 2]; M],
}

impl<'a, S: Lanes, const M: usize> Sums<'a, S, M> {
    #[inline(always)]
    fn new(x: [&'a [Line]; M]) -> Self {
        Self { x, chains: [[S::splat(0.0); 2]; M] }
    }

    /// Adds the products of the sixteen `values` that begin `16 · run` columns after column `col`.
    #[inline(always)]
    fn add(&mut self, col: usize, run: usize, values: S) {
        for (x, chains) in self.x.iter().zip(&mut self.chains) {
            let chain = &mut chains[run % 2];
            *chain = values.mul_add(S::load(&x[col / 16 + run].0), *chain);
        }
    }

    #[inline(always)]
    fn write(self, products: &mut [f32]) {
        for (product, [even, odd]) in products.iter_mut().zip(self.chains) {
            *product = even.add(odd).sum();
        }
    }
}

#[cfg(test)]
#[allow(clippy::float_cmp)]
mod tests {
    use tune_quant::RowOrder;

    use super::*;
    use crate::testing::{assert_close, frozen, uniform};

    fn products(set: InstructionSet, w: &StoredMatrix, x: &[&[f32]]) -> Vec<f32> {
        let mut products = vec![f32::NAN; w.rows() * x.len()];
        FewRows::on(set, x.iter().copied(), w.cols()).times(w, 0, &mut products);
        products
    }

    /// Compares every instruction set with decoded rows, for one to four rows of x.
    fn assert_equals_decoded_rows(w: &StoredMatrix) {
        let (rows, cols) = (w.rows(), w.cols());
        let mut decoded = vec![0.0; rows * cols];
        decoded.chunks_exact_mut(cols).enumerate().for_each(|(i, row)| w.decode_row(i, row));
        let x = uniform(9, MAX_ROWS * cols);
        let x: Vec<&[f32]> = x.chunks_exact(cols).collect();
        let sum = |row: &[f32], x: &[f32]| {
            row.iter().zip(x).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum::<f64>()
        };
        for set in InstructionSet::available() {
            let what = format!("{set:?} {} [{rows}, {cols}]", w.type_name());
            for m in 1..=MAX_ROWS {
                let got = products(set, w, &x[..m]);
                let want =
                    decoded.chunks_exact(cols).flat_map(|row| x[..m].iter().map(move |x| sum(row, x) as f32));
                assert_close(&what, &got, &want.collect::<Vec<_>>(), 1e-6);
            }
            // A row of x picks a column of W, and must find exactly the decoded values there.
            for col in [0, cols / 3, cols / 2, cols - 1] {
                let mut x = vec![0.0; cols];
                x[col] = 1.0;
                let want: Vec<f32> = decoded.iter().skip(col).step_by(cols).copied().collect();
                assert_eq!(products(set, w, &[&x]), want, "{what} column {col}");
            }
        }
    }

    #[test]
    fn every_storage_type_on_every_instruction_set() {
        for block_type in BlockType::ALL {
            assert_equals_decoded_rows(frozen(block_type, [13, 512]).matrix());
            if block_type.block_len() <= 32 {
                assert_equals_decoded_rows(frozen(block_type, [5, 32]).matrix());
                assert_equals_decoded_rows(frozen(block_type, [7, 576]).matrix());
            }
        }
        let w = StoredMatrix::from_f32(9, 192, &uniform(3, 9 * 192)).to_nf4();
        assert_equals_decoded_rows(&w);
    }

    #[test]
    fn rows_of_any_length() {
        for cols in [1, 3, 15, 16, 17, 31, 33, 100, 573] {
            let values = uniform(4, 6 * cols);
            for block_type in [BlockType::F32, BlockType::F16, BlockType::BF16] {
                assert_equals_decoded_rows(frozen(block_type, [6, cols]).matrix());
            }
            // blocks of NF4 run across row ends
            assert_equals_decoded_rows(&StoredMatrix::from_f32(6, cols, &values).to_nf4());
        }
    }

    #[test]
    fn rows_in_interleaved_order() {
        let mut bytes = Vec::new();
        BlockType::Q4_1.encode(&uniform(5, 32 * 64), &mut bytes);
        let order = RowOrder::RotaryInterleaved { head_dim: 16 };
        let w = StoredMatrix::from_blocks(BlockType::Q4_1, 32, 64, bytes.into(), order);
        assert_equals_decoded_rows(&w.expect("32 rows of 64"));
    }

    #[test]
    fn the_same_bits_beside_other_rows_of_x_and_on_every_fused_instruction_set() {
        let w = frozen(BlockType::Q5K, [9, 512]);
        let x = uniform(6, MAX_ROWS * 512);
        let x: Vec<&[f32]> = x.chunks_exact(512).collect();
        let fused = InstructionSet::available().filter(|set| *set != InstructionSet::Portable);
        let alone = |set, x: &[f32]| products(set, w.matrix(), &[x]);
        let all: Vec<_> = fused.map(|set| (set, products(set, w.matrix(), &x))).collect();
        for (set, together) in &all {
            assert_eq!(together, &all[0].1, "{set:?}");
            for (t, x) in x.iter().enumerate() {
                let column: Vec<f32> = together.iter().skip(t).step_by(MAX_ROWS).copied().collect();
                assert_eq!(alone(*set, x), column, "{set:?} row {t}");
            }
        }
    }

    #[test]
    fn a_range_of_rows() {
        let w = frozen(BlockType::Q8_0, [20, 64]);
        let x = uniform(7, 64);
        let all = products(InstructionSet::Portable, w.matrix(), &[&x]);
        let mut some = [f32::NAN; 5];
        FewRows::on(InstructionSet::Portable, [&x[..]].into_iter(), 64).times(w.matrix(), 11, &mut some);
        assert_eq!(some, all[11..16]);
    }
}
