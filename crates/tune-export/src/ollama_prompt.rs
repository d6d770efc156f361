//! The prompt that Ollama makes of a conversation by a Go template.
//!
//! The part of Go's `text/template` that chat templates are mostly made of, with Ollama's rules around it: the system
//! prompt of the model stands before a conversation without one, neighbours of one role become one message with a
//! blank line between, and all system messages together are `.System`. What goes beyond (tools, variables, functions)
//! is not rendered, so that nothing is claimed of it.

/// A conversation as Ollama hands it to a template.
struct Conversation {
    system: String,
    /// Role and content.
    messages: Vec<(String, String)>,
}

/// The prompt; `None` where the template uses more than is known here.
///
/// `system` is the system prompt of the model.
pub fn ollama_prompt(template: &str, system: Option<&str>, messages: &[(&str, &str)]) -> Option<String> {
    let nodes = parse(template)?;
    let system = system.filter(|_| messages.first().is_none_or(|(role, _)| *role != "system"));
    let conversation = collate(system.map(|text| ("system", text)).iter().chain(messages));
    if uses(&nodes, &Field::Messages) {
        let mut out = String::new();
        execute(&nodes, &Scope { conversation: &conversation, message: None, turn: None }, &mut out)?;
        return Some(out);
    }
    turn_by_turn(&nodes, &conversation)
}

/// A piece of a template.
#[derive(Debug, Clone, PartialEq)]
enum Node {
    Text(String),
    Value(Field),
    Range(Vec<Node>),
    If(Condition, Vec<Node>, Vec<Node>),
}

#[derive(Debug, Clone, PartialEq)]
enum Field {
    System,
    Prompt,
    Response,
    Messages,
    Role,
    Content,
}

#[derive(Debug, Clone, PartialEq)]
enum Condition {
    Set(Field),
    Is(Field, String),
    IsNot(Field, String),
    All(Vec<Condition>),
    Any(Vec<Condition>),
    /// Whether there is what is never there: tools, thinking.
    Never,
}

/// System messages together, and neighbours of one role as one.
fn collate<'a>(messages: impl Iterator<Item = &'a (&'a str, &'a str)>) -> Conversation {
    let mut system = Vec::new();
    let mut collated: Vec<(String, String)> = Vec::new();
    for &(role, content) in messages {
        if role == "system" {
            system.push(content);
        }
        match collated.last_mut() {
            Some((last, text)) if last == role && role != "tool" => {
                text.push_str("\n\n");
                text.push_str(content);
            }
            _ => collated.push((role.to_owned(), content.to_owned())),
        }
    }
    Conversation { system: system.join("\n\n"), messages: collated }
}

/// What the names of a template stand for.
struct Scope<'a> {
    conversation: &'a Conversation,
    /// The message of a range.
    message: Option<&'a (String, String)>,
    /// System, prompt and response of a template that renders turn by turn.
    turn: Option<[&'a str; 3]>,
}

impl Scope<'_> {
    fn value(&self, field: &Field) -> Option<&str> {
        let turn = |n: usize| self.turn.map(|turn| turn[n]);
        match field {
            Field::System => turn(0).or(Some(&self.conversation.system)),
            Field::Prompt => turn(1).or(Some("")),
            Field::Response => turn(2).or(Some("")),
            Field::Role => self.message.map(|(role, _)| role.as_str()),
            Field::Content => self.message.map(|(_, content)| content.as_str()),
            Field::Messages => None,
        }
    }

    fn holds(&self, condition: &Condition) -> Option<bool> {
        Some(match condition {
            Condition::Set(Field::Messages) => self.turn.is_none() && !self.conversation.messages.is_empty(),
            Condition::Set(field) => !self.value(field)?.is_empty(),
            Condition::Is(field, text) => self.value(field)? == text,
            Condition::IsNot(field, text) => self.value(field)? != text,
            Condition::All(parts) => parts
                .iter()
                .map(|part| self.holds(part))
                .collect::<Option<Vec<_>>>()?
                .iter()
                .all(|held| *held),
            Condition::Any(parts) => parts
                .iter()
                .map(|part| self.holds(part))
                .collect::<Option<Vec<_>>>()?
                .iter()
                .any(|held| *held),
            Condition::Never => false,
        })
    }
}

