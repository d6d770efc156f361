//! The Hugging Face Hub, against a double on a loopback port.

mod support;

use std::fs;
use std::path::Path;

use support::{COMMIT, Hub, files_below, gguf, options, resolve, resolve_text, sha256, text};
use tune_hub::{HubError, ModelRef, Options, Progress, Token};

const REPO: &str = "ada/tiny";

fn with_hub(home: &Path) -> (Hub, Options) {
    let hub = Hub::start();
    let mut options = options(home);
    options.hub.endpoint.clone_from(&hub.endpoint);
    (hub, options)
}

fn tiny_model(hub: &Hub) {
    hub.put(REPO, "config.json", b"{}")
        .put(REPO, "tokenizer.json", b"{\"a\": 1}")
        .put(REPO, "README.md", b"not needed")
        .put(REPO, "pytorch_model.bin", b"not needed")
        .put(REPO, "model.safetensors", &gguf(5000));
}

#[test]
fn a_repository_is_downloaded_once_and_then_used_without_a_connection() {
    let home = tempfile::tempdir().unwrap();
    let (hub, mut options) = with_hub(home.path());
    tiny_model(&hub);
    options.hub.token = Token::new("hf_secret");

    let (resolved, events) = resolve(&ModelRef::parse("hf:ada/tiny").unwrap(), &options);
    let resolved = resolved.unwrap();
    assert_eq!(fs::read(resolved.path.join("model.safetensors")).unwrap(), gguf(5000));
    assert_eq!(fs::read(resolved.path.join("tokenizer.json")).unwrap(), b"{\"a\": 1}");
    assert!(!resolved.path.join("pytorch_model.bin").exists());
    assert_eq!(resolved.reference, format!("hf:ada/tiny@{COMMIT}"));
    assert_eq!(resolved.name, "tiny");
    assert_eq!(resolved.origin, "Hugging Face Hub (ada/tiny)");
    assert!(events.contains(&Progress::Bytes { done: 5004 }), "{events:?}");
    assert!(events.contains(&Progress::Verifying { file: "model.safetensors".to_owned() }));
    assert!(
        hub.requests().iter().all(|request| request.authorization.as_deref() == Some("Bearer hf_secret"))
    );

    let before = hub.requests().len();
    let again = resolve_text("hf:ada/tiny", &options).unwrap();
    assert_eq!(again.path, resolved.path);
    // the exact reference that a run saves resolves to the same files
    assert_eq!(resolve_text(&resolved.reference, &options).unwrap().path, resolved.path);
    assert_eq!(hub.requests().len(), before, "the second time needs no connection");

    options.refresh = true;
    resolve_text("hf:ada/tiny", &options).unwrap();
    assert_eq!(hub.requests().len(), before + 1, "a refresh lists, and finds everything there");
}

