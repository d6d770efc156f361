//! `tune plan`: how much memory a run needs, without running it and without fetching anything.

mod adjusted;
mod grid;
mod paint;
mod running;
mod subject;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use miette::IntoDiagnostic;
use tune_plan::advice::Question;
use tune_plan::memory::Pool;
use tune_plan::{Answer, DeviceChoice, DeviceKind, PlanInput, parse_device, reference};
use tune_recipe::{Budget, Dtype, Method, OnExceed, Override, Quantization};

use crate::exit::{DOES_NOT_FIT, UsageError};
use crate::{calibration, disk_room, machine, memory_picture};
use subject::Subject;

#[derive(clap::Args)]
#[command(
    override_usage = "tune plan [OPTIONS] <RECIPE>\n       tune plan [OPTIONS] --model <SIZE|NAME|FILE>\n       \
                      tune plan [OPTIONS] --device <DEVICE>",
    after_help = "Exits with 3 when the run does not fit. A bare size (7b) is planned by the usual model of that size, \
                  and decides nothing unless --device is given. Every figure is explained in docs/memory.md.\n\n\
                  Examples:\n  tune plan recipes/quickstart.toml\n  tune plan --model 7b --method qlora\n  \
                  tune plan --model llama3.1:8b --method qlora --seq 4096 --device rtx4060\n  \
                  tune plan --model qwen3:8b --method inference --quant q4 --context 8192 --users 2 --kv-cache fp8\n  \
                  tune plan recipes/code.toml --device 2GiB --fit --out smaller.toml\n  \
                  tune plan --device m3-max-36"
)]
pub struct Args {
    /// Recipe of the run
    #[arg(conflicts_with_all = ["model", "matrix"])]
    recipe: Option<PathBuf>,
    /// Change one value of the recipe; may be given several times
    #[arg(long, value_name = "SECTION.KEY=VALUE", requires = "recipe")]
    set: Vec<String>,
    /// Size (7b, 135m), published model (llama3.1:8b), or any model on this machine
    #[arg(long, value_name = "SIZE|NAME|FILE", conflicts_with = "matrix")]
    model: Option<String>,
    /// What is trained, or inference to only run the model
    #[arg(long, value_enum, default_value_t = MethodArg::Qlora, conflicts_with = "recipe")]
    method: MethodArg,
    /// Bits of a weight, for a bare size [default: 4 for qlora, else 16]
    #[arg(long, value_parser = ["4", "8", "16"], conflicts_with = "recipe")]
    bits: Option<String>,
    /// Format of the weights, for inference: q2 to q8, a GGUF type (q4_k_m), fp16, bf16, nf4 [default: as the file is
    /// stored, else q4]
    #[arg(long, value_name = "TYPE", conflicts_with = "recipe")]
    quant: Option<String>,
    /// Conversations at once, for inference
    #[arg(long, value_name = "N", default_value_t = 1, conflicts_with = "recipe",
          value_parser = clap::value_parser!(u64).range(1..))]
    users: u64,
    /// Type of the cache, for inference: fp16, fp8, q8_0, q4_0
    #[arg(long, value_name = "TYPE", default_value = "fp16", conflicts_with = "recipe")]
    kv_cache: String,
    /// Longest sequence, or the context of a conversation, in tokens
    #[arg(long, visible_alias = "context", value_name = "TOKENS", default_value_t = 2048, conflicts_with = "recipe",
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
    /// What to compare with: a card (rtx4060), a chip with its memory (m3-max-36), a size (8GB, 24GiB), or auto for
    /// this machine [default: auto, or the recipe's]
    #[arg(long, value_name = "DEVICE|SIZE|auto")]
    device: Option<String>,
    /// Write the recipe with the changes that make it fit
    #[arg(long, requires = "recipe")]
    fit: bool,
    /// Where --fit writes; the recipe itself only when it is named here [default: NAME-fit.toml beside it]
    #[arg(long, value_name = "FILE", requires = "fit")]
    out: Option<PathBuf>,
    /// Every method by model size, for this machine or --device
    #[arg(long, conflicts_with_all = ["json", "svg"])]
    matrix: bool,
    /// Draw the phases
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
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
    /// Nothing: the model only runs
    Inference,
}

