//! Memory of this process: an allocator that keeps and counts large blocks ([`Blocks`]), what is resident and was at
//! most ([`peak_resident_bytes`]), and what the machine and its control groups leave ([`available_bytes`]).

mod blocks;
mod limits;
mod resident;

pub use blocks::{Blocks, blocks_in_use, end_phase, phase_peaks};
pub use limits::{available_bytes, total_bytes};
pub use resident::{peak_resident_bytes, resident_bytes, return_free_memory};
