//! Chat messages as data sets hold them and as templates expect them.

use serde_json::{Map, Value, json};

/// Roles that a message may have.
const ROLES: [&str; 6] = ["system", "developer", "user", "assistant", "tool", "function"];

/// One message of a chat.
#[derive(Clone, Debug, PartialEq)]
pub struct Message {
    fields: Map<String, Value>,
    weight: bool,
}

impl Message {
    /// A plain message.
    pub fn new(role: &str, content: &str) -> Self {
        let mut fields = Map::new();
        fields.insert("role".to_owned(), role.into());
        fields.insert("content".to_owned(), content.into());
        Self { fields, weight: true }
    }

    /// A message as in OpenAI's chat format. All its fields reach the template, among them `tool_calls`,
    /// `tool_call_id`, `name` and `reasoning_content`.
    ///
    /// A list of text parts becomes one string, no content beside tool calls an empty one, and arguments of tool
    /// calls written as a JSON string become an object, as templates expect. `"weight": 0` keeps an assistant
    /// turn out of the loss.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn from_json(value: &Value) -> Result<Self, String> {
        let Value::Object(object) = value else {
            return Err(format!("expected an object with role and content, got {}", kind(value)));
        };
        let mut fields = object.clone();
        let role = match fields.get("role") {
            Some(Value::String(role)) if ROLES.contains(&role.as_str()) => role.clone(),
            Some(Value::String(role)) => {
                return Err(format!("role {role:?}, expected one of {}", ROLES.join(", ")));
            }
            Some(other) => return Err(format!("role is {}, expected a string", kind(other))),
            None => return Err("no role".to_owned()),
        };
        let calls = fields.get("tool_calls").is_some_and(|calls| !calls.is_null());
        let content =
            content_text(fields.get("content"), &role, calls || fields.contains_key("function_call"))?;
        fields.insert("content".to_owned(), content.into());
        if calls {
            let calls = fields.get_mut("tool_calls").and_then(Value::as_array_mut);
            calls.ok_or("tool_calls is not a list")?.iter_mut().try_for_each(parse_arguments)?;
        } else {
            fields.remove("tool_calls");
        }
        let weight = match fields.remove("weight") {
            None => true,
            Some(weight) => match weight.as_f64() {
                Some(0.0) => false,
                Some(1.0) => true,
                _ => return Err(format!("weight is {weight}, expected 0 or 1")),
            },
        };
        Ok(Self { fields, weight })
    }

    /// An assistant turn that calls one function.
    pub fn tool_call(name: &str, arguments: &Value) -> Self {
        let mut message = Self::new("assistant", "");
        let call = json!({"type": "function", "function": {"name": name, "arguments": arguments}});
        message.fields.insert("tool_calls".to_owned(), json!([call]));
        message
    }

    /// Who speaks.
    pub fn role(&self) -> &str {
        self.fields.get("role").and_then(Value::as_str).unwrap_or_default()
    }

    /// What is said; empty for a bare tool call.
    pub fn content(&self) -> &str {
        self.fields.get("content").and_then(Value::as_str).unwrap_or_default()
    }

    /// Another field.
    pub fn get(&self, field: &str) -> Option<&Value> {
        self.fields.get(field)
    }

    /// The same, kept out of the loss.
    pub(crate) fn untrained(mut self) -> Self {
        self.weight = false;
        self
    }

    /// An assistant turn that may be trained on.
    pub(crate) fn is_target(&self) -> bool {
        self.role() == "assistant" && self.weight
    }

    /// The message has reasoning, in a field or in think tags.
    pub(crate) fn has_reasoning(&self) -> bool {
        let field = |name| self.get(name).and_then(Value::as_str).is_some_and(|text| !text.is_empty());
        field("reasoning_content")
            || field("reasoning")
            || field("thinking")
            || self.content().contains("</think>")
    }

    pub(crate) fn fields(&self) -> &Map<String, Value> {
        &self.fields
    }

    /// The same with the arguments of tool calls as JSON strings, for templates that concatenate them.
    pub(crate) fn with_string_arguments(&self) -> Self {
        let mut message = self.clone();
        if let Some(Value::Array(calls)) = message.fields.get_mut("tool_calls") {
            for call in calls {
                if let Some(arguments) = call.pointer_mut("/function/arguments") {
                    *arguments = arguments.to_string().into();
                }
            }
        }
        message
    }
}

/// A chat and the tools that it may call.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct Conversation {
    /// The messages in order.
    pub messages: Vec<Message>,
    /// JSON schemas of the tools, a list, if there are any.
    pub tools: Option<Value>,
}

