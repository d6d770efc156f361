//! A model as a GGUF file of another type, without an adapter: what llama.cpp's `llama-quantize` does.
//!
//! ```sh
//! cargo run --release -p tune-export --example quantise -- MODEL q4_k_m OUT.gguf [--verify]
//! ```
//!
//! Prints the CPU time of the process. `tests/e2e/same_tensors.py` compares the result with another.
#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::path::Path;

use miette::{IntoDiagnostic, Result, miette};
use tune_export::{ExportOptions, ExportRequest, ExportTarget, FileType, Verification, export};
use tune_formats::peft::{Adapter, AdapterConfig};

/// As in the program itself.
#[global_allocator]
static BLOCKS: tune_memory::Blocks = tune_memory::Blocks;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [model, file_type, out, rest @ ..] = &arguments[..] else {
        return Err(miette!("usage: quantise MODEL TYPE OUT.gguf [--verify]"));
    };
    let file_type = FileType::from_name(file_type).ok_or_else(|| miette!("unknown type {file_type}"))?;
    let base = tune_formats::open(Path::new(model))?;
    let adapter = Adapter { config: AdapterConfig::default(), layers: BTreeMap::new() };
    let verification =
        if rest.iter().any(|flag| flag == "--verify") { Verification::Strict } else { Verification::Off };
    let request = ExportRequest {
        base: &base,
        adapter: &adapter,
        target: ExportTarget::Gguf(file_type),
        out: Path::new(out),
        options: ExportOptions { verification, ..ExportOptions::default() },
    };
    let report = export(&request, &mut |_| ())?;
    let seconds = cpu_seconds().into_diagnostic()?;
    println!("{} tensors, {} bytes, {seconds:.2} s of CPU time", report.tensors, report.bytes);
    Ok(())
}

fn cpu_seconds() -> std::io::Result<f64> {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes the time into a valid place.
    match unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &raw mut time) } {
        0 => Ok(time.tv_sec as f64 + time.tv_nsec as f64 / 1e9),
        _ => Err(std::io::Error::last_os_error()),
    }
}
