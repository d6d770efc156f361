//! `tune bench train`: the steps of `tune train`, timed.
//!
//! Useful work of a step, in floating-point operations a token, for documents of T tokens:
//!
//! ```text
//! 4 P + 6 A + 6 · n_layers · n_heads · head_dim · T        (full fine-tuning: 6 P in place of the first two)
//! ```
//!
//! P: weights that are multiplied with, head included and embedding not; forward and the gradient of the input cost
//! 2 each. A: adapter parameters, which also need the gradient of the weight. The last term is causal attention: two
//! products forward and four backward over half of a T × T square. What is recomputed does not count as work.

use std::fmt;
use std::num::NonZeroUsize;
use std::process::ExitCode;
use std::sync::atomic::AtomicBool;

use indicatif::{BinaryBytes, HumanBytes};
use miette::IntoDiagnostic;
use serde::Serialize;
use tune_data::{Batcher, Sample};
use tune_formats::ModelConfig;
use tune_plan::Calibration;
use tune_recipe::{Method, Override, RunSpec};
use tune_train::{Event, RunFolder, Setup, sft};

use super::host::Host;
use super::text::TextArgs;
use super::{median, print, use_threads};
use crate::commands::train::{batch_options, refuse_what_is_not_there};
use crate::{calibration, inputs, machine, memory_gate};

/// What all runs have in common. No row is held out and nothing is written between the steps.
const RECIPE: &str = r#"
version = 1
[adapter]
r = 16
[[data]]
path = "the text"
[data_options]
packing = false
val_split = 0.0
[train]
lr_scheduler = "constant"
warmup_ratio = 0.0
shuffle = false
[checkpoint]
save_steps = 0
"#;

#[derive(clap::Args)]
#[command(
    after_help = "Adapters have rank 16 and lie beside all seven linear layers. Each step has its own documents.\n\n\
                        Examples:\n  tune bench train --model smollm2:135m --batch 1 --seq 512\n  \
                        tune bench train --model ./model-bf16 --method lora --batch 4 --seq 256 --json"
)]
pub struct Args {
    /// Alias, directory, .gguf file, ollama:NAME or hf:OWNER/REPO
    #[arg(long, value_name = "NAME|PATH")]
    model: String,
    /// What is trained
    #[arg(long, default_value = "qlora", value_parser = ["qlora", "lora", "full"])]
    method: String,
    /// Documents in a step
    #[arg(long, value_name = "B", default_value = "1")]
    batch: NonZeroUsize,
    /// Tokens of a document
    #[arg(long, value_name = "T", default_value_t = 512, value_parser = two_or_more)]
    seq: usize,
    /// Steps that are measured
    #[arg(long, value_name = "N", default_value = "5")]
    steps: NonZeroUsize,
    /// Steps before them
    #[arg(long, value_name = "N", default_value_t = 2)]
    warmup: usize,
    /// Type in which activations are computed: a recipe's model.dtype, or auto
    #[arg(long, default_value = "auto")]
    dtype: String,
    /// Keep only the inputs of blocks and run the blocks again in backward
    #[arg(long, value_name = "on|off|auto", default_value = "auto", value_parser = ["on", "off", "auto"])]
    checkpointing: String,
    /// Threads that compute [default: one for each core]
    #[arg(long, value_name = "N")]
    threads: Option<NonZeroUsize>,
    #[command(flatten)]
    text: TextArgs,
    /// One JSON object
    #[arg(long)]
    json: bool,
}

fn two_or_more(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|n| *n >= 2).ok_or_else(|| "expected a number from 2 up".into())
}

/// What was measured. Rates are medians of the steps after warm-up.
#[derive(Serialize)]
struct Report {
    bench: &'static str,
    #[serde(flatten)]
    host: Host,
    model: String,
    method: Method,
    dtype: tune_recipe::Dtype,
    /// Blocks that keep their activations; the others run twice.
    kept_blocks: usize,
    batch: usize,
    seq: usize,
    steps: usize,
    warmup: usize,
    tokens_per_second: f64,
    /// Absent where the system does not count processor time.
    tokens_per_cpu_second: Option<f64>,
    peak_rss_bytes: Option<u64>,
    /// What the memory planner said before the run.
    planned_peak_bytes: u64,
    /// What of that follows from the sizes of the model alone.
    planned_exact_bytes: u64,
    /// Constants of the plan that are measured, not counted.
    memory_constants: Calibration,
    flop_per_token: f64,
    gflops: f64,
    first_loss: f64,
    last_loss: f64,
    /// From the start of the process to the begin of the first step, warm-up included.
    seconds_to_first_step: f64,
    /// Every step, warm-up included.
    step_seconds: Vec<f64>,
}

