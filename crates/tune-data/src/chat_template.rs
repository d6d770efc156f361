//! The model's own chat template, rendered in the dialect of Hugging Face transformers.
//!
//! Jinja with `trim_blocks`, `lstrip_blocks`, loop controls, Python's string and dictionary methods,
//! `raise_exception`, `strftime_now`, a `tojson` that does not escape HTML, and `generation` blocks, whose output
//! is what the model says.

use std::ops::Range;

use chrono::format::{Item, StrftimeItems};
use chrono::{Local, NaiveDate, NaiveDateTime, NaiveTime};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde};
use minijinja::{Environment, Error, ErrorKind, Value};
use minijinja_contrib::pycompat::unknown_method_callback;
use serde::Serialize;
use serde_json::Value as Json;
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};
use tune_formats::BaseModel;

use crate::conversation::Message;
use crate::fingerprint::Fingerprint;
use crate::{DataError, Tokenizer};

/// Enclose the output of a `generation` block. Unicode sets both aside for internal use.
const GENERATION_START: char = '\u{fdd0}';
const GENERATION_END: char = '\u{fdd1}';

const NAME: &str = "chat_template";

/// A model's chat template.
pub struct ChatTemplate {
    environment: Environment<'static>,
    special: Vec<(&'static str, String)>,
    has_generation: bool,
    has_thinking_switch: bool,
    fingerprint: Option<[u8; 32]>,
}

/// A rendered conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rendered {
    /// The text, with control tokens spelt out.
    pub text: String,
    /// Bytes of `text` that `generation` blocks wrote; empty for most templates, which have none.
    pub generated: Vec<Range<usize>>,
}

/// What the date and time are for `strftime_now`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clock {
    /// Those of the machine, as engines do.
    Now,
    /// 26 July 2024, the date that Llama's templates fall back to: the same data give the same tokens any day.
    Fixed,
}

impl ChatTemplate {
    /// The template of an opened model.
    ///
    /// # Errors
    /// A model without a template, or a template that does not parse.
    pub fn from_base(base: &BaseModel, tokenizer: &Tokenizer, clock: Clock) -> Result<Self, DataError> {
        let source = base.chat_template.as_deref();
        let source = source.ok_or_else(|| DataError::NoChatTemplate { model: base.name.clone() })?;
        Self::new(source, tokenizer, clock)
    }

    /// A template from its source.
    ///
    /// # Errors
    /// A template that does not parse.
    pub fn new(source: &str, tokenizer: &Tokenizer, clock: Clock) -> Result<Self, DataError> {
        let special = tokenizer.special();
        let special = [("bos_token", special.bos), ("eos_token", special.eos), ("pad_token", special.pad)];
        let special = special.map(|(name, id)| tokenizer.spelling(id).map(|text| (name, text)));
        Self::with_special(source, special.into_iter().flatten().collect(), clock)
    }

    /// The text of a conversation, without the marks of `generation` blocks.
    ///
    /// `add_generation_prompt` ends it with the header of an assistant turn.
    ///
    /// # Errors
    /// The template fails, perhaps on purpose: many refuse roles that do not alternate.
    pub fn render(
        &self,
        messages: &[Message],
        tools: Option<&Json>,
        add_generation_prompt: bool,
    ) -> Result<String, DataError> {
        let rendered = self.render_spans(messages, tools, add_generation_prompt, None)?;
        Ok(rendered.text)
    }

    /// [`ChatTemplate::render`] with the spans of `generation` blocks. `thinking` sets `enable_thinking`.
    ///
    /// # Errors
    /// The template fails.
    pub fn render_spans(
        &self,
        messages: &[Message],
        tools: Option<&Json>,
        add_generation_prompt: bool,
        thinking: Option<bool>,
    ) -> Result<Rendered, DataError> {
        let first = self.render_raw(messages, tools, add_generation_prompt, thinking);
        let calls = messages.iter().any(|message| message.get("tool_calls").is_some());
        let text = match first {
            Err(_) if calls => {
                let messages: Vec<_> = messages.iter().map(Message::with_string_arguments).collect();
                // the first error says more if this fails too
                self.render_raw(&messages, tools, add_generation_prompt, thinking).or(first)
            }
            first => first,
        };
        let text = text.map_err(|error| {
            let (line, reason, source_text) = describe(&error);
            DataError::Template { line, reason, source_text }
        })?;
        Ok(without_marks(&text))
    }

    /// The template marks what the model says with `generation` blocks.
    pub fn has_generation(&self) -> bool {
        self.has_generation
    }

