//! A position in a GGUF header.
//!
//! Nothing in the file is trusted: every length is checked against the bytes that are left before anything is
//! allocated, and every sum and product for overflow.

use std::fmt;
use std::path::Path;

use super::value::type_name;
use super::{Array, Value};
use crate::FormatError;

/// Longest string and longest array that the reference reader accepts.
const LIMIT: u64 = 1 << 30;

/// A tensor record as read.
pub(super) struct ListedTensor {
    pub(super) name: String,
    pub(super) dims: Vec<usize>,
    pub(super) ggml_type: u32,
    pub(super) offset: u64,
}

/// A position in untrusted bytes.
pub(super) struct Cursor<'a> {
    path: &'a Path,
    bytes: &'a [u8],
    position: usize,
}

impl<'a> Cursor<'a> {
    pub(super) fn new(path: &'a Path, bytes: &'a [u8]) -> Self {
        Self { path, bytes, position: 0 }
    }

    pub(super) fn path(&self) -> &'a Path {
        self.path
    }

    /// Bytes in the file.
    pub(super) fn len(&self) -> usize {
        self.bytes.len()
    }

    pub(super) fn position(&self) -> usize {
        self.position
    }

    /// Magic number and version.
    pub(super) fn header(&mut self) -> Result<(), FormatError> {
        let magic = &self.bytes[..self.bytes.len().min(4)];
        if !magic.is_empty() && magic != &b"GGUF"[..magic.len()] {
            return Err(not_gguf(self.path, self.bytes));
        }
        self.take(4, "the magic number")?;
        let version = self.u32("the version")?;
        match version {
            2 | 3 => Ok(()),
            // Read in the wrong byte order, the version is in the upper half.
            _ if version != 0 && version.trailing_zeros() >= 16 => {
                Err(FormatError::GgufBigEndian { path: self.path.to_owned() })
            }
            _ => Err(FormatError::GgufVersion { path: self.path.to_owned(), version }),
        }
    }

    /// A number of records of at least `min_bytes` each, which must still fit into the file.
    pub(super) fn count(&mut self, what: &str, min_bytes: usize) -> Result<usize, FormatError> {
        let count = self.u64(&format!("the number of {what}"))?;
        if count > i64::MAX as u64 {
            return Err(self.damaged(format!("the number of {what} is negative")));
        }
        let needed = u128::from(count) * min_bytes as u128 + self.position as u128;
        if needed > self.bytes.len() as u128 {
            let expected = needed.min(u64::MAX.into()) as u64;
            return Err(self.truncated(expected, format!("{count} {what}")));
        }
        Ok(count as usize)
    }

    pub(super) fn tensor(&mut self) -> Result<ListedTensor, FormatError> {
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
                Ok(dim @ 1..) if i64::try_from(dim).is_ok() => dims.push(dim),
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

    pub(super) fn value(&mut self, key: &str) -> Result<Value, FormatError> {
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
                Array::String(strings.into())
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

    pub(super) fn string(&mut self, what: &str) -> Result<String, FormatError> {
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
            None => Err(self.truncated((self.position + N) as u64, what.to_owned())),
        }
    }

    fn take(&mut self, len: usize, what: &str) -> Result<&'a [u8], FormatError> {
        let bytes = self.bytes;
        match bytes[self.position..].get(..len) {
            Some(taken) => {
                self.position += len;
                Ok(taken)
            }
            None => Err(self.truncated(self.position.saturating_add(len) as u64, what.to_owned())),
        }
    }

    pub(super) fn truncated(&self, expected: u64, what: String) -> FormatError {
        FormatError::Truncated { path: self.path.to_owned(), expected, actual: self.bytes.len() as u64, what }
    }

    pub(super) fn damaged(&self, what: impl fmt::Display) -> FormatError {
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
