//! Exports that appear only after they were read back: written in a folder beside the target, verified, then moved out.
//!
//! ```text
//! .NAME.XXXXXX.partial/
//!   lock      locked while the export runs
//!   NAME      the file or folder in the making
//! ```
//!
//! The system drops the lock of a process that ends in whatever way, and the next export to the same target removes what
//! that process has left.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use tempfile::TempDir;
use tune_formats::FormatError;

use crate::ExportError;

const LOCK: &str = "lock";
const SUFFIX: &str = ".partial";
/// What a replaced folder is called on its way out.
const REPLACED: &str = "replaced";

/// A place beside the target, removed with all that is in it when dropped.
pub(crate) struct Staged {
    folder: TempDir,
    place: PathBuf,
    target: PathBuf,
    /// Shows other exports that this one is alive.
    _lock: File,
}

impl Staged {
    /// Prepares to write `needed` bytes to a file that will be `target`.
    pub(crate) fn file(target: &Path, needed: u64) -> Result<Self, ExportError> {
        if target.is_dir() {
            let reason = "it is a directory, and the export is a file".to_owned();
            return Err(ExportError::InTheWay { path: target.to_owned(), reason });
        }
        Self::new(target, needed)
    }

    /// Prepares to write `needed` bytes to a folder that will be `target`. A folder with files in it may be there
    /// only if `replace` says so.
    pub(crate) fn folder(target: &Path, needed: u64, replace: bool) -> Result<Self, ExportError> {
        let reason = match fs::read_dir(target) {
            Ok(mut entries) => entries.next().filter(|_| !replace).map(|_| "the folder is not empty"),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(_) => Some("it is not a folder"),
        };
        if let Some(reason) = reason {
            return Err(ExportError::InTheWay { path: target.to_owned(), reason: reason.to_owned() });
        }
        let staged = Self::new(target, needed)?;
        fs::create_dir(&staged.place).map_err(|error| ExportError::write(target, error))?;
        Ok(staged)
    }

    fn new(target: &Path, needed: u64) -> Result<Self, ExportError> {
        let directory = directory_of(target);
        fs::create_dir_all(directory).map_err(|error| ExportError::write(directory, error))?;
        let name = target.file_name().unwrap_or_default();
        clear_leftovers(directory, name);
        check_space(directory, needed)?;
        let write = |error| ExportError::write(target, error);
        let folder = tempfile::Builder::new()
            .prefix(&prefix(name))
            .suffix(SUFFIX)
            .tempdir_in(directory)
            .map_err(write)?;
        let lock = File::create(folder.path().join(LOCK)).map_err(write)?;
        // Where files cannot be locked, nothing that is left can be told from what is being written.
        let _ = lock.try_lock();
        Ok(Self { place: folder.path().join(name), folder, target: target.to_owned(), _lock: lock })
    }

    /// Where to write.
    pub(crate) fn path(&self) -> &Path {
        &self.place
    }

    /// Puts the export in place of whatever file was there.
    pub(crate) fn publish(self) -> Result<(), ExportError> {
        let write = |error| ExportError::write(&self.target, error);
        if self.place.is_dir() && self.target.is_dir() {
            replace_folder(&self.place, &self.target, &self.folder.path().join(REPLACED)).map_err(write)?;
        } else {
            fs::rename(&self.place, &self.target).map_err(write)?;
        }
        sync(directory_of(&self.target)).map_err(write)?;
        // What it still holds is the export that was replaced.
        self.folder.close().map_err(write)
    }
}

/// Removes what exports to `name` have left that ended before they were done.
fn clear_leftovers(directory: &Path, name: &OsStr) {
    let prefix = prefix(name);
    let of_this_target = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().as_encoded_bytes();
        name.starts_with(prefix.as_encoded_bytes()) && name.ends_with(SUFFIX.as_bytes())
    };
    let Ok(entries) = fs::read_dir(directory) else { return };
    for leftover in entries.flatten().map(|entry| entry.path()).filter(of_this_target) {
        let Ok(lock) = File::open(leftover.join(LOCK)) else { continue };
        if lock.try_lock().is_ok() {
            // It ended between taking the old folder away and putting the new one there.
            let _ = fs::rename(leftover.join(REPLACED), directory.join(name));
            // What cannot be removed is in nobody's way; its name tells what it is.
            let _ = fs::remove_dir_all(&leftover);
        }
    }
}

fn prefix(name: &OsStr) -> OsString {
    let mut prefix = OsString::from(".");
    prefix.push(name);
    prefix.push(".");
    prefix
}

