//! Trained adapter and base to GGUF, safetensors, PEFT and Modelfile, one tensor at a time.
//!
//! [`export`] reads the base and a PEFT adapter, never anything of the training run, and writes one
//! [`ExportTarget`]. Merged models stream tensor by tensor, so memory does not grow with the model. Free space is
//! checked first, everything is written beside its target, read back, compared with what was meant, and only then
//! renamed.

mod error;
mod file_type;
mod gguf_adapter;
mod gguf_metadata;
mod gguf_model;
mod go_template;
mod merge;
mod ollama_modelfile;
mod ollama_prompt;
mod pre_tokenizer;
mod random_model;
mod retention;
mod safetensors_model;
mod special_text;
mod staging;
mod target;
mod tokenizer_metadata;
mod verify;

use std::path::{Path, PathBuf};

use tune_formats::modelfile::Modelfile;
use tune_formats::peft::{self, Adapter};
use tune_formats::{BaseModel, Source};

use staging::Staged;
use verify::Differences;

pub use error::ExportError;
pub use file_type::FileType;
pub use gguf_metadata::tokenizer_keys;
pub use go_template::{Render, is_same_prompt};
pub use ollama_prompt::ollama_prompt;
pub use random_model::{BYTE_TOKENS, RandomModel, byte_tokenizer, write_random_model};
pub use retention::Retention;
pub use target::ExportTarget;

/// What to export, and where to.
#[derive(Clone, Copy)]
pub struct ExportRequest<'a> {
    /// The model that the adapter was trained on.
    pub base: &'a BaseModel,
    /// The trained adapter.
    pub adapter: &'a Adapter,
    /// What to make of them.
    pub target: ExportTarget,
    /// File or folder to write.
    pub out: &'a Path,
    /// What the base and the adapter do not say.
    pub options: ExportOptions<'a>,
}

/// What the base and the adapter do not say.
#[derive(Clone, Copy, Default)]
pub struct ExportOptions<'a> {
    /// Name of the new model, for `general.name`; the base's where there is none.
    pub name: Option<&'a str>,
    /// Jinja source of the chat template used in training, where it is not the base's.
    pub chat_template: Option<&'a str>,
    /// The base in Ollama, for `FROM` beside a GGUF adapter; the path of the base where there is none.
    pub ollama_base: Option<OllamaBase<'a>>,
    /// `tokenizer.json` of a GGUF base, rebuilt from its metadata, for the safetensors target.
    pub tokenizer_json: Option<&'a str>,
    /// What happens when the written file does not read back as meant.
    pub verification: Verification,
    /// A folder at the target is an earlier export and may be replaced. Files always are.
    pub replace_folder: bool,
    /// Renders a conversation with the chat template used in training. Needed for the Modelfile's `TEMPLATE`, which
    /// is left out without it.
    pub render: Option<&'a Render<'a>>,
}

/// A base that Ollama has, and what a model on top of it inherits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OllamaBase<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its Go template.
    pub template: Option<&'a str>,
    /// Its system prompt.
    pub system: Option<&'a str>,
    /// Its `stop` parameters.
    pub stop: &'a [String],
}

/// What happens when the written file does not read back as meant.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Verification {
    /// The export fails and is not put in place.
    #[default]
    Strict,
    /// The differences become notes of the report.
    Warn,
    /// The file is not read back.
    Off,
}

/// What happens during an export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExportEvent {
    /// Writing begins.
    Started {
        /// Tensors to write.
        tensors: usize,
        /// About how many bytes.
        bytes: u64,
    },
    /// A tensor is written.
    Wrote {
        /// Tensors written so far.
        done: usize,
        /// Tensors in all.
        tensors: usize,
    },
    /// A tensor was read back and holds what was meant.
    Verified {
        /// Tensors compared so far.
        done: usize,
        /// Tensors in all.
        tensors: usize,
    },
}

/// What an export has made.
#[derive(Clone, Debug, PartialEq)]
pub struct ExportReport {
    /// The file or folder.
    pub path: PathBuf,
    /// Its size in bytes, all files of a folder together.
    pub bytes: u64,
    /// Tensors in it.
    pub tensors: usize,
    /// How much of the adapter's effect the merged weights hold; `None` for adapters.
    pub retention: Option<Retention>,
    /// The Modelfile beside a GGUF file.
    pub modelfile: Option<PathBuf>,
    /// What it says, with what its grammar cannot say.
    pub ollama: Option<Modelfile>,
    /// What the user should know.
    pub notes: Vec<String>,
}

