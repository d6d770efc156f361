//! Exports that appear only after they were read back: written beside the target, verified, then renamed.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use tune_formats::FormatError;

use crate::ExportError;

/// A place beside the target, removed when dropped before [`Staged::publish`].
pub(crate) struct Staged {
    place: PathBuf,
    target: PathBuf,
    published: bool,
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
        fs::create_dir(&staged.place).map_err(|error| write_error(&staged.place, error))?;
        Ok(staged)
    }

    fn new(target: &Path, needed: u64) -> Result<Self, ExportError> {
        let directory = directory_of(target);
        fs::create_dir_all(directory).map_err(|error| write_error(directory, error))?;
        check_space(directory, needed)?;
        let mut name = OsString::from(".");
        name.push(target.file_name().unwrap_or_default());
        name.push(format!(".{}.unverified", std::process::id()));
        Ok(Self { place: directory.join(name), target: target.to_owned(), published: false })
    }

    /// Where to write.
    pub(crate) fn path(&self) -> &Path {
        &self.place
    }

    /// Puts the export in place of whatever file was there.
    pub(crate) fn publish(mut self) -> Result<(), ExportError> {
        let write = |error| write_error(&self.target, error);
        if self.place.is_dir() && self.target.is_dir() {
            let replaced = self.place.with_extension("replaced");
            fs::rename(&self.target, &replaced).map_err(write)?;
            if let Err(error) = fs::rename(&self.place, &self.target) {
                let _ = fs::rename(&replaced, &self.target); // the first error is the one to report
                return Err(write(error));
            }
            fs::remove_dir_all(&replaced).map_err(|error| write_error(&replaced, error))?;
        } else {
            fs::rename(&self.place, &self.target).map_err(write)?;
        }
        self.published = true;
        sync(directory_of(&self.target)).map_err(|error| write_error(&self.target, error))
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        if !self.published {
            // Nothing more can be done about a file that cannot be removed; its name tells what it is.
            let _ = if self.place.is_dir() {
                fs::remove_dir_all(&self.place)
            } else {
                fs::remove_file(&self.place)
            };
        }
    }
}

/// Writes a small file beside an export: temporary file, sync, rename.
pub(crate) fn write_bytes(target: &Path, bytes: &[u8]) -> Result<(), ExportError> {
    use std::io::Write;
    let write = |error| write_error(target, error);
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

pub(crate) fn write_error(path: &Path, source: io::Error) -> ExportError {
    ExportError::Write { path: path.to_owned(), source }
}

fn check_space(directory: &Path, needed: u64) -> Result<(), ExportError> {
    let available = fs4::available_space(directory).map_err(|error| write_error(directory, error))?;
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
