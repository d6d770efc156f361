//! Conversations and texts → samples: which tokens carry loss.
//!
//! A chat is rendered whole and tokenised whole; the loss mask comes from spans of the rendered text, never from
//! token ids, so an end-of-turn token that is also the padding token is trained like any other.
//!
//! The span of assistant turn k is what `render(messages[..=k])` adds to `render(messages[..k])` with its
//! generation prompt, through the token that ends the turn. Templates with `generation` blocks give it directly.
//! Where the template rewrites history (it drops the reasoning of earlier turns, say), the turns do not fit
//! into one rendering, and each becomes a sample of its own, rendered as the model will see it.

use std::ops::Range;

use crate::conversation::{Conversation, Message};
use crate::{ChatTemplate, DataError, Sample, Token, Tokenizer};

/// Stands for an answer, to see what a template writes around it. No template cuts or changes it, and no answer
/// begins like it: Unicode sets its first character aside for internal use.
const PROBE: &str = "\u{fdd2}probe";

/// Which tokens are prediction targets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum TrainOn {
    /// Every assistant turn with its end-of-turn token; in rows of prompt and completion, the completion.
    #[default]
    Assistant,
    /// The last assistant turn only.
    Last,
    /// Every token.
    All,
    /// Everything after the prompt: the completion, or the last assistant turn of a chat.
    Completion,
}

/// Turns rows into samples.
pub(crate) struct Masker<'a> {
    pub(crate) tokenizer: &'a Tokenizer,
    pub(crate) template: Option<&'a ChatTemplate>,
}

/// A rendered text and the bytes of it that carry loss.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Masked {
    text: String,
    spans: Vec<Range<usize>>,
}

/// Why a row that can be read gives no sample.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unused {
    /// It has no turn to train on.
    NoTarget,
    /// The template leaves out what the assistant said.
    TextLost,
}