pub fn run(args: &Args) -> miette::Result<ExitCode> {
    if let Some(note) = calibration::note() {
        eprintln!("note        {note}");
    }
    let device = args.device.as_deref().map(Target::parse).transpose()?;
    if let Some(recipe) = &args.recipe {
        return of_recipe(recipe, args, device);
    }
    if let Some(model) = &args.model {
        return of_model(model, args, device);
    }
    if args.matrix || device.is_some() && !args.json && args.svg.is_none() {
        let target = device.unwrap_or_else(|| Target::of_budget(Budget::Auto));
        print!("{}", grid::text(&target, args.seq, args.batch, args.rank));
        return Ok(ExitCode::SUCCESS);
    }
    Err(UsageError::report(
        "nothing to plan",
        "give a recipe, or a model: tune plan --model 7b --method qlora",
    ))
}

/// What a plan is compared with.
struct Target {
    /// What it is called, where it has a name.
    name: Option<String>,
    /// Bytes that the run may use, if that is known.
    budget_bytes: Option<u64>,
    /// Which memory they are.
    pool: Pool,
    /// The type in which it multiplies fastest.
    dtype: Dtype,
}

impl Target {
    fn parse(text: &str) -> miette::Result<Self> {
        match parse_device(text) {
            Ok(DeviceChoice::Auto) => Ok(Self::of_budget(Budget::Auto)),
            Ok(DeviceChoice::Known(device)) => {
                let is_card = matches!(device.kind, DeviceKind::Cuda | DeviceKind::Hip | DeviceKind::Vulkan);
                let is_other = is_card || device.kind == DeviceKind::Unified;
                Ok(Self {
                    name: (device.kind != DeviceKind::Size).then_some(device.name),
                    budget_bytes: Some(device.usable_bytes),
                    pool: if is_card { Pool::Device } else { Pool::Shared },
                    dtype: if is_other { Dtype::Bf16 } else { machine::fastest_dtype() },
                })
            }
            Err(unknown) => Err(UsageError::report(format!("--device: {unknown}"), unknown.help())),
        }
    }

    fn of_budget(budget: Budget) -> Self {
        let (name, budget_bytes) = match budget {
            Budget::Auto => (Some("this machine".into()), machine::usable_memory()),
            Budget::Bytes(bytes) => (None, Some(bytes)),
        };
        Self { name, budget_bytes, pool: Pool::Shared, dtype: machine::fastest_dtype() }
    }
}

/// Shows the plan of a recipe, and writes the recipe that fits.
fn of_recipe(path: &Path, args: &Args, device: Option<Target>) -> miette::Result<ExitCode> {
    let overrides: Vec<Override> = args.set.iter().map(Override::set).collect();
    let mut spec = tune_recipe::load(path, &overrides)?;
    let target = device.unwrap_or_else(|| Target::of_budget(spec.memory.budget));
    spec.prefer_dtype(target.dtype);
    for note in &spec.notes {
        eprintln!("note        {note}");
    }
    let subject = subject::find(&spec.model.base)?;
    if let Some(facts) = &subject.facts {
        spec.refine(facts)?;
    }
    let question = subject.question(&spec, &target)?;
    let disk = disk_room::terms(&question.input, &spec, subject.tensors(), None);
    let answer = Answer::to(&question, target.name.clone(), disk);
    show(&answer, args, false)?;
    if args.fit {
        return adjusted::write(path, args, &spec, &subject, &target, &answer);
    }
    Ok(exit_code(&answer, spec.memory.on_exceed != OnExceed::Warn))
}

