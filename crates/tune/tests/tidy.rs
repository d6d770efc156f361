//! Rules of the code base that the compiler does not check.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn files(folder: &Path, extension: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).expect("readable folder").map(|entry| entry.expect("entry").path()) {
        if entry.is_dir() {
            found.extend(files(&entry, extension));
        } else if entry.extension().is_some_and(|e| e == extension) {
            found.push(entry);
        }
    }
    found.sort();
    found
}

/// The `arrows` block of ARCHITECTURE.md.
fn documented_arrows() -> BTreeMap<String, BTreeSet<String>> {
    let text = fs::read_to_string(root().join("ARCHITECTURE.md")).expect("ARCHITECTURE.md");
    let block =
        text.split("```arrows\n").nth(1).and_then(|rest| rest.split("```").next()).expect("arrows block");
    let line = |line: &str| {
        let (name, uses) = line.split_once(':').expect("crate: dependencies");
        (name.to_string(), uses.split_whitespace().map(String::from).collect())
    };
    block.lines().map(line).collect()
}

/// The same from cargo, normal dependencies only.
fn actual_arrows() -> BTreeMap<String, BTreeSet<String>> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--no-deps", "--offline"])
        .current_dir(root())
        .output()
        .expect("cargo metadata runs");
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).expect("cargo metadata is JSON");
    let text = |value: &serde_json::Value| value.as_str().expect("a string").to_string();
    let uses = |package: &serde_json::Value| {
        let dependencies = package["dependencies"].as_array().expect("a list").iter();
        let normal = dependencies.filter(|d| d["kind"].is_null());
        normal.map(|d| text(&d["name"])).filter(|name| name.starts_with("tune")).collect()
    };
    let packages = metadata["packages"].as_array().expect("a list").iter();
    packages.map(|package| (text(&package["name"]), uses(package))).collect()
}

#[test]
fn architecture_names_every_crate_and_every_arrow() {
    assert_eq!(documented_arrows(), actual_arrows());
}

#[test]
fn host_side_crates_do_not_use_burn() {
    for name in ["quant", "formats", "hub", "data", "recipe", "plan", "export"] {
        let manifest =
            fs::read_to_string(root().join(format!("crates/tune-{name}/Cargo.toml"))).expect("manifest");
        assert!(!manifest.contains("burn"), "tune-{name} depends on burn");
    }
}

#[test]
fn libraries_do_not_print() {
    for source in files(&root().join("crates"), "rs") {
        let inside = source.strip_prefix(root().join("crates")).expect("a crate's file").to_path_buf();
        let library = inside.components().nth(1).is_some_and(|part| part.as_os_str() == "src");
        if !library || inside.starts_with("tune/") {
            continue;
        }
        let text = fs::read_to_string(&source).expect("source");
        let code = text.split("#[cfg(test)]").next().unwrap_or_default();
        let prints = ["println!", "eprintln!", "print!(", "eprint!(", "dbg!"];
        let found = code
            .lines()
            .filter(|line| !line.trim_start().starts_with("//"))
            .find(|line| prints.iter().any(|print| line.contains(print)));
        assert_eq!(found, None, "{} prints", inside.display());
    }
}

#[test]
fn only_the_hub_opens_sockets_or_starts_programs() {
    for source in files(&root().join("crates"), "rs") {
        let inside = source.strip_prefix(root().join("crates")).expect("a crate's file").to_path_buf();
        if inside.starts_with("tune-hub") || inside.components().any(|part| part.as_os_str() == "tests") {
            continue;
        }
        // It starts itself again, and nothing else: only a fresh process has a peak of memory of its own.
        if inside == Path::new("tune/src/commands/bench/memory.rs") {
            continue;
        }
        let text = fs::read_to_string(&source).expect("source");
        let text = text.split("#[cfg(test)]").next().unwrap_or_default();
        for forbidden in ["std::net", "TcpStream", "process::Command", "Command::new"] {
            assert!(!text.contains(forbidden), "{} uses {forbidden}", inside.display());
        }
    }
}

#[test]
fn every_crate_inherits_the_workspace_lints() {
    for manifest in files(&root().join("crates"), "toml").iter().filter(|path| path.ends_with("Cargo.toml")) {
        let text = fs::read_to_string(manifest).expect("manifest");
        assert!(text.contains("[lints]\nworkspace = true"), "{} has its own lints", manifest.display());
    }
}

#[test]
fn models_that_are_fetched_by_name_are_planned_by_the_same_name() {
    for entry in tune_hub::catalogue() {
        let alias = &entry.alias;
        let planned = tune_plan::find_in_catalogue(alias).unwrap_or_else(|| panic!("{alias} is not planned"));
        assert_eq!(planned.layout.parameters(), entry.parameters, "{alias}");
        assert_eq!(planned.architecture, entry.architecture, "{alias}");
        assert_eq!(planned.licence, entry.licence, "{alias}");
        for spelling in entry.spellings() {
            assert_eq!(tune_plan::find_in_catalogue(spelling), Some(planned), "{spelling}");
        }
        for source in &entry.sources {
            if let tune_hub::Source::Hub { repository, file: None, .. } = source {
                assert!(planned.repositories.contains(repository), "{alias}: {repository}");
            }
        }
    }
}
