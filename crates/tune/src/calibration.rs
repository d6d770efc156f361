//! Which constants of the memory plan hold on this machine: those that `tune bench memory` has stored, else the shipped ones.

use std::path::PathBuf;

use miette::IntoDiagnostic;
use serde::{Deserialize, Serialize};
use tune_plan::{Calibration, FLEX};

use crate::commands::bench::host::Host;
use crate::exit::UsageError;

/// What was measured, and for what it holds.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stored {
    /// What it holds for. Another backend, version, processor or number of threads has other constants.
    pub holds_for: HoldsFor,
    /// The constants.
    pub constants: Calibration,
}

/// What constants depend on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HoldsFor {
    /// The backend.
    pub backend: String,
    /// This program's version and commit.
    pub version: String,
    /// The processor.
    pub processor: String,
    /// Threads that compute.
    pub threads: u64,
}

impl HoldsFor {
    /// This program on this machine.
    pub fn here() -> Self {
        let host = Host::new();
        Self {
            backend: "flex".into(),
            version: format!("{} {}", host.version, host.commit),
            processor: host.machine.cpu,
            threads: host.threads as u64,
        }
    }
}

/// `memory.json` in the cache folder.
pub fn path() -> PathBuf {
    tune_hub::Options::from_env(|name| std::env::var_os(name)).cache_dir.join("memory.json")
}

/// Keeps constants for later plans, and returns where.
pub fn store(stored: &Stored) -> miette::Result<PathBuf> {
    let path = path();
    let json = serde_json::to_string_pretty(stored).into_diagnostic()? + "\n";
    let write = || {
        let folder = path.parent().unwrap_or(std::path::Path::new("."));
        std::fs::create_dir_all(folder)?;
        // Beside its name first: the name holds either the old or the new constants.
        let mut file = tempfile::NamedTempFile::new_in(folder)?;
        std::io::Write::write_all(&mut file, json.as_bytes())?;
        file.persist(&path)?;
        Ok::<_, std::io::Error>(())
    };
    write().map_err(|error| {
        let help = "choose another cache folder with TUNE_CACHE, or only measure with --dry-run";
        UsageError::report(format!("cannot write {}: {error}", path.display()), help)
    })?;
    Ok(path)
}

/// The constants to plan with.
pub fn current() -> Calibration {
    choose(&path(), &HoldsFor::here()).0
}

/// Why constants that were measured here are not used, if so.
pub fn note() -> Option<String> {
    choose(&path(), &HoldsFor::here()).1
}

/// Those that come with the program, for so many threads of this processor.
fn shipped(threads: u64) -> Calibration {
    use tune_kernels::bf16::{packed_bytes, widened_bytes};
    Calibration {
        threads,
        packed_bytes: packed_bytes() as u64,
        widened_bytes: widened_bytes() as u64,
        ..FLEX
    }
}

/// The constants to plan with, and why stored ones are not used if there are any.
pub fn choose(path: &std::path::Path, here: &HoldsFor) -> (Calibration, Option<String>) {
    let shipped = shipped(here.threads);
    let Ok(text) = std::fs::read_to_string(path) else { return (shipped, None) };
    match serde_json::from_str::<Stored>(&text) {
        Ok(stored) if stored.holds_for == *here => {
            (Calibration { measured_here: true, ..stored.constants }, None)
        }
        Ok(stored) => {
            let differs = [
                ("backend", stored.holds_for.backend != here.backend),
                ("version", stored.holds_for.version != here.version),
                ("processor", stored.holds_for.processor != here.processor),
                ("number of threads", stored.holds_for.threads != here.threads),
            ];
            let differs: Vec<_> =
                differs.iter().filter_map(|(what, differs)| differs.then_some(*what)).collect();
            let note = format!(
                "the memory constants measured here are for another {}, and the shipped ones are used: tune bench memory",
                differs.join(" and ")
            );
            (shipped, Some(note))
        }
        Err(_) => {
            (shipped, Some(format!("{} cannot be read: tune bench memory writes it anew", path.display())))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn here() -> HoldsFor {
        HoldsFor { backend: "flex".into(), version: "1".into(), processor: "a".into(), threads: 3 }
    }

    #[test]
    fn only_constants_of_this_program_on_this_machine_are_used() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("memory.json");
        assert_eq!(choose(&path, &here()), (shipped(3), None));

        let constants = Calibration { process_bytes: 1, ..shipped(3) };
        let stored = Stored { holds_for: here(), constants };
        std::fs::write(&path, serde_json::to_string(&stored).unwrap()).unwrap();
        assert_eq!(choose(&path, &here()), (Calibration { measured_here: true, ..constants }, None));

        let (used, note) = choose(&path, &HoldsFor { version: "2".into(), threads: 4, ..here() });
        assert_eq!(used, shipped(4));
        assert!(note.unwrap().contains("another version and number of threads"));

        std::fs::write(&path, "{").unwrap();
        let (used, note) = choose(&path, &here());
        assert_eq!(used, shipped(3));
        assert!(note.unwrap().contains("cannot be read"));
    }
}