fn execute(nodes: &[Node], scope: &Scope<'_>, out: &mut String) -> Option<()> {
    for node in nodes {
        match node {
            Node::Text(text) => out.push_str(text),
            Node::Value(field) => out.push_str(scope.value(field)?),
            Node::Range(body) => {
                for message in &scope.conversation.messages {
                    execute(body, &Scope { message: Some(message), ..*scope }, out)?;
                }
            }
            Node::If(condition, yes, no) => {
                execute(if scope.holds(condition)? { yes } else { no }, scope, out)?;
            }
        }
    }
    Some(())
}

/// A template without `.Messages` is rendered once a turn, the last time up to its response.
fn turn_by_turn(nodes: &[Node], conversation: &Conversation) -> Option<String> {
    let mut nodes = nodes.to_vec();
    if !uses(&nodes, &Field::Response) {
        nodes.push(Node::Value(Field::Response));
    }
    let mut out = String::new();
    let mut turn = ["", "", ""];
    let mut finish = |turn: &mut [&str; 3], nodes: &[Node]| {
        execute(nodes, &Scope { conversation, message: None, turn: Some(*turn) }, &mut out)?;
        *turn = [""; 3];
        Some(())
    };
    for (role, content) in &conversation.messages {
        match role.as_str() {
            "system" => {
                if !turn[1].is_empty() || !turn[2].is_empty() {
                    finish(&mut turn, &nodes)?;
                }
                turn[0] = content;
            }
            "user" => {
                if !turn[2].is_empty() {
                    finish(&mut turn, &nodes)?;
                }
                turn[1] = content;
            }
            "assistant" => turn[2] = content,
            _ => return None,
        }
    }
    let mut head = nodes.clone();
    cut_at_response(&mut head);
    finish(&mut turn, &head)?;
    Some(out)
}

/// Drops the first `.Response` and everything after it; whether there was one.
fn cut_at_response(nodes: &mut Vec<Node>) -> bool {
    for n in 0..nodes.len() {
        let found = match &mut nodes[n] {
            Node::Value(Field::Response) => {
                nodes.truncate(n);
                return true;
            }
            Node::If(_, yes, no) => cut_at_response(yes) || cut_at_response(no),
            _ => false,
        };
        if found {
            nodes.truncate(n + 1);
            return true;
        }
    }
    false
}

fn uses(nodes: &[Node], field: &Field) -> bool {
    nodes.iter().any(|node| match node {
        Node::Text(_) => false,
        Node::Value(own) => own == field,
        Node::Range(body) => *field == Field::Messages || uses(body, field),
        Node::If(condition, yes, no) => {
            matches!(condition, Condition::Set(own) if own == field) || uses(yes, field) || uses(no, field)
        }
    })
}

/// Text, or what stands between `{{` and `}}`.
enum Piece<'a> {
    Text(String),
    Action(&'a str),
}

fn parse(template: &str) -> Option<Vec<Node>> {
    let mut pieces = Vec::new();
    let mut rest = template;
    let mut trim = false;
    loop {
        let (text, after) = rest.split_once("{{").map_or((rest, None), |(text, after)| (text, Some(after)));
        let text = if trim { text.trim_start_matches(SPACES) } else { text };
        let Some(after) = after else {
            pieces.push(Piece::Text(text.to_owned()));
            break;
        };
        let (mut action, after) = after.split_once("}}")?;
        let trims_before = action.starts_with('-') && action[1..].starts_with(SPACES);
        trim = action.ends_with('-') && action[..action.len() - 1].ends_with(SPACES);
        action = action.strip_prefix('-').filter(|_| trims_before).unwrap_or(action);
        action = action.strip_suffix('-').filter(|_| trim).unwrap_or(action);
        let text = if trims_before { text.trim_end_matches(SPACES) } else { text };
        pieces.push(Piece::Text(text.to_owned()));
        pieces.push(Piece::Action(action.trim_matches(SPACES)));
        rest = after;
    }
    let mut pieces = pieces.into_iter().peekable();
    let nodes = block(&mut pieces)?;
    pieces.next().is_none().then_some(nodes)
}

