//! `tune bench memory`: what the memory plan cannot count, measured on this machine.
//!
//! ```text
//! peak = counted terms + process        counted terms: linear in positions of a loss chunk, and in kept blocks
//! ```
//!
//! Three runs of two steps each: few tokens, four times as many, and those again with every block kept. A peak is that of
//! a process, so each run is one of its own: this program started again. The two differences say whether the counted
//! terms are right here (measured ÷ counted is 1), and what is left of the peaks is the process.

use std::fmt;
use std::process::{Command, ExitCode};

use indicatif::BinaryBytes;
use miette::IntoDiagnostic;
use serde::{Deserialize, Serialize};
use tune_plan::Calibration;

use super::print;
use crate::calibration::{self, HoldsFor, Stored};
use crate::exit::UsageError;

/// Runs: tokens of a document, and whether blocks run again in backward.
const RUNS: [(usize, bool); 3] = [(64, true), (256, true), (256, false)];

/// Least half-width of the range around an estimate, in thousandths.
const LEAST_MARGIN: u64 = 50;

#[derive(clap::Args)]
#[command(
    after_help = "The constants are kept in the user's cache folder, for this version, processor and number of threads. \
                  tune plan and tune train use them from then on, and say so."
)]
pub struct Args {
    /// Model to measure with
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
    memory_constants: Calibration,
}

/// What one run has shown.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
struct Run {
    tokens: usize,
    keeps_blocks: bool,
    measured_bytes: u64,
    /// Everything of the plan but the process.
    counted_bytes: u64,
}

#[derive(Serialize)]
struct Report {
    bench: &'static str,
    #[serde(flatten)]
    stored: Stored,
    model: String,
    runs: Vec<Run>,
    /// Measured ÷ counted growth between two chunks of the loss, and between kept blocks and others.
    loss_ratio: f64,
    block_ratio: f64,
    path: Option<std::path::PathBuf>,
}

pub fn run(args: &Args) -> miette::Result<ExitCode> {
    let mut runs = Vec::new();
    let mut constants = None;
    for (tokens, checkpointing) in RUNS {
        let child = measure(&args.model, tokens, checkpointing)?;
        let measured_bytes = child.peak_rss_bytes.ok_or_else(|| {
            let help = "plans use the shipped constants";
            UsageError::report("this system does not tell how much memory a process has used", help)
        })?;
        let counted_bytes = child.planned_peak_bytes.saturating_sub(child.memory_constants.process_bytes);
        runs.push(Run { tokens, keeps_blocks: !checkpointing, measured_bytes, counted_bytes });
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
        runs,
        path,
    };
    print(&report, args.json)
}

/// Two steps in a fresh process.
fn measure(model: &str, tokens: usize, checkpointing: bool) -> miette::Result<Child> {
    let program = std::env::current_exe().into_diagnostic()?;
    let output = Command::new(program)
        .args(["bench", "train", "--model", model, "--seq", &tokens.to_string(), "--json"])
        .args(["--steps", "1", "--warmup", "1", "--checkpointing", if checkpointing { "on" } else { "off" }])
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
        1000 * run.measured_bytes.saturating_sub(estimate) / estimate.max(1)
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
        for Run { tokens, keeps_blocks, measured_bytes, counted_bytes } in &self.runs {
            let blocks = if *keeps_blocks { ", blocks kept" } else { "" };
            let (measured, counted) = (BinaryBytes(*measured_bytes), BinaryBytes(*counted_bytes));
            writeln!(f, "run         {measured} at the peak, {counted} counted, {tokens} tokens{blocks}")?;
        }
        let constants = &self.stored.constants;
        writeln!(
            f,
            "growth      measured ÷ counted: {:.3} of the loss, {:.3} of kept blocks",
            self.loss_ratio, self.block_ratio
        )?;
        let (process, margin) =
            (BinaryBytes(constants.process_bytes), constants.margin_permille as f64 / 10.0);
        writeln!(f, "process     {process}; plans hold to ± {margin:.1} %")?;
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
        Run { tokens: 64, keeps_blocks: false, measured_bytes, counted_bytes }
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
        let upper = (100_000 + constants.process_bytes) * (1000 + constants.margin_permille) / 1000;
        assert!(constants.process_bytes == 10_000 && upper >= 130_000, "{constants:?}");
    }
}
