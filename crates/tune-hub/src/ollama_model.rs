//! What goes to an Ollama server and what it says: files, new models, models that it has.

use std::path::Path;

use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::checksum;
use crate::error::HubError;

/// What identifies a file on the server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Blob {
    /// SHA-256 in lower-case hexadecimal.
    pub sha256: String,
    /// Bytes.
    pub bytes: u64,
}

/// A model to create.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct NewModel {
    /// Its name.
    pub name: String,
    /// A model that the server has, to start from.
    pub from: Option<String>,
    /// Without one: file names and checksums of the weights.
    pub files: Vec<(String, Blob)>,
    /// File name and checksum of a GGUF adapter.
    pub adapter: Option<(String, Blob)>,
    /// Prompt template in Go's template language; that of `from` where there is none.
    pub template: Option<String>,
    /// System prompt; that of `from` where there is none.
    pub system: Option<String>,
    /// Parameters, as in `{"stop": ["<|im_end|>"], "temperature": 0.7}`; they are added to those of `from`.
    pub parameters: Map<String, Value>,
    /// Licence texts.
    pub license: Vec<String>,
}

/// What the server says of a model.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct ShownModel {
    /// Its Modelfile.
    pub modelfile: String,
    /// Its prompt template.
    pub template: String,
    /// Its system prompt.
    pub system: String,
    /// Its parameters, one a line.
    pub parameters: String,
    /// Format, family and quantisation.
    pub details: Details,
}

/// What kind of model it is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Details {
    /// `gguf`.
    pub format: String,
    /// `llama`.
    pub family: String,
    /// `Q4_K_M`.
    pub quantization_level: String,
}

impl Blob {
    /// Reads a file for its checksum.
    ///
    /// # Errors
    /// A file that cannot be read.
    pub fn of_file(path: &Path) -> Result<Self, HubError> {
        let bytes = std::fs::metadata(path).map_err(HubError::io(path))?.len();
        let sha256 = checksum::sha256_of_file(path).map_err(HubError::io(path))?;
        Ok(Self { sha256, bytes })
    }

    /// As manifests and requests write it.
    pub fn digest(&self) -> String {
        format!("sha256:{}", self.sha256)
    }
}

impl NewModel {
    /// The body of the request.
    pub(crate) fn request(&self) -> Value {
        let digests = |files: &[(String, Blob)]| {
            files.iter().map(|(name, blob)| (name.clone(), blob.digest().into())).collect::<Map<_, _>>()
        };
        let mut request = json!({ "model": self.name, "stream": true });
        let mut set = |key: &str, value: Value| request[key] = value;
        match &self.from {
            Some(from) => set("from", from.as_str().into()),
            None => set("files", digests(&self.files).into()),
        }
        if let Some(adapter) = &self.adapter {
            set("adapters", digests(std::slice::from_ref(adapter)).into());
        }
        for (key, text) in [("template", &self.template), ("system", &self.system)] {
            if let Some(text) = text {
                set(key, text.as_str().into());
            }
        }
        if !self.parameters.is_empty() {
            set("parameters", self.parameters.clone().into());
        }
        if !self.license.is_empty() {
            set("license", self.license.clone().into());
        }
        request
    }
}

impl ShownModel {
    /// Checksum of its weights, where its Modelfile names the file in the server's store.
    pub fn sha256(&self) -> Option<&str> {
        self.modelfile.lines().find_map(|line| {
            let path = line.trim().strip_prefix("FROM ")?;
            let hex = path.trim().rsplit_once("sha256-").or_else(|| path.rsplit_once("sha256:"))?.1;
            checksum::is_sha256(hex).then_some(hex)
        })
    }

    /// Whether an adapter lies over its weights.
    pub fn has_adapter(&self) -> bool {
        self.modelfile.lines().any(|line| line.trim_start().starts_with("ADAPTER "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_weights_of_a_shown_model_are_known_by_its_from_line() {
        let hex = "ab".repeat(32);
        let shown = |from: &str| ShownModel {
            modelfile: format!("# made by ollama\n# FROM llama3.2\nFROM {from}\nTEMPLATE x\n"),
            ..ShownModel::default()
        };
        assert_eq!(shown(&format!("/m/blobs/sha256-{hex}")).sha256(), Some(&*hex));
        assert_eq!(shown(r"C:\m\blobs\sha256-zz").sha256(), None);
        assert_eq!(shown("llama3.2:1b").sha256(), None);
        assert!(!shown("x").has_adapter());
    }

    #[test]
    fn a_request_says_only_what_is_set() {
        let blob = Blob { sha256: "a".repeat(64), bytes: 4 };
        let model = NewModel {
            name: "mine".into(),
            from: Some("llama3.2:1b".into()),
            adapter: Some(("adapter.gguf".into(), blob.clone())),
            ..NewModel::default()
        };
        assert_eq!(
            model.request(),
            json!({ "model": "mine", "stream": true, "from": "llama3.2:1b",
                    "adapters": { "adapter.gguf": blob.digest() } })
        );
    }
}
