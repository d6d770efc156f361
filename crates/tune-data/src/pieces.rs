//! Cutting text into the pieces that byte-level BPE merges inside, with finite automata.
//!
//! The expressions of pre-tokenizers are regular but for one idiom at their end, `\s+(?!\S)|\s+`: white space in
//! front of a word leaves its last character to the word. Here the automaton finds `\s+` and the idiom is applied to
//! what it found, so that no expression needs backtracking.

use regex_automata::meta::{Cache, Regex};
use regex_automata::{Anchored, Input};
use regex_syntax::ast::parse::Parser;
use regex_syntax::ast::{Ast, Visitor};

/// How the expressions of pre-tokenizers end.
const SPACE_BEFORE_WORD: &str = r"|\s+(?!\S)|\s+";

/// One step of a pre-tokenizer: matches of an expression, and what lies between them, become pieces.
pub(crate) struct Cut {
    regex: Regex,
    /// Nearly every character begins a match, and the last pattern is `\s+` with the idiom.
    covers_text: bool,
}

impl Cut {
    /// `None` for an expression that is not regular.
    pub(crate) fn new(expression: &str) -> Option<Self> {
        let head = expression.strip_suffix(SPACE_BEFORE_WORD);
        if is_possessive(head.unwrap_or(expression))? {
            return None;
        }
        let regex = match head {
            Some(head) => Regex::new_many(&[head, r"\s+"]),
            None => Regex::new(expression),
        };
        Some(Self { regex: regex.ok()?, covers_text: head.is_some() })
    }

    /// Memory for [`each_piece`].
    pub(crate) fn cache(&self) -> Cache {
        self.regex.create_cache()
    }

    /// The first match at or after `at`.
    fn find(&self, cache: &mut Cache, text: &str, at: usize) -> Option<(usize, usize)> {
        let input = Input::new(text).span(at..text.len());
        let here = || input.clone().anchored(Anchored::Yes);
        // from a known start, only the end is searched for
        let found = if self.covers_text { self.regex.search_with(cache, &here()) } else { None };
        let found = found.or_else(|| self.regex.search_with(cache, &input))?;
        let (start, mut end) = (found.start(), found.end());
        if self.covers_text && found.pattern().as_usize() == 1 && end < text.len() {
            let last = text[start..end].chars().next_back().map_or(0, char::len_utf8);
            if start + last < end {
                end -= last;
            }
        }
        Some((start, end))
    }
}

/// The expression has a repetition without backtracking, such as `a++`, which the automata would read as a repetition
/// of a repetition. `None` for an expression that is not regular.
fn is_possessive(expression: &str) -> Option<bool> {
    struct Search;

    impl Visitor for Search {
        type Output = ();
        type Err = ();

        fn finish(self) -> Result<(), ()> {
            Ok(())
        }

        fn visit_pre(&mut self, ast: &Ast) -> Result<(), ()> {
            match ast {
                Ast::Repetition(outer) if matches!(*outer.ast, Ast::Repetition(_)) => Err(()),
                _ => Ok(()),
            }
        }
    }

    let ast = Parser::new().parse(expression).ok()?;
    Some(regex_syntax::ast::visit(&ast, Search).is_err())
}

/// Calls `piece` with the first byte of each piece that `cuts` leave of `text` and with the piece, in order. Each cut
/// sees the pieces of the one before it as texts of their own. `caches` are those of the cuts.
pub(crate) fn each_piece(
    cuts: &[Cut],
    caches: &mut [Cache],
    text: &str,
    piece: &mut impl FnMut(usize, &str),
) {
    each_piece_from(cuts, caches, 0, text, piece);
}

fn each_piece_from(
    cuts: &[Cut],
    caches: &mut [Cache],
    offset: usize,
    text: &str,
    piece: &mut impl FnMut(usize, &str),
) {
    if text.is_empty() {
        return;
    }
    let (Some((cut, cuts)), Some((cache, caches))) = (cuts.split_first(), caches.split_first_mut()) else {
        return piece(offset, text);
    };
    let mut at = 0;
    while let Some((start, end)) = cut.find(cache, text, at) {
        each_piece_from(cuts, caches, offset + at, &text[at..start], piece);
        if start == end {
            // no expression of a tokenizer matches nothing; without progress the rest is one piece
            return each_piece_from(cuts, caches, offset + start, &text[start..], piece);
        }
        each_piece_from(cuts, caches, offset + start, &text[start..end], piece);
        at = end;
    }
    each_piece_from(cuts, caches, offset + at, &text[at..], piece);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pieces<'a>(expressions: &[&str], text: &'a str) -> Vec<&'a str> {
        let cuts: Vec<_> =
            expressions.iter().map(|expression| Cut::new(expression).expect("regular")).collect();
        let mut caches: Vec<_> = cuts.iter().map(Cut::cache).collect();
        let mut found = Vec::new();
        each_piece(&cuts, &mut caches, text, &mut |start, piece| {
            assert_eq!(&text[start..start + piece.len()], piece);
            found.push(start..start + piece.len());
        });
        found.into_iter().map(|range| &text[range]).collect()
    }

    #[test]
    fn a_word_keeps_one_space_of_those_before_it() {
        let expression = r" ?\w+|\s+(?!\S)|\s+";
        assert_eq!(pieces(&[expression], "a   b \u{2003}c  "), ["a", "  ", " b", " ", "\u{2003}", "c", "  "]);
        assert_eq!(pieces(&[expression], "\n\nx\n"), ["\n", "\n", "x", "\n"]);
    }

    #[test]
    fn what_no_expression_matches_is_a_piece() {
        assert_eq!(pieces(&[r"\d"], "ab12c"), ["ab", "1", "2", "c"]);
        assert_eq!(pieces(&[r"\d", r"b"], "ab12c"), ["a", "b", "1", "2", "c"]);
        assert_eq!(pieces(&[], "ab"), ["ab"]);
        assert_eq!(pieces(&[r"\d"], ""), [""; 0]);
        assert_eq!(pieces(&[r"x*"], "ab"), ["ab"]);
    }

    #[test]
    fn expressions_that_are_not_regular_are_refused() {
        for expression in [r"a(?!b)", r"\p{L}++", r"a{1,3}+", r"(?<=a)b", r"(a)\1"] {
            assert!(Cut::new(expression).is_none(), "{expression}");
        }
        assert!(Cut::new(r"[*+,]|\++|(?:a+)+").is_some());
    }
}
