//! `{"messages": [{"role", "content"}, …], "tools"?}`: OpenAI's chat format.

use super::{Object, Row, list};
use crate::conversation::{Conversation, Message, tools};

/// Keys under which the list is found.
const KEYS: [&str; 3] = ["messages", "conversations", "conversation"];

pub(super) fn read(row: &Object) -> Result<Row, String> {
    let list = list(row, &KEYS)?;
    if list.is_empty() {
        return Err("`messages` is empty".to_owned());
    }
    Ok(Row::Chat(Conversation { messages: messages(list)?, tools: tools(row.get("tools"))? }))
}

/// Reads a list of messages; a fault says which one has it.
pub(super) fn messages(list: &[serde_json::Value]) -> Result<Vec<Message>, String> {
    let read = |(index, value)| {
        Message::from_json(value).map_err(|reason| format!("message {}: {reason}", index + 1))
    };
    list.iter().enumerate().map(read).collect()
}
