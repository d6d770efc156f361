//! A weight as it lies on disk: shared bytes, a block type, and the order of its rows.

use std::fmt;
use std::ops::{Deref, Range};
use std::sync::Arc;

use half::bf16;

use crate::nf4::Nf4Quantizer;
use crate::{BlockType, Decoded, InstructionSet, Nf4};

/// Bytes that several views share.
pub trait SharedBytes: AsRef<[u8]> + Send + Sync {
    /// These bytes are not needed for now: a file's pages may leave memory until they are read again. The content stays.
    fn release(&self, _range: Range<usize>) {}

    /// These bytes are read next: a file's pages may come to memory at once.
    fn prepare(&self, _range: Range<usize>) {}
}

impl SharedBytes for Vec<u8> {}

/// A range of shared bytes.
#[derive(Clone)]
pub struct ByteView {
    owner: Arc<dyn SharedBytes>,
    range: Range<usize>,
}

impl ByteView {
    /// The bytes `range` of `owner`, or `None` when `owner` is shorter.
    pub fn new(owner: Arc<dyn SharedBytes>, range: Range<usize>) -> Option<Self> {
        let len = (*owner).as_ref().len();
        (range.start <= range.end && range.end <= len).then_some(Self { owner, range })
    }

    /// A part of these bytes, without a copy, or `None` when there are fewer.
    pub fn slice(&self, range: Range<usize>) -> Option<Self> {
        if range.start > range.end || range.end > self.range.len() {
            return None;
        }
        let (start, end) = (self.range.start + range.start, self.range.start + range.end);
        Some(Self { owner: Arc::clone(&self.owner), range: start..end })
    }

    /// Whether other views hold the same owner.
    pub fn is_shared(&self) -> bool {
        Arc::strong_count(&self.owner) > 1
    }

    /// Lets the pages of a mapped file leave memory until they are read again.
    pub fn release(&self) {
        self.owner.release(self.range.clone());
    }

    /// Maps the pages of a mapped file, which are read next.
    pub fn prepare(&self) {
        self.owner.prepare(self.range.clone());
    }
}

impl From<Vec<u8>> for ByteView {
    fn from(bytes: Vec<u8>) -> Self {
        let range = 0..bytes.len();
        Self { owner: Arc::new(bytes), range }
    }
}

impl Deref for ByteView {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &(*self.owner).as_ref()[self.range.clone()]
    }
}

impl fmt::Debug for ByteView {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ByteView({} bytes)", self.range.len())
    }
}

/// How the values of a matrix are stored.
#[derive(Clone, Debug)]
pub enum Storage {
    /// Rows of blocks of one [`BlockType`], row after row.
    Blocks {
        /// The type of every block.
        block_type: BlockType,
        /// `rows · block_type.row_bytes(cols)` bytes.
        bytes: ByteView,
    },
    /// NF4 with double quantisation, made on load from 16-bit weights.
    Nf4(Arc<Nf4>),
}

/// The order in which the rows of a stored matrix lie, relative to the Hugging Face layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowOrder {
    /// As in the Hugging Face layout.
    Natural,
    /// GGUF files of architecture `llama` store q and k with the two rotary halves of each head interleaved:
    /// stored row `2j + h` of a head is Hugging Face row `h · head_dim/2 + j`, `h ∈ {0, 1}`.
    RotaryInterleaved {
        /// Rows per head.
        head_dim: usize,
    },
}

impl RowOrder {
    /// The stored row that holds Hugging Face row `row`.
    pub fn stored_row(self, row: usize) -> usize {
        match self {
            Self::Natural => row,
            Self::RotaryInterleaved { head_dim } => {
                let (head, within) = (row / head_dim, row % head_dim);
                let half = head_dim / 2;
                head * head_dim + 2 * (within % half) + within / half
            }
        }
    }
}

/// A matrix `[rows, cols]` (`[d_out, d_in]` for a linear layer) in its stored form.
///
/// Rows are addressed in Hugging Face order; [`RowOrder`] is resolved inside, so nothing above this type
/// ever permutes a weight, and a memory-mapped file is never copied.
#[derive(Clone, Debug)]
pub struct StoredMatrix {
    rows: usize,
    cols: usize,
    storage: Storage,
    row_order: RowOrder,
}

impl StoredMatrix {
    /// A matrix over stored blocks, or `None` when `bytes` is not exactly `rows` rows of `cols` values.
    pub fn from_blocks(
        block_type: BlockType,
        rows: usize,
        cols: usize,
        bytes: ByteView,
        row_order: RowOrder,
    ) -> Option<Self> {
        let expected = block_type.row_bytes(cols)?.checked_mul(rows)?;
        (bytes.len() == expected).then_some(Self {
            rows,
            cols,
            storage: Storage::Blocks { block_type, bytes },
            row_order,
        })
    }

