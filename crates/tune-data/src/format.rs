//! The row formats of JSONL files, told apart by their keys.

mod alpaca;
mod input_ids;
mod messages;
mod prompt_completion;
mod sharegpt;
mod text;

use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::Sample;
use crate::conversation::{Conversation, kind};

/// Format of the rows of a JSONL file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Format {
    /// `{"messages": [{"role", "content"}, …], "tools"?}`, as in OpenAI's chat format.
    Messages,
    /// `{"conversations": [{"from", "value"}, …], "system"?, "tools"?}`.
    Sharegpt,
    /// `{"instruction", "input"?, "output", "system"?, "history"?}`.
    Alpaca,
    /// `{"prompt", "completion"}`, strings or lists of messages.
    PromptCompletion,
    /// `{"text"}`.
    Text,
    /// `{"input_ids", "labels"?, "attention_mask"?}`, already tokenised.
    InputIds,
}

/// A row, whatever its format.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Row {
    /// Messages, rendered with the chat template.
    Chat(Conversation),
    /// A prompt and its completion: a chat for a model with a template, plain text for one without.
    Completion { chat: Conversation, prompt: String, completion: String },
    /// Plain text.
    Text(String),
    /// Tokens.
    Tokens(Sample),
}

type Object = Map<String, Value>;

impl Format {
    /// The format that a row's keys belong to.
    ///
    /// # Errors
    /// What was found and what was expected.
    pub(crate) fn detect(row: &Object) -> Result<Self, String> {
        let has = |key| row.contains_key(key);
        let roles =
            |key| row.get(key).and_then(|list| list.get(0)).is_some_and(|turn| turn.get("role").is_some());
        Ok(if has("input_ids") {
            Self::InputIds
        } else if has("messages") {
            if row["messages"].get(0).is_some_and(|turn| turn.get("from").is_some()) {
                Self::Sharegpt
            } else {
                Self::Messages
            }
        } else if has("conversations") || has("conversation") {
            if roles("conversations") || roles("conversation") { Self::Messages } else { Self::Sharegpt }
        } else if has("instruction") {
            Self::Alpaca
        } else if has("prompt") && (has("completion") || has("response")) {
            Self::PromptCompletion
        } else if has("text") {
            Self::Text
        } else {
            let keys: Vec<_> = row.keys().map(|key| format!("`{key}`")).collect();
            let keys =
                if keys.is_empty() { "no keys".to_owned() } else { format!("keys {}", keys.join(", ")) };
            return Err(format!(
                "{keys}, expected `messages`, `conversations`, `instruction` and `output`, `prompt` and \
                 `completion`, `text`, or `input_ids`"
            ));
        })
    }

    /// # Errors
    /// What is wrong with the row.
    pub(crate) fn read(self, row: &Object) -> Result<Row, String> {
        match self {
            Self::Messages => messages::read(row),
            Self::Sharegpt => sharegpt::read(row),
            Self::Alpaca => alpaca::read(row),
            Self::PromptCompletion => prompt_completion::read(row),
            Self::Text => text::read(row),
            Self::InputIds => input_ids::read(row),
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Messages => "messages",
            Self::Sharegpt => "sharegpt",
            Self::Alpaca => "alpaca",
            Self::PromptCompletion => "prompt-completion",
            Self::Text => "text",
            Self::InputIds => "input-ids",
        })
    }
}

/// The string under the first of `keys` that is there.
fn string<'a>(row: &'a Object, keys: &[&str]) -> Result<&'a str, String> {
    optional_string(row, keys)?.ok_or_else(|| format!("no `{}`", keys[0]))
}

fn optional_string<'a>(row: &'a Object, keys: &[&str]) -> Result<Option<&'a str>, String> {
    for key in keys {
        match row.get(*key) {
            None | Some(Value::Null) => {}
            Some(Value::String(text)) => return Ok(Some(text)),
            Some(other) => return Err(format!("`{key}` is {}, expected a string", kind(other))),
        }
    }
    Ok(None)
}