#[test]
fn a_single_gguf_file_and_its_revision() {
    let home = tempfile::tempdir().unwrap();
    let (hub, options) = with_hub(home.path());
    hub.put(REPO, "a.gguf", &gguf(100)).put(REPO, "q/b.gguf", &gguf(200));
    let resolved = resolve_text(&format!("hf:ada/tiny/q/b.gguf@{COMMIT}"), &options).unwrap();
    assert_eq!(fs::read(&resolved.path).unwrap(), gguf(200));
    assert!(hub.downloads("a.gguf").is_empty());

    let error = resolve_text("hf:ada/tiny", &options).unwrap_err();
    insta::assert_snapshot!(text(&error, &[]), @r"
    hf:ada/tiny: it holds GGUF files, and one must be named
    help: write hf:OWNER/REPO/FILE.gguf with one of a.gguf, q/b.gguf
    ");
}

#[test]
fn a_download_that_breaks_off_is_continued_not_repeated() {
    let home = tempfile::tempdir().unwrap();
    let (hub, options) = with_hub(home.path());
    let contents = gguf(300_000);
    hub.put(REPO, "m.gguf", &contents);
    hub.close_next_download_after(100_000);
    let resolved = resolve_text("hf:ada/tiny/m.gguf", &options).unwrap();
    assert_eq!(fs::read(&resolved.path).unwrap(), contents);
    let downloads = hub.downloads("m.gguf");
    assert_eq!(downloads[0], 0);
    assert!(downloads.len() == 2 && downloads[1] > 0 && downloads[1] <= 100_000, "{downloads:?}");
}

#[test]
fn a_killed_run_is_continued_by_the_next() {
    let home = tempfile::tempdir().unwrap();
    let (hub, options) = with_hub(home.path());
    let contents = gguf(3000);
    hub.put(REPO, "m.gguf", &contents);
    let blobs = options.hub.cache_dir.join("models--ada--tiny/blobs");
    fs::create_dir_all(&blobs).unwrap();
    let part = blobs.join(format!("{}.part", sha256(&contents)));
    fs::write(&part, &contents[..1000]).unwrap();

    let resolved = resolve_text("hf:ada/tiny/m.gguf", &options).unwrap();
    assert_eq!(fs::read(&resolved.path).unwrap(), contents);
    assert_eq!(hub.downloads("m.gguf"), [1000]);
}

#[test]
fn a_whole_but_unnamed_part_does_not_block_the_download() {
    let home = tempfile::tempdir().unwrap();
    let (hub, options) = with_hub(home.path());
    let contents = gguf(3000);
    hub.put(REPO, "m.gguf", &contents);
    let blobs = options.hub.cache_dir.join("models--ada--tiny/blobs");
    fs::create_dir_all(&blobs).unwrap();
    fs::write(blobs.join(format!("{}.part", sha256(&contents))), &contents).unwrap();
    assert_eq!(fs::read(resolve_text("hf:ada/tiny/m.gguf", &options).unwrap().path).unwrap(), contents);
}

#[test]
fn a_damaged_download_is_refused_and_removed() {
    let home = tempfile::tempdir().unwrap();
    let (hub, options) = with_hub(home.path());
    hub.put(REPO, "m.gguf", &gguf(300));
    hub.corrupt(true);
    let error = resolve_text("hf:ada/tiny/m.gguf", &options).unwrap_err();
    assert!(matches!(error, HubError::Checksum { .. }), "{error}");
    assert!(error.to_string().starts_with("ada/tiny/m.gguf: checksum mismatch: expected sha256"), "{error}");
    let left = files_below(&options.hub.cache_dir);
    assert!(
        left.iter().all(|path| fs::metadata(options.hub.cache_dir.join(path)).unwrap().len() < 300),
        "{left:?}"
    );

    hub.corrupt(false);
    assert_eq!(fs::read(resolve_text("hf:ada/tiny/m.gguf", &options).unwrap().path).unwrap(), gguf(300));
}

#[test]
fn offline_uses_the_cache_that_another_program_filled() {
    let home = tempfile::tempdir().unwrap();
    let mut options = options(home.path());
    options.hub.offline = true;
    let repo = options.hub.cache_dir.join("models--ada--tiny");
    let snapshot = repo.join("snapshots").join(COMMIT);
    fs::create_dir_all(&snapshot).unwrap();
    fs::create_dir_all(repo.join("refs")).unwrap();
    fs::write(repo.join("refs/main"), COMMIT).unwrap();
    fs::write(snapshot.join("config.json"), "{}").unwrap();

    let error = resolve_text("hf:ada/tiny", &options).unwrap_err();
    let cache = options.hub.cache_dir.display().to_string();
    insta::assert_snapshot!(text(&error, &[(&cache, "CACHE")]), @r"
    HF_HUB_OFFLINE is set and hf:ada/tiny is not (wholly) in the cache CACHE
    help: unset HF_HUB_OFFLINE to download it, or set HF_HOME to the cache that has it
    ");

    fs::write(snapshot.join("model.safetensors"), "x").unwrap();
    assert_eq!(resolve_text("hf:ada/tiny", &options).unwrap().path, snapshot);
    assert_eq!(resolve_text(&format!("hf:ada/tiny@{COMMIT}"), &options).unwrap().path, snapshot);
}

#[test]
fn refusals_of_the_hub_say_what_to_do() {
    let home = tempfile::tempdir().unwrap();
    let (hub, options) = with_hub(home.path());
    tiny_model(&hub);
    let shown = |reference: &str| {
        text(&resolve_text(reference, &options).unwrap_err(), &[(&hub.endpoint, "https://hub.example")])
    };
    insta::assert_snapshot!(shown("hf:ada/unknown"), @r"
    the Hub refuses hf:ada/unknown: it does not exist, or it is private or gated (status 401)
    help: check the spelling of ada/unknown; for a gated model accept its terms at https://hub.example/ada/unknown and set HF_TOKEN
    ");
    insta::assert_snapshot!(shown("hf:ada/tiny@v9"), @r"
    the Hub refuses hf:ada/tiny@v9: no such repository or revision `v9` (status 404)
    help: look at https://hub.example/ada/tiny
    ");
}

#[test]
fn a_hub_out_of_reach_is_named() {
    let home = tempfile::tempdir().unwrap();
    let options = options(home.path());
    let error = resolve_text("hf:ada/tiny", &options).unwrap_err();
    assert!(matches!(error, HubError::Unreachable { .. }), "{error}");
    insta::assert_snapshot!(
        text(&error, &[(&options.hub.endpoint, "http://hub.example")]), @r"
        http://hub.example cannot be reached: Connection refused
        help: check the network and HTTPS_PROXY, or set HF_ENDPOINT to a mirror of the Hub
        ");
}
