//! JSONL files → samples, with a report of what became of every row.

use std::fs;
use std::path::{Path, PathBuf};

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use serde_json::Value;

use crate::conversation::kind;
use crate::error::LISTED_ROWS;
use crate::format::Row;
use crate::mask::{Masker, Unused};
use crate::report::{Report, SourceReport};
use crate::{ChatTemplate, DataError, Format, RowProblem, Sample, Tokenizer, TrainOn};

/// A JSONL file to read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DataSource {
    /// The file.
    pub path: PathBuf,
    /// Format of its rows; detected from the first one when absent.
    pub format: Option<Format>,
    /// Which tokens are prediction targets.
    pub train_on: TrainOn,
}

/// What happens to a row longer than the limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Overlong {
    /// Left out, and counted.
    #[default]
    Drop,
    /// Cut at the end.
    Truncate,
    /// Cut into several samples, without losing a target.
    Split,
    /// Loading fails.
    Error,
}

/// How rows become samples.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadOptions {
    /// Longest sample, in tokens; at least 2.
    pub sequence_len: usize,
    /// What happens to a longer row.
    pub overlong: Overlong,
    /// Rows of the model's embedding: ids of tokenised rows must be below.
    pub vocab_size: usize,
}

/// Tokenised rows.
#[derive(Clone, Debug, PartialEq)]
pub struct Dataset {
    /// The samples, in the order of the files.
    pub samples: Vec<Sample>,
    /// Where each sample comes from.
    pub origins: Vec<Origin>,
    /// What became of every row.
    pub report: Report,
}

/// The row behind a sample.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Origin {
    /// Position of the file among the sources.
    pub source: usize,
    /// Line in the file, from 1.
    pub line: usize,
}

/// Reads, renders, tokenises and masks every row of every file, in parallel.
///
/// `template` is the model's; without one, prompts and completions are written as plain text. `model` is the
/// model's name in messages.
///
/// # Errors
/// A file that cannot be read; rows that cannot be used, all reported at once; chat rows without a template; rows
/// that are too long under [`Overlong::Error`]; and data in which no token is trained.
pub fn load(
    sources: &[DataSource],
    options: &LoadOptions,
    tokenizer: &Tokenizer,
    template: Option<&ChatTemplate>,
    model: &str,
) -> Result<Dataset, DataError> {
    tokenise(sources, read(sources)?, options, tokenizer, template, model)
}

/// The bytes of every file.
pub(crate) fn read(sources: &[DataSource]) -> Result<Vec<Vec<u8>>, DataError> {
    let read = |source: &DataSource| {
        fs::read(&source.path).map_err(|error| DataError::Read { path: source.path.clone(), source: error })
    };
    sources.iter().map(read).collect()
}

/// [`load`], of files whose bytes are here.
pub(crate) fn tokenise(
    sources: &[DataSource],
    contents: Vec<Vec<u8>>,
    options: &LoadOptions,
    tokenizer: &Tokenizer,
    template: Option<&ChatTemplate>,
    model: &str,
) -> Result<Dataset, DataError> {
    let masker = Masker { tokenizer, template };
    let mut samples = Vec::new();
    let mut origins = Vec::new();
    let mut reports = Vec::new();
    let mut problems = Problems::default();
    let mut overlong = Problems::default();
    let mut longest = 0;
    for ((index, source), bytes) in sources.iter().enumerate().zip(contents) {
        let lines = lines(&source.path, &bytes)?;
        let format = source.format.or_else(|| lines.iter().find_map(|(_, line)| detected(line)));
        let outcomes: Vec<_> = lines
            .par_iter()
            .map(|(line, text)| (*line, outcome(&masker, source, format, options, text)))
            .collect();
        let mut report = SourceReport::new(&source.path, format);
        for (line, outcome) in outcomes {
            report.rows += 1;
            match outcome {
                Ok(Outcome::Unused(Unused::NoTarget)) => report.without_target += 1,
                Ok(Outcome::Unused(Unused::TextLost)) => report.text_lost += 1,
                Ok(Outcome::Samples { kept, lengths, truncated, split, dropped, endless }) => {
                    let too_long = lengths.iter().copied().filter(|len| *len > options.sequence_len).max();
                    if options.overlong == Overlong::Error
                        && let Some(len) = too_long
                    {
                        longest = longest.max(len);
                        overlong.push(&source.path, line, || format!("{len} tokens"));
                    }
                    report.lengths.extend(lengths);
                    report.truncated += usize::from(truncated);
                    report.split += usize::from(split);
                    report.overlong += usize::from(dropped);
                    report.endless += usize::from(endless);
                    if kept.is_empty() && !dropped {
                        report.without_target += 1;
                    }
                    report.count(&kept);
                    origins.extend(kept.iter().map(|_| Origin { source: index, line }));
                    samples.extend(kept);
                }
                Err(RowFault::NoTemplate) => {
                    return Err(DataError::NoChatTemplate { model: model.to_owned() });
                }
                Err(RowFault::Bad(reason)) => problems.push(&source.path, line, || reason),
            }
        }
        reports.push(report);
    }
    if problems.count > 0 {
        return Err(DataError::BadRows { count: problems.count, first: problems.first });
    }
    if overlong.count > 0 {
        return Err(DataError::Overlong {
            count: overlong.count,
            sequence_len: options.sequence_len,
            longest,
            first: overlong.first,
        });
    }
    let report = Report { sequence_len: options.sequence_len, sources: reports };
    if samples.is_empty() {
        return Err(report.nothing_trained());
    }
    Ok(Dataset { samples, origins, report })
}

