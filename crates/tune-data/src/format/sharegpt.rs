//! `{"conversations": [{"from", "value"}, …], "system"?, "tools"?}`: ShareGPT, with the tool turns of LLaMA-Factory.

use serde_json::Value;

use super::{Object, Row, list, optional_string};
use crate::conversation::{Conversation, Message, kind, tools};

pub(super) fn read(row: &Object) -> Result<Row, String> {
    let turns = list(row, &["conversations", "conversation", "messages"])?;
    if turns.is_empty() {
        return Err("`conversations` is empty".to_owned());
    }
    let system = optional_string(row, &["system"])?.filter(|text| !text.is_empty());
    let mut messages: Vec<_> = system.map(|text| Message::new("system", text)).into_iter().collect();
    for (index, turn) in turns.iter().enumerate() {
        messages.push(message(turn).map_err(|reason| format!("turn {}: {reason}", index + 1))?);
    }
    Ok(Row::Chat(Conversation { messages, tools: tools(row.get("tools"))? }))
}

fn message(turn: &Value) -> Result<Message, String> {
    let field = |name: &str| match turn.get(name) {
        Some(Value::String(text)) => Ok(text.as_str()),
        Some(other) => Err(format!("{name} is {}, expected a string", kind(other))),
        None => Err(format!("no {name}")),
    };
    let (from, value) = (field("from")?, field("value")?);
    let role = match from {
        "human" | "user" => "user",
        "gpt" | "assistant" | "model" | "chatgpt" | "bing" | "bard" => "assistant",
        "system" => "system",
        "tool" | "observation" | "function_response" | "tool_response" => "tool",
        "function_call" | "tool_call" => return call(value),
        _ => {
            return Err(format!(
                "from is {from:?}, expected human, gpt, system, function_call or observation"
            ));
        }
    };
    Ok(Message::new(role, value))
}

fn call(value: &str) -> Result<Message, String> {
    let call: Value =
        serde_json::from_str(value).map_err(|error| format!("function_call is not JSON: {error}"))?;
    let name = call.get("name").and_then(Value::as_str).ok_or("function_call has no name")?;
    Ok(Message::tool_call(name, call.get("arguments").unwrap_or(&Value::Null)))
}
