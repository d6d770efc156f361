//! The bytes behind each token id, and decoding them as they arrive.

use std::str;

use tokenizers::PreTokenizerWrapper;
use tune_formats::{GgufTokenizer, TokenType};

use crate::sentencepiece::{SPACE, byte_of};

/// How a vocabulary spells bytes as text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Spelling {
    /// One character per byte, as in GPT-2: `Ġ` is a space.
    ByteLevel,
    /// `▁` is a space and `<0xNN>` a byte, as in SentencePiece.
    SentencePiece,
}

/// The bytes and the kind of every token.
#[derive(Clone, Debug, Default)]
pub(crate) struct Vocabulary {
    text: Vec<u8>,
    /// Ends of the tokens in `text`, by id.
    ends: Vec<usize>,
    control: Vec<bool>,
    /// Encoding puts a space in front of the text, so decoding takes one away.
    prefix_space: bool,
}

impl Vocabulary {
    pub(crate) fn from_gguf(tables: &GgufTokenizer, spelling: Spelling) -> Self {
        let mut vocabulary = Self {
            prefix_space: spelling == Spelling::SentencePiece && tables.add_space_prefix,
            ..Self::default()
        };
        for (text, kind) in tables.tokens.iter().zip(&tables.token_types) {
            let verbatim = matches!(kind, TokenType::Control | TokenType::Unknown | TokenType::UserDefined);
            let control = matches!(kind, TokenType::Control | TokenType::Unknown);
            vocabulary.push(text, (!verbatim).then_some(spelling), control);
        }
        vocabulary
    }