    /// The template has an `enable_thinking` switch.
    pub fn has_thinking_switch(&self) -> bool {
        self.has_thinking_switch
    }

    /// Differs between templates that differ in any way; `None` where what is rendered depends on the time.
    pub(crate) fn fingerprint(&self) -> Option<[u8; 32]> {
        self.fingerprint
    }

    fn with_special(
        source: &str,
        special: Vec<(&'static str, String)>,
        clock: Clock,
    ) -> Result<Self, DataError> {
        let has_thinking_switch = source.contains("enable_thinking");
        let fingerprint = (clock == Clock::Fixed)
            .then(|| Fingerprint::new().part(source.as_bytes()).value(&special).finish());
        let (source, has_generation) = generation_as_filter(source);
        let mut environment = Environment::new();
        environment.set_syntax(
            SyntaxConfig::builder()
                .trim_blocks(true)
                .lstrip_blocks(true)
                .build()
                .map_err(|error| syntax_error(&error))?,
        );
        environment.set_debug(true);
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment.set_unknown_method_callback(unknown_method_callback);
        environment.add_filter("tojson", tojson);
        environment.add_filter("generation_span", |body: String| {
            format!("{GENERATION_START}{body}{GENERATION_END}")
        });
        // Jinja iterates strings but not none, and templates tell `tools=None` apart by that.
        environment.add_test("iterable", |value: &Value| {
            value.is_undefined() || (!value.is_none() && value.try_iter().is_ok()) || value.as_str().is_some()
        });
        environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_function("strftime_now", move |format: String| strftime(&format, clock));
        environment.add_template_owned(NAME, source).map_err(|error| syntax_error(&error))?;
        Ok(Self { environment, special, has_generation, has_thinking_switch, fingerprint })
    }

    fn render_raw(
        &self,
        messages: &[Message],
        tools: Option<&Json>,
        add_generation_prompt: bool,
        thinking: Option<bool>,
    ) -> Result<String, Error> {
        let messages: Vec<_> = messages.iter().map(Message::fields).collect();
        let mut variables = vec![
            ("messages", Value::from(Serde(&messages))),
            ("tools", Value::from(Serde(&tools))),
            ("documents", Value::from(())),
            ("add_generation_prompt", Value::from(add_generation_prompt)),
        ];
        variables.extend(self.special.iter().map(|(name, text)| (*name, Value::from(text.as_str()))));
        variables.extend(thinking.map(|on| ("enable_thinking", Value::from(on))));
        self.environment.get_template(NAME)?.render(Value::from_pairs(variables))
    }
}

/// Turns `generation` blocks into filter blocks, which keep the white-space control of the tags.
fn generation_as_filter(source: &str) -> (String, bool) {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    let mut found = false;
    while let Some(open) = rest.find("{%") {
        let inner = open + 2;
        let Some(close) = rest[inner..].find("%}").map(|at| inner + at) else { break };
        let tag = rest[inner..close].trim_matches(|c: char| c == '-' || c == '+' || c.is_whitespace());
        let replacement = match tag {
            "generation" => "filter generation_span",
            "endgeneration" => "endfilter",
            _ => tag,
        };
        out.push_str(&rest[..inner]);
        if replacement == tag {
            out.push_str(&rest[inner..close]);
        } else {
            found = true;
            out.push_str(&rest[inner..close].replace(tag, replacement));
        }
        rest = &rest[close..];
    }
    out.push_str(rest);
    (out, found)
}

fn without_marks(marked: &str) -> Rendered {
    let mut text = String::with_capacity(marked.len());
    let mut generated = Vec::new();
    let mut start = None;
    for part in marked.split_inclusive([GENERATION_START, GENERATION_END]) {
        text.push_str(part.trim_end_matches([GENERATION_START, GENERATION_END]));
        if part.ends_with(GENERATION_START) {
            start = Some(text.len());
        } else if part.ends_with(GENERATION_END)
            && let Some(start) = start.take()
        {
            generated.push(start..text.len());
        }
    }
    Rendered { text, generated }
}

/// JSON as Python's `json.dumps(…, ensure_ascii=False)` writes it, without HTML escapes.
#[allow(clippy::needless_pass_by_value, reason = "filters get their options by value")]
fn tojson(value: &Value, options: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = options.get("indent")?;
    let ensure_ascii: Option<bool> = options.get("ensure_ascii")?;
    let separators: Option<Vec<String>> = options.get("separators")?;
    let sort_keys: Option<bool> = options.get("sort_keys")?;
    options.assert_all_used()?;
    let failed = |error: serde_json::Error| Error::new(ErrorKind::BadSerialization, error.to_string());
    let mut json = serde_json::to_value(value).map_err(failed)?;
    if sort_keys == Some(true) {
        json.sort_all_objects();
    }
    let mut out = Vec::new();
    if let Some(indent) = indent {
        let spaces = " ".repeat(indent);
        let formatter = PrettyFormatter::with_indent(spaces.as_bytes());
        json.serialize(&mut Serializer::with_formatter(&mut out, formatter)).map_err(failed)?;
    } else {
        let [item, key] = match separators.as_deref() {
            Some([item, key]) => [item.clone(), key.clone()],
            Some(_) => return Err(Error::new(ErrorKind::InvalidOperation, "separators must be a pair")),
            None => [", ".to_owned(), ": ".to_owned()],
        };
        json.serialize(&mut Serializer::with_formatter(&mut out, PythonFormatter { item, key }))
            .map_err(failed)?;
    }
    let text = String::from_utf8_lossy(&out).into_owned();
    Ok(Value::from(if ensure_ascii == Some(true) { escape_non_ascii(&text) } else { text }))
}

/// Non-ASCII as `\uXXXX`, in surrogate pairs above U+FFFF. In JSON it only occurs inside strings.
fn escape_non_ascii(json: &str) -> String {
    let mut out = String::with_capacity(json.len());
    for character in json.chars() {
        if character.is_ascii() {
            out.push(character);
        } else {
            out.extend(character.encode_utf16(&mut [0; 2]).iter().map(|unit| format!("\\u{unit:04x}")));
        }
    }
    out
}

/// One line of JSON with the separators of Python.
struct PythonFormatter {
    item: String,
    key: String,
}

impl Formatter for PythonFormatter {
    fn begin_array_value<W: std::io::Write + ?Sized>(
        &mut self,
        out: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { out.write_all(self.item.as_bytes()) }
    }

