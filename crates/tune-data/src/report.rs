//! What became of every row of the data.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::{DataError, Format, Sample};

/// What became of every row of the data.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Longest sample allowed, in tokens.
    pub sequence_len: usize,
    /// One entry per file.
    pub sources: Vec<SourceReport>,
}

/// What became of every row of one file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SourceReport {
    /// The file.
    pub path: PathBuf,
    /// Format of its rows; absent for an empty file.
    pub format: Option<Format>,
    /// Lines that are not blank.
    pub rows: usize,
    /// Samples made of them.
    pub samples: usize,
    /// Tokens of the samples.
    pub tokens: usize,
    /// Tokens that are prediction targets.
    pub trained_tokens: usize,
    /// Rows that were cut at the limit.
    pub truncated: usize,
    /// Rows that were cut into several samples.
    pub split: usize,
    /// Rows that were left out because they are too long.
    pub overlong: usize,
    /// Rows that were left out because they have nothing to train on.
    pub without_target: usize,
    /// Rows that were left out because the chat template drops what the assistant said.
    pub text_lost: usize,
    /// Rows whose last answer does not end with a token that ends generation: a model trained on them does not
    /// stop by itself. Not counted for tokenised rows, nor where every token is trained.
    pub endless: usize,
    /// Lengths of the rendered rows in tokens, before any cutting, in the order of the file.
    #[serde(skip)]
    pub lengths: Vec<usize>,
}

/// One bar of a histogram of lengths.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Bucket {
    /// Shortest length, in tokens.
    pub from: usize,
    /// Longest length, in tokens.
    pub to: usize,
    /// Number of rows.
    pub count: usize,
}

impl Report {
    /// Rows of all files.
    pub fn rows(&self) -> usize {
        self.sources.iter().map(|source| source.rows).sum()
    }

    /// Samples of all files.
    pub fn samples(&self) -> usize {
        self.sources.iter().map(|source| source.samples).sum()
    }

    /// Tokens of all samples.
    pub fn tokens(&self) -> usize {
        self.sources.iter().map(|source| source.tokens).sum()
    }

    /// Prediction targets of all samples.
    pub fn trained_tokens(&self) -> usize {
        self.sources.iter().map(|source| source.trained_tokens).sum()
    }

    /// Rows that were left out, for any reason.
    pub fn dropped(&self) -> usize {
        self.sources.iter().map(SourceReport::dropped).sum()
    }

    /// Lengths in tokens of all rows before cutting, ascending.
    pub fn lengths(&self) -> Vec<usize> {
        let mut lengths: Vec<_> = self.sources.iter().flat_map(|source| &source.lengths).copied().collect();
        lengths.sort_unstable();
        lengths
    }

    /// Lengths of all rows before cutting, in at most about twelve buckets: of equal width where the lengths are
    /// alike, else doubling. The limit ends a bucket as well.
    pub fn histogram(&self) -> Vec<Bucket> {
        let lengths = self.lengths();
        let (Some(&first), Some(&last)) = (lengths.first(), lengths.last()) else { return Vec::new() };
        let mut ends = if last <= 4 * first { even_ends(first, last) } else { doubling_ends(first, last) };
        ends.push(self.sequence_len);
        ends.sort_unstable();
        ends.dedup();
        // from the end before the shortest row to the end at or after the longest
        let begin = ends.partition_point(|end| *end < first);
        let stop = (ends.partition_point(|end| *end < last) + 1).min(ends.len());
        let mut from = 1 + if begin == 0 { 0 } else { ends[begin - 1] };
        let mut buckets = Vec::with_capacity(stop - begin);
        for &to in &ends[begin..stop] {
            let count =
                lengths.partition_point(|len| *len <= to) - lengths.partition_point(|len| *len < from);
            buckets.push(Bucket { from, to, count });
            from = to + 1;
        }
        buckets
    }

