//! SentencePiece BPE as local engines run it: merges by score, without a merge list.
//!
//! 1. Spaces become `▁`; where the tokenizer asks for it, one more goes in front of a fragment that begins the
//!    text or follows a special token.
//! 2. Characters are symbols. The adjacent pair whose joined text has the highest score merges first, the
//!    leftmost of equals, until no pair is in the vocabulary.
//! 3. A symbol outside the vocabulary becomes one `<0xNN>` token per UTF-8 byte, or the unknown token.
//!
//! Control and user-defined tokens are cut out of the raw text beforehand, longest text first.
//! Departure from sentencepiece: no Unicode normalisation, as in GGUF engines.

use std::cmp::Ordering;
use std::collections::{BTreeSet, BinaryHeap, HashMap};
use std::ops::Range;

use aho_corasick::AhoCorasick;
use tune_formats::{GgufTokenizer, TokenType};

use crate::tokenizer::Token;

/// U+2581, the spelling of a space.
pub(crate) const SPACE: char = '▁';

/// A tokenizer of kind `llama` in GGUF.
#[derive(Clone, Debug)]
pub(crate) struct SentencePiece {
    ids: HashMap<String, u32>,
    scores: Vec<f32>,
    bytes: [Option<u32>; 256],
    unknown: Option<u32>,
    add_space_prefix: bool,
    /// Tokens that are cut out of the raw text, longest first.
    cuts: Vec<Cut>,
    /// Finds which of them occur at all: there can be thousands.
    finder: AhoCorasick,
}

#[derive(Clone, Debug)]
struct Cut {
    text: String,
    id: u32,
    /// Recognised only where control tokens are asked for.
    control: bool,
    /// White space to the right of it is dropped.
    strip_right: bool,
}

impl SentencePiece {
    /// Builds the tables. `strip_after_special` drops white space after special tokens, as Phi-3 wants.
    ///
    /// # Errors
    /// A message when a table is too short or two tokens have the same text.
    pub(crate) fn from_gguf(tables: &GgufTokenizer, strip_after_special: bool) -> Result<Self, String> {
        let len = tables.tokens.len();
        if tables.scores.len() != len {
            return Err(format!("{} scores for {len} tokens", tables.scores.len()));
        }
        let mut ids = HashMap::with_capacity(len);
        let mut bytes = [None; 256];
        let mut cuts = Vec::new();
        for (id, (text, kind)) in tables.tokens.iter().zip(&tables.token_types).enumerate() {
            let id = id as u32;
            if let Some(other) = ids.insert(text.clone(), id) {
                return Err(format!("tokens {other} and {id} have the same text {text:?}"));
            }
            if let Some(byte) = byte_of(text) {
                bytes[usize::from(byte)] = Some(id);
            }
            if matches!(kind, TokenType::Control | TokenType::Unknown | TokenType::UserDefined)
                && !text.is_empty()
            {
                let control = *kind != TokenType::UserDefined;
                cuts.push(Cut {
                    text: text.clone(),
                    id,
                    control,
                    strip_right: strip_after_special && control,
                });
            }
        }
        cuts.sort_by(|a, b| b.text.len().cmp(&a.text.len()).then(a.id.cmp(&b.id)));
        let unknown = tables.unk.or_else(|| {
            let position = tables.token_types.iter().position(|kind| *kind == TokenType::Unknown);
            position.map(|id| id as u32)
        });
        if unknown.is_none() && bytes.iter().any(Option::is_none) {
            return Err("neither an unknown token nor all 256 byte tokens".to_owned());
        }
        let finder = AhoCorasick::new(cuts.iter().map(|cut| &cut.text)).map_err(|error| error.to_string())?;
        Ok(Self {
            ids,
            scores: tables.scores.clone(),
            bytes,
            unknown,
            add_space_prefix: tables.add_space_prefix,
            cuts,
            finder,
        })
    }

    /// Tokens of `text` with the bytes of `text` that each stands for.
    pub(crate) fn encode(&self, text: &str, control: bool) -> Vec<Token> {
        let mut tokens = Vec::new();
        let mut after_special = true;
        for fragment in self.fragments(text, control) {
            match fragment {
                Fragment::Special(id, span) => {
                    tokens.push(Token { id, start: span.start, end: span.end });
                    after_special = true;
                }
                Fragment::Text(span) => {
                    self.encode_fragment(&text[span.clone()], span.start, after_special, &mut tokens);
                    after_special = false;
                }
            }
        }
        tokens
    }

    /// Cuts the text at special tokens: all occurrences of the longest one first, then those of the next in
    /// what is left.
    fn fragments(&self, text: &str, control: bool) -> Vec<Fragment> {
        if text.is_empty() {
            return Vec::new();
        }
        let mut fragments = vec![Fragment::Text(0..text.len())];
        let present: BTreeSet<_> =
            self.finder.find_overlapping_iter(text).map(|found| found.pattern().as_usize()).collect();
        for cut in present.into_iter().map(|index| &self.cuts[index]).filter(|cut| control || !cut.control) {
            let mut next = Vec::with_capacity(fragments.len() + 2);
            for fragment in fragments {
                match fragment {
                    Fragment::Text(span) => cut_span(text, span, cut, &mut next),
                    special @ Fragment::Special(..) => next.push(special),
                }
            }
            fragments = next;
        }
        fragments
    }

