//! What a user reads, and which exit code a script gets, when something is wrong. And `tune plan`, whole.
//!
//! Every command runs without network, without pip, in an empty home, and in a folder of its own that snapshots
//! call `[TMP]`.

use std::fs;
use std::path::{Path, PathBuf};

use assert_cmd::Command;
use tempfile::TempDir;

/// A recipe over a tiny model that the repository holds.
const RECIPE: &str = r#"
[model]
base = "[MODELS]/llama-tied"
[adapter]
type = "lora"
r = 2
[[data]]
path = "rows.jsonl"
format = "text"
[data_options]
sequence_len = 64
val_split = 0
[train]
max_steps = 1
"#;

const ROWS: &str = "{\"text\": \"a first row of text\"}\n{\"text\": \"and a second one\"}\n";

struct Bench {
    folder: TempDir,
}

impl Bench {
    fn new() -> Self {
        Self { folder: tempfile::tempdir().expect("temporary folder") }
    }

    /// A folder with the recipe, changed, and its rows.
    fn with_recipe(change: impl Fn(String) -> String) -> Self {
        let bench = Self::new();
        bench
            .write("recipe.toml", change(RECIPE.replace("[MODELS]", &models().to_string_lossy())).as_bytes());
        bench.write("rows.jsonl", ROWS.as_bytes());
        bench
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn write(&self, name: &str, content: &[u8]) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().expect("a folder")).expect("folder is made");
        fs::write(path, content).expect("file is written");
    }

    /// Runs `tune` and gives its exit code with what it wrote, in the form of a snapshot.
    fn run(&self, args: &[&str]) -> String {
        self.run_in_columns("", args)
    }

    /// The same in a terminal of so many columns.
    fn run_in_columns(&self, columns: &str, args: &[&str]) -> String {
        let mut command = Command::cargo_bin("tune").expect("the binary is built");
        let output = command
            .args(args)
            .current_dir(self.folder.path())
            .env_clear()
            .env("HOME", self.folder.path())
            .env("PATH", self.path("no-programs"))
            .env("HF_ENDPOINT", "http://127.0.0.1:9")
            .env("NO_COLOR", "1")
            .env("COLUMNS", columns)
            .env("TUNE_CPU", "avx2") // plans differ by what the processor multiplies
            .env("RAYON_NUM_THREADS", "2") // and by how many threads have buffers
            .output()
            .expect("tune runs");
        let code = output.status.code().map_or_else(|| "a signal".to_owned(), |code| code.to_string());
        let stdout = String::from_utf8_lossy(&output.stdout);
        let stderr = String::from_utf8_lossy(&output.stderr);
        let text = format!("exit {code}\n---- stdout\n{stdout}---- stderr\n{stderr}");
        text.replace(&*self.folder.path().to_string_lossy(), "[TMP]")
            .replace(&*models().to_string_lossy(), "[MODELS]")
            .lines()
            .map(|line| format!("{}\n", line.trim_end()))
            .collect()
    }
}

fn models() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().expect("repository");
    root.join("tests/parity/models")
}

/// A GGUF file with one metadata entry and no tensors.
fn gguf(architecture: &str) -> Vec<u8> {
    const STRING: u32 = 8;
    let mut bytes = b"GGUF".to_vec();
    bytes.extend(3u32.to_le_bytes());
    bytes.extend([0u64, 1].map(u64::to_le_bytes).concat()); // tensors, metadata entries
    for (text, kind) in [("general.architecture", Some(STRING)), (architecture, None)] {
        bytes.extend((text.len() as u64).to_le_bytes());
        bytes.extend(text.as_bytes());
        bytes.extend(kind.map_or(Vec::new(), |kind| kind.to_le_bytes().into()));
    }
    bytes
}

// Models.

#[test]
fn a_missing_model_file() {
    insta::assert_snapshot!(Bench::new().run(&["generate", "./no-such.gguf", "--prompt", "x"]));
}

#[test]
fn a_mistyped_model_name() {
    insta::assert_snapshot!(Bench::new().run(&["pull", "smolm2:135m"]));
}

