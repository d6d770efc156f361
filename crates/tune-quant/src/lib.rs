//! Block codecs: stored quantised bytes to `f32` and back. No I/O, no threads of its own, no device.
//!
//! [`BlockType`] names every storage type of a weight and knows its block geometry; one module per family
//! holds the scalar reference decoder, `simd` the decoders that run, to `f32` or to `bf16`, and `encode` the encoders.
//! [`StoredMatrix`] is a weight exactly as it lies on disk, read row by row without ever being decoded as a whole.

mod block_type;
mod codebook_quants;
mod encode;
mod float;
mod k_quants;
mod legacy_quants;
pub mod nf4;
mod simd;
mod stored;

pub use block_type::BlockType;
pub use encode::Grid;
pub use float::largest_magnitude;
pub use nf4::Nf4;
pub use simd::{Decoded, InstructionSet};
pub use stored::{ByteView, RowOrder, SharedBytes, Storage, StoredColumns, StoredMatrix};
