//! `tune train`: a recipe, from its base and rows to a trained and exported adapter, or to a trained model.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use indicatif::{HumanBytes, HumanDuration};
use miette::IntoDiagnostic;
use owo_colors::{OwoColorize, Stream};
use tune_data::{BatchOptions, Batcher, Dataset};
use tune_memory::{peak_resident_bytes, phase_peaks, return_free_memory};
use tune_recipe::{Method, Override, Quantization, Resume, RunSpec};
use tune_train::{Finish, Outcome, RunFolder, Setup, checkpoint, sft};

use super::export;
use crate::disk_room;
use crate::exit::{INTERRUPTED, UsageError};
use crate::inputs::{self, Inputs};
use crate::memory_gate::{self, Gate, Start};
use crate::progress::{Mode, Progress};
use crate::samples;

#[derive(clap::Args)]
#[command(after_help = "Ctrl-C saves a checkpoint and exits; the same command goes on from there.\n\n\
                        Examples:\n  tune train recipes/quickstart.toml\n  \
                        tune train recipes/code.toml --set train.learning_rate=1e-4 --out runs/slower")]
pub struct Args {
    /// The recipe, or the run.toml of an earlier run
    recipe: PathBuf,
    /// Folder of the run [default: runs/NAME]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Change one value of the recipe; may be given several times
    #[arg(long, value_name = "SECTION.KEY=VALUE")]
    set: Vec<String>,
    /// auto (the newest checkpoint of the folder), never (the old run is kept aside), or a checkpoint folder
    #[arg(long, value_name = "auto|never|PATH")]
    resume: Option<String>,
    /// Print nothing but errors and the final samples
    #[arg(long, short)]
    quiet: bool,
    /// One JSON object per event on standard output, for other programs
    #[arg(long)]
    json: bool,
    /// Stop after the plan
    #[arg(long)]
    dry_run: bool,
}

