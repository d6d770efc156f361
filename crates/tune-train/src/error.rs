//! What can end a run.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use miette::Diagnostic;
use thiserror::Error;

/// A run could not start or go on. Checkpoints written before remain valid.
#[derive(Debug, Error, Diagnostic)]
pub enum TrainError {
    /// Reading or writing the run folder failed.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why it failed.
        source: std::io::Error,
        /// What to do next.
        #[help]
        help: Option<&'static str>,
    },
    /// The disk is full.
    #[error("no space left on the device while writing {}", path.display())]
    #[diagnostic(help(
        "free some space and run the same command again: it resumes from the last checkpoint"
    ))]
    NoSpace {
        /// The file being written.
        path: PathBuf,
    },
    /// A checkpoint cannot be written.
    #[error("the checkpoint of step {step} could not be saved: {error}{}", kept_text(kept.as_deref()))]
    #[diagnostic(help(
        "free some space or check permissions, then run the same command again: it goes on from the last checkpoint"
    ))]
    NotSaved {
        /// Its step.
        step: usize,
        /// Why.
        error: Box<TrainError>,
        /// The newest checkpoint that there is.
        kept: Option<PathBuf>,
    },
    /// A checkpoint cannot be read.
    #[error("checkpoint {} is unusable: {reason}", path.display())]
    #[diagnostic(help(
        "resume from another checkpoint with --resume PATH, or start over with --resume never"
    ))]
    Checkpoint {
        /// Its folder.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The run folder belongs to a run with other settings.
    #[error("{} holds a run with other settings:\n  {}", folder.display(), differences.join("\n  "))]
    #[diagnostic(help(
        "choose another folder with --out, or start over with --resume never (the old run is kept)"
    ))]
    OtherRun {
        /// The run folder.
        folder: PathBuf,
        /// One line per setting.
        differences: Vec<String>,
    },
    /// `adapter.init_adapter` was trained with another rank or scale.
    #[error("init_adapter has other settings than the recipe:\n  {}", differences.join("\n  "))]
    #[diagnostic(help("write the values of its adapter_config.json into [adapter]"))]
    InitialAdapter {
        /// One line per setting.
        differences: Vec<String>,
    },
    /// The data fill no step.
    #[error("there is nothing to train on: all rows were held out for validation")]
    #[diagnostic(help("add rows, or lower data_options.val_split"))]
    NoSteps,
    /// More steps than a run can have.
    #[error("the recipe asks for {steps:.0} optimizer steps, and a run may have at most {most}")]
    #[diagnostic(help("lower train.max_steps or train.num_epochs"))]
    TooManySteps {
        /// Asked for.
        steps: f64,
        /// The limit.
        most: usize,
    },
    /// The loss or a gradient is no longer a number.
    #[error("{what} became {value} at step {step}")]
    #[diagnostic(help("lower train.learning_rate, or look at the rows of this step with `tune data`"))]
    Diverged {
        /// The step.
        step: usize,
        /// Loss or gradient.
        what: &'static str,
        /// What it became.
        value: f64,
    },
    /// The model cannot be built or adapted.
    #[error(transparent)]
    #[diagnostic(transparent)]
    Model(#[from] tune_models::ModelError),
    /// An adapter cannot be read or written.
    #[error(transparent)]
    #[diagnostic(transparent)]
    Format(#[from] tune_formats::FormatError),
}

fn kept_text(kept: Option<&Path>) -> String {
    match kept {
        Some(path) => format!("\n  {} is kept", path.display()),
        None => "\n  there is no earlier one".to_owned(),
    }
}

/// Turns an I/O error on `path` into a [`TrainError`] that says what was tried.
pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> TrainError {
    let path = path.to_path_buf();
    move |source| match source.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => TrainError::NoSpace { path },
        ErrorKind::PermissionDenied => {
            let help = Some("choose a folder that you may write to with --out");
            TrainError::Io { action, path, source, help }
        }
        _ => TrainError::Io { action, path, source, help: None },
    }
}