#[test]
fn a_file_that_is_no_gguf() {
    let bench = Bench::new();
    bench.write("model.gguf", b"<!DOCTYPE html><html>not found</html>");
    insta::assert_snapshot!(bench.run(&["plan", "--model", "./model.gguf"]));
}

#[test]
fn a_truncated_gguf() {
    let bench = Bench::new();
    let whole = gguf("llama");
    bench.write("model.gguf", &whole[..whole.len() - 3]);
    insta::assert_snapshot!(bench.run(&["plan", "--model", "./model.gguf"]));
}

#[test]
fn an_unknown_architecture() {
    let bench = Bench::new();
    bench.write("model.gguf", &gguf("mamba"));
    insta::assert_snapshot!(bench.run(&["plan", "--model", "./model.gguf"]));
}

#[test]
fn no_network_and_no_pip() {
    insta::assert_snapshot!(Bench::new().run(&["pull", "smollm2:135m"]));
}

#[test]
fn an_adapter_of_another_base() {
    let adapter = models().join("../peft/plain/final");
    let other = models().join("llama-untied-bf16-sharded");
    let args =
        ["generate", &other.to_string_lossy(), "--adapter", &adapter.to_string_lossy(), "--prompt", "x"];
    insta::assert_snapshot!(Bench::new().run(&args));
}

// Recipes.

#[test]
fn a_missing_recipe() {
    insta::assert_snapshot!(Bench::new().run(&["train", "no-such.toml"]));
}

#[test]
fn a_mistyped_key() {
    let bench = Bench::with_recipe(|recipe| recipe.replace("max_steps", "max_step"));
    insta::assert_snapshot!(bench.run(&["train", "recipe.toml"]));
}

#[test]
fn a_mistyped_override() {
    let bench = Bench::with_recipe(|recipe| recipe);
    insta::assert_snapshot!(bench.run(&["train", "recipe.toml", "--set", "train.learning_rte=1e-4"]));
}

#[test]
fn an_argument_that_does_not_exist() {
    insta::assert_snapshot!(Bench::new().run(&["train", "recipe.toml", "--epochs", "3"]));
}

// Data.

#[test]
fn a_missing_data_file() {
    let bench = Bench::with_recipe(|recipe| recipe.replace("rows.jsonl", "no-such.jsonl"));
    insta::assert_snapshot!(bench.run(&["train", "recipe.toml"]));
}

#[test]
fn bad_rows_are_listed_up_to_ten_and_counted() {
    let bench = Bench::with_recipe(|recipe| recipe);
    let rows: String = (0..14)
        .map(|i| match i % 3 {
            0 => "{\"text\": 7}\n",
            1 => "{\"text\": \"cut off\n",
            _ => "{\"text\": \"a good one\"}\n",
        })
        .chain(["[]\n"; 4])
        .collect();
    bench.write("rows.jsonl", rows.as_bytes());
    insta::assert_snapshot!(bench.run(&["data", "recipe.toml"]));
}

#[test]
fn rows_of_no_known_format() {
    let bench = Bench::with_recipe(|recipe| recipe.replace("format = \"text\"\n", ""));
    bench.write("rows.jsonl", b"{\"question\": \"why?\", \"answer\": \"so\"}\n");
    insta::assert_snapshot!(bench.run(&["data", "recipe.toml"]));
}

#[test]
fn a_chat_template_that_fails() {
    let bench = Bench::with_recipe(|recipe| {
        recipe
            .replace("format = \"text\"\n", "")
            .replace(&*models().join("llama-tied").to_string_lossy(), "./model")
    });
    for file in fs::read_dir(models().join("llama-tied")).expect("model folder") {
        let file = file.expect("entry");
        bench.write(
            &format!("model/{}", file.file_name().to_string_lossy()),
            &fs::read(file.path()).expect("readable"),
        );
    }
    let template =
        "{% for message in messages %}\n{{ raise_exception('roles must alternate') }}\n{% endfor %}";
    bench.write("model/chat_template.jinja", template.as_bytes());
    let row = r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}"#;
    bench.write("rows.jsonl", row.as_bytes());
    insta::assert_snapshot!(bench.run(&["train", "recipe.toml"]));
}

