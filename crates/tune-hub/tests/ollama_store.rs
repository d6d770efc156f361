//! The local Ollama store, built in a temporary folder.

mod support;

use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use support::{gguf, options, resolve_text, sha256, text};

fn blob(store: &Path, kind: &str, contents: &[u8]) -> Value {
    let sha256 = sha256(contents);
    fs::create_dir_all(store.join("blobs")).unwrap();
    fs::write(store.join("blobs").join(format!("sha256-{sha256}")), contents).unwrap();
    json!({
        "mediaType": format!("application/vnd.ollama.image.{kind}"),
        "digest": format!("sha256:{sha256}"),
        "size": contents.len(),
    })
}

fn manifest(store: &Path, path: &str, config: &Value, layers: &[Value]) {
    let path = store.join("manifests").join(path);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    let config = blob(store, "config", config.to_string().as_bytes());
    fs::write(path, json!({"schemaVersion": 2, "config": config, "layers": layers}).to_string()).unwrap();
}

#[test]
fn a_model_is_used_where_it_lies_with_everything_it_sets() {
    let home = tempfile::tempdir().unwrap();
    let options = options(home.path());
    let store = &options.ollama_stores[0];
    let layers = [
        blob(store, "model", &gguf(64)),
        blob(store, "template", b"{{ .Prompt }}"),
        blob(store, "system", b"Be brief."),
        blob(store, "params", br#"{"stop": ["<|im_end|>"], "temperature": 0.7}"#),
        blob(store, "messages", br#"[{"role": "user", "content": "hi"}]"#),
        blob(store, "license", b"MIT"),
        blob(store, "license", b"and more"),
        blob(store, "projector", b"GGUF"),
    ];
    manifest(store, "registry.ollama.ai/library/Tiny/latest", &json!({"model_format": "gguf"}), &layers);

    let resolved = resolve_text("ollama:tiny", &options).unwrap();
    assert_eq!(fs::read(&resolved.path).unwrap(), gguf(64));
    assert!(resolved.path.starts_with(store.join("blobs")));
    assert_eq!(resolved.name, "tiny-latest");
    assert_eq!(resolved.reference, "ollama:tiny:latest");
    assert_eq!(resolved.sha256, Some(sha256(&gguf(64))));
    let ollama = resolved.ollama.unwrap();
    assert_eq!(ollama.template.as_deref(), Some("{{ .Prompt }}"));
    assert_eq!(ollama.system.as_deref(), Some("Be brief."));
    assert_eq!(ollama.stop(), ["<|im_end|>"]);
    assert_eq!(ollama.parameters["temperature"], json!(0.7));
    assert_eq!((ollama.messages[0].role.as_str(), ollama.messages[0].content.as_str()), ("user", "hi"));
    assert_eq!(ollama.licenses, ["MIT", "and more"]);
}

#[test]
fn the_second_store_is_searched_too() {
    let home = tempfile::tempdir().unwrap();
    let mut options = options(home.path());
    options.ollama_stores.push(home.path().join("system"));
    let (user, system) = (&options.ollama_stores[0], &options.ollama_stores[1]);
    manifest(user, "registry.ollama.ai/library/other/latest", &json!({}), &[blob(user, "model", &gguf(8))]);
    manifest(system, "hf.co/ada/tiny-GGUF/Q8_0", &json!({}), &[blob(system, "model", &gguf(16))]);
    let resolved = resolve_text("ollama:hf.co/ada/tiny-GGUF:q8_0", &options).unwrap();
    assert_eq!(fs::read(resolved.path).unwrap(), gguf(16));
}

#[test]
fn a_missing_model_lists_those_that_are_there() {
    let home = tempfile::tempdir().unwrap();
    let options = options(home.path());
    let store = &options.ollama_stores[0];
    let shown = |reference: &str| {
        text(&resolve_text(reference, &options).unwrap_err(), &[(&store.display().to_string(), "STORE")])
    };
    insta::assert_snapshot!(shown("ollama:qwen3:8b"), @r"
    no Ollama store found (looked in STORE)
    help: set OLLAMA_MODELS to the folder that holds `manifests` and `blobs`, or run `ollama pull qwen3:8b` first
    ");

    fs::create_dir_all(store.join("manifests")).unwrap();
    insta::assert_snapshot!(shown("ollama:qwen3:8b"), @r"
    Ollama has no model `qwen3:8b` in STORE
    help: the store is empty; run `ollama pull qwen3:8b`
    ");

    let layer = blob(store, "model", &gguf(8));
    for path in
        ["registry.ollama.ai/library/qwen3/4b", "registry.ollama.ai/ada/mine/latest", "hf.co/a/b/Q4_K_M"]
    {
        manifest(store, path, &json!({}), std::slice::from_ref(&layer));
    }
    insta::assert_snapshot!(shown("ollama:qwen3:8b"), @r"
    Ollama has no model `qwen3:8b` in STORE
    help: it has ada/mine:latest, hf.co/a/b:Q4_K_M, qwen3:4b; or run `ollama pull qwen3:8b`
    ");
}

#[test]
fn models_without_trainable_weights_say_why() {
    let home = tempfile::tempdir().unwrap();
    let options = options(home.path());
    let store = &options.ollama_stores[0];
    let base = blob(store, "model", &gguf(8));
    let add = |name: &str, config: Value, layers: &[Value]| {
        manifest(store, &format!("registry.ollama.ai/library/{name}/latest"), &config, layers);
    };
    add("adapted", json!({}), &[base.clone(), blob(store, "adapter", &gguf(9))]);
    add("cloudy", json!({"remote_host": "https://ollama.com:443"}), &[]);
    add("tensors", json!({"model_format": "safetensors"}), &[blob(store, "tensor", b"x")]);
    add("split", json!({}), &[base.clone(), blob(store, "model", &gguf(10))]);
    add("text", json!({}), &[blob(store, "model", b"text")]);
    let shown = |name: &str| {
        text(&resolve_text(name, &options).unwrap_err(), &[(&store.display().to_string(), "STORE")])
    };
    insta::assert_snapshot!(shown("ollama:adapted"), @r"
    ollama:adapted:latest: it is a base model with an adapter on top, and only a base can be trained
    help: name its base instead; `ollama show --modelfile adapted:latest` shows it in the FROM line (and the adapter in the ADAPTER line)
    ");
    insta::assert_snapshot!(shown("ollama:cloudy"), @r"
    ollama:cloudy:latest: it runs on https://ollama.com:443, there are no weights here
    help: choose a local variant: `ollama pull cloudy` without `cloud` in the tag
    ");
    insta::assert_snapshot!(shown("ollama:tensors"), @r"
    ollama:tensors:latest: expected GGUF weights, got safetensors
    help: take the same model from the Hub: hf:OWNER/REPO
    ");
    insta::assert_snapshot!(shown("ollama:split"), @r"
    ollama:split:latest: its weights are in 2 layers, expected 1
    help: update Ollama (0.30 or later merges split files) and run `ollama pull split:latest`
    ");
    assert!(shown("ollama:text").contains("expected the magic bytes \"GGUF\", got \"text\""));
}

#[test]
fn a_damaged_store_is_noticed() {
    let home = tempfile::tempdir().unwrap();
    let options = options(home.path());
    let store = &options.ollama_stores[0];
    let layer = blob(store, "model", &gguf(100));
    manifest(store, "registry.ollama.ai/library/tiny/latest", &json!({}), std::slice::from_ref(&layer));
    let file = store.join("blobs").join(layer["digest"].as_str().unwrap().replace(':', "-"));
    let shown = || {
        let (store, digest) = (store.display().to_string(), layer["digest"].as_str().unwrap());
        let error = resolve_text("ollama:tiny", &options).unwrap_err();
        text(&error, &[(&store, "STORE"), (digest, "DIGEST"), (&digest.replace(':', "-"), "BLOB")])
    };

    fs::write(&file, &gguf(100)[..50]).unwrap();
    insta::assert_snapshot!(shown(), @r"
    STORE/blobs/BLOB: expected 104 bytes, got 50
    help: the store is damaged; fetch the model again: ollama pull tiny:latest
    ");
    fs::remove_file(&file).unwrap();
    insta::assert_snapshot!(shown(), @r"
    ollama:tiny:latest: layer DIGEST: STORE/blobs/BLOB is missing
    help: the store is damaged; fetch the model again: ollama pull tiny:latest
    ");

    // a digest is part of a path: it may hold nothing but its digits
    let evil = json!({"mediaType": layer["mediaType"], "digest": "sha256:../../../etc/passwd", "size": 1});
    manifest(store, "registry.ollama.ai/library/tiny/latest", &json!({}), &[evil]);
    assert!(shown().contains("not a sha256 digest"), "{}", shown());

    fs::write(store.join("manifests/registry.ollama.ai/library/tiny/latest"), "{").unwrap();
    assert!(shown().contains("manifest") && shown().contains("damaged"), "{}", shown());
}
