//! Published models, for plans made before anything is fetched: `models.toml`, embedded.

use std::sync::LazyLock;

use serde::{Deserialize, Serialize};

use crate::{Layout, Shape};

/// A published model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CatalogueModel {
    /// Short name, as Ollama writes it.
    pub alias: String,
    /// Further names of the same model, or of one with the same dimensions.
    #[serde(default)]
    pub also: Vec<String>,
    /// Names of models that do not exist, for which this one stands in.
    #[serde(default)]
    pub stands_for: Vec<String>,
    /// Its own name.
    pub name: String,
    /// On the Hugging Face Hub, all with these dimensions.
    pub repositories: Vec<String>,
    /// As in `config.json`, of the text part.
    pub model_type: String,
    /// As in a GGUF's `general.architecture`.
    pub architecture: String,
    /// SPDX identifier, or the name of the licence.
    pub licence: String,
    /// Longest context that its configuration states, in tokens.
    pub context: u64,
    /// How sure its dimensions are.
    pub certainty: Certainty,
    /// Its dimensions.
    #[serde(flatten)]
    pub layout: Layout,
}

/// How sure the dimensions of a model are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Certainty {
    /// Read from published configurations or code, and the count agrees with the published one.
    A,
    /// In part from documentation.
    B,
}

/// All of them.
pub fn catalogue() -> &'static [CatalogueModel] {
    &CATALOGUE.model
}

/// The model with this short name, own name or repository, whatever its case and punctuation: `gemma4:12b`, `Gemma 4
/// 12B` and `hf:google/gemma-4-12B-it` are one. What an instruction-tuned or quantised variant adds to a name is
/// ignored.
pub fn find(name: &str) -> Option<&'static CatalogueModel> {
    let name = ["ollama:", "hf:"].iter().find_map(|scheme| name.strip_prefix(scheme)).unwrap_or(name);
    let named =
        |key: &str| catalogue().iter().find(|model| model.names().any(|known| normalised(known) == key));
    // Longer names first: `phi4-mini-instruct` is a name of its own.
    let mut key = normalised(name);
    loop {
        if let Some(model) = named(&key) {
            return Some(model);
        }
        let shorter = VARIANTS.iter().find_map(|variant| key.strip_suffix(variant))?;
        key = shorter.to_owned();
    }
}

/// Names like this one, the most similar first; at most three.
pub fn similar_models(name: &str) -> Vec<&'static str> {
    let key = normalised(name);
    let score = |model: &'static CatalogueModel| {
        let scores = model.names().map(|known| strsim::jaro_winkler(&normalised(known), &key));
        (scores.fold(0.0, f64::max), model.alias.as_str())
    };
    let mut scored: Vec<_> = catalogue().iter().map(score).filter(|(score, _)| *score > 0.85).collect();
    scored.sort_by(|a, b| b.0.total_cmp(&a.0));
    scored.into_iter().take(3).map(|(_, alias)| alias).collect()
}

impl CatalogueModel {
    /// Its dimensions as those of a plain decoder, if it is one.
    pub fn shape(&self) -> Option<Shape> {
        self.layout.shape()
    }

    /// Whether `name` is that of a model that does not exist, for which this one stands in.
    pub fn stands_for(&self, name: &str) -> bool {
        self.stands_for.iter().any(|known| normalised(known) == normalised(name))
    }

    fn names(&self) -> impl Iterator<Item = &str> {
        [&self.alias, &self.name]
            .into_iter()
            .chain(&self.also)
            .chain(&self.stands_for)
            .chain(&self.repositories)
            .map(String::as_str)
    }
}

/// What variants of a model add to its name, as [`normalised`] leaves it.
const VARIANTS: [&str; 23] = [
    "instruct", "chat", "it", "base", "pt", "gguf", "bf16", "f16", "fp16", "q80", "q6k", "q5km", "q5ks",
    "q5k", "q51", "q50", "q4km", "q4ks", "q4k", "q41", "q40", "q3km", "q2k",
];

