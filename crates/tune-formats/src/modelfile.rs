//! Modelfiles: what `ollama create` reads.
//!
//! A value has no escapes: it ends with its line, or, after `"""`, at a `"""` that ends a line, and characters that
//! are not printable are dropped. Text that would not arrive as it is, is refused here.

use std::fmt::Write as _;

use crate::FormatError;

/// A Modelfile.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Modelfile {
    /// The model: a path to a GGUF file or a directory, or the name of a model that Ollama has.
    pub from: String,
    /// Path to a GGUF adapter.
    pub adapter: Option<String>,
    /// Prompt template in Go's template language.
    pub template: Option<String>,
    /// System prompt.
    pub system: Option<String>,
    /// Parameters, in order; `stop` may repeat.
    pub parameters: Vec<(String, Parameter)>,
    /// Licence texts.
    pub license: Vec<String>,
    /// Lines before the first, as comments.
    pub comments: Vec<String>,
}

/// The value of a parameter.
#[derive(Clone, Debug, PartialEq)]
pub enum Parameter {
    /// `num_ctx`, `seed`, `top_k`, …
    Int(i64),
    /// `temperature`, `top_p`, …
    Float(f64),
    /// `use_mmap`.
    Bool(bool),
    /// `stop`.
    Text(String),
}

/// Names and kinds of parameters, from Ollama's API options.
const INTEGERS: [&str; 11] = [
    "num_ctx",
    "num_keep",
    "seed",
    "num_predict",
    "top_k",
    "repeat_last_n",
    "num_batch",
    "num_gpu",
    "main_gpu",
    "num_thread",
    "draft_num_predict",
];
const FLOATS: [&str; 7] =
    ["top_p", "min_p", "typical_p", "temperature", "repeat_penalty", "presence_penalty", "frequency_penalty"];
const BOOLS: [&str; 1] = ["use_mmap"];
const TEXTS: [&str; 1] = ["stop"];

/// The text of a Modelfile.
///
/// # Errors
/// A value that the grammar cannot express, or a parameter that Ollama does not know.
pub fn render(modelfile: &Modelfile) -> Result<String, FormatError> {
    let mut out = String::new();
    for comment in modelfile.comments.iter().flat_map(|comment| comment.lines()) {
        out += format!("# {comment}").trim_end();
        out.push('\n');
    }
    statement(&mut out, "FROM", &line("FROM", &modelfile.from)?);
    if let Some(adapter) = &modelfile.adapter {
        statement(&mut out, "ADAPTER", &line("ADAPTER", adapter)?);
    }
    if let Some(template) = &modelfile.template {
        statement(&mut out, "TEMPLATE", &quoted("TEMPLATE", template)?);
    }
    if let Some(system) = &modelfile.system {
        statement(&mut out, "SYSTEM", &quoted("SYSTEM", system)?);
    }
    for (name, value) in &modelfile.parameters {
        statement(&mut out, "PARAMETER", &format!("{name} {}", parameter(name, value)?));
    }
    for license in &modelfile.license {
        statement(&mut out, "LICENSE", &quoted("LICENSE", license)?);
    }
    Ok(out)
}

/// Takes out the optional values that the grammar cannot express, and gives the command of each with the reason.
pub fn leave_out_what_has_no_form(modelfile: &mut Modelfile) -> Vec<(&'static str, String)> {
    let mut left_out = Vec::new();
    let mut judge = |command: &'static str, form: Result<String, FormatError>| match form {
        Ok(_) => true,
        Err(FormatError::Modelfile { reason, .. }) => {
            left_out.push((command, reason));
            false
        }
        Err(other) => {
            left_out.push((command, other.to_string()));
            false
        }
    };
    modelfile.template.take_if(|text| !judge("TEMPLATE", quoted("TEMPLATE", text)));
    modelfile.system.take_if(|text| !judge("SYSTEM", quoted("SYSTEM", text)));
    modelfile.parameters.retain(|(name, value)| judge("PARAMETER", parameter(name, value)));
    modelfile.license.retain(|text| judge("LICENSE", quoted("LICENSE", text)));
    left_out
}

fn statement(out: &mut String, command: &str, value: &str) {
    // Writing to a string cannot fail.
    let _ = writeln!(out, "{command} {value}");
}

fn parameter(name: &str, value: &Parameter) -> Result<String, FormatError> {
    let (kind, names): (_, &[&str]) = match value {
        Parameter::Int(_) => ("an integer", &INTEGERS),
        Parameter::Float(_) => ("a number", &FLOATS),
        Parameter::Bool(_) => ("a flag", &BOOLS),
        Parameter::Text(_) => ("text", &TEXTS),
    };
    if !names.contains(&name) {
        let known = [&INTEGERS[..], &FLOATS, &BOOLS, &TEXTS].concat().contains(&name);
        let reason =
            if known { format!("{name} is not {kind}") } else { format!("Ollama has no parameter {name}") };
        return Err(refuse("PARAMETER", reason));
    }
    Ok(match value {
        Parameter::Int(value) => value.to_string(),
        Parameter::Float(value) if value.is_finite() => value.to_string(),
        Parameter::Float(value) => return Err(refuse("PARAMETER", format!("{name} is {value}"))),
        Parameter::Bool(value) => value.to_string(),
        Parameter::Text(text) if text.contains(['"', '\n', '\r']) => quoted("PARAMETER", text)?,
        Parameter::Text(text) => {
            printable("PARAMETER", text)?;
            format!("\"{text}\"")
        }
    })
}

