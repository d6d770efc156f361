//! Tokenizers from `tokenizer.json` and from tables written here.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use tune_data::{DataError, Tokenizer};
use tune_formats::{GgufTokenizer, SpecialTokens, TokenType, TokenizerFiles};

fn special(add_bos: bool) -> SpecialTokens {
    SpecialTokens { bos: Some(1), eos: Some(2), pad: Some(2), eot: Some(2), eos_ids: vec![2], add_bos }
}

fn json_files() -> TokenizerFiles {
    let path = Path::new("../../tests/parity/models/llama-tied/tokenizer.json").to_owned();
    TokenizerFiles::Json { tokenizer_json: path, tokenizer_config: None }
}

fn from_json(add_bos: bool) -> Tokenizer {
    Tokenizer::new(&json_files(), &special(add_bos), "tiny").expect("tokenizer")
}

/// SentencePiece over a few letters, with all bytes.
fn sentencepiece(tokens: &[(&str, f32)]) -> GgufTokenizer {
    let mut tables =
        GgufTokenizer { model: "llama".into(), add_space_prefix: true, unk: Some(0), ..Default::default() };
    let mut push = |text: &str, kind, score| {
        Arc::make_mut(&mut tables.tokens).push(text.to_owned());
        tables.token_types.push(kind);
        tables.scores.push(score);
    };
    push("<unk>", TokenType::Unknown, 0.0);
    push("<s>", TokenType::Control, 0.0);
    push("</s>", TokenType::Control, 0.0);
    for byte in 0..=255 {
        push(&format!("<0x{byte:02X}>"), TokenType::Byte, 0.0);
    }
    for (text, score) in tokens {
        push(text, TokenType::Normal, *score);
    }
    push("\n\n", TokenType::UserDefined, -1000.0);
    tables
}

fn from_tables(tables: GgufTokenizer) -> Result<Tokenizer, DataError> {
    Tokenizer::new(&TokenizerFiles::Gguf(tables), &special(false), "tiny")
}

#[test]
fn bos_comes_once_and_only_in_front_of_a_sequence() {
    let text = "<|im_start|>user\nHi";
    let (plain, adding) = (from_json(false), from_json(true));
    let ids = plain.encode("Hi", true).expect("encoded");
    assert_eq!(adding.encode("Hi", true).expect("encoded"), ids);
    assert_eq!(plain.encode_sequence("Hi").expect("encoded"), ids);
    assert_eq!(adding.encode_sequence("Hi").expect("encoded"), [&[1], &ids[..]].concat());
    // the template has written it already
    let ids = plain.encode_sequence(text).expect("encoded");
    assert_eq!((ids[0], &adding.encode_sequence(text).expect("encoded")), (1, &ids));
    assert_eq!(adding.encode_sequence("").expect("encoded"), [1]);
}

#[test]
fn control_tokens_are_read_only_where_asked_for() {
    let tokenizer = from_json(false);
    let text = "a<|im_end|>b";
    let read = tokenizer.encode(text, true).expect("encoded");
    assert_eq!(read.iter().filter(|id| **id == 2).count(), 1);
    let spelt = tokenizer.encode(text, false).expect("encoded");
    assert!(!spelt.contains(&2) && spelt.len() > read.len());
    assert_eq!(tokenizer.decode(&read), text);
    assert_eq!(tokenizer.decode(&spelt), text);
    // generated text shows no control tokens
    let mut stream = tokenizer.stream();
    let shown: String = read.iter().map(|id| stream.push(*id)).collect();
    assert_eq!(shown + &stream.finish(), "ab");
}

#[test]
fn tokens_cover_the_text_without_gaps() {
    let tokenizer = from_json(false);
    let text = " naïve  日本 👋🏽\r\n\tx<|im_end|> y";
    let tokens = tokenizer.sequence_tokens(text).expect("encoded");
    let mut end = 0;
    for token in &tokens {
        assert!(token.start <= end && token.end >= end, "{token:?} after byte {end}");
        end = token.end;
        if text.get(token.start..token.end).is_some_and(str::is_ascii) {
            assert_eq!(tokenizer.token_bytes(token.id), &text.as_bytes()[token.start..token.end]);
        }
    }
    assert_eq!(end, text.len());
}

