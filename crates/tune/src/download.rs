//! Model reference → local files, with a progress bar on the terminal.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use tune_hub::{HubError, ModelRef, Options, Progress, Resolved};

/// Makes sure that the files of `reference` are on this machine. Shows a bar while something is fetched.
pub fn resolve(reference: &ModelRef, refresh: bool) -> miette::Result<Resolved> {
    let mut options = Options::from_env(|name| std::env::var_os(name));
    options.refresh = refresh;
    let mut bar: Option<ProgressBar> = None;
    let resolved = tune_hub::resolve(reference, &options, &mut |progress| match progress {
        Progress::Started { file, from, bytes } => {
            let fresh = match bytes {
                Some(bytes) => bytes_bar(bytes, ""),
                None => ProgressBar::new_spinner().with_style(counting_spinner()),
            };
            fresh.set_message(format!("{file} from {from}"));
            fresh.enable_steady_tick(Duration::from_millis(200));
            bar = Some(fresh);
        }
        Progress::Bytes { done } => {
            if let Some(bar) = &bar {
                bar.set_position(done);
            }
        }
        Progress::Verifying { file } => {
            if let Some(bar) = &bar {
                bar.set_message(format!("checking {file}"));
            }
        }
        Progress::Finished { .. } => {
            if let Some(bar) = bar.take() {
                bar.finish_and_clear();
            }
        }
        Progress::SourceFailed { source, reason } => {
            if let Some(bar) = bar.take() {
                bar.finish_and_clear();
            }
            eprintln!("{source}: {reason}");
        }
    });
    if let Some(bar) = bar {
        bar.finish_and_clear();
    }
    Ok(resolved?)
}

/// The files of `reference` if they are on this machine already; nothing is fetched.
pub fn resolve_local(reference: &ModelRef) -> Result<Resolved, HubError> {
    let mut options = Options::from_env(|name| std::env::var_os(name));
    options.hub.offline = true;
    options.pip.clear();
    tune_hub::resolve(reference, &options, &mut |_| {})
}

/// A bar over bytes, on a terminal.
pub fn bytes_bar(bytes: u64, message: &str) -> ProgressBar {
    let bar =
        ProgressBar::new(bytes).with_style(style("{bytes} of {total_bytes}, {bytes_per_sec}, {eta} left"));
    bar.set_message(message.to_owned());
    bar
}

/// A sign that something goes on, on a terminal.
pub fn spinner(message: &str) -> ProgressBar {
    let spinner = ProgressBar::new_spinner().with_style(
        ProgressStyle::with_template("{spinner} {msg}").unwrap_or_else(|_| ProgressStyle::default_spinner()),
    );
    spinner.set_message(message.to_owned());
    spinner.enable_steady_tick(Duration::from_millis(200));
    spinner
}

fn style(numbers: &str) -> ProgressStyle {
    ProgressStyle::with_template(&format!("{{msg}}\n{{wide_bar}} {numbers}"))
        .unwrap_or_else(|_| ProgressStyle::default_bar())
}

fn counting_spinner() -> ProgressStyle {
    ProgressStyle::with_template("{spinner} {msg} {bytes}")
        .unwrap_or_else(|_| ProgressStyle::default_spinner())
}