    fn begin_object_key<W: std::io::Write + ?Sized>(
        &mut self,
        out: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { out.write_all(self.item.as_bytes()) }
    }

    fn begin_object_value<W: std::io::Write + ?Sized>(&mut self, out: &mut W) -> std::io::Result<()> {
        out.write_all(self.key.as_bytes())
    }
}

fn strftime(format: &str, clock: Clock) -> Result<String, Error> {
    let items: Vec<_> = StrftimeItems::new(format).collect();
    // chrono panics when it prints an item that it could not parse
    if items.contains(&Item::Error) {
        return Err(Error::new(
            ErrorKind::InvalidOperation,
            format!("strftime_now({format:?}) is not a date format"),
        ));
    }
    let fixed = || NaiveDate::from_ymd_opt(2024, 7, 26).map(|date| NaiveDateTime::new(date, NaiveTime::MIN));
    let now = match clock {
        Clock::Now => Local::now().naive_local(),
        Clock::Fixed => fixed().unwrap_or_default(),
    };
    let mut text = String::new();
    std::fmt::Write::write_fmt(&mut text, format_args!("{}", now.format_with_items(items.iter()))).map_err(
        |_| Error::new(ErrorKind::InvalidOperation, format!("strftime_now({format:?}) needs a time zone")),
    )?;
    Ok(text)
}

fn syntax_error(error: &Error) -> DataError {
    let (line, reason, source_text) = describe(error);
    DataError::TemplateSyntax { line, reason, source_text }
}

/// Line, reason and place of an error of the engine.
fn describe(error: &Error) -> (usize, String, String) {
    /// Longest quotation of the template, in characters.
    const QUOTED: usize = 100;

    let reason = error.detail().map_or_else(|| error.kind().to_string(), ToOwned::to_owned);
    let place = error.range().and_then(|range| error.template_source()?.get(range));
    let place = place.unwrap_or_default().trim();
    let mut quoted: String = place.chars().take(QUOTED).collect();
    if quoted.len() < place.len() {
        quoted.push('…');
    }
    (error.line().unwrap_or(1), reason, quoted)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn template(source: &str) -> ChatTemplate {
        let special = vec![("bos_token", "<s>".to_owned()), ("eos_token", "</s>".to_owned())];
        ChatTemplate::with_special(source, special, Clock::Fixed).unwrap()
    }

    fn render(source: &str) -> String {
        let messages = [Message::new("user", "a <b> & 'c'"), Message::new("assistant", "é")];
        template(source).render(&messages, None, true).unwrap()
    }

    #[test]
    fn whitespace_control_is_that_of_transformers() {
        let source = "{{ bos_token }}\n{% for m in messages %}\n  {% if true %}\n{{ m.role }}:\n  {% endif %}\n{% endfor %}\n";
        assert_eq!(render(source), "<s>\nuser:\nassistant:\n");
    }

    #[test]
    fn python_methods_and_values_work() {
        assert_eq!(
            render("{{ messages[1].content.strip().split('x')[-1] }}{{ messages[0].get('n') }}"),
            "éNone"
        );
        assert_eq!(render("{{ messages[::-1][0]['content'] ~ true }}{{ true }}"), "éTrueTrue");
        assert_eq!(
            render("{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{{ m.role }}{% endfor %}"),
            "user"
        );
        assert_eq!(
            render("{% set ns = namespace(a=1) %}{% set ns.a = 2 %}{{ ns.a }}{{ tools is none }}"),
            "2True"
        );
    }

    #[test]
    fn json_is_that_of_python() {
        assert_eq!(render("{{ messages[0] | tojson }}"), r#"{"role": "user", "content": "a <b> & 'c'"}"#);
        assert_eq!(
            render("{{ [1, [], {'b': 1.0, 'a': none}] | tojson(indent=2) }}"),
            "[\n  1,\n  [],\n  {\n    \"b\": 1.0,\n    \"a\": null\n  }\n]"
        );
        assert_eq!(
            render(
                "{{ {'b': 1, 'a': 'é'} | tojson(sort_keys=true, ensure_ascii=false, separators=(',', ':')) }}"
            ),
            r#"{"a":"é","b":1}"#
        );
    }

    #[test]
    fn none_is_not_iterable() {
        let test = "{{ tools is iterable }}{{ messages is iterable }}{{ 'a' is iterable }}{{ {} is iterable }}{{ 1 is iterable }}";
        assert_eq!(render(test), "FalseTrueTrueTrueFalse");
        assert_eq!(render("{{ 'é👋' | tojson(ensure_ascii=true) }}"), r#""\u00e9\ud83d\udc4b""#);
    }

    #[test]
    fn dates_are_fixed_for_training() {
        assert_eq!(render("{{ strftime_now('%d %b %Y') }}"), "26 Jul 2024");
        let error = template("{{ strftime_now('%Q!') }}").render(&[], None, false).unwrap_err();
        assert!(error.to_string().contains("is not a date format"), "{error}");
        let error = template("{{ strftime_now('%z') }}").render(&[], None, false).unwrap_err();
        assert!(error.to_string().contains("needs a time zone"), "{error}");
    }

    #[test]
    fn generation_blocks_give_spans() {
        let source = "{% for m in messages %}\n{% if m.role == 'assistant' %}\n[{%- generation -%} {{ m.content }}! {%- endgeneration -%} ]\n{% else %}\n({{ m.content }})\n{% endif %}\n{% endfor %}\n";
        let template = template(source);
        assert!(template.has_generation());
        let messages =
            [Message::new("user", "q"), Message::new("assistant", "é"), Message::new("assistant", "z")];
        let rendered = template.render_spans(&messages, None, false, None).unwrap();
        assert_eq!(rendered.text, "(q)\n[é!]\n[z!]\n");
        let spans: Vec<_> = rendered.generated.iter().map(|span| &rendered.text[span.clone()]).collect();
        assert_eq!(spans, ["é!", "z!"]);
    }

    #[test]
    fn failures_name_the_line_and_the_place() {
        let source =
            "x\n{% if messages|length > 1 %}{{ raise_exception('roles must alternate') }}{% endif %}";
        let messages = [Message::new("user", "a"), Message::new("user", "b")];
        let error = template(source).render(&messages, None, false).unwrap_err();
        assert_eq!(
            error.to_string(),
            "chat template, line 2: roles must alternate, in raise_exception('roles must alternate')"
        );
        let error = ChatTemplate::with_special("a\n{% if %}", Vec::new(), Clock::Fixed).err().unwrap();
        assert!(error.to_string().starts_with("chat template, line 2: "), "{error}");
    }

    #[test]
    fn string_arguments_are_the_second_try() {
        let source = "{{ messages[0].tool_calls[0].function.arguments + '!' }}";
        let call = Message::tool_call("f", &json!({"a": 1}));
        assert_eq!(template(source).render(&[call], None, false).unwrap(), "{\"a\":1}!");
    }
}
