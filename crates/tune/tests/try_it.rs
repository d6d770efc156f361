//! The binary on a tiny model: train, interrupt, resume, generate, chat, eval. Real engines are in `e2e.rs`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use assert_cmd::cargo::CommandCargoExt;
use tempfile::TempDir;
use tune_formats::gguf::{GgufFile, GgufWriter, Metadata, TensorSpec};
use tune_formats::provenance::Provenance;
use tune_formats::safetensors::SafetensorsFiles;

fn model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/parity/models/llama-tied")
}

/// A folder with a recipe over the tiny model and rows for it.
fn workshop(steps: usize) -> TempDir {
    let folder = tempfile::tempdir().expect("temporary folder");
    let row = |n: usize| {
        let messages = serde_json::json!([
            {"role": "user", "content": format!("count from {n}")},
            {"role": "assistant", "content": format!("{n} {} {}", n + 1, n + 2)},
        ]);
        serde_json::json!({ "messages": messages }).to_string() + "\n"
    };
    fs::write(folder.path().join("rows.jsonl"), (0..40).map(row).collect::<String>()).expect("rows");
    let recipe = format!(
        "version = 1\n[model]\nbase = \"{}\"\n[adapter]\ntype = \"lora\"\nr = 4\n[[data]]\npath = \"rows.jsonl\"\n\
         [data_options]\nsequence_len = 256\n[train]\nmax_steps = {steps}\nmicro_batch_size = 1\n\
         effective_batch_size = 1\nlearning_rate = 5e-3\n[samples]\nmax_tokens = 4\nprompts = [\"count from 7\"]\n",
        model().display()
    );
    fs::write(folder.path().join("recipe.toml"), recipe).expect("recipe");
    folder
}

fn tune(folder: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::cargo_bin("tune").expect("the binary is built");
    command.args(arguments).current_dir(folder).env("NO_COLOR", "1").stdin(Stdio::null());
    command
}

fn run(folder: &Path, arguments: &[&str]) -> Output {
    let output = tune(folder, arguments).output().expect("tune runs");
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "tune {arguments:?}: {complaint}");
    output
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
#[cfg(unix)]
fn ctrl_c_saves_and_the_run_goes_on_from_its_run_toml() {
    let workshop = workshop(100_000);
    let folder = workshop.path();
    let metrics = folder.join("run/metrics.jsonl");
    let mut child = tune(folder, &["train", "recipe.toml", "--out", "run", "--quiet"])
        .stderr(Stdio::null())
        .spawn()
        .expect("tune starts");
    let patience = Instant::now() + Duration::from_mins(2);
    while fs::read_to_string(&metrics).map_or(0, |text| text.lines().count()) < 3 {
        assert!(Instant::now() < patience, "no step in two minutes");
        std::thread::sleep(Duration::from_millis(20));
    }
    let interrupt = Command::new("kill").args(["-INT", &child.id().to_string()]).status();
    assert!(interrupt.expect("kill runs").success());
    assert_eq!(child.wait().expect("tune ends").code(), Some(130));
    let taken = fs::read_to_string(&metrics).expect("metrics").lines().count();
    assert!(folder.join(format!("run/checkpoints/step-{taken:06}/state.json")).is_file());

    // Other settings are refused, and harm nothing.
    let other = tune(folder, &["train", "run/run.toml", "--set", "train.learning_rate=1e-4"]).output();
    assert_eq!(other.expect("tune runs").status.code(), Some(1));
    let mut child = tune(folder, &["train", "run/run.toml", "--json"])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("tune starts");
    let first = {
        use std::io::{BufRead, BufReader};
        let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
        let started: serde_json::Value =
            serde_json::from_str(&lines.next().expect("a line").expect("text")).expect("JSON");
        assert_eq!(started["resumed_from"], taken);
        let step = lines.next().expect("a line").expect("text");
        serde_json::from_str::<serde_json::Value>(&step).expect("JSON")
    };
    child.kill().expect("killed");
    child.wait().expect("tune ends");
    assert_eq!(first["step"], taken + 1);
}

