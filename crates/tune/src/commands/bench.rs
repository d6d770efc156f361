//! `tune bench`: what this machine can do, and what training and generation make of it.
//!
//! The same numbers for other programs, and the comparison, are in `benches/rivals/`; `docs/benchmarks.md` says how
//! to repeat a whole one.

mod generate;
pub mod host;
mod make_model;
mod memory;
mod peak;
mod register_peak;
mod text;
mod train;

use std::fmt::Display;
use std::num::NonZeroUsize;
use std::process::ExitCode;

use clap::Subcommand;
use miette::IntoDiagnostic;
use serde::Serialize;

#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Real optimizer steps on real text
    Train(train::Args),
    /// Reading a prompt and continuing it
    Generate(generate::Args),
    /// What the memory plan cannot count: measures this machine, and keeps it for later plans
    Memory(memory::Args),
    /// The most that the cores can multiply and add, with everything in registers
    Peak(peak::Args),
    /// Write a model of a published or given shape with random weights, to measure and to test with
    MakeModel(make_model::Args),
}

pub fn run(args: &Args) -> miette::Result<ExitCode> {
    match &args.what {
        What::Train(args) => train::run(args),
        What::Generate(args) => generate::run(args),
        What::Memory(args) => memory::run(args),
        What::Peak(args) => peak::run(args),
        What::MakeModel(args) => make_model::run(args),
    }
}

/// Sets how many threads the whole program computes with. Only before anything has been computed.
fn use_threads(threads: Option<NonZeroUsize>) -> miette::Result<()> {
    match threads {
        Some(threads) => {
            rayon::ThreadPoolBuilder::new().num_threads(threads.get()).build_global().into_diagnostic()
        }
        None => Ok(()),
    }
}

/// One JSON object, or lines for people.
fn print(report: &(impl Serialize + Display), json: bool) -> miette::Result<ExitCode> {
    if json {
        println!("{}", serde_json::to_string(report).into_diagnostic()?);
    } else {
        print!("{report}");
    }
    Ok(ExitCode::SUCCESS)
}

/// The middle value; the mean of both where there are two. `None` without values.
fn median(values: impl IntoIterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        len if len.is_multiple_of(2) => Some(f64::midpoint(values[middle - 1], values[middle])),
        _ => Some(values[middle]),
    }
}

#[cfg(test)]
mod tests {
    use super::median;

    #[test]
    fn the_median_does_not_follow_one_slow_step() {
        assert_eq!(median([3.0, 100.0, 1.0]), Some(3.0));
        assert_eq!(median([4.0, 1.0, 100.0, 2.0]), Some(3.0));
        assert_eq!(median([]), None);
    }
}
