//! The tokens that are measured with: real text, cut to exact lengths.

use std::path::PathBuf;

use miette::IntoDiagnostic;
use tune_data::Tokenizer;
use tune_formats::BaseModel;

use crate::exit::UsageError;
use crate::model::check_ids;

/// More characters than a token stands for in any usual text.
const CHARACTERS_PER_TOKEN: usize = 8;

#[derive(clap::Args)]
pub struct TextArgs {
    /// Text to use [default: some of this program's own source]
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,
    /// Write the token ids as JSON, one list per document, for another program to measure with
    #[arg(long, value_name = "FILE")]
    write_tokens: Option<PathBuf>,
}

impl TextArgs {
    /// `count` documents of exactly `len` tokens, cut from the text one after the other. A text that is too short
    /// begins again.
    pub fn documents(
        &self,
        count: usize,
        len: usize,
        tokenizer: &Tokenizer,
        base: &BaseModel,
    ) -> miette::Result<Vec<Vec<u32>>> {
        let text = match &self.text {
            Some(path) => std::fs::read_to_string(path).map_err(|error| {
                let help = "give a file of UTF-8 text with --text";
                UsageError::report(format!("cannot read {}: {error}", path.display()), help)
            })?,
            None => own_source(),
        };
        let enough = count.saturating_mul(len).saturating_mul(CHARACTERS_PER_TOKEN);
        let ids = tokenizer.encode(&text[..text.floor_char_boundary(enough)], false)?;
        check_ids(&ids, base)?;
        if ids.is_empty() {
            return Err(UsageError::report("the text has no tokens", "give another file with --text"));
        }
        let documents = cut(&ids, count, len);
        if let Some(path) = &self.write_tokens {
            let json = serde_json::to_vec(&documents).into_diagnostic()?;
            std::fs::write(path, json).map_err(|error| {
                let help = "give a file that can be written with --write-tokens";
                UsageError::report(format!("cannot write {}: {error}", path.display()), help)
            })?;
        }
        Ok(documents)
    }
}

fn cut(ids: &[u32], count: usize, len: usize) -> Vec<Vec<u32>> {
    let mut ids = ids.iter().copied().cycle();
    (0..count).map(|_| ids.by_ref().take(len).collect()).collect()
}

/// Source code is what many adapters are trained for, and this one is always at hand.
fn own_source() -> String {
    [
        include_str!("../train.rs"),
        include_str!("../export/mod.rs"),
        include_str!("../data.rs"),
        include_str!("../plan.rs"),
        include_str!("../chat.rs"),
        include_str!("../eval.rs"),
        include_str!("../generate.rs"),
    ]
    .concat()
}

#[cfg(test)]
mod tests {
    use super::cut;

    #[test]
    fn documents_have_exact_lengths_and_a_short_text_begins_again() {
        assert_eq!(cut(&[1, 2, 3, 4, 5], 3, 4), [[1, 2, 3, 4], [5, 1, 2, 3], [4, 5, 1, 2]]);
    }
}
