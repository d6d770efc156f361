//! Memory planner: how much a run needs, before it runs. Arithmetic only; no device, no tensors, milliseconds.
//!
//! Two answers stand side by side. The *reference* ([`reference`]) is a published table of rules of thumb by
//! method and size. The *estimate* ([`estimate`]) counts the bytes of this run term by term, from the header of
//! the model file. The verdict uses the estimate whenever the model is known.

pub mod advice;
mod answer;
mod cache_type;
mod calibration;
mod catalogue;
mod device;
pub mod disk;
mod estimate;
pub mod gap;
mod generic;
mod inference;
mod layout;
pub mod memory;
mod needs;
pub mod picture;
mod quant;
pub mod reference;
mod shape;
mod size;
mod table;
mod terms;
mod weights;

pub use answer::{Answer, SCHEMA_VERSION};
pub use cache_type::CacheType;
pub use calibration::{Calibration, FLEX};
pub use catalogue::{CatalogueModel, Certainty, catalogue, find as find_in_catalogue, similar_models};
pub use device::{Device, DeviceChoice, DeviceKind, UnknownDevice, device_names, parse_device};
pub use estimate::{Basis, DataFacts, Estimate, MemoryPlan, PhaseBytes, PlanInput, Term, estimate, rough};
pub use generic::{BaseType, Kept, Loss, Trainer, generic, generic_plan};
pub use inference::{
    InferenceEstimate, InferenceInput, InferencePlan, InferenceReference, KnownModel, inference, next_in_size,
};
pub use layout::{
    Attention, AttentionPart, DeltaNet, Experts, ExpertsPart, LayerGroup, Layout, Linear, Mixer, Mlp, Split,
    Values,
};
pub use needs::{NEEDS_RANK, NEEDS_TOKENS, Needs, is_trainable, needs};
pub use quant::{QUANTS, Quant};
pub use reference::Reference;
pub use shape::Shape;
pub use size::parse_size;
pub use table::{Style, format_bytes, format_parameters};
pub use weights::{WeightBytes, from_model, from_shape, in_bits};