#[allow(clippy::too_many_lines, reason = "the command reads top to bottom")]
pub fn run(args: &Args) -> miette::Result<ExitCode> {
    let mode = Mode::choose(args.quiet, args.json);
    let say = |text: String| {
        if matches!(mode, Mode::Bar | Mode::Lines) {
            eprintln!("{text}");
        }
    };

    // What the recipe names.
    let mut inputs = inputs::open(&args.recipe, &overrides(args))?;
    refuse_what_is_not_there(&inputs.spec)?;
    for note in &inputs.spec.notes {
        say(format!("note      {note}"));
    }
    let base = &inputs.base;
    let trains_all = inputs.spec.adapter.method == Method::Full;
    if trains_all && inputs::facts(base).quantized {
        say("note      the base is quantised: its decoded weights are where training starts".into());
    }
    export::warn_of_targets(&inputs.spec, &say);
    say(format!("base      {} ({})", inputs.resolved.reference, inputs.resolved.origin));
    // A run that goes on keeps what was changed when it began.
    let folder = RunFolder::new(&inputs.spec.run.out);
    let start = match &inputs.spec.checkpoint.resume {
        Resume::Auto if checkpoint::newest(&folder).is_some() => true,
        Resume::Path(_) => true,
        Resume::Auto | Resume::Never => false,
    };
    let start = if start { Start::resumed(&folder.plan(), &mut inputs.spec) } else { Start::Fresh };
    let dataset = inputs.dataset()?;
    let report = &dataset.report;
    say(format!(
        "data      {} rows, {} tokens, {} trained{}",
        report.samples(),
        report.tokens(),
        report.trained_tokens(),
        match report.dropped() {
            0 => String::new(),
            dropped => format!("; {dropped} rows left out, see `tune data`"),
        },
    ));
    let (mut train, mut validation) = batchers(&inputs.spec, &dataset)?;
    drop(dataset);
    return_free_memory(); // what reading the rows has needed

    // Does it fit?
    let gate = memory_gate::check(&mut inputs.spec, &inputs.base, [&mut train, &mut validation], start)?;
    if gate.shortens_rows() {
        (train, validation) = batchers(&inputs.spec, &inputs.dataset()?)?;
    }
    say(gate.summary());
    let base = &inputs.base;
    disk_room::check(&inputs.spec.run.out, &gate.disk(&inputs.spec, base))?;
    if args.dry_run {
        return Ok(ExitCode::SUCCESS);
    }

    // The run. Its run.toml goes on with it, however this start was asked for.
    let resume = std::mem::replace(&mut inputs.spec.checkpoint.resume, Resume::Auto);
    let spec = &inputs.spec;
    let resume_from = resume_point(&resume, &folder, &say)?;
    let stop = stop_on_ctrl_c()?;
    let setup = Setup {
        spec,
        base,
        train,
        validation,
        folder: folder.clone(),
        plan: gate.json(None, &[]),
        kept_blocks: gate.kept_blocks(),
        resume_from,
        stop: &stop,
        memory_limit: gate.limit(spec.memory.on_exceed),
    };
    let mut progress = Progress::new(mode, gate.peak_bytes(), spec.train.logging_steps);
    let outcome = sft(&setup, &mut |event| progress.show(&event));
    progress.finish();
    let outcome = outcome?;
    return_free_memory(); // what training has needed
    stop.store(true, Ordering::Relaxed); // nothing is left to save: from here on one Ctrl-C ends the program
    if let Some(svg) = crate::loss_plot::svg(&folder.read_metrics()?) {
        folder.write(&folder.loss_svg(), svg.as_bytes())?;
    }
    if outcome.finish == Finish::Interrupted {
        say(match outcome.steps {
            0 => "stopped   before the first step; there is nothing to save yet".into(),
            n => format!("stopped   after step {n}; go on with: tune train {}", folder.recipe().display()),
        });
        return Ok(ExitCode::from(INTERRUPTED));
    }
    if let Finish::OverBudget { peak_bytes } = outcome.finish {
        folder.write(&folder.plan(), gate.json(Some(peak_bytes), &phase_peaks()).as_bytes())?;
        return Err(gate.over_budget(peak_bytes, &outcome, &folder).into());
    }
    if trains_all {
        export::write_trained_model(&folder, &inputs, &outcome)?;
    }
    report_end(&folder, &gate, &say)?;

    // What it learned, and what it becomes.
    if mode != Mode::Json {
        show_samples(&inputs, &outcome)?;
    }
    for target in export::in_order(spec) {
        let exported = export::export_run(&folder, &inputs, target)?;
        say(format!("exported  {exported} ({target})"));
    }
    if spec.export.targets.is_empty() {
        let target = if trains_all { "gguf:f16 --out model.gguf" } else { "gguf-lora --out adapter.gguf" };
        say(format!("next      tune export {} --to {target}", folder.root().display()));
    }
    Ok(ExitCode::SUCCESS)
}

/// What a recipe may say and this version cannot do is refused before the run, not after it.
pub fn refuse_what_is_not_there(spec: &RunSpec) -> miette::Result<()> {
    if spec.adapter.method == Method::Full {
        if spec.model.quantization == Quantization::Nf4 {
            return Err(UsageError::report(
                "model.quantization = \"nf4\" is for frozen weights, and adapter.type = \"full\" trains all of them",
                "leave model.quantization out, or use adapter.type = \"qlora\"",
            ));
        }
        if spec.adapter.init_adapter.is_some() {
            return Err(UsageError::report(
                "adapter.init_adapter is an adapter to go on with, and adapter.type = \"full\" trains none",
                "export the adapter merged (tune export RUN --to safetensors) and name that folder in model.base",
            ));
        }
    }
    export::check_targets(spec)
}

fn overrides(args: &Args) -> Vec<Override> {
    let mut overrides: Vec<Override> = args.set.iter().map(Override::set).collect();
    if let Some(out) = &args.out {
        overrides.push(Override::flag("--out", "run.out", &out.to_string_lossy()));
    }
    if let Some(resume) = &args.resume {
        overrides.push(Override::flag("--resume", "checkpoint.resume", resume));
    }
    overrides
}