#[test]
fn a_trained_run_generates_chats_and_evaluates() {
    let workshop = workshop(30);
    let folder = workshop.path();
    let printed = stdout(&run(folder, &["train", "recipe.toml", "--out", "run", "--quiet"]));
    for word in ["prompt", "before", "after", "count from 7"] {
        assert!(printed.contains(word), "no {word:?} in {printed:?}");
    }
    let loss = |model: &str| {
        let output = stdout(&run(folder, &["eval", model, "rows.jsonl", "--json"]));
        serde_json::from_str::<serde_json::Value>(&output).expect("JSON")["loss"].as_f64().expect("a number")
    };
    let (before, after) = (loss(&model().to_string_lossy()), loss("run"));
    assert!(after < before - 0.5, "loss on the rows: {before} before, {after} after");

    let generate = |seed| {
        let arguments = ["generate", "run", "-p", "count from 3", "-n", "8", "-t", "1", "--seed", seed];
        stdout(&run(folder, &arguments))
    };
    assert_eq!(generate("1"), generate("1"));
    assert_ne!(generate("1"), generate("2"));

    fs::write(folder.join("said.txt"), "count from 1\n/clear\ncount from 2\n").expect("written");
    let said = fs::File::open(folder.join("said.txt")).expect("readable");
    let chat = tune(folder, &["chat", "run", "-n", "6"]).stdin(said).output().expect("tune runs");
    assert!(chat.status.success());
    assert_eq!(stdout(&chat).lines().count(), 2, "one answer a line");
}

#[test]
fn a_finished_run_is_kept_when_it_is_trained_afresh() {
    let workshop = workshop(3);
    let folder = workshop.path();
    let adapter =
        |run: &str| fs::read(folder.join(run).join("adapter/adapter_model.safetensors")).expect("adapter");
    run(folder, &["train", "recipe.toml", "--out", "run", "--quiet"]);
    let first = adapter("run");
    let again =
        ["train", "recipe.toml", "--out", "run", "--quiet", "--resume", "never", "--set", "train.seed=7"];
    run(folder, &again);
    assert!(adapter("run.old-1") == first && adapter("run") != first);

    // Without checkpoints there is nothing to go on from, and still something to keep.
    fs::remove_dir_all(folder.join("run/checkpoints")).expect("removed");
    let second = adapter("run");
    run(folder, &["train", "recipe.toml", "--out", "run", "--quiet"]);
    assert!(adapter("run.old-2") == second);
}

#[test]
fn going_on_from_an_earlier_checkpoint_makes_it_the_newest() {
    let workshop = workshop(6);
    let folder = workshop.path();
    run(folder, &["train", "recipe.toml", "--out", "run", "--quiet", "--set", "checkpoint.save_steps=2"]);
    let early = folder.join("early");
    fs::rename(folder.join("run/checkpoints/step-000004"), &early).expect("moved");
    let early = early.to_string_lossy();
    let from_early = ["train", "recipe.toml", "--out", "run", "--quiet", "--resume", &early];
    run(folder, &from_early);
    let kept: Vec<_> = fs::read_dir(folder.join("run/checkpoints"))
        .expect("checkpoints")
        .map(|entry| entry.expect("entry").file_name().to_string_lossy().into_owned())
        .collect();
    assert!(
        kept.contains(&"step-000006".to_string()) && kept.contains(&"step-000006.old".to_string()),
        "{kept:?}"
    );
}

