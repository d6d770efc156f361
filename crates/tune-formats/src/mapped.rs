//! Files as memory maps.

use std::fs::File;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use memmap2::Mmap;
use tune_quant::SharedBytes;

use crate::FormatError;

/// The whole file, read-only, without copying it into memory.
#[allow(unsafe_code, reason = "memory mapping")]
pub(crate) fn map(path: &Path) -> Result<Arc<dyn SharedBytes>, FormatError> {
    let read = |error| FormatError::read(path, error);
    let file = File::open(path).map_err(read)?;
    // An empty map is an error on some systems.
    if file.metadata().map_err(read)?.len() == 0 {
        return Ok(Arc::new(Vec::new()));
    }
    // SAFETY: the map is read-only and nothing here writes to a file that it maps. As with every memory-mapped
    // model, another process that truncates the file meanwhile ends this one with a signal.
    let map = unsafe { Mmap::map(&file) }.map_err(read)?;
    Ok(Arc::new(MappedFile(map)))
}

struct MappedFile(Mmap);

impl AsRef<[u8]> for MappedFile {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl SharedBytes for MappedFile {
    #[cfg(unix)]
    #[allow(unsafe_code, reason = "memory mapping")]
    fn release(&self, range: Range<usize>) {
        use memmap2::UncheckedAdvice::DontNeed;
        // SAFETY: the map is shared and read-only, so there are no changes to lose, and whoever reads the pages later
        // or at this moment gets them from the file again.
        let released = unsafe { self.0.unchecked_advise_range(DontNeed, range.start, range.len()) };
        // Only memory that could have been free is at stake.
        let _ = released;
    }
}
