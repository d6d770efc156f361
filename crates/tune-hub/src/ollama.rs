//! The local Ollama store, read only.
//!
//! `manifests/HOST/NAMESPACE/MODEL/TAG` is a JSON list of layers; `blobs/sha256-HEX` holds their contents. The `model`
//! layer is a GGUF file and is used where it lies. Nothing is ever written into the store.

use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::Deserialize;

use crate::checksum::is_sha256;
use crate::error::HubError;

/// A model name as Ollama parses it: `[HOST/][NAMESPACE/]MODEL[:TAG]`, defaults filled in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OllamaName {
    /// Registry; by default Ollama's own.
    pub host: String,
    /// Owner; by default `library`.
    pub namespace: String,
    /// Model.
    pub model: String,
    /// Variant; by default `latest`.
    pub tag: String,
}

/// What an Ollama model sets besides its weights; it takes precedence over what the GGUF says.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct OllamaSettings {
    /// Prompt template in Go's template language (not Jinja).
    pub template: Option<String>,
    /// System prompt used when a conversation brings none.
    pub system: Option<String>,
    /// Sampling and runner parameters, as in `{"stop": ["<|im_end|>"], "temperature": 0.7}`.
    pub parameters: serde_json::Map<String, serde_json::Value>,
    /// Messages that open every conversation.
    pub messages: Vec<Message>,
    /// Licence texts.
    pub licenses: Vec<String>,
}

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// The text.
    pub content: String,
}

/// A model of a store.
#[derive(Debug)]
pub(crate) struct OllamaModel {
    pub(crate) gguf: PathBuf,
    /// Checksum of the GGUF according to the manifest.
    pub(crate) sha256: String,
    pub(crate) settings: OllamaSettings,
}

impl OllamaSettings {
    /// Texts that end a generation: `stop` of the parameters.
    pub fn stop(&self) -> Vec<&str> {
        match self.parameters.get("stop") {
            Some(serde_json::Value::Array(list)) => {
                list.iter().filter_map(serde_json::Value::as_str).collect()
            }
            Some(serde_json::Value::String(text)) => vec![text],
            _ => Vec::new(),
        }
    }
}