#[test]
fn a_run_of_all_weights_generates_and_is_exported() {
    let workshop = workshop(30);
    let folder = workshop.path();
    let full = ["--set", "adapter.type=full", "--set", "train.learning_rate=1e-3"];
    let train = [&["train", "recipe.toml", "--out", "run", "--quiet"], &full[..]].concat();
    let printed = stdout(&run(folder, &train));
    assert!(printed.contains("after"), "{printed}");
    let loss = |model: &str| {
        let output = stdout(&run(folder, &["eval", model, "rows.jsonl", "--json"]));
        serde_json::from_str::<serde_json::Value>(&output).expect("JSON")["loss"].as_f64().expect("a number")
    };
    let (before, after) = (loss(&model().to_string_lossy()), loss("run"));
    assert!(after < before - 0.5, "loss on the rows: {before} before, {after} after");

    // What was trained lies in the run as a model of its own, and every copy of it says the same.
    let answer = |model: &str| stdout(&run(folder, &["generate", model, "-p", "count from 3", "-n", "8"]));
    assert_eq!(answer("run/model"), answer("run"));
    for (target, out) in [("safetensors", "copy"), ("gguf:f32", "copy.gguf")] {
        let told = run(folder, &["export", "run", "--to", target, "--out", out]);
        assert!(!String::from_utf8_lossy(&told.stderr).contains("other weights"), "{target}: {told:?}");
        assert_eq!(answer(out), answer("run"), "{target}");
        assert!((loss(out) - after).abs() < 1e-6, "{target}: {} and {after}", loss(out));
    }

    // All three say what they come from, as adapters do.
    let safetensors = |folder: &Path| {
        let files = SafetensorsFiles::open_directory(folder).expect("safetensors");
        Provenance::read(|key| files.metadata().get(key).cloned())
    };
    let gguf = GgufFile::open(&folder.join("copy.gguf")).expect("a GGUF file");
    let of_gguf = Provenance::read(|key| gguf.metadata().string(key).map(str::to_owned));
    let base = tune_formats::open(&model()).expect("the base");
    assert_eq!(of_gguf.base_digest, Some(base.digest().expect("a digest")));
    assert!(
        of_gguf.recipe.as_deref().is_some_and(|recipe| recipe.contains("train.learning_rate")),
        "{of_gguf:?}"
    );
    assert!(of_gguf.data_digest.is_some() && of_gguf.version.is_some(), "{of_gguf:?}");
    assert_eq!(safetensors(&folder.join("run/model")), of_gguf);
    assert_eq!(safetensors(&folder.join("copy")), of_gguf);

    for adapter in ["gguf-lora", "peft"] {
        let refused = tune(folder, &["export", "run", "--to", adapter]).output().expect("tune runs");
        assert_eq!(refused.status.code(), Some(2));
        assert!(String::from_utf8_lossy(&refused.stderr).contains("gguf:f16"), "no way out");
    }
    // The base of the recipe was replaced by another of its shapes.
    let other = folder.join("other");
    fs::create_dir(&other).expect("a folder");
    for entry in fs::read_dir(model()).expect("the base").flatten() {
        fs::copy(entry.path(), other.join(entry.file_name())).expect("copied");
    }
    let weights = other.join("model.safetensors");
    let mut bytes = fs::read(&weights).expect("weights");
    let start = bytes.len() / 2;
    bytes[start..].iter_mut().step_by(4).for_each(|lowest| *lowest ^= 1);
    fs::write(&weights, bytes).expect("written");
    let recipe = fs::read_to_string(folder.join("run/run.toml")).expect("the run's recipe");
    let (named, replaced) = (model().display().to_string(), other.display().to_string());
    assert!(recipe.contains(&named), "{recipe}");
    fs::write(folder.join("run/run.toml"), recipe.replace(&named, &replaced)).expect("written");
    let commands: [&[&str]; 3] = [
        &["export", "run", "--to", "gguf:f16"],
        &["generate", "run", "-p", "count", "-n", "1"],
        &["eval", "run", "rows.jsonl"],
    ];
    for command in commands {
        let refused = tune(folder, command).output().expect("tune runs");
        let told = String::from_utf8_lossy(&refused.stderr);
        assert!(
            !refused.status.success() && told.contains("run was trained on other weights"),
            "{command:?}: {told}"
        );
        run(folder, &[command, &["--any-base"]].concat());
    }
    fs::write(folder.join("run/run.toml"), recipe).expect("written");

    // Over a base whose tokenizer fits no tokenizer.json the run has none, and needs none.
    fs::remove_file(folder.join("run/model/tokenizer.json")).expect("it was there");
    assert_eq!(answer("run"), answer("copy"));

    let nf4 = [&["train", "recipe.toml", "--set", "model.quantization=nf4"], &full[..]].concat();
    assert_eq!(tune(folder, &nf4).output().expect("tune runs").status.code(), Some(2));
}

/// The same GGUF file with other metadata and other bytes.
fn tampered(
    original: &Path,
    copy: &Path,
    metadata: impl Fn(&mut Metadata),
    change: impl Fn(&str, &mut Vec<u8>),
) {
    let file = GgufFile::open(original).expect("a GGUF file");
    let mut keys = file.metadata().clone();
    metadata(&mut keys);
    let spec = |t: &tune_formats::gguf::TensorInfo| TensorSpec {
        name: t.name.clone(),
        dims: t.dims.clone(),
        block_type: t.block_type,
    };
    let specs = file.tensors().iter().map(spec).collect();
    let mut writer = GgufWriter::create(copy, &keys, specs).expect("begun");
    for tensor in file.tensors() {
        let mut bytes = file.data(tensor).expect("bytes").to_vec();
        change(&tensor.name, &mut bytes);
        writer.write(&tensor.name, &bytes).expect("written");
    }
    writer.finish().expect("finished");
}

/// Two bytes of a half, 8 % larger.
fn scale_halves(bytes: &mut [u8]) {
    for half in bytes.as_chunks_mut::<2>().0 {
        // a half is nearly linear in its bits: 1/16 of a binade on top
        let bits = u16::from_le_bytes(*half);
        *half = (bits + if bits & 0x7C00 == 0 { 0 } else { 0x0040 }).to_le_bytes();
    }
}

