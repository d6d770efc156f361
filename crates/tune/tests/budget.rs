//! A memory budget from end to end, over the tiny fixture model: measured constants, the gate, and the run that is held
//! to its budget.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Output;

use assert_cmd::Command;
use serde_json::Value;

fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/parity/models/llama-tied")
}

struct Place(tempfile::TempDir);

impl Place {
    fn tune(&self, args: &[&str]) -> Output {
        let mut command = Command::cargo_bin("tune").expect("built");
        command.current_dir(self.0.path()).env("TUNE_CACHE", self.0.path().join("cache"));
        command.env("HOME", self.0.path()).args(args).output().expect("runs")
    }

    fn train(&self, name: &str, memory: &[&str]) -> Output {
        let out = format!("run.out={name}");
        let mut args = vec!["train", "recipe.toml", "--set", &out];
        for value in memory {
            args.extend(["--set", value]);
        }
        self.tune(&args)
    }

    fn json(&self, path: &str) -> Value {
        serde_json::from_slice(&fs::read(self.0.path().join(path)).expect("there")).expect("JSON")
    }
}

/// Rows of 96 tokens, all of the same length: every micro-batch is the largest.
fn place() -> Place {
    let dir = tempfile::tempdir().expect("temporary folder");
    let row = |n: usize| {
        let ids: Vec<usize> = (0..96).map(|i| 10 + (n * 7 + i * 3) % 300).collect();
        format!("{{\"input_ids\": {ids:?}, \"labels\": {ids:?}}}\n")
    };
    fs::write(dir.path().join("rows.jsonl"), (0..8).map(row).collect::<String>()).expect("written");
    let recipe = format!(
        "version = 1\n[model]\nbase = \"{}\"\n[adapter]\ntype = \"lora\"\nr = 4\n[[data]]\npath = \"rows.jsonl\"\n\
         format = \"input-ids\"\ntrain_on = \"all\"\n[data_options]\nsequence_len = 96\nval_split = 0.0\n[train]\n\
         max_steps = 3\nmicro_batch_size = 1\neffective_batch_size = 2\n",
        fixture().display()
    );
    fs::write(dir.path().join("recipe.toml"), recipe).expect("written");
    Place(dir)
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
#[cfg(target_os = "linux")]
fn a_budget_just_below_is_refused_and_one_just_above_is_kept() {
    let place = place();
    let model = fixture();
    let measured = place.tune(&["bench", "memory", "--model", model.to_str().expect("UTF-8"), "--json"]);
    assert!(measured.status.success(), "{}", stderr(&measured));
    let report: Value = serde_json::from_slice(&measured.stdout).expect("JSON");
    let blocks = |run: &Value| run["blocks"].as_u64();
    let blocks: Vec<_> = report["runs"].as_array().expect("runs").iter().filter_map(blocks).collect();
    assert_eq!(blocks, [2, 2, 4, 4]);
    assert_eq!(place.json("cache/memory.json")["constants"], report["constants"]);

    let free = place.train("free", &[]);
    assert!(free.status.success(), "{}", stderr(&free));
    let plan = place.json("free/plan.json");
    assert!(plan.to_string().contains("measured on this machine"), "{plan}");
    let (peak, upper) = (&plan["estimate"]["peak_bytes"], &plan["estimate"]["upper_bytes"]);
    let (peak, upper) = (peak.as_u64().expect("peak"), upper.as_u64().expect("upper end"));

    let below = place.train("below", &[&format!("memory.budget={}", peak - 1)]);
    assert_eq!(below.status.code(), Some(3), "{}", stderr(&below));
    assert!(!place.0.path().join("below/metrics.jsonl").exists(), "it has trained");

    let above = place.train("above", &[&format!("memory.budget={upper}")]);
    assert!(above.status.success(), "{}", stderr(&above));
    let used = place.json("above/plan.json")["measured"]["peak_bytes"].as_u64().expect("measured");
    assert!(used <= upper, "{used} bytes of {upper}");

    // Constants that claim too little: the run starts, is found out, stops, and goes on once it may use more.
    let stored = place.0.path().join("cache/memory.json");
    let mut wrong = place.json("cache/memory.json");
    wrong["constants"]["process_bytes"] = 1_000_000.into();
    fs::write(&stored, wrong.to_string()).expect("written");
    let budget = format!("memory.budget={}", used / 2);
    let beyond = place.train("beyond", &[&budget]);
    assert_eq!(beyond.status.code(), Some(3), "{}", stderr(&beyond));
    let said = stderr(&beyond);
    for part in ["more than the", "it may use", "were planned", "memory.budget from"] {
        assert!(said.contains(part), "no {part:?} in {said}");
    }
    let warned = place.train("beyond", &[&budget, "memory.on_exceed=warn"]);
    assert!(warned.status.success(), "{}", stderr(&warned));
    assert!(stderr(&warned).contains("are resident, and the run may use"), "{}", stderr(&warned));
}

#[test]
fn the_disk_of_a_plan_is_what_a_run_writes() {
    let place = place();
    for optimizer in ["adamw", "adamw_8bit"] {
        let set = ["adapter.r=64".to_owned(), format!("train.optimizer=\"{optimizer}\"")];
        let planned = place.tune(&[
            "plan",
            "recipe.toml",
            "--json",
            "--set",
            set[0].as_str(),
            "--set",
            set[1].as_str(),
        ]);
        assert!(planned.status.success(), "{}", stderr(&planned));
        let plan: Value = serde_json::from_slice(&planned.stdout).expect("JSON");
        let term = |name: &str| {
            let disk = plan["disk"].as_array().expect("disk terms");
            let term = disk.iter().find(|term| term["name"] == name).expect("a term of this name");
            term["bytes"].as_u64().expect("bytes")
        };
        let set: Vec<&str> = set.iter().map(String::as_str).collect();
        let run = place.train(optimizer, &set);
        assert!(run.status.success(), "{}", stderr(&run));
        // tensors to the byte; beside them the names of tensors and a few settings
        let small_files = 64 << 10;
        for (term, folder) in [(term("checkpoints"), "checkpoints"), (term("adapter folder"), "adapter")] {
            let bytes = bytes_in(&place.0.path().join(optimizer).join(folder));
            assert!(bytes <= term && term - bytes < small_files, "{folder}: {bytes} of {term}");
            assert!(term > 4 * small_files, "too small to tell");
        }
    }
}

/// Bytes of all files in a folder.
fn bytes_in(folder: &Path) -> u64 {
    let entries = fs::read_dir(folder).expect("a folder").map(|entry| entry.expect("an entry").path());
    entries
        .map(|path| if path.is_dir() { bytes_in(&path) } else { path.metadata().expect("a file").len() })
        .sum()
}
