//! Which files of a Hub repository make a model, and whether a snapshot has them all.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::checksum::is_sha256;
use crate::error::HubError;
use crate::model_ref::{HubRef, has_gguf_extension, is_clean_relative};

/// Answer of the Hub's `api/models/OWNER/REPO/revision/REV?blobs=true`, as far as it is needed.
#[derive(Debug, Deserialize)]
pub(crate) struct Listing {
    /// The commit.
    pub(crate) sha: String,
    #[serde(rename = "siblings", default)]
    pub(crate) files: Vec<Listed>,
}

#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Listed {
    /// Path inside the repository.
    #[serde(rename = "rfilename")]
    pub(crate) name: String,
    size: Option<u64>,
    lfs: Option<LargeFile>,
}

#[derive(Debug, Clone, Deserialize)]
struct LargeFile {
    sha256: String,
    size: Option<u64>,
}

impl Listed {
    /// Length, if the server lists it.
    pub(crate) fn bytes(&self) -> Option<u64> {
        self.lfs.as_ref().and_then(|lfs| lfs.size).or(self.size)
    }

    /// Checksum, which the Hub lists for large files.
    pub(crate) fn sha256(&self) -> Option<&str> {
        self.lfs.as_ref().map(|lfs| lfs.sha256.as_str()).filter(|sha256| is_sha256(sha256))
    }
}

/// The files to download, weights last: a snapshot that has the weights has everything.
pub(crate) fn choose(listing: &Listing, reference: &HubRef) -> Result<Vec<Listed>, HubError> {
    let unusable = |reason: String, help: String| HubError::Unusable {
        what: format!("hf:{}", reference.repository()),
        reason,
        help,
    };
    let known: BTreeMap<&str, &Listed> = listing
        .files
        .iter()
        .filter(|file| is_clean_relative(&file.name))
        .map(|file| (file.name.as_str(), file))
        .collect();
    let ggufs: Vec<&str> = known.keys().copied().filter(|name| has_gguf_extension(Path::new(name))).collect();

    if let Some(wanted) = &reference.file {
        let parts = all_parts(wanted);
        let missing: Vec<&str> =
            parts.iter().map(String::as_str).filter(|part| !known.contains_key(part)).collect();
        if !missing.is_empty() {
            return Err(unusable(
                format!("it has no file {}", missing.join(", ")),
                offer(&ggufs, &format!("look at {}", reference.repository())),
            ));
        }
        return Ok(parts
            .iter()
            .filter_map(|part| known.get(part.as_str()))
            .map(|file| (*file).clone())
            .collect());
    }

    let mut weights: Vec<&Listed> = known.values().copied().filter(|file| is_weights(&file.name)).collect();
    // one file for all beside its own shards would be downloaded twice
    if weights.iter().any(|file| file.name == SINGLE) {
        weights.retain(|file| file.name == SINGLE);
    }
    if weights.is_empty() || !known.contains_key(CONFIG) {
        return Err(if ggufs.is_empty() {
            unusable(
                format!(
                    "expected {CONFIG} and safetensors weights, got {}",
                    if known.is_empty() { "no files".to_owned() } else { format!("{} other files", known.len()) }
                ),
                "choose a repository or revision with .safetensors or .gguf files (pickled .bin weights are not read: \
                 they can run code)"
                    .to_owned(),
            )
        } else {
            unusable("it holds GGUF files, and one must be named".to_owned(), offer(&ggufs, ""))
        });
    }
    let mut files: Vec<Listed> = known
        .values()
        .filter(|file| is_companion(&file.name) && file.bytes() != Some(0))
        .map(|file| (*file).clone())
        .collect();
    files.extend(weights.into_iter().cloned());
    Ok(files)
}

/// The folder if it holds a configuration and every weight file that its index names.
pub(crate) fn whole_model(snapshot: &Path) -> Option<PathBuf> {
    if !snapshot.join(CONFIG).is_file() {
        return None;
    }
    if snapshot.join(SINGLE).is_file() {
        return Some(snapshot.to_owned());
    }
    let index: Index = serde_json::from_slice(&fs::read(snapshot.join(INDEX)).ok()?).ok()?;
    let whole = !index.weight_map.is_empty()
        && index.weight_map.values().all(|file| is_clean_relative(file) && snapshot.join(file).is_file());
    whole.then(|| snapshot.to_owned())
}

/// A GGUF file and, if its name says that it is split (`…-00001-of-00003.gguf`), all its parts in order.
pub(crate) fn all_parts(file: &str) -> Vec<String> {
    let split = || {
        let (stem, extension) = file.split_at_checked(file.len().checked_sub(5)?)?;
        let (rest, total) = stem.rsplit_once("-of-")?;
        let (prefix, part) = rest.rsplit_once('-')?;
        let is_number = |text: &str| text.len() == 5 && text.bytes().all(|byte| byte.is_ascii_digit());
        if !is_number(part) || !is_number(total) {
            return None;
        }
        let count: u32 = total.parse().ok()?;
        Some((1..=count).map(|n| format!("{prefix}-{n:05}-of-{total}{extension}")).collect::<Vec<_>>())
    };
    split().filter(|parts| parts.iter().any(|part| part == file)).unwrap_or_else(|| vec![file.to_owned()])
}

