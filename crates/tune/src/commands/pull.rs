//! `tune pull`: fetch a model and print where it is.

use std::io::{self, Write};
use std::process::ExitCode;

use miette::{IntoDiagnostic, Result};
use tune_hub::{ModelRef, catalogue};

use crate::download;

#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  tune pull smollm2:135m\n  tune pull hf:HuggingFaceTB/SmolLM2-135M-Instruct\n  \
                        tune pull --list\n\nHF_HOME, HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE and OLLAMA_MODELS are \
                        honoured; TUNE_CACHE moves the rest."
)]
pub struct Args {
    /// Short name, folder, .gguf file, ollama:NAME[:TAG], or hf:OWNER/REPO[/FILE.gguf][@REV]
    #[arg(value_name = "REF", required_unless_present = "list")]
    reference: Option<String>,
    /// Ask the Hub for the newest revision even if an older one is here
    #[arg(long)]
    refresh: bool,
    /// List the models that have a short name
    #[arg(long, conflicts_with = "reference")]
    list: bool,
}

pub fn run(args: &Args) -> Result<ExitCode> {
    let mut out = io::stdout().lock();
    let Some(reference) = &args.reference else {
        return list(&mut out);
    };
    let resolved = download::resolve(&ModelRef::parse(reference)?, args.refresh)?;
    eprintln!("{}", resolved.reference);
    eprintln!("  from     {}", resolved.origin);
    if let Some(licence) = &resolved.licence {
        eprintln!("  licence  {licence}");
    }
    if let Some(sha256) = &resolved.sha256 {
        eprintln!("  sha256   {sha256}");
    }
    writeln!(out, "{}", resolved.path.display()).into_diagnostic()?;
    Ok(ExitCode::SUCCESS)
}

fn list(out: &mut impl Write) -> Result<ExitCode> {
    let width = catalogue().iter().map(|entry| entry.alias.len()).max().unwrap_or(0);
    for entry in catalogue() {
        let millions = entry.parameters as f64 / 1e6;
        writeln!(
            out,
            "{:width$}  {millions:5.0} M  {:16}  {:27}  {}",
            entry.alias, entry.weights, entry.licence, entry.name
        )
        .into_diagnostic()?;
    }
    Ok(ExitCode::SUCCESS)
}
