//! What is trained and what is masked, on the chat template of SmolLM2 and on templates that rewrite history.
//!
//! The tokenizer is that of a parity model: byte-level BPE with SmolLM2's special ids, so EOS = PAD = `<|im_end|>`.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::json;
use tune_data::{
    ChatTemplate, Clock, DataError, DataSource, Dataset, LoadOptions, Overlong, Sample, Tokenizer, TrainOn,
    load, preview,
};
use tune_formats::{SpecialTokens, TokenizerFiles};

/// As published with SmolLM2-135M-Instruct.
const SMOLLM2: &str = "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

const SYSTEM: &str =
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n";

/// Reasoning as Qwen3 writes it: kept in the last turn only, with an empty block where there is none.
const REASONING: &str = "{%- for m in messages %}{%- if m.role == 'assistant' %}{%- set parts = m.content.split('</think>') %}{%- if loop.last %}{{- '<|im_start|>assistant\n<think>\n' + (parts[0].split('<think>')[-1].strip('\n') if parts|length > 1 else '') + '\n</think>\n\n' + parts[-1].lstrip('\n') + '<|im_end|>\n' }}{%- else %}{{- '<|im_start|>assistant\n' + parts[-1].lstrip('\n') + '<|im_end|>\n' }}{%- endif %}{%- else %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}";

/// The prompt opens a block of reasoning, history has none: R1's distillations.
const OPENS_REASONING: &str = "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' + m.content.split('</think>')[-1].lstrip('\n') + '<|im_end|>' }}{% else %}{{ '<|im_start|>user\n' + m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}";

fn tokenizer() -> Tokenizer {
    let folder = Path::new("../../tests/parity/models/llama-tied");
    let files =
        TokenizerFiles::Json { tokenizer_json: folder.join("tokenizer.json"), tokenizer_config: None };
    let special = SpecialTokens {
        bos: Some(1),
        eos: Some(2),
        pad: Some(2),
        eot: Some(2),
        eos_ids: vec![2],
        add_bos: false,
    };
    Tokenizer::new(&files, &special, "tiny").expect("tokenizer")
}

fn file(folder: &tempfile::TempDir, rows: &[serde_json::Value]) -> PathBuf {
    let path = folder.path().join("rows.jsonl");
    let lines: Vec<String> = rows.iter().map(ToString::to_string).collect();
    fs::write(&path, lines.join("\n")).expect("written");
    path
}

const OPTIONS: LoadOptions = LoadOptions { sequence_len: 2048, overlong: Overlong::Drop, vocab_size: 320 };

fn try_load_as(
    template: Option<&str>,
    train_on: TrainOn,
    options: LoadOptions,
    rows: &[serde_json::Value],
) -> Result<Dataset, DataError> {
    let folder = tempfile::tempdir().expect("a folder");
    let tokenizer = tokenizer();
    let template =
        template.map(|source| ChatTemplate::new(source, &tokenizer, Clock::Fixed).expect("template"));
    let source = DataSource { path: file(&folder, rows), format: None, train_on };
    load(&[source], &options, &tokenizer, template.as_ref(), "tiny")
}

fn load_as(template: &str, train_on: TrainOn, rows: &[serde_json::Value]) -> Dataset {
    try_load_as(Some(template), train_on, OPTIONS, rows).expect("loaded")
}

/// Text of a sample with what is trained in ⟦ ⟧.
fn marked(sample: &Sample) -> String {
    let spans = preview(sample, &tokenizer());
    spans.iter().map(|s| if s.trained { format!("⟦{}⟧", s.text) } else { s.text.clone() }).collect()
}

fn chat(turns: &[(&str, &str)]) -> serde_json::Value {
    let messages: Vec<_> =
        turns.iter().map(|(role, content)| json!({"role": role, "content": content})).collect();
    json!({"messages": messages})
}

fn expect_marked(template: &str, train_on: TrainOn, row: &serde_json::Value, expected: &[&str]) {
    let data = load_as(template, train_on, std::slice::from_ref(row));
    assert_eq!(data.samples.iter().map(marked).collect::<Vec<_>>(), expected);
}

#[test]
fn every_assistant_turn_is_trained_through_its_end() {
    let row = chat(&[("user", "Hi"), ("assistant", "Hello!"), ("user", "Bye"), ("assistant", "Ciao 👋🏽")]);
    let expected = format!(
        "{SYSTEM}<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Hello!<|im_end|>⟧\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n⟦Ciao 👋🏽<|im_end|>⟧\n"
    );
    expect_marked(SMOLLM2, TrainOn::Assistant, &row, &[&expected]);
}

