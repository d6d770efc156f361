//! Recipe → RunSpec: defaults, origins, overrides, and the way back to text.

use std::path::Path;

use tune_recipe::{BaseFacts, Origin, Override, RunSpec, parse};
use tune_recipe::{Budget, Layers, Resume, TargetModules};
use tune_recipe::{Method, Quantization};

const SMALLEST: &str = "[model]\nbase = \"smollm2:135m\"\n[[data]]\npath = \"d.jsonl\"\n";

fn smallest(overrides: &[&str]) -> RunSpec {
    let overrides: Vec<_> = overrides.iter().map(|o| Override::set(*o)).collect();
    parse("recipes/first.toml", SMALLEST, &overrides).unwrap()
}

fn base(parameters: u64, quantized: bool) -> BaseFacts {
    BaseFacts {
        parameters,
        quantized,
        num_hidden_layers: 30,
        max_position_embeddings: 8192,
        linear_names: ["q_proj", "k_proj", "v_proj", "o_proj"].map(String::from).into(),
    }
}

#[test]
fn the_smallest_recipe_resolves_to_the_documented_defaults() {
    insta::assert_snapshot!(smallest(&[]).to_toml());
}

#[test]
fn the_resolved_recipe_reads_back_to_the_same_values() {
    let spec = parse(
        "full.toml",
        r#"
        version = 1
        [run]
        name = "my-code"
        out = "/tmp/runs/a folder"
        [model]
        base = 'ollama:qwen3:8b'
        quantization = "keep"
        [adapter]
        type = "lora"
        r = 8
        lora_dropout = 0.05
        target_modules = ["q_proj", "v_proj"]
        use_rslora = true
        layers = "8-11"
        init_adapter = "runs/other/adapter"
        [[data]]
        path = "a \"quoted\" name.jsonl"
        format = "sharegpt"
        train_on = "last"
        [[data]]
        path = "b.jsonl"
        format = "input_ids"
        [data_options]
        sequence_len = 512
        overlong = "split"
        packing = false
        val_split = 0
        [train]
        num_epochs = 1
        max_steps = 40
        learning_rate = 3e-4
        adam_epsilon = 1e-8
        lr_scheduler = "linear"
        [memory]
        budget = "6 GiB"
        on_exceed = "fit"
        [checkpoint]
        resume = "never"
        [export]
        targets = ["gguf-lora", "gguf:q8_0", "ollama:my-code"]
        [samples]
        prompts = ["first\nsecond", "émoji 🦀"]
        system = "be brief"
        "#,
        &[],
    )
    .unwrap();
    assert_eq!(spec.adapter.method, Method::Lora);
    assert_eq!(spec.adapter.layers, Layers::Only(vec![8, 9, 10, 11]));
    assert_eq!(spec.adapter.target_modules, TargetModules::Names(vec!["q_proj".into(), "v_proj".into()]));
    assert!((spec.adapter.scale() - 16.0 / 8f64.sqrt()).abs() < 1e-12);
    assert_eq!(spec.memory.budget, Budget::Bytes(6 << 30));
    assert_eq!(spec.checkpoint.resume, Resume::Never);
    assert_eq!(spec.run.out, Path::new("/tmp/runs/a folder"));

    let again = parse("full.toml", &spec.to_toml(), &[]).unwrap();
    let values = |spec: &RunSpec| spec.lines().into_iter().map(|l| (l.path, l.value)).collect::<Vec<_>>();
    assert_eq!(values(&again), values(&spec));
    assert_eq!(RunSpec { origins: spec.origins.clone(), ..again }, spec);
}

#[test]
fn every_value_knows_where_it_comes_from() {
    let overrides = [
        Override::set("train.seed=7"),
        Override::flag("--out", "run.out", "out"),
        Override::set("data.format=text"),
    ];
    let spec =
        parse("r.toml", &format!("{SMALLEST}[train]\nseed = 1\nweight_decay = 0.1"), &overrides).unwrap();
    assert_eq!(spec.train.seed, 7);
    assert_eq!(*spec.origins.get("train.seed"), Origin::CommandLine("--set"));
    assert_eq!(*spec.origins.get("run.out"), Origin::CommandLine("--out"));
    assert_eq!(*spec.origins.get("data.0.format"), Origin::CommandLine("--set"));
    assert_eq!(*spec.origins.get("train.weight_decay"), Origin::Recipe);
    assert_eq!(*spec.origins.get("train.max_grad_norm"), Origin::Default);
    assert!(matches!(spec.origins.get("train.learning_rate"), Origin::Auto(_)));
    assert_eq!(spec.run.name, "r");
}

