//! `{"instruction", "input"?, "output", "system"?, "history"?}`: Stanford Alpaca, with the history of LLaMA-Factory.

use serde_json::Value;

use super::{Object, Row, optional_string, string};
use crate::conversation::{Conversation, Message};

/// What the Alpaca authors put before an instruction, for models without a chat template.
const PREFACE: &str = "Below is an instruction that describes a task. Write a response that appropriately completes the request.";
const PREFACE_INPUT: &str = "Below is an instruction that describes a task, paired with an input that provides further context. Write a response that appropriately completes the request.";

pub(super) fn read(row: &Object) -> Result<Row, String> {
    let instruction = string(row, &["instruction"])?;
    let input = optional_string(row, &["input", "context"])?.filter(|text| !text.is_empty());
    let output = string(row, &["output", "response"])?;
    let system = optional_string(row, &["system"])?.filter(|text| !text.is_empty());

    let mut messages: Vec<_> = system.map(|text| Message::new("system", text)).into_iter().collect();
    messages.extend(history(row.get("history"))?);
    let question = input.map_or_else(|| instruction.to_owned(), |input| format!("{instruction}\n\n{input}"));
    messages.push(Message::new("user", &question));
    messages.push(Message::new("assistant", output));

    let prompt = match input {
        Some(input) => {
            format!(
                "{PREFACE_INPUT}\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
            )
        }
        None => format!("{PREFACE}\n\n### Instruction:\n{instruction}\n\n### Response:\n"),
    };
    let chat = Conversation { messages, tools: None };
    Ok(Row::Completion { chat, prompt, completion: output.to_owned() })
}

/// Earlier turns, as pairs of instruction and output.
fn history(value: Option<&Value>) -> Result<Vec<Message>, String> {
    let pairs = match value {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(value) => value.as_array(),
    };
    let pairs = pairs.ok_or("`history` is not a list")?;
    let mut messages = Vec::with_capacity(2 * pairs.len());
    for (index, pair) in pairs.iter().enumerate() {
        let text = |at| pair.get(at).and_then(Value::as_str);
        let (Some(question), Some(answer)) = (text(0), text(1)) else {
            return Err(format!("history[{index}] is not a pair of strings"));
        };
        messages.push(Message::new("user", question));
        messages.push(Message::new("assistant", answer));
    }
    Ok(messages)
}
