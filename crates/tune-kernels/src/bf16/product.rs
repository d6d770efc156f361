//! Sums of matrix products with `bf16` factors and `f32` sums, over factors as they are stored.
//!
//! ```text
//! C = Σᵢ Aᵢ Bᵢ        Aᵢ [m, kᵢ] in memory as bf16; Bᵢ [kᵢ, n] or [n, kᵢ]ᵀ, decoded block by block
//! ```
//!
//! A task makes some columns of C. It packs B into panels once, block of the depth by block, multiplies some rows of A
//! after others with them, and hands the finished sums of these rows on while they are in the cache, to be written in
//! whatever form is wanted. So a low-rank update, a bias, a residual or an activation costs no pass of its own over C.
//! Where B is too deep to be packed at once, that is done in portions, and sums of all rows wait for the last. Every
//! element is summed in the same order, whatever the number of tasks: with AVX-512 one addend after the other, with tiles
//! and elsewhere block by block.

use std::ops::Range;

use half::bf16;
use tune_quant::{StoredColumns, StoredMatrix};

use super::convert::round_row;
use super::tile::{
    PairedRows, PanelRow, Panels, Part, Sums, WIDTH, has_tiles, height, multiply, multiply_parts,
    pack_columns, pack_row_pair, widens,
};
use crate::cpu::{Buffer, for_each, prefetch, with_buffers};

/// Largest depth of a block: a panel of it takes 24 KiB, so it stays in the first-level cache.
const BLOCK_DEPTH: usize = 384;

/// Most columns of a task: a packed block of them takes 240 KiB.
const MOST_COLUMNS: usize = 320;

/// Most rows of a task: where sums have to wait, they take 2.5 MiB, whatever the number of tokens or, in the gradient of a
/// head, of ids. Columns are packed again for each task, which is little beside so many rows. (Equal parts of more rows can
/// be a few larger, up to the height of a tile.)
const MOST_ROWS: usize = 2048;

/// Rows whose sums are made at once: with [`MOST_COLUMNS`] they take 160 KiB of the second-level cache.
const ROWS_AT_ONCE: usize = 128;

/// Bytes of weights that a task packs at once, so many that they stay in the second-level cache: 1 MiB of the 2 that
/// processors with tiles have, and less of that of others.
pub fn packed_bytes() -> usize {
    if has_tiles() { 1 << 20 } else { 384 << 10 }
}

/// Bytes of `f32` that a thread keeps beside them, where factors are widened before they are multiplied: of rows of A whose
/// sums are made at once, and of some columns of B.
pub fn widened_bytes() -> usize {
    if widens() { ROWS_AT_ONCE * BLOCK_DEPTH * size_of::<f32>() + (16 << 10) } else { 0 }
}

/// Tasks for each thread, so that a thread that was held up does not keep the others waiting for long. More tasks have
/// fewer columns, and to decode a row in parts of three blocks takes three times as long as in parts of five.
const TASKS_PER_THREAD: usize = 2;

/// Rows of a stored matrix after the one that is read, of which the processor is told then: it foresees what follows in
/// memory, and these parts of rows do not.
const ROWS_AHEAD: usize = 6;

/// Panels that are multiplied with the same rows of A, so that it is worth while to copy these where they lie badly.
const FEWEST_PANELS_TO_GATHER: usize = 3;

/// A left factor: rows of `depth` values that begin `stride` apart.
#[derive(Clone, Copy)]
pub(super) struct Operand<'a> {
    values: &'a [bf16],
    rows: usize,
    depth: usize,
    stride: usize,
}

impl<'a> Operand<'a> {
    /// Rows from the beginning of `values` on.
    pub(super) fn new(values: &'a [bf16], rows: usize, depth: usize, stride: usize) -> Self {
        assert!(
            rows == 0 || (rows - 1) * stride + depth <= values.len(),
            "[{rows}, {depth}] with stride {stride} in {} values",
            values.len()
        );
        Self { values, rows, depth, stride }
    }

    /// The rows `rows`; those of an odd depth are copied to `buffer`, with a zero behind each.
    fn slice_rows<'b>(self, rows: Range<usize>, buffer: &'b mut Vec<bf16>) -> Operand<'b>
    where
        'a: 'b,
    {
        assert!(rows.end <= self.rows, "rows {rows:?} of {}", self.rows);
        let values = &self.values[(rows.start * self.stride).min(self.values.len())..];
        if self.depth.is_multiple_of(2) {
            return Self { values, rows: rows.len(), ..self };
        }
        let stride = self.depth + 1;
        buffer.clear();
        buffer.resize(rows.len() * stride, bf16::ZERO);
        for (row, out) in values.chunks(self.stride).zip(buffer.chunks_exact_mut(stride)) {
            out[..self.depth].copy_from_slice(&row[..self.depth]);
        }
        Operand { values: buffer, rows: rows.len(), depth: self.depth, stride }
    }
}