    /// A matrix of `f32` values in natural order. `values.len()` must be `rows · cols`.
    pub fn from_f32(rows: usize, cols: usize, values: &[f32]) -> Self {
        assert_eq!(values.len(), rows * cols, "values of a [{rows}, {cols}] matrix");
        let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
        let storage = Storage::Blocks { block_type: BlockType::F32, bytes: bytes.into() };
        Self { rows, cols, storage, row_order: RowOrder::Natural }
    }

    /// The same matrix quantised to NF4 with double quantisation (row order becomes natural).
    #[must_use]
    pub fn to_nf4(&self) -> Self {
        let mut quantizer = Nf4Quantizer::with_capacity(self.rows * self.cols);
        let mut values = vec![0.0; self.cols];
        for row in 0..self.rows {
            self.decode_row(row, &mut values);
            quantizer.push(&values);
        }
        Self {
            rows: self.rows,
            cols: self.cols,
            storage: Storage::Nf4(Arc::new(quantizer.finish())),
            row_order: RowOrder::Natural,
        }
    }

    /// Lets what is mapped from a file leave memory until it is read again: after its last use, or long before the next.
    pub fn release(&self) {
        if let Storage::Blocks { bytes, .. } = &self.storage {
            bytes.release();
        }
    }

    /// Rows, the output features of a linear layer.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns, the input features of a linear layer.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// How the values are stored.
    pub fn storage(&self) -> &Storage {
        &self.storage
    }

    /// The order of the stored rows.
    pub fn row_order(&self) -> RowOrder {
        self.row_order
    }

    /// Bytes that the stored form occupies.
    pub fn stored_bytes(&self) -> usize {
        match &self.storage {
            Storage::Blocks { bytes, .. } => bytes.len(),
            Storage::Nf4(nf4) => nf4.stored_bytes(),
        }
    }

    /// Name of the storage type, as GGUF tools print it (`Q4_K`, `BF16`, …) or `NF4`.
    pub fn type_name(&self) -> &'static str {
        match &self.storage {
            Storage::Blocks { block_type, .. } => block_type.name(),
            Storage::Nf4(_) => "NF4",
        }
    }

    /// Whether the values are stored in fewer than 16 bits.
    pub fn is_quantized(&self) -> bool {
        match &self.storage {
            Storage::Blocks { block_type, .. } => block_type.is_quantized(),
            Storage::Nf4(_) => true,
        }
    }

    /// The stored bytes of Hugging Face row `row`, for block storage.
    pub fn row_blocks(&self, row: usize) -> Option<(BlockType, &[u8])> {
        match &self.storage {
            Storage::Blocks { block_type, bytes } => {
                let row_bytes = block_type.row_bytes(self.cols)?;
                let start = self.row_order.stored_row(row) * row_bytes;
                Some((*block_type, bytes.get(start..start + row_bytes)?))
            }
            Storage::Nf4(_) => None,
        }
    }

    /// All values in the order in which they are stored, where they are stored as `f32`: they need no decoding.
    pub fn as_f32(&self) -> Option<&[f32]> {
        match &self.storage {
            Storage::Blocks { block_type: BlockType::F32, bytes } if cfg!(target_endian = "little") => {
                bytemuck::try_cast_slice(bytes).ok()
            }
            _ => None,
        }
    }

    /// Decodes Hugging Face row `row` into `out`, which holds `cols` values.
    pub fn decode_row(&self, row: usize, out: &mut [f32]) {
        debug_assert_eq!(out.len(), self.cols);
        self.decode_with(InstructionSet::best(), row, 0..self.cols, out);
    }

    /// Values that are decoded together: ranges of columns begin and end at multiples of it.
    pub fn block_len(&self) -> usize {
        match &self.storage {
            Storage::Blocks { block_type, .. } => block_type.block_len(),
            Storage::Nf4(_) => crate::nf4::BLOCK,
        }
    }

    /// What decodes the columns `cols` of one row after the other. `cols` begins and ends at multiples of
    /// [`block_len`](Self::block_len), or ends with the row.
    ///
    /// # Panics
    ///
    /// If there are fewer columns, or `cols` begins or ends inside of a block.
    pub fn columns(&self, cols: Range<usize>) -> StoredColumns<'_> {
        assert!(cols.start <= cols.end && cols.end <= self.cols, "columns {cols:?} of {}", self.cols);
        StoredColumns {
            rows: self.rows,
            row_order: self.row_order,
            len: cols.len(),
            stored: match &self.storage {
                Storage::Blocks { block_type, bytes } => {
                    let byte_of =
                        |col| block_type.row_bytes(col).expect("columns begin and end with a block");
                    let (of_row, first) = (byte_of(self.cols), byte_of(cols.start));
                    let of_part = byte_of(cols.end) - first;
                    Stored::Blocks { block_type: *block_type, bytes, of_row, first, of_part }
                }
                Storage::Nf4(nf4) => Stored::Nf4 { nf4, of_row: self.cols, first: cols.start },
            },
        }
    }

    /// Decodes the columns `cols` of row `row` by the instructions given, to compare and to measure; ranges as in
    /// [`columns`](Self::columns).
    pub fn decode_with<T: Decoded>(
        &self,
        instructions: InstructionSet,
        row: usize,
        cols: Range<usize>,
        out: &mut [T],
    ) {
        self.columns(cols).decode_with(instructions, row, out);
    }
}

