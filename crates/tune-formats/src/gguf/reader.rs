//! Reads the GGUF container: header, metadata, tensor list.
//!
//! Nothing in the file is trusted: every length is checked against the bytes that are left before anything is
//! allocated, and every sum and product for overflow.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tune_quant::{BlockType, ByteView};

use super::value::type_name;
use super::{ALIGNMENT, Array, Metadata, Value, split};
use crate::FormatError;
use crate::mapped::{SharedBytes, map};

/// Longest string and longest array that the reference reader accepts.
const LIMIT: u64 = 1 << 30;
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
    bytes: SharedBytes,
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

    fn from_shard(path: &Path, bytes: SharedBytes) -> Result<Self, FormatError> {
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
    let mut cursor = Cursor { path, bytes, position: 0 };
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
    let data_start = cursor.position.next_multiple_of(alignment);
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
    let path = cursor.path;
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
        if range.end > cursor.bytes.len() {
            return Err(cursor.truncated(range.end, format!("tensor {name}")));
        }
        tensors.push(TensorInfo { name, dims, block_type, shard: 0, range });
    }
    Ok(tensors)
}

/// A tensor record as read.
struct ListedTensor {
    name: String,
    dims: Vec<usize>,
    ggml_type: u32,
    offset: u64,
}

/// A position in untrusted bytes.
struct Cursor<'a> {
    path: &'a Path,
    bytes: &'a [u8],
    position: usize,
}

impl<'a> Cursor<'a> {
    fn header(&mut self) -> Result<(), FormatError> {
        let magic = &self.bytes[..self.bytes.len().min(4)];
        if !magic.is_empty() && magic != &b"GGUF"[..magic.len()] {
            return Err(not_gguf(self.path, self.bytes));
        }
        self.take(4, "the magic number")?;
        let version = self.u32("the version")?;
        match version {
            2 | 3 => Ok(()),
            _ if version & 0xffff == 0 && version != 0 => {
                Err(FormatError::GgufBigEndian { path: self.path.to_owned() })
            }
            _ => Err(FormatError::GgufVersion { path: self.path.to_owned(), version }),
        }
    }

    /// A number of records of at least `min_bytes` each, which must still fit into the file.
    fn count(&mut self, what: &str, min_bytes: usize) -> Result<usize, FormatError> {
        let count = self.u64(&format!("the number of {what}"))?;
        if count > i64::MAX as u64 {
            return Err(self.damaged(format!("the number of {what} is negative")));
        }
        let needed = u128::from(count) * min_bytes as u128 + self.position as u128;
        if needed > self.bytes.len() as u128 {
            let expected = needed.min(u64::MAX.into()) as u64;
            return Err(self.truncated_u64(expected, format!("{count} {what}")));
        }
        Ok(count as usize)
    }

    fn tensor(&mut self) -> Result<ListedTensor, FormatError> {
        let name = self.string("a tensor name")?;
        if name.is_empty() || name.len() >= 64 {
            return Err(
                self.damaged(format!("tensor name {name:?} has {} bytes, expected 1 to 63", name.len()))
            );
        }
        let n_dims = self.u32(&name)?;
        if !(1..=4).contains(&n_dims) {
            return Err(self.damaged(format!("tensor {name} has {n_dims} dimensions, expected 1 to 4")));
        }
        let mut dims = Vec::new();
        for _ in 0..n_dims {
            let dim = self.u64(&name)?;
            match usize::try_from(dim) {
                Ok(dim @ 1..) if dim <= i64::MAX as usize => dims.push(dim),
                _ => return Err(self.damaged(format!("tensor {name} has a dimension of {}", dim as i64))),
            }
        }
        if dims.iter().try_fold(1_usize, |product, &dim| product.checked_mul(dim)).is_none() {
            return Err(self.damaged(format!("tensor {name} of {dims:?} values is too large")));
        }
        let ggml_type = self.u32(&name)?;
        let offset = self.u64(&name)?;
        Ok(ListedTensor { name, dims, ggml_type, offset })
    }

    fn value(&mut self, key: &str) -> Result<Value, FormatError> {
        let id = self.u32(key)?;
        Ok(match id {
            0 => Value::U8(u8::from_le_bytes(*self.array(key)?)),
            1 => Value::I8(i8::from_le_bytes(*self.array(key)?)),
            2 => Value::U16(u16::from_le_bytes(*self.array(key)?)),
            3 => Value::I16(i16::from_le_bytes(*self.array(key)?)),
            4 => Value::U32(self.u32(key)?),
            5 => Value::I32(i32::from_le_bytes(*self.array(key)?)),
            6 => Value::F32(f32::from_le_bytes(*self.array(key)?)),
            7 => Value::Bool(self.flag(key, self.bytes.get(self.position).copied())?),
            8 => Value::String(self.string(key)?),
            9 => Value::Array(self.elements(key)?),
            10 => Value::U64(self.u64(key)?),
            11 => Value::I64(i64::from_le_bytes(*self.array(key)?)),
            12 => Value::F64(f64::from_le_bytes(*self.array(key)?)),
            _ => return Err(self.damaged(format!("metadata key {key} has unknown type {id}"))),
        })
    }

