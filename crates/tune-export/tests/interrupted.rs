//! Exports that do not come to their end: killed in mid-write, or on a disk that fills up.
//!
//! Each runs in a process of its own, this test's binary once more. An environment variable tells it what to write and
//! what shall happen.
#![cfg(unix)]

mod tiny;

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use miette::Diagnostic;
use tune_export::{ExportEvent, ExportOptions, ExportRequest, ExportTarget, export};
use tune_formats::gguf::GgufFile;
use tune_formats::peft;

use tiny::{adapter, base, tempdir};

/// `TARGET HAPPENING OUT`
const TASK: &str = "TUNE_TEST_EXPORT";
const TARGETS: [&str; 5] = ["gguf:f16", "gguf:q4_0", "gguf-lora", "safetensors", "peft"];
/// What is left beside a finished export of any target.
const EXPORTED: [&str; 2] = ["exported; left: Modelfile tuned", "exported; left: tuned"];

/// The second process. Without a task it has nothing to do.
#[test]
fn second_process() {
    let Ok(task) = std::env::var(TASK) else { return };
    let [target, happening, out] = task.splitn(3, ' ').collect::<Vec<_>>()[..] else { panic!("{task}") };
    let target: ExportTarget = target.parse().expect("a target");
    let (base, out) = (base("llama-tied"), Path::new(out));
    let adapter = adapter(&base.config);
    let options = ExportOptions { replace_folder: true, ..ExportOptions::default() };
    let request = ExportRequest { base: &base, adapter: &adapter, target, out, options };
    let folder = out.parent().expect("a folder");
    let result = export(&request, &mut |event| match (happening, event) {
        ("wait", ExportEvent::Wrote { done, tensors }) if 2 * done >= tensors => {
            println!("\nhalf written");
            loop {
                std::thread::park();
            }
        }
        ("fill", ExportEvent::Started { .. }) => fill(folder),
        _ => {}
    });
    let result = match result {
        Ok(_) => "exported".to_owned(),
        Err(error) => format!("{error}; help: {}", error.help().expect("help")),
    };
    println!("\nresult {result}; left: {}", names(folder).join(" "));
}

#[test]
fn a_killed_export_leaves_the_old_one_and_the_next_clears_up() {
    for target in TARGETS {
        let dir = tempdir();
        let out = dir.path().join("tuned");
        for there_before in [false, true] {
            if there_before {
                exports(target, &out);
            }
            let contents = listed(&out);
            end(waiting(target, &out));
            assert_eq!(listed(&out), contents, "{target}: half an export under the final name");
            assert_eq!(leftovers(dir.path()), 1, "{target}: {:?}", names(dir.path()));
        }
        // a neighbour at work keeps its place; what the dead have left goes
        let neighbour = waiting(target, &out);
        let said = second_process_in(Command::new("env"), target, "go", &out);
        assert!(said.starts_with("exported"), "{target}: {said}");
        assert_eq!(leftovers(dir.path()), 1, "{target}: {:?}", names(dir.path()));
        end(neighbour);
        exports(target, &out);
        let opens = match target {
            "peft" => peft::read(&out).is_ok(),
            "gguf-lora" => GgufFile::open(&out).is_ok(),
            _ => tune_formats::open(&out).is_ok(),
        };
        assert!(opens, "{target}");
    }
}

#[test]
fn a_file_larger_than_allowed_leaves_nothing() {
    for target in TARGETS {
        let dir = tempdir();
        let out = dir.path().join("tuned");
        let mut limited = Command::new("sh");
        limited.args(["-c", "trap '' XFSZ; ulimit -f 16; exec \"$0\" \"$@\""]);
        let said = second_process_in(limited, target, "go", &out);
        let want =
            format!("{} would be larger than any file may be here; help: nothing was left", out.display());
        assert!(said.starts_with(&want) && said.ends_with("left: "), "{target}: {said}");
    }
}

/// On a file system of its own, for which the system has to grant a user and a mount namespace. Where it grants none,
/// the test above is all there is.
#[test]
fn a_full_disk_is_told_before_and_during_and_leaves_nothing() {
    let dir = tempdir();
    let disk = |size: &str| {
        let mut on_disk = Command::new("unshare");
        on_disk.args(["--user", "--map-root-user", "--mount", "sh", "-c"]);
        on_disk.arg("mount -t tmpfs -o size=$SIZE none \"$DISK\" && exec \"$0\" \"$@\"");
        on_disk.env("SIZE", size).env("DISK", dir.path());
        on_disk
    };
    if !disk("64m").arg("true").status().is_ok_and(|status| status.success()) {
        eprintln!("not tested: this system lets no test mount a file system");
        return;
    }
    let out = dir.path().join("tuned");
    for target in TARGETS {
        let said = second_process_in(disk("48k"), target, "go", &out);
        let told =
            said.starts_with("the export needs ") && said.contains(&format!("{} has ", dir.path().display()));
        assert!(told && said.ends_with("left: "), "{target}: {said}");

        let said = second_process_in(disk("8m"), target, "fill", &out);
        let want =
            format!("the disk filled up while {} was being written; help: nothing was left", out.display());
        assert!(said.starts_with(&want) && said.ends_with("left: filler"), "{target}: {said}");
    }
}

/// Takes all that is free.
fn fill(folder: &Path) {
    let mut filler = fs::File::create(folder.join("filler")).expect("created");
    while filler.write_all(&[0; 4096]).is_ok() {}
}

fn exports(target: &str, out: &Path) {
    let said = second_process_in(Command::new("env"), target, "go", out);
    assert!(EXPORTED.contains(&said.as_str()), "{target}: {said}");
}

/// An export that stands still half-way.
fn waiting(target: &str, out: &Path) -> Child {
    let mut command = second_process_command(Command::new("env"), target, "wait", out);
    let mut child = command.stdout(Stdio::piped()).spawn().expect("started");
    let mut lines = BufReader::new(child.stdout.take().expect("a pipe")).lines();
    assert!(
        lines.any(|line| line.expect("text") == "half written"),
        "{target} ended before it was half written"
    );
    child
}

/// `kill -9`
fn end(mut child: Child) {
    child.kill().expect("killed");
    child.wait().expect("ended");
}

/// What the second process says of its export.
fn second_process_in(wrapper: Command, target: &str, happening: &str, out: &Path) -> String {
    let output = second_process_command(wrapper, target, happening, out).output().expect("started");
    let text = String::from_utf8_lossy(&output.stdout);
    let result = text.lines().find_map(|line| line.strip_prefix("result "));
    result.unwrap_or_else(|| panic!("{target}: {output:?}")).to_owned()
}

fn second_process_command(mut wrapper: Command, target: &str, happening: &str, out: &Path) -> Command {
    wrapper.arg(std::env::current_exe().expect("this test"));
    wrapper.args(["--exact", "second_process", "--nocapture"]);
    wrapper.env(TASK, format!("{target} {happening} {}", out.display()));
    wrapper
}

fn leftovers(folder: &Path) -> usize {
    names(folder).iter().filter(|name| name.ends_with(".partial")).count()
}

/// File or folder: names and contents, or nothing.
fn listed(path: &Path) -> Vec<(String, Vec<u8>)> {
    if !path.is_dir() {
        return fs::read(path).map(|bytes| (String::new(), bytes)).into_iter().collect();
    }
    names(path).into_iter().map(|name| (name.clone(), fs::read(path.join(name)).expect("read"))).collect()
}

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).expect("listed");
    let mut names: Vec<String> =
        entries.map(|entry| entry.expect("entry").file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}
