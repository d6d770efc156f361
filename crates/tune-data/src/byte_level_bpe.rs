//! Byte-level BPE without the bookkeeping of the tokenizers crate: the same ids for the same bytes, many times faster.
//!
//! The crate aligns every byte with the original text, gives each piece and each token a string of its own and
//! backtracks in its expressions. Here added tokens are cut out by one automaton, the rest is cut into pieces by
//! others, and pieces that came before are looked up. Only what most models have is built here (see
//! [`ByteLevelBpe::new`]); everything else stays with the crate, which also is what the tests compare with.

use std::sync::{Mutex, PoisonError};

use aho_corasick::{AhoCorasick, MatchKind};
use regex_automata::meta::Cache;
use rustc_hash::FxHashMap;
use tokenizers::AddedToken;

use crate::Token;
use crate::merges::{Merges, Words};
use crate::pieces::{Cut, each_piece};
use crate::vocabulary::byte_level;

/// Ids are below this; the largest vocabularies have a few hundred thousand.
const LARGEST_ID: u32 = 1 << 24;

/// Byte-level BPE with its added tokens.
pub(crate) struct ByteLevelBpe {
    /// Tokens cut out of the text before anything else, then those cut out of what is left.
    added: Vec<AddedTokens>,
    cuts: Vec<Cut>,
    merges: Merges,
    /// Bytes of each token that merges can give, by id.
    lengths: Vec<usize>,
    /// Working memory that no thread is using.
    idle: Mutex<Vec<Scratch>>,
}

struct AddedTokens {
    automaton: AhoCorasick,
    /// Id, and whether the token is a control token, by pattern.
    tokens: Vec<(u32, bool)>,
}

struct Scratch {
    cuts: Vec<Cache>,
    words: Words,
}

/// A vocabulary by the spelling of its tokens.
pub(crate) type Ids<'a> = FxHashMap<&'a str, u32>;

impl ByteLevelBpe {
    /// `merges`: left, right and result, in order. `cuts`: the expressions of the pre-tokenizer. With `ignore_merges`, a
    /// piece that is a token becomes it. Bytes without a token leave nothing behind if `unknown_vanish`.
    ///
    /// `None` for what this loop does not do: expressions that are not regular, other tokens for bytes without one, and
    /// added tokens that take white space with them or match whole words only.
    pub(crate) fn new<'a>(
        vocab: &Ids,
        merges: impl ExactSizeIterator<Item = (u32, u32, u32)>,
        ignore_merges: bool,
        unknown_vanish: bool,
        cuts: &[&str],
        added: impl IntoIterator<Item = (u32, &'a AddedToken)>,
    ) -> Option<Self> {
        let mut bytes = [None; 256];
        let largest = vocab.values().copied().max().filter(|id| *id < LARGEST_ID)?;
        let mut lengths = vec![0; largest as usize + 1];
        let mut whole = FxHashMap::default();
        #[allow(clippy::iter_over_hash_type, reason = "each token goes to places of its own")]
        for (token, &id) in vocab {
            let Some(text) = token.chars().map(byte_level).collect::<Option<Vec<u8>>>() else { continue };
            lengths[id as usize] = text.len();
            if let [byte] = *text {
                bytes[usize::from(byte)] = Some(id);
            }
            if ignore_merges {
                whole.insert(text.into(), id);
            }
        }
        if !unknown_vanish && bytes.contains(&None) {
            return None;
        }
        let cuts: Vec<Cut> = cuts.iter().map(|expression| Cut::new(expression)).collect::<Option<_>>()?;
        Some(Self {
            added: added_tokens(added)?,
            cuts,
            merges: Merges::new(&bytes, merges, whole),
            lengths,
            idle: Mutex::default(),
        })
    }

    /// Tokens of `text`; control tokens are recognised if `special`.
    pub(crate) fn encode(&self, text: &str, special: bool) -> Vec<Token> {
        let idle = || self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        let scratch = idle().pop();
        let mut scratch = scratch.unwrap_or_else(|| Scratch {
            cuts: self.cuts.iter().map(Cut::cache).collect(),
            words: Words::default(),
        });
        let mut tokens = Vec::with_capacity(text.len() / 3);
        self.section(&self.added, text, 0..text.len(), special, &mut scratch, &mut tokens);
        idle().push(scratch);
        tokens
    }

    /// Tokens of a part of the text, without the added tokens that were cut out of it before.
    fn section(
        &self,
        added: &[AddedTokens],
        text: &str,
        section: std::ops::Range<usize>,
        special: bool,
        scratch: &mut Scratch,
        tokens: &mut Vec<Token>,
    ) {
        let Some((set, rest)) = added.split_first() else {
            return self.merged(text, section, scratch, tokens);
        };
        let mut from = section.start;
        for found in set.automaton.find_iter(&text[section.clone()]) {
            let (id, control) = set.tokens[found.pattern().as_usize()];
            if control && !special {
                continue;
            }
            let (start, end) = (section.start + found.start(), section.start + found.end());
            self.section(rest, text, from..start, special, scratch, tokens);
            tokens.push(Token { id, start, end });
            from = end;
        }
        self.section(rest, text, from..section.end, special, scratch, tokens);
    }

