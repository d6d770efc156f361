//! A matrix of an adapter: in memory, or as it lies in a file.

use std::borrow::Cow;

use tune_quant::{BlockType, RowOrder, Storage, StoredMatrix};

/// The values of a matrix of an adapter: in memory, or as they lie in its file, from where nothing is copied until they are
/// asked for. What an export holds does not grow with the number of layers.
#[derive(Clone, Debug)]
pub enum Factor {
    /// In memory, row-major.
    Owned(Vec<f32>),
    /// In a file.
    Stored(StoredMatrix),
}

impl Factor {
    /// Number of values.
    pub fn len(&self) -> usize {
        match self {
            Self::Owned(values) => values.len(),
            Self::Stored(matrix) => matrix.rows() * matrix.cols(),
        }
    }

    /// Whether there are no values.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The values, row-major: where they are, if they are singles of this machine, else decoded for the caller.
    pub fn values(&self) -> Cow<'_, [f32]> {
        match self {
            Self::Owned(values) => Cow::Borrowed(values),
            Self::Stored(matrix) => {
                in_place(matrix).map_or_else(|| Cow::Owned(decoded(matrix)), Cow::Borrowed)
            }
        }
    }

    /// The values, to be changed; those of a file are copied first.
    pub fn to_mut(&mut self) -> &mut Vec<f32> {
        if let Self::Stored(matrix) = self {
            *self = Self::Owned(decoded(matrix));
        }
        match self {
            Self::Owned(values) => values,
            Self::Stored(_) => unreachable!("copied above"),
        }
    }

    /// Lets what is mapped from a file leave memory until it is read again.
    pub fn release(&self) {
        if let Self::Stored(matrix) = self {
            matrix.release();
        }
    }

    /// The same as a matrix of `cols` columns; what lies in a file is shared.
    pub fn matrix(&self, cols: usize) -> StoredMatrix {
        match self {
            Self::Owned(values) => StoredMatrix::from_f32(values.len() / cols.max(1), cols, values),
            Self::Stored(matrix) => matrix.clone(),
        }
    }
}

fn in_place(matrix: &StoredMatrix) -> Option<&[f32]> {
    match matrix.storage() {
        Storage::Blocks { block_type: BlockType::F32, bytes }
            if cfg!(target_endian = "little") && matrix.row_order() == RowOrder::Natural =>
        {
            bytemuck::try_cast_slice(bytes).ok()
        }
        _ => None,
    }
}

fn decoded(matrix: &StoredMatrix) -> Vec<f32> {
    let mut values = vec![0.0; matrix.rows() * matrix.cols()];
    for (row, out) in values.chunks_exact_mut(matrix.cols().max(1)).enumerate() {
        matrix.decode_row(row, out);
    }
    values
}

impl From<Vec<f32>> for Factor {
    fn from(values: Vec<f32>) -> Self {
        Self::Owned(values)
    }
}

impl PartialEq for Factor {
    fn eq(&self, other: &Self) -> bool {
        self.values() == other.values()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lies_in_a_file_reads_as_its_copy_in_memory() {
        let values: Vec<f32> = (0..8).map(|i| i as f32 - 3.5).collect();
        let halves: Vec<u8> = values.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect();
        let order = RowOrder::RotaryInterleaved { head_dim: 4 };
        let halves = |order| {
            let matrix = StoredMatrix::from_blocks(BlockType::BF16, 4, 2, halves.clone().into(), order);
            Factor::Stored(matrix.expect("whole rows"))
        };
        let singles = Factor::Stored(StoredMatrix::from_f32(4, 2, &values));
        let owned = Factor::Owned(values.clone());
        assert!([&singles, &halves(RowOrder::Natural)].into_iter().all(|factor| *factor == owned));
        assert!(matches!(singles.values(), Cow::Borrowed(_)), "singles are not copied");
        assert_eq!(halves(order).values()[..4], [values[0], values[1], values[4], values[5]]);
        let mut changed = singles.clone();
        changed.to_mut()[0] = 9.0;
        assert_eq!((changed.values()[0], singles.values()[0], owned.len()), (9.0, -3.5, 8));
        assert_eq!(Factor::Stored(owned.matrix(2)), owned);
    }
}
