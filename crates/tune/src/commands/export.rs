//! `tune export`: a trained run as GGUF, safetensors, PEFT or a model in Ollama.

mod ollama;

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use miette::{IntoDiagnostic, Result};
use tune_data::{ChatTemplate, Clock, Message, Tokenizer};
use tune_export::{
    ExportError, ExportEvent, ExportOptions, ExportReport, ExportRequest, ExportTarget, OllamaBase,
    Retention, Verification, export,
};
use tune_formats::peft::{self, Adapter, AdapterConfig};
use tune_formats::{BaseModel, Source};
use tune_hub::{ModelRef, OllamaSettings};
use tune_models::Llama;
use tune_recipe::{Method, Quantization, RunSpec, Verify};
use tune_train::RunFolder;

use crate::download;
use crate::exit::{INTERRUPTED, UsageError};
use crate::inputs::{self, Inputs};
use crate::model::trained_base;
use ollama::{Creation, OllamaTarget};

/// Below this much of the update, answers are closer to the base's than to the trained ones.
const LEAST_KEPT: f64 = 0.9;
/// Rounding errors larger than the update by this factor drown it.
const LARGEST_ERROR: f64 = 2.0;

#[derive(clap::Args)]
#[command(after_help = "Formats:\n  \
    gguf-lora     the adapter, for llama.cpp and Ollama over the unchanged base; loses nothing\n  \
    gguf:q8_0     one merged file; also gguf:f32 f16 bf16 q6_k q5_k_m q5_k_s q5_1 q5_0 q4_k_m\n  \
    \u{20}             q4_k_s q4_1 q4_0 iq4_nl mxfp4 q3_k_m q2_k, as llama-quantize makes them\n  \
    safetensors   merged, as a Hugging Face folder\n  \
    peft          the adapter, as a PEFT folder\n  \
    ollama:NAME   a model of the Ollama server at OLLAMA_HOST; ollama:NAME?gguf:TYPE says what is sent\n\n\
    Examples:\n  tune export runs/quickstart --to gguf:q8_0 --out quickstart.gguf\n  \
    tune export runs/quickstart --to gguf-lora\n  \
    tune export runs/quickstart --to ollama:tickets\n  \
    tune export runs/quickstart/adapter --base ./another-quantisation.gguf --to gguf:f16")]
pub struct Args {
    /// Folder of a run, or a PEFT adapter folder
    run: PathBuf,
    /// What to write
    #[arg(long, value_name = "FORMAT")]
    to: String,
    /// File or folder to write, or a folder to write it into [default: RUN/export]
    #[arg(long, value_name = "PATH")]
    out: Option<PathBuf>,
    /// Another copy of the base, such as one that is not quantised
    #[arg(long, value_name = "REF")]
    base: Option<String>,
    /// Take another base than the adapter was trained on
    #[arg(long)]
    any_base: bool,
}

pub fn run(args: &Args) -> Result<ExitCode> {
    let target = Destination::parse(&args.to)?;
    // Files get their names when they are whole, and a server keeps nothing of half an upload.
    ctrlc::set_handler(|| std::process::exit(i32::from(INTERRUPTED))).into_diagnostic()?;
    let folder = RunFolder::new(&args.run);
    let spec = if folder.recipe().is_file() { Some(tune_recipe::load(&folder.recipe(), &[])?) } else { None };
    let trains_all = spec.as_ref().is_some_and(|spec| spec.adapter.method == Method::Full);
    if trains_all {
        target.refuse_adapters()?;
    }
    let adapter = if trains_all { no_adapter() } else { read_adapter(&folder, spec.is_some())? };
    let reference = base_reference(args, spec.as_ref(), &adapter)?;
    let resolved = download::resolve(&ModelRef::parse(&reference)?, false)?;
    let base =
        if trains_all { trained_base(&folder, &resolved.path)? } else { tune_formats::open(&resolved.path)? };
    // Another base named on purpose, such as one of more bits, is noted and not refused.
    if args.base.is_none() && !args.any_base {
        adapter.require_trained_base(&base)?;
    }
    let tokenizer = Tokenizer::from_base(&base)?;

    let name = spec.as_ref().map_or_else(|| name_of(&args.run), |spec| spec.run.name.clone());
    let job = Job {
        name: &name,
        reference: &reference,
        ollama: resolved.ollama.as_ref(),
        base: &base,
        adapter: &adapter,
        tokenizer: &tokenizer,
        spec: spec.as_ref(),
    };
    let target = match target {
        Destination::File(target) => target,
        Destination::Ollama(target) => {
            let question = match &spec {
                Some(spec) => question(spec)?,
                None => vec![greeting()],
            };
            let in_run = folder.root().join("export");
            let creation = Creation {
                job: &job,
                target: &target,
                resolved: &resolved,
                folder: args.out.as_deref().unwrap_or(&in_run),
                trains_all,
                question,
                any_base: args.any_base,
            };
            creation.run()?;
            println!("{}", target.name);
            return Ok(ExitCode::SUCCESS);
        }
    };
    let in_run = default_path(&folder, target, &name);
    let (out, replace_folder) = match &args.out {
        None => (in_run, true),
        Some(out) if out.is_dir() && !target.is_folder() => (out.join(target.file_name(&name)), false),
        Some(out) => (out.clone(), false),
    };
    let report = job.write(target, &out, replace_folder)?;
    eprintln!("wrote     {} ({})", report.path.display(), HumanBytes(report.bytes));
    if let Some(modelfile) = &report.modelfile {
        eprintln!("ollama    ollama create {name} -f {}", modelfile.display());
    }
    println!("{}", report.path.display());
    Ok(ExitCode::SUCCESS)
}

