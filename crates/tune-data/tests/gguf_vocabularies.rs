//! Tokenizers rebuilt from GGUF tables give the ids of llama.cpp's own test vectors.
//!
//! The environment variable `TUNE_TEST_VOCABULARIES` names the folder `models/` of llama.cpp's source tree, which
//! holds `ggml-vocab-NAME.gguf` with `.inp` (texts) and `.out` (ids) beside each.

use std::fs;
use std::path::{Path, PathBuf};

use tune_data::Tokenizer;
use tune_formats::TokenizerFiles;
use tune_formats::gguf::{GgufFile, read_tokenizer};

/// Vocabularies of kinds that can be rebuilt.
const NAMES: [&str; 14] = [
    "llama-bpe",
    "llama-spm",
    "phi-3",
    "qwen2",
    "qwen35",
    "gemma-4",
    "gpt-2",
    "starcoder",
    "refact",
    "command-r",
    "mpt",
    "falcon",
    "deepseek-coder",
    "aquila",
];

const SEPARATOR: &str = "\n__ggml_vocab_test__\n";

#[test]
#[allow(clippy::print_stderr, reason = "a skipped test must be seen")]
fn ids_are_those_of_llama_cpp() {
    let Some(folder) = std::env::var_os("TUNE_TEST_VOCABULARIES").map(PathBuf::from) else {
        eprintln!("SKIPPED: set TUNE_TEST_VOCABULARIES to the folder models/ of llama.cpp's source tree");
        return;
    };
    let failures: Vec<_> = NAMES.iter().flat_map(|name| check(&folder, name)).collect();
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

fn check(folder: &Path, name: &str) -> Vec<String> {
    let path = folder.join(format!("ggml-vocab-{name}.gguf"));
    let beside = |extension: &str| path.with_extension(format!("gguf.{extension}"));
    let file = GgufFile::open(&path).expect("opened");
    let (tables, special) = read_tokenizer(&file).expect("tables");
    let model = file.metadata().string("general.name").unwrap_or(name).to_owned();
    let tokenizer = match Tokenizer::new(&TokenizerFiles::Gguf(tables), &special, &model) {
        Ok(tokenizer) => tokenizer,
        Err(error) => return vec![format!("{name}: {error}")],
    };
    let Ok(texts) = fs::read_to_string(beside("inp")) else { return vec![] };
    let expected = fs::read_to_string(beside("out")).expect("ids");
    let mut failures = Vec::new();
    for (text, line) in texts.split(SEPARATOR).zip(expected.lines()) {
        let expected: Vec<u32> = line.split_whitespace().map(|id| id.parse().expect("an id")).collect();
        let ids = tokenizer.encode(text, false).expect("encoded");
        if ids != expected {
            failures.push(format!("{name}: {text:?}\n  expected {expected:?}\n  got      {ids:?}"));
        }
        if tokenizer.decode(&ids) != text {
            failures.push(format!("{name}: {text:?} decodes to {:?}", tokenizer.decode(&ids)));
        }
    }
    failures
}