impl Masker<'_> {
    /// Samples of a chat: one, or one per assistant turn where the template rewrites history.
    ///
    /// # Errors
    /// The template fails or the tokenizer refuses the text.
    pub(crate) fn chat(
        &self,
        template: &ChatTemplate,
        chat: &Conversation,
        train_on: TrainOn,
    ) -> Result<Result<Vec<Sample>, Unused>, DataError> {
        let masked = match self.chat_text(template, chat, train_on)? {
            Ok(masked) => masked,
            Err(unused) => return Ok(Err(unused)),
        };
        let samples: Result<Vec<_>, _> = masked.into_iter().map(|masked| self.sample(&masked)).collect();
        samples.map(Ok)
    }

    /// A plain document that ends with EOS, all of it trained from byte `from` on.
    ///
    /// # Errors
    /// The tokenizer refuses the text.
    pub(crate) fn document(&self, text: String, from: usize) -> Result<Sample, DataError> {
        let spans = std::iter::once(from..text.len()).collect();
        let mut sample = self.sample(&Masked { text, spans })?;
        if let Some(eos) = self.tokenizer.special().eos {
            sample.input_ids.push(eos);
            sample.trained.push(true);
        }
        Ok(sample)
    }

    fn sample(&self, masked: &Masked) -> Result<Sample, DataError> {
        let tokens = self.tokenizer.sequence_tokens(&masked.text)?;
        let trained = tokens.iter().map(|token| masked.trains(token)).collect();
        Ok(Sample::new(tokens.into_iter().map(|token| token.id).collect(), trained))
    }

    fn chat_text(
        &self,
        template: &ChatTemplate,
        chat: &Conversation,
        train_on: TrainOn,
    ) -> Result<Result<Vec<Masked>, Unused>, DataError> {
        let tools = chat.tools.as_ref();
        if train_on == TrainOn::All {
            let text = template.render(&chat.messages, tools, false)?;
            let spans = std::iter::once(0..text.len()).collect();
            return Ok(Ok(vec![Masked { text, spans }]));
        }
        let mut targets = chat.messages.iter().enumerate().filter(|(_, message)| message.is_target());
        let targets: Vec<usize> = match train_on {
            TrainOn::Last | TrainOn::Completion => targets.next_back().into_iter().map(|(k, _)| k).collect(),
            TrainOn::Assistant | TrainOn::All => targets.map(|(k, _)| k).collect(),
        };
        let Some(&last) = targets.last() else { return Ok(Err(Unused::NoTarget)) };
        if template.has_generation() {
            let marked = generation_spans(template, &chat.messages[..=last], &targets, chat)?;
            if let Some(marked) = marked {
                return Ok(Ok(vec![marked]));
            }
        }
        let mut turns = Vec::with_capacity(targets.len());
        for &k in &targets {
            match self.turn(template, chat, k)? {
                Some(turn) => turns.push(turn),
                None => return Ok(Err(Unused::TextLost)),
            }
        }
        Ok(Ok(joined(turns)))
    }

    /// Assistant turn `k` and all before it, rendered as the model will see it; `None` when the rendering lacks
    /// what the assistant said.
    fn turn(
        &self,
        template: &ChatTemplate,
        chat: &Conversation,
        k: usize,
    ) -> Result<Option<Masked>, DataError> {
        let message = &chat.messages[k];
        // Data without reasoning train the answer that follows an empty block of reasoning, not the block.
        let thinking = (template.has_thinking_switch() && !message.has_reasoning()).then_some(false);
        let render = |messages: &[Message], prompt: bool| {
            let rendered = template.render_spans(messages, chat.tools.as_ref(), prompt, thinking)?;
            Ok::<_, DataError>(rendered.text)
        };
        let before = &chat.messages[..k];
        let prompt = render(before, true)?;
        let full = render(&chat.messages[..=k], false)?;
        let probe = render(&[before, &[Message::new("assistant", PROBE)]].concat(), false)?;
        let after = probe.rfind(PROBE).map_or("", |at| &probe[at + PROBE.len()..]);
        let turn_end = self.turn_end(after)?;
        let (text, start) = if full.starts_with(&prompt) {
            (full, prompt.len())
        } else {
            let history = render(before, false)?;
            let answer = common_prefix(&full, &probe);
            let Some(header) = self.header(&prompt, &history, &full[..answer])? else { return Ok(None) };
            after_own_prompt(prompt, full, &header, answer, message.content(), turn_end)
        };
        let end = self.end_of_turn(&text, start, after, turn_end)?;
        let said = message.content().rsplit("</think>").next().unwrap_or_default().trim();
        let kept = start < end && text[start..end].contains(said);
        Ok(kept.then(|| Masked { text, spans: std::iter::once(start..end).collect() }))
    }

    /// What a template writes after an answer, through the token that ends the turn: `<|im_end|>`. What follows
    /// that (a newline, the end of the document) is not the model's to say.
    fn turn_end<'a>(&self, after: &'a str) -> Result<&'a str, DataError> {
        let tokens = self.tokenizer.sequence_tokens(after)?;
        let ending = &self.tokenizer.special().eos_ids;
        let last = tokens
            .iter()
            .find(|token| token.start < token.end && ending.contains(&token.id))
            .or_else(|| tokens.iter().find(|token| self.is_written_control(token)));
        Ok(last.map_or(after.trim_end(), |token| &after[..token.end]))
    }

    /// End of the turn that begins at `start`; `after` and `turn_end` are what follows an answer. Some turns, such
    /// as tool calls, end with another control token than answers do.
    fn end_of_turn(&self, text: &str, start: usize, after: &str, turn_end: &str) -> Result<usize, DataError> {
        let turn = &text[start..];
        if turn.ends_with(after) && !turn_end.is_empty() {
            return Ok(text.len() - after.len() + turn_end.len());
        }
        if let Some(at) = turn.rfind(turn_end).filter(|_| !turn_end.is_empty()) {
            return Ok(start + at + turn_end.len());
        }
        let tokens = self.tokenizer.sequence_tokens(turn)?;
        let last = tokens.iter().rfind(|token| self.is_written_control(token));
        Ok(start + last.map_or(turn.trim_end().len(), |token| token.end))
    }

    /// Where the header of the last turn ends in `full`, a rendering cut at the answer, and what the generation
    /// prompt has beyond that header. The generation prompt is what `prompt` adds to `history`.
    fn header(&self, prompt: &str, history: &str, full: &str) -> Result<Option<Header>, DataError> {
        let added = self.token_start(prompt, common_prefix(prompt, history))?;
        let generation = &prompt[added..];
        let tokens = self.tokenizer.sequence_tokens(generation)?;
        // its first control token, or else as much of it as history has
        let first = tokens.iter().find(|token| self.is_written_control(token)).map(|token| token.end);
        let prefixes = generation.char_indices().map(|(at, character)| at + character.len_utf8()).rev();
        let mut found = first.into_iter().chain(prefixes).filter_map(|len| full.rfind(&generation[..len]));
        let Some(start) = found.next() else { return Ok(None) };
        let common = self.token_start(generation, common_prefix(generation, &full[start..]))?;
        Ok(Some(Header { end: start + common, beyond: generation[common..].to_owned() }))
    }

    /// The last place up to `at` where a token starts or the text ends.
    fn token_start(&self, text: &str, at: usize) -> Result<usize, DataError> {
        if at == text.len() {
            return Ok(at);
        }
        let tokens = self.tokenizer.sequence_tokens(text)?;
        Ok(tokens.iter().map(|token| token.start).filter(|start| *start <= at).max().unwrap_or(0))
    }

    /// A control token that the text spells out, unlike a BOS put in front of it.
    fn is_written_control(&self, token: &Token) -> bool {
        token.start < token.end && self.tokenizer.is_control(token.id)
    }
}

