//! Hugging Face directories and PEFT folders made by transformers and PEFT.

mod tiny;

use std::fs;
use std::path::Path;

use serde_json::Value;
use tiny::fixture;
use tune_formats::{BaseModel, FormatError, RopeScaling, TokenizerFiles, open, peft};

fn base(name: &str) -> BaseModel {
    open(&fixture("models").join(name)).expect("opened")
}

/// A copy of a fixture that a test may spoil.
fn copy(name: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("temporary directory");
    for entry in fs::read_dir(fixture(name)).expect("fixture") {
        let entry = entry.expect("entry");
        fs::copy(entry.path(), dir.path().join(entry.file_name())).expect("copied");
    }
    dir
}

fn change_json(path: &Path, change: impl FnOnce(&mut Value)) {
    let mut json = serde_json::from_slice(&fs::read(path).expect("read")).expect("JSON");
    change(&mut json);
    fs::write(path, json.to_string()).expect("written");
}

fn failure(result: Result<BaseModel, FormatError>) -> String {
    match result {
        Ok(_) => panic!("it was opened"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn a_tied_model_in_the_style_of_transformers_5() {
    let base = base("llama-tied");
    let config = &base.config;
    assert_eq!((config.hidden_size, config.vocab_size, config.num_hidden_layers), (64, 320, 3));
    assert_eq!((config.num_attention_heads, config.num_key_value_heads, config.head_dim), (4, 2, 16));
    assert!(config.tie_word_embeddings && config.rope_scaling.is_none());
    assert_eq!(base.name, "llama-tied");
    assert_eq!((base.special.bos, base.special.eos, base.special.pad), (Some(1), Some(2), Some(2)));
    assert_eq!((base.special.eot, base.special.eos_ids.as_slice()), (Some(2), &[0, 2][..]));
    assert!(!base.special.add_bos);
    assert!(base.chat_template.as_deref().expect("template").contains("<|im_start|>"));
    assert!(
        matches!(&base.tokenizer, TokenizerFiles::Json { tokenizer_json, .. } if tokenizer_json.exists())
    );
    assert!(!base.weights.names().contains(&"lm_head.weight".to_owned()));
    let matrix = base.weights.matrix("model.layers.2.mlp.down_proj.weight").expect("matrix");
    assert_eq!((matrix.rows(), matrix.cols(), matrix.type_name()), (64, 160, "F32"));
    assert_eq!(base.weights.vector("model.norm.weight").expect("norm").len(), 64);
}

#[test]
fn a_scaled_model_in_the_style_of_transformers_4() {
    let base = base("llama-llama3-rope");
    assert_eq!((base.config.head_dim, base.config.num_key_value_heads), (32, 1));
    assert!(matches!(base.config.rope_scaling, Some(RopeScaling::Llama3 { .. })));
    assert!(base.chat_template.is_some(), "the template lies in tokenizer_config.json");
}

#[test]
fn a_sharded_model_of_16_bits() {
    let base = base("llama-untied-bf16-sharded");
    assert!(!base.config.tie_word_embeddings);
    let head = base.weights.matrix("lm_head.weight").expect("head");
    assert_eq!((head.rows(), head.type_name()), (320, "BF16"));
    assert_eq!(base.config.rope_theta.to_bits(), 500_000_f64.to_bits());
    assert_ne!(base.digest().expect("digest"), self::base("llama-tied").digest().expect("digest"));
}

#[test]
fn missing_files_are_named() {
    let dir = copy("models/llama-untied-bf16-sharded");
    fs::remove_file(dir.path().join("model-00002-of-00003.safetensors")).expect("removed");
    let text = failure(open(dir.path()));
    assert!(text.contains("model-00002-of-00003.safetensors"), "{text}");

    let dir = copy("models/llama-tied");
    fs::remove_file(dir.path().join("tokenizer.json")).expect("removed");
    assert!(failure(open(dir.path())).contains("no tokenizer.json"));
    fs::remove_file(dir.path().join("model.safetensors")).expect("removed");
    assert!(failure(open(dir.path())).contains("neither model.safetensors nor"));
    fs::remove_file(dir.path().join("config.json")).expect("removed");
    assert!(failure(open(dir.path())).contains("no config.json"));
    fs::write(dir.path().join("model-q8_0.gguf"), "GGUF").expect("written");
    assert!(failure(open(dir.path())).contains("passed itself: model-q8_0.gguf"));
    assert!(failure(open(&dir.path().join("nowhere"))).contains("cannot read"));
    assert!(failure(open(&fixture("peft/initial"))).contains("PEFT adapter"));
}

#[test]
fn weights_that_do_not_fit_are_listed_at_once() {
    let dir = copy("models/llama-tied");
    change_json(&dir.path().join("config.json"), |config| {
        config["intermediate_size"] = 161.into();
        config["num_hidden_layers"] = 4.into();
    });
    let text = failure(open(dir.path()));
    assert!(
        text.contains("model.layers.0.mlp.gate_proj.weight: expected [161, 64], got [160, 64]"),
        "{text}"
    );
    assert!(text.contains("(and 8 more)"), "3 layers × 3 wrong shapes and 9 missing tensors: {text}");

    change_json(&dir.path().join("config.json"), |config| {
        config["intermediate_size"] = 160.into();
        config["num_hidden_layers"] = 2.into();
    });
    let text = failure(open(dir.path()));
    assert!(text.contains("model.layers.2.input_layernorm.weight: unexpected, [64]"), "{text}");
}

#[test]
fn truncated_weights_are_refused() {
    let dir = copy("models/llama-tied");
    let path = dir.path().join("model.safetensors");
    let bytes = fs::read(&path).expect("read");
    for len in [0, 7, 100, bytes.len() - 1] {
        fs::write(&path, &bytes[..len]).expect("written");
        let text = failure(open(dir.path()));
        assert!(text.contains("model.safetensors is not a valid safetensors file"), "{text}");
    }
}

#[test]
fn an_unsupported_dtype_is_named() {
    let dir = copy("models/llama-tied");
    let path = dir.path().join("model.safetensors");
    // The same header with another type of the same size.
    let text = fs::read(&path).expect("read");
    let end = 8 + u64::from_le_bytes(text[..8].try_into().expect("length")) as usize;
    let header = String::from_utf8(text[8..end].to_vec()).expect("JSON").replace("\"F32\"", "\"I32\"");
    fs::write(&path, [&text[..8], header.as_bytes(), &text[end..]].concat()).expect("written");
    let text = failure(open(dir.path()));
    assert!(text.contains("model.embed_tokens.weight: I32"), "{text}");
}

#[test]
fn generation_config_adds_end_tokens() {
    let dir = copy("models/llama-tied");
    fs::write(dir.path().join("generation_config.json"), r#"{"eos_token_id": [2, 7, 9]}"#).expect("written");
    assert_eq!(open(dir.path()).expect("opened").special.eos_ids, [0, 2, 7, 9]);
}

#[test]
fn chat_templates_are_found_in_all_three_places() {
    let dir = copy("models/llama-tied");
    let template = |text: &str| {
        let found = open(dir.path()).expect("opened").chat_template;
        assert_eq!(found.as_deref(), Some(text));
    };
    fs::write(dir.path().join("chat_template.json"), r#"{"chat_template": "json"}"#).expect("written");
    let config = dir.path().join("tokenizer_config.json");
    change_json(&config, |config| {
        config["chat_template"] = serde_json::json!([
            { "name": "tool_use", "template": "tools" },
            { "name": "default", "template": "named" },
        ]);
    });
    fs::write(dir.path().join("chat_template.jinja"), "jinja").expect("written");
    template("jinja");
    fs::remove_file(dir.path().join("chat_template.jinja")).expect("removed");
    template("named");
    change_json(&config, |config| {
        config.as_object_mut().expect("object").remove("chat_template");
    });
    template("json");
}

#[test]
fn add_bos_follows_the_post_processor() {
    let dir = copy("models/llama-tied");
    change_json(&dir.path().join("tokenizer.json"), |json| {
        json["post_processor"] = serde_json::json!({ "type": "Sequence", "processors": [
            { "type": "ByteLevel" },
            { "type": "TemplateProcessing", "single": [
                { "SpecialToken": { "id": "<|im_start|>", "type_id": 0 } },
                { "Sequence": { "id": "A", "type_id": 0 } },
            ] },
        ] });
    });
    assert!(open(dir.path()).expect("opened").special.add_bos);
}

#[test]
fn an_adapter_of_peft_reads_and_survives_writing() {
    let adapter = peft::read(&fixture("peft/initial")).expect("read");
    assert_eq!((adapter.config.r, adapter.layers.len()), (4, 21));
    assert!((adapter.config.scale() - 2.0).abs() < 1e-12);
    let q = &adapter.layers["model.layers.0.self_attn.q_proj"];
    assert_eq!((q.r, q.d_in, q.d_out, q.a.len(), q.b.len()), (4, 64, 64, 256, 256));
    let base = base("llama-tied");
    adapter.check_base(&base).expect("its base");
    assert_eq!(adapter.trained_on(&base).expect("digest"), None);

    let dir = tempfile::tempdir().expect("temporary directory");
    let folder = dir.path().join("runs/x/adapter");
    let mut ours = adapter.clone();
    ours.config.provenance.base_digest = Some(base.digest().expect("digest"));
    ours.config.layers_to_transform = Some(vec![0, 1, 2]);
    peft::write(&folder, &ours).expect("written");
    fs::write(folder.join("README.md"), "mine").expect("written");
    peft::write(&folder, &ours).expect("written again");
    assert_eq!(peft::read(&folder).expect("read back"), ours);
    assert_eq!(ours.trained_on(&base).expect("digest"), Some(true));
    let names = fs::read_dir(&folder).expect("listed").map(|entry| entry.expect("entry").file_name());
    let mut names = names.map(|name| name.into_string().expect("UTF-8")).collect::<Vec<_>>();
    names.sort();
    assert_eq!(names, ["README.md", "adapter_config.json", "adapter_model.safetensors"]);

    let config: Value =
        serde_json::from_slice(&fs::read(folder.join("adapter_config.json")).expect("read")).expect("JSON");
    assert_eq!(config["lora_alpha"].to_string(), "8", "an integer, as Ollama demands");
    assert_eq!(config["peft_type"], "LORA");
    let file = tune_formats::safetensors::SafetensorsFiles::open(&folder.join("adapter_model.safetensors"));
    let file = file.expect("opened");
    let reference =
        tune_formats::safetensors::SafetensorsFiles::open(&fixture("peft/initial/adapter_model.safetensors"));
    let keys = |file: &tune_formats::safetensors::SafetensorsFiles| {
        file.tensors().keys().cloned().collect::<Vec<_>>()
    };
    assert_eq!(keys(&file), keys(&reference.expect("opened")));
}

#[test]
fn ranks_and_alphas_of_single_layers_are_read_and_written_as_peft_has_them() {
    let initial = peft::read(&fixture("peft/initial")).expect("read");
    let dir = tempfile::tempdir().expect("temporary directory");
    let (q, v) = ("model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj");
    let mut mixed = initial.clone();
    let lora = mixed.layers.get_mut(q).expect("q_proj");
    lora.r = 2;
    lora.a.to_mut().truncate(2 * lora.d_in);
    lora.b = (0..2 * lora.d_out).map(|n| n as f32).collect::<Vec<_>>().into();
    peft::write(dir.path(), &mixed).expect("written");
    assert_eq!(peft::read(dir.path()).expect("read back"), mixed);
    let path = dir.path().join("adapter_config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).expect("read")).expect("JSON");
    assert_eq!(config["rank_pattern"], serde_json::json!({ q: 2 }));

    // alpha 16 instead of 8 for every v_proj: twice the update
    config["alpha_pattern"] = serde_json::json!({ "v_proj": 16 });
    fs::write(&path, config.to_string()).expect("written");
    let read = peft::read(dir.path()).expect("read");
    let doubled: Vec<f32> = mixed.layers[v].b.values().iter().map(|value| 2.0 * value).collect();
    assert_eq!(read.layers[v].b.values()[..], doubled[..]);
    assert_eq!(read.layers[q], mixed.layers[q]);
    assert!((read.config.scale_of(2) - 4.0).abs() < 1e-12, "alpha 8 over rank 2");

    config["alpha_pattern"] = serde_json::json!({ "^model.*v_proj$": 16 });
    fs::write(&path, config.to_string()).expect("written");
    let error = peft::read(dir.path()).expect_err("a regular expression");
    assert!(error.to_string().contains("alpha_pattern has other keys than names of modules"), "{error}");
}

#[test]
fn an_adapter_over_other_weights_of_the_same_shape_is_refused_with_both_digests() {
    use miette::Diagnostic;
    let base = base("llama-tied");
    let mut adapter = peft::read(&fixture("peft/initial")).expect("read");
    adapter.require_trained_base(&base).expect("it does not say what it was trained on");
    let digest = base.digest().expect("digest");
    adapter.config.provenance.base_digest = Some(digest.clone());
    adapter.require_trained_base(&base).expect("its base");
    adapter.config.provenance.base_digest = Some("0".repeat(64));
    adapter.check_base(&base).expect("the shapes fit");
    let error = adapter.require_trained_base(&base).expect_err("other weights");
    let text = error.to_string();
    assert!(text.contains(&format!("expected digest {}, got {digest}", "0".repeat(64))), "{text}");
    assert!(error.help().expect("help").to_string().contains("--any-base"));
}

#[test]
fn an_adapter_for_another_base_lists_every_mismatch() {
    use miette::Diagnostic;
    let mut adapter = peft::read(&fixture("peft/initial")).expect("read");
    adapter.config.base_model_name_or_path = Some("owner/model".into());
    let error = adapter.check_base(&base("llama-llama3-rope")).expect_err("another base");
    let text = error.to_string();
    assert!(text.starts_with("adapter was trained on a different base\n"), "{text}");
    assert!(text.contains("model.layers.0.mlp.down_proj.lora_A: expected [4, 128], got [4, 160]"), "{text}");
    assert!(text.contains("more)"), "{text}");
    assert_eq!(error.help().expect("help").to_string(), "pass --base owner/model");
}

#[test]
fn unusable_adapters_say_everything() {
    let dir = copy("peft/initial");
    change_json(&dir.path().join("adapter_config.json"), |config| {
        config["use_dora"] = true.into();
        config["bias"] = "all".into();
        config["rank_pattern"] = serde_json::json!({ "q_proj": 8 });
        config["r"] = 5.into();
    });
    let text = peft::read(dir.path()).expect_err("unsupported").to_string();
    for part in ["use_dora", "bias is \"all\"", "expected rank 8", "expected rank 5", "more)"] {
        assert!(text.contains(part), "{part} in {text}");
    }
    fs::rename(dir.path().join("adapter_model.safetensors"), dir.path().join("adapter_model.bin"))
        .expect("renamed");
    assert!(peft::read(dir.path()).expect_err("pickle").to_string().contains("pickle"));
    let empty = tempfile::tempdir().expect("temporary directory");
    assert!(peft::read(empty.path()).expect_err("empty").to_string().contains("no adapter_config.json"));
}

#[test]
fn a_target_pattern_is_resolved_from_the_tensors() {
    let dir = copy("peft/initial");
    change_json(&dir.path().join("adapter_config.json"), |config| {
        config["target_modules"] = "all-linear".into();
    });
    let targets = peft::read(dir.path()).expect("read").config.target_modules;
    assert_eq!(targets, ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]);
}
