//! JSONL to packed, masked token batches: chat template, tokenizer, loss mask, packing.
//!
//! [`load`] reads files into [`Sample`]s, and a [`TokenCache`] keeps them for the next run; a [`Batcher`] puts them together into [`MicroBatch`]es without padding.
//! [`Tokenizer`] and [`ChatTemplate`] come from the model itself and serve generation as well.

mod batch;
mod byte_level_bpe;
mod chat_template;
mod conversation;
mod error;
mod fingerprint;
mod format;
mod gguf_bpe;
mod load;
mod mask;
mod merges;
mod pack;
mod pieces;
mod pre_tokenizer;
mod preview;
mod question;
mod report;
mod sample;
mod sentencepiece;
mod token_cache;
mod tokenizer;
mod tokenizer_json;
mod vocabulary;

pub use batch::{BatchOptions, BatchPlan, Batcher, IGNORED, MicroBatch};
pub use chat_template::{ChatTemplate, Clock, Rendered};
pub use conversation::{Conversation, Message};
pub use error::{DataError, LISTED_ROWS, RowProblem};
pub use format::Format;
pub use load::{DataSource, Dataset, LoadOptions, Origin, Overlong, load};
pub use mask::TrainOn;
pub use preview::{PreviewSpan, preview};
pub use question::question;
pub use report::{Bucket, Report, SourceReport};
pub use sample::Sample;
pub use token_cache::TokenCache;
pub use tokenizer::{Token, Tokenizer, gguf_tokenizer_json};
pub use vocabulary::StreamDecoder;