/// The header of an assistant turn in history, against the generation prompt.
struct Header {
    /// End of the header in the rendering.
    end: usize,
    /// What the generation prompt has after the same header: a block of reasoning, empty or just opened.
    beyond: String,
}

impl Masked {
    /// A token that begins in the header carries loss only if more than white space of it belongs to the answer.
    fn trains(&self, token: &Token) -> bool {
        self.spans.iter().any(|span| {
            if token.start >= span.start {
                return token.start < span.end;
            }
            token.end > span.start && !self.text[span.start..token.end.min(span.end)].trim().is_empty()
        })
    }
}

/// All turns in the rendering of the last one if each stands in it unchanged, else one rendering per turn.
fn joined(mut turns: Vec<Masked>) -> Vec<Masked> {
    let Some(last) = turns.pop() else { return turns };
    let unchanged = |turn: &Masked| {
        let end = turn.spans.last().map_or(0, |span| span.end);
        last.text.starts_with(&turn.text[..end])
    };
    if turns.iter().all(unchanged) {
        let spans = turns.into_iter().chain([last.clone()]).flat_map(|turn| turn.spans).collect();
        return vec![Masked { text: last.text, spans }];
    }
    turns.push(last);
    turns
}

/// The text to train on, and the first byte with loss, when the prompt is not what `full` begins with: templates of
/// reasoning models open or close a block of reasoning in the prompt that history does not have, or drop earlier
/// reasoning from history only.
///
/// The text is the prompt that the model will see, followed by the answer. Where no answer in the data could follow
/// that prompt, it is `full` with loss from the end of the header on. `answer` is where the answer begins in `full`.
fn after_own_prompt(
    prompt: String,
    full: String,
    header: &Header,
    answer: usize,
    content: &str,
    turn_end: &str,
) -> (String, usize) {
    let (start, beyond) = (prompt.len(), header.beyond.trim());
    if !beyond.is_empty()
        && let Some(rest) = content.trim_start().strip_prefix(beyond)
    {
        return (prompt + rest.trim_start_matches('\n') + turn_end, start);
    }
    let is_reasoning = |text: &str| {
        let text = text.to_lowercase();
        ["think", "thought", "reason"].iter().any(|word| text.contains(word))
    };
    let closed =
        ["</think", "end_think", "<channel|>", ":"].iter().any(|end| beyond.to_lowercase().contains(end));
    let own_reasoning = is_reasoning(beyond) && closed;
    if !beyond.is_empty() && !own_reasoning {
        return (full, header.end);
    }
    let from = if is_reasoning(&full[header.end..answer]) { answer } else { header.end };
    (prompt + &full[from..], start)
}

/// Bytes that two texts have in common at their start, in whole characters.
fn common_prefix(a: &str, b: &str) -> usize {
    let mut len = 0;
    for (x, y) in a.chars().zip(b.chars()) {
        if x != y {
            break;
        }
        len += x.len_utf8();
    }
    len
}

fn generation_spans(
    template: &ChatTemplate,
    messages: &[Message],
    targets: &[usize],
    chat: &Conversation,
) -> Result<Option<Masked>, DataError> {
    let rendered = template.render_spans(messages, chat.tools.as_ref(), false, None)?;
    let turns: Vec<usize> = (0..messages.len()).filter(|&k| messages[k].role() == "assistant").collect();
    if rendered.generated.len() != turns.len() {
        return Ok(None);
    }
    let spans = turns.iter().zip(rendered.generated).filter(|(k, _)| targets.contains(k));
    let spans: Vec<_> = spans.map(|(_, span)| span).filter(|span| !span.is_empty()).collect();
    Ok((!spans.is_empty()).then_some(Masked { text: rendered.text, spans }))
}
