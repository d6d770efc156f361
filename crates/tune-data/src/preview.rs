//! A sample as text, cut where training starts and stops.

use serde::Serialize;

use crate::{Sample, Tokenizer};

/// A run of tokens that are all trained or all masked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PreviewSpan {
    /// Its text, with control tokens spelt out.
    pub text: String,
    /// The tokens are prediction targets.
    pub trained: bool,
    /// Number of tokens.
    pub tokens: usize,
}

/// The text of a sample in runs of trained and of masked tokens.
pub fn preview(sample: &Sample, tokenizer: &Tokenizer) -> Vec<PreviewSpan> {
    let mut spans = Vec::new();
    let mut start = 0;
    for run in sample.trained.chunk_by(|a, b| a == b) {
        let ids = &sample.input_ids[start..start + run.len()];
        let bytes: Vec<u8> = ids.iter().flat_map(|id| tokenizer.token_bytes(*id)).copied().collect();
        let text = String::from_utf8_lossy(&bytes).into_owned();
        spans.push(PreviewSpan { text, trained: run[0], tokens: run.len() });
        start += run.len();
    }
    spans
}
