//! `tune bench memory`: what the memory plan cannot count, measured on this machine.
//!
//! ```text
//! peak = counted terms + process        counted terms: linear in positions of a loss chunk, in blocks, and in kept ones
//! ```
//!
//! Four runs of two steps each, over random weights with the widths and the tokenizer of a model: 2 blocks and few tokens,
//! four times as many tokens, 4 blocks, and those again with every block kept. A peak is that of a process, so each run
//! is one of its own: this program started again. The differences say whether the counted terms are right here (measured ÷
//! counted is 1), and what is left of the peaks is the process.

use std::fmt;
use std::path::Path;
use std::process::{Command, ExitCode};

use indicatif::BinaryBytes;
use miette::IntoDiagnostic;
use serde::{Deserialize, Serialize};
use tune_export::{FileType, RandomModel, tokenizer_keys, write_random_model};
use tune_formats::{BaseModel, ModelConfig};
use tune_hub::ModelRef;
use tune_plan::Calibration;

use super::print;
use crate::calibration::{self, HoldsFor, Stored};
use crate::download;
use crate::exit::UsageError;

/// Runs: blocks, tokens of a document, and whether blocks keep their activations.
const RUNS: [(usize, usize, bool); 4] = [(2, 64, false), (2, 256, false), (4, 256, false), (4, 256, true)];

/// Least half-width of the range around what of an estimate is not exact, in thousandths.
const LEAST_MARGIN: u64 = 50;

#[derive(clap::Args)]
#[command(
    after_help = "The constants are kept in the user's cache folder, for this version, processor and number of threads. \
                  tune plan and tune train use them from then on, and say so."
)]
pub struct Args {
    /// Model whose widths and tokenizer the measured models get
    #[arg(long, value_name = "NAME|PATH", default_value = "smollm2:135m")]
    model: String,
    /// Only measure
    #[arg(long)]
    dry_run: bool,
    /// One JSON object
    #[arg(long)]
    json: bool,
}

/// What a child says, of all that `tune bench train --json` reports.
#[derive(Debug, Clone, Deserialize)]
struct Child {
    peak_rss_bytes: Option<u64>,
    planned_peak_bytes: u64,
    planned_exact_bytes: u64,
    memory_constants: Calibration,
}

/// What one run has shown.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
struct Run {
    blocks: usize,
    tokens: usize,
    keeps_blocks: bool,
    measured_bytes: u64,
    /// Everything of the plan but the process.
    counted_bytes: u64,
    /// What of that follows from the sizes of the model alone.
    exact_bytes: u64,
}

#[derive(Serialize)]
struct Report {
    bench: &'static str,
    #[serde(flatten)]
    stored: Stored,
    model: String,
    runs: Vec<Run>,
    /// Measured ÷ counted growth from one chunk of the loss to a larger one, from 2 blocks to 4, and to kept ones.
    loss_ratio: f64,
    block_ratio: f64,
    kept_ratio: f64,
    path: Option<std::path::PathBuf>,
}

pub fn run(args: &Args) -> miette::Result<ExitCode> {
    let folder = tempfile::tempdir().into_diagnostic()?;
    let source = tune_formats::open(&download::resolve(&ModelRef::parse(&args.model)?, false)?.path)?;
    let mut runs = Vec::new();
    let mut constants = None;
    for (blocks, tokens, keeps_blocks) in RUNS {
        let model = folder.path().join(format!("{blocks}-blocks.gguf"));
        if !model.exists() {
            make(&source, blocks, &model)?;
        }
        let child = measure(&model, tokens, keeps_blocks)?;
        let measured_bytes = child.peak_rss_bytes.ok_or_else(|| {
            let help = "plans use the shipped constants";
            UsageError::report("this system does not tell how much memory a process has used", help)
        })?;
        let counted_bytes = child.planned_peak_bytes.saturating_sub(child.memory_constants.process_bytes);
        let exact_bytes = child.planned_exact_bytes;
        runs.push(Run { blocks, tokens, keeps_blocks, measured_bytes, counted_bytes, exact_bytes });
        constants = Some(child.memory_constants);
    }
    let constants = calibrated(constants.unwrap_or(tune_plan::FLEX), &runs);
    let stored = Stored { holds_for: HoldsFor::here(), constants };
    let path = if args.dry_run { None } else { Some(calibration::store(&stored)?) };
    let report = Report {
        bench: "memory",
        stored,
        model: args.model.clone(),
        loss_ratio: ratio(&runs[0], &runs[1]),
        block_ratio: ratio(&runs[1], &runs[2]),
        kept_ratio: ratio(&runs[2], &runs[3]),
        runs,
        path,
    };
    print(&report, args.json)
}

