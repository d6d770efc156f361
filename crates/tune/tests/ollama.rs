//! `ollama:NAME` as the base and as the target, with a tiny model, an Ollama store in a temporary folder and the double
//! of a server that tune-hub's tests have. A real server is asked where there is one:
//!
//! ```sh
//! TUNE_TEST_OLLAMA=smollm2:135m OLLAMA_HOST=… cargo test -p tune --test ollama
//! ```
//!
//! names a model of that server whose store lies on this machine.

#[path = "../../tune-hub/tests/support/ollama.rs"]
mod double;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use assert_cmd::cargo::CommandCargoExt;
use double::{OllamaDouble, digest};
use serde_json::json;
use tempfile::TempDir;
use tune_export::{ExportOptions, ExportRequest, ExportTarget, Verification};
use tune_formats::peft::{Adapter, AdapterConfig};

/// The last version that takes adapters, and the first that does not.
const TAKES: &str = "0.34.0";
const REFUSES: &str = "0.34.1";

/// A folder with a store that has `tiny`, a recipe over it, its rows, and the trained run.
struct Workshop {
    folder: TempDir,
}

/// Trained once; every test has a copy.
static TRAINED: LazyLock<Workshop> = LazyLock::new(|| {
    let workshop = Workshop { folder: tempfile::tempdir().expect("temporary folder") };
    let weights = tiny_gguf(&workshop.path("tiny.gguf"), "q8_0");
    workshop.keep_in_store(&weights);
    let row = |n: usize| {
        let messages = json!([
            {"role": "user", "content": format!("count from {n}")},
            {"role": "assistant", "content": format!("{n} {} {}", n + 1, n + 2)},
        ]);
        json!({ "messages": messages }).to_string() + "\n"
    };
    fs::write(workshop.path("rows.jsonl"), (0..20).map(row).collect::<String>()).expect("rows");
    let recipe = "version = 1\n[model]\nbase = \"ollama:tiny\"\n[adapter]\ntype = \"qlora\"\nr = 4\n[[data]]\n\
                  path = \"rows.jsonl\"\n[data_options]\nsequence_len = 256\nval_split = 0.1\n[train]\nmax_steps = 2\n\
                  micro_batch_size = 1\neffective_batch_size = 1\nlearning_rate = 5e-3\n";
    fs::write(workshop.path("recipe.toml"), recipe).expect("recipe");
    let output = workshop.tune("127.0.0.1:1", &["train", "recipe.toml", "--out", "run", "--quiet"]).output();
    let output = output.expect("tune runs");
    assert!(output.status.success(), "{}", text(&output.stderr));
    workshop
});