/// Some columns of a [`StoredMatrix`]: everything about them that is the same in each row is worked out once.
#[derive(Clone, Debug)]
pub struct StoredColumns<'a> {
    rows: usize,
    row_order: RowOrder,
    len: usize,
    stored: Stored<'a>,
}

/// Where the columns lie: those of the first row from `first` on, and `of_row` further those of the next.
#[derive(Clone, Debug)]
enum Stored<'a> {
    Blocks { block_type: BlockType, bytes: &'a [u8], of_row: usize, first: usize, of_part: usize },
    Nf4 { nf4: &'a Nf4, of_row: usize, first: usize },
}

impl StoredColumns<'_> {
    /// What Hugging Face row `row` is stored as, to be asked for before it is decoded: blocks, or the packed codes of NF4.
    /// Nothing where there is no such row.
    pub fn stored(&self, row: usize) -> &[u8] {
        if row >= self.rows {
            return &[];
        }
        match self.stored {
            Stored::Blocks { bytes, of_row, first, of_part, .. } => {
                let start = self.row_order.stored_row(row) * of_row + first;
                bytes.get(start..start + of_part).unwrap_or_default()
            }
            Stored::Nf4 { nf4, of_row, first } => {
                let codes = row * of_row + first..row * of_row + first + self.len;
                nf4.parts().packed.get(codes.start / 2..codes.end / 2).unwrap_or_default()
            }
        }
    }

    /// Decodes Hugging Face row `row`, rounded to the nearest `bf16` (ties to even).
    pub fn decode_bf16(&self, row: usize, out: &mut [bf16]) {
        debug_assert_eq!(out.len(), self.len);
        self.decode_with(InstructionSet::best(), row, out);
    }

    fn decode_with<T: Decoded>(&self, instructions: InstructionSet, row: usize, out: &mut [T]) {
        match self.stored {
            Stored::Blocks { block_type, bytes, of_row, first, of_part } => {
                let start = self.row_order.stored_row(row) * of_row + first;
                block_type.decode_with(instructions, &bytes[start..start + of_part], out);
            }
            Stored::Nf4 { nf4, of_row, first } => nf4.decode_with(instructions, row * of_row + first, out),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rotary_rows_are_read_in_hugging_face_order() {
        // two heads of four rows; the value of each stored row is its Hugging Face row
        let stored: Vec<f32> = [0, 2, 1, 3, 4, 6, 5, 7].into_iter().flat_map(|row| [row as f32; 2]).collect();
        let bytes: Vec<u8> = stored.iter().flat_map(|v| v.to_le_bytes()).collect();
        let order = RowOrder::RotaryInterleaved { head_dim: 4 };
        let matrix = StoredMatrix::from_blocks(BlockType::F32, 8, 2, bytes.into(), order).unwrap();
        for row in 0..8 {
            let mut out = [f32::NAN; 2];
            matrix.decode_row(row, &mut out);
            assert_eq!(out[..], [row as f32; 2]);
            let (block_type, blocks) = matrix.row_blocks(row).unwrap();
            assert_eq!(
                (block_type, blocks),
                (BlockType::F32, [row as f32; 2].map(f32::to_le_bytes).as_flattened())
            );
        }
        let mut nf4_row = [0.0; 2];
        matrix.to_nf4().decode_row(7, &mut nf4_row);
        assert!((nf4_row[0] - 7.0).abs() < 1e-3, "{nf4_row:?}");
    }

    #[test]
    fn wrong_sizes_are_refused() {
        let bytes = |n: usize| ByteView::from(vec![0u8; n]);
        let matrix = |rows, cols, n| {
            StoredMatrix::from_blocks(BlockType::Q8_0, rows, cols, bytes(n), RowOrder::Natural).is_some()
        };
        assert!(matrix(3, 64, 3 * 68));
        assert!(!matrix(3, 64, 3 * 68 - 1));
        assert!(!matrix(3, 48, 3 * 51));
        assert!(ByteView::new(Arc::new(vec![0u8; 4]), 2..5).is_none());
    }
}
