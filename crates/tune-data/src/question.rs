//! The question of a row: its messages before the last answer.

use std::fs;

use serde_json::Value;

use crate::format::Row;
use crate::{DataSource, Format, Message, Origin};

/// The messages before the last answer of the row at `origin`; nothing for rows that are no chat, and where the row
/// is gone.
pub fn question(sources: &[DataSource], origin: Origin) -> Option<Vec<Message>> {
    let source = sources.get(origin.source)?;
    let text = fs::read_to_string(&source.path).ok()?;
    let Value::Object(row) = serde_json::from_str(text.lines().nth(origin.line.checked_sub(1)?)?).ok()?
    else {
        return None;
    };
    let format = source.format.or_else(|| Format::detect(&row).ok())?;
    let mut messages = match format.read(&row).ok()? {
        Row::Chat(chat) if chat.tools.is_none() => chat.messages,
        Row::Completion { chat, .. } => chat.messages,
        Row::Chat(_) | Row::Text(_) | Row::Tokens(_) => return None,
    };
    let answer = messages.iter().rposition(|message| message.role() == "assistant")?;
    messages.truncate(answer);
    messages.iter().any(|message| message.role() == "user").then_some(messages)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::TrainOn;

    #[test]
    fn the_messages_before_the_last_answer_are_the_question() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let rows = [
            r#"{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]}"#,
            r#"{"prompt": "p", "completion": "q"}"#,
            r#"{"text": "t"}"#,
        ];
        fs::write(file.path(), rows.join("\n")).expect("written");
        let sources =
            [DataSource { path: file.path().to_owned(), format: None, train_on: TrainOn::Assistant }];
        let asked = |line| {
            let messages = question(&sources, Origin { source: 0, line })?;
            Some(messages.iter().map(Message::content).collect::<Vec<_>>().join(" "))
        };
        assert_eq!(asked(1).as_deref(), Some("s a b c"));
        assert_eq!(asked(2).as_deref(), Some("p"));
        assert_eq!((asked(3), asked(4), asked(0)), (None, None, None));
    }
}
