//! How a run shows on the terminal: a bar, lines, JSON, or nothing.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use indicatif::{HumanBytes, HumanDuration, ProgressBar, ProgressStyle};
use serde_json::json;
use tune_train::{Event, StepMetrics};

use crate::proof::Step;

/// A bar over `what` for a person at a terminal, and nothing for others.
pub fn bar(what: &str) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template(&format!("{{msg:9}} {{wide_bar}} {{pos}}/{{len}} {what}"));
    ProgressBar::new(0).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

/// Shows how far the proof of an artefact is.
pub fn show_proof(bar: &ProgressBar, step: Step) {
    let (message, done, all) = match step {
        Step::Weights { done, tensors } => ("weights", done, tensors),
        Step::Answers { done, batches } => ("answers", done, batches),
        Step::Engine => ("llama.cpp", 0, 1),
    };
    bar.set_message(message);
    bar.set_length(all as u64);
    bar.set_position(done as u64);
}

/// Who reads along.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// A person at a terminal: a bar.
    Bar,
    /// A log file: a line every so many steps.
    Lines,
    /// Another program: one JSON object per event on standard output.
    Json,
    /// Nobody.
    Quiet,
}

impl Mode {
    /// The mode for the flags `--quiet` and `--json`, and for what standard error is.
    pub fn choose(quiet: bool, json: bool) -> Self {
        match (json, quiet) {
            (true, _) => Self::Json,
            (false, true) => Self::Quiet,
            (false, false) if std::io::stderr().is_terminal() => Self::Bar,
            (false, false) => Self::Lines,
        }
    }
}

/// Draws the events of a run.
pub struct Progress {
    mode: Mode,
    planned_bytes: u64,
    logging_steps: usize,
    total_steps: usize,
    bar: ProgressBar,
    /// Smoothed tokens per second.
    speed: Option<f64>,
    /// What was said about the last step.
    numbers: String,
    /// When a line was printed last.
    last_line: Instant,
}

/// A log is never silent for longer while blocks are being computed.
const QUIET: Duration = Duration::from_secs(15);

impl Progress {
    /// For a run whose plan is `planned_bytes`.
    pub fn new(mode: Mode, planned_bytes: u64, logging_steps: usize) -> Self {
        let logging_steps = logging_steps.max(1);
        let bar = ProgressBar::hidden();
        let (numbers, last_line) = (String::new(), Instant::now());
        Self { mode, planned_bytes, logging_steps, total_steps: 0, bar, speed: None, numbers, last_line }
    }

    /// Shows one event.
    pub fn show(&mut self, event: &Event) {
        match self.mode {
            Mode::Quiet => {}
            Mode::Json => print_json(event),
            Mode::Bar | Mode::Lines => self.show_to_person(event),
        }
    }

    /// Takes the bar away.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }

    fn show_to_person(&mut self, event: &Event) {
        match event {
            Event::Started { total_steps, resumed_from, trainable_parameters, base_parameters } => {
                let share = 100.0 * *trainable_parameters as f64 / *base_parameters as f64;
                eprintln!(
                    "training  {:.2} M of {:.0} M parameters ({share:.2} %), {total_steps} steps",
                    *trainable_parameters as f64 / 1e6,
                    *base_parameters as f64 / 1e6,
                );
                if *resumed_from > 0 {
                    eprintln!("resumed   after step {resumed_from}");
                }
                self.total_steps = *total_steps;
                if self.mode == Mode::Bar {
                    let style = ProgressStyle::with_template("{wide_bar} {pos}/{len} {msg}");
                    self.bar = ProgressBar::new(*total_steps as u64)
                        .with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
                    self.bar.set_position(*resumed_from as u64);
                }
            }
            Event::Progress { step, share } => self.show_progress(*step, *share),
            Event::Step(metrics) => self.show_step(metrics),
            Event::OverBudget { peak_bytes, budget_bytes } => self.line(&format!(
                "memory    {} are resident, and the run may use {}",
                HumanBytes(*peak_bytes),
                HumanBytes(*budget_bytes)
            )),
            Event::Saved { path } => self.line(&format!("saved     {}", path.display())),
            Event::StoppedEarly { step } => {
                self.line(&format!("stopped   early after step {step}: validation no longer improves"));
            }
        }
    }

    /// Signs of life within a step: at once in the bar, now and then in a log.
    fn show_progress(&mut self, step: usize, share: f64) {
        let text = format!("{:.0} % of step {step}", 100.0 * share);
        match self.mode {
            Mode::Bar if self.numbers.is_empty() => self.bar.set_message(text),
            Mode::Bar => self.bar.set_message(format!("{}, {text}", self.numbers)),
            Mode::Lines if share < 1.0 && self.last_line.elapsed() >= QUIET => self.line(&text),
            Mode::Lines | Mode::Json | Mode::Quiet => {}
        }
    }

    fn show_step(&mut self, metrics: &StepMetrics) {
        let speed =
            self.speed.map_or(metrics.tokens_per_second, |s| 0.8 * s + 0.2 * metrics.tokens_per_second);
        self.speed = Some(speed);
        let left = self.total_steps.saturating_sub(metrics.step) as f64;
        let seconds = left * metrics.tokens as f64 / speed;
        let eta = HumanDuration(Duration::from_secs_f64(seconds.min(1e9)));
        let memory = metrics.peak_memory_bytes.map_or(String::new(), |peak| {
            format!(", {} of {} planned", HumanBytes(peak), HumanBytes(self.planned_bytes))
        });
        let numbers = format!("loss {:.4}, {speed:.0} tokens/s{memory}, {eta} left", metrics.loss);
        self.bar.set_position(metrics.step as u64);
        self.bar.set_message(numbers.clone());
        self.numbers.clone_from(&numbers);
        let last = metrics.step == self.total_steps;
        if self.mode == Mode::Lines && (metrics.step.is_multiple_of(self.logging_steps) || last) {
            self.line(&format!("step {:>5}/{}  {numbers}", metrics.step, self.total_steps));
        }
        if let Some(val_loss) = metrics.val_loss {
            self.line(&format!("step {:>5}  validation loss {val_loss:.4}", metrics.step));
        }
    }

    fn line(&mut self, text: &str) {
        self.last_line = Instant::now();
        self.bar.suspend(|| eprintln!("{text}"));
    }
}

fn print_json(event: &Event) {
    let value = match event {
        Event::Started { total_steps, resumed_from, trainable_parameters, base_parameters } => json!({
            "event": "started", "total_steps": total_steps, "resumed_from": resumed_from,
            "trainable_parameters": trainable_parameters, "base_parameters": base_parameters,
        }),
        Event::Step(metrics) => {
            let mut value = json!({ "event": "step" });
            if let (Some(object), Ok(serde_json::Value::Object(fields))) =
                (value.as_object_mut(), serde_json::to_value(metrics))
            {
                object.extend(fields);
            }
            value
        }
        Event::OverBudget { peak_bytes, budget_bytes } => {
            json!({ "event": "over_budget", "peak_bytes": peak_bytes, "budget_bytes": budget_bytes })
        }
        // Too many to be worth a line each.
        Event::Progress { .. } => return,
        Event::Saved { path } => json!({ "event": "saved", "path": path }),
        Event::StoppedEarly { step } => json!({ "event": "stopped_early", "step": step }),
    };
    // The reader may have gone; the run goes on.
    let _ = writeln!(std::io::stdout(), "{value}");
}
