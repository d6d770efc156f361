//! `tune bench peak`: the 100 % line that other measurements are compared with.

use std::fmt;
use std::process::ExitCode;

use serde::Serialize;

use super::host::{self, Host};
use super::print;
use super::register_peak::{Loop, best_gflops};

#[derive(clap::Args)]
#[command(
    after_help = "Other programs on the machine cost little: each thread's best of many short slices counts."
)]
pub struct Args {
    /// One JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    bench: &'static str,
    #[serde(flatten)]
    host: Host,
    f32: Peak,
    /// The fastest one; absent where the processor has no bf16 product.
    bf16: Option<Peak>,
    /// Where tiles are the fastest one.
    bf16_dot_product: Option<Peak>,
}

/// 10⁹ floating-point operations a second; a multiplication and an addition are two.
#[derive(Serialize)]
struct Peak {
    instruction: &'static str,
    one_core_gflops: f64,
    all_cores_gflops: f64,
}

pub fn run(args: &Args) -> miette::Result<ExitCode> {
    let report = Report {
        bench: "peak",
        host: Host::with_threads(host::cores()),
        f32: measure(Loop::f32()),
        bf16: Loop::bf16().map(measure),
        bf16_dot_product: Loop::bf16_tiles().and_then(|_| Loop::bf16_dot_product()).map(measure),
    };
    print(&report, args.json)
}

fn measure(work: Loop) -> Peak {
    Peak {
        instruction: work.instruction,
        one_core_gflops: best_gflops(work, 1),
        all_cores_gflops: best_gflops(work, host::cores()),
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.host)?;
        let line = |f: &mut fmt::Formatter<'_>, name: &str, peak: &Peak| {
            let Peak { instruction, one_core_gflops: one, all_cores_gflops: all } = peak;
            writeln!(f, "{name:<12}{one:.1} GFLOP/s on one core, {all:.1} on all ({instruction})")
        };
        line(f, "f32", &self.f32)?;
        match &self.bf16 {
            Some(peak) => line(f, "bf16", peak)?,
            None => writeln!(f, "bf16        no instruction of its own here")?,
        }
        match &self.bf16_dot_product {
            Some(peak) => line(f, "", peak),
            None => Ok(()),
        }
    }
}
