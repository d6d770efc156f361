//! Streams a GGUF file: metadata and tensor list first, then the bytes of one tensor after another.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use tune_quant::{BlockType, ByteView};

use super::{Array, Metadata, Value, reader::alignment};
use crate::FormatError;
use crate::atomic::AtomicFile;

/// A tensor to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// GGUF name, at most 63 bytes.
    pub name: String,
    /// Dimensions in file order: `[d_in, d_out]` for a linear layer.
    pub dims: Vec<usize>,
    /// How its values are stored.
    pub block_type: BlockType,
}

/// Writes a GGUF file of version 3 tensor by tensor; memory does not grow with the model.
///
/// The file takes its place when [`GgufWriter::finish`] succeeds; until then, and if writing fails, a file that
/// was there before stays as it is.
pub struct GgufWriter {
    path: PathBuf,
    file: AtomicFile,
    alignment: usize,
    tensors: Vec<(TensorSpec, usize)>,
    /// The tensor whose bytes come next, and how many of them are written.
    current: usize,
    written: usize,
}

impl TensorSpec {
    /// Bytes of the tensor without padding, or `None` when rows are not whole blocks or the size overflows.
    pub fn byte_len(&self) -> Option<usize> {
        let row = self.block_type.row_bytes(*self.dims.first()?)?;
        self.dims[1..].iter().try_fold(row, |bytes, &dim| bytes.checked_mul(dim))
    }
}

impl GgufWriter {
    /// Starts a file with all its metadata and the list of its tensors, in the order in which they follow.
    ///
    /// # Errors
    /// What the format cannot express (all of it at once), or a file that cannot be written.
    pub fn create(path: &Path, metadata: &Metadata, tensors: Vec<TensorSpec>) -> Result<Self, FormatError> {
        let mut problems = metadata_problems(metadata);
        let alignment = alignment(metadata).unwrap_or_else(|problem| {
            problems.push(problem);
            super::ALIGNMENT
        });
        let mut names = HashSet::new();
        let mut sized = Vec::new();
        for tensor in tensors {
            if !names.insert(tensor.name.clone()) {
                problems.push(format!("tensor {} occurs twice", tensor.name));
            }
            match tensor_size(&tensor) {
                Ok(bytes) => sized.push((tensor, bytes)),
                Err(problem) => problems.push(problem),
            }
        }
        if !problems.is_empty() {
            return Err(FormatError::unwritable(path, problems.join("; ")));
        }

        let mut header = header(metadata, &sized, alignment);
        header.resize(header.len().next_multiple_of(alignment), 0);
        let data = sized.iter().map(|(_, bytes)| bytes.next_multiple_of(alignment) as u64).sum::<u64>();
        let mut file = AtomicFile::create(path, header.len() as u64 + data)?;
        file.write(&header)?;
        Ok(Self { path: path.to_owned(), file, alignment, tensors: sized, current: 0, written: 0 })
    }

    /// Appends bytes of tensor `name`: all of it, or its next part. Tensors come in the order of the list.
    ///
    /// # Errors
    /// Another tensor's turn, more bytes than the tensor has, or a file that cannot be written.
    pub fn write(&mut self, name: &str, bytes: &[u8]) -> Result<(), FormatError> {
        self.put(name, bytes.len(), |file| file.write(bytes))
    }

    /// As [`write`](Self::write), without a copy.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    pub fn append(&mut self, name: &str, bytes: ByteView) -> Result<(), FormatError> {
        self.put(name, bytes.len(), |file| file.append(bytes))
    }

    /// Makes the file durable and puts it in its place.
    ///
    /// # Errors
    /// Tensors that were not written, or a file that cannot be written.
    pub fn finish(self) -> Result<(), FormatError> {
        match self.tensors.get(self.current) {
            None => self.file.commit(),
            Some((tensor, size)) => {
                let reason = format!("tensor {} has {} bytes, expected {size}", tensor.name, self.written);
                Err(FormatError::unwritable(&self.path, reason))
            }
        }
    }

    fn put(
        &mut self,
        name: &str,
        len: usize,
        write: impl FnOnce(&mut AtomicFile) -> Result<(), FormatError>,
    ) -> Result<(), FormatError> {
        self.check(name, len)?;
        write(&mut self.file)?;
        self.advance(len)
    }

    /// Whether the next `len` bytes may be those of tensor `name`.
    fn check(&self, name: &str, len: usize) -> Result<(), FormatError> {
        let Some((tensor, size)) = self.tensors.get(self.current) else {
            return Err(FormatError::unwritable(
                &self.path,
                format!("tensor {name} comes after the last one"),
            ));
        };
        if tensor.name != name {
            let reason = format!("tensor {name} comes before {} is complete", tensor.name);
            return Err(FormatError::unwritable(&self.path, reason));
        }
        if len > size - self.written {
            let got = self.written.saturating_add(len);
            let reason = format!("tensor {name} has {got} bytes, expected {size}");
            return Err(FormatError::unwritable(&self.path, reason));
        }
        Ok(())
    }

    /// Counts `len` bytes, and fills up after the last of a tensor.
    fn advance(&mut self, len: usize) -> Result<(), FormatError> {
        let Some((_, size)) = self.tensors.get(self.current) else { return Ok(()) };
        self.written += len;
        if self.written == *size {
            let padding = size.next_multiple_of(self.alignment) - size;
            for chunk in std::iter::repeat_n(0, padding).collect::<Vec<u8>>().chunks(4096) {
                self.file.write(chunk)?;
            }
            self.current += 1;
            self.written = 0;
        }
        Ok(())
    }
}

