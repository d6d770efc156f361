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
            merges: Merges::new(bytes, merges, whole),
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
