//! How byte-level BPE cuts text before merging, by the name in `tokenizer.ggml.pre`.
//!
//! GGUF stores no regular expressions, only a name for them. The expressions are those of the `tokenizer.json`
//! files behind each name, in the syntax of Hugging Face tokenizers. Text that none matches stays one piece.
//! They run on the text as it is: GGUF engines apply no Unicode normalisation.

use std::sync::LazyLock;

use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::tokenizer::SplitDelimiterBehavior;

/// How one family of byte-level BPE tokenizers cuts text.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PreTokenizer {
    names: &'static [&'static str],
    /// Expressions whose matches become pieces, one after the other.
    pub(crate) splits: &'static [&'static str],
    /// A piece that is itself in the vocabulary becomes that token, whatever the merges say.
    pub(crate) ignore_merges: bool,
}

impl PreTokenizer {
    /// The entry for a `tokenizer.ggml.pre`.
    pub(crate) fn named(name: &str) -> Option<&'static Self> {
        TABLE.iter().find(|entry| entry.names.contains(&name))
    }

    /// Every known name, for a message.
    pub(crate) fn known() -> String {
        let mut names: Vec<_> = TABLE.iter().flat_map(|entry| entry.names).copied().collect();
        names.sort_unstable();
        names.join(", ")
    }

    /// The splits in sequence, then the byte-to-character spelling of GPT-2.
    pub(crate) fn build(&self) -> tokenizers::Result<PreTokenizerWrapper> {
        let mut steps = Vec::with_capacity(self.splits.len() + 1);
        for split in self.splits {
            let pattern = SplitPattern::Regex((*split).to_owned());
            steps.push(Split::new(pattern, SplitDelimiterBehavior::Isolated, false)?.into());
        }
        steps.push(ByteLevel::new(false, false, false).into());
        Ok(Sequence::new(steps).into())
    }
}

/// The expressions of a pre-tokenizer of the tokenizers crate that cuts as the entries here do: splits, one after the
/// other, then the byte-to-character spelling. `None` for one that does anything else.
pub(crate) fn expressions(pre_tokenizer: &PreTokenizerWrapper) -> Option<Vec<&str>> {
    let steps = match pre_tokenizer {
        PreTokenizerWrapper::Sequence(sequence) => sequence.as_ref(),
        step => std::slice::from_ref(step),
    };
    let (last, splits) = steps.split_last()?;
    let PreTokenizerWrapper::ByteLevel(ByteLevel { add_prefix_space: false, use_regex, .. }) = last else {
        return None;
    };
    splits.iter().map(expression).chain(use_regex.then_some(Some(GPT2))).collect()
}

/// The expression whose matches a step makes pieces.
fn expression(step: &PreTokenizerWrapper) -> Option<&str> {
    match step {
        PreTokenizerWrapper::Split(Split {
            pattern: SplitPattern::Regex(expression),
            behavior: SplitDelimiterBehavior::Isolated,
            invert: false,
            ..
        }) => Some(expression),
        PreTokenizerWrapper::Digits(digits) if digits.individual_digits => Some(&NUMERIC),
        _ => None,
    }
}

/// What the `Digits` step takes for a digit: `\p{N}`, but of the standard library's version of Unicode.
static NUMERIC: LazyLock<String> = LazyLock::new(|| {
    let numeric = ('\0'..=char::MAX).filter(|character| character.is_numeric());
    let class: String = numeric.map(|character| format!("\\x{{{:x}}}", u32::from(character))).collect();
    format!("[{class}]")
});

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN35: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const O200K: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const SEED_CODER: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+";
const MINICPM5: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}+| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const BAILING: &str =
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+";
const DEEPSEEK3: &str = r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##;