const CONFIG: &str = "config.json";
const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// Weights of the model itself: `model.safetensors` or its shards, not `consolidated…` (the same in another layout).
fn is_weights(name: &str) -> bool {
    !name.contains('/')
        && name.starts_with("model")
        && Path::new(name).extension().is_some_and(|extension| extension == "safetensors")
}

/// Small files that belong to a model.
fn is_companion(name: &str) -> bool {
    [
        CONFIG,
        INDEX,
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "tokenizer.model",
        "vocab.json",
        "merges.txt",
        "chat_template.jinja",
        "chat_template.json",
    ]
    .contains(&name)
}

fn offer(ggufs: &[&str], otherwise: &str) -> String {
    if ggufs.is_empty() {
        return otherwise.to_owned();
    }
    // of split files the first part stands for all
    let first = |name: &&&str| all_parts(name).first().is_some_and(|part| part == **name);
    let names: Vec<&str> = ggufs.iter().filter(first).copied().collect();
    format!("write hf:OWNER/REPO/FILE.gguf with one of {}", names.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listing(names: &[&str]) -> Listing {
        let siblings: Vec<_> =
            names.iter().map(|name| serde_json::json!({"rfilename": name, "size": 3})).collect();
        serde_json::from_value(serde_json::json!({"sha": "c0ffee", "siblings": siblings})).unwrap()
    }

    fn chosen(names: &[&str], reference: &str) -> Result<Vec<String>, HubError> {
        choose(&listing(names), &reference.parse().unwrap())
            .map(|files| files.into_iter().map(|file| file.name).collect())
    }

    #[test]
    fn a_safetensors_repository_without_duplicates_and_foreign_formats() {
        let files = chosen(
            &[
                ".gitattributes",
                "README.md",
                "config.json",
                "consolidated.safetensors",
                "model.safetensors",
                "onnx/model.onnx",
                "original/model.safetensors",
                "pytorch_model.bin",
                "tokenizer.json",
                "../evil.json",
                "tokenizer_config.json",
            ],
            "a/b",
        );
        assert_eq!(
            files.unwrap(),
            ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"]
        );
    }

    #[test]
    fn shards_come_after_their_index() {
        let files = chosen(
            &[
                "config.json",
                "model-00001-of-00002.safetensors",
                "model-00002-of-00002.safetensors",
                "model.safetensors.index.json",
            ],
            "a/b",
        );
        assert_eq!(
            files.unwrap(),
            [
                "config.json",
                "model.safetensors.index.json",
                "model-00001-of-00002.safetensors",
                "model-00002-of-00002.safetensors"
            ]
        );
    }

    #[test]
    fn a_gguf_repository_asks_for_a_choice_and_lists_it() {
        use miette::Diagnostic as _;
        let names = [
            "README.md",
            "m-Q4_0.gguf",
            "m-Q8_0.gguf",
            "big/m-00001-of-00002.gguf",
            "big/m-00002-of-00002.gguf",
        ];
        let help = chosen(&names, "a/b").unwrap_err().help().unwrap().to_string();
        assert!(help.ends_with("one of big/m-00001-of-00002.gguf, m-Q4_0.gguf, m-Q8_0.gguf"), "{help}");
        let help = chosen(&names, "a/b/m-Q5_0.gguf").unwrap_err().help().unwrap().to_string();
        assert!(help.contains("m-Q4_0.gguf"), "{help}");
        assert_eq!(chosen(&names, "a/b/m-Q4_0.gguf").unwrap(), ["m-Q4_0.gguf"]);
        assert_eq!(
            chosen(&names, "a/b/big/m-00001-of-00002.gguf").unwrap(),
            ["big/m-00001-of-00002.gguf", "big/m-00002-of-00002.gguf"]
        );
    }

    #[test]
    fn pickled_weights_are_refused() {
        let error = chosen(&["config.json", "pytorch_model.bin"], "a/b").unwrap_err();
        assert!(error.to_string().contains("expected config.json and safetensors weights"), "{error}");
    }

    #[test]
    fn only_well_formed_names_count_as_split() {
        assert_eq!(all_parts("m-00002-of-00002.gguf"), ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"]);
        for name in
            ["m.gguf", "m-1-of-2.gguf", "m-00003-of-00002.gguf", "best-of-00002.gguf", ".gguf", "é.gg"]
        {
            assert_eq!(all_parts(name), [name]);
        }
    }

    #[test]
    fn a_snapshot_with_a_missing_shard_is_not_whole() {
        let dir = tempfile::tempdir().unwrap();
        assert!(whole_model(dir.path()).is_none());
        fs::write(dir.path().join("config.json"), "{}").unwrap();
        fs::write(
            dir.path().join("model.safetensors.index.json"),
            r#"{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}"#,
        )
        .unwrap();
        fs::write(dir.path().join("model-1.safetensors"), "x").unwrap();
        assert!(whole_model(dir.path()).is_none());
        fs::write(dir.path().join("model-2.safetensors"), "x").unwrap();
        assert_eq!(whole_model(dir.path()).unwrap(), dir.path());
    }
}
