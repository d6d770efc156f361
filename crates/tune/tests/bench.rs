//! `tune bench` on a tiny model: what the reports say. How fast it was is not judged.

use std::fs;
use std::path::Path;

use assert_cmd::Command;
use serde_json::Value;

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/parity/models/llama-tied");

fn tune(folder: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::cargo_bin("tune").expect("the binary is built");
    command.args(arguments).current_dir(folder).env("NO_COLOR", "1");
    command
}

fn report(folder: &Path, arguments: &[&str]) -> Value {
    let output = tune(folder, arguments).output().expect("tune runs");
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "tune {arguments:?}: {complaint}");
    serde_json::from_slice(&output.stdout).expect("one JSON object")
}

fn number(report: &Value, field: &str) -> f64 {
    let number = report[field].as_f64().unwrap_or_else(|| panic!("no number {field} in {report}"));
    assert!(number.is_finite() && number > 0.0, "{field} is {number}");
    number
}

#[test]
fn training_is_measured_and_the_tokens_are_handed_on() {
    let folder = tempfile::tempdir().expect("temporary folder");
    let text = "one two three four five six seven eight nine ten\n".repeat(3);
    fs::write(folder.path().join("text.txt"), text).expect("text");
    let arguments = [
        "bench",
        "train",
        "--model",
        MODEL,
        "--method",
        "lora",
        "--batch",
        "2",
        "--seq",
        "16",
        "--steps",
        "4",
        "--warmup",
        "1",
        "--threads",
        "1",
        "--text",
        "text.txt",
        "--write-tokens",
        "tokens.json",
        "--json",
    ];
    let report = report(folder.path(), &arguments);
    for field in
        ["tokens_per_second", "flop_per_token", "gflops", "first_loss", "last_loss", "seconds_to_first_step"]
    {
        number(&report, field);
    }
    if cfg!(target_os = "linux") {
        number(&report, "tokens_per_cpu_second");
        number(&report, "peak_rss_bytes");
    }
    for (field, expected) in [("batch", 2), ("seq", 16), ("steps", 4), ("warmup", 1), ("threads", 1)] {
        assert_eq!(report[field], expected, "{field}");
    }
    assert_eq!((&report["engine"], &report["method"]), (&Value::from("tune"), &Value::from("lora")));
    assert_eq!(report["step_seconds"].as_array().map(Vec::len), Some(5));
    assert_ne!(report["first_loss"], report["last_loss"], "nothing was trained");
    assert!(report["machine"]["cores"].as_u64() >= Some(1));

    let tokens = fs::read(folder.path().join("tokens.json")).expect("tokens");
    let documents: Vec<Vec<u32>> = serde_json::from_slice(&tokens).expect("lists of ids");
    assert_eq!(documents.len(), 10, "two documents for each of five steps");
    assert!(documents.iter().all(|document| document.len() == 16));
}

#[test]
fn generation_is_measured_on_the_programs_own_source() {
    let folder = tempfile::tempdir().expect("temporary folder");
    let arguments = ["bench", "generate", "--model", MODEL, "--prompt-tokens", "20", "--new-tokens", "4"];
    let report = report(folder.path(), &[&arguments[..], &["--runs", "2", "--json"]].concat());
    number(&report, "prompt_tokens_per_second");
    number(&report, "decode_tokens_per_second");
    assert_eq!(report["new_tokens"], 4);

    let printed = tune(folder.path(), &arguments).output().expect("tune runs");
    let lines = String::from_utf8_lossy(&printed.stdout).into_owned();
    assert!(["machine", "prompt", "new"].iter().all(|word| lines.contains(word)), "{lines}");
}

#[test]
fn the_peak_of_the_machine_is_measured() {
    let report = report(Path::new("."), &["bench", "peak", "--json"]);
    let one = number(&report["f32"], "one_core_gflops");
    // The sum of all cores; even beside other programs it is above half of one core alone.
    assert!(number(&report["f32"], "all_cores_gflops") > 0.5 * one);
}

#[test]
fn what_cannot_be_measured_is_refused() {
    let folder = tempfile::tempdir().expect("temporary folder");
    let refused: [(&[&str], &str); 3] = [
        (&["train", "--model", MODEL, "--dtype", "f8"], "f8"),
        (&["train", "--model", MODEL, "--seq", "16", "--text", "absent.txt"], "absent.txt"),
        (&["generate", "--model", MODEL, "--prompt-tokens", "1000000"], "context"),
    ];
    for (arguments, word) in refused {
        let output = tune(folder.path(), &[&["bench"], arguments].concat()).output().expect("tune runs");
        let complaint = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {complaint}");
        assert!(complaint.contains(word), "{arguments:?}: {complaint}");
    }
}

#[test]
fn a_made_model_has_the_shape_that_was_asked_for_and_can_be_trained() {
    let folder = tempfile::tempdir().expect("temporary folder");
    let tiny =
        "bench make-model llama2:7b --layers 2 --d-model 128 --d-ff 256 --heads 2 --kv-heads 1 --vocab 300";
    let make = |options: &str| {
        let arguments: Vec<&str> = tiny.split(' ').chain(options.split(' ')).collect();
        tune(folder.path(), &arguments).output().expect("tune runs")
    };
    let made = make("--type q4_0 --out tiny.gguf");
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    assert_eq!(String::from_utf8_lossy(&made.stdout), "tiny.gguf\n");
    let train =
        ["bench", "train", "--model", "tiny.gguf", "--seq", "64", "--steps", "2", "--warmup", "1", "--json"];
    let report = report(folder.path(), &train);
    let loss = number(&report, "first_loss");
    assert!((loss - f64::from(300).ln()).abs() < 0.5, "loss {loss} of a model that knows nothing");

    // The tokenizer of another model decides the vocabulary.
    let tokenizer = format!("--tokenizer {MODEL} --out tokenized.gguf");
    let refused = make(&tokenizer);
    assert_eq!(refused.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("--vocab is 300"));
    for (options, complaint) in [
        ("--type q9 --out x.gguf", "unknown type"),
        ("--kv-heads 3 --out x.gguf", "cannot be used multiple times"),
    ] {
        let refused = make(options);
        assert_eq!(refused.status.code(), Some(2));
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(said.contains(complaint), "{said}");
    }
    assert_eq!(fs::read_dir(folder.path()).expect("listed").count(), 1, "only what was asked for");
}
