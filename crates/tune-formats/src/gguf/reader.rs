//! Reads the GGUF container: metadata, tensor list, and where the bytes of each tensor lie.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tune_quant::{BlockType, ByteView, SharedBytes};

use super::cursor::{Cursor, ListedTensor};
use super::{ALIGNMENT, Metadata, Value, split};
use crate::FormatError;
use crate::mapped::map;

/// The fewest bytes of a metadata record: key length, one character, type, one byte.
const MIN_RECORD: usize = 8 + 1 + 4 + 1;
/// The fewest bytes of a tensor record: name length, one character, dimension count, one dimension, type, offset.
const MIN_TENSOR: usize = 8 + 1 + 4 + 8 + 4 + 8;

/// An open GGUF file, or all parts of a split one.
pub struct GgufFile {
    path: PathBuf,
    metadata: Metadata,
    tensors: Vec<TensorInfo>,
    by_name: HashMap<String, usize>,
    shards: Vec<Shard>,
}

/// A tensor of a GGUF file, as listed in its header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// GGUF name, e.g. `blk.0.attn_q.weight`.
    pub name: String,
    /// Dimensions in file order: `dims[0]` is contiguous, so a linear layer has `[d_in, d_out]`.
    pub dims: Vec<usize>,
    /// How its values are stored.
    pub block_type: BlockType,
    shard: usize,
    range: Range<usize>,
}

/// One part of a file.
struct Shard {
    path: PathBuf,
    bytes: Arc<dyn SharedBytes>,
}

impl GgufFile {
    /// Opens a file, or a split set by its first part, as memory maps.
    ///
    /// # Errors
    /// A file that cannot be read, is damaged or truncated, has unsupported tensor types or missing parts.
    pub fn open(path: &Path) -> Result<Self, FormatError> {
        let first = Self::from_shard(path, map(path)?)?;
        split::complete(first, |path| Self::from_shard(path, map(path)?))
    }

    /// Reads a complete file from memory; `path` names it in messages.
    ///
    /// # Errors
    /// As [`GgufFile::open`].
    pub fn from_bytes(path: &Path, bytes: Vec<u8>) -> Result<Self, FormatError> {
        let first = Self::from_shard(path, Arc::new(bytes))?;
        split::complete(first, |path| Self::from_shard(path, map(path)?))
    }

    /// The file, or the first part.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// All parts, in order.
    pub fn parts(&self) -> impl ExactSizeIterator<Item = &Path> {
        self.shards.iter().map(|shard| shard.path.as_path())
    }

    /// Metadata of the model, without the `split.*` keys.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// All tensors, in file order.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// The tensor with this GGUF name.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.by_name.get(name).map(|&index| &self.tensors[index])
    }

    /// The bytes of a tensor of this file, as stored, without copying.
    ///
    /// # Errors
    /// A tensor of another file.
    pub fn data(&self, tensor: &TensorInfo) -> Result<ByteView, FormatError> {
        self.bytes(tensor, tensor.range.clone())
    }

    /// The bytes of some rows (along `dims[0]`) of a tensor of this file.
    pub(crate) fn rows(&self, tensor: &TensorInfo, rows: Range<usize>) -> Result<ByteView, FormatError> {
        let row_bytes = tensor.range.len() / tensor.rows().max(1);
        let start = tensor.range.start + rows.start * row_bytes;
        self.bytes(tensor, start..start + rows.len() * row_bytes)
    }

    fn bytes(&self, tensor: &TensorInfo, range: Range<usize>) -> Result<ByteView, FormatError> {
        self.shards
            .get(tensor.shard)
            .and_then(|shard| ByteView::new(Arc::clone(&shard.bytes), range))
            .ok_or_else(|| FormatError::tensor(&tensor.name, format!("is not in {}", self.path.display())))
    }

    fn from_shard(path: &Path, bytes: Arc<dyn SharedBytes>) -> Result<Self, FormatError> {
        let (metadata, tensors) = parse(path, (*bytes).as_ref())?;
        let by_name = tensors.iter().enumerate().map(|(i, tensor)| (tensor.name.clone(), i)).collect();
        let shards = vec![Shard { path: path.to_owned(), bytes }];
        Ok(Self { path: path.to_owned(), metadata, tensors, by_name, shards })
    }

    /// Adds the tensors of the next part.
    pub(super) fn append(&mut self, part: Self) -> Result<(), FormatError> {
        let shard = self.shards.len();
        self.shards.extend(part.shards);
        for tensor in part.tensors {
            if self.by_name.insert(tensor.name.clone(), self.tensors.len()).is_some() {
                let what = format!("tensor {} is also in an earlier part", tensor.name);
                return Err(FormatError::damaged(&part.path, what));
            }
            self.tensors.push(TensorInfo { shard, ..tensor });
        }
        Ok(())
    }

    pub(super) fn metadata_mut(&mut self) -> &mut Metadata {
        &mut self.metadata
    }
}

impl fmt::Debug for GgufFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "GgufFile({}, {} tensors)", self.path.display(), self.tensors.len())
    }
}

impl TensorInfo {
    /// Shape in Hugging Face (row-major) order, without trailing dimensions of one element in the file.
    pub fn shape(&self) -> Vec<usize> {
        let used = self.dims.iter().rposition(|&dim| dim != 1).map_or(1, |last| last + 1);
        self.dims[..used].iter().rev().copied().collect()
    }

