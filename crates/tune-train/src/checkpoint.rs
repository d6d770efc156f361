//! Checkpoints: everything that a resumed run needs to go on as if it had never stopped.
//!
//! ```text
//! checkpoints/step-000100/
//!   adapter_config.json, adapter_model.safetensors   the adapter, a PEFT folder of its own
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
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::{Deserialize, Serialize};
use tune_formats::peft::{self, Adapter};

use crate::TrainError;
use crate::error::io;
use crate::optim::Moments;
use crate::run_folder::{RunFolder, set_aside, write_atomically};

const STATE: &str = "state.json";
const OPTIMIZER: &str = "optimizer.safetensors";

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

/// A checkpoint read back.
pub struct Checkpoint {
    /// Where the run stood.
    pub state: State,
    /// The adapter then.
    pub adapter: Adapter,
    /// Moments by parameter name, as given to [`save`].
    pub moments: BTreeMap<String, Moments>,
}

/// Writes the checkpoint of `state.step` and removes the oldest beyond `keep`. Returns its folder.
pub fn save(
    folder: &RunFolder,
    state: &State,
    adapter: &Adapter,
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
    peft::write(&temporary, adapter)?;
    write_moments(&temporary.join(OPTIMIZER), moments)?;
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
    let optimizer_path = path.join(OPTIMIZER);
    let bytes = fs::read(&optimizer_path).map_err(io("read", &optimizer_path))?;
    let tensors = SafeTensors::deserialize(&bytes).map_err(|e| unusable(format!("{OPTIMIZER}: {e}")))?;
    let read = |name: &str| -> Result<Tensor<2>, TrainError> {
        let view = tensors.tensor(name).map_err(|e| unusable(format!("{OPTIMIZER}: {name}: {e}")))?;
        let (&[rows, cols], Dtype::F32) = (view.shape(), view.dtype()) else {
            return Err(unusable(format!("{OPTIMIZER}: {name}: expected a matrix of F32")));
        };
        let values: Vec<f32> =
            view.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        Ok(Tensor::from_data(TensorData::new(values, [rows, cols]), device))
    };
    let mut moments = BTreeMap::new();
    for name in tensors.names().iter().filter_map(|name| name.strip_suffix(".m")) {
        let pair = Moments { m: read(&format!("{name}.m"))?, v: read(&format!("{name}.v"))? };
        moments.insert(name.to_string(), pair);
    }
    Ok(Checkpoint { state, adapter: peft::read(path)?, moments })
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

fn write_moments(path: &Path, moments: &[(String, &Moments)]) -> Result<(), TrainError> {
    let bytes = |tensor: &Tensor<2>| -> Vec<u8> {
        tensor.to_data().iter::<f32>().flat_map(f32::to_le_bytes).collect()
    };
    let buffers: Vec<(String, [usize; 2], Vec<u8>)> = moments
        .iter()
        .flat_map(|(name, pair)| {
            [(format!("{name}.m"), &pair.m), (format!("{name}.v"), &pair.v)]
                .map(|(name, tensor)| (name, tensor.dims(), bytes(tensor)))
        })
        .collect();
    let unusable = |e: safetensors::SafeTensorError| TrainError::Checkpoint {
        path: path.to_path_buf(),
        reason: e.to_string(),
    };
    let views = buffers
        .iter()
        .map(|(name, shape, data)| Ok((name.as_str(), TensorView::new(Dtype::F32, shape.to_vec(), data)?)))
        .collect::<Result<Vec<_>, _>>()
        .map_err(unusable)?;
    let serialized = safetensors::serialize(views, None).map_err(unusable)?;
    write_atomically(path, &serialized)
}

/// Makes renames inside a folder durable, where the system can.
fn sync_folder(path: &Path) -> Result<(), TrainError> {
    if cfg!(unix) {
        File::open(path).and_then(|folder| folder.sync_all()).map_err(io("sync", path))?;
    }
    Ok(())
}
