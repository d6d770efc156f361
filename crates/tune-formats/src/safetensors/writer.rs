//! Streams safetensors files: header first, then the bytes of one tensor after another.

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::path::{Path, PathBuf};

use ::safetensors::Dtype;
use ::safetensors::tensor::TensorInfo;
use serde_json::{Map, Value, json};
use tune_quant::{BlockType, ByteView};

use super::{INDEX, SINGLE, dtype};
use crate::FormatError;
use crate::atomic::{self, AtomicFile};

/// A tensor to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// Its name.
    pub name: String,
    /// Its shape, row-major.
    pub shape: Vec<usize>,
    /// `F32`, `F16` or `BF16`.
    pub block_type: BlockType,
}

impl TensorSpec {
    /// Bytes of the tensor, or `None` when the size overflows.
    pub fn byte_len(&self) -> Option<usize> {
        self.shape.iter().try_fold(self.block_type.block_bytes(), |bytes, &dim| bytes.checked_mul(dim))
    }
}

/// Writes one safetensors file tensor by tensor; memory does not grow with the model.
///
/// The file takes its place when [`SafetensorsWriter::finish`] succeeds; until then, and if writing fails, a
/// file that was there before stays as it is.
pub struct SafetensorsWriter {
    path: PathBuf,
    file: AtomicFile,
    /// Names and sizes of the tensors that are not complete.
    pending: VecDeque<(String, usize)>,
    /// Bytes written of the first of them.
    written: usize,
}

impl SafetensorsWriter {
    /// Starts a file with its header; tensors follow in the order of the list.
    ///
    /// # Errors
    /// What the format cannot express (all of it at once), or a file that cannot be written.
    pub fn create(
        path: &Path,
        metadata: &BTreeMap<String, String>,
        tensors: &[TensorSpec],
    ) -> Result<Self, FormatError> {
        let mut problems = Vec::new();
        let mut entries = Vec::new();
        for tensor in tensors {
            let name = &tensor.name;
            let Some(dtype) = dtype(tensor.block_type) else {
                let kind = tensor.block_type.name();
                problems.push(format!("tensor {name} has type {kind}, expected F32, F16 or BF16"));
                continue;
            };
            entries.push((name.clone(), dtype, tensor.shape.clone()));
        }
        Self::with_problems(path, metadata, &entries, problems)
    }

    /// The same for tensors of any type: name, type and shape of each.
    ///
    /// # Errors
    /// As [`create`](Self::create).
    pub fn create_any(
        path: &Path,
        metadata: &BTreeMap<String, String>,
        tensors: &[(String, Dtype, Vec<usize>)],
    ) -> Result<Self, FormatError> {
        Self::with_problems(path, metadata, tensors, Vec::new())
    }