    /// Number of values.
    pub fn elements(&self) -> usize {
        self.dims.iter().product()
    }

    /// Number of rows along `dims[0]`.
    pub fn rows(&self) -> usize {
        self.dims[1..].iter().product()
    }

    /// Bytes in the file, without padding.
    pub fn byte_len(&self) -> usize {
        self.range.len()
    }
}

/// Header, metadata and tensor list of one file.
fn parse(path: &Path, bytes: &[u8]) -> Result<(Metadata, Vec<TensorInfo>), FormatError> {
    let mut cursor = Cursor::new(path, bytes);
    cursor.header()?;
    let tensor_count = cursor.count("tensors", MIN_TENSOR)?;
    let record_count = cursor.count("metadata records", MIN_RECORD)?;

    let mut metadata = Metadata::new();
    let mut keys = HashSet::new();
    for _ in 0..record_count {
        let key = cursor.string("a metadata key")?;
        if key.is_empty() {
            return Err(cursor.damaged("a metadata key is empty"));
        }
        if !keys.insert(key.clone()) {
            return Err(cursor.damaged(format!("metadata key {key} occurs twice")));
        }
        let value = cursor.value(&key)?;
        metadata.push(key, value);
    }

    let alignment = alignment(&metadata).map_err(|reason| FormatError::damaged(path, reason))?;
    let mut listed = Vec::new();
    let mut names = HashSet::new();
    for _ in 0..tensor_count {
        let tensor = cursor.tensor()?;
        if !names.insert(tensor.name.clone()) {
            return Err(cursor.damaged(format!("tensor {} occurs twice", tensor.name)));
        }
        listed.push(tensor);
    }
    let data_start = cursor.position().next_multiple_of(alignment);
    let tensors = lay_out(&cursor, data_start, alignment, listed)?;
    Ok((metadata, tensors))
}

/// The alignment of tensor data that the metadata asks for.
pub(super) fn alignment(metadata: &Metadata) -> Result<usize, String> {
    match metadata.get("general.alignment") {
        None => Ok(ALIGNMENT),
        Some(Value::U32(alignment)) if alignment.is_power_of_two() => Ok(*alignment as usize),
        Some(other) => Err(format!("general.alignment is {other:?}, expected a u32 that is a power of two")),
    }
}

/// Checks types and offsets, and gives each tensor its place in the file.
fn lay_out(
    cursor: &Cursor<'_>,
    data_start: usize,
    alignment: usize,
    listed: Vec<ListedTensor>,
) -> Result<Vec<TensorInfo>, FormatError> {
    let path = cursor.path();
    let unsupported = listed
        .iter()
        .filter(|tensor| BlockType::from_ggml_id(tensor.ggml_type).is_none())
        .map(|tensor| format!("{}: {}", tensor.name, ggml_type_name(tensor.ggml_type)))
        .collect::<Vec<_>>();
    if !unsupported.is_empty() {
        let supported = BlockType::ALL.map(BlockType::name).join(" ");
        return Err(FormatError::UnsupportedTypes { path: path.to_owned(), tensors: unsupported, supported });
    }

    let mut tensors = Vec::new();
    let mut expected_offset = 0_usize;
    for ListedTensor { name, dims, ggml_type, offset } in listed {
        let Some(block_type) = BlockType::from_ggml_id(ggml_type) else { continue };
        if dims[0] % block_type.block_len() != 0 {
            let what = format!(
                "tensor {name} has rows of {} values, expected a multiple of {} for {}",
                dims[0],
                block_type.block_len(),
                block_type.name()
            );
            return Err(FormatError::damaged(path, what));
        }
        if offset != expected_offset as u64 {
            let what = format!("tensor {name} is at offset {offset}, expected {expected_offset}");
            return Err(FormatError::damaged(path, what));
        }
        let place = dims[1..]
            .iter()
            .try_fold(block_type.row_bytes(dims[0]), |bytes, &dim| Some(bytes?.checked_mul(dim)))
            .flatten()
            .and_then(|len| {
                let start = data_start.checked_add(expected_offset)?;
                let end = start.checked_add(len)?;
                expected_offset = expected_offset.checked_add(len)?.checked_next_multiple_of(alignment)?;
                Some(start..end)
            });
        let Some(range) = place else {
            return Err(FormatError::damaged(path, format!("tensor {name} of {dims:?} values is too large")));
        };
        tensors.push(TensorInfo { name, dims, block_type, shard: 0, range });
    }
    let end = tensors.last().map_or(0, |tensor| tensor.range.end);
    match tensors.iter().find(|tensor| tensor.range.end > cursor.len()) {
        Some(first) => {
            Err(cursor.truncated(end as u64, format!("tensor {} and what follows it", first.name)))
        }
        None => Ok(tensors),
    }
}

/// Name of a ggml type that has no decoder here.
fn ggml_type_name(id: u32) -> String {
    let name = match id {
        9 => "Q8_1",
        15 => "Q8_K",
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        21 => "IQ3_S",
        22 => "IQ2_S",
        24 => "I8",
        25 => "I16",
        26 => "I32",
        27 => "I64",
        28 => "F64",
        29 => "IQ1_M",
        34 => "TQ1_0",
        35 => "TQ2_0",
        40 => "NVFP4",
        41 => "Q1_0",
        42 => "Q2_0",
        _ => return format!("unknown type {id}"),
    };
    name.to_owned()
}