/// Lower case, without punctuation except the point of a version.
fn normalised(name: &str) -> String {
    let kept = |c: &char| c.is_alphanumeric() || *c == '.' || *c == '/';
    name.to_lowercase().chars().filter(kept).collect()
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Catalogue {
    model: Vec<CatalogueModel>,
}

/// The embedded text is part of the program, and the tests below read it: a fault cannot reach a user.
#[allow(clippy::expect_used)]
static CATALOGUE: LazyLock<Catalogue> =
    LazyLock::new(|| toml::from_str(include_str!("../models.toml")).expect("the embedded models are valid"));

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn every_name_belongs_to_one_model() {
        let mut seen = BTreeMap::new();
        for model in catalogue() {
            for name in model.names() {
                let owner = seen.insert(normalised(name), &model.alias);
                assert!(owner.is_none_or(|owner| *owner == model.alias), "{name}: {owner:?}");
                assert_eq!(find(name), Some(model), "{name}");
            }
        }
    }

    #[test]
    fn names_of_the_founding_document() {
        for (name, alias) in [
            ("Gemma 4 12B", "gemma4:12b"),
            ("Gemma 4 (12B)", "gemma4:12b"),
            ("Llama 3.2 3B", "llama3.2:3b"),
            ("Llama 3.2 (3B)", "llama3.2:3b"),
            ("Qwen 3.6 Coder", "qwen2.5:14b"),
            ("Qwen 3.6 Coder (14B)", "qwen2.5:14b"),
            ("Qwen 3.6 Coder 27B", "qwen3.6:27b"),
            ("Qwen2.5-Coder 14B", "qwen2.5:14b"),
            ("Qwen3 8B", "qwen3:8b"),
            ("DeepSeek R1 (8B)", "deepseek-r1:8b"),
            ("DeepSeek R1", "deepseek-r1:8b"),
            ("Phi-4 Mini", "phi4-mini:3.8b"),
            ("Phi-4 Mini 3.8B", "phi4-mini:3.8b"),
            ("Phi-4 Mini Reasoning (3.8B)", "phi4-mini:3.8b"),
        ] {
            assert_eq!(find(name).map(|model| model.alias.as_str()), Some(alias), "{name}");
        }
        assert!(find("Qwen 3.6 Coder").unwrap().stands_for("qwen 3.6 coder"));
        assert!(!find("qwen2.5:14b").unwrap().stands_for("qwen2.5:14b"));
    }

    #[test]
    fn variants_are_found() {
        for (name, alias) in [
            ("ollama:qwen3:8b", "qwen3:8b"),
            ("SmolLM2-135M", "smollm2:135m"),
            ("smollm2:135m-bf16", "smollm2:135m"),
            ("smollm2:1.7b-instruct-q4_k_m", "smollm2:1.7b"),
            ("hf:meta-llama/Llama-3.1-8B-Instruct", "llama3.1:8b"),
            ("meta-llama/Llama-3.1-8B", "llama3.1:8b"),
            ("gemma-3-4b-it", "gemma3:4b"),
            ("Phi-4-mini-instruct", "phi4-mini:3.8b"),
        ] {
            assert_eq!(find(name).map(|model| model.alias.as_str()), Some(alias), "{name}");
        }
        for nothing in ["gpt-9", "", "instruct", "8b", "ollama:", "qwen3"] {
            assert_eq!(
                find(nothing).map(|model| model.alias.as_str()),
                match nothing {
                    "qwen3" => Some("qwen3:8b"),
                    _ => None,
                }
            );
        }
        assert_eq!(similar_models("gema4:12b")[0], "gemma4:12b");
        assert!(similar_models("zzz").is_empty());
    }

    #[test]
    fn entries_are_complete() {
        assert!(catalogue().len() >= 44);
        for model in catalogue() {
            assert!(!model.repositories.is_empty() && !model.licence.is_empty(), "{}", model.alias);
            assert!(model.context >= 2048, "{}", model.alias);
            assert_eq!(model.alias, model.alias.to_lowercase());
        }
    }
}
