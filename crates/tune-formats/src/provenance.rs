//! Where trained weights come from: what they were trained on, with and by.
//!
//! Kept as text under `tune.*` keys, in the metadata of every safetensors and GGUF file that holds trained weights. Other
//! readers skip them.

use std::collections::BTreeMap;

use sha2::{Digest as _, Sha256};

/// Where trained weights come from; only what `tune` trained says so.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Provenance {
    /// [`BaseModel::digest`](crate::BaseModel::digest) of the base.
    pub base_digest: Option<String>,
    /// SHA-256 of the chat template.
    pub template_digest: Option<String>,
    /// SHA-256 over the tokens of all rows and which of them were trained.
    pub data_digest: Option<String>,
    /// The values that decided the course of the run, as a JSON object.
    pub recipe: Option<String>,
    /// Version of `tune`.
    pub version: Option<String>,
}

impl Provenance {
    /// What is known, key by key.
    pub fn entries(&self) -> impl Iterator<Item = (&'static str, &str)> {
        let fields =
            [&self.base_digest, &self.template_digest, &self.data_digest, &self.recipe, &self.version];
        KEYS.into_iter().zip(fields).filter_map(|(key, value)| Some((key, value.as_deref()?)))
    }

    /// The metadata of a safetensors file of weights that have this provenance.
    pub fn safetensors_metadata(&self) -> BTreeMap<String, String> {
        // what transformers asks for
        let mut metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
        metadata.extend(self.entries().map(|(key, value)| (key.to_owned(), value.to_owned())));
        metadata
    }

    /// From the metadata of a file.
    pub fn read(value_of: impl Fn(&str) -> Option<String>) -> Self {
        let [base_digest, template_digest, data_digest, recipe, version] = KEYS.map(value_of);
        Self { base_digest, template_digest, data_digest, recipe, version }
    }
}

const KEYS: [&str; 5] =
    ["tune.base_digest", "tune.template_digest", "tune.data_digest", "tune.recipe", "tune.version"];

/// SHA-256 of a text, as 64 hexadecimal digits.
pub fn sha256_of(text: &str) -> String {
    Sha256::digest(text.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_reads_back() {
        let some = Provenance {
            base_digest: Some("b".into()),
            recipe: Some("{}".into()),
            version: Some("0.1.0".into()),
            ..Provenance::default()
        };
        let written: Vec<(&str, &str)> = some.entries().collect();
        assert_eq!(written, [("tune.base_digest", "b"), ("tune.recipe", "{}"), ("tune.version", "0.1.0")]);
        let value =
            |key: &str| written.iter().find(|(own, _)| *own == key).map(|(_, value)| (*value).to_owned());
        assert_eq!(Provenance::read(value), some);
        assert_eq!(&sha256_of("abc")[..8], "ba7816bf");
    }
}
