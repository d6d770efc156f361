//! What can be wrong with a recipe.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use miette::{Diagnostic, NamedSource, SourceSpan};
use thiserror::Error;

/// Why there is no [`RunSpec`](crate::RunSpec).
#[derive(Debug, Error, Diagnostic)]
pub enum RecipeError {
    /// The file cannot be read.
    #[error("cannot read the recipe {}", path.display())]
    #[diagnostic(help("give the path of a .toml file, for example: tune train recipes/quickstart.toml"))]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The recipe says something that cannot be run.
    #[error("{} in {name}", if problems.len() == 1 { "a problem".into() } else { format!("{} problems", problems.len()) })]
    #[diagnostic(help("every option with its default: docs/defaults.md"))]
    Invalid {
        /// The recipe, as the user called it.
        name: String,
        /// All of them, in the order of the file.
        #[related]
        problems: Vec<Problem>,
    },
    /// The recipe does not suit the base model.
    #[error("the recipe does not suit the base model")]
    Unsuited {
        /// All of them.
        #[related]
        problems: Vec<Problem>,
    },
}

/// One thing that is wrong, at its place.
#[derive(Clone, Debug, Error, Diagnostic)]
#[error("{message}")]
pub struct Problem {
    message: String,
    #[help]
    help: Option<String>,
    #[source_code]
    source_code: Option<NamedSource<Arc<str>>>,
    #[label("{label}")]
    span: Option<SourceSpan>,
    label: &'static str,
}

impl Problem {
    /// A problem without a place.
    pub(crate) fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), help: None, source_code: None, span: None, label: "here" }
    }

    pub(crate) fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }

    pub(crate) fn maybe_help(mut self, help: Option<String>) -> Self {
        self.help = help;
        self
    }

    pub(crate) fn label(mut self, label: &'static str) -> Self {
        self.label = label;
        self
    }

    pub(crate) fn at(mut self, place: Option<Place>) -> Self {
        if let Some(Place { source_code, span }) = place {
            self.source_code = Some(source_code);
            self.span = Some(span);
        }
        self
    }

    /// Position in the text, for sorting.
    pub(crate) fn offset(&self) -> usize {
        self.span.map_or(usize::MAX, |span| span.offset())
    }
}

/// Where in which text a key or value stands.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    pub(crate) source_code: NamedSource<Arc<str>>,
    pub(crate) span: SourceSpan,
}