pub fn run(args: &Args) -> miette::Result<ExitCode> {
    use_threads(args.threads)?;
    let mut inputs = inputs::of_spec(spec(args)?)?;
    refuse_what_is_not_there(&inputs.spec)?;
    let all_steps = args.warmup + args.steps.get();
    let documents =
        args.text.documents(all_steps * args.batch.get(), args.seq, &inputs.tokenizer, &inputs.base)?;
    let rows: Vec<Sample> = documents.into_iter().map(|ids| Sample::new(ids, vec![true; args.seq])).collect();
    let mut train = Batcher::new(rows, batch_options(&inputs.spec, inputs.spec.train.shuffle))?;
    let mut validation = Batcher::new(Vec::new(), batch_options(&inputs.spec, false))?;
    let gate = memory_gate::check(
        &mut inputs.spec,
        &inputs.base,
        [&mut train, &mut validation],
        memory_gate::Start::Fresh,
    )?;

    let spec = &inputs.spec;
    let folder = tempfile::tempdir().into_diagnostic()?;
    let setup = Setup {
        spec,
        base: &inputs.base,
        train,
        validation,
        folder: RunFolder::new(folder.path()),
        plan: gate.json(None, &[]),
        kept_blocks: gate.kept_blocks(),
        resume_from: None,
        stop: &AtomicBool::new(false),
        memory_limit: None,
    };
    let mut watch = Watch::default();
    sft(&setup, &mut |event| watch.note(event))?;

    let measured = watch.steps.get(args.warmup..).unwrap_or_default();
    let tokens = (args.batch.get() * args.seq) as f64;
    let rate = |seconds: f64| tokens / seconds;
    let tokens_per_second = median(measured.iter().map(|step| rate(step.seconds))).unwrap_or(f64::NAN);
    let flop_per_token =
        flop_per_token(&inputs.base.config, spec.adapter.method, watch.trainable_parameters, args.seq);
    let report = Report {
        bench: "train",
        host: Host::new(),
        model: args.model.clone(),
        method: spec.adapter.method,
        dtype: spec.model.dtype,
        kept_blocks: gate.kept_blocks(),
        batch: args.batch.get(),
        seq: args.seq,
        steps: args.steps.get(),
        warmup: args.warmup,
        tokens_per_second,
        tokens_per_cpu_second: median(measured.iter().filter_map(|step| step.cpu_seconds.map(rate))),
        peak_rss_bytes: watch.peak_rss_bytes,
        planned_peak_bytes: gate.peak_bytes(),
        planned_exact_bytes: gate.exact_bytes(),
        memory_constants: calibration::current(),
        flop_per_token,
        gflops: flop_per_token * tokens_per_second * 1e-9,
        first_loss: watch.steps.first().map_or(f64::NAN, |step| step.loss),
        last_loss: watch.steps.last().map_or(f64::NAN, |step| step.loss),
        seconds_to_first_step: watch.seconds_to_first_step,
        step_seconds: watch.steps.iter().map(|step| step.seconds).collect(),
    };
    print(&report, args.json)
}

/// A recipe as somebody would write it, so that every default and every check is that of `tune train`.
fn spec(args: &Args) -> miette::Result<RunSpec> {
    let mut overrides = vec![
        Override::flag("--model", "model.base", &args.model),
        Override::flag("--method", "adapter.type", &args.method),
        Override::set(format!("data_options.sequence_len={}", args.seq)),
        Override::set(format!("train.micro_batch_size={}", args.batch)),
        Override::set(format!("train.effective_batch_size={}", args.batch)),
        Override::set(format!("train.max_steps={}", args.warmup + args.steps.get())),
    ];
    if args.dtype != "auto" {
        overrides.push(Override::flag("--dtype", "model.dtype", &args.dtype));
    }
    if args.checkpointing != "auto" {
        let on = args.checkpointing == "on";
        overrides.push(Override::set(format!("train.gradient_checkpointing={on}")));
    }
    Ok(tune_recipe::parse("bench", RECIPE, &overrides)?)
}

