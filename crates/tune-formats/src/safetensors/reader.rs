//! Reads safetensors files, also sharded ones, through memory maps.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ::safetensors::{Dtype, SafeTensors};
use serde::Deserialize;
use tune_quant::{BlockType, ByteView, SharedBytes};

use super::{INDEX, SINGLE, block_type};
use crate::FormatError;
use crate::mapped::map;

/// Tensors of one safetensors file or of a sharded set.
pub struct SafetensorsFiles {
    path: PathBuf,
    tensors: BTreeMap<String, TensorEntry>,
    metadata: BTreeMap<String, String>,
    parts: Vec<(PathBuf, Arc<dyn SharedBytes>)>,
}

/// A tensor of a safetensors file, as listed in its header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorEntry {
    /// Type of its values.
    pub dtype: Dtype,
    /// Its shape, row-major.
    pub shape: Vec<usize>,
    part: usize,
    range: Range<usize>,
}

/// `model.safetensors.index.json`.
#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl SafetensorsFiles {
    /// Opens the weights of a directory: `model.safetensors`, or the shards of `model.safetensors.index.json`.
    ///
    /// # Errors
    /// No such files, missing shards, or files that cannot be read.
    pub fn open_directory(directory: &Path) -> Result<Self, FormatError> {
        let single = directory.join(SINGLE);
        let index = directory.join(INDEX);
        if single.exists() {
            return Self::open(&single);
        }
        if !index.exists() {
            let reason = format!("it has neither {SINGLE} nor {INDEX}");
            return Err(FormatError::NotAModel { path: directory.to_owned(), reason });
        }
        let text = std::fs::read(&index).map_err(|error| FormatError::read(&index, error))?;
        let parsed: Index = serde_json::from_slice(&text)
            .map_err(|source| FormatError::Json { path: index.clone(), source })?;
        let names = parsed.weight_map.into_values().collect::<BTreeSet<_>>();
        if let Some(name) = names.iter().find(|name| Path::new(name).file_name() != Some(name.as_ref())) {
            return Err(FormatError::damaged(
                &index,
                format!("{name:?} is not the name of a file beside it"),
            ));
        }
        let missing = names.iter().filter(|name| !directory.join(name).exists()).cloned().collect::<Vec<_>>();
        if !missing.is_empty() {
            return Err(FormatError::MissingShards { path: index, count: names.len() as u64, missing });
        }
        let mut all =
            Self { path: index, tensors: BTreeMap::new(), metadata: BTreeMap::new(), parts: Vec::new() };
        for name in names {
            all.add(&directory.join(name))?;
        }
        Ok(all)
    }

    /// Opens one file.
    ///
    /// # Errors
    /// A file that cannot be read or is not a valid safetensors file.
    pub fn open(path: &Path) -> Result<Self, FormatError> {
        let mut file = Self {
            path: path.to_owned(),
            tensors: BTreeMap::new(),
            metadata: BTreeMap::new(),
            parts: Vec::new(),
        };
        file.add(path)?;
        Ok(file)
    }

    /// The file, or the index of the shards.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// All tensors, sorted by name.
    pub fn tensors(&self) -> &BTreeMap<String, TensorEntry> {
        &self.tensors
    }

    /// The `__metadata__` of the files.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// Type and bytes of a tensor of 16-bit or 32-bit floats, without copying.
    ///
    /// # Errors
    /// No such tensor, or one of another type.
    pub fn data(&self, name: &str) -> Result<(BlockType, ByteView), FormatError> {
        let tensor =
            self.tensors.get(name).ok_or_else(|| FormatError::tensor(name, "the file has no such tensor"))?;
        let block_type = tensor.block_type().ok_or_else(|| {
            FormatError::tensor(name, format!("has type {:?}, expected F32, F16 or BF16", tensor.dtype))
        })?;
        Ok((block_type, self.bytes(name)?))
    }

    /// Bytes of a tensor of any type, without copying.
    ///
    /// # Errors
    /// No such tensor.
    pub fn bytes(&self, name: &str) -> Result<ByteView, FormatError> {
        let tensor =
            self.tensors.get(name).ok_or_else(|| FormatError::tensor(name, "the file has no such tensor"))?;
        ByteView::new(Arc::clone(&self.parts[tensor.part].1), tensor.range.clone())
            .ok_or_else(|| FormatError::tensor(name, "lies outside its file"))
    }

    fn add(&mut self, path: &Path) -> Result<(), FormatError> {
        let bytes = map(path)?;
        let part = self.parts.len();
        let invalid = |reason: String| FormatError::Safetensors { path: path.to_owned(), reason };
        let (header, listed) =
            SafeTensors::read_metadata((*bytes).as_ref()).map_err(|error| invalid(error.to_string()))?;
        let data = 8 + header;
        let tensors: HashMap<_, _> = listed.tensors();
        for (name, info) in BTreeMap::from_iter(tensors) {
            let range = data + info.data_offsets.0..data + info.data_offsets.1;
            let entry = TensorEntry { dtype: info.dtype, shape: info.shape.clone(), part, range };
            if self.tensors.insert(name.clone(), entry).is_some() {
                return Err(invalid(format!("tensor {name} is also in another file of the model")));
            }
        }
        self.metadata.extend(listed.metadata().clone().unwrap_or_default());
        self.parts.push((path.to_owned(), bytes));
        Ok(())
    }
}

impl TensorEntry {
    /// The block type of its values, where there is one.
    pub fn block_type(&self) -> Option<BlockType> {
        block_type(self.dtype)
    }

    /// Bytes in the file.
    pub fn byte_len(&self) -> usize {
        self.range.len()
    }
}

impl fmt::Debug for SafetensorsFiles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SafetensorsFiles({}, {} tensors)", self.path.display(), self.tensors.len())
    }
}
