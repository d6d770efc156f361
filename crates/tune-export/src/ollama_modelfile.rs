//! The Modelfile beside an exported GGUF file: `ollama create NAME -f Modelfile`.

use std::fs;
use std::path::{Path, PathBuf};

use tune_formats::modelfile::{self, Modelfile, Parameter};

use crate::go_template::{self, GoTemplate};
use crate::staging::{directory_of, write_bytes, write_error};
use crate::{ExportError, ExportRequest, ExportTarget, OllamaBase, bos_text, special_text};

/// First line of every Modelfile written here, by which a later export knows that it may replace it.
const MARK: &str = "written by tune";

/// The model that Ollama is to make of an export: everything it needs, also what a Modelfile cannot say.
pub(crate) fn of(request: &ExportRequest<'_>, notes: &mut Vec<String>) -> Result<Modelfile, ExportError> {
    let exported = format!("./{}", request.out.file_name().unwrap_or_default().to_string_lossy());
    let mut modelfile = Modelfile::default();
    match (request.target, request.options.ollama_base) {
        (ExportTarget::GgufLora, Some(base)) => {
            base.name.clone_into(&mut modelfile.from);
            modelfile.adapter = Some(exported);
            describe_chat(request, &mut modelfile, notes)?;
            inherit(request, base, &mut modelfile)?;
        }
        (ExportTarget::GgufLora, None) => {
            let path = request.base.path.canonicalize().unwrap_or_else(|_| request.base.path.clone());
            modelfile.from = path.display().to_string();
            modelfile.adapter = Some(exported);
            describe_chat(request, &mut modelfile, notes)?;
        }
        _ => {
            modelfile.from = exported;
            describe_chat(request, &mut modelfile, notes)?;
        }
    }
    Ok(modelfile)
}

/// Writes the Modelfile and gives its path. Values that the grammar has no way to write are left out, and a comment
/// says so.
pub(crate) fn write(
    request: &ExportRequest<'_>,
    modelfile: &Modelfile,
    notes: &mut Vec<String>,
) -> Result<PathBuf, ExportError> {
    let file_name = request.out.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let path = free_path(request.out, &file_name)?;
    let mut written = modelfile.clone();
    written.comments = vec![format!("{MARK}: ollama create NAME -f {}", display_name(&path))];
    if written.adapter.is_some() {
        written.comments.push(
            "Ollama 0.34.1 and newer refuse ADAPTER: export gguf:q8_0 for them, or let `tune export --to ollama:NAME` \
             choose"
                .to_owned(),
        );
    }
    for (command, reason) in modelfile::leave_out_what_has_no_form(&mut written) {
        let text = format!("{command} is left out, since {reason}: `tune export --to ollama:NAME` sets it");
        notes.push(format!("Modelfile: {text}"));
        written.comments.push(text);
    }
    write_bytes(&path, modelfile::render(&written)?.as_bytes())?;
    Ok(path)
}

/// Leaves out what the base in Ollama brings along and what is the same there.
fn inherit(
    request: &ExportRequest<'_>,
    base: OllamaBase<'_>,
    modelfile: &mut Modelfile,
) -> Result<(), ExportError> {
    let bos = bos_text(request.base)?;
    let renders_alike = match (request.options.render, base.template) {
        (Some(render), Some(template)) => {
            go_template::renders_alike(template, base.system, render, bos.as_deref())
        }
        _ => false,
    };
    if renders_alike {
        modelfile.template = None;
        modelfile.system = None;
    }
    let is_stop = |(name, value): &(String, Parameter)| {
        name == "stop" && matches!(value, Parameter::Text(text) if base.stop.contains(text))
    };
    if modelfile.parameters.iter().all(is_stop) {
        modelfile.parameters.clear();
        return Ok(());
    }
    // the list of the new model replaces that of the base
    for text in base.stop {
        let parameter = ("stop".to_owned(), Parameter::Text(text.clone()));
        if !modelfile.parameters.contains(&parameter) {
            modelfile.parameters.push(parameter);
        }
    }
    Ok(())
}

/// Template, default system prompt and stop tokens.
fn describe_chat(
    request: &ExportRequest<'_>,
    modelfile: &mut Modelfile,
    notes: &mut Vec<String>,
) -> Result<(), ExportError> {
    let base = request.base;
    let has_template = request.options.chat_template.is_some() || base.chat_template.is_some();
    let bos = bos_text(base)?;
    let found = request.options.render.and_then(|render| go_template::equivalent(render, bos.as_deref()));
    match found {
        Some(GoTemplate { template, default_system, .. }) => {
            modelfile.template = Some(template);
            modelfile.system = default_system;
        }
        None if request.options.render.is_none() => {}
        None if has_template => notes.push(
            "the chat template has no known Go form, so the Modelfile has no TEMPLATE: use Ollama 0.30 or newer, \
             which runs the template in the GGUF file"
                .to_owned(),
        ),
        None => notes.push("the base has no chat template: the model completes text and does not chat".to_owned()),
    }
    let stops = special_text::texts(&base.tokenizer, &base.special.eos_ids)?;
    modelfile.parameters = stops.into_iter().map(|text| ("stop".to_owned(), Parameter::Text(text))).collect();
    Ok(())
}

/// `Modelfile`, or `NAME.Modelfile` where someone else's Modelfile, or that of another export, has this name.
fn free_path(out: &Path, file_name: &str) -> Result<PathBuf, ExportError> {
    let plain = directory_of(out).join("Modelfile");
    let own = match fs::read_to_string(&plain) {
        Ok(text) => {
            text.starts_with(&format!("# {MARK}"))
                && text.lines().any(|line| line.ends_with(&format!(" ./{file_name}")))
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => true,
        Err(error) => return Err(write_error(&plain, error)),
    };
    Ok(if own { plain } else { directory_of(out).join(format!("{file_name}.Modelfile")) })
}

fn display_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}
