//! Files that appear whole or not at all: temporary file beside the target, fsync, rename.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use tempfile::{Builder, NamedTempFile};

use crate::FormatError;

/// A file that replaces its target when committed and vanishes when dropped before.
pub(crate) struct AtomicFile {
    target: PathBuf,
    /// Size of the finished file, for messages.
    size: u64,
    file: BufWriter<NamedTempFile>,
}

impl AtomicFile {
    /// Starts a file of `size` bytes, creating the directories above it.
    pub(crate) fn create(target: &Path, size: u64) -> Result<Self, FormatError> {
        let directory = directory_of(target);
        fs::create_dir_all(directory).map_err(|error| FormatError::write(target, size, error))?;
        let mut builder = Builder::new();
        builder.prefix(".tune-").suffix(".tmp");
        #[cfg(unix)]
        {
            // Temporary files are private by default; the finished one follows the umask like any other.
            use std::os::unix::fs::PermissionsExt;
            builder.permissions(fs::Permissions::from_mode(0o666));
        }
        let file = builder.tempfile_in(directory).map_err(|error| FormatError::write(target, size, error))?;
        Ok(Self { target: target.to_owned(), size, file: BufWriter::with_capacity(1 << 20, file) })
    }

    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<(), FormatError> {
        self.file.write_all(bytes).map_err(|error| FormatError::write(&self.target, self.size, error))
    }

    /// Makes the file durable and gives it its name.
    pub(crate) fn commit(self) -> Result<(), FormatError> {
        let Self { target, size, file } = self;
        let write = |error| FormatError::write(&target, size, error);
        let file = file.into_inner().map_err(|error| write(error.into_error()))?;
        file.as_file().sync_all().map_err(write)?;
        file.persist(&target).map_err(|error| write(error.error))?;
        sync_directory(directory_of(&target)).map_err(write)
    }
}

/// Writes a small file whole.
pub(crate) fn write(target: &Path, bytes: &[u8]) -> Result<(), FormatError> {
    let mut file = AtomicFile::create(target, bytes.len() as u64)?;
    file.write(bytes)?;
    file.commit()
}

fn directory_of(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// A rename is durable once its directory is. Only Unix can open a directory to sync it.
fn sync_directory(directory: &Path) -> std::io::Result<()> {
    if cfg!(unix) { File::open(directory)?.sync_all() } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dropped_file_leaves_the_old_one_alone() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let target = dir.path().join("deep/file");
        write(&target, b"old").expect("written");
        let mut next = AtomicFile::create(&target, 3).expect("created");
        next.write(b"new").expect("written");
        drop(next);
        assert_eq!(fs::read(&target).expect("kept"), b"old");
        assert_eq!(fs::read_dir(dir.path().join("deep")).expect("listed").count(), 1);
        write(&target, b"new").expect("replaced");
        assert_eq!(fs::read(&target).expect("replaced"), b"new");
    }
}