fn list<'a>(row: &'a Object, keys: &[&str]) -> Result<&'a [Value], String> {
    let found = keys.iter().find_map(|key| Some((key, row.get(*key)?)));
    match found {
        Some((_, Value::Array(list))) => Ok(list),
        Some((key, other)) => Err(format!("`{key}` is {}, expected a list", kind(other))),
        None => Err(format!("no `{}`", keys[0])),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::Message;

    fn read(row: &Value) -> Result<(Format, Row), String> {
        let row = row.as_object().unwrap();
        let format = Format::detect(row)?;
        Ok((format, format.read(row)?))
    }

    fn chat(messages: &[(&str, &str)]) -> Conversation {
        let messages = messages.iter().map(|(role, content)| Message::new(role, content)).collect();
        Conversation { messages, tools: None }
    }

    #[test]
    fn each_format_is_detected_and_read() {
        let (format, row) = read(
            &json!({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}),
        )
        .unwrap();
        assert_eq!((format, row), (Format::Messages, Row::Chat(chat(&[("user", "q"), ("assistant", "a")]))));

        let (format, row) = read(&json!({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"})).unwrap();
        let expected = chat(&[("system", "s"), ("user", "q"), ("assistant", "a")]);
        assert_eq!((format, row), (Format::Sharegpt, Row::Chat(expected)));

        let (format, row) = read(&json!({"instruction": "i", "input": "x", "output": "o"})).unwrap();
        assert_eq!(format, Format::Alpaca);
        let Row::Completion { chat: turns, prompt, completion } = row else { panic!("{row:?}") };
        assert_eq!(turns, chat(&[("user", "i\n\nx"), ("assistant", "o")]));
        assert!(prompt.ends_with("### Instruction:\ni\n\n### Input:\nx\n\n### Response:\n"), "{prompt}");
        assert_eq!(completion, "o");

        let (format, row) = read(&json!({"prompt": "p", "completion": "c"})).unwrap();
        let expected = Row::Completion {
            chat: chat(&[("user", "p"), ("assistant", "c")]),
            prompt: "p".into(),
            completion: "c".into(),
        };
        assert_eq!((format, row), (Format::PromptCompletion, expected));

        assert_eq!(read(&json!({"text": "t"})).unwrap(), (Format::Text, Row::Text("t".into())));

        let row = json!({"input_ids": [5, 6, 7, 0], "labels": [-100, -100, 7, -100], "attention_mask": [1, 1, 1, 0]});
        let expected = Sample::new(vec![5, 6, 7], vec![false, false, true]);
        assert_eq!(read(&row).unwrap(), (Format::InputIds, Row::Tokens(expected)));
    }

    #[test]
    fn messages_under_other_keys_are_messages() {
        let row = json!({"conversations": [{"role": "user", "content": "q"}]});
        assert_eq!(read(&row).unwrap().0, Format::Messages);
        let row = json!({"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]});
        let (format, row) = read(&row).unwrap();
        assert_eq!(format, Format::PromptCompletion);
        let mut expected = chat(&[("user", "q"), ("assistant", "a")]);
        expected.messages[0] = expected.messages[0].clone().untrained();
        assert_eq!(row, Row::Chat(expected));
    }

    #[test]
    fn earlier_turns_of_a_prompt_are_not_targets() {
        let row = json!({
            "prompt": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}, {"role": "user", "content": "r"}],
            "completion": [{"role": "assistant", "content": "b"}],
        });
        let (_, Row::Chat(chat)) = read(&row).unwrap() else { panic!("not a chat") };
        let targets: Vec<_> = chat.messages.iter().map(Message::is_target).collect();
        assert_eq!(targets, [false, false, false, true]);
    }

    #[test]
    fn sharegpt_tool_turns_become_calls() {
        let row = json!({
            "conversations": [
                {"from": "human", "value": "weather?"},
                {"from": "function_call", "value": "{\"name\": \"weather\", \"arguments\": {\"city\": \"Brno\"}}"},
                {"from": "observation", "value": "sunny"},
                {"from": "gpt", "value": "It is sunny."},
            ],
            "tools": "[{\"name\": \"weather\", \"parameters\": {}}]",
        });
        let (_, Row::Chat(chat)) = read(&row).unwrap() else { panic!("not a chat") };
        let roles: Vec<_> = chat.messages.iter().map(Message::role).collect();
        assert_eq!(roles, ["user", "assistant", "tool", "assistant"]);
        let call = chat.messages[1].get("tool_calls").unwrap();
        assert_eq!(call.pointer("/0/function/arguments/city"), Some(&json!("Brno")));
        assert_eq!(chat.tools.unwrap()[0]["function"]["name"], "weather");
    }

    #[test]
    fn faults_are_named() {
        for (row, part) in [
            (json!({"question": "q"}), "keys `question`, expected `messages`"),
            (json!({"messages": []}), "`messages` is empty"),
            (json!({"messages": "hi"}), "`messages` is a string, expected a list"),
            (
                json!({"messages": [{"role": "user", "content": "q"}, {"role": "user"}]}),
                "message 2: no content",
            ),
            (json!({"conversations": [{"from": "alien", "value": "x"}]}), "turn 1: from is \"alien\""),
            (json!({"instruction": "i"}), "no `output`"),
            (json!({"prompt": "p", "completion": 3}), "`completion` is a number"),
            (json!({"text": ["a"]}), "`text` is a list, expected a string"),
            (json!({"text": ""}), "`text` is empty"),
            (json!({"input_ids": [1, -2]}), "input_ids[1] is -2"),
            (json!({"input_ids": [1, 2], "labels": [1]}), "1 labels for 2 input_ids"),
            (
                json!({"input_ids": [1, 2], "labels": [1, 3]}),
                "labels[1] is 3, expected -100 or input_ids[1] = 2",
            ),
        ] {
            let error = read(&row).unwrap_err();
            assert!(error.contains(part), "{error}");
        }
    }
}