    fn encode_fragment(&self, text: &str, offset: usize, after_special: bool, tokens: &mut Vec<Token>) {
        let mut spelt = String::with_capacity(text.len() + 8);
        let mut symbols = Vec::with_capacity(text.len() + 1);
        if self.add_space_prefix && after_special {
            spelt.push(SPACE);
            symbols.push(Symbol::new(0..spelt.len(), offset..offset));
        }
        for (at, character) in text.char_indices() {
            let start = spelt.len();
            spelt.push(if character == ' ' { SPACE } else { character });
            let source = offset + at;
            symbols.push(Symbol::new(start..spelt.len(), source..source + character.len_utf8()));
        }
        let last = symbols.len().saturating_sub(1);
        for (index, symbol) in symbols.iter_mut().enumerate() {
            symbol.previous = index.checked_sub(1);
            symbol.next = (index < last).then_some(index + 1);
        }
        self.merge(&spelt, &mut symbols);
        for symbol in symbols.iter().filter(|symbol| !symbol.text.is_empty()) {
            self.emit(&spelt[symbol.text.clone()], &symbol.source, tokens);
        }
    }

    fn merge(&self, spelt: &str, symbols: &mut [Symbol]) {
        let mut queue = BinaryHeap::new();
        let candidate = |symbols: &[Symbol], left: usize| {
            let right = symbols[left].next?;
            let joined = symbols[left].text.start..symbols[right].text.end;
            let id = *self.ids.get(&spelt[joined.clone()])?;
            Some(Candidate { score: self.scores[id as usize], left, right, len: joined.len() })
        };
        queue.extend((0..symbols.len()).filter_map(|left| candidate(symbols, left)));
        while let Some(Candidate { left, right, len, .. }) = queue.pop() {
            // stale: one of the two has merged with something else since
            let joined = symbols[left].text.len() + symbols[right].text.len();
            if symbols[left].text.is_empty() || symbols[right].text.is_empty() || joined != len {
                continue;
            }
            symbols[left].text.end = symbols[right].text.end;
            symbols[left].source.end = symbols[right].source.end;
            symbols[left].next = symbols[right].next;
            symbols[right].text = 0..0;
            if let Some(next) = symbols[left].next {
                symbols[next].previous = Some(left);
            }
            if let Some(previous) = symbols[left].previous {
                queue.extend(candidate(symbols, previous));
            }
            queue.extend(candidate(symbols, left));
        }
    }

    fn emit(&self, symbol: &str, source: &Range<usize>, tokens: &mut Vec<Token>) {
        let mut push = |id| tokens.push(Token { id, start: source.start, end: source.end });
        if let Some(id) = self.ids.get(symbol) {
            push(*id);
            return;
        }
        for byte in symbol.bytes() {
            if let Some(id) = self.bytes[usize::from(byte)].or(self.unknown) {
                push(id);
            }
        }
    }
}

/// The byte that a `<0xNN>` token stands for.
pub(crate) fn byte_of(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    (digits.len() == 2).then(|| u8::from_str_radix(digits, 16).ok())?
}

fn cut_span(text: &str, span: Range<usize>, cut: &Cut, out: &mut Vec<Fragment>) {
    let mut rest = span;
    while let Some(found) = text[rest.clone()].find(&cut.text) {
        let start = rest.start + found;
        let end = start + cut.text.len();
        if start > rest.start {
            out.push(Fragment::Text(rest.start..start));
        }
        out.push(Fragment::Special(cut.id, start..end));
        rest.start = end;
        if cut.strip_right {
            let after = &text[rest.clone()];
            rest.start +=
                after.len() - after.trim_start_matches([' ', '\t', '\n', '\r', '\u{b}', '\u{c}']).len();
        }
    }
    if !rest.is_empty() {
        out.push(Fragment::Text(rest));
    }
}

enum Fragment {
    Special(u32, Range<usize>),
    Text(Range<usize>),
}

/// A node of the list of symbols. Merged away when its text is empty.
struct Symbol {
    text: Range<usize>,
    source: Range<usize>,
    previous: Option<usize>,
    next: Option<usize>,
}

impl Symbol {
    fn new(text: Range<usize>, source: Range<usize>) -> Self {
        Self { text, source, previous: None, next: None }
    }
}

/// A pair that may merge; the greatest merges first.
struct Candidate {
    score: f32,
    left: usize,
    right: usize,
    len: usize,
}

impl Ord for Candidate {
    fn cmp(&self, other: &Self) -> Ordering {
        // -0 and 0 are equal scores, which `total_cmp` would not say
        let by_score = self.score.partial_cmp(&other.score).unwrap_or(Ordering::Equal);
        by_score.then(other.left.cmp(&self.left))
    }
}

impl PartialOrd for Candidate {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Candidate {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Candidate {}
