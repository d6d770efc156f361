//! Where each value of a run comes from.

use std::collections::BTreeMap;
use std::fmt;

/// Where a value comes from.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub enum Origin {
    /// Not written anywhere: the default of `docs/defaults.md`.
    #[default]
    Default,
    /// Written in the recipe.
    Recipe,
    /// Given on the command line, with `--set` or with this flag.
    CommandLine(&'static str),
    /// Left to `tune`, by "auto" or by absence, and chosen for this reason.
    Auto(String),
    /// Put in the place of what was written or chosen, for this reason.
    Changed(String),
}

impl Origin {
    /// Whether the value is not to be chosen again: a person wrote it, or it was changed with what they wrote in view.
    pub fn is_written(&self) -> bool {
        matches!(self, Self::Recipe | Self::CommandLine(_) | Self::Changed(_))
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::Recipe => f.write_str("recipe"),
            Self::CommandLine(flag) => f.write_str(flag),
            Self::Auto(reason) => write!(f, "auto: {reason}"),
            Self::Changed(reason) => write!(f, "changed: {reason}"),
        }
    }
}

/// Origins by path: `train.learning_rate`, `data.0.path`.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Origins(BTreeMap<String, Origin>);

impl Origins {
    /// Origin of the value at `path`.
    pub fn get(&self, path: &str) -> &Origin {
        self.0.get(path).unwrap_or(&Origin::Default)
    }

    /// Whether a person wrote the value at `path`.
    pub fn is_written(&self, path: &str) -> bool {
        self.get(path).is_written()
    }

    /// Whether the value at `path` was given on the command line.
    pub fn is_from_command_line(&self, path: &str) -> bool {
        matches!(self.get(path), Origin::CommandLine(_))
    }

    /// Records the origin of the value at `path`.
    pub fn set(&mut self, path: &str, origin: Origin) {
        self.0.insert(path.to_owned(), origin);
    }
}