/// A matrix from which a right factor is made.
#[derive(Clone, Copy)]
pub(super) enum Source<'a> {
    /// In its stored form.
    Stored(&'a StoredMatrix),
    /// `f32`, rows of `cols` values one after the other.
    Floats { values: &'a [f32], cols: usize },
    /// `bf16`, rows that begin `stride` apart.
    Halves { values: &'a [bf16], stride: usize },
}

impl Source<'_> {
    /// Columns are read in ranges that begin at multiples of this power of two.
    fn granularity(&self) -> usize {
        match self {
            Self::Stored(matrix) => matrix.block_len(),
            Self::Floats { .. } | Self::Halves { .. } => 1,
        }
    }

    /// What reads the columns `cols` of its rows.
    fn columns(&self, cols: Range<usize>) -> Columns<'_> {
        match self {
            Self::Stored(matrix) => Columns::Stored(matrix.columns(cols)),
            Self::Floats { values, cols: width } => Columns::Floats { values, stride: *width, cols },
            Self::Halves { values, stride } => Columns::Halves { values, stride: *stride, cols },
        }
    }
}

/// Some columns of a [`Source`].
enum Columns<'a> {
    Stored(StoredColumns<'a>),
    Floats { values: &'a [f32], stride: usize, cols: Range<usize> },
    Halves { values: &'a [bf16], stride: usize, cols: Range<usize> },
}

impl Columns<'_> {
    /// Those of row `row`.
    fn read(&self, row: usize, out: &mut [bf16]) {
        match self {
            Self::Stored(columns) => {
                prefetch(columns.stored(row + ROWS_AHEAD));
                columns.decode_bf16(row, out);
            }
            Self::Floats { values, stride, cols } => round_row(&values[row * stride..][cols.clone()], out),
            Self::Halves { values, stride, cols } => {
                out.copy_from_slice(&values[row * stride..][cols.clone()]);
            }
        }
    }
}

/// A right factor.
#[derive(Clone, Copy)]
pub(super) enum Factor<'a> {
    /// The matrix `[k, n]` itself.
    Plain(Source<'a>),
    /// The transpose of a matrix `[n, k]`.
    Transposed(Source<'a>),
}

/// One product `A B` of a sum.
#[derive(Clone, Copy)]
pub(super) struct Term<'a> {
    pub(super) a: Operand<'a>,
    pub(super) b: Factor<'a>,
}

impl Term<'_> {
    /// Columns of this term are made in ranges that begin at multiples of this power of two.
    fn column_granularity(&self) -> usize {
        match self.b {
            Factor::Plain(source) => source.granularity(),
            Factor::Transposed(_) => 1,
        }
    }

    /// The depth in blocks of about the same size.
    fn blocks(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let granularity = match self.b {
            Factor::Plain(_) => 2,
            Factor::Transposed(source) => source.granularity().max(2),
        };
        let depth = self.a.depth;
        let count = depth.div_ceil(BLOCK_DEPTH).max(1);
        let size = depth.div_ceil(count).next_multiple_of(granularity).max(granularity);
        (0..depth).step_by(size).map(move |start| start..depth.min(start + size))
    }
}

/// Finished sums: the columns `cols` of the rows `rows` of C.
pub(super) struct Tile<'a> {
    pub(super) rows: Range<usize>,
    pub(super) cols: Range<usize>,
    values: &'a [f32],
    stride: usize,
}

impl<'a> Tile<'a> {
    /// The sums of row `row` of C.
    pub(super) fn row(&self, row: usize) -> &'a [f32] {
        &self.values[(row - self.rows.start) * self.stride..][..self.cols.len()]
    }
}

/// A sum of products, and what becomes of it.
pub(super) struct Product<'a> {
    /// Rows of C.
    pub(super) rows: usize,
    /// Columns of C.
    pub(super) cols: usize,
    /// At least one.
    pub(super) terms: Vec<Term<'a>>,
    /// Called from several threads, for tiles that together cover C once.
    pub(super) finish: Box<dyn Fn(Tile) + Sync + 'a>,
}