const TABLE: &[PreTokenizer] = &[
    PreTokenizer {
        names: &[
            "llama-bpe",
            "llama3",
            "llama-v3",
            "falcon3",
            "falcon-h1",
            "pixtral",
            "midm-2.0",
            "lfm2",
            "jina-v5-nano",
            "glm4",
            "glm5",
        ],
        splits: &[LLAMA3],
        ignore_merges: true,
    },
    PreTokenizer { names: &["dbrx", "smaug-bpe", "chatglm-bpe"], splits: &[LLAMA3], ignore_merges: false },
    PreTokenizer {
        names: &[
            "qwen2",
            "deepseek-r1-qwen",
            "kormo",
            "f2llmv2",
            "megrez",
            "stablelm2",
            "hunyuan",
            "solar-open",
            "grok-2",
        ],
        splits: &[QWEN2],
        ignore_merges: false,
    },
    PreTokenizer { names: &["qwen35"], splits: &[QWEN35], ignore_merges: false },
    PreTokenizer {
        names: &["gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"],
        splits: &[O200K],
        ignore_merges: false,
    },
    PreTokenizer { names: &["tekken"], splits: &[TEKKEN], ignore_merges: true },
    PreTokenizer {
        names: &[
            "smollm",
            "starcoder",
            "refact",
            "command-r",
            "codeshell",
            "exaone",
            "minerva-7b",
            "mellum2",
        ],
        splits: &[r"\p{N}", GPT2],
        ignore_merges: false,
    },
    PreTokenizer {
        names: &[
            "gpt-2",
            "phi-2",
            "mpt",
            "olmo",
            "jais",
            "trillion",
            "granite-docling",
            "exaone4",
            "gigachat",
            "a.x-4.0",
            "mellum",
            "modern-bert",
            "jina-v2-es",
            "jina-v2-de",
        ],
        splits: &[GPT2],
        ignore_merges: false,
    },
    PreTokenizer {
        names: &["deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"],
        splits: &[r"\p{N}{1,3}", r"[一-龥぀-ゟ゠-ヿ]+", DEEPSEEK3],
        ignore_merges: false,
    },
    PreTokenizer {
        names: &["deepseek-coder"],
        splits: &[r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+", r"\p{N}"],
        ignore_merges: false,
    },
    PreTokenizer {
        names: &["falcon"],
        splits: &[r"[\p{P}\$\+<=>\^~\|`]+", GPT2, r"[0-9][0-9][0-9]"],
        ignore_merges: false,
    },
    PreTokenizer { names: &["seed-coder"], splits: &[SEED_CODER], ignore_merges: false },
    PreTokenizer { names: &["minicpm5"], splits: &[r"\p{N}{1,3}", MINICPM5], ignore_merges: true },
    PreTokenizer {
        names: &["bailingmoe", "bailingmoe2", "llada-moe"],
        splits: &[BAILING],
        ignore_merges: false,
    },
    PreTokenizer {
        names: &["default"],
        splits: &[r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"],
        ignore_merges: false,
    },
];

/// One name of each entry.
#[cfg(test)]
pub(crate) static NAMES: LazyLock<Vec<&str>> =
    LazyLock::new(|| TABLE.iter().map(|entry| entry.names[0]).collect());

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digits_are_those_of_the_tokenizers_crate() {
        let number = regex_automata::meta::Regex::new(&NUMERIC).unwrap();
        let differs = |c: &char| c.is_numeric() != number.is_match(c.to_string().as_bytes());
        assert_eq!(('\0'..=char::MAX).find(differs), None);
    }

    #[test]
    fn every_expression_compiles_and_every_name_is_listed_once() {
        let mut names: Vec<_> = TABLE.iter().flat_map(|entry| entry.names).collect();
        let count = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), count);
        for entry in TABLE {
            entry.build().unwrap();
        }
    }

    #[test]
    fn an_unknown_name_is_not_guessed() {
        assert!(PreTokenizer::named("smollm").is_some());
        assert!(PreTokenizer::named("smollm9").is_none());
        assert!(PreTokenizer::known().contains("llama-bpe, "));
    }
}
