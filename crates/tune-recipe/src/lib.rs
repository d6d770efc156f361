//! Recipe as written to RunSpec as run: TOML, aliases, overrides, validation.
