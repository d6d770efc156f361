//! Files that appear whole or not at all: temporary file beside the target, fsync, rename.
//!
//! A thread of its own writes, so that what comes next is computed meanwhile, and the disk begins at once, so that little is
//! left for the fsync. At most three pieces are in memory: one being filled, one waiting, one being written.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread::JoinHandle;

use tempfile::{Builder, NamedTempFile};
use tune_quant::ByteView;

use crate::FormatError;

/// Small pieces are written together.
const PIECE: usize = 1 << 20;

/// A file that replaces its target when committed and vanishes when dropped before.
pub(crate) struct AtomicFile {
    target: PathBuf,
    /// Size of the finished file, for messages.
    size: u64,
    /// What is not on its way yet.
    buffer: Vec<u8>,
    state: State,
}

enum State {
    /// Nothing is written yet.
    New(NamedTempFile),
    Writing(Writer),
    /// A write failed.
    Failed,
}

/// The thread that writes.
struct Writer {
    pieces: SyncSender<ByteView>,
    /// What it has written of files: to unmap their pages takes time that it needs for writing.
    written: Receiver<ByteView>,
    thread: JoinHandle<io::Result<NamedTempFile>>,
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
        Ok(Self { target: target.to_owned(), size, buffer: Vec::new(), state: State::New(file) })
    }

    /// Appends a copy of `bytes`.
    pub(crate) fn write(&mut self, mut bytes: &[u8]) -> Result<(), FormatError> {
        while !bytes.is_empty() {
            let (now, later) = bytes.split_at(bytes.len().min(PIECE - self.buffer.len()));
            self.buffer.extend_from_slice(now);
            if self.buffer.len() == PIECE {
                self.send_buffer()?;
            }
            bytes = later;
        }
        Ok(())
    }

    /// Appends `bytes`, without a copy where they are many. Their pages are released once they are written.
    pub(crate) fn append(&mut self, bytes: ByteView) -> Result<(), FormatError> {
        if bytes.len() < PIECE / 4 {
            self.write(&bytes)?;
            bytes.release();
            return Ok(());
        }
        self.send_buffer()?;
        self.send(bytes)
    }

    /// Makes the file durable and gives it its name. An error of an earlier write may come only now.
    pub(crate) fn commit(mut self) -> Result<(), FormatError> {
        let mut file = match std::mem::replace(&mut self.state, State::Failed) {
            State::New(file) => file,
            State::Writing(writer) => self.result_of(writer)?,
            State::Failed => return Err(self.error(io::Error::other("an earlier write failed"))),
        };
        let written = file.write_all(&self.buffer).and_then(|()| file.as_file().sync_all());
        written.map_err(|error| self.error(error))?;
        file.persist(&self.target).map_err(|error| self.error(error.error))?;
        sync_directory(directory_of(&self.target)).map_err(|error| self.error(error))
    }

    fn send_buffer(&mut self) -> Result<(), FormatError> {
        match std::mem::take(&mut self.buffer) {
            empty if empty.is_empty() => Ok(()),
            bytes => self.send(bytes.into()),
        }
    }

    fn send(&mut self, bytes: ByteView) -> Result<(), FormatError> {
        let writer = match std::mem::replace(&mut self.state, State::Failed) {
            State::New(file) => {
                let (pieces, to_write) = sync_channel(1);
                let (done, written) = channel();
                let thread = std::thread::spawn(move || write_pieces(file, &to_write, &done));
                Writer { pieces, written, thread }
            }
            State::Writing(writer) => writer,
            State::Failed => return Err(self.error(io::Error::other("an earlier write failed"))),
        };
        writer.release_written();
        if writer.pieces.send(bytes).is_ok() {
            self.state = State::Writing(writer);
            return Ok(());
        }
        // It ends before its sender only when a write fails.
        self.result_of(writer).map(drop)
    }

    fn result_of(&self, writer: Writer) -> Result<NamedTempFile, FormatError> {
        writer.finish().map_err(|error| self.error(error))
    }

    fn error(&self, error: io::Error) -> FormatError {
        FormatError::write(&self.target, self.size, error)
    }
}

impl Writer {
    fn release_written(&self) {
        self.written.try_iter().for_each(|piece| piece.release());
    }

    /// Waits until everything is written.
    fn finish(self) -> io::Result<NamedTempFile> {
        drop(self.pieces);
        self.written.iter().for_each(|piece| piece.release());
        self.thread.join().unwrap_or_else(|_| Err(io::Error::other("the writing thread ended")))
    }
}

impl Drop for AtomicFile {
    /// The thread must not outlive it: the temporary file goes with the thread.
    fn drop(&mut self) {
        if let State::Writing(writer) = std::mem::replace(&mut self.state, State::Failed) {
            let _ = writer.finish();
        }
    }
}

/// Writes a small file whole.
pub(crate) fn write(target: &Path, bytes: &[u8]) -> Result<(), FormatError> {
    let mut file = AtomicFile::create(target, bytes.len() as u64)?;
    file.write(bytes)?;
    file.commit()
}

fn write_pieces(
    mut file: NamedTempFile,
    pieces: &Receiver<ByteView>,
    done: &Sender<ByteView>,
) -> io::Result<NamedTempFile> {
    let mut at = 0;
    for piece in pieces {
        file.write_all(&piece)?;
        begin_writing_back(file.as_file(), at, piece.len());
        at += piece.len() as u64;
        if piece.is_shared() {
            // the receiver lives as long as the sender of pieces
            let _ = done.send(piece);
        }
    }
    Ok(file)
}

/// Lets the disk begin with these bytes; systems that cannot be told do it later.
fn begin_writing_back(file: &File, at: u64, len: usize) {
    #[cfg(target_os = "linux")]
    #[allow(unsafe_code, reason = "no crate in use has it")]
    {
        use std::os::fd::AsRawFd;
        let (Ok(at), Ok(len)) = (i64::try_from(at), i64::try_from(len)) else { return };
        // SAFETY: the descriptor is that of an open file; nothing else is passed. An error changes nothing.
        let _ = unsafe { libc::sync_file_range(file.as_raw_fd(), at, len, libc::SYNC_FILE_RANGE_WRITE) };
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (file, at, len);
}

fn directory_of(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// A rename is durable once its directory is. Only Unix can open a directory to sync it.
fn sync_directory(directory: &Path) -> io::Result<()> {
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
        next.append(vec![0; 2 * PIECE].into()).expect("written");
        drop(next);
        assert_eq!(fs::read(&target).expect("kept"), b"old");
        assert_eq!(fs::read_dir(dir.path().join("deep")).expect("listed").count(), 1);
        write(&target, b"new").expect("replaced");
        assert_eq!(fs::read(&target).expect("replaced"), b"new");
    }

    #[test]
    fn pieces_of_all_sizes_come_in_order() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let target = dir.path().join("file");
        let mut file = AtomicFile::create(&target, 0).expect("created");
        let mut wanted = Vec::new();
        for (i, len) in
            [3, PIECE, 1, 3 * PIECE + 7, PIECE / 4, 5, PIECE / 4 - 1, 0, 9].into_iter().enumerate()
        {
            let piece: Vec<u8> = (0..len).map(|j| (i * 31 + j * 7 + j / 251) as u8).collect();
            wanted.extend_from_slice(&piece);
            if i % 2 == 0 { file.write(&piece) } else { file.append(piece.into()) }.expect("written");
        }
        file.commit().expect("committed");
        assert!(fs::read(&target).expect("read") == wanted);
    }
}
