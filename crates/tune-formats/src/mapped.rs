//! Files as memory maps.

use std::fs::File;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use memmap2::Mmap;
use tune_quant::SharedBytes;

use crate::FormatError;

/// What one read maps at a time (Linux, `fault_around_bytes`), and a multiple of every page size in use.
const AROUND: usize = 64 << 10;

/// A file that is mapped as a whole, read-only.
struct MappedFile(Mmap);

impl AsRef<[u8]> for MappedFile {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl SharedBytes for MappedFile {
    /// The pages of the range, whole ones at its ends too: reading a page maps those around it, so that a range whose
    /// neighbour was read before it is larger than itself. What is in use there is mapped again when it is read.
    fn release(&self, range: Range<usize>) {
        #[cfg(target_os = "linux")]
        #[allow(unsafe_code, reason = "memory mapping")]
        {
            let start = range.start / AROUND * AROUND;
            let end = range.end.next_multiple_of(AROUND).min(self.0.len());
            if start < end {
                // SAFETY: a read-only mapping of a file: what is dropped is read from the file again, with the same content.
                // An error leaves the pages where they are.
                let _ = unsafe {
                    self.0.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, start, end - start)
                };
            }
        }
        #[cfg(not(target_os = "linux"))]
        let _ = range;
    }

    /// Reads a byte of each stretch that the system maps at once.
    fn prepare(&self, range: Range<usize>) {
        for at in (range.start / AROUND * AROUND..range.end).step_by(AROUND) {
            std::hint::black_box(self.0[at.max(range.start)]);
        }
    }
}

/// The whole file, read-only, without copying it into memory.
#[allow(unsafe_code, reason = "memory mapping")]
pub(crate) fn map(path: &Path) -> Result<Arc<dyn SharedBytes>, FormatError> {
    let read = |error| FormatError::read(path, error);
    let file = File::open(path).map_err(read)?;
    // An empty map is an error on some systems.
    if file.metadata().map_err(read)?.len() == 0 {
        return Ok(Arc::new(Vec::<u8>::new()));
    }
    // SAFETY: the map is read-only and nothing here writes to a file that it maps. As with every memory-mapped
    // model, another process that truncates the file meanwhile ends this one with a signal.
    let map = unsafe { Mmap::map(&file) }.map_err(read)?;
    Ok(Arc::new(MappedFile(map)))
}