    /// # Errors
    /// A message for a tokenizer whose spelling of bytes is not known.
    pub(crate) fn of(tokenizer: &tokenizers::Tokenizer) -> Result<Self, String> {
        // The parts have many types and one shape in JSON.
        let decoder = serde_json::to_string(&tokenizer.get_decoder()).map_err(|error| error.to_string())?;
        let byte_level = decoder.contains(r#""type":"ByteLevel""#)
            || matches!(tokenizer.get_pre_tokenizer(), Some(PreTokenizerWrapper::ByteLevel(_)));
        let spelling = if byte_level {
            Spelling::ByteLevel
        } else if decoder.contains(SPACE) || decoder.contains(r#""type":"Metaspace""#) {
            Spelling::SentencePiece
        } else {
            return Err(format!("its decoder is {decoder}, expected a byte-level or a SentencePiece one"));
        };
        let strips = decoder.contains(r#""type":"Strip""#)
            || (decoder.contains(r#""type":"Metaspace""#)
                && !decoder.contains(r#""prepend_scheme":"never""#));
        let mut vocabulary =
            Self { prefix_space: spelling == Spelling::SentencePiece && strips, ..Self::default() };
        let added = tokenizer.get_added_tokens_decoder();
        let len = tokenizer.get_vocab(true).values().max().map_or(0, |id| id + 1);
        for id in 0..len {
            if let Some(token) = added.get(&id) {
                vocabulary.push(&token.content, None, token.special);
            } else {
                vocabulary.push(&tokenizer.id_to_token(id).unwrap_or_default(), Some(spelling), false);
            }
        }
        Ok(vocabulary)
    }

    pub(crate) fn len(&self) -> usize {
        self.ends.len()
    }

    pub(crate) fn bytes(&self, id: u32) -> &[u8] {
        let id = id as usize;
        let Some(&end) = self.ends.get(id) else { return &[] };
        let start = if id == 0 { 0 } else { self.ends[id - 1] };
        &self.text[start..end]
    }

    pub(crate) fn is_control(&self, id: u32) -> bool {
        self.control.get(id as usize).copied().unwrap_or(false)
    }

    /// The text without the space that encoding put in front of it.
    pub(crate) fn without_prefix_space<'a>(&self, bytes: &'a [u8]) -> &'a [u8] {
        if self.prefix_space { bytes.strip_prefix(b" ").unwrap_or(bytes) } else { bytes }
    }

    fn push(&mut self, token: &str, spelling: Option<Spelling>, control: bool) {
        match spelling {
            None => self.text.extend_from_slice(token.as_bytes()),
            Some(Spelling::ByteLevel) => {
                for character in token.chars() {
                    match byte_level(character) {
                        Some(byte) => self.text.push(byte),
                        None => self.text.extend(character.to_string().bytes()),
                    }
                }
            }
            Some(Spelling::SentencePiece) => match byte_of(token) {
                Some(byte) => self.text.push(byte),
                None => self.text.extend(token.replace(SPACE, " ").bytes()),
            },
        }
        self.ends.push(self.text.len());
        self.control.push(control);
    }
}

/// Decodes tokens as they are generated: control tokens are left out, and a character is given out once all its
/// bytes have arrived.
pub struct StreamDecoder<'a> {
    vocabulary: &'a Vocabulary,
    pending: Vec<u8>,
    begun: bool,
}

impl<'a> StreamDecoder<'a> {
    pub(crate) fn new(vocabulary: &'a Vocabulary) -> Self {
        Self { vocabulary, pending: Vec::new(), begun: false }
    }

    /// Text that is complete with this token; often empty in the middle of an emoji.
    pub fn push(&mut self, id: u32) -> String {
        if self.vocabulary.is_control(id) {
            return String::new();
        }
        let mut bytes = self.vocabulary.bytes(id);
        if !self.begun && !bytes.is_empty() {
            bytes = self.vocabulary.without_prefix_space(bytes);
            self.begun = true;
        }
        self.pending.extend_from_slice(bytes);
        self.take_complete()
    }

    /// What is left when generation ends; an unfinished character becomes U+FFFD.
    pub fn finish(&mut self) -> String {
        let rest = String::from_utf8_lossy(&self.pending).into_owned();
        self.pending.clear();
        rest
    }

    fn take_complete(&mut self) -> String {
        let mut text = String::new();
        loop {
            match str::from_utf8(&self.pending) {
                Ok(valid) => {
                    text.push_str(valid);
                    self.pending.clear();
                    return text;
                }
                Err(error) => {
                    let (valid, rest) = self.pending.split_at(error.valid_up_to());
                    text.push_str(&String::from_utf8_lossy(valid));
                    let skip = error.error_len();
                    self.pending = rest[skip.unwrap_or(0)..].to_vec();
                    if skip.is_none() {
                        return text;
                    }
                    text.push(char::REPLACEMENT_CHARACTER);
                }
            }
        }
    }
}

/// The byte that GPT-2 spells as `character`: printable Latin-1 as itself, the other 68 bytes from U+0100 on.
pub(crate) fn byte_level(character: char) -> Option<u8> {
    let code = u32::from(character);
    match code {
        0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => u8::try_from(code).ok(),
        // 0x00..=0x20, 0x7f..=0xa0 and 0xad, in this order
        0x100..=0x120 => u8::try_from(code - 0x100).ok(),
        0x121..=0x142 => u8::try_from(code - 0x121 + 0x7f).ok(),
        0x143 => Some(0xad),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_byte_has_one_spelling() {
        let bytes: BTreeSet<_> = (0x21..=0x143).filter_map(char::from_u32).filter_map(byte_level).collect();
        assert_eq!(bytes.len(), 256);
        assert_eq!(byte_level('Ġ'), Some(b' '));
        assert_eq!(byte_level('Ċ'), Some(b'\n'));
        assert_eq!(byte_level('▁'), None);
    }

    fn vocabulary(tokens: &[&str], prefix_space: bool) -> Vocabulary {
        let mut vocabulary = Vocabulary { prefix_space, ..Vocabulary::default() };
        vocabulary.push("<s>", None, true);
        for token in tokens {
            vocabulary.push(token, Some(Spelling::SentencePiece), false);
        }
        vocabulary
    }

    #[test]
    fn streaming_waits_for_whole_characters() {
        let vocabulary = vocabulary(&["▁a", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>", "b"], true);
        let mut stream = StreamDecoder::new(&vocabulary);
        let parts: Vec<_> = [0, 1, 2, 3, 4, 5, 6, 1].map(|id| stream.push(id)).to_vec();
        assert_eq!(parts, ["", "a", "", "", "", "😀", "b", " a"]);
        assert_eq!(stream.finish(), "");
    }

    #[test]
    fn streaming_marks_broken_bytes_and_goes_on() {
        let vocabulary = vocabulary(&["<0xF0>", "<0x9F>", "b"], false);
        let mut stream = StreamDecoder::new(&vocabulary);
        assert_eq!([1, 2, 3, 1].map(|id| stream.push(id)).concat(), "\u{fffd}b");
        assert_eq!(stream.finish(), "\u{fffd}");
        assert_eq!(stream.finish(), "");
    }
}