/// What Go's `-` takes away.
const SPACES: [char; 4] = [' ', '\t', '\r', '\n'];

type Pieces<'a> = std::iter::Peekable<std::vec::IntoIter<Piece<'a>>>;

/// Nodes up to an `end` or `else`, which stays.
fn block(pieces: &mut Pieces<'_>) -> Option<Vec<Node>> {
    let mut nodes = Vec::new();
    while let Some(piece) = pieces.peek() {
        match piece {
            Piece::Action(action) if *action == "end" || action.starts_with("else") => break,
            Piece::Action(_) | Piece::Text(_) => {}
        }
        match pieces.next()? {
            Piece::Text(text) if text.is_empty() => {}
            Piece::Text(text) => nodes.push(Node::Text(text)),
            Piece::Action(action) if action.starts_with("/*") && action.ends_with("*/") => {}
            Piece::Action(action) => nodes.push(node(action, pieces)?),
        }
    }
    Some(nodes)
}

fn node(action: &str, pieces: &mut Pieces<'_>) -> Option<Node> {
    if action == "range .Messages" {
        let body = block(pieces)?;
        return ends(pieces).then_some(Node::Range(body));
    }
    match action.strip_prefix("if ") {
        Some(text) => branch(text, pieces),
        None => match field(action)? {
            Field::Messages => None,
            field => Some(Node::Value(field)),
        },
    }
}

fn branch(text: &str, pieces: &mut Pieces<'_>) -> Option<Node> {
    let condition = condition(text)?;
    let yes = block(pieces)?;
    let no = match pieces.next()? {
        Piece::Action("end") => Vec::new(),
        Piece::Action("else") => {
            let no = block(pieces)?;
            if !ends(pieces) {
                return None;
            }
            no
        }
        // `else if` shares the `end`
        Piece::Action(action) => vec![branch(action.strip_prefix("else if ")?, pieces)?],
        Piece::Text(_) => return None,
    };
    Some(Node::If(condition, yes, no))
}

fn ends(pieces: &mut Pieces<'_>) -> bool {
    matches!(pieces.next(), Some(Piece::Action("end")))
}

fn field(text: &str) -> Option<Field> {
    Some(match text.strip_prefix('$').unwrap_or(text) {
        ".System" => Field::System,
        ".Prompt" => Field::Prompt,
        ".Response" => Field::Response,
        ".Messages" => Field::Messages,
        ".Role" => Field::Role,
        ".Content" => Field::Content,
        _ => return None,
    })
}

fn condition(text: &str) -> Option<Condition> {
    let text = text.trim_matches(SPACES);
    let text = text
        .strip_prefix('(')
        .and_then(|text| text.strip_suffix(')'))
        .filter(|text| balanced(text))
        .unwrap_or(text);
    if let Some(field) = field(text) {
        return Some(Condition::Set(field));
    }
    if [".Tools", "$.Tools", ".ToolCalls", ".Thinking", ".Think", "$.Think", ".IsThinkSet", "$.IsThinkSet"]
        .contains(&text)
    {
        return Some(Condition::Never);
    }
    let (function, arguments) = text.split_once(' ')?;
    let arguments = words(arguments)?;
    let comparison = || {
        let [name, quoted] = arguments.as_slice() else { return None };
        let text = quoted.strip_prefix('"')?.strip_suffix('"')?;
        (!text.contains('\\')).then(|| Some((field(name)?, text.to_owned())))?
    };
    match function {
        "eq" => comparison().map(|(field, text)| Condition::Is(field, text)),
        "ne" => comparison().map(|(field, text)| Condition::IsNot(field, text)),
        "and" => arguments.iter().map(|part| condition(part)).collect::<Option<_>>().map(Condition::All),
        "or" => arguments.iter().map(|part| condition(part)).collect::<Option<_>>().map(Condition::Any),
        _ => None,
    }
}