// Running.

#[test]
fn a_run_that_does_not_fit() {
    let bench = Bench::with_recipe(|recipe| recipe + "[memory]\nbudget = \"20 MB\"\n");
    let text = bench.run(&["train", "recipe.toml"]);
    assert!(text.starts_with("exit 3\n"), "{text}");
    assert!(text.contains("may use"), "{text}");
    assert!(!bench.path("runs").exists(), "a refused run leaves nothing behind");
}

#[test]
#[cfg(target_os = "linux")]
fn no_space_left() {
    let bench = Bench::with_recipe(|recipe| recipe);
    fs::create_dir(bench.path("out")).expect("folder");
    // Where run.toml is written before it gets its name.
    std::os::unix::fs::symlink("/dev/full", bench.path("out/run.partial")).expect("link");
    let text = bench.run(&["train", "recipe.toml", "--out", "out", "--quiet"]);
    assert!(!bench.path("out/run.toml").exists(), "a half-written run.toml");
    insta::assert_snapshot!(text);
}

#[test]
fn an_export_of_a_run_that_is_not_finished() {
    let bench = Bench::with_recipe(|recipe| recipe);
    bench.write("runs/x/run.toml", &fs::read(bench.path("recipe.toml")).expect("recipe"));
    insta::assert_snapshot!(bench.run(&["export", "runs/x", "--to", "gguf-lora", "--out", "x.gguf"]));
}

#[test]
fn an_export_format_that_does_not_exist() {
    insta::assert_snapshot!(Bench::new().run(&["export", "runs/x", "--to", "gguf:q3_z", "--out", "x.gguf"]));
}

// Plans.

#[test]
fn the_plan_of_a_size_is_the_rule_of_thumb() {
    insta::assert_snapshot!(
        Bench::new().run(&["plan", "--model", "7b", "--method", "qlora", "--device", "8GB"])
    );
}

#[test]
fn the_plan_of_a_size_in_json() {
    let args = ["plan", "--model", "70b", "--method", "lora", "--device", "24GiB", "--json"];
    insta::assert_snapshot!(Bench::new().run(&args));
}

#[test]
fn a_size_without_a_device_decides_nothing() {
    let text = Bench::new().run(&["plan", "--model", "110b", "--method", "full", "--json"]);
    assert!(text.starts_with("exit 0\n"), "{text}");
    assert!(text.contains("\"gb\": 1056"), "{text}");
}

#[test]
fn the_plan_of_a_published_model() {
    insta::assert_snapshot!(
        Bench::new().run(&["plan", "--model", "qwen3:8b", "--seq", "1024", "--device", "8GiB"])
    );
}

#[test]
fn the_plan_of_a_recipe() {
    let bench = Bench::with_recipe(|recipe| recipe);
    insta::assert_snapshot!(bench.run(&["plan", "recipe.toml", "--set", "adapter.r=4", "--device", "1GB"]));
}

#[test]
fn a_plan_of_nothing() {
    insta::assert_snapshot!(Bench::new().run(&["plan"]));
}

#[test]
fn a_plan_for_no_device() {
    insta::assert_snapshot!(Bench::new().run(&["plan", "--model", "7b", "--device", "big"]));
}

#[test]
fn the_plan_of_a_model_that_is_not_here() {
    insta::assert_snapshot!(Bench::new().run(&["plan", "--model", "hf:somebody/something"]));
}

#[test]
fn the_plan_of_a_model_that_only_runs() {
    let options = ["--quant", "q4", "--context", "8192", "--users", "2", "--kv-cache", "fp8"];
    let model = ["plan", "--model", "llama3.1:8b", "--method", "inference", "--device", "8GiB"];
    let text = Bench::new().run(&[&model[..], &options[..]].concat());
    assert!(text.starts_with("exit 0\n"), "{text}");
    // The founding formulas, and the count beside them.
    assert!(text.contains("4.82 GB   1.2 · 4 bits · 8.03 billion"), "{text}");
    assert!(text.contains("1.07 GB   2 · 2 · 8192 · 32 · 8 · 128 · 1 bytes"), "{text}");
    assert!(text.contains("4.91 GB   8.03 billion × 4.8944 bits, as files of q4_k_m have"), "{text}");
    assert!(text.contains("may use     8.59 GB: fits"), "{text}");
}

