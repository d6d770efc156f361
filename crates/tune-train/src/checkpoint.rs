//! Checkpoints: everything that a resumed run needs to go on as if it had never stopped.
//!
//! ```text
//! checkpoints/step-000100/
//!   adapter_config.json, adapter_model.safetensors   the adapter, a PEFT folder of its own;
//!   weights.safetensors                              or all weights, f32, where they are trained
//!   optimizer.safetensors                            both moments of every parameter: f32, or 8 bits (U8, flat)
//!                                                    and the largest value of each block (`.absmax`, f32)
//!   state.json                                       where the run stands and with which settings
//! ```
//!
//! A checkpoint is written beside its final name, synced and renamed, so a name always holds a whole one; older
//! ones are removed only after that.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use burn::tensor::{Device, Tensor, TensorData};
use serde::{Deserialize, Serialize};
use tune_formats::peft::{self, Adapter};
use tune_formats::safetensors::{Dtype, SafetensorsFiles, SafetensorsWriter};
use tune_kernels::adamw_8bit::Codes;
use tune_kernels::{FrozenWeight, Moments8bit, Weight};
use tune_quant::ByteView;

use crate::TrainError;
use crate::error::io;
use crate::optim::Moments;
use crate::run_folder::{RunFolder, set_aside, write_atomically};

const STATE: &str = "state.json";
const OPTIMIZER: &str = "optimizer.safetensors";
const WEIGHTS: &str = "weights.safetensors";

/// Where a run stands between two optimizer steps. All randomness of a run is derived from its seed and the
/// step, so the step number is the whole state of every generator.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Optimizer steps taken.
    pub step: usize,
    /// Seconds of training so far.
    pub elapsed_s: f64,
    /// Lowest validation loss so far.
    pub best_val_loss: Option<f64>,
    /// Validations since then.
    pub validations_without_progress: usize,
    /// Every setting that the course of the run depends on, as `section.key` and its value.
    pub settings: BTreeMap<String, String>,
}

/// What a run trains.
pub enum Trained {
    /// An adapter over a frozen base.
    Adapter(Box<Adapter>),
    /// All weights by name, a vector as one row. The tensors of a model are shared, not copied.
    Weights(BTreeMap<String, Tensor<2>>),
}

/// A checkpoint read back.
pub struct Checkpoint {
    /// Where the run stood.
    pub state: State,
    /// What was trained, as it was then.
    pub trained: Trained,
    /// Moments by parameter name, as given to [`save`].
    pub moments: BTreeMap<String, Moments>,
}

/// Writes the checkpoint of `state.step` and removes the oldest beyond `keep`. Returns its folder.
pub fn save(
    folder: &RunFolder,
    state: &State,
    trained: &Trained,
    moments: &[(String, &Moments)],
    keep: usize,
) -> Result<PathBuf, TrainError> {
    let parent = folder.checkpoints();
    fs::create_dir_all(&parent).map_err(io("create", &parent))?;
    let path = parent.join(format!("step-{:06}", state.step));
    let temporary = path.with_extension("partial");
    if temporary.exists() {
        fs::remove_dir_all(&temporary).map_err(io("remove", &temporary))?;
    }
    fs::create_dir_all(&temporary).map_err(io("create", &temporary))?;
    match trained {
        Trained::Adapter(adapter) => peft::write(&temporary, adapter)?,
        Trained::Weights(weights) => {
            let weights: Vec<Part> =
                weights.iter().map(|(name, tensor)| Part::of_tensor(name.clone(), tensor)).collect();
            write_parts(&temporary.join(WEIGHTS), &weights)?;
        }
    }
    let moments: Vec<Part> =
        moments.iter().flat_map(|(name, moments)| Part::of_moments(name, moments)).collect();
    write_parts(&temporary.join(OPTIMIZER), &moments)?;
    let json = serde_json::to_vec_pretty(state).unwrap_or_default();
    write_atomically(&temporary.join(STATE), &json)?;
    sync_folder(&temporary)?;
    set_aside(&path)?;
    fs::rename(&temporary, &path).map_err(io("rename", &path))?;
    sync_folder(&parent)?;

    let saved = list(folder);
    for old in &saved[..saved.len().saturating_sub(keep.max(1))] {
        fs::remove_dir_all(old).map_err(io("remove", old))?;
    }
    Ok(path)
}