impl Workshop {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("temporary folder");
        copy(TRAINED.folder.path(), folder.path());
        Self { folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn weights(&self) -> Vec<u8> {
        fs::read(self.path("tiny.gguf")).expect("weights")
    }

    /// Puts weights into the store as `tiny`, as `ollama pull` does.
    fn keep_in_store(&self, weights: &[u8]) {
        let store = self.path("store");
        let blobs = store.join("blobs");
        let manifest = store.join("manifests/registry.ollama.ai/library/tiny/latest");
        fs::create_dir_all(&blobs).expect("store");
        fs::create_dir_all(manifest.parent().expect("a folder")).expect("store");
        let layer = |kind: &str, bytes: &[u8]| {
            let digest = digest(bytes);
            fs::write(blobs.join(digest.replace(':', "-")), bytes).expect("blob");
            let kind = format!("application/vnd.ollama.image.{kind}");
            json!({ "mediaType": kind, "digest": digest, "size": bytes.len() })
        };
        let layers = [layer("model", weights), layer("params", b"{\"stop\":[\"<|im_end|>\"]}")];
        fs::write(manifest, json!({ "schemaVersion": 2, "layers": layers }).to_string()).expect("manifest");
    }

    fn tune(&self, host: &str, arguments: &[&str]) -> Command {
        let mut command = Command::cargo_bin("tune").expect("the binary is built");
        command.args(arguments).current_dir(self.folder.path()).stdin(Stdio::null());
        command.env("NO_COLOR", "1").env("OLLAMA_HOST", host).env("OLLAMA_MODELS", self.path("store"));
        command.env("TUNE_CACHE", self.path("cache"));
        command
    }

    /// Standard error of a command that ends with `code`.
    fn run(&self, host: &str, code: i32, arguments: &[&str]) -> String {
        let Output { status, stdout, stderr } = self.tune(host, arguments).output().expect("tune runs");
        assert_eq!(status.code(), Some(code), "{}\n{}", text(&stdout), text(&stderr));
        text(&stderr).split_whitespace().collect::<Vec<_>>().join(" ")
    }

    fn export(&self, double: &OllamaDouble, code: i32, more: &[&str]) -> String {
        let arguments = ["export", "run", "--to", "ollama:my-code"];
        let arguments =
            if more.first() == Some(&"--to") { vec!["export", "run"] } else { arguments.to_vec() };
        self.run(&double.address, code, &[&arguments[..], more].concat())
    }
}

#[test]
fn over_a_base_of_the_server_the_adapter_alone_is_sent() {
    let workshop = Workshop::new();
    let double = OllamaDouble::start(TAKES);
    let base = double.pull("tiny", &workshop.weights());
    let told = workshop.export(&double, 0, &[]);
    for part in [
        "created my-code:latest",
        "prompts the server makes the prompts of training",
        "asked count from",
        "answered Fine, thank you.",
        "try ollama run my-code:latest",
    ] {
        assert!(told.contains(part), "no {part:?} in {told}");
    }
    let made = double.state().models["my-code:latest"].clone();
    assert_eq!((made["from"].as_str(), made["files"]["model.gguf"].as_str()), (Some("tiny"), Some(&*base)));
    let adapter = fs::read(workshop.path("run/export/run.lora.gguf"))
        .or_else(|_| fs::read(workshop.path("run/export/recipe.lora.gguf")));
    assert_eq!(made["adapters"]["adapter.gguf"], digest(&adapter.expect("the file that was sent")));
    assert!(made["template"].as_str().is_some_and(|text| text.contains("<|im_start|>")), "{made}");
    assert_eq!(double.uploads(), 1, "no copy of the weights");
    let modelfile = fs::read_to_string(workshop.path("run/export/Modelfile")).expect("a Modelfile");
    assert!(modelfile.contains("\nFROM tiny\nADAPTER ./"), "{modelfile}");

    // again: nothing is sent, the model is made anew
    let told = workshop.export(&double, 0, &[]);
    assert!(told.contains("not sent again"), "{told}");
    assert_eq!(double.uploads(), 1);
}

#[test]
fn a_recipe_may_name_the_target_and_a_run_hears_early_that_no_server_is_there() {
    let workshop = Workshop::new();
    let double = OllamaDouble::start(TAKES);
    double.pull("tiny", &workshop.weights());
    let train = |host: &str, code: i32, out: &str| {
        let targets = "export.targets=[\"ollama:my-code\", \"peft\"]";
        workshop.run(host, code, &["train", "recipe.toml", "--out", out, "--set", targets])
    };
    let told = train(&double.address, 0, "there");
    assert!(told.contains(&format!("ollama {TAKES} answers at http://{}", double.address)), "{told}");
    assert!(told.contains("exported my-code:latest (ollama:my-code)"), "{told}");

    let told = train("127.0.0.1:1", 1, "away");
    let early = told.find("warning no Ollama server at http://127.0.0.1:1").expect("a warning");
    assert!(early < told.find("training").expect("the run"), "{told}");
    assert!(told.contains("later ollama create my-code:latest -f away/export/Modelfile"), "{told}");
    assert!(told.contains("help: start it with `ollama serve`"), "{told}");
    // what needs no server is there
    for file in ["away/export/Modelfile", "away/adapter/adapter_config.json"] {
        assert!(workshop.path(file).is_file(), "{file}");
    }
    assert_eq!(fs::read_dir(workshop.path("away/export")).expect("exports").count(), 3);
    // the same command against a server, as the help says
    workshop.run(&double.address, 0, &["export", "away", "--to", "ollama:my-code"]);
}

#[test]
fn servers_that_refuse_adapters_get_merged_weights() {
    let workshop = Workshop::new();
    let double = OllamaDouble::start(REFUSES);
    double.pull("tiny", &workshop.weights());
    let told = workshop.export(&double, 0, &[]);
    assert!(told.contains("takes no adapters: merged weights (gguf:q8_0) are sent"), "{told}");
    let made = double.state().models["my-code:latest"].clone();
    assert!(made["adapters"].is_null() && made["from"].is_null(), "{made}");
    assert!(made["template"].as_str().is_some_and(|text| text.contains("<|im_start|>")), "{made}");
    assert_eq!(made["parameters"]["stop"], json!(["<|endoftext|>", "<|im_end|>"]));
    let told = workshop.export(&double, 2, &["--to", "ollama:my-code?gguf-lora"]);
    assert!(told.contains("send merged weights: ollama:my-code:latest?gguf:q8_0"), "{told}");

    // a build without a version says so only when it is asked
    let unnamed = OllamaDouble::start("0.0.0");
    unnamed.state().refuses_adapters = Some(true);
    unnamed.pull("tiny", &workshop.weights());
    let told = workshop.export(&unnamed, 0, &[]);
    assert!(told.contains("this server takes no adapters"), "{told}");
    assert!(unnamed.state().models["my-code:latest"]["files"]["model.gguf"].is_string());
}

#[test]
fn what_is_sent_can_be_named() {
    let workshop = Workshop::new();
    let double = OllamaDouble::start(TAKES);
    workshop.export(
        &double,
        0,
        &["--to", "ollama:me/my-code:v2?gguf:q4_0", "--min-retention", "0", "--verify", "warn"],
    );
    let made = double.state().models["me/my-code:v2"].clone();
    let sent = made["files"]["model.gguf"].as_str().expect("weights").to_owned();
    let bytes = double.state().blobs[&sent].clone();
    let file = workshop.path("sent.gguf");
    fs::write(&file, bytes).expect("written");
    let metadata = tune_formats::gguf::GgufFile::open(&file).expect("a GGUF file").metadata().clone();
    assert_eq!(metadata.unsigned("general.file_type"), Some(2));
    for key in ["tune.base_digest", "tune.template_digest", "tune.data_digest", "tune.recipe", "tune.version"]
    {
        assert!(metadata.string(key).is_some_and(|text| !text.is_empty()), "{key}");
    }
    assert!(workshop.export(&double, 2, &["--to", "ollama:my code"]).contains("names no model"));
}

#[test]
fn a_server_without_the_base_gets_it_and_one_with_another_is_refused() {
    let workshop = Workshop::new();
    let double = OllamaDouble::start(TAKES);
    let told = workshop.export(&double, 0, &[]);
    assert!(told.contains("has no tiny:latest") || told.contains("has no tiny:"), "{told}");
    let made = double.state().models["my-code:latest"].clone();
    assert_eq!(made["files"]["base.gguf"], digest(&workshop.weights()));
    assert_eq!(double.uploads(), 2);

    let other = OllamaDouble::start(TAKES);
    let others = tiny_gguf(&workshop.path("other.gguf"), "q4_0");
    let found = other.pull("tiny", &others);
    let told = workshop.export(&other, 2, &[]);
    for digest in [digest(&workshop.weights()), found] {
        assert!(told.contains(digest.trim_start_matches("sha256:")), "{told}");
    }
    assert!(told.contains("--any-base"), "{told}");
    workshop.export(&other, 0, &["--any-base"]);

    // the same name in the store, pulled anew: the run's own base is gone
    workshop.keep_in_store(&others);
    let told = workshop.export(&other, 1, &[]);
    assert!(told.contains("adapter was trained on other weights"), "{told}");
}

#[test]
fn prompts_that_differ_from_training_fail_the_export() {
    let workshop = Workshop::new();
    let double = OllamaDouble::start(TAKES);
    double.pull("tiny", &workshop.weights());
    double.state().render = |_, messages| messages.iter().map(|(_, content)| content.as_str()).collect();
    let told = workshop.export(&double, 5, &[]);
    assert!(told.contains("my-code:latest is in Ollama, and is not what was trained"), "{told}");
    assert!(told.contains("it was trained on the prompt"), "{told}");

    // an old server does not tell; its template does
    double.state().tells_prompts = false;
    let told = workshop.export(&double, 0, &[]);
    assert!(told.contains("the server makes the prompts of training"), "{told}");
    // one that has nothing to say
    double.state().answer = " ".into();
    let told = workshop.export(&double, 5, &[]);
    assert!(told.contains("its answer to the question above is empty"), "{told}");
}

#[test]
fn a_server_that_dies_in_mid_upload_is_taken_up_again_by_the_same_command() {
    let workshop = Workshop::new();
    let double = OllamaDouble::start(REFUSES);
    double.state().hang_up_after = Some(1000);
    let told = workshop.export(&double, 1, &[]);
    assert!(told.contains("broke off"), "{told}");
    assert!(double.state().models.is_empty());
    let told = workshop.export(&double, 0, &[]);
    assert!(told.contains("sent") && told.contains("created my-code:latest"), "{told}");

    double.state().fail_create = Some("no space left on device".into());
    let told = workshop.export(&double, 1, &[]);
    assert!(told.contains("the disk of the Ollama server is full"), "{told}");
}

#[test]
#[cfg(unix)]
fn ctrl_c_in_mid_upload_leaves_whole_files_and_the_same_command_goes_on() {
    let workshop = Workshop::new();
    let double = OllamaDouble::start(REFUSES);
    double.state().stall_after = Some(1000);
    let mut child = workshop
        .tune(&double.address, &["export", "run", "--to", "ollama:my-code"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("tune starts");
    let patience = Instant::now() + Duration::from_mins(2);
    while double.uploads() == 0 {
        assert!(Instant::now() < patience, "no upload in two minutes");
        std::thread::sleep(Duration::from_millis(20));
    }
    let interrupt = Command::new("kill").args(["-INT", &child.id().to_string()]).status();
    assert!(interrupt.expect("kill runs").success());
    assert_eq!(child.wait().expect("tune ends").code(), Some(130));
    assert!(double.state().blobs.is_empty() && double.state().models.is_empty());
    let left: Vec<_> = fs::read_dir(workshop.path("run/export")).expect("exports").flatten().collect();
    assert!(left.iter().all(|entry| !entry.file_name().to_string_lossy().starts_with('.')), "{left:?}");
    let told = workshop.export(&double, 0, &[]);
    assert!(told.contains("created my-code:latest"), "{told}");
}

#[test]
fn an_adapter_over_other_weights_is_refused_by_every_command_that_loads_one() {
    let workshop = Workshop::new();
    tiny_gguf(&workshop.path("other.gguf"), "q4_0");
    let over = ["./other.gguf", "--adapter", "run/adapter"];
    let commands: [&[&str]; 3] =
        [&["generate", "--prompt", "count", "--max-tokens", "1"], &["eval", "rows.jsonl"], &["chat"]];
    for command in commands {
        let mut arguments = vec![command[0], over[0]];
        arguments.extend(&command[1..]);
        arguments.extend(&over[1..]);
        let told = workshop.run("127.0.0.1:1", 1, &arguments);
        assert!(told.contains("adapter was trained on other weights"), "{command:?}: {told}");
        arguments.push("--any-base");
        workshop.run("127.0.0.1:1", 0, &arguments);
    }
    // another base named on purpose is the way to merge onto more bits
    let told =
        workshop.run("127.0.0.1:1", 0, &["export", "run", "--to", "gguf-lora", "--base", "./other.gguf"]);
    assert!(told.contains("trained over other weights"), "{told}");
}

/// A real server and a model of the Llama family in its store.
#[test]
fn real_server_takes_a_tuned_model_and_answers() {
    let Ok(base) = std::env::var("TUNE_TEST_OLLAMA") else {
        eprintln!(
            "SKIPPED: no real Ollama server; set TUNE_TEST_OLLAMA=MODEL (and OLLAMA_HOST) to test against one"
        );
        return;
    };
    let workshop = Workshop::new();
    let set = [format!("model.base=ollama:{base}"), "train.max_steps=2".to_owned()];
    let real = |arguments: &[&str]| {
        let mut command = Command::cargo_bin("tune").expect("the binary is built");
        let output = command.args(arguments).current_dir(workshop.folder.path()).output().expect("tune runs");
        assert!(output.status.success(), "{}", text(&output.stderr));
        text(&output.stderr)
    };
    real(&["train", "recipe.toml", "--out", "real", "--set", &set[0], "--set", &set[1]]);
    let told = real(&["export", "real", "--to", "ollama:tune-test"]);
    assert!(told.contains("created   tune-test:latest"), "{told}");
    assert!(told.contains("answered"), "{told}");
}

/// The tiny model as a GGUF file.
fn tiny_gguf(out: &Path, file_type: &str) -> Vec<u8> {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/parity/models/llama-tied");
    let base = tune_formats::open(&model).expect("the tiny model");
    let adapter = Adapter { config: AdapterConfig::default(), layers: BTreeMap::new() };
    let target: ExportTarget = format!("gguf:{file_type}").parse().expect("a target");
    let options = ExportOptions { verification: Verification::Off, ..ExportOptions::default() };
    let request = ExportRequest { base: &base, adapter: &adapter, target, out, options };
    tune_export::export(&request, &mut |_| ()).expect("exported");
    fs::read(out).expect("read")
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("folder");
    for entry in fs::read_dir(from).expect("listed").flatten() {
        let to = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy(&entry.path(), &to);
        } else {
            fs::copy(entry.path(), to).expect("copied");
        }
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