fn flop_per_token(config: &ModelConfig, method: Method, trainable: usize, seq: usize) -> f64 {
    let block: usize = config.block_linears().iter().map(|(_, d_out, d_in)| d_out * d_in).sum();
    let weights = config.num_hidden_layers * block + config.vocab_size * config.hidden_size;
    let products = match method {
        Method::Lora | Method::Qlora => 4 * weights + 6 * trainable,
        Method::Full => 6 * weights,
    };
    let attention = 6 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * seq;
    (products + attention) as f64
}

/// What a run says while it goes on.
#[derive(Default)]
struct Watch {
    trainable_parameters: usize,
    seconds_to_first_step: f64,
    /// Processor time when the last step ended.
    cpu_seconds: Option<f64>,
    peak_rss_bytes: Option<u64>,
    steps: Vec<StepTimes>,
}

struct StepTimes {
    seconds: f64,
    cpu_seconds: Option<f64>,
    loss: f64,
}

impl Watch {
    fn note(&mut self, event: Event) {
        match event {
            Event::Started { trainable_parameters, .. } => {
                self.trainable_parameters = trainable_parameters;
                self.seconds_to_first_step = machine::age().as_secs_f64();
                self.cpu_seconds = machine::cpu_seconds();
            }
            Event::Step(step) => {
                let now = machine::cpu_seconds();
                self.steps.push(StepTimes {
                    seconds: step.tokens as f64 / step.tokens_per_second,
                    cpu_seconds: now.zip(self.cpu_seconds).map(|(now, before)| now - before),
                    loss: step.loss,
                });
                self.peak_rss_bytes = step.peak_memory_bytes;
                self.cpu_seconds = now;
            }
            Event::OverBudget { .. }
            | Event::Progress { .. }
            | Event::Saved { .. }
            | Event::StoppedEarly { .. } => {}
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.host)?;
        let (method, dtype) = (name(&self.method), name(&self.dtype));
        writeln!(
            f,
            "model       {}, {method} in {dtype}, {} blocks keep their activations",
            self.model, self.kept_blocks
        )?;
        writeln!(
            f,
            "shape       {} × {} tokens, {} steps after {}",
            self.batch, self.seq, self.steps, self.warmup
        )?;
        write!(f, "speed       {:.1} tokens/s", self.tokens_per_second)?;
        if let Some(rate) = self.tokens_per_cpu_second {
            write!(f, ", {rate:.1} a second of processor time")?;
        }
        writeln!(f)?;
        writeln!(f, "work        {:.1} GFLOP/s", self.gflops)?;
        if let Some(peak) = self.peak_rss_bytes {
            let planned = BinaryBytes(self.planned_peak_bytes);
            writeln!(f, "memory      {} at the peak, {planned} planned", HumanBytes(peak))?;
        }
        writeln!(
            f,
            "loss        {:.4} in the first step, {:.4} in the last",
            self.first_loss, self.last_loss
        )?;
        writeln!(f, "start       {:.2} s to the first step", self.seconds_to_first_step)
    }
}

/// How a recipe spells the value.
fn name(value: &impl Serialize) -> String {
    serde_json::to_value(value).ok().and_then(|v| v.as_str().map(String::from)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use tune_formats::Architecture;

    #[test]
    fn processor_time_of_a_step_counts_from_the_step_before() {
        let mut watch = Watch::default();
        let started =
            Event::Started { total_steps: 1, resumed_from: 0, trainable_parameters: 1, base_parameters: 1 };
        watch.note(started);
        let before = watch.cpu_seconds;
        watch.note(Event::Progress { step: 1, share: 0.5 });
        assert_eq!(watch.cpu_seconds, before);
    }

    /// 49,152 × 576 embeddings, 30 blocks, tied head; 4,884,480 adapter parameters at r = 16.
    #[test]
    fn useful_work_of_smollm2_is_what_a_count_by_hand_gives() {
        let config = ModelConfig {
            architecture: Architecture::Llama,
            vocab_size: 49_152,
            hidden_size: 576,
            intermediate_size: 1536,
            num_hidden_layers: 30,
            num_attention_heads: 9,
            num_key_value_heads: 3,
            head_dim: 64,
            rms_norm_eps: 1e-5,
            rope_theta: 100_000.0,
            rope_scaling: None,
            max_position_embeddings: 8192,
            tie_word_embeddings: true,
            attention_bias: false,
        };
        let mega = |seq| (flop_per_token(&config, Method::Qlora, 4_884_480, seq) * 1e-6).round() as u64;
        assert_eq!([256, 512, 1024, 2048].map(mega), [594, 620, 673, 780]);
    }
}