    fn with_problems(
        path: &Path,
        metadata: &BTreeMap<String, String>,
        tensors: &[(String, Dtype, Vec<usize>)],
        mut problems: Vec<String>,
    ) -> Result<Self, FormatError> {
        let mut names = HashSet::from(["__metadata__"]);
        let mut header = Map::new();
        if !metadata.is_empty() {
            header.insert("__metadata__".to_owned(), json!(metadata));
        }
        let mut pending = VecDeque::new();
        let mut end = 0_usize;
        for (name, dtype, shape) in tensors {
            if !names.insert(name) {
                problems.push(format!("tensor {name} occurs twice"));
            }
            let elements = shape.iter().try_fold(1_usize, |product, &dim| product.checked_mul(dim));
            let bits = elements.and_then(|elements| elements.checked_mul(dtype.bitsize()));
            let Some(bytes) = bits.map(|bits| bits / 8) else {
                problems.push(format!("tensor {name} has shape {shape:?}, which is too large"));
                continue;
            };
            let data_offsets = (end, end + bytes);
            end += bytes;
            let info = TensorInfo { dtype: *dtype, shape: shape.clone(), data_offsets };
            header.insert(name.clone(), json!(info));
            pending.push_back((name.clone(), bytes));
        }
        if !problems.is_empty() {
            return Err(FormatError::unwritable(path, problems.join("; ")));
        }

        let mut text = Value::Object(header).to_string().into_bytes();
        text.resize(text.len().next_multiple_of(8), b' ');
        let mut file = AtomicFile::create(path, (8 + text.len() + end) as u64)?;
        file.write(&(text.len() as u64).to_le_bytes())?;
        file.write(&text)?;
        let mut writer = Self { path: path.to_owned(), file, pending, written: 0 };
        writer.skip_complete();
        Ok(writer)
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
        match self.pending.front() {
            None => self.file.commit(),
            Some((name, size)) => {
                let reason = format!("tensor {name} has {} bytes, expected {size}", self.written);
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
        self.written += len;
        self.skip_complete();
        Ok(())
    }

    /// Whether the next `len` bytes may be those of tensor `name`.
    fn check(&self, name: &str, len: usize) -> Result<(), FormatError> {
        let reason = match self.pending.front() {
            Some((next, _)) if next != name => format!("tensor {name} comes before {next} is complete"),
            Some((_, size)) if len > size - self.written => {
                format!("tensor {name} has {} bytes, expected {size}", self.written + len)
            }
            None if len > 0 => format!("tensor {name} comes after the last one"),
            _ => return Ok(()),
        };
        Err(FormatError::unwritable(&self.path, reason))
    }

    /// Moves on to the first tensor that still needs bytes.
    fn skip_complete(&mut self) {
        while self.pending.front().is_some_and(|(_, size)| *size == self.written) {
            self.pending.pop_front();
            self.written = 0;
        }
    }
}

/// Writes the weights of a model into a directory: `model.safetensors`, or numbered shards and their index.
pub struct ShardedWriter {
    directory: PathBuf,
    shards: VecDeque<(PathBuf, Vec<TensorSpec>)>,
    open: Option<SafetensorsWriter>,
    index: Option<Value>,
    /// Of every file.
    metadata: BTreeMap<String, String>,
}

impl ShardedWriter {
    /// Plans files of at most `max_bytes` of tensors each (a larger tensor gets a file of its own), each with `metadata`.
    ///
    /// # Errors
    /// What the format cannot express, or a file that cannot be written.
    pub fn create(
        directory: &Path,
        metadata: &BTreeMap<String, String>,
        tensors: &[TensorSpec],
        max_bytes: usize,
    ) -> Result<Self, FormatError> {
        let mut shards: Vec<Vec<TensorSpec>> = Vec::new();
        let (mut filled, mut total) = (usize::MAX, 0_usize);
        for tensor in tensors {
            let bytes = tensor.byte_len().unwrap_or_default();
            total += bytes;
            filled = filled.saturating_add(bytes);
            if filled > max_bytes {
                shards.push(Vec::new());
                filled = bytes;
            }
            if let Some(shard) = shards.last_mut() {
                shard.push(tensor.clone());
            }
        }
        let count = shards.len();
        let name = |number: usize| match count {
            0 | 1 => SINGLE.to_owned(),
            _ => format!("model-{number:05}-of-{count:05}.safetensors"),
        };
        let index = (count > 1).then(|| {
            let mut map = Map::new();
            for (number, shard) in (1..).zip(&shards) {
                map.extend(shard.iter().map(|tensor| (tensor.name.clone(), name(number).into())));
            }
            json!({ "metadata": { "total_size": total }, "weight_map": map })
        });
        let shards = (1..).zip(shards).map(|(number, shard)| (directory.join(name(number)), shard)).collect();
        let metadata = metadata.clone();
        let mut writer = Self { directory: directory.to_owned(), shards, open: None, index, metadata };
        writer.advance()?;
        Ok(writer)
    }

    /// Appends bytes of tensor `name`, in the order of the list; see [`SafetensorsWriter::append`].
    ///
    /// # Errors
    /// As [`SafetensorsWriter::append`].
    pub fn append(&mut self, name: &str, bytes: ByteView) -> Result<(), FormatError> {
        let Some(open) = &mut self.open else {
            return Err(FormatError::unwritable(
                &self.directory,
                format!("tensor {name} comes after the last one"),
            ));
        };
        open.append(name, bytes)?;
        if open.pending.is_empty() { self.advance() } else { Ok(()) }
    }

    /// Writes the index; all shards are in place by then.
    ///
    /// # Errors
    /// Tensors that were not written, or a file that cannot be written.
    pub fn finish(mut self) -> Result<(), FormatError> {
        if let Some(open) = self.open.take() {
            open.finish()?;
        }
        match &self.index {
            Some(index) => atomic::write(&self.directory.join(INDEX), format!("{index:#}\n").as_bytes()),
            None => Ok(()),
        }
    }

    /// Finishes the open shard and starts the next one.
    fn advance(&mut self) -> Result<(), FormatError> {
        if let Some(open) = self.open.take() {
            open.finish()?;
        }
        if let Some((path, tensors)) = self.shards.pop_front() {
            self.open = Some(SafetensorsWriter::create(&path, &self.metadata, &tensors)?);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::SafetensorsFiles;
    use super::*;

    fn spec(name: &str, shape: &[usize], block_type: BlockType) -> TensorSpec {
        TensorSpec { name: name.into(), shape: shape.into(), block_type }
    }

    #[test]
    fn a_file_written_in_pieces_reads_back() -> Result<(), FormatError> {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("x.safetensors");
        let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
        let tensors = [spec("b", &[2, 3], BlockType::F32), spec("a", &[4], BlockType::BF16)];
        let mut writer = SafetensorsWriter::create(&path, &metadata, &tensors)?;
        writer.write("b", &[1; 10])?;
        assert!(writer.write("a", &[2; 8]).is_err(), "b is not complete");
        writer.write("b", &[1; 14])?;
        assert!(writer.write("a", &[2; 9]).is_err(), "too long");
        writer.write("a", &[2; 8])?;
        assert!(!path.exists(), "not in place before it is finished");
        writer.finish()?;

        let file = SafetensorsFiles::open(&path)?;
        assert_eq!(file.metadata(), &metadata);
        let (kind, bytes) = file.data("b")?;
        assert_eq!((kind, &bytes[..]), (BlockType::F32, &[1; 24][..]));
        assert_eq!(file.tensors()["a"].shape, [4]);
        assert!(file.data("c").is_err());
        Ok(())
    }

    #[test]
    fn an_incomplete_file_never_appears() -> Result<(), FormatError> {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("x.safetensors");
        let writer = SafetensorsWriter::create(&path, &BTreeMap::new(), &[spec("a", &[4], BlockType::F16)])?;
        assert!(writer.finish().is_err());
        assert_eq!(std::fs::read_dir(dir.path()).expect("listed").count(), 0);
        Ok(())
    }

    #[test]
    fn what_cannot_be_expressed_is_listed() {
        let tensors = [
            spec("a", &[32], BlockType::Q8_0),
            spec("b", &[1], BlockType::F32),
            spec("b", &[1], BlockType::F32),
        ];
        let Err(error) = SafetensorsWriter::create(Path::new("x"), &BTreeMap::new(), &tensors) else {
            panic!("accepted");
        };
        assert!(
            error.to_string().contains("a has type Q8_0") && error.to_string().contains("b occurs twice")
        );
    }

    #[test]
    fn shards_hold_at_most_their_share() -> Result<(), FormatError> {
        let dir = tempfile::tempdir().expect("temporary directory");
        let tensors = ["a", "b", "c"].map(|name| spec(name, &[2, 4], BlockType::F32));
        let mut writer = ShardedWriter::create(dir.path(), &BTreeMap::new(), &tensors, 64)?;
        for (byte, tensor) in (0..).zip(&tensors) {
            writer.append(&tensor.name, vec![byte; 32].into())?;
        }
        writer.finish()?;
        assert!(dir.path().join("model-00002-of-00002.safetensors").exists());
        let files = SafetensorsFiles::open_directory(dir.path())?;
        assert_eq!(files.tensors().keys().collect::<Vec<_>>(), ["a", "b", "c"]);
        assert_eq!(&files.data("c")?.1[..], [2; 32]);

        std::fs::remove_file(dir.path().join("model-00002-of-00002.safetensors")).expect("removed");
        let error = SafetensorsFiles::open_directory(dir.path()).expect_err("a shard is missing");
        assert!(error.to_string().contains("model-00002-of-00002.safetensors"), "{error}");
        Ok(())
    }
}