/// Exports `request.adapter` over `request.base` as `request.target`.
///
/// # Errors
/// An adapter of another base, a target that cannot express it, too little space, weights that are not finite, and
/// [`ExportError::Verification`] when the written file does not read back as meant. In each case nothing is left
/// behind and a file that was there before is unchanged.
pub fn export(
    request: &ExportRequest<'_>,
    progress: &mut dyn FnMut(ExportEvent),
) -> Result<ExportReport, ExportError> {
    refuse_to_overwrite_base(request)?;
    let mut notes = Vec::new();
    let written = match request.target {
        ExportTarget::GgufLora => gguf_adapter::write(request, &mut notes, progress)?,
        ExportTarget::Gguf(file_type) => gguf_model::write(request, file_type, &mut notes, progress)?,
        ExportTarget::Safetensors => safetensors_model::write(request, &mut notes, progress)?,
        ExportTarget::Peft => write_peft(request, &mut notes, progress)?,
    };
    let ollama = match request.target {
        ExportTarget::GgufLora | ExportTarget::Gguf(_) => Some(ollama_modelfile::of(request, &mut notes)?),
        ExportTarget::Safetensors | ExportTarget::Peft => None,
    };
    let modelfile = match &ollama {
        Some(modelfile) => Some(ollama_modelfile::write(request, modelfile, &mut notes)?),
        None => None,
    };
    Ok(ExportReport {
        path: request.out.to_owned(),
        bytes: staging::size_of(request.out)?,
        tensors: written.tensors,
        retention: written.retention,
        modelfile,
        ollama,
        notes,
    })
}

/// The text of the token that engines put before every prompt by themselves.
///
/// # Errors
/// A tokenizer that cannot be read.
pub fn bos_text(base: &BaseModel) -> Result<Option<String>, ExportError> {
    Ok(special_text::text(&base.tokenizer, base.special.bos)?)
}

/// What the writer of a target reports.
struct Written {
    tensors: usize,
    retention: Option<Retention>,
}

fn write_peft(
    request: &ExportRequest<'_>,
    notes: &mut Vec<String>,
    progress: &mut dyn FnMut(ExportEvent),
) -> Result<Written, ExportError> {
    let ExportRequest { base, adapter, out, .. } = *request;
    merge::check(base, adapter)?;
    let values: usize = adapter.layers.values().map(|lora| lora.a.len() + lora.b.len()).sum();
    let tensors = 2 * adapter.layers.len();
    let bytes = 4 * values as u64 + 256 * tensors as u64;
    let staged = Staged::folder(out, bytes, request.options.replace_folder)?;
    progress(ExportEvent::Started { tensors, bytes });
    peft::write(staged.path(), adapter)?;
    progress(ExportEvent::Wrote { done: tensors, tensors });
    Differences::find(request, notes, |differences| {
        let found = peft::read(staged.path())?;
        if found.layers.keys().ne(adapter.layers.keys()) {
            differences.push("the list of layers is another one");
        }
        for (name, wanted) in &adapter.layers {
            if let Some(found) = found.layers.get(name) {
                differences.values(&format!("{name}.lora_A"), &found.a, &wanted.a);
                differences.values(&format!("{name}.lora_B"), &found.b, &wanted.b);
            }
        }
        progress(ExportEvent::Verified { done: tensors, tensors });
        Ok(())
    })?;
    staged.publish()?;
    Ok(Written { tensors, retention: None })
}

fn refuse_to_overwrite_base(request: &ExportRequest<'_>) -> Result<(), ExportError> {
    let Ok(out) = request.out.canonicalize() else { return Ok(()) };
    let parts: Vec<&Path> = match &request.base.source {
        Source::Gguf(file) => file.parts().collect(),
        Source::HfDirectory(directory) => vec![directory.path()],
    };
    match parts.into_iter().find(|part| part.canonicalize().is_ok_and(|part| part == out)) {
        Some(part) => Err(ExportError::OverwritesBase { path: part.to_owned() }),
        None => Ok(()),
    }
}
