//! `tune bench generate`: reading a prompt and continuing it, one token at a time, as `tune generate` does.

use std::fmt;
use std::num::NonZeroUsize;
use std::ops::ControlFlow;
use std::process::ExitCode;
use std::time::Instant;

use indicatif::HumanBytes;
use serde::Serialize;
use tune_eval::{Sampler, SamplerConfig, generate};
use tune_memory::peak_resident_bytes;

use super::host::Host;
use super::text::TextArgs;
use super::{median, print, use_threads};
use crate::exit::UsageError;
use crate::machine;
use crate::model::{self, ModelArgs, Opened};

#[derive(clap::Args)]
#[command(after_help = "Examples:\n  tune bench generate --model smollm2:135m\n  \
                        tune bench generate --model ./model.gguf --prompt-tokens 1024 --new-tokens 64 --json")]
pub struct Args {
    /// Alias, directory, .gguf file, ollama:NAME, hf:OWNER/REPO, or the folder of a run
    #[arg(long, value_name = "NAME|PATH")]
    model: String,
    /// Tokens of the prompt
    #[arg(long, value_name = "N", default_value = "512")]
    prompt_tokens: NonZeroUsize,
    /// Tokens to add; the model cannot end earlier
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = two_or_more)]
    new_tokens: usize,
    /// Generations that are measured, after one that is not
    #[arg(long, value_name = "N", default_value = "3")]
    runs: NonZeroUsize,
    /// Threads that compute [default: one for each core]
    #[arg(long, value_name = "N")]
    threads: Option<NonZeroUsize>,
    #[command(flatten)]
    text: TextArgs,
    /// One JSON object
    #[arg(long)]
    json: bool,
}

/// The time between the first new token and the last is what is measured.
fn two_or_more(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|n| *n >= 2).ok_or_else(|| "expected a number from 2 up".into())
}

/// What was measured. Rates are medians of the runs.
#[derive(Serialize)]
struct Report {
    bench: &'static str,
    #[serde(flatten)]
    host: Host,
    model: String,
    prompt_tokens: usize,
    new_tokens: usize,
    runs: usize,
    /// Up to the choice of the first new token.
    prompt_tokens_per_second: f64,
    prompt_tokens_per_cpu_second: Option<f64>,
    /// Each new token after the first.
    decode_tokens_per_second: f64,
    decode_tokens_per_cpu_second: Option<f64>,
    peak_rss_bytes: Option<u64>,
}

pub fn run(args: &Args) -> miette::Result<ExitCode> {
    use_threads(args.threads)?;
    let opened = model::open(&ModelArgs { model: args.model.clone(), adapter: None, any_base: false })?;
    let (prompt_tokens, new_tokens) = (args.prompt_tokens.get(), args.new_tokens);
    let limit = opened.model.config().max_position_embeddings;
    if prompt_tokens.saturating_add(new_tokens) > limit {
        let message =
            format!("{prompt_tokens} + {new_tokens} tokens, and the context of the model is {limit}");
        return Err(UsageError::report(message, "use fewer with --prompt-tokens and --new-tokens"));
    }
    let prompt = args.text.documents(1, prompt_tokens, &opened.tokenizer, &opened.base)?.concat();

    let times: Vec<Times> = (0..=args.runs.get()).map(|_| time(&opened, &prompt, new_tokens)).collect();
    let rate = |tokens: usize, of: &dyn Fn(&Times) -> Option<f64>| {
        median(times[1..].iter().filter_map(of).map(|seconds| tokens as f64 / seconds))
    };
    let report = Report {
        bench: "generate",
        host: Host::new(),
        model: args.model.clone(),
        prompt_tokens,
        new_tokens,
        runs: args.runs.get(),
        prompt_tokens_per_second: rate(prompt_tokens, &|t| Some(t.prompt)).unwrap_or(f64::NAN),
        prompt_tokens_per_cpu_second: rate(prompt_tokens, &|t| t.prompt_cpu),
        decode_tokens_per_second: rate(new_tokens - 1, &|t| Some(t.decode)).unwrap_or(f64::NAN),
        decode_tokens_per_cpu_second: rate(new_tokens - 1, &|t| t.decode_cpu),
        peak_rss_bytes: peak_resident_bytes(),
    };
    print(&report, args.json)
}

/// Seconds of one generation.
struct Times {
    prompt: f64,
    prompt_cpu: Option<f64>,
    decode: f64,
    decode_cpu: Option<f64>,
}

fn time(opened: &Opened, prompt: &[u32], new_tokens: usize) -> Times {
    let mut cache = opened.model.kv_cache(prompt.len() + new_tokens);
    let mut sampler = Sampler::new(SamplerConfig::default());
    let now = || (Instant::now(), machine::cpu_seconds());
    let start = now();
    let mut first = None;
    generate(&opened.model, &mut cache, prompt, new_tokens, &[], &mut sampler, &mut |_| {
        first.get_or_insert_with(now);
        ControlFlow::Continue(())
    });
    let (end, first) = (now(), first.unwrap_or(start));
    let cpu = |from: Option<f64>, to: Option<f64>| to.zip(from).map(|(to, from)| to - from);
    Times {
        prompt: (first.0 - start.0).as_secs_f64(),
        prompt_cpu: cpu(start.1, first.1),
        decode: (end.0 - first.0).as_secs_f64(),
        decode_cpu: cpu(first.1, end.1),
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.host)?;
        writeln!(f, "model       {}", self.model)?;
        let mut line = |what: &str, tokens: usize, rate: f64, cpu: Option<f64>| {
            write!(f, "{what:<12}{rate:.1} tokens/s")?;
            if let Some(cpu) = cpu {
                write!(f, ", {cpu:.1} a second of processor time")?;
            }
            writeln!(f, " ({tokens} tokens)")
        };
        let (prompt, new) = (self.prompt_tokens, self.new_tokens);
        line("prompt", prompt, self.prompt_tokens_per_second, self.prompt_tokens_per_cpu_second)?;
        line("new", new, self.decode_tokens_per_second, self.decode_tokens_per_cpu_second)?;
        match self.peak_rss_bytes {
            Some(peak) => writeln!(f, "memory      {} at the peak", HumanBytes(peak)),
            None => Ok(()),
        }
    }
}