fn metadata_problems(metadata: &Metadata) -> Vec<String> {
    let mut keys = HashSet::new();
    let mut problems = Vec::new();
    for (key, _) in metadata.iter() {
        if key.is_empty() {
            problems.push("a metadata key is empty".to_owned());
        } else if !keys.insert(key) {
            problems.push(format!("metadata key {key} occurs twice"));
        }
    }
    problems
}

fn tensor_size(tensor: &TensorSpec) -> Result<usize, String> {
    let TensorSpec { name, dims, block_type } = tensor;
    if name.is_empty() || name.len() >= 64 {
        return Err(format!("tensor name {name:?} has {} bytes, expected 1 to 63", name.len()));
    }
    if !(1..=4).contains(&dims.len()) || dims.contains(&0) {
        return Err(format!("tensor {name} has dimensions {dims:?}, expected 1 to 4 that are not 0"));
    }
    tensor.byte_len().ok_or_else(|| {
        let (block, kind) = (block_type.block_len(), block_type.name());
        format!("tensor {name} has rows of {} values, expected a multiple of {block} for {kind}", dims[0])
    })
}

fn header(metadata: &Metadata, tensors: &[(TensorSpec, usize)], alignment: usize) -> Vec<u8> {
    let mut out = Vec::new();
    out.extend(b"GGUF");
    out.extend(3_u32.to_le_bytes());
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend((metadata.len() as u64).to_le_bytes());
    for (key, value) in metadata.iter() {
        put_string(&mut out, key);
        out.extend(value.type_id().to_le_bytes());
        put_value(&mut out, value);
    }
    let mut offset = 0;
    for (tensor, bytes) in tensors {
        put_string(&mut out, &tensor.name);
        out.extend((tensor.dims.len() as u32).to_le_bytes());
        for &dim in &tensor.dims {
            out.extend((dim as u64).to_le_bytes());
        }
        out.extend(tensor.block_type.ggml_id().to_le_bytes());
        out.extend((offset as u64).to_le_bytes());
        offset += bytes.next_multiple_of(alignment);
    }
    out
}

fn put_string(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn put_value(out: &mut Vec<u8>, value: &Value) {
    match value {
        Value::U8(v) => out.extend(v.to_le_bytes()),
        Value::I8(v) => out.extend(v.to_le_bytes()),
        Value::U16(v) => out.extend(v.to_le_bytes()),
        Value::I16(v) => out.extend(v.to_le_bytes()),
        Value::U32(v) => out.extend(v.to_le_bytes()),
        Value::I32(v) => out.extend(v.to_le_bytes()),
        Value::F32(v) => out.extend(v.to_le_bytes()),
        Value::Bool(v) => out.push(u8::from(*v)),
        Value::String(v) => put_string(out, v),
        Value::U64(v) => out.extend(v.to_le_bytes()),
        Value::I64(v) => out.extend(v.to_le_bytes()),
        Value::F64(v) => out.extend(v.to_le_bytes()),
        Value::Array(array) => {
            out.extend(array.element_type_id().to_le_bytes());
            out.extend((array.len() as u64).to_le_bytes());
            put_elements(out, array);
        }
    }
}

fn put_elements(out: &mut Vec<u8>, array: &Array) {
    match array {
        Array::U8(v) => out.extend(v),
        Array::I8(v) => out.extend(v.iter().flat_map(|x| x.to_le_bytes())),
        Array::U16(v) => out.extend(v.iter().flat_map(|x| x.to_le_bytes())),
        Array::I16(v) => out.extend(v.iter().flat_map(|x| x.to_le_bytes())),
        Array::U32(v) => out.extend(v.iter().flat_map(|x| x.to_le_bytes())),
        Array::I32(v) => out.extend(v.iter().flat_map(|x| x.to_le_bytes())),
        Array::F32(v) => out.extend(v.iter().flat_map(|x| x.to_le_bytes())),
        Array::Bool(v) => out.extend(v.iter().map(|&flag| u8::from(flag))),
        Array::String(v) => v.iter().for_each(|text| put_string(out, text)),
        Array::U64(v) => out.extend(v.iter().flat_map(|x| x.to_le_bytes())),
        Array::I64(v) => out.extend(v.iter().flat_map(|x| x.to_le_bytes())),
        Array::F64(v) => out.extend(v.iter().flat_map(|x| x.to_le_bytes())),
    }
}