/// A model of so many blocks, otherwise of the shape of `source`.
fn make(source: &BaseModel, blocks: usize, path: &Path) -> miette::Result<()> {
    let config = ModelConfig { num_hidden_layers: blocks, ..source.config.clone() };
    let tokenizer = &tokenizer_keys(source)?;
    let file_type = FileType::Q4_0;
    let model = RandomModel { name: "measured", config: &config, file_type, tokenizer, seed: 42 };
    Ok(write_random_model(&model, path, &mut |_| ())?)
}

/// Two steps in a fresh process.
fn measure(model: &Path, tokens: usize, keeps_blocks: bool) -> miette::Result<Child> {
    let program = std::env::current_exe().into_diagnostic()?;
    let output = Command::new(program)
        .args(["bench", "train", "--seq", &tokens.to_string(), "--json", "--model"])
        .arg(model)
        .args(["--steps", "1", "--warmup", "1", "--checkpointing", if keeps_blocks { "off" } else { "on" }])
        .output()
        .into_diagnostic()?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr).trim().to_string();
        return Err(UsageError::report(
            format!("a run of {tokens} tokens failed:\n{said}"),
            "see its message",
        ));
    }
    serde_json::from_slice(&output.stdout).into_diagnostic()
}

/// The constants with the process as measured, and a range that holds all the runs.
fn calibrated(used: Calibration, runs: &[Run]) -> Calibration {
    let rest = |run: &Run| run.measured_bytes.saturating_sub(run.counted_bytes);
    let process_bytes = runs.iter().map(rest).sum::<u64>() / runs.len().max(1) as u64;
    let off = |run: &Run| {
        let estimate = run.counted_bytes + process_bytes;
        let not_exact = estimate.saturating_sub(run.exact_bytes);
        1000 * run.measured_bytes.saturating_sub(estimate) / not_exact.max(1)
    };
    let margin_permille = LEAST_MARGIN.max(2 * runs.iter().map(off).max().unwrap_or(0));
    Calibration { process_bytes, margin_permille, measured_here: true, ..used }
}

fn ratio(small: &Run, large: &Run) -> f64 {
    let grown = |of: fn(&Run) -> u64| of(large) as f64 - of(small) as f64;
    grown(|run| run.measured_bytes) / grown(|run| run.counted_bytes)
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let HoldsFor { backend, version, processor, threads } = &self.stored.holds_for;
        writeln!(f, "machine     {processor}, {threads} threads")?;
        writeln!(f, "program     tune {version}, backend {backend}, measured with {}", self.model)?;
        for Run { blocks, tokens, keeps_blocks, measured_bytes, counted_bytes, .. } in &self.runs {
            let kept = if *keeps_blocks { " kept" } else { "" };
            let (measured, counted) = (BinaryBytes(*measured_bytes), BinaryBytes(*counted_bytes));
            writeln!(
                f,
                "run         {measured} at the peak, {counted} counted, {tokens} tokens, {blocks} blocks{kept}"
            )?;
        }
        let constants = &self.stored.constants;
        writeln!(
            f,
            "growth      measured ÷ counted: {:.3} of the loss, {:.3} of blocks, {:.3} of kept ones",
            self.loss_ratio, self.block_ratio, self.kept_ratio
        )?;
        let (process, margin) =
            (BinaryBytes(constants.process_bytes), constants.margin_permille as f64 / 10.0);
        writeln!(f, "process     {process}; plans hold to ± {margin:.1} % of what is not exact")?;
        match &self.path {
            Some(path) => writeln!(f, "kept        {}", path.display()),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(counted_bytes: u64, measured_bytes: u64) -> Run {
        Run { blocks: 2, tokens: 64, keeps_blocks: false, measured_bytes, counted_bytes, exact_bytes: 40_000 }
    }

    #[test]
    fn what_is_left_of_the_peaks_is_the_process() {
        let runs = [run(100_000, 120_000), run(200_000, 220_000), run(400_000, 420_000)];
        let constants = calibrated(tune_plan::FLEX, &runs);
        assert_eq!((constants.process_bytes, constants.margin_permille), (20_000, 50));
        assert!((ratio(&runs[0], &runs[1]) - 1.0).abs() < 1e-12);
        assert!(constants.measured_here);
    }

    #[test]
    fn a_range_holds_every_run() {
        let runs = [run(100_000, 100_000), run(100_000, 100_000), run(100_000, 130_000)];
        let constants = calibrated(tune_plan::FLEX, &runs);
        let (estimate, not_exact) = (100_000 + constants.process_bytes, 60_000 + constants.process_bytes);
        let upper = estimate + not_exact * constants.margin_permille / 1000;
        assert!(constants.process_bytes == 10_000 && upper >= 130_000, "{constants:?}");
    }
}
