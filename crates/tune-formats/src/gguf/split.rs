//! Split GGUF files: `NAME-00001-of-00003.gguf` and so on.

use std::path::{Path, PathBuf};

use super::GgufFile;
use crate::FormatError;

/// Opens the other parts of a split file and joins them; a file that is not split is given back as it is.
///
/// # Errors
/// A part other than the first, missing parts, or parts that do not belong together.
pub(super) fn complete(
    mut first: GgufFile,
    open: impl Fn(&Path) -> Result<GgufFile, FormatError>,
) -> Result<GgufFile, FormatError> {
    let path = first.path().to_owned();
    let count = first.metadata().unsigned("split.count").unwrap_or(1);
    let total = first.metadata().unsigned("split.tensors.count");
    let number = first.metadata().unsigned("split.no").unwrap_or(0);
    first.metadata_mut().retain(|key| !key.starts_with("split."));
    if count <= 1 {
        return Ok(first);
    }
    let Some(prefix) = prefix(&path, number + 1, count) else {
        let what = format!(
            "is part {} of {count} but its name does not end in {}",
            number.saturating_add(1),
            suffix(number.saturating_add(1), count)
        );
        return Err(FormatError::damaged(&path, what));
    };
    if number != 0 {
        let first = format!("{prefix}{}", suffix(1, count));
        return Err(FormatError::NotFirstShard { path, first });
    }

    let parts =
        (2..=count).map(|n| path.with_file_name(format!("{prefix}{}", suffix(n, count)))).collect::<Vec<_>>();
    let missing = parts.iter().filter(|part| !part.exists()).map(|part| file_name(part)).collect::<Vec<_>>();
    if !missing.is_empty() {
        return Err(FormatError::MissingShards { path, count, missing });
    }
    for (index, part) in parts.iter().enumerate() {
        let part = open(part)?;
        let (no, of) = (part.metadata().unsigned("split.no"), part.metadata().unsigned("split.count"));
        if (no, of) != (Some(index as u64 + 1), Some(count)) {
            let what =
                format!("split.no is {no:?} and split.count {of:?}, expected {} and {count}", index + 1);
            return Err(FormatError::damaged(part.path(), what));
        }
        first.append(part)?;
    }
    let found = first.tensors().len() as u64;
    if total.is_some_and(|total| total != found) {
        let what = format!("its parts hold {found} tensors, expected {}", total.unwrap_or_default());
        return Err(FormatError::damaged(&path, what));
    }
    Ok(first)
}

fn suffix(number: u64, count: u64) -> String {
    format!("-{number:05}-of-{count:05}.gguf")
}

/// The name before the suffix; bounded so that a forged count cannot make a list of names that fills memory.
fn prefix(path: &Path, number: u64, count: u64) -> Option<String> {
    if count > 99_999 || number > count {
        return None;
    }
    file_name(path).strip_suffix(&suffix(number, count)).map(str::to_owned)
}

fn file_name(path: &Path) -> String {
    PathBuf::from(path.file_name().unwrap_or_default()).display().to_string()
}
