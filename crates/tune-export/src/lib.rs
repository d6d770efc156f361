//! Trained adapter and base to GGUF, safetensors, PEFT and Modelfile, one tensor at a time.
//!
//! [`export`] reads the base and a PEFT adapter, never anything of the training run, and writes one
//! [`ExportTarget`]. Merged models stream tensor by tensor, so memory does not grow with the model. Free space is
//! checked first, everything is written beside its target, read back, compared with what was meant, and only then
//! renamed.

mod cholesky;
mod error;
mod error_feedback;
mod file_type;
mod gguf_adapter;
mod gguf_metadata;
mod gguf_model;
mod go_template;
mod merge;
mod merge_route;
mod ollama_modelfile;
mod ollama_prompt;
mod pre_tokenizer;
mod random_model;
mod safetensors_model;
mod size;
mod special_text;
mod staging;
mod stored_update;
mod target;
mod tokenizer_metadata;
mod verify;
mod weight_check;

use std::path::{Path, PathBuf};

use tune_formats::modelfile::Modelfile;
use tune_formats::peft::{self, Adapter};
use tune_formats::{BaseModel, Source};

use staging::Staged;
use verify::Differences;

pub use error::ExportError;
pub use error_feedback::InputMoments;
pub use file_type::FileType;
pub use gguf_metadata::{stored_template, tokenizer_keys};
pub use go_template::{Render, is_same_prompt};
pub use merge_route::{Activations, MergeRoute};
pub use ollama_prompt::ollama_prompt;
pub use random_model::{BYTE_TOKENS, RandomModel, byte_tokenizer, write_random_model};
pub use size::Dimensions;
pub use stored_update::StoredUpdate;
pub use target::ExportTarget;
pub use weight_check::{WeightCheck, check_weights};

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
    /// Most bytes of tensors in one safetensors file; 5 GB, as transformers has it, where there is no other number.
    pub max_shard_bytes: Option<u64>,
    /// Files that go along in a folder, by name: model card, loss curve.
    pub companions: &'a [(&'a str, String)],
    /// How merged weights become codes, for GGUF types of few bits.
    pub route: MergeRoute,
    /// What [`MergeRoute::Gptq`] needs to know.
    pub activations: Option<&'a Activations<'a>>,
    /// What happens when the written file does not read back as meant.
    pub verification: Verification,
    /// Judges the finished file, before it gets its name: every reason not to put it in place. Asked after the
    /// byte comparison, and only where there is one.
    pub judge: Option<&'a Judge<'a>>,
    /// A folder at the target is an earlier export and may be replaced. Files always are.
    pub replace_folder: bool,
    /// Renders a conversation with the chat template used in training. Needed for the Modelfile's `TEMPLATE`, which
    /// is left out without it.
    pub render: Option<&'a Render<'a>>,
}

/// Every reason not to put a finished file in place.
///
/// # Errors
/// Whatever keeps it from its place under any setting of `verification`.
pub type Judge<'a> = dyn Fn(&Path) -> Result<Vec<String>, ExportError> + 'a;

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
    /// How much of the adapter's update the merged weights hold; `None` for adapters.
    pub stored_update: Option<StoredUpdate>,
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
        ExportTarget::GgufLora => gguf_adapter::write(request, &mut notes, progress),
        ExportTarget::Gguf(file_type) => gguf_model::write(request, file_type, &mut notes, progress),
        ExportTarget::Safetensors => safetensors_model::write(request, &mut notes, progress),
        ExportTarget::Peft => write_peft(request, &mut notes, progress),
    }
    .map_err(|error| error.of_target(request.out))?;
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
        stored_update: written.stored_update,
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
    stored_update: Option<StoredUpdate>,
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
    write_companions(request, staged.path())?;
    progress(ExportEvent::Wrote { done: tensors, tensors });
    Differences::find(request, staged.path(), notes, |differences| {
        let found = peft::read(staged.path())?;
        if found.layers.keys().ne(adapter.layers.keys()) {
            differences.push("the list of layers is another one");
        }
        for (name, wanted) in &adapter.layers {
            if let Some(found) = found.layers.get(name) {
                differences.values(&format!("{name}.lora_A"), &found.a.values(), &wanted.a.values());
                differences.values(&format!("{name}.lora_B"), &found.b.values(), &wanted.b.values());
            }
        }
        progress(ExportEvent::Verified { done: tensors, tensors });
        Ok(())
    })?;
    staged.publish()?;
    Ok(Written { tensors, stored_update: None })
}

fn write_companions(request: &ExportRequest<'_>, folder: &Path) -> Result<(), ExportError> {
    let mut files = request.options.companions.iter();
    files.try_for_each(|(name, text)| staging::write_bytes(&folder.join(name), text.as_bytes()))
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