    fn elements(&mut self, key: &str) -> Result<Array, FormatError> {
        let id = self.u32(key)?;
        let count = self.u64(key)?;
        if count > LIMIT {
            return Err(
                self.damaged(format!("metadata key {key} has {count} elements, at most {LIMIT} expected"))
            );
        }
        let count = count as usize;
        Ok(match id {
            0 => Array::U8(self.take(count, key)?.to_vec()),
            1 => Array::I8(self.numbers(key, count, i8::from_le_bytes)?),
            2 => Array::U16(self.numbers(key, count, u16::from_le_bytes)?),
            3 => Array::I16(self.numbers(key, count, i16::from_le_bytes)?),
            4 => Array::U32(self.numbers(key, count, u32::from_le_bytes)?),
            5 => Array::I32(self.numbers(key, count, i32::from_le_bytes)?),
            6 => Array::F32(self.numbers(key, count, f32::from_le_bytes)?),
            7 => {
                let start = self.position;
                let flags = self.take(count, key)?;
                self.position = start;
                let flags = flags.iter().map(|&byte| self.flag(key, Some(byte))).collect::<Result<_, _>>()?;
                Array::Bool(flags)
            }
            8 => {
                // No capacity: a count is cheap to forge, the strings behind it are not.
                let mut strings = Vec::new();
                for _ in 0..count {
                    strings.push(self.string(key)?);
                }
                Array::String(strings)
            }
            10 => Array::U64(self.numbers(key, count, u64::from_le_bytes)?),
            11 => Array::I64(self.numbers(key, count, i64::from_le_bytes)?),
            12 => Array::F64(self.numbers(key, count, f64::from_le_bytes)?),
            _ => {
                let name = type_name(id);
                return Err(self.damaged(format!("metadata key {key} is an array of {name} ({id})")));
            }
        })
    }

    fn numbers<T, const N: usize>(
        &mut self,
        key: &str,
        count: usize,
        decode: fn([u8; N]) -> T,
    ) -> Result<Vec<T>, FormatError> {
        let bytes = self.take(count.saturating_mul(N), key)?;
        Ok(bytes.as_chunks::<N>().0.iter().map(|chunk| decode(*chunk)).collect())
    }

    fn flag(&mut self, key: &str, byte: Option<u8>) -> Result<bool, FormatError> {
        self.take(1, key)?;
        match byte {
            Some(0) => Ok(false),
            Some(1) => Ok(true),
            other => {
                Err(self.damaged(format!("metadata key {key} has a flag of {other:?}, expected 0 or 1")))
            }
        }
    }

    fn string(&mut self, what: &str) -> Result<String, FormatError> {
        let len = self.u64(what)?;
        if len > LIMIT {
            return Err(self.damaged(format!("{what} is a string of {len} bytes, at most {LIMIT} expected")));
        }
        let bytes = self.take(len as usize, what)?;
        match std::str::from_utf8(bytes) {
            Ok(text) => Ok(text.to_owned()),
            Err(error) => Err(self.damaged(format!("{what} is not UTF-8: {error}"))),
        }
    }

    fn u32(&mut self, what: &str) -> Result<u32, FormatError> {
        Ok(u32::from_le_bytes(*self.array(what)?))
    }

    fn u64(&mut self, what: &str) -> Result<u64, FormatError> {
        Ok(u64::from_le_bytes(*self.array(what)?))
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<&'a [u8; N], FormatError> {
        match self.bytes[self.position..].first_chunk() {
            Some(chunk) => {
                self.position += N;
                Ok(chunk)
            }
            None => Err(self.truncated(self.position + N, what.to_owned())),
        }
    }

    fn take(&mut self, len: usize, what: &str) -> Result<&'a [u8], FormatError> {
        let bytes = self.bytes;
        match bytes[self.position..].get(..len) {
            Some(taken) => {
                self.position += len;
                Ok(taken)
            }
            None => Err(self.truncated(self.position.saturating_add(len), what.to_owned())),
        }
    }

    fn truncated(&self, expected: usize, what: String) -> FormatError {
        self.truncated_u64(expected as u64, what)
    }

    fn truncated_u64(&self, expected: u64, what: String) -> FormatError {
        FormatError::Truncated { path: self.path.to_owned(), expected, actual: self.bytes.len() as u64, what }
    }

    fn damaged(&self, what: impl fmt::Display) -> FormatError {
        FormatError::damaged(self.path, format!("{what} (near byte {})", self.position))
    }
}

/// The error for a file with another magic number, with a guess at what it is.
fn not_gguf(path: &Path, bytes: &[u8]) -> FormatError {
    let start = &bytes[..bytes.len().min(256)];
    let help = if start.starts_with(b"version https://git-lfs") {
        "this is a Git LFS pointer: run `git lfs pull` in its repository"
    } else if start.starts_with(b"<") {
        "this is a web page, not the file itself: use its download link"
    } else if start.starts_with(b"PK") {
        "this is a zip archive: unpack it first"
    } else if start.starts_with(b"ggjt") || start.starts_with(b"tjgg") || start.starts_with(b"lmgg") {
        "this is a GGML file from before 2023-08: fetch the GGUF file of the model"
    } else if start.get(8..10) == Some(b"{\"") {
        "this is a safetensors file: pass the directory that holds it"
    } else {
        "pass a GGUF file, or a directory in Hugging Face layout"
    };
    let found = format!("\"{}\"", start[..start.len().min(4)].escape_ascii());
    FormatError::NotGguf { path: path.to_owned(), found, help: help.to_owned() }
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