/// Finds a model in the first store that has it.
pub(crate) fn find(name: &OllamaName, stores: &[PathBuf]) -> Result<OllamaModel, HubError> {
    let mut readable = Vec::new();
    for store in stores {
        match manifest_path(store, name) {
            Ok(Some(manifest)) => return read_model(name, store, &manifest),
            Ok(None) => readable.push(store.clone()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(HubError::io(&store.join("manifests"))(error)),
        }
    }
    if readable.is_empty() {
        return Err(HubError::NoOllamaStore { name: name.to_string(), tried: stores.to_vec() });
    }
    let mut available: Vec<String> =
        readable.iter().flat_map(|store| names(store)).map(|name| name.to_string()).collect();
    available.sort();
    available.dedup();
    Err(HubError::NoOllamaModel {
        name: name.to_string(),
        stores: readable,
        help: help_missing(name, &available),
    })
}

const DEFAULT_HOST: &str = "registry.ollama.ai";
const DEFAULT_NAMESPACE: &str = "library";
const DEFAULT_TAG: &str = "latest";

/// More names than this are not listed.
const LISTED: usize = 30;

#[derive(Deserialize)]
struct Manifest {
    #[serde(default)]
    layers: Vec<Layer>,
    config: Option<Layer>,
}

#[derive(Deserialize)]
struct Layer {
    #[serde(rename = "mediaType")]
    media_type: String,
    digest: String,
    size: u64,
}

/// The parts of the config blob that tell why a model has no GGUF.
#[derive(Default, Deserialize)]
struct Config {
    #[serde(default)]
    model_format: String,
    #[serde(default)]
    remote_host: String,
}

fn read_model(name: &OllamaName, store: &Path, manifest_path: &Path) -> Result<OllamaModel, HubError> {
    let unusable =
        |reason: String, help: String| HubError::Unusable { what: format!("ollama:{name}"), reason, help };

    let text = fs::read(manifest_path).map_err(HubError::io(manifest_path))?;
    let manifest: Manifest = serde_json::from_slice(&text).map_err(|error| {
        unusable(
            format!("its manifest {} is damaged: {error}", manifest_path.display()),
            format!("fetch it again: ollama pull {name}"),
        )
    })?;

    let mut weights = Vec::new();
    let mut settings = OllamaSettings::default();
    for layer in &manifest.layers {
        let kind =
            layer.media_type.strip_prefix("application/vnd.ollama.image.").unwrap_or(&layer.media_type);
        let read = || read_text(name, store, layer);
        match kind {
            "model" => weights.push(layer),
            "adapter" => {
                return Err(unusable(
                    "it is a base model with an adapter on top, and only a base can be trained".to_owned(),
                    format!(
                        "name its base instead; `ollama show --modelfile {name}` shows it in the FROM line (and the \
                         adapter in the ADAPTER line)"
                    ),
                ));
            }
            // `prompt` is what a template was called in old versions
            "template" | "prompt" => settings.template = Some(read()?),
            "system" => settings.system = Some(read()?),
            "license" => settings.licenses.push(read()?),
            "params" => {
                settings.parameters = serde_json::from_str(&read()?)
                    .map_err(|error| damaged(name, &layer.digest, &format!("parameters: {error}")))?;
            }
            "messages" => {
                settings.messages = serde_json::from_str(&read()?)
                    .map_err(|error| damaged(name, &layer.digest, &format!("messages: {error}")))?;
            }
            // a projector is the vision part beside a text model; draft models and old embeddings are not needed
            _ => {}
        }
    }

    let layer = match weights[..] {
        [layer] => layer,
        [] => {
            let config: Config = match &manifest.config {
                Some(layer) => serde_json::from_str(&read_text(name, store, layer)?).unwrap_or_default(),
                None => Config::default(),
            };
            return Err(if config.remote_host.is_empty() {
                let format = if config.model_format.is_empty() { "no model" } else { &config.model_format };
                unusable(
                    format!("expected GGUF weights, got {format}"),
                    "take the same model from the Hub: hf:OWNER/REPO".to_owned(),
                )
            } else {
                unusable(
                    format!("it runs on {}, there are no weights here", config.remote_host),
                    format!(
                        "choose a local variant: `ollama pull {}` without `cloud` in the tag",
                        name.model
                    ),
                )
            });
        }
        _ => {
            return Err(unusable(
                format!("its weights are in {} layers, expected 1", weights.len()),
                format!("update Ollama (0.30 or later merges split files) and run `ollama pull {name}`"),
            ));
        }
    };
    let (gguf, sha256) = blob(name, store, layer)?;
    Ok(OllamaModel { gguf, sha256, settings })
}

/// The file of a layer, after a check of its length, and its checksum.
fn blob(name: &OllamaName, store: &Path, layer: &Layer) -> Result<(PathBuf, String), HubError> {
    let Some(sha256) = layer.digest.strip_prefix("sha256:").filter(|hex| is_sha256(hex)) else {
        return Err(damaged(name, &layer.digest, "not a sha256 digest"));
    };
    let path = store.join("blobs").join(format!("sha256-{sha256}"));
    let got = match fs::metadata(&path) {
        Ok(metadata) => metadata.len(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(damaged(name, &layer.digest, &format!("{} is missing", path.display())));
        }
        Err(error) => return Err(HubError::io(&path)(error)),
    };
    if got != layer.size {
        return Err(HubError::Size {
            file: path.display().to_string(),
            expected: layer.size,
            got,
            help: format!("the store is damaged; fetch the model again: ollama pull {name}"),
        });
    }
    Ok((path, sha256.to_owned()))
}

fn read_text(name: &OllamaName, store: &Path, layer: &Layer) -> Result<String, HubError> {
    let (path, _) = blob(name, store, layer)?;
    fs::read_to_string(&path).map_err(HubError::io(&path))
}

fn damaged(name: &OllamaName, digest: &str, reason: &str) -> HubError {
    HubError::Unusable {
        what: format!("ollama:{name}"),
        reason: format!("layer {digest}: {reason}"),
        help: format!("the store is damaged; fetch the model again: ollama pull {name}"),
    }
}

/// The manifest's path; Ollama matches names without regard to case.
fn manifest_path(store: &Path, name: &OllamaName) -> io::Result<Option<PathBuf>> {
    let mut path = store.join("manifests");
    fs::read_dir(&path)?;
    for part in [&name.host, &name.namespace, &name.model, &name.tag] {
        let exact = path.join(part);
        path = if exact.exists() {
            exact
        } else {
            match entries(&path)?.into_iter().find(|entry| entry.eq_ignore_ascii_case(part)) {
                Some(entry) => path.join(entry),
                None => return Ok(None),
            }
        };
    }
    Ok(path.is_file().then_some(path))
}

/// Names of all models in a store; what cannot be read is left out.
fn names(store: &Path) -> Vec<OllamaName> {
    let root = store.join("manifests");
    let mut names = Vec::new();
    for host in entries(&root).unwrap_or_default() {
        for namespace in entries(&root.join(&host)).unwrap_or_default() {
            for model in entries(&root.join(&host).join(&namespace)).unwrap_or_default() {
                for tag in entries(&root.join(&host).join(&namespace).join(&model)).unwrap_or_default() {
                    names.push(OllamaName {
                        host: host.clone(),
                        namespace: namespace.clone(),
                        model: model.clone(),
                        tag,
                    });
                }
            }
        }
    }
    names
}

fn entries(folder: &Path) -> io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(folder)? {
        if let Ok(name) = entry?.file_name().into_string()
            && !name.starts_with('.')
        {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

fn help_missing(name: &OllamaName, available: &[String]) -> String {
    if available.is_empty() {
        return format!("the store is empty; run `ollama pull {name}`");
    }
    let listed = available.iter().take(LISTED).map(String::as_str).collect::<Vec<_>>().join(", ");
    let more = match available.len().saturating_sub(LISTED) {
        0 => String::new(),
        n => format!(" and {n} more"),
    };
    format!("it has {listed}{more}; or run `ollama pull {name}`")
}

impl FromStr for OllamaName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let text = text.split_once("://").map_or(text, |(_, rest)| rest);
        let last_slash = text.rfind('/').map_or(0, |at| at + 1);
        let (path, tag) = match text[last_slash..].rsplit_once(':') {
            Some((model, tag)) => (&text[..last_slash + model.len()], tag),
            None => (text, DEFAULT_TAG),
        };
        let parts: Vec<&str> = path.split('/').collect();
        let (host, namespace, model) = match parts[..] {
            [model] => (DEFAULT_HOST, DEFAULT_NAMESPACE, model),
            [namespace, model] => (DEFAULT_HOST, namespace, model),
            [host, namespace, model] => (host, namespace, model),
            _ => return Err(format!("`{path}` has {} parts, expected at most 3", parts.len())),
        };
        check_part("host", host, 350, "-._:")?;
        check_part("namespace", namespace, 80, "-_")?;
        check_part("model name", model, 80, "-._")?;
        check_part("tag", tag, 80, "-._")?;
        Ok(Self {
            host: host.to_owned(),
            namespace: namespace.to_owned(),
            model: model.to_owned(),
            tag: tag.to_owned(),
        })
    }
}

fn check_part(kind: &str, part: &str, longest: usize, marks: &str) -> Result<(), String> {
    if part.is_empty() {
        return Err(format!("the {kind} is empty"));
    }
    let starts_well = part.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_');
    if !starts_well
        || part.len() > longest
        || !part.chars().all(|c| c.is_ascii_alphanumeric() || marks.contains(c))
    {
        return Err(format!("`{part}` is not a {kind} in Ollama"));
    }
    Ok(())
}

/// As `ollama list` shows it: the defaults of host and namespace left out, the tag always there.
impl fmt::Display for OllamaName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host != DEFAULT_HOST {
            write!(f, "{}/{}/", self.host, self.namespace)?;
        } else if self.namespace != DEFAULT_NAMESPACE {
            write!(f, "{}/", self.namespace)?;
        }
        write!(f, "{}:{}", self.model, self.tag)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_get_ollamas_defaults() {
        let name: OllamaName = "qwen3".parse().unwrap();
        assert_eq!(
            (&*name.host, &*name.namespace, &*name.model, &*name.tag),
            ("registry.ollama.ai", "library", "qwen3", "latest")
        );
        let name: OllamaName = "localhost:5000/me/my.model:v1".parse().unwrap();
        assert_eq!(
            (&*name.host, &*name.namespace, &*name.model, &*name.tag),
            ("localhost:5000", "me", "my.model", "v1")
        );
        let name: OllamaName = "http://hf.co/a/b:Q4_K_M".parse().unwrap();
        assert_eq!(name.to_string(), "hf.co/a/b:Q4_K_M");
    }

    #[test]
    fn names_that_ollama_refuses_are_refused() {
        for text in ["", ":x", "a:", "a/b/c/d", "-a", "a b", "a/../b", ".", "na.me/model", "Größe"] {
            assert!(text.parse::<OllamaName>().is_err(), "{text}");
        }
    }

    #[test]
    fn stop_texts_come_as_list_or_single_text() {
        let with = |json: &str| OllamaSettings {
            parameters: serde_json::from_str(json).unwrap(),
            ..Default::default()
        };
        assert_eq!(with(r#"{"stop": ["a", "b"]}"#).stop(), ["a", "b"]);
        assert_eq!(with(r#"{"stop": "a"}"#).stop(), ["a"]);
        assert!(with(r#"{"temperature": 0.7}"#).stop().is_empty());
    }
}
