//! What can go wrong in an export, and what to do about it.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use miette::Diagnostic;
use thiserror::Error;
use tune_formats::FormatError;

/// Problems listed in one message before the rest is only counted.
const LISTED: usize = 10;

const UNCHANGED: &str = "nothing was left behind, and what was there before is unchanged";

/// An error while exporting.
#[derive(Debug, Error, Diagnostic)]
#[non_exhaustive]
pub enum ExportError {
    /// Reading the base or writing a file failed.
    #[error(transparent)]
    #[diagnostic(transparent)]
    Format(#[from] FormatError),

    /// A target that does not exist.
    #[error("unknown export target \"{given}\"")]
    Target {
        /// As written.
        given: String,
        /// The targets there are.
        #[help]
        help: String,
    },

    /// The target is the base itself.
    #[error("the export would overwrite its own base, {}", path.display())]
    #[diagnostic(help("choose another path with --out"))]
    OverwritesBase {
        /// The base.
        path: PathBuf,
    },

    /// Something that an export does not replace is where it should go.
    #[error("{} is in the way: {reason}", path.display())]
    #[diagnostic(help("move it away, or choose another path with --out"))]
    InTheWay {
        /// The target.
        path: PathBuf,
        /// What it is.
        reason: String,
    },

    /// The file system has too little room.
    #[error(
        "the export needs {} and {} has {} free",
        size(*needed),
        path.display(),
        size(*available)
    )]
    #[diagnostic(help("nothing was written: free some space, or choose another place with --out"))]
    Space {
        /// Directory of the target.
        path: PathBuf,
        /// Bytes of the export.
        needed: u64,
        /// Bytes that are free.
        available: u64,
    },

    /// The operating system refused to write.
    #[error("cannot write {}: {source}", path.display())]
    #[diagnostic(help("{UNCHANGED}: check permissions and the disk, or choose another path with --out"))]
    Write {
        /// The file or directory.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },

    /// The file system became full while the export was written.
    #[error("the disk filled up while {} was being written", path.display())]
    #[diagnostic(help("{UNCHANGED}: free some space, or choose another place with --out"))]
    Full {
        /// The target.
        path: PathBuf,
    },

    /// The file system or a limit of the process allows no file of this size.
    #[error("{} would be larger than any file may be here", path.display())]
    #[diagnostic(help(
        "{UNCHANGED}: raise the limit (`ulimit -f`), or choose a place on another file system with --out"
    ))]
    TooLarge {
        /// The target.
        path: PathBuf,
    },

    /// The target format cannot express this adapter.
    #[error("a GGUF adapter cannot hold this\n  {}", listed(problems))]
    #[diagnostic(help("export a merged model instead: --to gguf:f16 or --to gguf:q8_0"))]
    NotAGgufAdapter {
        /// Every module concerned, with the reason.
        problems: Vec<String>,
    },

    /// A tokenizer that GGUF cannot express.
    #[error("cannot write the tokenizer of {} into a GGUF file: {reason}", path.display())]
    #[diagnostic(help(
        "export --to gguf-lora and use it over a published GGUF of the base, or --to safetensors and convert that \
         with llama.cpp"
    ))]
    Tokenizer {
        /// The tokenizer's file.
        path: PathBuf,
        /// What cannot be expressed.
        reason: String,
    },

    /// A weight that is infinite or not a number, before or after it was encoded.
    #[error("tensor {tensor} holds values that are not finite {when}")]
    NotFinite {
        /// Its name.
        tensor: String,
        /// Where they appeared.
        when: String,
        /// What to do.
        #[help]
        help: String,
    },

    /// The file is as meant, and has lost too much of what the model has learned.
    #[error("{target} loses too much of the fine-tune: {what}")]
    LosesTooMuch {
        /// The target.
        target: String,
        /// How much.
        what: String,
        /// The targets that lose less, and the way to insist.
        #[help]
        help: String,
    },

    /// What was read back is not what was meant.
    #[error("the export failed verification and was not put in place: {}\n  {}", path.display(), listed(problems))]
    #[diagnostic(help("repeat the export; if it fails again, check the disk, and report this as a bug"))]
    Verification {
        /// The target.
        path: PathBuf,
        /// Every difference.
        problems: Vec<String>,
    },
}

impl ExportError {
    /// The file does not hold what was trained.
    pub fn is_verification(&self) -> bool {
        matches!(self, Self::Verification { .. } | Self::LosesTooMuch { .. })
    }

    /// The reason why `path` could not be written.
    pub(crate) fn write(path: &Path, source: io::Error) -> Self {
        let path = path.to_owned();
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::Full { path },
            io::ErrorKind::FileTooLarge => Self::TooLarge { path },
            _ => Self::Write { path, source },
        }
    }

    /// Names the export where the error names the file in the making, which is gone by now.
    pub(crate) fn of_target(self, target: &Path) -> Self {
        let path = target.to_owned();
        match self {
            Self::Format(FormatError::Write { source, .. }) | Self::Write { source, .. } => {
                Self::write(target, source)
            }
            Self::Format(FormatError::NoSpace { .. }) | Self::Full { .. } => Self::Full { path },
            error => error,
        }
    }
}

/// A number of bytes for people.
fn size(bytes: u64) -> String {
    match bytes {
        0..1_000_000 => format!("{:.1} kB", bytes as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} MB", bytes as f64 / 1e6),
        _ => format!("{:.2} GB", bytes as f64 / 1e9),
    }
}

/// The first problems, one a line, and a count of the rest.
fn listed<T: fmt::Display>(items: &[T]) -> String {
    let more = items.len().saturating_sub(LISTED);
    let mut lines: Vec<String> = items.iter().take(LISTED).map(ToString::to_string).collect();
    lines.extend((more > 0).then(|| format!("(and {more} more)")));
    lines.join("\n  ")
}