#[test]
fn exports_are_held_against_the_trained_model() {
    let workshop = workshop(30);
    let folder = workshop.path();
    run(folder, &["train", "recipe.toml", "--out", "run", "--quiet", "--set", "data_options.val_split=0.2"]);
    let verify = |artefact: &str, more: &[&str]| {
        let arguments = [&["verify", artefact, "--run", "run", "--json"], more].concat();
        let output = tune(folder, &arguments).output().expect("tune runs");
        let proof: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        let problems = proof["problems"].as_array().cloned().unwrap_or_default();
        let problems: Vec<String> =
            problems.iter().map(|p| p.as_str().unwrap_or_default().to_owned()).collect();
        (output.status.code(), proof, problems, String::from_utf8_lossy(&output.stderr).into_owned())
    };

    // Every kind of artefact, healthy.
    for (target, out, most) in [
        ("gguf-lora", "a.gguf", 1e-6),
        ("peft", "adapter", 1e-6),
        ("gguf:f16", "m.gguf", 1e-4),
        ("gguf:q8_0", "q8.gguf", 1e-2),
        ("safetensors", "merged", 1e-6),
    ] {
        let told = run(folder, &["export", "run", "--to", target, "--out", out]);
        let told = String::from_utf8_lossy(&told.stderr).into_owned();
        assert!(
            told.contains("rows that the run held out") && told.contains("retention"),
            "{target}: {told}"
        );
        let (code, proof, problems, _) = verify(out, &[]);
        assert_eq!((code, problems), (Some(0), vec![]), "{target}: {proof}");
        assert!(proof["mean_kl"].as_f64().expect("a number") <= most, "{target}: {proof}");
        let retention = proof["retention"].as_f64().expect("training has helped");
        assert!((retention - 1.0).abs() < 0.05, "{target}: {proof}");
        let [base, trained] =
            ["perplexity_base", "perplexity_trained"].map(|key| proof[key].as_f64().expect("one"));
        assert!(trained < base && proof["tokens"].as_u64() > Some(20), "{target}: {proof}");
    }

    // One tensor scaled by a few percent.
    let q_proj = |name: &str, bytes: &mut Vec<u8>| {
        if name == "blk.0.ffn_down.weight" {
            scale_halves(bytes);
        }
    };
    tampered(&folder.join("m.gguf"), &folder.join("scaled.gguf"), |_| (), q_proj);
    let (code, _, problems, _) = verify("scaled.gguf", &[]);
    assert_eq!(code, Some(5), "{problems:?}");
    assert!(problems[0].starts_with("model.layers.0.mlp.down_proj.weight (F16): "), "{problems:?}");
    assert!(problems[0].contains("at most 0.20 %"), "the limit is named: {problems:?}");

    // Another template.
    let template = |metadata: &mut Metadata| metadata.set("tokenizer.chat_template", "{{ messages }}".into());
    tampered(&folder.join("m.gguf"), &folder.join("template.gguf"), template, |_, _| ());
    let (code, _, problems, _) = verify("template.gguf", &[]);
    assert_eq!((code, problems), (Some(5), vec!["the chat template is not the one of training".to_owned()]));

    // An adapter of which one half is wrong.
    let lora_b = |name: &str, bytes: &mut Vec<u8>| {
        if name == "blk.0.attn_q.weight.lora_b" {
            bytes.fill(0);
        }
    };
    tampered(&folder.join("a.gguf"), &folder.join("half.gguf"), |_| (), lora_b);
    let (code, _, problems, _) = verify("half.gguf", &[]);
    assert!(code == Some(5) && problems[0].starts_with("mean KL"), "{problems:?}");

    // What loses more than is asked for is refused, before it gets its name, and the way out is named.
    let coarse = ["export", "run", "--to", "gguf:q2_k", "--merge", "refit", "--out", "coarse.gguf"];
    let refused =
        tune(folder, &[&coarse[..], &["--min-retention", "5"]].concat()).output().expect("tune runs");
    let told = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(5), "{told}");
    for word in ["gguf:q2_k loses too much", "gguf-lora", "gguf:q8_0", "--min-retention 0"] {
        assert!(told.contains(word), "no {word:?} in {told}");
    }
    assert!(!folder.join("coarse.gguf").exists());
    run(folder, &[&coarse[..], &["--min-retention", "-9", "--verify", "warn"]].concat());
    assert!(folder.join("coarse.gguf").exists());
}

#[test]
fn without_rows_held_out_a_text_serves_and_says_so() {
    let workshop = workshop(2);
    let folder = workshop.path();
    run(folder, &["train", "recipe.toml", "--out", "run", "--quiet", "--set", "data_options.val_split=0"]);
    let told = run(folder, &["export", "run", "--to", "gguf-lora"]);
    let told = String::from_utf8_lossy(&told.stderr).into_owned();
    assert!(told.contains("a text of tune's own"), "{told}");
    // the run is found above the file
    let file = fs::read_dir(folder.join("run/export")).expect("exports").flatten();
    let file = file.map(|entry| entry.path()).find(|path| path.to_string_lossy().ends_with(".lora.gguf"));
    run(folder, &["verify", &file.expect("an adapter").to_string_lossy()]);
    let alone = folder.join("alone.gguf");
    fs::write(&alone, "x").expect("written");
    let refused = tune(folder, &["verify", &alone.to_string_lossy()]).output().expect("tune runs");
    assert_eq!(refused.status.code(), Some(2));
}
