//! The chat format of a model as a Go template, for Ollama before 0.30.
//!
//! Newer servers run the Jinja template in the GGUF file. Older ones need a Go template, and one that differs from
//! what the model was trained on ruins its answers, so none is guessed: a known template is used only where it
//! renders the same text as the model's own for a few probing conversations.

use crate::ollama_prompt::ollama_prompt;

/// Renders messages `(role, content)` with the model's own template, the second argument asking for the start of
/// an answer; `None` where the template refuses them.
pub type Render<'a> = dyn Fn(&[(&str, &str)], bool) -> Option<String> + 'a;

/// A Go template equal to the model's own, and the system prompt it puts in front when there is none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct GoTemplate {
    /// Name of the format, such as `chatml`.
    pub(crate) name: &'static str,
    /// Value of `TEMPLATE`.
    pub(crate) template: String,
    /// Value of `SYSTEM`, where the model's template has a default.
    pub(crate) default_system: Option<String>,
}

/// A format whose messages are all wrapped alike.
struct Format {
    name: &'static str,
    before_role: &'static str,
    before_content: &'static str,
    after_content: &'static str,
    /// What the format calls the assistant.
    assistant: &'static str,
}

const FORMATS: [Format; 5] = [
    Format {
        name: "chatml",
        before_role: "<|im_start|>",
        before_content: "\n",
        after_content: "<|im_end|>\n",
        assistant: "assistant",
    },
    Format {
        name: "llama3",
        before_role: "<|start_header_id|>",
        before_content: "<|end_header_id|>\n\n",
        after_content: "<|eot_id|>",
        assistant: "assistant",
    },
    Format {
        name: "gemma",
        before_role: "<start_of_turn>",
        before_content: "\n",
        after_content: "<end_of_turn>\n",
        assistant: "model",
    },
    Format {
        name: "phi3",
        before_role: "<|",
        before_content: "|>\n",
        after_content: "<|end|>\n",
        assistant: "assistant",
    },
    Format {
        name: "phi4",
        before_role: "<|",
        before_content: "|>",
        after_content: "<|end|>",
        assistant: "assistant",
    },
];

/// The Go template that renders what `render` renders. `bos` is the text that a template may start with; engines
/// add that token themselves.
pub(crate) fn equivalent(render: &Render<'_>, bos: Option<&str>) -> Option<GoTemplate> {
    // As it is first: SmolLM2's BOS is the very token that opens its turns.
    [None, bos].into_iter().find_map(|bos| {
        let render = |messages: &[(&str, &str)]| {
            let text = render(messages, true)?;
            Some(bos.and_then(|bos| text.strip_prefix(bos)).unwrap_or(&text).to_owned())
        };
        FORMATS.iter().find_map(|format| format.matching(render))
    })
}

/// Whether a Go template under Ollama's rules renders what `render` renders, for a few probing conversations; `false`
/// where that cannot be told.
pub(crate) fn renders_alike(
    template: &str,
    system: Option<&str>,
    render: &Render<'_>,
    bos: Option<&str>,
) -> bool {
    let with_system = [("system", SYSTEM), USER];
    let conversations: [&[(&str, &str)]; 3] = [&[USER], &TURNS, &with_system];
    conversations.into_iter().all(|messages| {
        match (ollama_prompt(template, system, messages), render(messages, true)) {
            (Some(found), Some(wanted)) => is_same_prompt(&found, &wanted, bos),
            // what the model's own template refuses, nothing can be held to
            (_, None) => messages == with_system,
            (None, Some(_)) => false,
        }
    })
}

/// Whether two prompts are the same, apart from the BOS token, which engines add themselves.
pub fn is_same_prompt(found: &str, wanted: &str, bos: Option<&str>) -> bool {
    let without = |text: &'_ str| bos.and_then(|bos| text.strip_prefix(bos)).unwrap_or(text).to_owned();
    found == wanted || without(found) == without(wanted)
}

const USER: (&str, &str) = ("user", "Is it far?");
const TURNS: [(&str, &str); 3] = [USER, ("assistant", "No, two miles."), ("user", "Thank you.")];
const SYSTEM: &str = "Answer briefly.";

impl Format {
    fn matching(&self, render: impl Fn(&[(&str, &str)]) -> Option<String>) -> Option<GoTemplate> {
        let turns = render(&TURNS)?;
        let wrapped = self.wrap_all(&TURNS);
        let head = turns.strip_suffix(&wrapped)?;
        if render(&[USER])? != format!("{head}{}", self.wrap_all(&[USER])) {
            return None;
        }
        let with_system = render(&[("system", SYSTEM), USER]);
        let (open, close) = self.around("system");
        if head.is_empty() {
            // Formats without a system role refuse it or fold it into the first turn; Ollama cannot be told so.
            let plain = with_system.is_none_or(|text| text == self.wrap_all(&[("system", SYSTEM), USER]));
            return plain.then(|| self.template(None));
        }
        // A system block is always there: either a default that the user's text replaces, or a fixed text before it.
        let block = head.strip_prefix(&open)?.strip_suffix(&close)?;
        let with_system = with_system?;
        let given =
            with_system.strip_suffix(&self.wrap_all(&[USER]))?.strip_prefix(&open)?.strip_suffix(&close)?;
        if given == SYSTEM {
            let default_system = Some(block.to_owned());
            return Some(GoTemplate { default_system, ..self.template(None) });
        }
        let fixed = given.strip_suffix(SYSTEM)?;
        (fixed == block && !fixed.contains("{{")).then(|| self.template(Some(fixed)))
    }

