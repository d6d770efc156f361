//! Model reference to local files.
//!
//! ```text
//! smollm2:135m ──► catalogue ──► Hub, then wheel mirror ─┐
//! hf:OWNER/REPO ───────────────► Hub ────────────────────┤
//! ollama:NAME ─────────────────► local Ollama store ─────┼──► Resolved { path, … }
//! ./folder, ./file.gguf ─────────────────────────────────┘
//! ```
//!
//! The only crate of the project that opens a socket or starts a program: the Hub (through `hf-hub`), the user's own
//! `pip` for the wheel mirror, so that its index, proxy and certificate settings apply, and a `llama-server` on this
//! machine, where one is installed, to compare answers with. Nothing else is contacted and nothing is reported anywhere.

mod catalogue;
mod checksum;
mod error;
mod hf;
mod hf_files;
mod llama_server;
mod model_ref;
mod ollama;
mod options;
mod resolve;
mod wheel;

pub use catalogue::{CatalogueEntry, PinnedFile, Source, WheelPart, catalogue};
pub use error::HubError;
pub use llama_server::{LLAMA_SERVER, LlamaServer, find_llama_server};
pub use model_ref::{HubRef, ModelRef};
pub use ollama::{Message, OllamaName, OllamaSettings};
pub use options::{HubOptions, Options, Token};
pub use resolve::{Progress, Resolved, resolve};