/// A value on one line, without quotes.
fn line(command: &str, text: &str) -> Result<String, FormatError> {
    printable(command, text)?;
    if text.is_empty() {
        return Err(refuse(command, "it is empty"));
    }
    if text.contains(['\n', '\r']) || text.starts_with('"') || text.trim_matches([' ', '\t']) != text {
        return Err(refuse(command, "it has several lines, outer blanks or a leading quote"));
    }
    Ok(text.to_owned())
}

/// A value between `"""`.
fn quoted(command: &str, text: &str) -> Result<String, FormatError> {
    printable(command, text)?;
    if text.contains("\"\"\"") {
        return Err(refuse(command, "it contains \"\"\""));
    }
    Ok(format!("\"\"\"{text}\"\"\""))
}

/// Refuses characters that Ollama drops.
fn printable(command: &str, text: &str) -> Result<(), FormatError> {
    let dropped = text.chars().find(|&c| !matches!(c, '\n' | '\r' | '\t') && !is_printable(c));
    match dropped {
        None => Ok(()),
        Some(c) => Err(refuse(command, format!("the character {} would be lost", c.escape_unicode()))),
    }
}

/// Letters, marks, numbers, punctuation, symbols and the ASCII space, as in Go's `unicode.IsPrint`.
fn is_printable(c: char) -> bool {
    // The standard library has the table behind its debug escapes. A mark is only escaped when it comes first.
    let text = ['a', c].iter().collect::<String>();
    !text.escape_debug().to_string().contains("\\u{") && !matches!(c, '\0')
}

