//! The tokenizer of the real SmolLM2-135M-Instruct.Q4_1.gguf, where the environment variable `TUNE_TEST_GGUF`
//! names it. The expected ids are those of transformers and of llama.cpp, which agree.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;
use tune_data::{ChatTemplate, Clock, Message, Tokenizer};
use tune_formats::{BaseModel, open};

const FIXTURES: &str = "../../tests/parity/tokenizer";

#[allow(clippy::print_stderr, reason = "a skipped test must be seen")]
fn base() -> Option<BaseModel> {
    let Some(path) = std::env::var_os("TUNE_TEST_GGUF").map(PathBuf::from) else {
        eprintln!("SKIPPED: set TUNE_TEST_GGUF to the path of SmolLM2-135M-Instruct.Q4_1.gguf");
        return None;
    };
    Some(open(&path).expect("opened"))
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).expect("ids")
}

#[test]
fn ids_are_those_of_llama_cpp_and_transformers() {
    let Some(base) = base() else { return };
    let tokenizer = Tokenizer::from_base(&base).expect("tokenizer");
    let folder = Path::new(FIXTURES);
    let expected: Value =
        serde_json::from_slice(&fs::read(folder.join("smollm2.json")).expect("read")).expect("JSON");
    let text = fs::read_to_string(folder.join("mixed.txt")).expect("read");

    let special = tokenizer.encode(&text, true).expect("encoded");
    assert_eq!(special, ids(&expected["with_special"]));
    let plain = tokenizer.encode(&text, false).expect("encoded");
    assert_eq!(plain, ids(&expected["as_text"]));
    assert_eq!(tokenizer.encode_sequence(&text).expect("encoded"), special, "SmolLM2 adds no BOS");

    // the byte-level vocabulary loses nothing, whole or token by token
    assert_eq!(tokenizer.decode(&special), text);
    assert_eq!(tokenizer.decode(&plain), text);
    let mut stream = tokenizer.stream();
    let mut streamed: String = plain.iter().map(|id| stream.push(*id)).collect();
    streamed += &stream.finish();
    assert_eq!(streamed, text);

    for piece in expected["pieces"].as_array().expect("pieces") {
        let text = piece["text"].as_str().expect("text");
        assert_eq!(tokenizer.encode(text, true).expect("encoded"), ids(&piece["with_special"]), "{text:?}");
    }
}

#[test]
fn the_chat_template_gives_the_documented_prompt() {
    let Some(base) = base() else { return };
    let tokenizer = Tokenizer::from_base(&base).expect("tokenizer");
    let template = ChatTemplate::from_base(&base, &tokenizer, Clock::Fixed).expect("template");
    let messages = [Message::new("user", "What is the capital of France?")];
    let text = template.render(&messages, None, true).expect("rendered");
    assert_eq!(
        text,
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n\
         <|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    );
    let ids = tokenizer.encode_sequence(&text).expect("encoded");
    assert!(ids.ends_with(&[1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198]));
    assert!(tokenizer.is_control(2) && tokenizer.is_control(1) && !tokenizer.is_control(198));
    assert_eq!(base.special.eos, base.special.pad);
}