impl Dataset {
    /// Training and validation samples: `val_split` of the rows, drawn with `seed`, are held out. All samples of a
    /// row fall on the same side, and both sides keep the order of the files.
    ///
    /// At least one row is held out when `val_split` is above zero, and at least one is trained on: a single row
    /// is never held out.
    pub fn split(&self, val_split: f64, seed: u64) -> (Vec<Sample>, Vec<Sample>) {
        let rows = self.held_out(val_split, seed);
        let pairs = || self.samples.iter().zip(&self.origins);
        let side = |wanted: bool| {
            let chosen = pairs().filter(|(_, origin)| rows.binary_search(origin).is_ok() == wanted);
            chosen.map(|(sample, _)| sample.clone()).collect()
        };
        (side(false), side(true))
    }

    /// The rows that [`Dataset::split`] holds out, in the order of the files.
    pub fn held_out(&self, val_split: f64, seed: u64) -> Vec<Origin> {
        let mut rows = self.origins.clone();
        rows.dedup();
        let held_out = (rows.len() as f64 * val_split).round() as usize;
        let held_out = held_out.max(usize::from(val_split > 0.0)).min(rows.len().saturating_sub(1));
        rows.shuffle(&mut ChaCha8Rng::seed_from_u64(seed));
        rows.truncate(held_out);
        rows.sort_unstable();
        rows
    }
}

/// What became of one row.
enum Outcome {
    Samples {
        kept: Vec<Sample>,
        /// Lengths in tokens before cutting.
        lengths: Vec<usize>,
        truncated: bool,
        split: bool,
        dropped: bool,
        endless: bool,
    },
    Unused(Unused),
}

enum RowFault {
    NoTemplate,
    Bad(String),
}

/// All faults counted, the first few kept.
#[derive(Default)]
struct Problems {
    count: usize,
    first: Vec<RowProblem>,
}

impl Problems {
    fn push(&mut self, path: &Path, line: usize, reason: impl FnOnce() -> String) {
        self.count += 1;
        if self.first.len() < LISTED_ROWS {
            self.first.push(RowProblem { path: path.to_owned(), line, reason: reason() });
        }
    }
}

/// Lines that are not blank, with their numbers.
fn lines<'a>(path: &Path, bytes: &'a [u8]) -> Result<Vec<(usize, &'a [u8])>, DataError> {
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
    if bytes.iter().find(|byte| !byte.is_ascii_whitespace()) == Some(&b'[') {
        return Err(DataError::JsonArray { path: path.to_owned() });
    }
    let lines = bytes.split(|byte| *byte == b'\n').enumerate();
    Ok(lines
        .map(|(index, line)| (index + 1, line.trim_ascii()))
        .filter(|(_, line)| !line.is_empty())
        .collect())
}

fn detected(line: &[u8]) -> Option<Format> {
    let value: Value = serde_json::from_slice(line).ok()?;
    Format::detect(value.as_object()?).ok()
}

