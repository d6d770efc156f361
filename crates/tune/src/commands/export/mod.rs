//! `tune export`: a trained run as GGUF, safetensors, PEFT or a model in Ollama.

mod job;
mod ollama;

use std::cell::OnceCell;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use indicatif::HumanBytes;
use miette::{IntoDiagnostic, Result};
use tune_data::{Message, Tokenizer};
use tune_export::{ExportError, ExportTarget, FileType};
use tune_formats::peft::{self, Adapter, AdapterConfig};
use tune_formats::provenance::Provenance;
use tune_formats::safetensors::SafetensorsFiles;
use tune_formats::{BaseModel, ModelConfig};
use tune_hub::ModelRef;
use tune_quant::BlockType;
use tune_recipe::{Export, Merge, Method, RunSpec, Verify};
use tune_train::{Outcome, RunFolder};

use crate::download;
use crate::exit::{INTERRUPTED, UsageError};
use crate::inputs::{self, Inputs};
use crate::model::trained_base;
use job::Job;
use ollama::{Creation, OllamaTarget};

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
    /// What to write [default: gguf-lora over a base of few bits, gguf:q8_0 over others]
    #[arg(long, value_name = "FORMAT")]
    to: Option<String>,
    /// File or folder to write, or a folder to write it into [default: RUN/export]
    #[arg(long, value_name = "PATH")]
    out: Option<PathBuf>,
    /// Another copy of the base, such as one that is not quantised
    #[arg(long, value_name = "REF")]
    base: Option<String>,
    /// Take another base than the adapter was trained on
    #[arg(long)]
    any_base: bool,
    /// Largest file of a safetensors folder, such as 2GB [default: 5GB]
    #[arg(long, value_name = "SIZE", value_parser = size)]
    max_shard_size: Option<u64>,
    /// How merged weights become codes of few bits [default: the recipe's, auto]
    #[arg(long, value_enum, value_name = "ROUTE")]
    merge: Option<Route>,
    /// Refuse a merged file that keeps less of the fine-tune [default: the recipe's, 0.9]
    #[arg(long, value_name = "SHARE", allow_negative_numbers = true)]
    min_retention: Option<f64>,
    /// What happens when the file does not answer as the trained model [default: the recipe's, strict]
    #[arg(long, value_enum, value_name = "STRICTNESS")]
    verify: Option<Strictness>,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Strictness {
    /// It is not put in place
    Strict,
    /// The differences are told
    Warn,
    /// It is not looked at
    Off,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Route {
    /// As measured best for the type
    Auto,
    /// The nearest codes under the scales of the base
    Rtn,
    /// Scales and codes anew, as llama-quantize
    Refit,
    /// Codes with error feedback over training activations
    Gptq,
}

fn size(text: &str) -> std::result::Result<u64, String> {
    tune_recipe::parse_bytes(text).ok_or_else(|| "expected a size such as 500MB or 2GB".to_owned())
}

pub fn run(args: &Args) -> Result<ExitCode> {
    let asked = args.to.as_deref().map(Destination::parse).transpose()?;
    // Files get their names when they are whole, and a server keeps nothing of half an upload.
    ctrlc::set_handler(|| std::process::exit(i32::from(INTERRUPTED))).into_diagnostic()?;
    let folder = RunFolder::new(&args.run);
    let spec = if folder.recipe().is_file() { Some(tune_recipe::load(&folder.recipe(), &[])?) } else { None };
    let trains_all = spec.as_ref().is_some_and(|spec| spec.adapter.method == Method::Full);
    if let (true, Some(target)) = (trains_all, &asked) {
        target.refuse_adapters()?;
    }
    let adapter = if trains_all { trained_in_full(&folder)? } else { read_adapter(&folder, spec.is_some())? };
    let reference = base_reference(args, spec.as_ref(), &adapter)?;
    let resolved = download::resolve(&ModelRef::parse(&reference)?, false)?;
    let base =
        if trains_all { trained_base(&folder, &resolved.path)? } else { tune_formats::open(&resolved.path)? };
    let untrained = if trains_all { Some(tune_formats::open(&resolved.path)?) } else { None };
    // Another base named on purpose, such as one of more bits, is noted and not refused.
    if args.base.is_none() && !args.any_base {
        adapter.require_trained_base(untrained.as_ref().unwrap_or(&base))?;
    }
    let target = asked.unwrap_or_else(|| Destination::File(default_target(&base, trains_all)));
    let trained_over = match &spec {
        Some(spec) if !trains_all && spec.model.base != reference => {
            Some(tune_formats::open(&download::resolve(&ModelRef::parse(&spec.model.base)?, false)?.path)?)
        }
        _ => None,
    };
    let tokenizer = Tokenizer::from_base(&base)?;

    let name = spec.as_ref().map_or_else(|| name_of(&args.run), |spec| spec.run.name.clone());
    let job = Job {
        name: &name,
        reference: &reference,
        ollama: resolved.ollama.as_ref(),
        base: &base,
        adapter: &adapter,
        tokenizer: &tokenizer,
        licence: resolved.licence.as_deref(),
        run: spec.as_ref().map(|spec| (spec, &folder)),
        max_shard_bytes: args.max_shard_size,
        untrained: untrained.as_ref(),
        trained_over: trained_over.as_ref(),
        settings: settings(args, spec.as_ref()),
        opened: OnceCell::new(),
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

/// What the recipe says, or the defaults, with what the command line says.
fn settings(args: &Args, spec: Option<&RunSpec>) -> Export {
    let mut settings = spec.map_or_else(Export::default, |spec| spec.export.clone());
    if let Some(route) = args.merge {
        settings.merge = match route {
            Route::Auto => Merge::Auto,
            Route::Rtn => Merge::Rtn,
            Route::Refit => Merge::Refit,
            Route::Gptq => Merge::Gptq,
        };
    }
    if let Some(strictness) = args.verify {
        settings.verify = match strictness {
            Strictness::Strict => Verify::Strict,
            Strictness::Warn => Verify::Warn,
            Strictness::Off => Verify::Off,
        };
    }
    settings.min_retention = args.min_retention.unwrap_or(settings.min_retention);
    settings
}

/// Merging into few bits costs some of the fine-tune whatever the route, so over such a base the adapter stays apart.
fn default_target(base: &BaseModel, trains_all: bool) -> ExportTarget {
    let stored = base.weights.matrix(&format!("{}.weight", ModelConfig::linear_path(0, "q_proj")));
    let few_bits = stored.is_ok_and(|matrix| {
        BlockType::from_name(matrix.type_name()).is_some_and(|block_type| block_type.bits_per_weight() < 8.0)
    });
    if few_bits && !trains_all { ExportTarget::GgufLora } else { ExportTarget::Gguf(FileType::Q8_0) }
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

/// The weights of a run that trains all of them need no update, but have a provenance.
pub fn trained_in_full(folder: &RunFolder) -> Result<Adapter> {
    let metadata = if folder.is_finished() {
        SafetensorsFiles::open_directory(&folder.model())?.metadata().clone()
    } else {
        BTreeMap::new()
    };
    Ok(no_update(Provenance::read(|key| metadata.get(key).cloned())))
}

fn no_update(provenance: Provenance) -> Adapter {
    Adapter { config: AdapterConfig { provenance, ..AdapterConfig::default() }, layers: BTreeMap::new() }
}

/// Writes the weights of a run that trains all of them into its folder, exactly, as a Hugging Face model.
pub fn write_trained_model(folder: &RunFolder, inputs: &Inputs, outcome: &Outcome) -> Result<()> {
    let Some(weights) = outcome.model.trained_weights() else { return Ok(()) };
    let base = BaseModel { weights: Box::new(weights), ..tune_formats::open(&inputs.resolved.path)? };
    let job = Job {
        name: &inputs.spec.run.name,
        reference: &inputs.spec.model.base,
        ollama: None,
        base: &base,
        adapter: &no_update(outcome.provenance.clone()),
        tokenizer: &inputs.tokenizer,
        licence: inputs.resolved.licence.as_deref(),
        run: Some((&inputs.spec, folder)),
        max_shard_bytes: None,
        untrained: None,
        trained_over: None,
        // these weights are the trained model
        settings: Export { verify: Verify::Off, ..inputs.spec.export.clone() },
        opened: OnceCell::new(),
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
    let adapter = if trains_all { trained_in_full(folder)? } else { read_adapter(folder, true)? };
    let trained = if trains_all { Some(trained_base(folder, &inputs.resolved.path)?) } else { None };
    let job = Job {
        name: &spec.run.name,
        reference: &spec.model.base,
        ollama: inputs.resolved.ollama.as_ref(),
        base: trained.as_ref().unwrap_or(&inputs.base),
        adapter: &adapter,
        tokenizer: &inputs.tokenizer,
        licence: inputs.resolved.licence.as_deref(),
        run: Some((spec, folder)),
        max_shard_bytes: None,
        untrained: trained.as_ref().map(|_| &inputs.base),
        trained_over: None,
        settings: spec.export.clone(),
        opened: OnceCell::new(),
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