#[test]
fn a_model_that_does_not_even_run() {
    let args = ["plan", "--model", "llama2:70b", "--method", "inference", "--device", "rtx4060", "--json"];
    let text = Bench::new().run(&args);
    assert!(text.starts_with("exit 3\n"), "{text}");
    assert!(text.contains("\"fits\": false") && text.contains("\"method\": \"inference\""), "{text}");
}

#[test]
fn a_file_that_only_runs_counts_as_it_is_stored() {
    let model = models().join("llama-tied");
    let model = model.to_string_lossy();
    let text = Bench::new().run(&["plan", "--model", &model, "--method", "inference", "--device", "1GB"]);
    assert!(text.starts_with("exit 0\n"), "{text}");
    assert!(text.contains("as stored in the file"), "{text}");
}

#[test]
fn formats_in_the_wrong_place_are_refused() {
    let unknown = Bench::new().run(&["plan", "--model", "8b", "--method", "inference", "--quant", "q7"]);
    assert!(unknown.starts_with("exit 2\n") && unknown.contains("no format of weights"), "{unknown}");
    let trained = Bench::new().run(&["plan", "--model", "8b", "--quant", "q4"]);
    assert!(trained.starts_with("exit 2\n") && trained.contains("--method inference"), "{trained}");
}

#[test]
fn the_plan_of_a_model_that_was_only_announced() {
    let args = ["plan", "--model", "Qwen 3.6 Coder 27B", "--method", "qlora", "--device", "24GiB"];
    let text = Bench::new().run(&args);
    assert!(text.contains("no model is called Qwen 3.6 Coder 27B: planned as Qwen3.6-27B"), "{text}");
}

// The catalogue.

#[test]
fn all_models_are_listed() {
    let text = Bench::new().run(&["models", "--device", "8GiB"]);
    assert!(text.starts_with("exit 0\n---- stdout\n45 models; "), "{text}");
    for alias in
        ["smollm2:135m", "llama3.2:3b", "qwen2.5:14b", "qwen3:8b", "deepseek-r1:8b", "phi4-mini:3.8b"]
    {
        assert!(text.contains(&format!("\n{alias} ")), "{alias}: {text}");
    }
}

#[test]
fn models_in_any_width() {
    let args = ["models", "gemma4", "--device", "rtx4060"];
    let list = |columns| Bench::new().run_in_columns(columns, &args);
    let wide = list("");
    assert!(wide.contains("5 models; ✓ fits RTX 4060") && wide.contains("licence"), "{wide}");
    for columns in ["90", "60"] {
        let narrow = list(columns);
        assert!(!narrow.contains("licence") && narrow.contains("gemma4:e2b"), "{narrow}");
        let table = narrow.lines().skip(2).take_while(|line| !line.starts_with("GB at most"));
        let limit = columns.parse().expect("a number");
        for line in table.skip_while(|line| line.contains("models;")) {
            assert!(line.chars().count() <= limit, "{columns}: {line}");
        }
    }
}

#[test]
fn a_model_in_json() {
    let text = Bench::new().run(&["models", "gemma4:12b", "--device", "24GiB", "--json"]);
    let json = text.split("---- stdout\n").nth(1).and_then(|text| text.split("---- stderr").next());
    let json: serde_json::Value = serde_json::from_str(json.expect("standard output")).expect("JSON");
    let model = &json["models"][0];
    assert_eq!(model["parameters"], 11_907_350_272u64);
    assert_eq!(model["trainable"], false);
    assert_eq!(model["fits"]["full"], false);
    assert_eq!(json["device"]["usable_bytes"], 24u64 << 30);
}

#[test]
fn a_model_that_is_nowhere() {
    let text = Bench::new().run(&["models", "gema4"]);
    assert!(text.starts_with("exit 2\n") && text.contains("did you mean gemma4"), "{text}");
}