/// Makes all of `products` on the whole thread pool.
pub(super) fn run(products: &[Product]) {
    let wanted = TASKS_PER_THREAD * rayon::current_num_threads();
    let work = |p: &Product| p.rows * p.cols * p.terms.iter().map(|t| t.a.depth).sum::<usize>();
    let all: usize = products.iter().map(work).sum();
    let mut tasks: Vec<(&Product, Range<usize>, Range<usize>)> = Vec::new();
    for product in products.iter().filter(|product| product.cols > 0) {
        // a large product is cut into many tasks, a small one beside it into one
        let share = (wanted * work(product)).div_ceil(all.max(1)).max(1);
        let granularity = product.terms.iter().map(Term::column_granularity).max().unwrap_or(1).max(WIDTH);
        let most = (MOST_COLUMNS / granularity).max(1) * granularity;
        let columns = parts(product.cols, granularity, share.max(product.cols.div_ceil(most)));
        let row_tasks = (share / columns.len()).max(product.rows.div_ceil(MOST_ROWS)).max(1);
        for rows in parts(product.rows, height(), row_tasks) {
            tasks.extend(columns.iter().map(|cols| (product, rows.clone(), cols.clone())));
        }
    }
    for_each(tasks, |(product, rows, cols)| {
        with_buffers(|workspace: &mut Workspace| make_tile(product, rows, cols, workspace));
    });
}

/// `0..len` in up to `count` parts that begin at multiples of `unit` and differ by one of it at most.
fn parts(len: usize, unit: usize, count: usize) -> Vec<Range<usize>> {
    let units = len.div_ceil(unit);
    let count = count.min(units).max(1);
    let start = |i: usize| (i * units).div_ceil(count) * unit;
    (0..count).map(|i| start(i)..start(i + 1).min(len)).filter(|part| !part.is_empty()).collect()
}

/// Buffers of a task, kept by the thread for the next one.
#[derive(Default)]
struct Workspace {
    panels: Buffer<PanelRow>,
    decoded: Buffer<bf16>,
    /// Rows of A of an odd depth, for each block of a portion.
    padded: Vec<Vec<bf16>>,
    /// Rows of A, gathered.
    rows: Buffer<bf16>,
    sums: Buffer<f32>,
}

/// A block of the depth of a term.
struct Block<'a> {
    term: &'a Term<'a>,
    depth: Range<usize>,
}

impl Block<'_> {
    fn pairs(&self) -> usize {
        self.depth.len().div_ceil(2)
    }
}

fn make_tile(product: &Product, rows: Range<usize>, cols: Range<usize>, workspace: &mut Workspace) {
    let stride = cols.len().next_multiple_of(WIDTH);
    let panels_of_a_block = stride / WIDTH;
    let blocks = product.terms.iter().flat_map(|term| term.blocks().map(move |depth| Block { term, depth }));
    let portions = portions(blocks, packed_bytes() / size_of::<PanelRow>() / panels_of_a_block);
    let Workspace { panels, decoded, padded, rows: gathered, sums } = workspace;
    let waits = portions.len() > 1;
    let sums = sums.take(if waits { rows.len() } else { rows.len().min(ROWS_AT_ONCE) } * stride);
    for (i, portion) in portions.iter().enumerate() {
        let panels = panels.take(panels_of_a_block * portion.iter().map(Block::pairs).sum::<usize>());
        let mut rest = &mut *panels;
        for block in portion {
            let of_block = rest.split_off_mut(..panels_of_a_block * block.pairs()).unwrap_or_default();
            pack(block.term.b, block.depth.clone(), cols.clone(), decoded, of_block);
        }
        for top in rows.clone().step_by(ROWS_AT_ONCE) {
            let rows_at_once = top..rows.end.min(top + ROWS_AT_ONCE);
            let sums = &mut sums[if waits { (top - rows.start) * stride } else { 0 }..];
            let mut rest = &*panels;
            padded.resize_with(portion.len().max(padded.len()), Vec::new);
            let mut parts = Vec::with_capacity(portion.len());
            for (block, padded) in portion.iter().zip(padded.iter_mut()) {
                let of_block;
                (of_block, rest) = rest.split_at(panels_of_a_block * block.pairs());
                let panels = Panels::new(of_block, block.pairs()).narrow(cols.len());
                let a = block.term.a.slice_rows(rows_at_once.clone(), padded);
                let rows = PairedRows::new(&a.values[block.depth.start.min(a.values.len())..], a.stride);
                parts.push(Part { rows, panels });
            }
            let count = rows_at_once.len();
            multiply_all(count, &parts, &mut Sums::new(sums, stride), i > 0, gathered);
            if portion.is_empty() {
                sums[..rows_at_once.len() * stride].fill(0.0);
            }
            if i + 1 == portions.len() {
                (product.finish)(Tile { rows: rows_at_once, cols: cols.clone(), values: sums, stride });
            }
        }
    }
}