    pub(crate) fn nothing_trained(&self) -> DataError {
        let total = |count: fn(&SourceReport) -> usize| self.sources.iter().map(count).sum::<usize>();
        let (overlong, without, lost) =
            (total(|s| s.overlong), total(|s| s.without_target), total(|s| s.text_lost));
        let mut reasons = Vec::new();
        let mut help = "check what `tune data` shows of these rows";
        if self.rows() == 0 {
            reasons.push("the data have no rows".to_owned());
            help = "add rows: one JSON object a line";
        }
        if lost > 0 {
            reasons.push(format!("the chat template drops the assistant's text of {}", rows(lost)));
            help = "use another base, or remove what the template cuts out of the answers";
        }
        if overlong > 0 {
            reasons.push(format!("{} too long for sequence_len = {}", are(overlong), self.sequence_len));
            help = "raise data_options.sequence_len, or set data_options.overlong to \"split\"";
        }
        if without > 0 {
            reasons.push(format!("{} no token to train on", have(without)));
            help =
                "chats need an assistant turn with weight 1, and tokenised rows need a label other than -100";
        }
        DataError::NothingTrained { reason: reasons.join("; "), help: help.to_owned() }
    }
}

impl SourceReport {
    pub(crate) fn new(path: &Path, format: Option<Format>) -> Self {
        Self {
            path: path.to_owned(),
            format,
            rows: 0,
            samples: 0,
            tokens: 0,
            trained_tokens: 0,
            truncated: 0,
            split: 0,
            overlong: 0,
            without_target: 0,
            text_lost: 0,
            endless: 0,
            lengths: Vec::new(),
        }
    }

    /// Rows that were left out, for any reason.
    pub fn dropped(&self) -> usize {
        self.overlong + self.without_target + self.text_lost
    }

    pub(crate) fn count(&mut self, samples: &[Sample]) {
        self.samples += samples.len();
        self.tokens += samples.iter().map(Sample::len).sum::<usize>();
        self.trained_tokens += samples.iter().map(Sample::trained_tokens).sum::<usize>();
    }
}

/// Multiples of a round number, from below `first` to `last` or above.
fn even_ends(first: usize, last: usize) -> Vec<usize> {
    let round = (0..).flat_map(|power| [1, 2, 5].map(|digit: usize| digit * 10_usize.pow(power)));
    let step = round.take(40).find(|step| (last - first) / step < 10).unwrap_or(last);
    (first.saturating_sub(1) / step..=last.div_ceil(step)).map(|multiple| multiple * step).collect()
}

/// Powers of two, from below `first` to `last` or above.
fn doubling_ends(first: usize, last: usize) -> Vec<usize> {
    let below = first.next_power_of_two() / 2;
    std::iter::successors(Some(below.max(1)), |end| (*end < last).then_some(end * 2)).collect()
}

fn rows(count: usize) -> String {
    if count == 1 { "1 row".to_owned() } else { format!("{count} rows") }
}

fn are(count: usize) -> String {
    format!("{} {}", rows(count), if count == 1 { "is" } else { "are" })
}

fn have(count: usize) -> String {
    format!("{} {}", rows(count), if count == 1 { "has" } else { "have" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_cover_every_row_once() {
        for (lengths, limit) in [
            (vec![5, 8, 9, 16, 17, 100], 20),
            (vec![3], 2048),
            (vec![1, 1], 2048),
            (vec![70, 80, 4000], 2048),
            (vec![64, 65], 64),
            (vec![1, 2, 3], 2),
            (vec![73, 90, 99, 111], 512),
            (vec![73, 90, 99, 111], 100),
            ((1..100).map(|i| i * i).collect(), 4096),
        ] {
            let mut source = SourceReport::new(Path::new("x"), None);
            source.lengths = lengths.clone();
            let buckets = Report { sequence_len: limit, sources: vec![source] }.histogram();
            assert_eq!(buckets.iter().map(|b| b.count).sum::<usize>(), lengths.len(), "{buckets:?}");
            assert!(
                buckets.iter().any(|b| b.to == limit) || lengths.iter().all(|len| *len < limit),
                "{buckets:?}"
            );
            assert!(buckets.windows(2).all(|pair| pair[0].to + 1 == pair[1].from), "{buckets:?}");
            assert!(buckets[0].count > 0 && buckets.len() <= 16, "{buckets:?}");
        }
    }
}
