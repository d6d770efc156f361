//! The folder of a run.
//!
//! ```text
//! runs/NAME/
//!   run.toml        the resolved recipe
//!   plan.json       predicted memory, and measured after the run
//!   metrics.jsonl   one object per optimizer step
//!   loss.svg        the same as a picture
//!   checkpoints/    step-000100/ …: what a resumed run needs
//!   adapter/        the trained adapter, a PEFT folder; present once the run has finished
//!   model/          of a run that trains all weights, in place of adapter/: a Hugging Face folder
//! ```

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

use crate::error::io;
use crate::{StepMetrics, TrainError};

/// Paths of a run folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunFolder {
    root: PathBuf,
}

impl RunFolder {
    /// The run folder at `root`, which need not exist.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The folder itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The resolved recipe.
    pub fn recipe(&self) -> PathBuf {
        self.root.join("run.toml")
    }

    /// Predicted and measured memory.
    pub fn plan(&self) -> PathBuf {
        self.root.join("plan.json")
    }

    /// One object per optimizer step.
    pub fn metrics(&self) -> PathBuf {
        self.root.join("metrics.jsonl")
    }

    /// The loss as a picture.
    pub fn loss_svg(&self) -> PathBuf {
        self.root.join("loss.svg")
    }

    /// The trained adapter.
    pub fn adapter(&self) -> PathBuf {
        self.root.join("adapter")
    }

    /// The trained model, where all weights were trained.
    pub fn model(&self) -> PathBuf {
        self.root.join("model")
    }

    /// Parent of all checkpoints.
    pub fn checkpoints(&self) -> PathBuf {
        self.root.join("checkpoints")
    }

    /// The run has written its adapter or its model.
    pub fn is_finished(&self) -> bool {
        // The one is written last, the other appears with its folder.
        [self.adapter().join("adapter_config.json"), self.model().join("config.json")]
            .iter()
            .any(|p| p.is_file())
    }

    /// There is something here that a fresh run would mix with.
    pub fn is_used(&self) -> bool {
        self.metrics().exists() || self.checkpoints().is_dir() || self.is_finished()
    }

    /// Writes one of the folder's files; its name holds either the old or the new content, whatever happens in
    /// between.
    pub fn write(&self, path: &Path, content: &[u8]) -> Result<(), TrainError> {
        fs::create_dir_all(&self.root).map_err(io("create", &self.root))?;
        write_atomically(path, content)
    }

    /// Moves a used folder out of the way, to the first free `NAME.old-N`, and returns where it went.
    pub fn set_aside(&self) -> Result<Option<PathBuf>, TrainError> {
        if !self.is_used() {
            return Ok(None);
        }
        let name = self.root.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let free = (1..u32::MAX)
            .map(|n| self.root.with_file_name(format!("{name}.old-{n}")))
            .find(|path| !path.exists())
            .unwrap_or_default();
        fs::rename(&self.root, &free).map_err(io("rename", &self.root))?;
        Ok(Some(free))
    }

    /// Moves the adapter or model of an earlier end of this run to `NAME.old`: it is not what a longer run is training.
    pub(crate) fn set_result_aside(&self) -> Result<(), TrainError> {
        set_aside(&self.adapter())?;
        set_aside(&self.model())
    }

    /// All lines of `metrics.jsonl`; none when there is no such file.
    pub fn read_metrics(&self) -> Result<Vec<StepMetrics>, TrainError> {
        let path = self.metrics();
        let Ok(file) = File::open(&path) else { return Ok(Vec::new()) };
        let mut metrics = Vec::new();
        for line in BufReader::new(file).lines() {
            let line = line.map_err(io("read", &path))?;
            // A run that was killed may leave half a line at the end; its step is not in any checkpoint.
            match serde_json::from_str(&line) {
                Ok(step) => metrics.push(step),
                Err(_) => break,
            }
        }
        Ok(metrics)
    }
}

/// Renames a folder to `NAME.old`, in place of an earlier one.
pub(crate) fn set_aside(path: &Path) -> Result<(), TrainError> {
    if !path.exists() {
        return Ok(());
    }
    let old = path.with_extension("old");
    if old.exists() {
        fs::remove_dir_all(&old).map_err(io("remove", &old))?;
    }
    fs::rename(path, &old).map_err(io("rename", path))
}

/// Writes a file so that its name holds either the old or the new content, whatever happens in between.
pub(crate) fn write_atomically(path: &Path, content: &[u8]) -> Result<(), TrainError> {
    let temporary = path.with_extension("partial");
    let mut file = File::create(&temporary).map_err(io("create", &temporary))?;
    file.write_all(content).map_err(io("write", &temporary))?;
    file.sync_all().map_err(io("sync", &temporary))?;
    fs::rename(&temporary, path).map_err(io("rename", path))
}

/// `metrics.jsonl`, open for appending.
pub(crate) struct MetricsLog {
    file: File,
    path: PathBuf,
}

impl MetricsLog {
    /// Opens the log and drops every line after `step`: those steps will be taken again.
    pub(crate) fn open(folder: &RunFolder, step: usize) -> Result<Self, TrainError> {
        let path = folder.metrics();
        let kept: Vec<u8> =
            folder.read_metrics()?.iter().filter(|metrics| metrics.step <= step).flat_map(line).collect();
        write_atomically(&path, &kept)?;
        let file = OpenOptions::new().append(true).open(&path).map_err(io("open", &path))?;
        Ok(Self { file, path })
    }

    /// Appends one step.
    pub(crate) fn push(&mut self, metrics: &StepMetrics) -> Result<(), TrainError> {
        self.file.write_all(&line(metrics)).map_err(io("write", &self.path))
    }
}

fn line(metrics: &StepMetrics) -> Vec<u8> {
    let mut line = serde_json::to_vec(metrics).unwrap_or_default();
    line.push(b'\n');
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(step: usize) -> StepMetrics {
        StepMetrics {
            step,
            epoch: 0.1,
            loss: 2.5,
            learning_rate: 1e-4,
            grad_norm: 0.7,
            tokens: 512,
            trained_tokens: 100,
            tokens_per_second: 200.0,
            peak_memory_bytes: Some(1),
            elapsed_s: 1.0,
            val_loss: None,
            val_loss_before: None,
        }
    }

    #[test]
    fn reopening_drops_later_steps_and_a_torn_last_line() {
        let dir = tempfile::tempdir().expect("temporary folder");
        let folder = RunFolder::new(dir.path());
        let mut log = MetricsLog::open(&folder, 0).expect("fresh log");
        (1..=4).for_each(|n| log.push(&step(n)).expect("written"));
        log.file.write_all(b"{\"step\": 5, \"ep").expect("torn line");
        assert_eq!(folder.read_metrics().expect("readable").len(), 4);

        let mut log = MetricsLog::open(&folder, 2).expect("reopened");
        log.push(&step(3)).expect("written");
        let steps: Vec<_> = folder.read_metrics().expect("readable").iter().map(|m| m.step).collect();
        assert_eq!(steps, [1, 2, 3]);
    }

    #[test]
    fn a_used_folder_is_set_aside_and_never_overwritten() {
        let dir = tempfile::tempdir().expect("temporary folder");
        let folder = RunFolder::new(dir.path().join("quick"));
        assert_eq!(folder.set_aside().expect("nothing there"), None);
        for n in 1..=2 {
            fs::create_dir_all(folder.adapter()).expect("created");
            fs::write(folder.adapter().join("adapter_config.json"), "{}").expect("written");
            let moved = folder.set_aside().expect("moved").expect("was used");
            assert_eq!(moved, dir.path().join(format!("quick.old-{n}")));
        }
    }
}