/// Sets the checkpoints after `step` aside as `step-NNNNNN.old`: a run that goes on from an earlier one leaves their
/// course, and the newest by number must be the newest in time.
pub fn set_aside_after(folder: &RunFolder, step: usize) -> Result<(), TrainError> {
    list(folder)
        .iter()
        .filter(|path| number(path).is_some_and(|n| n > step))
        .try_for_each(|path| set_aside(path))
}

/// The newest checkpoint of a run folder.
pub fn newest(folder: &RunFolder) -> Option<PathBuf> {
    list(folder).pop()
}

/// Reads a checkpoint.
pub fn load(path: &Path, device: &Device) -> Result<Checkpoint, TrainError> {
    let unusable = |reason: String| TrainError::Checkpoint { path: path.to_path_buf(), reason };
    let state_path = path.join(STATE);
    let json = fs::read(&state_path).map_err(io("read", &state_path))?;
    let state = serde_json::from_slice(&json).map_err(|e| unusable(format!("{STATE}: {e}")))?;
    let stored = Stored::open(path, OPTIMIZER)?;
    let names: Vec<&str> = stored.files.tensors().keys().filter_map(|name| name.strip_suffix(".m")).collect();
    let moments = names.into_iter().map(|name| Ok((name.to_owned(), stored.moments(name, device)?)));
    let moments = moments.collect::<Result<_, TrainError>>()?;
    let trained = if path.join(WEIGHTS).exists() {
        let stored = Stored::open(path, WEIGHTS)?;
        let tensors =
            stored.files.tensors().keys().map(|name| Ok((name.clone(), stored.matrix(name, device)?)));
        Trained::Weights(tensors.collect::<Result<_, TrainError>>()?)
    } else {
        Trained::Adapter(Box::new(peft::read(path)?))
    };
    Ok(Checkpoint { state, trained, moments })
}

/// One file of tensors of the checkpoint at `path`.
struct Stored<'a> {
    path: &'a Path,
    file: &'static str,
    files: SafetensorsFiles,
}

impl<'a> Stored<'a> {
    fn open(path: &'a Path, file: &'static str) -> Result<Self, TrainError> {
        let unusable = |reason| TrainError::Checkpoint { path: path.to_path_buf(), reason };
        let files =
            SafetensorsFiles::open(&path.join(file)).map_err(|error| unusable(format!("{file}: {error}")))?;
        Ok(Self { path, file, files })
    }

    fn unusable(&self, reason: impl fmt::Display) -> TrainError {
        TrainError::Checkpoint { path: self.path.to_path_buf(), reason: format!("{}: {reason}", self.file) }
    }

    fn bytes(&self, name: &str, dtype: Dtype) -> Result<ByteView, TrainError> {
        match self.files.tensors().get(name) {
            Some(entry) if entry.dtype == dtype => {
                self.files.bytes(name).map_err(|error| self.unusable(error))
            }
            Some(entry) => Err(self.unusable(format!("{name} is {:?}, expected {dtype:?}", entry.dtype))),
            None => Err(self.unusable(format!("{name} is missing"))),
        }
    }

    fn floats(&self, name: &str) -> Result<Vec<f32>, TrainError> {
        let bytes = self.bytes(name, Dtype::F32)?;
        Ok(bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect())
    }

    fn matrix(&self, name: &str, device: &Device) -> Result<Tensor<2>, TrainError> {
        let values = self.floats(name)?;
        match self.files.tensors().get(name).map(|entry| &entry.shape[..]) {
            Some(&[rows, cols]) => Ok(Tensor::from_data(TensorData::new(values, [rows, cols]), device)),
            _ => Err(self.unusable(format!("{name}: expected a matrix"))),
        }
    }

