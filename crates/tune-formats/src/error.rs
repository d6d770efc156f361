//! What can be wrong with a model file, and what to do about it.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use miette::Diagnostic;
use thiserror::Error;

/// Problems listed in one message before the rest is only counted.
const LISTED: usize = 10;

/// An error while reading or writing a model, an adapter or a Modelfile.
#[derive(Debug, Error, Diagnostic)]
#[non_exhaustive]
pub enum FormatError {
    /// The operating system refused to read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file or directory.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },

    /// The operating system refused to write.
    #[error("cannot write {}: {source}", path.display())]
    #[diagnostic(help(
        "nothing was left behind and the previous file, if any, is unchanged: free space or check permissions, then repeat the command"
    ))]
    Write {
        /// The file or directory.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },

    /// The file system is full.
    #[error("no space left on the device for {} ({needed} bytes in all)", path.display())]
    #[diagnostic(help(
        "nothing was left behind and the previous file, if any, is unchanged: free some space or choose another place, then repeat the command"
    ))]
    NoSpace {
        /// The file that was being written.
        path: PathBuf,
        /// Size of the whole file.
        needed: u64,
    },

    /// Neither a `.gguf` file nor a directory in Hugging Face layout.
    #[error("{} is not a model: {reason}", path.display())]
    #[diagnostic(help(
        "pass a .gguf file, or a directory that holds config.json, tokenizer.json and *.safetensors"
    ))]
    NotAModel {
        /// What was opened.
        path: PathBuf,
        /// What is missing.
        reason: String,
    },

    /// The first bytes are not `GGUF`.
    #[error("{} is not a GGUF file: it starts with {found}, expected \"GGUF\"", path.display())]
    NotGguf {
        /// The file.
        path: PathBuf,
        /// The first bytes, printable.
        found: String,
        /// What the file seems to be.
        #[help]
        help: String,
    },

    /// A GGUF container version that this reader does not know.
    #[error("{} has GGUF version {version}, expected 2 or 3", path.display())]
    #[diagnostic(help("convert the model again with a current converter"))]
    GgufVersion {
        /// The file.
        path: PathBuf,
        /// Version in the header.
        version: u32,
    },

    /// A GGUF file written for big-endian machines.
    #[error("{} is a big-endian GGUF file, expected little-endian", path.display())]
    #[diagnostic(help("download the little-endian file of the same model"))]
    GgufBigEndian {
        /// The file.
        path: PathBuf,
    },

    /// The file ends before its contents do.
    #[error("{} is truncated: {actual} bytes, expected at least {expected} for {what}", path.display())]
    #[diagnostic(help("the download or copy was cut short: fetch the file again"))]
    Truncated {
        /// The file.
        path: PathBuf,
        /// Bytes that the contents need.
        expected: u64,
        /// Bytes in the file.
        actual: u64,
        /// The part that does not fit.
        what: String,
    },

    /// The container breaks a rule of its format.
    #[error("{} is damaged: {what}", path.display())]
    #[diagnostic(help("fetch the file again, or convert the model again"))]
    Damaged {
        /// The file.
        path: PathBuf,
        /// The broken rule, with the place in the file.
        what: String,
    },

    /// Tensors stored in types without a decoder here.
    #[error("{} has tensors of unsupported types\n  {}", path.display(), listed(tensors))]
    #[diagnostic(help("use a file in one of: {supported}"))]
    UnsupportedTypes {
        /// The file.
        path: PathBuf,
        /// `tensor: type`, one each.
        tensors: Vec<String>,
        /// Names of the supported types.
        supported: String,
    },

    /// Parts of a split model are missing.
    #[error("{} needs {count} files and some are missing: {}", path.display(), listed(missing))]
    #[diagnostic(help("put all parts into one directory under their original names"))]
    MissingShards {
        /// The first part, or the index of the parts.
        path: PathBuf,
        /// Parts in all.
        count: u64,
        /// File names that were not found.
        missing: Vec<String>,
    },

    /// A part of a split GGUF file other than the first.
    #[error("{} is not the first part of a split model", path.display())]
    #[diagnostic(help("pass the first part, {first}"))]
    NotFirstShard {
        /// What was opened.
        path: PathBuf,
        /// File name of the first part.
        first: String,
    },

    /// A GGUF file that holds something other than a model.
    #[error("{} holds general.type \"{found}\", expected \"model\"", path.display())]
    #[diagnostic(help(
        "pass the model itself; adapters, projectors and importance matrices are used beside it"
    ))]
    NotAModelGguf {
        /// The file.
        path: PathBuf,
        /// Its `general.type`.
        found: String,
    },

    /// A model family without an implementation.
    #[error("{} is of architecture \"{architecture}\", which is not supported", path.display())]
    #[diagnostic(help("supported architectures: {supported}"))]
    UnsupportedArchitecture {
        /// The file.
        path: PathBuf,
        /// As named in the file.
        architecture: String,
        /// Supported names.
        supported: String,
    },

    /// Configuration values that are missing, contradictory or not supported.
    #[error("{} describes a model that cannot be used\n  {}", path.display(), listed(problems))]
    Config {
        /// The file.
        path: PathBuf,
        /// All that is wrong with it.
        problems: Vec<String>,
    },

    /// A JSON file that does not parse.
    #[error("{} is not valid: {source}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },

    /// A safetensors file whose header does not parse.
    #[error("{} is not a valid safetensors file: {reason}", path.display())]
    #[diagnostic(help(
        "fetch the file again; a file of a few hundred bytes may be a Git LFS pointer: run `git lfs pull`"
    ))]
    Safetensors {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },

    /// Tensors that are missing or of another shape than the configuration says.
    #[error("the weights of {} do not fit its configuration\n  {}", path.display(), listed(problems))]
    #[diagnostic(help("fetch the model again, or check that configuration and weights belong together"))]
    Tensors {
        /// The model.
        path: PathBuf,
        /// All of them.
        problems: Vec<TensorProblem>,
    },

    /// A tensor that the model does not have, or not in the expected form.
    #[error("tensor {name}: {reason}")]
    Tensor {
        /// Its name.
        name: String,
        /// What is wrong.
        reason: String,
    },

    /// A folder that is not a usable PEFT LoRA adapter.
    #[error("{} is not a usable LoRA adapter\n  {}", path.display(), listed(problems))]
    Adapter {
        /// The folder or file.
        path: PathBuf,
        /// All that is wrong with it.
        problems: Vec<String>,
        /// What to do.
        #[help]
        help: String,
    },

    /// The shapes of an adapter do not fit the base.
    #[error("adapter was trained on a different base\n  {}", listed(problems))]
    OtherBase {
        /// Every mismatch.
        problems: Vec<TensorProblem>,
        /// The base that the adapter names.
        #[help]
        help: String,
    },

    /// An adapter, or a run of all weights, over a base that it was not trained on, though its shapes fit.
    #[error(
        "{what} was trained on other weights\n  {}: expected digest {expected}, got {found}",
        base.display()
    )]
    #[diagnostic(help(
        "it was trained over {trained_over}, which may have been replaced since; with --any-base it is used nevertheless"
    ))]
    OtherWeights {
        /// `adapter`, or `run` where all weights were trained.
        what: &'static str,
        /// The base at hand.
        base: PathBuf,
        /// Digest of the trained base.
        expected: String,
        /// Digest of the base at hand.
        found: String,
        /// What the adapter calls its base.
        trained_over: String,
    },

    /// Something that a format cannot express, asked of a writer.
    #[error("cannot write {}: {reason}", path.display())]
    Unwritable {
        /// The file.
        path: PathBuf,
        /// The rule of the format.
        reason: String,
    },

    /// Text that a Modelfile cannot hold.
    #[error("a Modelfile cannot hold this {command}: {reason}")]
    #[diagnostic(help("change the text, or create the model through the Ollama API instead of a Modelfile"))]
    Modelfile {
        /// The command whose value it is.
        command: String,
        /// What is wrong.
        reason: String,
    },
}

