//! `tune chat`: a conversation on the terminal.

use std::io::{BufRead, IsTerminal, Write};
use std::ops::ControlFlow;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use miette::IntoDiagnostic;
use tune_data::Message;
use tune_eval::generate;
use tune_models::KvCache;

use super::generate::Sampling;
use crate::exit::UsageError;
use crate::model::{self, ModelArgs, Opened};

#[derive(clap::Args)]
#[command(after_help = "Ctrl-C ends an answer, Ctrl-D the conversation; /clear forgets what was said.\n\n\
                        Examples:\n  tune chat smollm2:135m\n  tune chat runs/quickstart --temperature 0.7")]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// System message of the conversation
    #[arg(long)]
    system: Option<String>,
    #[command(flatten)]
    sampling: Sampling,
}

pub fn run(args: &Args) -> miette::Result<ExitCode> {
    let opened = model::open(&args.model)?;
    let interrupted = Arc::new(AtomicBool::new(true)); // at the prompt, one Ctrl-C leaves
    let flag = interrupted.clone();
    ctrlc::set_handler(move || {
        // A second Ctrl-C, with no answer to end, leaves.
        if flag.swap(true, Ordering::Relaxed) {
            std::process::exit(i32::from(crate::exit::INTERRUPTED));
        }
    })
    .into_diagnostic()?;

    let system = || args.system.iter().map(|text| Message::new("system", text)).collect::<Vec<_>>();
    let mut messages = system();
    let mut conversation = Conversation::new(&opened);
    let mut lines = std::io::stdin().lock().lines();
    loop {
        if std::io::stdin().is_terminal() {
            eprint!("> ");
        }
        let Some(line) = lines.next() else { break };
        let line = line.into_diagnostic()?;
        match line.trim() {
            "" => continue,
            "/clear" => {
                messages = system();
                continue;
            }
            text => messages.push(Message::new("user", text)),
        }
        interrupted.store(false, Ordering::Relaxed);
        let Some(answer) = conversation.answer(&messages, &args.sampling, &interrupted)? else {
            eprintln!("the conversation is longer than the context of the model; /clear starts over");
            messages.pop();
            continue;
        };
        messages.push(Message::new("assistant", &answer));
        interrupted.store(true, Ordering::Relaxed);
    }
    Ok(ExitCode::SUCCESS)
}

/// A conversation whose tokens stay in the cache from turn to turn.
struct Conversation<'a> {
    opened: &'a Opened,
    cache: KvCache,
    cached: Vec<u32>,
}

impl<'a> Conversation<'a> {
    fn new(opened: &'a Opened) -> Self {
        let capacity = opened.model.config().max_position_embeddings.min(8192);
        Self { opened, cache: opened.model.kv_cache(capacity), cached: Vec::new() }
    }

    /// Prints and returns the answer to `messages`; `None` when they do not fit into the context.
    fn answer(
        &mut self,
        messages: &[Message],
        sampling: &Sampling,
        interrupted: &AtomicBool,
    ) -> miette::Result<Option<String>> {
        let opened = self.opened;
        let ids = opened.chat_ids(&opened.template()?, messages)?;
        if ids.is_empty() {
            return Err(UsageError::report("the chat template writes nothing", "use `tune generate --raw`"));
        }
        // What is cached already need not be computed again, as long as the text begins the same.
        let shared =
            ids.iter().zip(&self.cached).take_while(|(a, b)| a == b).count().min(ids.len().saturating_sub(1));
        self.cache.truncate(shared);
        self.cached.truncate(shared);
        if ids.len() - shared > self.cache.remaining() {
            return Ok(None);
        }
        let mut decoder = opened.tokenizer.stream();
        let mut text = String::new();
        let generation = generate(
            &opened.model,
            &mut self.cache,
            &ids[shared..],
            sampling.max_tokens,
            &opened.base.special.eos_ids,
            &mut sampling.sampler(),
            &mut |token| {
                let piece = decoder.push(token);
                print!("{piece}");
                let _ = std::io::stdout().flush();
                text.push_str(&piece);
                if interrupted.load(Ordering::Relaxed) {
                    ControlFlow::Break(())
                } else {
                    ControlFlow::Continue(())
                }
            },
        );
        let rest = decoder.finish();
        println!("{rest}");
        text.push_str(&rest);
        self.cached = ids;
        self.cached.extend(generation.tokens);
        self.cached.truncate(self.cache.len());
        Ok(Some(text))
    }
}