    fn template(&self, fixed_system: Option<&str>) -> GoTemplate {
        let Self { name, before_role, before_content, after_content, assistant } = self;
        let role = match *assistant {
            "assistant" => "{{ .Role }}".to_owned(),
            other => format!(
                "{{{{ if eq .Role \"assistant\" }}}}{other}{{{{ else }}}}{{{{ .Role }}}}{{{{ end }}}}"
            ),
        };
        let message = format!("{before_role}{role}{before_content}{{{{ .Content }}}}{after_content}");
        let answer = format!("{before_role}{assistant}{before_content}");
        let template = match fixed_system {
            None => format!("{{{{ range .Messages }}}}{message}{{{{ end }}}}{answer}"),
            Some(fixed) => {
                let (open, close) = self.around("system");
                format!(
                    "{open}{fixed}{{{{ .System }}}}{close}{{{{ range .Messages }}}}{{{{ if ne .Role \"system\" \
                     }}}}{message}{{{{ end }}}}{{{{ end }}}}{answer}"
                )
            }
        };
        GoTemplate { name, template, default_system: None }
    }

    fn wrap_all(&self, messages: &[(&str, &str)]) -> String {
        let wrapped = messages.iter().map(|(role, content)| {
            let (open, close) = self.around(role);
            format!("{open}{content}{close}")
        });
        wrapped.collect::<String>() + &self.around("assistant").0
    }

    /// What stands before and after the content of a message.
    fn around(&self, role: &str) -> (String, String) {
        let role = if role == "assistant" { self.assistant } else { role };
        (format!("{}{role}{}", self.before_role, self.before_content), self.after_content.to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chatml(messages: &[(&str, &str)], default_system: Option<&str>) -> String {
        let mut text = String::new();
        let default = default_system.filter(|_| messages[0].0 != "system").map(|text| ("system", text));
        for (role, content) in default.iter().chain(messages) {
            text.extend(["<|im_start|>", role, "\n", content, "<|im_end|>\n"]);
        }
        text + "<|im_start|>assistant\n"
    }

    #[test]
    fn chatml_with_and_without_a_default_system_prompt() {
        let plain =
            equivalent(&|messages, _| Some(chatml(messages, None)), Some("<|im_start|>")).expect("known");
        assert_eq!((plain.name, plain.default_system), ("chatml", None));
        assert_eq!(
            plain.template,
            "{{ range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n"
        );
        let smollm =
            equivalent(&|messages, _| Some(chatml(messages, Some("You are SmolLM."))), None).expect("known");
        assert_eq!(smollm.default_system.as_deref(), Some("You are SmolLM."));
    }

    #[test]
    fn llama_3_2_keeps_its_fixed_system_lines() {
        let render = |messages: &[(&str, &str)], _: bool| {
            let (system, rest) = match messages {
                [("system", system), rest @ ..] => (*system, rest),
                rest => ("", rest),
            };
            let mut text = format!(
                "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul \
                 2024\n\n{system}<|eot_id|>"
            );
            for (role, content) in rest {
                text.extend(["<|start_header_id|>", role, "<|end_header_id|>\n\n", content, "<|eot_id|>"]);
            }
            Some(text + "<|start_header_id|>assistant<|end_header_id|>\n\n")
        };
        let found = equivalent(&render, Some("<|begin_of_text|>")).expect("known");
        assert_eq!((found.name, found.default_system.clone()), ("llama3", None));
        assert!(
            found.template.starts_with(
                "<|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024\n\n{{ .System }}<|eot_id|>"
            ),
            "{}",
            found.template
        );
    }

    #[test]
    fn gemma_calls_the_assistant_model() {
        let render = |messages: &[(&str, &str)], _: bool| {
            let mut text = "<bos>".to_owned();
            for (role, content) in messages {
                let role = match *role {
                    "system" => return None,
                    "assistant" => "model",
                    other => other,
                };
                text.extend(["<start_of_turn>", role, "\n", content, "<end_of_turn>\n"]);
            }
            Some(text + "<start_of_turn>model\n")
        };
        let found = equivalent(&render, Some("<bos>")).expect("known");
        assert_eq!(found.name, "gemma");
        assert!(
            found.template.contains("{{ if eq .Role \"assistant\" }}model{{ else }}"),
            "{}",
            found.template
        );
    }

    #[test]
    fn under_ollamas_rules_the_templates_render_what_they_are_equal_to() {
        let smollm = |messages: &[(&str, &str)], _: bool| Some(chatml(messages, Some("You are SmolLM.")));
        let found = equivalent(&smollm, None).expect("known");
        assert!(renders_alike(&found.template, found.default_system.as_deref(), &smollm, None));
        // another default system prompt is another model
        assert!(!renders_alike(&found.template, None, &smollm, None));
        assert!(!renders_alike("{{ .Prompt }}", found.default_system.as_deref(), &smollm, None));
        let gemma = |messages: &[(&str, &str)], _: bool| {
            let role = |role: &str| match role {
                "system" => None,
                "assistant" => Some("model"),
                _ => Some("user"),
            };
            let turns = messages.iter().map(|(name, content)| {
                Some(format!("<start_of_turn>{}\n{content}<end_of_turn>\n", role(name)?))
            });
            Some(format!("<bos>{}<start_of_turn>model\n", turns.collect::<Option<String>>()?))
        };
        let found = equivalent(&gemma, Some("<bos>")).expect("known");
        assert!(renders_alike(&found.template, None, &gemma, Some("<bos>")));
    }

    #[test]
    fn what_renders_otherwise_is_not_guessed() {
        // ChatML, but earlier answers are dropped from the history.
        let render = |messages: &[(&str, &str)], _: bool| {
            let kept: Vec<_> = messages.iter().filter(|(role, _)| *role != "assistant").copied().collect();
            Some(chatml(&kept, None))
        };
        assert_eq!(equivalent(&render, None), None);
        assert_eq!(equivalent(&|_, _| None, None), None);
    }
}
