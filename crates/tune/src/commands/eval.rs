//! `tune eval`: loss and perplexity on the rows of a JSONL file.

use std::path::PathBuf;
use std::process::ExitCode;

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;
use tune_data::{BatchOptions, Batcher, ChatTemplate, Clock, DataSource, LoadOptions, Overlong, TrainOn};
use tune_eval::{Evaluation, evaluate};

use crate::model::{self, ModelArgs};

/// Tokens that go through the model at once.
const BATCH_TOKENS: usize = 2048;

#[derive(clap::Args)]
#[command(after_help = "Examples:\n  tune eval smollm2:135m datasets/quickstart.eval.jsonl\n  \
                        tune eval runs/quickstart datasets/quickstart.eval.jsonl --json")]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// JSONL file in any format that training reads
    data: PathBuf,
    /// Which tokens count
    #[arg(long, value_enum, default_value_t = Targets::Assistant)]
    train_on: Targets,
    /// Longest row, in tokens; longer ones are left out
    #[arg(long, default_value_t = 2048)]
    sequence_len: usize,
    /// One JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Targets {
    /// Every assistant turn
    Assistant,
    /// The last assistant turn
    Last,
    /// Every token
    All,
    /// Everything after the prompt
    Completion,
}

pub fn run(args: &Args) -> miette::Result<ExitCode> {
    let opened = model::open(&args.model)?;
    let template = match &opened.base.chat_template {
        Some(_) => Some(ChatTemplate::from_base(&opened.base, &opened.tokenizer, Clock::Fixed)?),
        None => None,
    };
    let source = DataSource {
        path: args.data.clone(),
        format: None,
        train_on: match args.train_on {
            Targets::Assistant => TrainOn::Assistant,
            Targets::Last => TrainOn::Last,
            Targets::All => TrainOn::All,
            Targets::Completion => TrainOn::Completion,
        },
    };
    let sequence_len = args.sequence_len.clamp(2, opened.base.config.max_position_embeddings);
    let options =
        LoadOptions { sequence_len, overlong: Overlong::Drop, vocab_size: opened.base.config.vocab_size };
    let name = &opened.base.name;
    let dataset = tune_data::load(&[source], &options, &opened.tokenizer, template.as_ref(), name)?;
    model::check_ids(dataset.samples.iter().flat_map(|sample| &sample.input_ids), &opened.base)?;
    let dropped = dataset.report.dropped();
    if dropped > 0 {
        eprintln!(
            "{dropped} rows are left out (longer than {sequence_len} tokens, or without a trained token)"
        );
    }

    let rows = dataset.samples.len();
    let options = BatchOptions {
        sequence_len: sequence_len.max(BATCH_TOKENS),
        micro_batch_size: 1,
        packing: true,
        shuffle: false,
        seed: 0,
    };
    let batcher = Batcher::new(dataset.samples, options)?;
    let plans = batcher.epoch(0);
    let style = ProgressStyle::with_template("{wide_bar} {pos}/{len}, {eta} left");
    let bar = ProgressBar::new(plans.len() as u64)
        .with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    let mut total = Evaluation::default();
    for plan in &plans {
        total += evaluate(&opened.model, &batcher.micro_batch(plan));
        bar.inc(1);
    }
    bar.finish_and_clear();

    if args.json {
        let report = json!({
            "loss": total.loss(), "perplexity": total.perplexity(), "tokens": total.tokens, "rows": rows,
        });
        println!("{report}");
    } else {
        println!("loss        {:.4} nats per token", total.loss());
        println!("perplexity  {:.3}", total.perplexity());
        println!("            over {} tokens of {rows} rows", total.tokens);
    }
    Ok(ExitCode::SUCCESS)
}
