//! What an export was meant to hold against what was read back from it.

use std::fmt::Display;
use std::path::{Path, PathBuf};

use tune_formats::gguf::Metadata;
use tune_quant::BlockType;

use crate::gguf_model::row_digest;
use crate::{ExportError, ExportRequest, Verification};

/// Differences found so far; one a tensor, for a wrong tensor is mostly wrong in all its rows.
pub(crate) struct Differences {
    target: PathBuf,
    problems: Vec<String>,
    last_tensor: String,
}

impl Differences {
    /// Lets `compare` look for differences, then the request's judge at the file in its `place`, and does with what
    /// they find what the request asks for.
    pub(crate) fn find(
        request: &ExportRequest<'_>,
        place: &Path,
        notes: &mut Vec<String>,
        compare: impl FnOnce(&mut Self) -> Result<(), ExportError>,
    ) -> Result<(), ExportError> {
        let verification = request.options.verification;
        if verification == Verification::Off {
            return Ok(());
        }
        let mut differences = Self::new(request.out);
        compare(&mut differences)?;
        if let Some(judge) = request.options.judge.filter(|_| differences.problems.is_empty()) {
            differences.problems = judge(place)?;
        }
        match differences.finish() {
            Err(error) if verification == Verification::Warn => notes.push(error.to_string()),
            result => return result,
        }
        Ok(())
    }

    fn new(target: &Path) -> Self {
        Self { target: target.to_owned(), problems: Vec::new(), last_tensor: String::new() }
    }

    pub(crate) fn push(&mut self, problem: impl Into<String>) {
        self.problems.push(problem.into());
    }

    /// Compares metadata.
    pub(crate) fn metadata(&mut self, found: &Metadata, wanted: &Metadata) {
        for (key, value) in wanted.iter() {
            match found.get(key) {
                None => self.push(format!("metadata key {key} is missing")),
                Some(found) if found != value => self.push(format!("metadata key {key} has another value")),
                Some(_) => {}
            }
        }
        if found.len() > wanted.len() {
            self.push(format!("there are {} metadata keys, expected {}", found.len(), wanted.len()));
        }
    }

    /// Compares values that are stored exactly.
    pub(crate) fn values(&mut self, tensor: &str, found: &[f32], wanted: &[f32]) {
        if found.len() != wanted.len() {
            self.tensor(tensor, format!("{} values, expected {}", found.len(), wanted.len()));
        } else if let Some(i) = (0..found.len()).find(|&i| found[i].to_bits() != wanted[i].to_bits()) {
            self.tensor(tensor, format!("value {i} is {}, expected {}", found[i], wanted[i]));
        }
    }

    /// Compares a row of blocks.
    pub(crate) fn row(
        &mut self,
        tensor: &str,
        row: usize,
        found: Option<(BlockType, &[u8])>,
        wanted: (BlockType, &[u8]),
    ) {
        match found {
            Some(found) if found == wanted => {}
            Some((block_type, _)) if block_type != wanted.0 => {
                self.tensor(tensor, format!("type {}, expected {}", block_type.name(), wanted.0.name()));
            }
            Some(_) => self.tensor(tensor, format!("row {row} holds other values")),
            None => self.tensor(tensor, format!("row {row} is missing")),
        }
    }

    /// Compares a row of blocks of which only a digest is left.
    pub(crate) fn row_digest(
        &mut self,
        tensor: &str,
        row: usize,
        found: Option<(BlockType, &[u8])>,
        (wanted_type, wanted): (BlockType, u64),
    ) {
        match found {
            Some((found_type, bytes)) if found_type == wanted_type => {
                if row_digest(bytes) != wanted {
                    self.tensor(tensor, format!("row {row} holds other values"));
                }
            }
            Some((found_type, _)) => {
                self.tensor(tensor, format!("type {}, expected {}", found_type.name(), wanted_type.name()));
            }
            None => self.tensor(tensor, format!("row {row} is missing")),
        }
    }

    fn finish(self) -> Result<(), ExportError> {
        if self.problems.is_empty() {
            Ok(())
        } else {
            Err(ExportError::Verification { path: self.target, problems: self.problems })
        }
    }

    fn tensor(&mut self, tensor: &str, problem: impl Display) {
        if self.last_tensor != tensor {
            tensor.clone_into(&mut self.last_tensor);
            self.problems.push(format!("{tensor}: {problem}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_difference_is_found_and_each_tensor_named_once() {
        let mut differences = Differences::new(Path::new("x.gguf"));
        let mut wanted = Metadata::new();
        wanted.set("a", 1_u32.into());
        wanted.set("b", 2_u32.into());
        let mut found = Metadata::new();
        found.set("b", 3_u32.into());
        found.set("c", 3_u32.into());
        found.set("d", 3_u32.into());
        differences.metadata(&found, &wanted);
        differences.values("norm", &[1.0, 2.0], &[1.0, 2.5]);
        differences.row("q", 0, Some((BlockType::F16, &[0, 1])), (BlockType::F16, &[0, 1]));
        differences.row("q", 1, Some((BlockType::F16, &[0, 1])), (BlockType::F16, &[0, 2]));
        differences.row("q", 2, None, (BlockType::F16, &[0, 2]));
        let Err(ExportError::Verification { problems, .. }) = differences.finish() else {
            panic!("accepted")
        };
        assert_eq!(
            problems,
            [
                "metadata key a is missing",
                "metadata key b has another value",
                "there are 3 metadata keys, expected 2",
                "norm: value 1 is 2, expected 2.5",
                "q: row 1 holds other values",
            ]
        );
    }
}