fn outcome(
    masker: &Masker,
    source: &DataSource,
    format: Option<Format>,
    options: &LoadOptions,
    line: &[u8],
) -> Result<Outcome, RowFault> {
    let row = row(source, format, line).map_err(RowFault::Bad)?;
    let ends = !matches!(row, Row::Tokens(_)) && source.train_on != TrainOn::All;
    let samples = match samples(masker, row, source.train_on, options.vocab_size)? {
        Ok(samples) => samples,
        Err(unused) => return Ok(Outcome::Unused(unused)),
    };
    let endless = ends && samples.last().is_some_and(|sample| !stops(sample, masker.tokenizer));
    let lengths: Vec<_> = samples.iter().map(Sample::len).collect();
    let too_long = lengths.iter().any(|len| *len > options.sequence_len);
    let (mut truncated, mut split, mut dropped) = (false, false, false);
    let mut kept = Vec::with_capacity(samples.len());
    for mut sample in samples {
        if sample.len() <= options.sequence_len {
            kept.push(sample);
            continue;
        }
        match options.overlong {
            Overlong::Drop | Overlong::Error => {}
            Overlong::Truncate => {
                sample.truncate(options.sequence_len);
                kept.push(sample);
            }
            Overlong::Split => kept.extend(sample.split(options.sequence_len)),
        }
    }
    kept.retain(|sample| sample.trained.contains(&true));
    if too_long {
        truncated = options.overlong == Overlong::Truncate && !kept.is_empty();
        split = options.overlong == Overlong::Split && !kept.is_empty();
        dropped = !truncated && !split;
    }
    Ok(Outcome::Samples { kept, lengths, truncated, split, dropped, endless })
}

/// The last target ends generation.
fn stops(sample: &Sample, tokenizer: &Tokenizer) -> bool {
    let last = sample.trained.iter().rposition(|trained| *trained);
    last.is_some_and(|last| tokenizer.special().eos_ids.contains(&sample.input_ids[last]))
}

fn row(source: &DataSource, format: Option<Format>, line: &[u8]) -> Result<Row, String> {
    let text =
        std::str::from_utf8(line).map_err(|error| format!("not UTF-8 at byte {}", error.valid_up_to()))?;
    let value: Value = serde_json::from_str(text).map_err(|error| {
        let reason = error.to_string();
        // the parser sees one line and calls it line 1
        format!("not JSON: {}", reason.replace(" at line 1 column ", " at column "))
    })?;
    let Value::Object(object) = &value else {
        return Err(format!("{}, expected a JSON object", kind(&value)));
    };
    let Some(format) = format else { return Err(Format::detect(object).err().unwrap_or_default()) };
    if source.format.is_none() {
        match Format::detect(object) {
            Ok(found) if found != format => {
                return Err(format!("a row of format {found} in a file of format {format}"));
            }
            Ok(_) => {}
            Err(reason) => return Err(reason),
        }
    }
    format.read(object)
}

fn samples(
    masker: &Masker,
    row: Row,
    train_on: TrainOn,
    vocab_size: usize,
) -> Result<Result<Vec<Sample>, Unused>, RowFault> {
    let bad = |error: DataError| RowFault::Bad(error.to_string());
    match (row, masker.template) {
        (Row::Chat(_), None) => Err(RowFault::NoTemplate),
        (Row::Chat(chat) | Row::Completion { chat, .. }, Some(template)) => {
            masker.chat(template, &chat, train_on).map_err(bad)
        }
        (Row::Completion { prompt, completion, .. }, None) => {
            let from = if train_on == TrainOn::All { 0 } else { prompt.len() };
            masker.document(prompt + &completion, from).map(|sample| Ok(vec![sample])).map_err(bad)
        }
        (Row::Text(text), _) => masker.document(text, 0).map(|sample| Ok(vec![sample])).map_err(bad),
        (Row::Tokens(mut sample), _) => {
            if let Some(id) = sample.input_ids.iter().find(|id| **id as usize >= vocab_size) {
                return Err(RowFault::Bad(format!("token id {id}, expected less than {vocab_size}")));
            }
            if train_on == TrainOn::All {
                sample = Sample::new(sample.input_ids, vec![true; sample.trained.len()]);
            }
            Ok(Ok(vec![sample]))
        }
    }
}