#[test]
fn sentencepiece_merges_the_best_score_first_and_the_left_of_equals() {
    let letters = [("▁", -9.0), ("a", -9.0), ("b", -9.0), ("c", -9.0)];
    let merged = [("ab", -2.0), ("bc", -1.0), ("aa", -3.0), ("aaa", -3.0), ("▁a", -8.0)];
    let tokenizer = from_tables(sentencepiece(&[letters.as_slice(), &merged].concat())).expect("tokenizer");
    let pieces = |text: &str| -> Vec<String> {
        let ids = tokenizer.encode(text, false).expect("encoded");
        ids.iter().map(|id| String::from_utf8_lossy(tokenizer.token_bytes(*id)).into_owned()).collect()
    };
    assert_eq!(pieces("abc"), [" a", "bc"]);
    assert_eq!(pieces("ab"), [" ", "ab"]);
    assert_eq!(pieces("aaaa"), [" ", "aaa", "a"]);
    assert_eq!(pieces("a b"), [" a", " ", "b"]);
    // user-defined tokens are cut out first, bytes stand for unknown characters
    assert_eq!(pieces("a\n\nb"), [" a", "\n\n", " ", "b"]);
    assert_eq!(tokenizer.encode("é", false).expect("encoded")[1..], [3 + 0xc3, 3 + 0xa9]);
    assert_eq!(pieces(""), [""; 0]);
    for text in ["abc", " aé\n", "a  b</s>c", "日本"] {
        let ids = tokenizer.encode(text, false).expect("encoded");
        assert_eq!(tokenizer.decode(&ids), text);
        assert!(!ids.contains(&2));
    }
    assert_eq!(tokenizer.encode("a</s>", true).expect("encoded").last(), Some(&2));
}

#[test]
fn damaged_tables_are_refused() {
    let refused = |tables: GgufTokenizer| from_tables(tables).err().expect("refused").to_string();
    let bpe = |tokens: &[&str], merges: &[&str], pre: &str| GgufTokenizer {
        model: "gpt2".into(),
        pre: Some(pre.into()),
        tokens: tokens.iter().map(ToString::to_string).collect::<Vec<_>>().into(),
        token_types: vec![TokenType::Normal; tokens.len()],
        merges: merges.iter().map(ToString::to_string).collect::<Vec<_>>().into(),
        ..GgufTokenizer::default()
    };
    assert!(from_tables(bpe(&["a", "b", "ab"], &["a b"], "smollm")).is_ok());

    let error = from_tables(bpe(&["a"], &[], "smollm9")).err().expect("refused");
    assert_eq!(error.to_string(), "the pre-tokenizer \"smollm9\" of tiny is not known");
    let error = refused(GgufTokenizer { model: "rwkv".into(), ..GgufTokenizer::default() });
    assert_eq!(error, "the tokenizer of tiny is of kind \"rwkv\", expected one of gpt2, gemma4, llama");

    let error = refused(bpe(&["a", "a"], &[], "smollm"));
    assert!(error.ends_with("tokens 0 and 1 have the same text \"a\""), "{error}");
    let error = refused(bpe(&["a", "b"], &["ab"], "smollm"));
    assert!(error.ends_with("merge 0 is \"ab\", expected two parts"), "{error}");
    let error = refused(bpe(&["a", "b"], &["a b"], "smollm"));
    assert!(error.ends_with("merge 0 is \"a b\" and \"ab\" is not a token"), "{error}");
    let mut tables = bpe(&["a", "b"], &[], "smollm");
    tables.token_types.pop();
    assert!(refused(tables).ends_with("1 token types for 2 tokens"));
    let mut tables = sentencepiece(&[]);
    tables.scores.pop();
    assert!(refused(tables).ends_with("259 scores for 260 tokens"));
}

#[test]
fn a_file_that_does_not_load_is_named() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("tokenizer.json");
    let load = |path: &PathBuf| {
        let files = TokenizerFiles::Json { tokenizer_json: path.clone(), tokenizer_config: None };
        Tokenizer::new(&files, &special(false), "tiny").err().expect("refused").to_string()
    };
    assert!(load(&path).contains("tokenizer.json is not a usable tokenizer: "));
    std::fs::write(&path, "{}").expect("written");
    assert!(load(&path).contains("tokenizer.json is not a usable tokenizer: "));
    let bpe = r#"{"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": ["a b"]}}"#;
    std::fs::write(&path, bpe).expect("written");
    assert!(load(&path).ends_with("merge 0 gives a token that is not in the vocabulary"));
    let words = r#"{"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}"#;
    std::fs::write(&path, words).expect("written");
    assert!(load(&path).ends_with("a word-piece or word-level model, expected BPE or Unigram"));
}

#[test]
fn a_normaliser_is_applied_to_text_that_needs_it() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("tokenizer.json");
    let TokenizerFiles::Json { tokenizer_json: plain, .. } = json_files() else { unreachable!() };
    let json = std::fs::read_to_string(plain).expect("read");
    assert!(json.contains(r#""normalizer": null"#));
    let json = json.replace(r#""normalizer": null"#, r#""normalizer": {"type": "NFC"}"#);
    std::fs::write(&path, json).expect("written");
    let files = TokenizerFiles::Json { tokenizer_json: path, tokenizer_config: None };
    let tokenizer = Tokenizer::new(&files, &special(false), "tiny").expect("tokenizer");
    let ids = |text: &str| tokenizer.encode(text, true).expect("encoded");
    assert_eq!(ids("cafe\u{301} <|im_end|>"), ids("caf\u{e9} <|im_end|>"));
    assert_ne!(ids("cafe\u{301}"), from_json(false).encode("cafe\u{301}", true).expect("encoded"));
}