    /// Moments of the parameter `name`. Their lengths are compared with its shape by whoever knows that.
    fn moments(&self, name: &str, device: &Device) -> Result<Moments, TrainError> {
        let is_8bit = self.files.tensors().get(&format!("{name}.m")).is_some_and(|m| m.dtype == Dtype::U8);
        if !is_8bit {
            let part = |part| self.matrix(&format!("{name}.{part}"), device);
            return Ok(Moments::F32 { m: part("m")?, v: part("v")? });
        }
        let part = |part| -> Result<Codes, TrainError> {
            let codes = self.bytes(&format!("{name}.{part}"), Dtype::U8)?.to_vec();
            Ok(Codes { codes, absmax: self.floats(&format!("{name}.{part}.absmax"))? })
        };
        Ok(Moments::Bits8(Moments8bit { m: part("m")?, v: part("v")? }))
    }
}

/// A tensor of a file, and where its values lie.
struct Part<'a> {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    values: Values<'a>,
}

enum Values<'a> {
    Tensor(FrozenWeight),
    Floats(&'a [f32]),
    Bytes(&'a [u8]),
}

impl<'a> Part<'a> {
    fn of_tensor(name: String, tensor: &Tensor<2>) -> Self {
        let (dtype, shape) = (Dtype::F32, tensor.dims().to_vec());
        Self { name, dtype, shape, values: Values::Tensor(Weight::Trained(tensor.clone()).stored()) }
    }

    fn of_moments(name: &str, moments: &'a Moments) -> Vec<Self> {
        match moments {
            Moments::F32 { m, v } => [("m", m), ("v", v)]
                .map(|(part, tensor)| Self::of_tensor(format!("{name}.{part}"), tensor))
                .into(),
            Moments::Bits8(Moments8bit { m, v }) => {
                let parts = [("m", m), ("v", v)].map(|(part, Codes { codes, absmax })| {
                    let codes = Self {
                        name: format!("{name}.{part}"),
                        dtype: Dtype::U8,
                        shape: vec![codes.len()],
                        values: Values::Bytes(codes),
                    };
                    let absmax = Self {
                        name: format!("{name}.{part}.absmax"),
                        dtype: Dtype::F32,
                        shape: vec![absmax.len()],
                        values: Values::Floats(absmax),
                    };
                    [codes, absmax]
                });
                parts.into_iter().flatten().collect()
            }
        }
    }
}

/// Writes tensors from where they lie, without a copy of a whole one.
fn write_parts(path: &Path, parts: &[Part<'_>]) -> Result<(), TrainError> {
    let entries: Vec<_> =
        parts.iter().map(|part| (part.name.clone(), part.dtype, part.shape.clone())).collect();
    let mut writer = SafetensorsWriter::create_any(path, &BTreeMap::new(), &entries)?;
    for Part { name, values, .. } in parts {
        match values {
            Values::Tensor(stored) => {
                for (_, row) in (0..stored.rows()).filter_map(|row| stored.matrix().row_blocks(row)) {
                    writer.write(name, row)?;
                }
            }
            Values::Floats(values) => {
                writer.write(name, &values.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>())?;
            }
            Values::Bytes(bytes) => writer.write(name, bytes)?,
        }
    }
    Ok(writer.finish()?)
}

fn list(folder: &RunFolder) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(folder.checkpoints()) else { return Vec::new() };
    let mut found: Vec<_> = entries
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .filter_map(|path| Some((number(&path)?, path)))
        .filter(|(_, path)| path.join(STATE).is_file())
        .collect();
    found.sort();
    found.into_iter().map(|(_, path)| path).collect()
}

/// The step of a checkpoint's folder; `None` for what is half written or set aside.
fn number(path: &Path) -> Option<usize> {
    path.file_name()?.to_str()?.strip_prefix("step-")?.parse().ok()
}

/// Makes renames inside a folder durable, where the system can.
fn sync_folder(path: &Path) -> Result<(), TrainError> {
    if cfg!(unix) {
        File::open(path).and_then(|folder| folder.sync_all()).map_err(io("sync", path))?;
    }
    Ok(())
}