/// Arguments, those in parentheses or quotes whole.
fn words(text: &str) -> Option<Vec<&str>> {
    let mut words = Vec::new();
    let (mut depth, mut quoted, mut start) = (0_usize, false, None);
    for (at, c) in text.char_indices() {
        match c {
            '"' => quoted = !quoted,
            '(' if !quoted => depth += 1,
            ')' if !quoted => depth = depth.checked_sub(1)?,
            _ => {}
        }
        let between = c == ' ' && !quoted && depth == 0;
        match (between, start) {
            (true, Some(from)) => {
                words.push(&text[from..at]);
                start = None;
            }
            (false, None) => start = Some(at),
            _ => {}
        }
    }
    words.extend(start.map(|from| &text[from..]));
    (depth == 0 && !quoted).then_some(words)
}

fn balanced(text: &str) -> bool {
    let mut depth = 0_i32;
    text.chars().all(|c| {
        depth += i32::from(c == '(') - i32::from(c == ')');
        depth >= 0
    }) && depth == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    const TURNS: [(&str, &str); 4] =
        [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello."), ("user", "Bye")];

    #[test]
    fn messages_are_ranged_over() {
        let chatml = "{{ range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n";
        assert_eq!(
            ollama_prompt(chatml, None, &TURNS[1..]).as_deref(),
            Some(
                "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n"
            )
        );
        // the model's own system prompt, where the conversation has none
        let with_own = ollama_prompt(chatml, Some("Be kind."), &TURNS[1..2]).expect("rendered");
        assert!(
            with_own.starts_with("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi"),
            "{with_own}"
        );
        let with_given = ollama_prompt(chatml, Some("Be kind."), &TURNS).expect("rendered");
        assert!(with_given.starts_with("<|im_start|>system\nBe brief."), "{with_given}");
    }

    #[test]
    fn neighbours_of_one_role_become_one_message() {
        let template = "{{ range .Messages }}[{{ .Role }}:{{ .Content }}]{{ end }}{{ .System }}";
        let messages = [("system", "a"), ("system", "b"), ("user", "c"), ("user", "d"), ("system", "e")];
        assert_eq!(
            ollama_prompt(template, None, &messages).as_deref(),
            Some("[system:a\n\nb][user:c\n\nd][system:e]a\n\nb\n\ne")
        );
    }

    /// The template that Ollama's library gives SmolLM and other ChatML models, without its tools.
    #[test]
    fn old_templates_are_rendered_turn_by_turn() {
        let template = "{{- if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n{{ end }}{{ if .Prompt }}<|im_start|>user\n{{ .Prompt }}<|im_end|>\n{{ end }}<|im_start|>assistant\n{{ .Response }}<|im_end|>\n";
        assert_eq!(
            ollama_prompt(template, None, &TURNS).as_deref(),
            Some(
                "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n"
            )
        );
        assert_eq!(ollama_prompt("{{ .Prompt }}", None, &TURNS).as_deref(), Some("HiHello.Bye"));
    }

    #[test]
    fn branches_and_trim_markers() {
        let template = "{{- range .Messages }}\n{{- if and (eq .Role \"user\") .Content }}U{{ .Content }}\n{{- else if or (eq .Role \"system\") .ToolCalls }}S\n{{- else }}A{{ end -}}\n {{ end }}";
        assert_eq!(ollama_prompt(template, None, &TURNS).as_deref(), Some("SUHiAUBye"));
        let tools = "{{ if or .System .Tools }}S{{ end }}{{ range .Messages }}{{ .Content }}{{ end }}";
        assert_eq!(ollama_prompt(tools, None, &TURNS[1..2]).as_deref(), Some("Hi"));
    }

    #[test]
    fn what_is_not_known_is_not_rendered() {
        for template in [
            "{{ range $i, $_ := .Messages }}{{ .Content }}{{ end }}",
            "{{ json .Messages }}",
            "{{ range .Messages }}{{ .Content }}",
            "{{ end }}",
            "{{ if eq .Role \"a\\n\" }}x{{ end }}{{ range .Messages }}{{ end }}",
            "{{ .Prompt",
        ] {
            assert_eq!(ollama_prompt(template, None, &TURNS), None, "{template}");
        }
    }
}