#[test]
fn the_command_line_takes_plain_strings_and_the_last_one_wins() {
    let spec = smallest(&[
        "model.base=hf:owner/repo@main",
        "run.name=42",
        "train.learning_rate=1e-4",
        "train.learning_rate=2e-5",
        "train.lr=3e-5",
        "export.targets=[\"peft\"]",
        "data.0.path=other file.jsonl",
        "memory.budget=6 GiB",
        "train.micro_batch_size=auto",
    ]);
    assert_eq!(spec.model.base, "hf:owner/repo@main");
    assert_eq!(spec.run.name, "42");
    assert!((spec.train.learning_rate - 3e-5).abs() < f64::EPSILON);
    assert_eq!(spec.export.targets, ["peft"]);
    assert_eq!(spec.data[0].path, Path::new("other file.jsonl"));
    assert_eq!(spec.memory.budget, Budget::Bytes(6 << 30));
    assert_eq!(spec.notes, ["train.lr is read as train.learning_rate"]);
}

#[test]
fn names_of_other_tools_are_understood_and_noted() {
    let text = format!(
        "{SMALLEST}[adapter]\nlora_r = 4\nlora_target_modules = [\"q_proj\"]\n[data_options]\ncutoff_len = 64\n\
         sample_packing = false\n[train]\nper_device_train_batch_size = 2\nnum_train_epochs = 3"
    );
    let spec = parse("r.toml", &text, &[]).unwrap();
    assert_eq!((spec.adapter.r, spec.data_options.sequence_len, spec.data_options.packing), (4, 64, false));
    assert_eq!(spec.train.micro_batch_size, 2);
    assert_eq!(spec.notes.len(), 6);
    assert_eq!(spec.notes[0], "adapter.lora_r is read as adapter.r");
}

#[test]
fn auto_depends_on_the_base() {
    let mut spec = smallest(&[]);
    assert_eq!(spec.model.quantization, Quantization::Nf4);
    spec.refine(&base(8_000_000_000, true)).unwrap();
    assert_eq!(spec.model.quantization, Quantization::Keep);
    assert!((spec.train.learning_rate - 2e-4).abs() < f64::EPSILON);
    spec.refine(&base(32_000_000_000, false)).unwrap();
    assert_eq!(spec.model.quantization, Quantization::Nf4);
    assert!((spec.train.learning_rate - 1e-4).abs() < f64::EPSILON);

    let mut written = smallest(&["train.learning_rate=5e-4", "adapter.type=lora"]);
    written.refine(&base(32_000_000_000, false)).unwrap();
    assert!((written.train.learning_rate - 5e-4).abs() < f64::EPSILON);
    assert_eq!(written.model.quantization, Quantization::Keep);
}

#[test]
fn a_short_base_shortens_only_a_default_sequence() {
    let short = BaseFacts { max_position_embeddings: 512, ..base(1, false) };
    let mut spec = smallest(&[]);
    spec.refine(&short).unwrap();
    assert_eq!((spec.data_options.sequence_len, spec.train.micro_batch_size), (512, 4));
    assert!(smallest(&["data_options.sequence_len=1024"]).refine(&short).is_err());
}

#[test]
fn files_are_found_beside_the_recipe() {
    let folder = std::env::temp_dir().join(format!("tune-recipe-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let (recipe, data) = (folder.join("r.toml"), folder.join("d.jsonl"));
    std::fs::write(&recipe, SMALLEST).unwrap();
    std::fs::write(&data, "").unwrap();
    let spec = tune_recipe::load(&recipe, &[]).unwrap();
    std::fs::remove_dir_all(&folder).unwrap();
    assert_eq!(spec.data[0].path, data);
    assert_eq!(spec.model.base, "smollm2:135m");
}

#[test]
fn every_option_is_documented_with_its_default() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/defaults.md");
    let text = std::fs::read_to_string(path).unwrap();
    for (section, keys) in tune_recipe::sections() {
        let (_, after) = text
            .split_once(&format!("\n## `[{section}]`\n"))
            .or_else(|| text.split_once(&format!("\n## `[[{section}]]`\n")))
            .unwrap_or_else(|| panic!("docs/defaults.md has no section {section}"));
        let part = after.split("\n## ").next().unwrap();
        for key in keys {
            assert!(
                part.contains(&format!("\n| `{key}` |")),
                "docs/defaults.md says nothing of {section}.{key}"
            );
        }
        let rows = part.lines().filter(|line| line.starts_with("| `")).count();
        assert_eq!(rows, keys.len(), "docs/defaults.md documents an option of {section} that does not exist");
    }
    // The defaults themselves: `| `key` | `value` | …`.
    let (mut spec, mut checked) = (smallest(&[]), 0);
    spec.refine(&base(1, true)).unwrap();
    for line in spec.lines().iter().filter(|l| *l.origin == Origin::Default) {
        let (section, key) = (line.path.split('.').next().unwrap(), line.path.rsplit('.').next().unwrap());
        let row = format!("\n| `{key}` | `{}` |", line.value);
        let header = if section == "data" { "[[data]]".into() } else { format!("[{section}]") };
        let (_, after) = text.split_once(&format!("\n## `{header}`\n")).unwrap();
        assert!(after.split("\n## ").next().unwrap().contains(&row), "docs/defaults.md lacks {row}");
        checked += 1;
    }
    assert!(checked > 25, "{checked}");
}