    /// Tokens of a part of the text in which there are no added tokens.
    fn merged(
        &self,
        text: &str,
        section: std::ops::Range<usize>,
        scratch: &mut Scratch,
        tokens: &mut Vec<Token>,
    ) {
        let offset = section.start;
        let Scratch { cuts, words } = scratch;
        each_piece(&self.cuts, cuts, &text[section], &mut |start, piece| {
            let (first, mut at) = (tokens.len(), offset + start);
            for &id in self.merges.ids(piece.as_bytes(), words) {
                let (start, end) = (at, at + self.lengths[id as usize]);
                at = end;
                tokens.push(Token { id, start, end });
            }
            if at < offset + start + piece.len() {
                self.skip_unknown(piece, offset + start, &mut tokens[first..]);
            }
            if !piece.is_ascii() {
                for token in &mut tokens[first..] {
                    // the whole of the characters that it shares
                    token.start = boundary_before(text, token.start);
                    token.end = boundary_after(text, token.end);
                }
            }
        });
    }

    /// Moves the tokens of a piece, which begins at byte `offset`, apart where bytes without a token lie.
    fn skip_unknown(&self, piece: &str, offset: usize, tokens: &mut [Token]) {
        let known = piece.bytes().enumerate().filter(|(_, byte)| self.merges.knows(*byte));
        let known: Vec<usize> = known.map(|(at, _)| offset + at).collect();
        for token in tokens {
            token.start = known[token.start - offset];
            token.end = known[token.end - offset - 1] + 1;
        }
    }
}

/// Those matched in the text as it is, then those that a normaliser would see first.
fn added_tokens<'a>(tokens: impl IntoIterator<Item = (u32, &'a AddedToken)>) -> Option<Vec<AddedTokens>> {
    let mut tokens: Vec<_> = tokens.into_iter().collect();
    if tokens.iter().any(|(_, token)| token.single_word || token.lstrip || token.rstrip) {
        return None;
    }
    tokens.sort_unstable_by_key(|(id, token)| (token.normalized, *id));
    let sets = tokens.chunk_by(|(_, left), (_, right)| left.normalized == right.normalized);
    sets.map(|set| {
        let mut builder = AhoCorasick::builder();
        let automaton =
            builder.match_kind(MatchKind::LeftmostLongest).build(set.iter().map(|(_, token)| &token.content));
        let tokens = set.iter().map(|(id, token)| (*id, token.special)).collect();
        Some(AddedTokens { automaton: automaton.ok()?, tokens })
    })
    .collect()
}

/// The start of the character that byte `at` belongs to.
fn boundary_before(text: &str, mut at: usize) -> usize {
    while !text.is_char_boundary(at) {
        at -= 1;
    }
    at
}

/// The end of the character that the byte before `at` belongs to.
fn boundary_after(text: &str, mut at: usize) -> usize {
    while !text.is_char_boundary(at) {
        at += 1;
    }
    at
}

#[cfg(test)]
mod tests {
    use std::sync::LazyLock;

