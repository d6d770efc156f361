//! JSONL to packed, masked token batches: chat template, tokenizer, loss mask, packing.

mod chat_template;
mod conversation;
mod error;
mod pre_tokenizer;
mod sentencepiece;
mod tokenizer;
mod vocabulary;

pub use chat_template::{ChatTemplate, Clock, Rendered};
pub use conversation::{Conversation, Message};
pub use error::{DataError, LISTED_ROWS, RowProblem};
pub use tokenizer::{Token, Tokenizer};
pub use vocabulary::StreamDecoder;
