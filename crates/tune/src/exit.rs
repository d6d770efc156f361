//! Exit codes. Scripts rely on them.

use std::process::ExitCode;

use miette::{Diagnostic, Report};
use thiserror::Error;
use tune_data::DataError;
use tune_export::ExportError;
use tune_hub::HubError;
use tune_recipe::RecipeError;

/// Bad arguments or a bad recipe, as clap.
pub const USAGE: u8 = 2;
/// The run does not fit in memory.
pub const DOES_NOT_FIT: u8 = 3;
/// The rows cannot be trained on.
pub const BAD_DATA: u8 = 4;
/// An exported file differs from what was trained.
pub const NOT_VERIFIED: u8 = 5;
/// Stopped by Ctrl-C, after saving. 128 + SIGINT.
pub const INTERRUPTED: u8 = 130;

/// Something on the command line that clap cannot check.
#[derive(Debug, Error, Diagnostic)]
#[error("{message}")]
pub struct UsageError {
    /// What is wrong.
    pub message: String,
    /// What to do instead.
    #[help]
    pub help: String,
}

impl UsageError {
    /// A report of wrong usage.
    pub fn report(message: impl Into<String>, help: impl Into<String>) -> Report {
        Self { message: message.into(), help: help.into() }.into()
    }
}

/// A plan that exceeds its budget.
#[derive(Debug, Error, Diagnostic)]
#[error("the run needs {needed} and may use {budget}")]
pub struct DoesNotFit {
    /// Estimated peak, for people.
    pub needed: String,
    /// What it may use, for people.
    pub budget: String,
    /// What to change.
    #[help]
    pub help: String,
}

/// A run that was stopped because it used more than its budget.
#[derive(Debug, Error, Diagnostic)]
#[error("the run used {used}, {beyond} more than the {budget} it may use ({planned} were planned); {saved}")]
pub struct OverBudget {
    /// Measured peak, for people.
    pub used: String,
    /// What it may use.
    pub budget: String,
    /// The difference.
    pub beyond: String,
    /// What the plan said.
    pub planned: String,
    /// What is kept of the run.
    pub saved: String,
    /// What to change.
    #[help]
    pub help: String,
}

/// A model in Ollama that does not behave as the trained one.
#[derive(Debug, Error, Diagnostic)]
#[error("{name} is in Ollama, and is not what was trained:\n  {}", problems.join("\n  "))]
#[diagnostic(help(
    "remove it with `ollama rm {name}`, update Ollama and export again; or set export.verify = \"warn\" to keep it"
))]
pub struct NotAsTrained {
    /// The model.
    pub name: String,
    /// Every difference.
    pub problems: Vec<String>,
}

/// A run whose files exceed the room on the disk.
#[derive(Debug, Error, Diagnostic)]
#[error("the run writes {needed} and {folder} has room for {available}")]
pub struct NoRoom {
    /// What it writes, for people.
    pub needed: String,
    /// Where.
    pub folder: String,
    /// Room there, for people.
    pub available: String,
    /// What it consists of and what to change.
    #[help]
    pub help: String,
}

/// The exit code of an error that reached `main`.
pub fn code_of(report: &Report) -> ExitCode {
    let is_bad_reference = matches!(report.downcast_ref(), Some(HubError::BadReference { .. }));
    let code = if report.is::<RecipeError>() || report.is::<UsageError>() || is_bad_reference {
        USAGE
    } else if report.is::<DoesNotFit>() || report.is::<OverBudget>() {
        DOES_NOT_FIT
    } else if report.is::<DataError>() {
        BAD_DATA
    } else if report.downcast_ref::<ExportError>().is_some_and(ExportError::is_verification)
        || report.is::<NotAsTrained>()
    {
        NOT_VERIFIED
    } else {
        1
    };
    ExitCode::from(code)
}