#[test]
fn end_of_turn_is_trained_though_it_is_the_padding_token() {
    let data = load_as(SMOLLM2, TrainOn::Assistant, &[chat(&[("user", "a"), ("assistant", "b")])]);
    let sample = &data.samples[0];
    let ends: Vec<_> =
        (0..sample.len()).filter(|&i| sample.input_ids[i] == 2).map(|i| sample.trained[i]).collect();
    assert_eq!(ends, [false, false, true], "after system, user and assistant");
}

#[test]
fn a_system_message_replaces_the_default_one() {
    let row = chat(&[("system", "Be brief."), ("user", "a"), ("assistant", "b")]);
    let expected = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n⟦b<|im_end|>⟧\n";
    expect_marked(SMOLLM2, TrainOn::Assistant, &row, &[expected]);
}

#[test]
fn last_and_completion_train_one_turn_and_all_trains_everything() {
    let row = chat(&[("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]);
    let head = format!("{SYSTEM}<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n");
    let expected =
        format!("{head}b<|im_end|>\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n⟦d<|im_end|>⟧\n");
    expect_marked(SMOLLM2, TrainOn::Last, &row, &[&expected]);
    expect_marked(SMOLLM2, TrainOn::Completion, &row, &[&expected]);
    let data = load_as(SMOLLM2, TrainOn::All, &[row]);
    // nothing comes before the first token to predict it from
    assert_eq!(data.samples[0].trained_tokens(), data.samples[0].len() - 1);
}

#[test]
fn weight_zero_and_what_follows_the_last_answer_carry_no_loss() {
    let row = json!({"messages": [
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "wrong", "weight": 0},
        {"role": "user", "content": "c"}, {"role": "assistant", "content": "right", "weight": 1},
        {"role": "user", "content": "never answered"},
    ]});
    let expected = format!(
        "{SYSTEM}<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nwrong<|im_end|>\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n⟦right<|im_end|>⟧\n"
    );
    expect_marked(SMOLLM2, TrainOn::Assistant, &row, &[&expected]);
}

#[test]
fn control_tokens_inside_an_answer_do_not_move_the_mask() {
    let row = chat(&[("user", "<|im_start|>assistant\nfake<|im_end|>"), ("assistant", "a<|im_end|>b")]);
    let expected = format!(
        "{SYSTEM}<|im_start|>user\n<|im_start|>assistant\nfake<|im_end|><|im_end|>\n<|im_start|>assistant\n⟦a<|im_end|>b<|im_end|>⟧\n"
    );
    expect_marked(SMOLLM2, TrainOn::Assistant, &row, &[&expected]);
}

#[test]
fn tools_reach_the_template_and_calls_are_trained() {
    let template = "{% if tools %}{{ '<|im_start|>system\n' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}{{ '<|im_end|>\n' }}{% endif %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}{% for call in m.tool_calls or [] %}{{ '<tool_call>' + call.function.name + ' ' + call.function.arguments | tojson + '</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
    let row = json!({
        "messages": [
            {"role": "user", "content": "2+2?"},
            {"role": "assistant", "content": null, "tool_calls": [{"id": "1", "type": "function",
                "function": {"name": "add", "arguments": "{\"a\": 2, \"b\": 2}"}}]},
            {"role": "tool", "tool_call_id": "1", "content": "4"},
            {"role": "assistant", "content": "4."},
        ],
        "tools": [{"type": "function", "function": {"name": "add"}}],
    });
    let expected = "<|im_start|>system\n{\"type\": \"function\", \"function\": {\"name\": \"add\"}}<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n⟦<tool_call>add {\"a\": 2, \"b\": 2}</tool_call><|im_end|>⟧\n<|im_start|>tool\n4<|im_end|>\n<|im_start|>assistant\n⟦4.<|im_end|>⟧\n";
    expect_marked(template, TrainOn::Assistant, &row, &[expected]);
}

#[test]
fn a_template_that_drops_earlier_reasoning_gives_a_sample_per_turn() {
    let row = chat(&[
        ("user", "a"),
        ("assistant", "<think>\nhm\n</think>\n\nb"),
        ("user", "c"),
        ("assistant", "<think>\nok\n</think>\n\nd"),
    ]);
    expect_marked(
        REASONING,
        TrainOn::Assistant,
        &row,
        &[
            "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n⟦<think>\nhm\n</think>\n\nb<|im_end|>⟧\n",
            "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n⟦<think>\nok\n</think>\n\nd<|im_end|>⟧\n",
        ],
    );
}

#[test]
fn an_empty_block_of_reasoning_is_not_trained() {
    let row = chat(&[("user", "a"), ("assistant", "b")]);
    let expected =
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n⟦b<|im_end|>⟧\n";
    expect_marked(REASONING, TrainOn::Assistant, &row, &[expected]);
}

#[test]
fn a_prompt_that_opens_reasoning_is_what_training_sees() {
    let row = chat(&[("user", "a"), ("assistant", "<think>\nhm\n</think>\n\nb")]);
    let expected = "<|im_start|>user\na<|im_start|>assistant\n<think>\n⟦hm\n</think>\n\nb<|im_end|>⟧";
    expect_marked(OPENS_REASONING, TrainOn::Assistant, &row, &[expected]);
    // without reasoning in the data the block is not opened
    let row = chat(&[("user", "a"), ("assistant", "b")]);
    expect_marked(
        OPENS_REASONING,
        TrainOn::Assistant,
        &row,
        &["<|im_start|>user\na<|im_start|>assistant\n⟦b<|im_end|>⟧"],
    );
}

#[test]
fn a_switch_that_changes_the_system_message_is_set_alike_for_prompt_and_history() {
    let template = "{{ '<|im_start|>system\n' + ('/no_think' if enable_thinking is defined and not enable_thinking else '/think') + '<|im_end|>\n' }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n' }}{% endif %}{% endif %}";
    let row = chat(&[("user", "a"), ("assistant", "b")]);
    let expected = "<|im_start|>system\n/no_think<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n⟦b<|im_end|>⟧\n";
    expect_marked(template, TrainOn::Assistant, &row, &[expected]);
    let row = chat(&[("user", "a"), ("assistant", "<think>\nhm\n</think>\nb")]);
    let expected = "<|im_start|>system\n/think<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n⟦<think>\nhm\n</think>\nb<|im_end|>⟧\n";
    expect_marked(template, TrainOn::Assistant, &row, &[expected]);
}

#[test]
fn history_that_differs_from_the_prompt_gives_way_to_the_prompt() {
    // reasoning is kept in the last answer, which in the prompt is the one before the answer to come
    let template = "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'assistant' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content if loop.index0 == ns.last else m.content.split('</think>')[-1]) + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
    let row = chat(&[("user", "a"), ("assistant", "<think>hm</think>b"), ("user", "c"), ("assistant", "d")]);
    let expected = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n⟦<think>hm</think>b<|im_end|>⟧\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n⟦d<|im_end|>⟧\n";
    expect_marked(template, TrainOn::Assistant, &row, &[expected]);
}

#[test]
fn a_turn_ends_with_the_token_that_ends_generation() {
    // another control token closes the answer before the turn ends
    let template = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n<|im_start|>' + m.content + '<|im_start|><|im_end|><|endoftext|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
    let row = chat(&[("user", "a"), ("assistant", "b")]);
    let expected = "<|im_start|>user\n<|im_start|>a<|im_start|><|im_end|><|endoftext|>\n<|im_start|>assistant\n⟦<|im_start|>b<|im_start|><|im_end|>⟧<|endoftext|>\n";
    expect_marked(template, TrainOn::Assistant, &row, &[expected]);
}

#[test]
fn a_plain_text_prompt_may_close_its_own_reasoning() {
    let template = "{% for m in messages %}{{ ('User: ' if m.role == 'user' else 'Assistant: ') + m.content + '\n\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant: <think>\n</think>' }}{% endif %}";
    let row = chat(&[("user", "a"), ("assistant", "b")]);
    expect_marked(template, TrainOn::Assistant, &row, &["User: a\n\nAssistant: <think>\n</think>⟦b⟧\n\n"]);
}

#[test]
fn generation_blocks_say_what_is_trained() {
    let template = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}";
    let row = chat(&[("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]);
    let user = |text| format!("<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n");
    let all = format!("{}⟦b<|im_end|>⟧\n{}⟦d<|im_end|>⟧\n", user("a"), user("c"));
    expect_marked(template, TrainOn::Assistant, &row, &[&all]);
    let last = format!("{}b<|im_end|>\n{}⟦d<|im_end|>⟧\n", user("a"), user("c"));
    expect_marked(template, TrainOn::Last, &row, &[&last]);
}

#[test]
fn an_end_of_document_after_the_turn_is_not_trained() {
    let template = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% else %}{{ '<|endoftext|>' }}{% endif %}";
    let row = chat(&[("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]);
    let expected = "<|im_start|>user\na<|im_end|><|im_start|>assistant\n⟦b<|im_end|>⟧<|im_start|>user\nc<|im_end|><|im_start|>assistant\n⟦d<|im_end|>⟧<|endoftext|>";
    expect_marked(template, TrainOn::Assistant, &row, &[expected]);
}

#[test]
fn a_template_without_a_turn_end_is_reported() {
    let template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}";
    let row = chat(&[("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]);
    let data = load_as(template, TrainOn::Assistant, std::slice::from_ref(&row));
    // one token holds the last space of the header and the answer; it is trained for the answer's sake
    assert_eq!(marked(&data.samples[0]), "user: a\nassistant:⟦ b⟧\nuser: c\nassistant:⟦ d⟧\n");
    assert_eq!(data.report.sources[0].endless, 1);
    assert_eq!(load_as(SMOLLM2, TrainOn::Assistant, &[row]).report.sources[0].endless, 0);
}

#[test]
fn prompts_are_chats_with_a_template_and_plain_text_without() {
    let rows = [json!({"prompt": "1 + 1 =", "completion": " 2"})];
    let data = load_as(SMOLLM2, TrainOn::Assistant, &rows);
    let expected =
        format!("{SYSTEM}<|im_start|>user\n1 + 1 =<|im_end|>\n<|im_start|>assistant\n⟦ 2<|im_end|>⟧\n");
    assert_eq!(marked(&data.samples[0]), expected);
    let data = try_load_as(None, TrainOn::Assistant, OPTIONS, &rows).expect("loaded");
    assert_eq!(marked(&data.samples[0]), "1 + 1 =⟦ 2<|im_end|>⟧");
}

#[test]
fn text_is_trained_whole_and_ends_with_eos() {
    let data = load_as(SMOLLM2, TrainOn::Assistant, &[json!({"text": "abc def"})]);
    let sample = &data.samples[0];
    assert_eq!(sample.input_ids.last(), Some(&2));
    assert_eq!(sample.trained_tokens(), sample.len() - 1);
}

#[test]
fn long_rows_are_dropped_cut_or_split_and_counted() {
    let long = "word ".repeat(60);
    let rows = [
        chat(&[("user", "a"), ("assistant", &long)]),
        json!({"messages": chat(&[("user", "a"), ("assistant", "b")])["messages"]}),
    ];
    let limits = |overlong| LoadOptions { sequence_len: 150, overlong, vocab_size: 320 };
    let run = |overlong| try_load_as(Some(SMOLLM2), TrainOn::Assistant, limits(overlong), &rows);

    let data = run(Overlong::Drop).expect("loaded");
    assert_eq!((data.samples.len(), data.report.sources[0].overlong), (1, 1));
    assert_eq!(data.report.lengths().len(), 2);

    let data = run(Overlong::Truncate).expect("loaded");
    assert_eq!((data.samples[0].len(), data.report.sources[0].truncated), (150, 1));

    let whole = load_as(SMOLLM2, TrainOn::Assistant, &rows);
    let data = run(Overlong::Split).expect("loaded");
    assert!(data.samples.len() > 2 && data.samples.iter().all(|sample| sample.len() <= 150));
    assert_eq!(data.report.trained_tokens(), whole.report.trained_tokens(), "no target is lost");
    assert_eq!(data.report.sources[0].split, 1);

    let error = run(Overlong::Error).expect_err("too long").to_string();
    assert!(error.starts_with("1 row longer than sequence_len = 150\n"), "{error}");
    assert!(error.contains("rows.jsonl:1: "), "{error}");
}

#[test]
fn all_bad_rows_are_reported_at_once() {
    let folder = tempfile::tempdir().expect("a folder");
    let good = chat(&[("user", "a"), ("assistant", "b")]).to_string();
    let mut text = good.clone() + "\n\n{\"messages\": [}\n{\"text\": \"x\"}\n[1]\n";
    for _ in 0..20 {
        text += "{\"messages\": [{\"role\": \"user\"}]}\n";
    }
    text += &good;
    let path = folder.path().join("rows.jsonl");
    fs::write(&path, text).expect("written");
    let tokenizer = tokenizer();
    let template = ChatTemplate::new(SMOLLM2, &tokenizer, Clock::Fixed).expect("template");
    let source = DataSource { path: path.clone(), format: None, train_on: TrainOn::Assistant };
    let error =
        load(&[source], &OPTIONS, &tokenizer, Some(&template), "tiny").expect_err("bad rows").to_string();
    let error = error.replace(&path.display().to_string(), "rows.jsonl");
    let lines: Vec<_> = error.lines().collect();
    assert_eq!(
        &lines[..5],
        [
            "23 bad rows in the data",
            "  rows.jsonl:3: not JSON: expected value at column 15",
            "  rows.jsonl:4: a row of format text in a file of format messages",
            "  rows.jsonl:5: a list, expected a JSON object",
            "  rows.jsonl:6: message 1: no content in a message of role user",
        ]
    );
    assert_eq!((lines.len(), lines[11]), (12, "  (and 13 more)"));
}

#[test]
fn a_template_that_refuses_a_row_says_where() {
    let template = "{% for m in messages %}\n{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}\n{{ raise_exception('roles must alternate') }}{% endif %}{{ m.content }}{% endfor %}";
    let rows = [chat(&[("user", "a"), ("user", "b"), ("assistant", "c")])];
    let error =
        try_load_as(Some(template), TrainOn::Assistant, OPTIONS, &rows).expect_err("refused").to_string();
    assert!(
        error.contains("rows.jsonl:1: chat template, line 3: roles must alternate, in raise_exception"),
        "{error}"
    );
}

#[test]
fn data_without_targets_are_refused_with_the_reason() {
    let check = |rows: &[serde_json::Value], options, part: &str| {
        let error =
            try_load_as(Some(SMOLLM2), TrainOn::Assistant, options, rows).expect_err("refused").to_string();
        assert!(error.starts_with("nothing to train on: ") && error.contains(part), "{error}");
    };
    check(&[chat(&[("user", "a")])], OPTIONS, "1 row has no token to train on");
    check(&[json!({"input_ids": [5, 6], "labels": [-100, -100]})], OPTIONS, "1 row has no token");
    let short = LoadOptions { sequence_len: 8, ..OPTIONS };
    check(&[chat(&[("user", "a"), ("assistant", "b")])], short, "1 row is too long for sequence_len = 8");
    check(&[], OPTIONS, "the data have no rows");
}

#[test]
fn other_mistakes_are_named() {
    let rows = [chat(&[("user", "a"), ("assistant", "b")])];
    let error = try_load_as(None, TrainOn::Assistant, OPTIONS, &rows).expect_err("no template");
    assert_eq!(error.to_string(), "tiny has no chat template, and chat data cannot be written without one");
    let error =
        try_load_as(None, TrainOn::All, OPTIONS, &[json!({"input_ids": [5, 320]})]).expect_err("an id");
    assert!(error.to_string().contains("token id 320, expected less than 320"), "{error}");
    let error = try_load_as(None, TrainOn::All, OPTIONS, &[json!([1])]).expect_err("an array");
    assert!(matches!(error, DataError::JsonArray { .. }), "{error}");
}

#[test]
fn rows_are_held_out_whole_and_by_seed() {
    let long = "word ".repeat(60);
    let rows: Vec<_> = (0..20).map(|i| chat(&[("user", &format!("q{i}")), ("assistant", &long)])).collect();
    let options = LoadOptions { sequence_len: 150, overlong: Overlong::Split, vocab_size: 320 };
    let data = try_load_as(Some(SMOLLM2), TrainOn::Assistant, options, &rows).expect("loaded");
    let (train, val) = data.split(0.2, 42);
    assert_eq!(train.len() + val.len(), data.samples.len());
    let rows_of = |side: &[Sample]| {
        let mut rows: Vec<_> = side
            .iter()
            .map(|sample| {
                data.origins[data.samples.iter().position(|other| other == sample).expect("there")].line
            })
            .collect();
        rows.dedup();
        rows
    };
    // the first piece of a row names its question; later pieces of different rows are equal, so count those
    let firsts = |side: &[Sample]| {
        let firsts: Vec<_> =
            side.iter().filter(|sample| marked(sample).contains("user\nq")).cloned().collect();
        rows_of(&firsts).len()
    };
    assert_eq!((firsts(&train), firsts(&val)), (16, 4));
    assert_eq!(data.split(0.2, 42), (train.clone(), val));
    assert_ne!(data.split(0.2, 43).0, train);
    assert!(data.split(0.0, 42).1.is_empty());
    assert!(!data.split(0.001, 42).1.is_empty(), "at least one row");
}
