//! `{"prompt", "completion"}`: strings, or lists of messages as in TRL.

use serde_json::Value;

use super::messages::messages;
use super::{Object, Row, string};
use crate::conversation::{Conversation, Message, tools};

pub(super) fn read(row: &Object) -> Result<Row, String> {
    let tools = tools(row.get("tools"))?;
    let completion = row.get("completion").or_else(|| row.get("response"));
    if let (Some(Value::Array(prompt)), Some(Value::Array(completion))) = (row.get("prompt"), completion) {
        let prompt = messages(prompt).map_err(|reason| format!("`prompt`, {reason}"))?;
        let completion = messages(completion).map_err(|reason| format!("`completion`, {reason}"))?;
        if completion.is_empty() {
            return Err("`completion` is empty".to_owned());
        }
        let messages = prompt.into_iter().map(Message::untrained).chain(completion).collect();
        return Ok(Row::Chat(Conversation { messages, tools }));
    }
    let prompt = string(row, &["prompt"])?;
    let completion = string(row, &["completion", "response"])?;
    let messages = vec![Message::new("user", prompt), Message::new("assistant", completion)];
    Ok(Row::Completion {
        chat: Conversation { messages, tools },
        prompt: prompt.to_owned(),
        completion: completion.to_owned(),
    })
}
