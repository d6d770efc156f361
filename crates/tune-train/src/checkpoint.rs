//! Checkpoints: everything that a resumed run needs to go on as if it had never stopped.
//!
//! ```text
//! checkpoints/step-000100/
//!   adapter_config.json, adapter_model.safetensors   the adapter, a PEFT folder of its own;
//!   weights.safetensors                              or all weights, f32, where they are trained
//!   optimizer.safetensors                            both moments of every parameter, f32
//!   state.json                                       where the run stands and with which settings
//! ```
//!
//! A checkpoint is written beside its final name, synced and renamed, so a name always holds a whole one; older
//! ones are removed only after that.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use burn::tensor::{Device, Tensor, TensorData};
use serde::{Deserialize, Serialize};
use tune_formats::peft::{self, Adapter};
use tune_formats::safetensors::{SafetensorsFiles, SafetensorsWriter, TensorSpec};
use tune_kernels::Weight;
use tune_quant::BlockType;

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
    Adapter(Adapter),
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
    let path = parent.join(format!("step-{:06}", state.step));
    let temporary = path.with_extension("partial");
    let written = fs::create_dir_all(&parent).map_err(io("create", &parent)).and_then(|()| {
        remove_partial(&parent)?;
        write(&temporary, state, trained, moments)?;
        set_aside(&path)?;
        fs::rename(&temporary, &path).map_err(io("rename", &path))?;
        sync_folder(&parent)
    });
    if let Err(error) = written {
        // Half a checkpoint is of no use, and where the disk is full its space is. The first error is the one to report.
        let _ = remove_partial(&parent);
        return Err(TrainError::NotSaved { step: state.step, error: Box::new(error), kept: newest(folder) });
    }

    let saved = list(folder);
    for old in &saved[..saved.len().saturating_sub(keep.max(1))] {
        fs::remove_dir_all(old).map_err(io("remove", old))?;
    }
    Ok(path)
}

fn write(
    folder: &Path,
    state: &State,
    trained: &Trained,
    moments: &[(String, &Moments)],
) -> Result<(), TrainError> {
    fs::create_dir_all(folder).map_err(io("create", folder))?;
    match trained {
        Trained::Adapter(adapter) => peft::write(folder, adapter)?,
        Trained::Weights(weights) => write_tensors(&folder.join(WEIGHTS), weights)?,
    }
    let moments = moments.iter().flat_map(|(name, pair)| {
        [(format!("{name}.m"), pair.m.clone()), (format!("{name}.v"), pair.v.clone())]
    });
    write_tensors(&folder.join(OPTIMIZER), &moments.collect())?;
    let json = serde_json::to_vec_pretty(state).unwrap_or_default();
    write_atomically(&folder.join(STATE), &json)?;
    sync_folder(folder)
}

/// Removes what was left half written, by this process or by one that was killed.
fn remove_partial(parent: &Path) -> Result<(), TrainError> {
    let entries = fs::read_dir(parent).map_err(io("read", parent))?;
    let half_written = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "partial");
    entries
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .filter(half_written)
        .try_for_each(|path| fs::remove_dir_all(&path).map_err(io("remove", &path)))
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
    let mut tensors = read_tensors(path, OPTIMIZER, device)?;
    let mut moments = BTreeMap::new();
    let names: Vec<String> =
        tensors.keys().filter_map(|name| name.strip_suffix(".m")).map(String::from).collect();
    for name in names {
        let mut take = |part| tensors.remove(&format!("{name}.{part}"));
        let (Some(m), Some(v)) = (take("m"), take("v")) else {
            return Err(unusable(format!("{OPTIMIZER}: {name}.v is missing")));
        };
        moments.insert(name, Moments { m, v });
    }
    let trained = if path.join(WEIGHTS).exists() {
        Trained::Weights(read_tensors(path, WEIGHTS, device)?)
    } else {
        Trained::Adapter(peft::read(path)?)
    };
    Ok(Checkpoint { state, trained, moments })
}

/// All tensors of one file of the checkpoint at `path`.
fn read_tensors(path: &Path, file: &str, device: &Device) -> Result<BTreeMap<String, Tensor<2>>, TrainError> {
    let unusable = |reason: String| TrainError::Checkpoint {
        path: path.to_path_buf(),
        reason: format!("{file}: {reason}"),
    };
    let files = SafetensorsFiles::open(&path.join(file)).map_err(|e| unusable(e.to_string()))?;
    let read = |name: &String, shape: &[usize]| {
        let (block_type, bytes) = files.data(name).map_err(|e| unusable(e.to_string()))?;
        let (&[rows, cols], BlockType::F32) = (shape, block_type) else {
            return Err(unusable(format!("{name}: expected a matrix of F32")));
        };
        let values: Vec<f32> =
            bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        Ok((name.clone(), Tensor::from_data(TensorData::new(values, [rows, cols]), device)))
    };
    files.tensors().iter().map(|(name, entry)| read(name, &entry.shape)).collect()
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

/// Writes the tensors from where they lie, without a copy.
fn write_tensors(path: &Path, tensors: &BTreeMap<String, Tensor<2>>) -> Result<(), TrainError> {
    let spec = |(name, tensor): (&String, &Tensor<2>)| TensorSpec {
        name: name.clone(),
        shape: tensor.dims().to_vec(),
        block_type: BlockType::F32,
    };
    let specs: Vec<TensorSpec> = tensors.iter().map(spec).collect();
    let mut writer = SafetensorsWriter::create(path, &BTreeMap::new(), &specs)?;
    for (name, tensor) in tensors {
        let stored = Weight::Trained(tensor.clone()).stored();
        for (_, row) in (0..stored.rows()).filter_map(|row| stored.matrix().row_blocks(row)) {
            writer.write(name, row)?;
        }
    }
    Ok(writer.finish()?)
}

/// Makes renames inside a folder durable, where the system can.
fn sync_folder(path: &Path) -> Result<(), TrainError> {
    if cfg!(unix) {
        File::open(path).and_then(|folder| folder.sync_all()).map_err(io("sync", path))?;
    }
    Ok(())
}
