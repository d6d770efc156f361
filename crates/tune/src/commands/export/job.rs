//! One export: progress, and what the user should know about the result.

use std::io::IsTerminal;
use std::path::Path;

use indicatif::{ProgressBar, ProgressStyle};
use miette::Result;
use tune_data::{ChatTemplate, Clock, Message, Tokenizer};
use tune_export::{
    ExportEvent, ExportOptions, ExportReport, ExportRequest, ExportTarget, Retention, Verification, export,
};
use tune_formats::peft::Adapter;
use tune_formats::{BaseModel, Source};
use tune_recipe::{Quantization, RunSpec, Verify};

/// Below this much of the update, answers are closer to the base's than to the trained ones.
const LEAST_KEPT: f64 = 0.9;
/// Rounding errors larger than the update by this factor drown it.
const LARGEST_ERROR: f64 = 2.0;

/// What is exported.
pub struct Job<'a> {
    pub name: &'a str,
    pub reference: &'a str,
    pub base: &'a BaseModel,
    pub adapter: &'a Adapter,
    pub tokenizer: &'a Tokenizer,
    pub spec: Option<&'a RunSpec>,
}

impl Job<'_> {
    /// Exports with a progress bar, and tells what the user should know about the result.
    pub fn write(&self, target: ExportTarget, out: &Path, replace_folder: bool) -> Result<ExportReport> {
        if self.adapter.trained_on(self.base)? == Some(false) {
            eprintln!(
                "note      the adapter was trained over other weights of this model than {}",
                self.reference
            );
        }
        let over_nf4 = self.spec.is_some_and(|spec| spec.model.quantization == Quantization::Nf4);
        if over_nf4 && matches!(target, ExportTarget::Gguf(_) | ExportTarget::Safetensors) {
            eprintln!("note      trained over NF4, merged into the weights that NF4 was made from");
        }
        // The date that training used, so that a template which shows one is recognised.
        let template = match &self.base.chat_template {
            Some(_) => Some(ChatTemplate::from_base(self.base, self.tokenizer, Clock::Fixed)?),
            None => None,
        };
        let render = |messages: &[(&str, &str)], add_generation_prompt: bool| {
            let messages: Vec<Message> =
                messages.iter().map(|(role, content)| Message::new(role, content)).collect();
            template.as_ref()?.render(&messages, None, add_generation_prompt).ok()
        };
        let tokenizer_json = match (&self.base.source, target) {
            (Source::Gguf(_), ExportTarget::Safetensors) => tune_data::gguf_tokenizer_json(self.base)?,
            _ => None,
        };
        let options = ExportOptions {
            name: Some(self.name),
            chat_template: None,
            ollama_base: self.reference.strip_prefix("ollama:"),
            tokenizer_json: tokenizer_json.as_deref(),
            verification: self.spec.map_or(Verification::Strict, |spec| match spec.export.verify {
                Verify::Strict => Verification::Strict,
                Verify::Warn => Verification::Warn,
                Verify::Off => Verification::Off,
            }),
            replace_folder,
            render: Some(&render),
        };
        let request = ExportRequest { base: self.base, adapter: self.adapter, target, out, options };
        let bar = bar(target);
        let report = export(&request, &mut |event| show(&bar, event));
        bar.finish_and_clear();
        let report = report?;
        for note in &report.notes {
            eprintln!("note      {note}");
        }
        if let Some(retention) = report.retention {
            tell_retention(target, retention);
        }
        Ok(report)
    }
}

fn tell_retention(target: ExportTarget, retention: Retention) {
    eprintln!(
        "kept      {:.1} % of the update, which is {:.2} % of the weights; rounding adds {:.0} % of it",
        100.0 * retention.kept,
        100.0 * retention.relative_update,
        100.0 * retention.error,
    );
    if retention.kept < LEAST_KEPT || retention.error > LARGEST_ERROR {
        eprintln!(
            "warning   {target} is too coarse for an update of this size and may answer like the base: use gguf:q8_0, \
             gguf:f16 or gguf-lora"
        );
    }
}

fn bar(target: ExportTarget) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{msg:9} {wide_bar} {pos}/{len} tensors");
    ProgressBar::new(0)
        .with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
        .with_message(target.to_string())
}

fn show(bar: &ProgressBar, event: ExportEvent) {
    match event {
        ExportEvent::Started { tensors, .. } => bar.set_length(2 * tensors as u64),
        ExportEvent::Wrote { done, .. } => {
            bar.set_message("writing");
            bar.set_position(done as u64);
        }
        ExportEvent::Verified { done, tensors } => {
            bar.set_message("verifying");
            bar.set_position((tensors + done) as u64);
        }
    }
}