/// Blocks in runs of up to `most` pairs together, or of one that has more. There is at least one run.
fn portions<'a>(blocks: impl Iterator<Item = Block<'a>>, most: usize) -> Vec<Vec<Block<'a>>> {
    let mut portions = vec![Vec::new()];
    let mut pairs = 0;
    for block in blocks {
        pairs += block.pairs();
        if pairs > most && portions.last().is_some_and(|portion| !portion.is_empty()) {
            pairs = block.pairs();
            portions.push(Vec::new());
        }
        portions.last_mut().expect("at least one").push(block);
    }
    portions
}

/// [`multiply_parts`], with rows of A copied first where they lie badly and it is worth while.
fn multiply_all(
    count: usize,
    parts: &[Part],
    sums: &mut Sums,
    accumulate: bool,
    gathered: &mut Buffer<bf16>,
) {
    let is_slow = |part: &Part| part.panels.count() >= FEWEST_PANELS_TO_GATHER && part.rows.is_slow();
    if !parts.iter().any(is_slow) {
        return multiply_parts(count, parts, sums, accumulate);
    }
    let height = height();
    for (i, part) in parts.iter().enumerate() {
        for top in (0..count).step_by(height) {
            let count = height.min(count - top);
            let rows = part.rows.gather(top, count, 2 * part.panels.pairs(), gathered);
            multiply(count, rows, part.panels, &mut sums.below(top), accumulate || i > 0);
        }
    }
}

/// Packs rows `block`, columns `cols` of B into panels of `block.len() / 2` pairs each.
fn pack(
    b: Factor,
    block: Range<usize>,
    cols: Range<usize>,
    decoded: &mut Buffer<bf16>,
    panels: &mut [PanelRow],
) {
    let pairs = block.len().div_ceil(2);
    match b {
        Factor::Transposed(Source::Halves { values, stride, .. }) if block.len().is_multiple_of(2) => {
            for (panel, first) in panels.chunks_exact_mut(pairs).zip(cols.clone().step_by(WIDTH)) {
                let count = WIDTH.min(cols.end - first);
                pack_columns(&values[first * stride + block.start..], count, stride, panel);
            }
        }
        Factor::Transposed(source) => {
            let depth = 2 * pairs;
            let decoded = decoded.take(WIDTH * depth);
            let columns = source.columns(block.clone());
            for (panel, first) in panels.chunks_exact_mut(pairs).zip(cols.clone().step_by(WIDTH)) {
                let count = WIDTH.min(cols.end - first);
                for (j, column) in decoded.chunks_exact_mut(depth).take(count).enumerate() {
                    columns.read(first + j, &mut column[..block.len()]);
                    column[block.len()..].fill(bf16::ZERO);
                }
                pack_columns(decoded, count, depth, panel);
            }
        }
        Factor::Plain(Source::Halves { values, stride, .. }) => {
            for (p, k) in block.clone().step_by(2).enumerate() {
                let even = &values[k * stride..][cols.clone()];
                let odd = if k + 1 < block.end { &values[(k + 1) * stride..][cols.clone()] } else { &[] };
                pack_row(even, odd, p, pairs, panels);
            }
        }
        Factor::Plain(source) => {
            let (even, odd) = decoded.take(2 * cols.len()).split_at_mut(cols.len());
            let columns = source.columns(cols);
            for (p, k) in block.clone().step_by(2).enumerate() {
                columns.read(k, even);
                if k + 1 < block.end {
                    columns.read(k + 1, odd);
                } else {
                    odd.fill(bf16::ZERO);
                }
                pack_row(even, odd, p, pairs, panels);
            }
        }
    }
}