/// The rows to train on and those held out.
fn batchers(spec: &RunSpec, dataset: &Dataset) -> miette::Result<(Batcher, Batcher)> {
    let (train, held_out) = dataset.split(spec.data_options.val_split, spec.train.seed);
    let train = Batcher::new(train, batch_options(spec, spec.train.shuffle))?;
    Ok((train, Batcher::new(held_out, batch_options(spec, false))?))
}

pub fn batch_options(spec: &RunSpec, shuffle: bool) -> BatchOptions {
    BatchOptions {
        sequence_len: spec.data_options.sequence_len,
        micro_batch_size: spec.train.micro_batch_size,
        packing: spec.data_options.packing,
        shuffle,
        seed: spec.train.seed,
    }
}

/// The checkpoint to go on from. A run that is not to be resumed is set aside, never overwritten.
fn resume_point(
    resume: &Resume,
    folder: &RunFolder,
    say: &dyn Fn(String),
) -> miette::Result<Option<PathBuf>> {
    match resume {
        Resume::Auto if checkpoint::newest(folder).is_some() || !folder.is_finished() => {
            Ok(checkpoint::newest(folder))
        }
        // Never, or a finished run whose checkpoints are gone.
        Resume::Auto | Resume::Never => {
            if let Some(old) = folder.set_aside()? {
                say(format!("kept      the earlier run as {}", old.display()));
            }
            Ok(None)
        }
        Resume::Path(path) if path.is_dir() => Ok(Some(path.clone())),
        Resume::Path(path) => Err(UsageError::report(
            format!("no checkpoint at {}", path.display()),
            match checkpoint::newest(folder) {
                Some(newest) => format!("the newest of this run is {}", newest.display()),
                None => "use --resume auto, or --resume never to start over".to_string(),
            },
        )),
    }
}

/// The first Ctrl-C asks the run to save and stop, the second ends the program.
fn stop_on_ctrl_c() -> miette::Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    let flag = stop.clone();
    ctrlc::set_handler(move || {
        if flag.swap(true, Ordering::Relaxed) {
            std::process::exit(i32::from(INTERRUPTED));
        }
        eprintln!("stopping: saves what the finished steps have made; Ctrl-C again to stop without saving");
    })
    .into_diagnostic()?;
    Ok(stop)
}

fn report_end(folder: &RunFolder, gate: &Gate, say: &dyn Fn(String)) -> miette::Result<()> {
    let mut metrics = folder.read_metrics()?;
    // The steps before an interruption count as well.
    let measured = metrics.iter().filter_map(|m| m.peak_memory_bytes).chain(peak_resident_bytes()).max();
    folder.write(&folder.plan(), gate.json(measured, &phase_peaks()).as_bytes())?;
    let Some(last) = metrics.pop() else { return Ok(()) };
    let elapsed = HumanDuration(std::time::Duration::from_secs_f64(last.elapsed_s));
    say(format!("trained   {} steps in {elapsed}, loss {:.4}", last.step, last.loss));
    if let Some(measured) = measured {
        let planned = gate.peak_bytes();
        let off = 100.0 * (measured as f64 - planned as f64) / planned as f64;
        say(format!(
            "memory    {} at the peak, {} planned ({off:+.1} %)",
            HumanBytes(measured),
            HumanBytes(planned)
        ));
    }
    match folder.model() {
        model if model.is_dir() => say(format!("model     {}", model.display())),
        _ => say(format!("adapter   {}", folder.adapter().display())),
    }
    Ok(())
}

/// Held-out prompts, answered by the base and by the tuned model.
fn show_samples(inputs: &Inputs, outcome: &Outcome) -> miette::Result<()> {
    for sample in samples::before_and_after(inputs, &outcome.model)? {
        let dim = |text: &'static str| text.if_supports_color(Stream::Stdout, |t| t.dimmed()).to_string();
        println!("\n{}  {}", dim("prompt"), sample.prompt);
        println!("{}  {}", dim("before"), sample.before);
        println!("{}   {}", dim("after"), sample.after);
    }
    if !inputs.spec.samples.prompts.is_empty() {
        println!();
    }
    Ok(())
}
