//! Recipe as written → [`RunSpec`] as run: TOML, aliases, overrides, validation.
//!
//! The section structs ([`Train`], [`Adapter`] …) alone hold each option's name, type, default and meaning.
//! [`load`] reads a file and the values given on the command line into a [`RunSpec`] in which nothing is left
//! unresolved, or reports every problem it found at once. What can only be chosen well once the base model is
//! known is chosen again by [`RunSpec::refine`].

mod check;
mod derive;
mod error;
mod names;
mod origin;
mod read;
mod resolved;
mod spec;
mod values;

pub use derive::BaseFacts;
pub use error::{Problem, RecipeError};
pub use names::sections;
pub use origin::{Origin, Origins};
pub use read::{Override, load, parse};
pub use resolved::Line;
pub use spec::{
    Adapter, Checkpoint, Data, DataFormat, DataOptions, Dtype, Eval, Export, LrScheduler, Memory, Method,
    Model, OnExceed, Optimizer, Overlong, Quantization, Run, RunSpec, Samples, Train, TrainOn, Verify,
};
pub use values::{Budget, Layers, Resume, TargetModules, parse_bytes};
