//! `tune verify`: whether an exported file answers as the model that was trained.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use miette::{IntoDiagnostic, Result};
use tune_data::Tokenizer;
use tune_formats::peft;
use tune_hub::{ModelRef, OllamaHost, OllamaServer};
use tune_recipe::Method;
use tune_train::RunFolder;

use crate::commands::export::trained_in_full;
use crate::exit::{NOT_VERIFIED, UsageError};
use crate::limits::Limits;
use crate::model::trained_base;
use crate::progress::{self, show_proof};
use crate::proof::prove;
use crate::trained::Trained;
use crate::{download, engines};

#[derive(clap::Args)]
#[command(
    after_help = "Exit code 5: it does not answer as the trained model. A llama-server on PATH, or named by \
                        TUNE_LLAMA_SERVER, runs it as well.\n\n\
                        Examples:\n  tune verify runs/quickstart/export/quickstart.q8_0.gguf\n  \
                        tune verify tickets.lora.gguf --run runs/quickstart --json"
)]
pub struct Args {
    /// A merged GGUF, a GGUF adapter, a PEFT folder, a folder with merged safetensors, or ollama:NAME on a running server
    artefact: PathBuf,
    /// The run that it was exported from [default: the run folder that it lies in]
    #[arg(long, value_name = "DIR")]
    run: Option<PathBuf>,
    /// Rows to use in place of those that the run held out
    #[arg(long, value_name = "FILE")]
    data: Option<PathBuf>,
    /// The base that it was merged onto, where that is not the run's
    #[arg(long, value_name = "REF")]
    base: Option<String>,
    /// A merged file that keeps less of the fine-tune fails [default: the run's export.min_retention]
    #[arg(long, value_name = "SHARE")]
    min_retention: Option<f64>,
    /// One JSON object on standard output
    #[arg(long)]
    json: bool,
}

pub fn run(args: &Args) -> Result<ExitCode> {
    let on_ollama = args.artefact.to_str().and_then(|name| name.strip_prefix("ollama:"));
    if on_ollama.is_none() && !args.artefact.exists() {
        let message = format!("{}: no such file or folder", args.artefact.display());
        return Err(UsageError::report(
            message,
            "name an exported file: tune export RUN --to FORMAT writes one",
        ));
    }
    let folder = run_folder(args)?;
    let spec = tune_recipe::load(&folder.recipe(), &[])?;
    let trains_all = spec.adapter.method == Method::Full;
    let path = download::resolve(&ModelRef::parse(&spec.model.base)?, false)?.path;
    let base = if trains_all { trained_base(&folder, &path)? } else { tune_formats::open(&path)? };
    let untrained = if trains_all { Some(tune_formats::open(&path)?) } else { None };
    let adapter = match trains_all {
        true => trained_in_full(&folder)?,
        false => peft::read(&folder.adapter())?,
    };
    let merged_onto = match &args.base {
        Some(reference) => {
            Some(tune_formats::open(&download::resolve(&ModelRef::parse(reference)?, false)?.path)?)
        }
        None => None,
    };
    let tokenizer = Tokenizer::from_base(&base)?;
    let bar = progress::bar("");
    bar.set_message("base");
    bar.enable_steady_tick(Duration::from_millis(200));
    let trained =
        Trained::open(&base, &adapter, &tokenizer, Some(&spec), untrained.as_ref(), args.data.as_deref())?;
    if let Some(name) = on_ollama {
        bar.finish_and_clear();
        return verify_on_ollama(name, &trained, args.json);
    }
    let server = tune_hub::find_llama_server(|name| std::env::var_os(name));
    let told = |step| show_proof(&bar, step);
    let proof = prove(&args.artefact, &trained, merged_onto.as_ref(), server.as_deref(), &told);
    bar.finish_and_clear();
    let proof = proof?;
    if args.json {
        println!("{}", serde_json::to_string(&proof).into_diagnostic()?);
    } else {
        proof.lines().iter().for_each(|line| println!("{line}"));
    }
    let least = args.min_retention.unwrap_or(spec.export.min_retention);
    if proof.is_sound {
        proof.require_retention(&args.artefact.display().to_string(), least)?;
    }
    if proof.problems.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    if !args.json {
        proof.problems.iter().for_each(|problem| println!("differs   {problem}"));
    }
    Ok(ExitCode::from(NOT_VERIFIED))
}

/// Asks a model of a running Ollama, and holds it to the limits of its type.
fn verify_on_ollama(name: &str, trained: &Trained<'_>, json: bool) -> Result<ExitCode> {
    let host = std::env::var("OLLAMA_HOST").ok();
    let server = OllamaServer::connect(&OllamaHost::parse(host.as_deref()))?;
    let Some(shown) = server.show(name)? else {
        let message = format!("the Ollama server at {} has no model \"{name}\"", server.host());
        return Err(UsageError::report(message, "tune export RUN --to ollama:NAME puts one there"));
    };
    let agreement = engines::ollama(&server, name, trained)?.ok_or_else(|| {
        let help = "name rows whose texts are cut into the tokens of training with --data FILE";
        UsageError::report("no text of the held-out rows can be asked", help)
    })?;
    let limits = Limits::of_mix(&shown.details.quantization_level);
    if json {
        println!("{}", serde_json::to_string(&agreement).into_diagnostic()?);
    } else {
        println!("{agreement}");
    }
    match agreement.problem(limits) {
        None => Ok(ExitCode::SUCCESS),
        Some(problem) => {
            eprintln!("differs   {problem}");
            Ok(ExitCode::from(NOT_VERIFIED))
        }
    }
}

/// The run named, or the nearest folder above the artefact that is one.
fn run_folder(args: &Args) -> Result<RunFolder> {
    if let Some(run) = &args.run {
        let folder = RunFolder::new(run);
        if !folder.recipe().is_file() {
            return Err(UsageError::report(
                format!("{} is no run: it has no run.toml", run.display()),
                "name the folder that tune train wrote",
            ));
        }
        return Ok(folder);
    }
    let absolute = args.artefact.canonicalize().unwrap_or_else(|_| args.artefact.clone());
    let found =
        absolute.ancestors().skip(1).map(Path::to_owned).find(|folder| folder.join("run.toml").is_file());
    found.map(RunFolder::new).ok_or_else(|| {
        UsageError::report(
            format!(
                "{} lies in no run folder, so there is nothing to hold it against",
                args.artefact.display()
            ),
            "name the run that it was exported from with --run",
        )
    })
}