/// Refuses a run's targets that could not be written, and warns of a server that is not there, before it has trained
/// for hours.
pub fn check_targets(spec: &RunSpec) -> Result<()> {
    for target in &spec.export.targets {
        let target = Destination::parse(target)?;
        if spec.adapter.method == Method::Full {
            target.refuse_adapters()?;
        }
    }
    Ok(())
}

/// What a run should be told before it starts: a target in Ollama needs a server.
pub fn warn_of_targets(spec: &RunSpec, say: &dyn Fn(String)) {
    let names: Vec<&str> =
        spec.export.targets.iter().filter_map(|target| target.strip_prefix("ollama:")).collect();
    if names.is_empty() {
        return;
    }
    match ollama::connect() {
        Ok(server) => say(format!("ollama    {} answers at {}", server.version(), server.host())),
        Err(error) => say(format!(
            "warning   {error}; without it at the end of the run, the files and a Modelfile are written, and {} is not \
             created",
            names.join(", ")
        )),
    }
}

/// Where all weights were trained there is no adapter to write.
fn refuse_adapters(target: ExportTarget) -> Result<()> {
    match target {
        ExportTarget::GgufLora | ExportTarget::Peft => Err(UsageError::report(
            format!("\"{target}\" is an adapter, and a run with adapter.type = \"full\" trains none"),
            "export the trained weights: safetensors, gguf:f16, gguf:q8_0",
        )),
        ExportTarget::Gguf(_) | ExportTarget::Safetensors => Ok(()),
    }
}

/// Trained weights need no update.
fn no_adapter() -> Adapter {
    Adapter { config: AdapterConfig::default(), layers: BTreeMap::new() }
}

/// Writes the weights of a run that trains all of them into its folder, exactly, as a Hugging Face model.
pub fn write_trained_model(folder: &RunFolder, inputs: &Inputs, model: &Llama) -> Result<()> {
    let Some(weights) = model.trained_weights() else { return Ok(()) };
    let base = BaseModel { weights: Box::new(weights), ..tune_formats::open(&inputs.resolved.path)? };
    let job = Job {
        name: &inputs.spec.run.name,
        reference: &inputs.spec.model.base,
        ollama: None,
        base: &base,
        adapter: &no_adapter(),
        tokenizer: &inputs.tokenizer,
        spec: Some(&inputs.spec),
    };
    job.write(ExportTarget::Safetensors, &folder.model(), true).map(|_| ())
}

/// A run's own targets, those first that need nobody else.
pub fn in_order(spec: &RunSpec) -> Vec<&String> {
    let mut targets: Vec<&String> = spec.export.targets.iter().collect();
    targets.sort_by_key(|target| target.starts_with("ollama:"));
    targets
}

/// Exports one of a run's own targets into its folder, or into Ollama, and gives the path or the name.
pub fn export_run(folder: &RunFolder, inputs: &Inputs, target: &str) -> Result<String> {
    let spec = &inputs.spec;
    let target = Destination::parse(target)?;
    let trains_all = spec.adapter.method == Method::Full;
    let adapter = if trains_all { no_adapter() } else { read_adapter(folder, true)? };
    let trained = if trains_all { Some(trained_base(folder, &inputs.resolved.path)?) } else { None };
    let job = Job {
        name: &spec.run.name,
        reference: &spec.model.base,
        ollama: inputs.resolved.ollama.as_ref(),
        base: trained.as_ref().unwrap_or(&inputs.base),
        adapter: &adapter,
        tokenizer: &inputs.tokenizer,
        spec: Some(spec),
    };
    match target {
        Destination::File(target) => {
            let report = job.write(target, &default_path(folder, target, &spec.run.name), true)?;
            Ok(report.path.display().to_string())
        }
        Destination::Ollama(target) => {
            let creation = Creation {
                job: &job,
                target: &target,
                resolved: &inputs.resolved,
                folder: &folder.root().join("export"),
                trains_all,
                question: question_of(inputs)?,
                any_base: false,
            };
            creation.run()?;
            Ok(target.name.to_string())
        }
    }
}

