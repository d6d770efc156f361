//! Fine-tune local language models on hardware you own.
//!
//! Each command is one file in `commands/`: its arguments and what it does. Data goes to standard output, everything
//! else to standard error.

// Nothing of a binary can be reached from outside; `pub` here says "used by other modules".
#![allow(unreachable_pub)]

mod calibration;
mod commands;
mod disk_room;
mod download;
mod engines;
mod exit;
mod inputs;
mod limits;
mod loss_plot;
mod machine;
mod memory_gate;
mod memory_picture;
mod model;
mod model_card;
mod progress;
mod proof;
mod samples;
mod trained;

use std::process::ExitCode;

use clap::Parser;

#[global_allocator]
static BLOCKS: tune_memory::Blocks = tune_memory::Blocks;

#[derive(Parser)]
#[command(
    name = "tune",
    version,
    about = "Fine-tune local language models on hardware you own",
    after_help = "Start with:\n  tune train recipes/quickstart.toml\n\nExit codes: 0 ok, 1 failed, 2 usage or bad recipe, \
                  3 does not fit in memory, 4 bad data, 5 export failed verification, 130 interrupted and saved"
)]
struct Cli {
    #[command(subcommand)]
    command: commands::Command,
}

fn main() -> ExitCode {
    machine::note_the_start();
    let cli = Cli::parse();
    if !matches!(cli.command, commands::Command::Train(_)) {
        machine::end_with_the_reader();
    }
    match commands::run(cli.command) {
        Ok(code) => code,
        Err(report) => {
            let code = exit::code_of(&report);
            eprintln!("{report:?}");
            code
        }
    }
}
