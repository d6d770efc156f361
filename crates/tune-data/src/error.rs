//! What can be wrong with a tokenizer, a chat template or a data set, and what to do about it.

use std::fmt;
use std::path::PathBuf;

use miette::Diagnostic;
use thiserror::Error;

/// Rows listed in one message before the rest is only counted.
pub const LISTED_ROWS: usize = 10;

/// An error between a JSONL file and token batches.
#[derive(Debug, Error, Diagnostic)]
#[non_exhaustive]
pub enum DataError {
    /// The operating system refused to read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The reason.
        source: std::io::Error,
    },

    /// A `tokenizer.json` that does not load.
    #[error("{} is not a usable tokenizer: {reason}", path.display())]
    #[diagnostic(help(
        "fetch the model again; the file must be written by Hugging Face tokenizers 0.10 or newer"
    ))]
    TokenizerFile {
        /// The file.
        path: PathBuf,
        /// Why it does not load.
        reason: String,
    },

    /// Tokenizer tables of a GGUF file that contradict each other.
    #[error("the tokenizer of {model} cannot be rebuilt: {reason}")]
    #[diagnostic(help(
        "convert the model again with a current converter, or use its Hugging Face directory"
    ))]
    TokenizerTables {
        /// Name of the model.
        model: String,
        /// What is wrong.
        reason: String,
    },

    /// A `tokenizer.ggml.model` without an implementation.
    #[error("the tokenizer of {model} is of kind \"{kind}\", expected one of {supported}")]
    #[diagnostic(help("use the Hugging Face directory of the model, which holds tokenizer.json"))]
    UnknownTokenizer {
        /// Name of the model.
        model: String,
        /// `tokenizer.ggml.model`.
        kind: String,
        /// The kinds that can be rebuilt.
        supported: &'static str,
    },

    /// A `tokenizer.ggml.pre` without an entry in the table.
    #[error("the pre-tokenizer \"{name}\" of {model} is not known")]
    #[diagnostic(help(
        "use the Hugging Face directory of the model, which holds tokenizer.json; the pre-tokenizers known for GGUF are {known}"
    ))]
    UnknownPreTokenizer {
        /// Name of the model.
        model: String,
        /// `tokenizer.ggml.pre`.
        name: String,
        /// Every known name.
        known: String,
    },

    /// Text that the tokenizer refuses.
    #[error("the tokenizer failed: {reason}")]
    Encode {
        /// Why.
        reason: String,
    },

    /// Chat rows, or a chat, with a model that has no chat template.
    #[error("{model} has no chat template, and chat data cannot be written without one")]
    #[diagnostic(help(
        "take the instruct or chat variant of the model, or train on rows with `prompt` and `completion`, or with `text`"
    ))]
    NoChatTemplate {
        /// Name of the model.
        model: String,
    },

    /// A chat template that does not parse.
    #[error("chat template, line {line}: {reason}{}", quoted(source_text))]
    #[diagnostic(help(
        "the template comes with the model: fetch a newer copy of the model, or report the line"
    ))]
    TemplateSyntax {
        /// Line in the template, from 1.
        line: usize,
        /// What is wrong.
        reason: String,
        /// The place in the template.
        source_text: String,
    },

    /// A chat template that fails on a conversation.
    #[error("chat template, line {line}: {reason}{}", quoted(source_text))]
    #[diagnostic(help("write the conversation as the template asks, or use another model"))]
    Template {
        /// Line in the template, from 1.
        line: usize,
        /// The template's own message, or what it did wrong.
        reason: String,
        /// The place in the template.
        source_text: String,
    },

    /// A file that holds something other than one JSON object a line.
    #[error("{} is a JSON array, expected JSONL: one object a line", path.display())]
    #[diagnostic(help("convert it: jq -c '.[]' {} > {}", path.display(), path.with_extension("jsonl").display()))]
    JsonArray {
        /// The file.
        path: PathBuf,
    },

    /// Rows that cannot be used.
    #[error("{} in the data\n  {}", counted(*count, "bad row"), listed(first, *count))]
    #[diagnostic(help("correct or remove these lines; nothing is trained until every row can be read"))]
    BadRows {
        /// How many there are in all files.
        count: usize,
        /// The first [`LISTED_ROWS`] of them.
        first: Vec<RowProblem>,
    },

    /// Rows longer than `sequence_len` under `overlong = "error"`.
    #[error("{} longer than sequence_len = {sequence_len}\n  {}", counted(*count, "row"), listed(first, *count))]
    #[diagnostic(help(
        "raise data_options.sequence_len to {longest}, or set data_options.overlong to \"drop\", \"truncate\" or \"split\""
    ))]
    Overlong {
        /// How many there are in all files.
        count: usize,
        /// The limit, in tokens.
        sequence_len: usize,
        /// The longest row, in tokens.
        longest: usize,
        /// The first [`LISTED_ROWS`] of them.
        first: Vec<RowProblem>,
    },

    /// No token of the whole data set is a prediction target.
    #[error("nothing to train on: {reason}")]
    NothingTrained {
        /// What became of the rows.
        reason: String,
        /// What to do.
        #[help]
        help: String,
    },

    /// A sample that does not fit the batcher's rows.
    #[error("sample {index} has {len} tokens, expected at most sequence_len = {sequence_len}")]
    SampleTooLong {
        /// Position among the samples.
        index: usize,
        /// Its length, in tokens.
        len: usize,
        /// The limit, in tokens.
        sequence_len: usize,
    },
}

/// One row that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RowProblem {
    /// The file.
    pub path: PathBuf,
    /// Line in the file, from 1.
    pub line: usize,
    /// What is wrong with it.
    pub reason: String,
}

impl fmt::Display for RowProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.path.display(), self.line, self.reason)
    }
}

fn counted(count: usize, noun: &str) -> String {
    if count == 1 { format!("1 {noun}") } else { format!("{count} {noun}s") }
}

/// The listed rows, one a line, and a count of the rest.
fn listed(rows: &[RowProblem], count: usize) -> String {
    let mut lines: Vec<_> = rows.iter().map(ToString::to_string).collect();
    if count > rows.len() {
        lines.push(format!("(and {} more)", count - rows.len()));
    }
    lines.join("\n  ")
}

fn quoted(source: &str) -> String {
    if source.is_empty() { String::new() } else { format!(", in {source}") }
}
