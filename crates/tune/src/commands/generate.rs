//! `tune generate`: continue or answer one prompt.

use std::io::{Read, Write};
use std::ops::ControlFlow;
use std::process::ExitCode;

use miette::IntoDiagnostic;
use tune_data::Message;
use tune_eval::{Sampler, SamplerConfig, StopReason, generate};

use crate::exit::UsageError;
use crate::model::{self, ModelArgs};

#[derive(clap::Args)]
#[command(after_help = "Examples:\n  tune generate smollm2:135m --prompt 'Why is the sky blue?'\n  \
                        tune generate runs/quickstart --prompt 'The app crashes on start'\n  \
                        echo 'def add(a, b):' | tune generate ./model.gguf --raw")]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// What to answer; read from standard input when absent
    #[arg(long, short)]
    prompt: Option<String>,
    /// System message before the prompt
    #[arg(long)]
    system: Option<String>,
    /// Continue the text as it is, without the chat template
    #[arg(long)]
    raw: bool,
    #[command(flatten)]
    sampling: Sampling,
}

/// How tokens are chosen.
#[derive(clap::Args, Clone, Copy)]
pub struct Sampling {
    /// Longest answer, in tokens
    #[arg(long, short = 'n', default_value_t = 256)]
    pub max_tokens: usize,
    /// 0 always takes the most likely token
    #[arg(long, short, default_value_t = 0.0, value_parser = non_negative)]
    pub temperature: f64,
    /// Only the K most likely tokens; 0 for all
    #[arg(long, default_value_t = 40)]
    pub top_k: usize,
    /// Only the most likely tokens that together reach this probability
    #[arg(long, default_value_t = 0.95, value_parser = non_negative)]
    pub top_p: f64,
    /// Only tokens at least this likely, relative to the most likely one
    #[arg(long, default_value_t = 0.05, value_parser = non_negative)]
    pub min_p: f64,
    /// Makes repetitions less likely; 1 does nothing
    #[arg(long, default_value_t = 1.0, value_parser = positive)]
    pub repeat_penalty: f64,
    /// The same seed gives the same text
    #[arg(long, default_value_t = 42)]
    pub seed: u64,
}

fn non_negative(text: &str) -> Result<f64, String> {
    let number: f64 = text.parse().map_err(|_| "expected a number".to_string())?;
    if number.is_finite() && number >= 0.0 { Ok(number) } else { Err("expected a number from 0 up".into()) }
}

fn positive(text: &str) -> Result<f64, String> {
    let number = non_negative(text)?;
    if number > 0.0 { Ok(number) } else { Err("expected a number above 0".into()) }
}

impl Sampling {
    /// A sampler at the start of its random sequence.
    pub fn sampler(&self) -> Sampler {
        Sampler::new(SamplerConfig {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repeat_penalty: self.repeat_penalty,
            seed: self.seed,
            ..SamplerConfig::default()
        })
    }
}

pub fn run(args: &Args) -> miette::Result<ExitCode> {
    let prompt = match &args.prompt {
        Some(prompt) => prompt.clone(),
        None => {
            let mut text = String::new();
            std::io::stdin().read_to_string(&mut text).into_diagnostic()?;
            text.trim_end_matches('\n').to_string()
        }
    };
    let opened = model::open(&args.model)?;
    let ids = if args.raw {
        opened.ids(&prompt)?
    } else {
        let mut messages = Vec::new();
        messages.extend(args.system.as_deref().map(|system| Message::new("system", system)));
        messages.push(Message::new("user", &prompt));
        opened.chat_ids(&opened.template()?, &messages)?
    };
    if ids.is_empty() {
        return Err(UsageError::report("the prompt is empty", "give one with --prompt or on standard input"));
    }
    let limit = opened.model.config().max_position_embeddings;
    if ids.len() >= limit {
        let message = format!("the prompt has {} tokens and the context of the model {limit}", ids.len());
        return Err(UsageError::report(message, "use a shorter prompt"));
    }

    let mut cache = opened.model.kv_cache(ids.len().saturating_add(args.sampling.max_tokens).min(limit));
    let mut decoder = opened.tokenizer.stream();
    let mut out = std::io::stdout().lock();
    let mut write = |text: &str| match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => ControlFlow::Continue(()),
        Err(_) => ControlFlow::Break(()), // the reader has gone
    };
    let generation = generate(
        &opened.model,
        &mut cache,
        &ids,
        args.sampling.max_tokens,
        &opened.base.special.eos_ids,
        &mut args.sampling.sampler(),
        &mut |token| write(&decoder.push(token)),
    );
    if generation.stop != StopReason::Cancelled {
        let _ = write(&decoder.finish());
        let _ = write("\n");
    }
    Ok(ExitCode::SUCCESS)
}
