//! `tune plan`: how much memory a run needs, without running it and without fetching anything.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use miette::IntoDiagnostic;
use tune_formats::gguf;
use tune_hub::ModelRef;
use tune_plan::{CatalogueModel, MemoryPlan, PlanInput, Shape, WeightBytes, reference};
use tune_recipe::{
    Budget, Dtype, Layers, Method, OnExceed, Optimizer, Override, Quantization, TargetModules,
};

use crate::exit::{DOES_NOT_FIT, UsageError};
use crate::{calibration, download, inputs, machine};

#[derive(clap::Args)]
#[command(
    override_usage = "tune plan [OPTIONS] <RECIPE>\n       tune plan [OPTIONS] --model <SIZE|NAME|FILE>",
    after_help = "Exits with 3 when the run does not fit. A bare size (7b) only gives the rule of thumb, which decides \
                  nothing unless --device is given.\n\n\
                  Examples:\n  tune plan recipes/quickstart.toml\n  tune plan --model 7b --method qlora\n  \
                  tune plan --model llama3.1:8b --method qlora --seq 4096 --device 24GiB\n  \
                  tune plan --model ./model.gguf --method lora --json"
)]
pub struct Args {
    /// Recipe of the run
    #[arg(required_unless_present = "model", conflicts_with = "model")]
    recipe: Option<PathBuf>,
    /// Change one value of the recipe; may be given several times
    #[arg(long, value_name = "SECTION.KEY=VALUE", requires = "recipe")]
    set: Vec<String>,
    /// Size (7b, 135m), published model (llama3.1:8b), or any model on this machine
    #[arg(long, value_name = "SIZE|NAME|FILE")]
    model: Option<String>,
    /// What is trained
    #[arg(long, value_enum, default_value_t = MethodArg::Qlora, conflicts_with = "recipe")]
    method: MethodArg,
    /// Bits of a weight, for a bare size [default: 4 for qlora, else 16]
    #[arg(long, value_parser = ["4", "8", "16"], conflicts_with = "recipe")]
    bits: Option<String>,
    /// Longest sequence, in tokens
    #[arg(long, alias = "context", value_name = "TOKENS", default_value_t = 2048, conflicts_with = "recipe",
          value_parser = clap::value_parser!(u64).range(1..))]
    seq: u64,
    /// Sequences that go through the model at once
    #[arg(long, value_name = "N", default_value_t = 1, conflicts_with = "recipe",
          value_parser = clap::value_parser!(u64).range(1..))]
    batch: u64,
    /// Rank of the adapters
    #[arg(long, value_name = "R", default_value_t = 16, conflicts_with = "recipe",
          value_parser = clap::value_parser!(u64).range(1..=4096))]
    rank: u64,
    /// Memory to compare with: a size (8GB, 24GiB), or auto for this machine's [default: auto, or the recipe's]
    #[arg(long, value_name = "SIZE|auto")]
    device: Option<String>,
    /// One JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum MethodArg {
    /// All weights
    Full,
    /// Adapters over 16-bit weights
    Lora,
    /// Adapters over quantised weights
    Qlora,
}

pub fn run(args: &Args) -> miette::Result<ExitCode> {
    let device = args.device.as_deref().map(budget).transpose()?;
    let (plan, decides) = match (&args.recipe, &args.model) {
        (Some(recipe), _) => of_recipe(recipe, args, device)?,
        (None, Some(model)) => of_model(model, args, device)?,
        (None, None) => {
            return Err(UsageError::report(
                "nothing to plan",
                "give a recipe, or a model: tune plan --model 7b --method qlora",
            ));
        }
    };
    if let Some(note) = calibration::note() {
        eprintln!("note        {note}");
    }
    if args.json {
        println!("{}", serde_json::to_string_pretty(&plan).into_diagnostic()?);
    } else {
        print!("{plan}");
    }
    Ok(match plan.fits {
        Some(false) if decides => ExitCode::from(DOES_NOT_FIT),
        _ => ExitCode::SUCCESS,
    })
}

/// The plan of a recipe and whether its verdict decides.
fn of_recipe(path: &Path, args: &Args, device: Option<Budget>) -> miette::Result<(MemoryPlan, bool)> {
    let overrides: Vec<Override> = args.set.iter().map(Override::set).collect();
    let mut spec = tune_recipe::load(path, &overrides)?;
    spec.prefer_dtype(machine::fastest_dtype());
    for note in &spec.notes {
        eprintln!("note        {note}");
    }
    let known = find(&spec.model.base)?;
    if let Some(facts) = &known.facts {
        spec.refine(facts)?;
    }
    let weights = known.weights(spec.adapter.method, spec.model.quantization)?;
    let budget = usable(device.unwrap_or(spec.memory.budget));
    let on_exceed = spec.memory.on_exceed;
    loop {
        let input = PlanInput {
            calibration: calibration::current(),
            ..PlanInput::from_spec(&spec, known.name.clone(), known.shape, weights, budget)
        };
        let plan = tune_plan::estimate(&input.keep_what_fits(&spec));
        let may_shrink = on_exceed == OnExceed::Fit && plan.fits == Some(false);
        if !(may_shrink && spec.shrink_micro_batch()) {
            return Ok((plan, on_exceed != OnExceed::Warn));
        }
        eprintln!("note        micro_batch_size is now {}", spec.train.micro_batch_size);
    }
}

