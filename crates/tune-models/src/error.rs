//! What can go wrong when a model is built.

use miette::Diagnostic;
use thiserror::Error;

/// A base model or an adapter does not fit together.
#[derive(Debug, Error, Diagnostic)]
pub enum ModelError {
    /// A weight could not be read.
    #[error(transparent)]
    #[diagnostic(transparent)]
    Format(#[from] tune_formats::FormatError),
    /// Weights have shapes that the configuration rules out.
    #[error("{} weights have an unexpected shape:\n  {}", mismatches.len(), mismatches.join("\n  "))]
    #[diagnostic(help("the file is damaged, or its configuration belongs to another model"))]
    Shapes {
        /// One line per tensor: name, expected, got.
        mismatches: Vec<String>,
    },
    /// An adapter was made for other layers.
    #[error("adapter does not fit this base:\n  {}", mismatches.join("\n  "))]
    #[diagnostic(help("use the base that the adapter was trained on"))]
    Adapter {
        /// One line per layer: name, expected, got.
        mismatches: Vec<String>,
    },
    /// The chosen targets do not exist.
    #[error(transparent)]
    #[diagnostic(transparent)]
    Targets(#[from] tune_adapters::TargetError),
}
