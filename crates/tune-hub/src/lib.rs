//! Model reference to local files.
//!
//! ```text
//! smollm2:135m ──► catalogue ──► Hub, then wheel mirror ─┐
//! hf:OWNER/REPO ───────────────► Hub ────────────────────┤
//! ollama:NAME ─────────────────► local Ollama store ─────┼──► Resolved { path, … }
//! ./folder, ./file.gguf ─────────────────────────────────┘
//! ```
//!
//! And back: [`OllamaServer`] hands a tuned model to a running Ollama.
//!
//! The only crate of the project that opens a socket, and it does so in two places: to the Hub (through `hf-hub`) and
//! to the Ollama server that `OLLAMA_HOST` names. The wheel mirror is fetched by the user's own `pip`, so that its
//! index, proxy and certificate settings apply. Nothing else is contacted and nothing is reported anywhere.

mod catalogue;
mod checksum;
mod error;
mod hf;
mod hf_files;
mod model_ref;
mod ollama;
mod ollama_host;
mod ollama_model;
mod ollama_server;
mod ollama_version;
mod options;
mod resolve;
mod wheel;

pub use catalogue::{CatalogueEntry, PinnedFile, Source, WheelPart, catalogue};
pub use error::HubError;
pub use model_ref::{HubRef, ModelRef};
pub use ollama::{Message, OllamaName, OllamaSettings};
pub use ollama_host::OllamaHost;
pub use ollama_model::{Blob, Details, NewModel, ShownModel};
pub use ollama_server::{Answer, MOST_LOGPROBS, NextToken, OllamaServer, Upload};
pub use ollama_version::OllamaVersion;
pub use options::{HubOptions, Options, Token};
pub use resolve::{Progress, Resolved, resolve};
