//! Training arithmetic with `bf16` factors and `f32` sums.
//!
//! Weights keep their stored form and are decoded to `bf16` on their way into a product; activations between
//! operations are `bf16`, the residual stream, norms, softmax, losses and every gradient of a parameter are `f32`.
//! What could be recomputed by one pass over memory is not saved. Each operation does what a block of a decoder
//! needs in one pass, and its reference is the same in the plain operations of this crate.

mod attention;
mod convert;
pub(crate) mod cross_entropy;
mod product;
mod projection;
mod tile;

pub use attention::self_attention;
pub use product::{packed_bytes, widened_bytes};
pub use projection::{Input, Layer, project, reference as projection_reference};
pub use tile::{has_tiles, is_fast};
