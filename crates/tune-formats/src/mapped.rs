//! Files as memory maps.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use memmap2::Mmap;

use crate::FormatError;

/// Bytes of a file, shared by everything that is read from it.
pub(crate) type SharedBytes = Arc<dyn AsRef<[u8]> + Send + Sync>;

/// The whole file, read-only, without copying it into memory.
#[allow(unsafe_code, reason = "memory mapping")]
pub(crate) fn map(path: &Path) -> Result<SharedBytes, FormatError> {
    let read = |error| FormatError::read(path, error);
    let file = File::open(path).map_err(read)?;
    // An empty map is an error on some systems.
    if file.metadata().map_err(read)?.len() == 0 {
        return Ok(Arc::new(Vec::new()));
    }
    // SAFETY: the map is read-only and nothing here writes to a file that it maps. As with every memory-mapped
    // model, another process that truncates the file meanwhile ends this one with a signal.
    let map = unsafe { Mmap::map(&file) }.map_err(read)?;
    Ok(Arc::new(map))
}