/// Packs a pair of rows of B as row `p` of every panel.
fn pack_row(even: &[bf16], odd: &[bf16], p: usize, pairs: usize, panels: &mut [PanelRow]) {
    for (panel, left) in panels.chunks_exact_mut(pairs).zip((0..).step_by(WIDTH)) {
        let columns = left..even.len().min(left + WIDTH);
        let odd = odd.get(columns.clone()).unwrap_or_default();
        pack_row_pair(&even[columns], odd, &mut panel[p]);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use tune_quant::BlockType;

    use super::*;
    use crate::testing::{frozen, uniform};

    fn halves(seed: u64, len: usize) -> Vec<bf16> {
        uniform(seed, len).into_iter().map(bf16::from_f32).collect()
    }

    /// C of one product, in f64 and by [`run`].
    fn assert_product(rows: usize, cols: usize, terms: &[Term], b_at: &dyn Fn(usize, usize, usize) -> f64) {
        let got = Mutex::new(vec![f32::NAN; rows * cols]);
        run(&[Product {
            rows,
            cols,
            terms: terms.to_vec(),
            finish: Box::new(|tile| {
                for row in tile.rows.clone() {
                    got.lock().unwrap()[row * cols..][tile.cols.clone()].copy_from_slice(tile.row(row));
                }
            }),
        }]);
        let got = got.into_inner().unwrap();
        for row in 0..rows {
            for col in 0..cols {
                let of_term = |(i, term): (usize, &Term)| {
                    let a = &term.a.values[row * term.a.stride..][..term.a.depth];
                    a.iter().enumerate().map(|(k, a)| a.to_f64() * b_at(i, k, col)).sum::<f64>()
                };
                let want: f64 = terms.iter().enumerate().map(of_term).sum();
                let got = f64::from(got[row * cols + col]);
                assert!(
                    (got - want).abs() < 1e-3 * want.abs().max(1.0),
                    "[{row}, {col}]: {got}, want {want}"
                );
            }
        }
    }

    #[test]
    fn sums_of_products_of_ragged_shapes() {
        for (m, k, r, n) in [(1, 1, 1, 1), (3, 5, 2, 7), (25, 33, 3, 70), (13, 900, 16, 37), (0, 4, 2, 4)] {
            let (x, h) = (halves(1, m * (k + 1)), halves(2, m * (r + 1)));
            let (w, b) = (halves(3, n * k), uniform(4, n * r));
            let (x, h) = (Operand::new(&x, m, k, k + 1), Operand::new(&h, m, r, r + 1));
            let rounded: Vec<bf16> = b.iter().map(|v| bf16::from_f32(*v)).collect();
            let source = Source::Halves { values: &w, stride: k };
            let terms = vec![
                Term { a: x, b: Factor::Transposed(source) },
                Term { a: h, b: Factor::Transposed(Source::Floats { values: &b, cols: r }) },
            ];
            assert_product(m, n, &terms, &|i, k_, j| match i {
                0 => w[j * k + k_].to_f64(),
                _ => rounded[j * r + k_].to_f64(),
            });
            let (w, b) = (halves(3, n * k), uniform(4, n * r));
            let terms = vec![
                Term { a: x, b: Factor::Plain(Source::Halves { values: &w, stride: n }) },
                Term { a: h, b: Factor::Plain(Source::Floats { values: &b, cols: n }) },
            ];
            assert_product(m, n, &terms, &|i, k_, j| match i {
                0 => w[k_ * n + j].to_f64(),
                _ => rounded[k_ * n + j].to_f64(),
            });
        }
    }

    #[test]
    fn parts_of_about_the_same_size() {
        let lens = |len, unit, count| parts(len, unit, count).iter().map(Range::len).collect::<Vec<_>>();
        assert_eq!(lens(576, 32, 4), [160, 128, 160, 128]);
        assert_eq!(lens(2048, 12, 1), [2048]);
        assert_eq!(lens(70, 32, 9), [32, 32, 6]);
        assert_eq!(lens(0, 12, 3), [0; 0]);
        for (len, unit, count) in [(4096, 12, 2), (49152, 32, 154), (577, 32, 5), (1, 12, 6)] {
            let parts = parts(len, unit, count);
            assert!(
                parts.len() <= count && parts.first().unwrap().start == 0 && parts.last().unwrap().end == len
            );
            assert!(parts.windows(2).all(|pair| pair[0].end == pair[1].start && pair[1].start % unit == 0));
        }
    }

    #[test]
    fn stored_factors_of_every_type() {
        for block_type in BlockType::ALL {
            let [n, k] = [70, 512];
            let w = frozen(block_type, [n, k]);
            let mut rounded = vec![bf16::ZERO; n * k];
            for (row, out) in rounded.chunks_exact_mut(k).enumerate() {
                w.matrix().columns(0..k).decode_bf16(row, out);
            }
            let a = halves(5, 14 * k);
            let forward =
                Term { a: Operand::new(&a, 14, k, k), b: Factor::Transposed(Source::Stored(w.matrix())) };
            assert_product(14, n, &[forward], &|_, k_, j| rounded[j * k + k_].to_f64());
            let backward =
                Term { a: Operand::new(&a, 14, n, n), b: Factor::Plain(Source::Stored(w.matrix())) };
            assert_product(14, k, &[backward], &|_, k_, j| rounded[k_ * k + j].to_f64());
        }
    }
}