fn refuse(command: &str, reason: impl Into<String>) -> FormatError {
    FormatError::Modelfile { command: command.to_owned(), reason: reason.into() }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Values as Ollama's state machine reads them.
    fn parse(text: &str) -> Vec<(String, String)> {
        let mut statements = Vec::new();
        let mut rest = text;
        while !rest.is_empty() {
            let (first, after) = rest.split_once('\n').unwrap_or((rest, ""));
            if first.starts_with('#') || first.trim().is_empty() {
                rest = after;
                continue;
            }
            let (mut command, mut value) = first.split_once(' ').expect("a command and a value");
            let name;
            if command == "PARAMETER" {
                let (parameter, text) = value.split_once(' ').expect("a name and a value");
                name = format!("PARAMETER {parameter}");
                (command, value) = (&name, text);
            }
            let start = text.len() - rest.len() + (value.as_ptr() as usize - first.as_ptr() as usize);
            let mut end = start + value.len();
            let quote = ["\"\"\"", "\""].into_iter().find(|quote| value.starts_with(quote));
            let read = if let Some(quote) = quote {
                loop {
                    let so_far = text[start..end].trim();
                    if so_far.len() >= 2 * quote.len() && so_far.ends_with(quote) {
                        break so_far[quote.len()..so_far.len() - quote.len()].to_owned();
                    }
                    assert!(end < text.len(), "an unterminated value: {so_far}");
                    end = text[end + 1..].find('\n').map_or(text.len(), |next| end + 1 + next);
                }
            } else {
                value.trim().to_owned()
            };
            statements.push((command.to_owned(), read));
            rest = text.get(end + 1..).unwrap_or("");
        }
        statements
    }

    #[test]
    fn every_statement_has_its_line() {
        let modelfile = Modelfile {
            from: "./model.gguf".into(),
            adapter: Some("./adapter.gguf".into()),
            template: Some("{{ .Prompt }}\n\"quoted\"".into()),
            system: Some("be \"brief\"".into()),
            parameters: vec![
                ("stop".into(), Parameter::Text("<|im_end|>".into())),
                ("stop".into(), Parameter::Text("\n\"".into())),
                ("num_ctx".into(), Parameter::Int(8192)),
                ("temperature".into(), Parameter::Float(0.2)),
            ],
            license: vec!["Apache 2.0".into()],
            comments: vec!["made by tune".into()],
        };
        let text = render(&modelfile).expect("expressible");
        assert!(text.starts_with("# made by tune\nFROM ./model.gguf\nADAPTER ./adapter.gguf\n"), "{text}");
        assert!(text.contains("PARAMETER stop \"<|im_end|>\"\n"), "{text}");
        let statements = parse(&text);
        let value = |command: &str| {
            statements.iter().filter(|(c, _)| c == command).map(|(_, v)| v.as_str()).collect::<Vec<_>>()
        };
        assert_eq!(value("TEMPLATE"), ["{{ .Prompt }}\n\"quoted\""]);
        assert_eq!(value("SYSTEM"), ["be \"brief\""]);
        assert_eq!(value("PARAMETER stop"), ["<|im_end|>", "\n\""]);
        assert_eq!(value("PARAMETER temperature"), ["0.2"]);
    }

    #[test]
    fn what_would_not_arrive_is_refused() {
        let with = |system: &str| {
            render(&Modelfile { from: "x".into(), system: Some(system.into()), ..Modelfile::default() })
        };
        for text in ["a\"\"\"b", "family \u{1f469}\u{200d}\u{1f467}", "no\u{a0}break", "bell\u{7}", "nul\0"] {
            assert!(with(text).is_err(), "{text:?}");
        }
        for text in
            ["tab\tand\nline", "caf\u{e9} e\u{301} \u{65e5}\u{672c} \u{1f999}", "back\\slash 'n \"quotes\""]
        {
            assert!(with(text).is_ok(), "{text:?}");
        }
        for from in ["", "two\nlines", " blank", "\"quoted"] {
            assert!(render(&Modelfile { from: from.into(), ..Modelfile::default() }).is_err(), "{from:?}");
        }
        let parameters = vec![("num_ctxx".to_owned(), Parameter::Int(1))];
        let error =
            render(&Modelfile { from: "x".into(), parameters, ..Modelfile::default() }).expect_err("unknown");
        assert!(error.to_string().contains("num_ctxx"), "{error}");
    }

    #[test]
    fn what_has_no_form_is_named_and_the_rest_stays() {
        let mut modelfile = Modelfile {
            from: "x".into(),
            template: Some("{{ .Prompt }}".into()),
            system: Some("write \"\"\" around code".into()),
            parameters: vec![
                ("stop".into(), Parameter::Text("\u{200b}".into())),
                ("stop".into(), Parameter::Text("<|im_end|>".into())),
            ],
            ..Modelfile::default()
        };
        let left_out = leave_out_what_has_no_form(&mut modelfile);
        assert_eq!(left_out.iter().map(|(command, _)| *command).collect::<Vec<_>>(), ["SYSTEM", "PARAMETER"]);
        let text = render(&modelfile).expect("expressible now");
        assert_eq!(text, "FROM x\nTEMPLATE \"\"\"{{ .Prompt }}\"\"\"\nPARAMETER stop \"<|im_end|>\"\n");
    }

    proptest! {
        /// Any text at all: what is rendered reads back as it was, and what is not rendered is left out by name.
        #[test]
        fn any_modelfile_renders_to_what_reads_back(
            template in any::<String>(),
            system in any::<String>(),
            stops in prop::collection::vec(any::<String>(), 0..3),
        ) {
            let mut modelfile = Modelfile {
                from: "./model.gguf".into(),
                adapter: Some("./adapter.gguf".into()),
                template: Some(template),
                system: Some(system),
                parameters: stops.into_iter().map(|stop| ("stop".into(), Parameter::Text(stop))).collect(),
                comments: vec!["several\nlines".into()],
                ..Modelfile::default()
            };
            leave_out_what_has_no_form(&mut modelfile);
            let text = render(&modelfile).expect("everything left has a form");
            let mut expected = vec![("FROM", "./model.gguf"), ("ADAPTER", "./adapter.gguf")];
            expected.extend(modelfile.template.as_deref().map(|text| ("TEMPLATE", text)));
            expected.extend(modelfile.system.as_deref().map(|text| ("SYSTEM", text)));
            for (_, value) in &modelfile.parameters {
                let Parameter::Text(stop) = value else { unreachable!() };
                expected.push(("PARAMETER stop", stop));
            }
            let expected: Vec<(String, String)> =
                expected.iter().map(|(command, value)| ((*command).to_owned(), (*value).to_owned())).collect();
            prop_assert_eq!(parse(&text), expected);
        }

        #[test]
        fn values_arrive_as_they_were(system in "[a-z\" \n{}.]{0,40}", stop in "[a-z\"<|\n]{1,12}") {
            let modelfile = Modelfile {
                from: "./model.gguf".into(),
                system: Some(system.clone()),
                parameters: vec![("stop".into(), Parameter::Text(stop.clone()))],
                ..Modelfile::default()
            };
            match render(&modelfile) {
                Ok(text) => {
                    let expected = [("FROM", "./model.gguf"), ("SYSTEM", &system), ("PARAMETER stop", &stop)];
                    let expected = expected.map(|(command, value)| (command.to_owned(), value.to_owned()));
                    prop_assert_eq!(parse(&text), expected);
                }
                Err(_) => prop_assert!(system.contains("\"\"\"") || stop.contains("\"\"\"")),
            }
        }
    }
}