/// Moves the folder `place` to `target`, and what is there to `replaced`.
fn replace_folder(place: &Path, target: &Path, replaced: &Path) -> io::Result<()> {
    #[cfg(target_os = "linux")]
    {
        use rustix::fs::{CWD, RenameFlags, renameat_with};
        // In one step, where the file system can.
        if renameat_with(CWD, place, CWD, target, RenameFlags::EXCHANGE).is_ok() {
            return Ok(());
        }
    }
    fs::rename(target, replaced)?;
    fs::rename(place, target).inspect_err(|_| {
        let _ = fs::rename(replaced, target); // the first error is the one to report
    })
}

/// Writes a small file beside an export: temporary file, sync, rename.
pub(crate) fn write_bytes(target: &Path, bytes: &[u8]) -> Result<(), ExportError> {
    use std::io::Write;
    let write = |error| ExportError::write(target, error);
    let mut file = tempfile::NamedTempFile::new_in(directory_of(target)).map_err(write)?;
    file.write_all(bytes).map_err(write)?;
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        file.as_file().set_permissions(fs::Permissions::from_mode(0o644)).map_err(write)?;
    }
    file.as_file().sync_all().map_err(write)?;
    file.persist(target).map_err(|error| write(error.error))?;
    sync(directory_of(target)).map_err(write)
}

/// Bytes of a file, or of all files in a folder.
pub(crate) fn size_of(path: &Path) -> Result<u64, ExportError> {
    let read = |source| FormatError::Read { path: path.to_owned(), source };
    let metadata = fs::metadata(path).map_err(read)?;
    if !metadata.is_dir() {
        return Ok(metadata.len());
    }
    let mut size = 0;
    for entry in fs::read_dir(path).map_err(read)? {
        size += entry.and_then(|entry| entry.metadata()).map_err(read)?.len();
    }
    Ok(size)
}

/// The directory that holds `path`.
pub(crate) fn directory_of(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn check_space(directory: &Path, needed: u64) -> Result<(), ExportError> {
    let available = fs4::available_space(directory).map_err(|error| ExportError::write(directory, error))?;
    if available < needed {
        return Err(ExportError::Space { path: directory.to_owned(), needed, available });
    }
    Ok(())
}

/// A rename is durable once its directory is. Only Unix can open a directory to sync it.
fn sync(directory: &Path) -> io::Result<()> {
    if cfg!(unix) { File::open(directory)?.sync_all() } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(directory: &Path) -> Vec<OsString> {
        fs::read_dir(directory).expect("listed").map(|entry| entry.expect("entry").file_name()).collect()
    }

    #[test]
    fn nothing_is_left_of_what_was_not_published() -> Result<(), ExportError> {
        let dir = tempfile::tempdir().expect("temporary directory");
        let target = dir.path().join("x.gguf");
        fs::write(&target, "old").expect("written");
        let staged = Staged::file(&target, 3)?;
        fs::write(staged.path(), "new").expect("written");
        drop(staged);
        assert_eq!(names(dir.path()), ["x.gguf"]);
        let staged = Staged::file(&target, 3)?;
        fs::write(staged.path(), "new").expect("written");
        staged.publish()?;
        assert_eq!(names(dir.path()), ["x.gguf"]);
        assert_eq!(fs::read(&target).expect("read"), b"new");
        Ok(())
    }

    #[test]
    fn folders_are_replaced_only_where_that_is_asked_for() -> Result<(), ExportError> {
        let dir = tempfile::tempdir().expect("temporary directory");
        let target = dir.path().join("model");
        fs::create_dir(&target).expect("created");
        let staged = Staged::folder(&target, 1, false)?;
        fs::write(staged.path().join("a"), "1").expect("written");
        staged.publish()?;
        assert_eq!(names(&target), ["a"]);
        assert!(matches!(Staged::folder(&target, 1, false), Err(ExportError::InTheWay { .. })));
        let staged = Staged::folder(&target, 1, true)?;
        fs::write(staged.path().join("b"), "1").expect("written");
        assert_eq!(names(&target), ["a"]);
        staged.publish()?;
        assert_eq!((names(&target), names(dir.path())), (vec!["b".into()], vec!["model".into()]));
        assert!(matches!(Staged::file(&target, 1), Err(ExportError::InTheWay { .. })));
        Ok(())
    }

    #[test]
    fn a_full_disk_is_noticed_before_writing() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let error = Staged::file(&dir.path().join("x"), u64::MAX).err().expect("no disk is that large");
        assert!(matches!(error, ExportError::Space { needed: u64::MAX, .. }), "{error}");
        assert_eq!(names(dir.path()).len(), 0);
    }
}