impl FormatError {
    pub(crate) fn read(path: &Path, source: io::Error) -> Self {
        Self::Read { path: path.to_owned(), source }
    }

    pub(crate) fn write(path: &Path, needed: u64, source: io::Error) -> Self {
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                Self::NoSpace { path: path.to_owned(), needed }
            }
            _ => Self::Write { path: path.to_owned(), source },
        }
    }

    pub(crate) fn damaged(path: &Path, what: impl Into<String>) -> Self {
        Self::Damaged { path: path.to_owned(), what: what.into() }
    }

    pub(crate) fn unwritable(path: &Path, reason: impl Into<String>) -> Self {
        Self::Unwritable { path: path.to_owned(), reason: reason.into() }
    }

    pub(crate) fn tensor(name: &str, reason: impl Into<String>) -> Self {
        Self::Tensor { name: name.to_owned(), reason: reason.into() }
    }
}

/// One tensor that is missing, unexpected, or of the wrong shape.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorProblem {
    /// Its name.
    pub name: String,
    /// The shape it should have; `None` when it should not exist.
    pub expected: Option<Vec<usize>>,
    /// The shape it has; `None` when it is missing.
    pub found: Option<Vec<usize>>,
}

impl fmt::Display for TensorProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = &self.name;
        match (&self.expected, &self.found) {
            (Some(expected), Some(found)) => write!(f, "{name}: expected {expected:?}, got {found:?}"),
            (Some(expected), None) => write!(f, "{name}: missing, expected {expected:?}"),
            (None, Some(found)) => write!(f, "{name}: unexpected, {found:?}"),
            (None, None) => write!(f, "{name}: missing"),
        }
    }
}

/// The first problems, one a line, and a count of the rest.
fn listed<T: fmt::Display>(items: &[T]) -> String {
    let mut lines = items.iter().take(LISTED).map(ToString::to_string).collect::<Vec<_>>();
    if items.len() > LISTED {
        lines.push(format!("(and {} more)", items.len() - LISTED));
    }
    lines.join(
        "
  ",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_lists_are_counted() {
        let problems = (0..57)
            .map(|i| TensorProblem {
                name: format!("layers.{i}.q_proj.lora_A"),
                expected: Some(vec![16, 1024]),
                found: Some(vec![16, 2048]),
            })
            .collect();
        let text = FormatError::OtherBase { problems, help: String::new() }.to_string();
        assert!(text.contains("layers.9.q_proj.lora_A: expected [16, 1024], got [16, 2048]"), "{text}");
        assert!(text.ends_with("(and 47 more)"), "{text}");
    }
}