/// The tools of a row: a list, or a string that holds one as JSON. Nothing for none.
///
/// # Errors
/// What is wrong with them.
pub(crate) fn tools(value: Option<&Value>) -> Result<Option<Value>, String> {
    let tools = match value {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::String(text)) if text.trim().is_empty() => return Ok(None),
        Some(Value::String(text)) => serde_json::from_str(text)
            .map_err(|error| format!("tools is a string that is not JSON: {error}"))?,
        Some(value) => value.clone(),
    };
    match tools {
        Value::Array(list) if list.is_empty() => Ok(None),
        Value::Array(list) => Ok(Some(Value::Array(list.into_iter().map(as_function).collect()))),
        other => Err(format!("tools is {}, expected a list", kind(&other))),
    }
}

/// What a JSON value is, for a message.
pub(crate) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// Wraps a bare function schema as `{"type": "function", "function": …}`.
fn as_function(tool: Value) -> Value {
    let bare = tool.get("function").is_none() && tool.get("name").is_some() && tool.get("type").is_none();
    if bare { json!({"type": "function", "function": tool}) } else { tool }
}

fn content_text(content: Option<&Value>, role: &str, calls: bool) -> Result<String, String> {
    match content {
        Some(Value::String(text)) => Ok(text.clone()),
        None | Some(Value::Null) if calls && role == "assistant" => Ok(String::new()),
        None | Some(Value::Null) => Err(format!("no content in a message of role {role}")),
        Some(Value::Array(parts)) => parts.iter().map(part_text).collect(),
        Some(other) => Err(format!("content is {}, expected a string", kind(other))),
    }
}

fn part_text(part: &Value) -> Result<&str, String> {
    match part {
        Value::String(text) => Ok(text),
        part => {
            let found = part.get("type").and_then(Value::as_str).unwrap_or("no type");
            let text = part.get("text").and_then(Value::as_str).filter(|_| found == "text");
            text.ok_or_else(|| format!("content has a part of type {found}, expected only text"))
        }
    }
}

fn parse_arguments(call: &mut Value) -> Result<(), String> {
    if call.get("function").is_none() && call.get("name").is_some() {
        let function = call.take();
        *call = json!({"type": "function", "function": function});
    }
    let function = call.get_mut("function").and_then(Value::as_object_mut);
    let function = function.ok_or("a tool call has no function")?;
    if !function.get("name").is_some_and(Value::is_string) {
        return Err("a tool call has no function name".to_owned());
    }
    if let Some(Value::String(text)) = function.get("arguments") {
        let parsed = if text.trim().is_empty() { Ok(json!({})) } else { serde_json::from_str(text) };
        let parsed: Value =
            parsed.map_err(|error| format!("arguments of a tool call are not JSON: {error}"))?;
        function.insert("arguments".to_owned(), parsed);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_become_an_object_and_go_back() {
        let message = Message::from_json(&json!({
            "role": "assistant", "content": null,
            "tool_calls": [{"id": "1", "type": "function",
                "function": {"name": "weather", "arguments": "{\"city\": \"Brno\"}"}}],
        }))
        .unwrap();
        assert_eq!(message.content(), "");
        let arguments = |message: &Message| {
            message.get("tool_calls").unwrap().pointer("/0/function/arguments").unwrap().clone()
        };
        assert_eq!(arguments(&message), json!({"city": "Brno"}));
        assert_eq!(arguments(&message.with_string_arguments()), json!(r#"{"city":"Brno"}"#));
    }

    #[test]
    fn text_parts_join_and_images_are_refused() {
        let parts = json!([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]);
        let message = Message::from_json(&json!({"role": "user", "content": parts})).unwrap();
        assert_eq!(message.content(), "ab");
        let image = json!({"role": "user", "content": [{"type": "image_url", "image_url": {}}]});
        let error = Message::from_json(&image).unwrap_err();
        assert!(error.contains("type image_url"), "{error}");
    }

    #[test]
    fn faults_are_named() {
        for (value, part) in [
            (json!("hi"), "got a string"),
            (json!({"content": "x"}), "no role"),
            (json!({"role": "asistant", "content": "x"}), "role \"asistant\", expected one of system"),
            (json!({"role": "user"}), "no content in a message of role user"),
            (json!({"role": "assistant", "content": "x", "weight": 2}), "weight is 2"),
            (json!({"role": "assistant", "tool_calls": [{}]}), "no function"),
        ] {
            let error = Message::from_json(&value).unwrap_err();
            assert!(error.contains(part), "{error}");
        }
    }

    #[test]
    fn tools_may_be_a_string_and_bare() {
        let bare = Value::from(r#"[{"name": "f", "parameters": {}}]"#);
        let list = tools(Some(&bare)).unwrap().unwrap();
        assert_eq!(list[0]["type"], "function");
        assert_eq!(list[0]["function"]["name"], "f");
        assert_eq!(tools(Some(&json!([]))), Ok(None));
        assert!(tools(Some(&json!("nope"))).is_err());
    }
}
