//! The Modelfile beside an exported GGUF file: `ollama create NAME -f Modelfile`.

use std::fs;
use std::path::{Path, PathBuf};

use tune_formats::modelfile::{self, Modelfile, Parameter};

use crate::go_template::{self, GoTemplate};
use crate::staging::{directory_of, write_bytes};
use crate::{ExportError, ExportRequest, ExportTarget, special_text};

/// First line of every Modelfile written here, by which a later export knows that it may replace it.
const MARK: &str = "written by tune";

/// Writes the Modelfile and gives its path.
pub(crate) fn write(request: &ExportRequest<'_>, notes: &mut Vec<String>) -> Result<PathBuf, ExportError> {
    let file_name = request.out.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let exported = format!("./{file_name}");
    let mut modelfile = Modelfile::default();
    match (request.target, request.options.ollama_base) {
        (ExportTarget::GgufLora, Some(base)) => {
            // Template, stops and system prompt are inherited from a model that Ollama has.
            base.clone_into(&mut modelfile.from);
            modelfile.adapter = Some(exported);
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
    let path = free_path(request.out, &file_name)?;
    modelfile.comments = vec![format!("{MARK}: ollama create NAME -f {}", display_name(&path))];
    write_bytes(&path, modelfile::render(&modelfile)?.as_bytes())?;
    Ok(path)
}

/// Template, default system prompt and stop tokens.
fn describe_chat(
    request: &ExportRequest<'_>,
    modelfile: &mut Modelfile,
    notes: &mut Vec<String>,
) -> Result<(), ExportError> {
    let base = request.base;
    let has_template = request.options.chat_template.is_some() || base.chat_template.is_some();
    let bos = special_text::text(&base.tokenizer, base.special.bos)?;
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
        Err(error) => return Err(ExportError::write(&plain, error)),
    };
    Ok(if own { plain } else { directory_of(out).join(format!("{file_name}.Modelfile")) })
}

fn display_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}