/// The plan of a model by name and whether its verdict decides.
fn of_model(model: &str, args: &Args, device: Option<Budget>) -> miette::Result<(MemoryPlan, bool)> {
    let method = match args.method {
        MethodArg::Full => Method::Full,
        MethodArg::Lora => Method::Lora,
        MethodArg::Qlora => Method::Qlora,
    };
    let budget_bytes = usable(device.unwrap_or(Budget::Auto));
    if let Some(parameters) = tune_plan::parse_size(model) {
        let usual = if method == Method::Qlora { 4 } else { 16 };
        let bits = args.bits.as_deref().map_or(usual, |bits| bits.parse().unwrap_or(usual));
        let reference = reference::reference(method, bits, parameters, true);
        return Ok((tune_plan::rough(model.to_owned(), reference, budget_bytes), device.is_some()));
    }
    if let Some(published) = tune_plan::find_in_catalogue(model).filter(|model| model.shape().is_none()) {
        say_what_was_chosen(model, published);
        eprintln!("note        this version cannot train it yet: counted for a trainer that can");
        let plan = tune_plan::generic_plan(published, method, args.rank, args.seq, args.batch, budget_bytes);
        return Ok((plan, true));
    }
    let known = find(model)?;
    let quantization = if method == Method::Qlora { Quantization::Nf4 } else { Quantization::Keep };
    let plan = tune_plan::estimate(&PlanInput {
        model: known.name.clone(),
        shape: known.shape,
        weights: known.weights(method, quantization)?,
        method,
        rank: args.rank,
        target_modules: TargetModules::AllLinear,
        layers: Layers::All,
        sequence_len: args.seq,
        micro_batch_size: args.batch,
        gradient_accumulation_steps: 2,
        optimizer: Optimizer::Adamw,
        gradient_dtype: Dtype::F32,
        block_input_dtype: Dtype::F32,
        dtype: machine::fastest_dtype(),
        dropout: false,
        kept_blocks: 0,
        data: None,
        calibration: calibration::current(),
        budget_bytes,
    });
    Ok((plan, true))
}

/// A model as far as it is known without fetching it.
struct Known {
    name: String,
    shape: Shape,
    base: Option<tune_formats::BaseModel>,
    facts: Option<tune_recipe::BaseFacts>,
}

impl Known {
    fn weights(&self, method: Method, quantization: Quantization) -> miette::Result<WeightBytes> {
        Ok(match &self.base {
            Some(base) => tune_plan::from_model(base, quantization)?,
            None => tune_plan::from_shape(&self.shape, method),
        })
    }
}

/// Looks for a model on this machine, then among the published ones.
fn find(name: &str) -> miette::Result<Known> {
    let published = tune_plan::find_in_catalogue(name);
    let reference = match (ModelRef::parse(name), published) {
        (Ok(reference), _) => Some(reference),
        (Err(_), Some(_)) => None,
        (Err(error), None) => return Err(error.into()),
    };
    match reference.as_ref().map(download::resolve_local) {
        Some(Ok(resolved)) => {
            let base = tune_formats::open(&resolved.path)?;
            let shape = Shape::from(&base.config);
            let facts = Some(inputs::facts(&base));
            return Ok(Known { name: base.name.clone(), shape, base: Some(base), facts });
        }
        // A path, or a store without network: the error says what is wrong, and fetching would not help.
        Some(Err(error)) if !is_remote(reference.as_ref()) && published.is_none() => return Err(error.into()),
        Some(Err(_)) | None => {}
    }
    if let Some((model, shape)) = published.and_then(|model| Some((model, model.shape()?))) {
        say_what_was_chosen(name, model);
        let trainable = gguf::names::architecture(&model.architecture).is_some();
        eprintln!(
            "note        {} is not on this machine: planned by its published dimensions{}",
            model.name,
            if trainable { "" } else { ", and this version cannot train its architecture yet" }
        );
        return Ok(Known { name: model.name.clone(), shape, base: None, facts: None });
    }
    Err(UsageError::report(
        format!("{name} is not on this machine"),
        format!("fetch it first: tune pull {name}; or give a size, such as --model 7b"),
    ))
}

/// A name that no model has, and which one is planned instead.
fn say_what_was_chosen(name: &str, model: &CatalogueModel) {
    if model.stands_for(name) {
        eprintln!(
            "note        no model is called {name}: planned as {}, the nearest that exists",
            model.name
        );
    }
}

fn is_remote(reference: Option<&ModelRef>) -> bool {
    matches!(reference, Some(ModelRef::Hub(_) | ModelRef::Catalogue(_)))
}

fn budget(text: &str) -> miette::Result<Budget> {
    if text == "auto" {
        return Ok(Budget::Auto);
    }
    tune_recipe::parse_bytes(text).map(Budget::Bytes).ok_or_else(|| {
        UsageError::report(
            format!("--device: {text:?} is not a size"),
            "write for example 8GB, 24GiB, or auto for this machine",
        )
    })
}

fn usable(budget: Budget) -> Option<u64> {
    match budget {
        Budget::Auto => machine::usable_memory(),
        Budget::Bytes(bytes) => Some(bytes),
    }
}