/// What a new model is asked: a sample prompt of the recipe, or else a row that was held out.
fn question(spec: &RunSpec) -> Result<Vec<Message>> {
    match sample_prompt(spec) {
        Some(question) => Ok(question),
        None => question_of(&inputs::of_spec(spec.clone())?),
    }
}

fn question_of(inputs: &Inputs) -> Result<Vec<Message>> {
    if let Some(question) = sample_prompt(&inputs.spec) {
        return Ok(question);
    }
    let dataset = inputs.dataset()?;
    let held_out = dataset.held_out(inputs.spec.data_options.val_split, inputs.spec.train.seed);
    let mut rows = held_out.iter().chain(&dataset.origins);
    let sources = inputs.sources();
    Ok(rows.find_map(|row| tune_data::question(&sources, *row)).unwrap_or_else(|| vec![greeting()]))
}

fn sample_prompt(spec: &RunSpec) -> Option<Vec<Message>> {
    let prompt = spec.samples.prompts.first()?;
    let system = spec.samples.system.as_deref().map(|text| Message::new("system", text));
    Some(system.into_iter().chain([Message::new("user", prompt)]).collect())
}

/// For adapters of unknown training.
fn greeting() -> Message {
    Message::new("user", "What can you do for me?")
}

/// What is exported.
struct Job<'a> {
    name: &'a str,
    reference: &'a str,
    /// What the base sets in Ollama, where it is from there.
    ollama: Option<&'a OllamaSettings>,
    base: &'a BaseModel,
    adapter: &'a Adapter,
    tokenizer: &'a Tokenizer,
    spec: Option<&'a RunSpec>,
}

impl Job<'_> {
    /// Exports with a progress bar, and tells what the user should know about the result.
    fn write(&self, target: ExportTarget, out: &Path, replace_folder: bool) -> Result<ExportReport> {
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
        let settings = self.ollama.cloned().unwrap_or_default();
        let stop: Vec<String> = settings.stop().into_iter().map(str::to_owned).collect();
        let options = ExportOptions {
            name: Some(self.name),
            chat_template: None,
            ollama_base: self.reference.strip_prefix("ollama:").map(|name| OllamaBase {
                name,
                template: settings.template.as_deref(),
                system: settings.system.as_deref(),
                stop: &stop,
            }),
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

/// What `--to` and the recipe's targets name.
enum Destination {
    File(ExportTarget),
    Ollama(OllamaTarget),
}

impl Destination {
    fn parse(text: &str) -> Result<Self> {
        match text.strip_prefix("ollama:") {
            Some(name) => OllamaTarget::parse(name).map(Self::Ollama),
            None => parse_file_target(text).map(Self::File),
        }
    }

    fn refuse_adapters(&self) -> Result<()> {
        match self {
            Self::File(target) => refuse_adapters(*target),
            Self::Ollama(target) => target.upload.map_or(Ok(()), refuse_adapters),
        }
    }
}

fn parse_file_target(text: &str) -> Result<ExportTarget> {
    text.parse().map_err(|error| match error {
        ExportError::Target { given, help } => {
            UsageError::report(format!("unknown export target \"{given}\""), help)
        }
        error => error.into(),
    })
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

fn read_adapter(folder: &RunFolder, is_run: bool) -> Result<Adapter> {
    if !is_run {
        return Ok(peft::read(folder.root())?);
    }
    if !folder.is_finished() {
        return Err(UsageError::report(
            format!("{} has no adapter yet", folder.root().display()),
            format!("finish the run: tune train {}", folder.recipe().display()),
        ));
    }
    Ok(peft::read(&folder.adapter())?)
}

/// The base on the command line, of the run, or of the adapter.
fn base_reference(args: &Args, spec: Option<&RunSpec>, adapter: &Adapter) -> Result<String> {
    let named = args.base.clone().or_else(|| spec.map(|spec| spec.model.base.clone()));
    named.or_else(|| adapter.config.base_model_name_or_path.clone()).ok_or_else(|| {
        UsageError::report(
            format!("{} does not say which model it was trained on", args.run.display()),
            "name it with --base",
        )
    })
}

fn default_path(folder: &RunFolder, target: ExportTarget, name: &str) -> PathBuf {
    folder.root().join("export").join(target.file_name(name))
}

fn name_of(path: &Path) -> String {
    let name =
        path.canonicalize().ok().and_then(|path| Some(path.file_name()?.to_string_lossy().into_owned()));
    name.unwrap_or_else(|| "model".to_owned())
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
