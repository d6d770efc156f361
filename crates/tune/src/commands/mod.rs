//! One file per command.

pub mod bench;
mod chat;
mod data;
mod eval;
pub mod export;
mod generate;
mod logits;
mod models;
mod plan;
mod pull;
mod train;
mod verify;

use std::process::ExitCode;

use clap::Subcommand;

/// What to do.
#[derive(Subcommand)]
pub enum Command {
    /// Train an adapter as a recipe says
    Train(train::Args),
    /// Tell how much memory a run needs, without running it
    Plan(plan::Args),
    /// List published models: what each method needs, and what runs here
    Models(models::Args),
    /// Fetch a model and print where it is
    Pull(pull::Args),
    /// Show what a recipe's data becomes: counts, lengths, and which tokens are trained
    Data(data::Args),
    /// Continue or answer a prompt
    Generate(generate::Args),
    /// Talk to a model
    Chat(chat::Args),
    /// Measure loss and perplexity on a JSONL file
    Eval(eval::Args),
    /// Write a trained run as GGUF, safetensors or PEFT
    Export(export::Args),
    /// Tell whether an exported file answers as the trained model
    Verify(verify::Args),
    /// Measure this machine and the speed and memory of training and generation on it
    Bench(bench::Args),
    /// Write the logits of given token ids, to compare engines
    #[command(hide = true)]
    Logits(logits::Args),
}

/// Runs one command.
pub fn run(command: Command) -> miette::Result<ExitCode> {
    match command {
        Command::Train(args) => train::run(&args),
        Command::Plan(args) => plan::run(&args),
        Command::Models(args) => models::run(&args),
        Command::Pull(args) => pull::run(&args),
        Command::Data(args) => data::run(&args),
        Command::Generate(args) => generate::run(&args),
        Command::Chat(args) => chat::run(&args),
        Command::Eval(args) => eval::run(&args),
        Command::Export(args) => export::run(&args),
        Command::Verify(args) => verify::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Logits(args) => logits::run(&args),
    }
}