/// Shows the plan of a model by name.
fn of_model(model: &str, args: &Args, device: Option<Target>) -> miette::Result<ExitCode> {
    let method = match args.method {
        MethodArg::Full => Method::Full,
        MethodArg::Lora => Method::Lora,
        MethodArg::Qlora => Method::Qlora,
        MethodArg::Inference => return running::plan(model, args, device),
    };
    if let Some(quant) = &args.quant {
        return Err(UsageError::report(
            format!("--quant {quant} is the format of a model that runs, and this plan is for training"),
            "add --method inference; what is trained over has --bits, or the type of its file",
        ));
    }
    let is_asked = device.is_some();
    let target = device.unwrap_or_else(|| Target::of_budget(Budget::Auto));
    let Some(parameters) = tune_plan::parse_size(model) else {
        if let Some(published) = tune_plan::find_in_catalogue(model).filter(|model| model.shape().is_none()) {
            subject::say_what_was_chosen(model, published);
            eprintln!("note        this version cannot train it yet: counted for a trainer that can");
            let budget = target.budget_bytes;
            let plan = tune_plan::generic_plan(published, method, args.rank, args.seq, args.batch, budget);
            let mut answer = Answer::of(plan, target.pool);
            answer.device.clone_from(&target.name);
            show(&answer, args, true)?;
            return Ok(exit_code(&answer, true));
        }
        let subject = subject::find(model)?;
        let quantization = if method == Method::Qlora { Quantization::Nf4 } else { Quantization::Keep };
        let weights = subject.weights(method, quantization)?;
        let question = asked(args, &subject, method, weights, &target)?;
        let answer = Answer::to(&question, target.name.clone(), Vec::new());
        show(&answer, args, true)?;
        return Ok(exit_code(&answer, true));
    };
    let usual = if method == Method::Qlora { 4 } else { 16 };
    let bits = args.bits.as_deref().map_or(usual, |bits| bits.parse().unwrap_or(usual));
    let reference = reference::reference(method, bits, parameters, true);
    let answer = match grid::usual_model(parameters) {
        Some((published, shape)) => {
            let subject = Subject::published(published, shape);
            let weights = tune_plan::in_bits(&subject.shape, bits);
            let mut question = asked(args, &subject, method, weights, &target)?;
            question.input.model = format!("{model}, by the dimensions of {}", subject.name);
            Answer::to(&question, target.name.clone(), Vec::new()).beside(reference)
        }
        None => {
            let plan = tune_plan::rough(model.to_owned(), reference, target.budget_bytes);
            let mut answer = Answer::of(plan, Pool::Shared);
            answer.device.clone_from(&target.name);
            answer
        }
    };
    show(&answer, args, true)?;
    Ok(exit_code(&answer, is_asked))
}

/// The question that the options ask.
fn asked(
    args: &Args,
    subject: &Subject,
    method: Method,
    weights: tune_plan::WeightBytes,
    target: &Target,
) -> miette::Result<Question> {
    let input = PlanInput {
        rank: args.rank,
        sequence_len: args.seq,
        micro_batch_size: args.batch,
        dtype: target.dtype,
        calibration: calibration::current(),
        budget_bytes: target.budget_bytes,
        ..PlanInput::of(subject.name.clone(), subject.shape, weights, method)
    };
    Ok(Question {
        four_bit: subject.four_bit()?,
        context: subject.context,
        model_may_change: true,
        ..Question::about(input, target.pool)
    })
}

fn show(answer: &Answer, args: &Args, options: bool) -> miette::Result<()> {
    if let Some(path) = &args.svg {
        let svg = memory_picture::svg(answer).ok_or_else(|| {
            UsageError::report("nothing to draw", "a picture needs a model whose dimensions are known")
        })?;
        std::fs::write(path, svg)
            .into_diagnostic()
            .map_err(|error| error.wrap_err(format!("cannot write {}", path.display())))?;
        eprintln!("wrote       {}", path.display());
    }
    if args.json {
        println!("{}", serde_json::to_string_pretty(answer).into_diagnostic()?);
    } else {
        print!("{}", paint::text(answer, options));
    }
    Ok(())
}

fn exit_code(answer: &Answer, decides: bool) -> ExitCode {
    match answer.plan.fits {
        Some(false) if decides => ExitCode::from(DOES_NOT_FIT),
        _ => ExitCode::SUCCESS,
    }
}
