//! Recipe as written → [`RunSpec`] as run: TOML, aliases, overrides, validation.
//!
//! The structs in [`spec`] alone hold each option's name, type, default and documentation. `load` reads a
//! file and `--set` overrides into a [`RunSpec`] in which nothing is left unresolved, or reports every problem
//! it found at once.

pub mod spec;
pub mod values;

pub use spec::RunSpec;