    use proptest::prelude::*;
    use proptest::strategy::ValueTree as _;
    use tokenizers::models::bpe::{BPE, BpeTrainer};
    use tokenizers::pre_tokenizers::byte_level::ByteLevel;
    use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer as _, Trainer as _};
    use tune_formats::{GgufTokenizer, TokenType};

    use super::*;
    use crate::gguf_bpe::GgufBpe;
    use crate::pre_tokenizer::NAMES;

    /// What the vocabulary is trained on: prose, code, numbers and many scripts.
    const TEXTS: [&str; 5] = [
        include_str!("../../../README.md"),
        include_str!("../../../ARCHITECTURE.md"),
        include_str!("../../../tests/parity/tokenizer/mixed.txt"),
        include_str!("tokenizer.rs"),
        include_str!("../../../datasets/quickstart.eval.jsonl"),
    ];

    /// Text in which engines tend to differ.
    const FRAGMENTS: [&str; 44] = [
        " ",
        "  ",
        "   ",
        "\n",
        "\r\n",
        "\n\n",
        "\t",
        "\u{a0}",
        "\u{2003}",
        "\u{3000}",
        "\u{85}",
        "'s",
        "'S",
        "'ll",
        "'ſ",
        "’re",
        "it's",
        "The",
        " the",
        "tokenizer",
        "HTTPServer",
        "snake_case",
        "1",
        "42",
        "1234567",
        "²½",
        "٣",
        "Ⅷ",
        "--",
        "==>",
        "...",
        "!?",
        "/",
        "日本語",
        "한국어",
        "é",
        "e\u{301}",
        "👩‍👩‍👧‍👦",
        "\u{4}",
        "\u{f2000}",
        "<|im_end|>",
        "<|im",
        "<br>",
        "<br><br>",
    ];

    /// Tables for the pre-tokenizer `pre`. A few bytes have no token, as in SmolLM2's vocabulary.
    fn tables(pre: &str) -> GgufTokenizer {
        static TRAINED: LazyLock<(Vec<String>, Vec<String>)> = LazyLock::new(|| {
            let alphabet = ByteLevel::alphabet().into_iter();
            let mut trainer = BpeTrainer::builder()
                .vocab_size(2000)
                .show_progress(false)
                // the bytes 0x04 and 0xf2
                .initial_alphabet(alphabet.filter(|byte| !['Ą', 'ò'].contains(byte)).collect())
                .build();
            let pieces = |text: &str| {
                let mut text = PreTokenizedString::from(text);
                ByteLevel::new(false, false, true).pre_tokenize(&mut text)?;
                let splits = text.get_splits(OffsetReferential::Normalized, OffsetType::Byte);
                Ok(splits.into_iter().map(|(piece, ..)| piece.to_owned()).collect())
            };
            trainer.feed(TEXTS.iter(), pieces).expect("pieces");
            let mut bpe = BPE::default();
            trainer.train(&mut bpe).expect("trained");
            let mut tokens: Vec<_> = bpe.get_vocab().into_iter().collect();
            tokens.sort_unstable_by_key(|(_, id)| *id);
            let merges = serde_json::to_value(&bpe).expect("JSON")["merges"].take();
            let merges: Vec<[String; 2]> = serde_json::from_value(merges).expect("pairs");
            (
                tokens.into_iter().map(|(token, _)| token).collect(),
                merges.into_iter().map(|pair| pair.join(" ")).collect(),
            )
        });
        let (mut tokens, merges) = TRAINED.clone();
        let mut token_types = vec![TokenType::Normal; tokens.len()];
        let added = [("<|im_end|>", TokenType::Control), ("<br>", TokenType::UserDefined)];
        for (token, kind) in
            added.into_iter().chain([("<br><br>", TokenType::UserDefined), ("   ", TokenType::UserDefined)])
        {
            tokens.push(token.to_owned());
            token_types.push(kind);
        }
        GgufTokenizer {
            model: "gpt2".into(),
            pre: Some(pre.into()),
            tokens: tokens.into(),
            token_types,
            merges: merges.into(),
            ..Default::default()
        }
    }

    /// Ours, and the two readings of the tokenizers crate: with and without control tokens.
    fn engines(pre: &str) -> (ByteLevelBpe, [tokenizers::Tokenizer; 2]) {
        let tables = tables(pre);
        let bpe = GgufBpe::of(&tables, "trained").expect("tables").expect("BPE");
        let special = bpe.tokenizer().expect("tokenizer");
        let mut plain = special.clone();
        plain.set_encode_special_tokens(true);
        (bpe.byte_level().expect("byte-level"), [special, plain])
    }

    fn assert_same(ours: &ByteLevelBpe, theirs: &[tokenizers::Tokenizer; 2], text: &str, context: &str) {
        for (special, theirs) in [(true, &theirs[0]), (false, &theirs[1])] {
            let tokens = ours.encode(text, special);
            let expected = theirs.encode(text, false).expect("encoded");
            let ids: Vec<u32> = tokens.iter().map(|token| token.id).collect();
            assert_eq!(ids, expected.get_ids(), "{context}, special = {special}: {text:?}");
            // behind a byte without a token, the crate's places are those of other bytes
            if !text.contains(['\u{4}', '\u{f2000}']) {
                let places: Vec<_> = tokens.iter().map(|token| (token.start, token.end)).collect();
                assert_eq!(places, expected.get_offsets(), "{context}, special = {special}: {text:?}");
            }
        }
    }

    #[test]
    fn tokens_are_those_of_the_tokenizers_crate() {
        for pre in NAMES.iter() {
            let (ours, theirs) = engines(pre);
            for text in TEXTS {
                assert_same(&ours, &theirs, text, pre);
            }
            let mut random = proptest::test_runner::TestRunner::deterministic();
            let fragments = proptest::collection::vec(
                prop_oneof![3 => proptest::sample::select(&FRAGMENTS[..]).prop_map(str::to_owned), 1 => any::<String>()],
                0..30,
            );
            for _ in 0..300 {
                let parts = fragments.new_tree(&mut random).expect("a text").current();
                assert_same(&ours, &theirs, &parts.concat(), pre);
            }
        }
    }

    #[test]
    fn tokens_behind_a_byte_without_one_keep_their_places() {
        let (ours, _) = engines("gpt-2");
        let text = "\u{4}a\u{4}日\u{f2000}";
        for token in ours.encode(text, true) {
            let place = &text[token.start..token.end];
            assert!(["a", "日", "\u{f2000}"].contains(&place), "{place:?}");
        }
    }
}
