//! `tune models`: the published models that can be planned by name, what each method needs of them, and what fits.

use std::fmt::Write as _;
use std::process::ExitCode;

use miette::IntoDiagnostic;
use serde::Serialize;
use tune_hub::ModelRef;
use tune_plan::{
    CatalogueModel, Certainty, Device, DeviceChoice, DeviceKind, NEEDS_RANK, NEEDS_TOKENS, Needs, catalogue,
    format_bytes, format_parameters, is_trainable, needs, parse_device, similar_models,
};
use tune_recipe::Dtype;

use crate::exit::UsageError;
use crate::{download, machine};

#[derive(clap::Args)]
#[command(
    after_help = "Needs are upper ends of estimates in GB, for one row of 2048 tokens and adapters of rank 16. Those \
                        of models that this version does not train are for another trainer. docs/models.md says where \
                        the figures come from.\n\n\
                        Examples:\n  tune models\n  tune models gemma\n  tune models qwen3 --device rtx4060\n  \
                        tune models --json"
)]
pub struct Args {
    /// Only models whose name, architecture or licence contains this
    filter: Option<String>,
    /// What to compare with: a card (rtx4060), a chip with its memory (m3-max-36), a size (8GiB), or auto for this
    /// machine
    #[arg(long, value_name = "DEVICE|SIZE|auto", default_value = "auto")]
    device: String,
    /// One JSON object
    #[arg(long)]
    json: bool,
}

pub fn run(args: &Args) -> miette::Result<ExitCode> {
    let device = match parse_device(&args.device) {
        Ok(DeviceChoice::Auto) => machine::device(),
        Ok(DeviceChoice::Known(device)) => Some(device),
        Err(unknown) => return Err(UsageError::report(format!("--device: {unknown}"), unknown.help())),
    };
    let dtype = match device.as_ref().map(|device| device.kind) {
        None | Some(DeviceKind::Cpu | DeviceKind::Size) => machine::fastest_dtype(),
        Some(_) => Dtype::Bf16,
    };
    let rows: Vec<Row> = catalogue()
        .iter()
        .filter(|model| args.filter.as_deref().is_none_or(|filter| matches(model, filter)))
        .map(|model| Row::new(model, dtype, device.as_ref()))
        .collect();
    if let (true, Some(filter)) = (rows.is_empty(), &args.filter) {
        let similar = similar_models(filter);
        let help = if similar.is_empty() {
            "see all of them: tune models".to_owned()
        } else {
            format!("did you mean {}?", similar.join(", "))
        };
        return Err(UsageError::report(format!("no published model matches {filter:?}"), help));
    }
    if args.json {
        let list = List { device: device.as_ref(), tokens: NEEDS_TOKENS, rank: NEEDS_RANK, models: &rows };
        println!("{}", serde_json::to_string_pretty(&list).into_diagnostic()?);
    } else {
        print!("{}", text(&rows, device.as_ref(), width()));
    }
    Ok(ExitCode::SUCCESS)
}

/// The JSON form, a stable interface.
#[derive(Serialize)]
struct List<'a> {
    device: Option<&'a Device>,
    /// Of the conversation, and of the row that is trained on.
    tokens: u64,
    rank: u64,
    models: &'a [Row],
}

#[derive(Serialize)]
struct Row {
    alias: &'static str,
    name: &'static str,
    also: &'static [String],
    parameters: u64,
    context: u64,
    licence: &'static str,
    architecture: &'static str,
    repositories: &'static [String],
    certainty: Certainty,
    /// Whether this version trains it.
    trainable: bool,
    /// How to name the copy that is on this machine already.
    here: Option<String>,
    /// Upper ends of what each method needs, in bytes.
    needs: Needs,
    /// Whether each fits; nothing where the memory is not known.
    fits: Option<Fits>,
}

#[derive(Serialize)]
#[allow(clippy::struct_excessive_bools, reason = "one a method")]
struct Fits {
    inference: bool,
    qlora: bool,
    lora: bool,
    full: bool,
}

impl Row {
    fn new(model: &'static CatalogueModel, dtype: Dtype, device: Option<&Device>) -> Self {
        let needs = needs(model, dtype);
        let fits = device.map(|device| {
            let fits = |bytes| bytes <= device.usable_bytes;
            Fits {
                inference: fits(needs.inference),
                qlora: fits(needs.qlora),
                lora: fits(needs.lora),
                full: fits(needs.full),
            }
        });
        Self {
            alias: &model.alias,
            name: &model.name,
            also: &model.also,
            parameters: model.layout.parameters(),
            context: model.context,
            licence: &model.licence,
            architecture: &model.architecture,
            repositories: &model.repositories,
            certainty: model.certainty,
            trainable: is_trainable(model),
            here: here(model),
            needs,
            fits,
        }
    }

    /// The four needs in GB, each with a mark where it fits.
    fn needs_text(&self) -> [String; 4] {
        let text = |bytes: u64, fits: Option<bool>| {
            let gb = bytes as f64 / 1e9;
            let figure = if gb < 99.95 { format!("{gb:.1}") } else { format!("{gb:.0}") };
            format!("{figure}{}", if fits == Some(true) { " ✓" } else { "  " })
        };
        let (n, f) = (&self.needs, self.fits.as_ref());
        [
            text(n.inference, f.map(|f| f.inference)),
            text(n.qlora, f.map(|f| f.qlora)),
            text(n.lora, f.map(|f| f.lora)),
            text(n.full, f.map(|f| f.full)),
        ]
    }
}

/// Whether one of its names, its architecture or its licence contains `filter`.
fn matches(model: &CatalogueModel, filter: &str) -> bool {
    let plain =
        |text: &str| -> String { text.to_lowercase().chars().filter(|c| !" -_:".contains(*c)).collect() };
    let filter = plain(filter);
    let names = [&model.alias, &model.name, &model.architecture, &model.licence];
    let more = model.also.iter().chain(&model.stands_for).chain(&model.repositories);
    names.into_iter().chain(more).any(|text| plain(text).contains(&filter))
}

/// The reference of a copy on this machine, in the cache of fetched models or in Ollama's store. Looks for files and
/// opens none.
fn here(model: &CatalogueModel) -> Option<String> {
    let names = std::iter::once(&model.alias).chain(&model.also);
    let references = names.flat_map(|name| [name.clone(), format!("ollama:{name}")]);
    let of_hub = model.repositories.iter().map(|repository| format!("hf:{repository}"));
    references
        .chain(of_hub)
        .filter(|name| name.contains(':'))
        .find(|name| ModelRef::parse(name).is_ok_and(|reference| download::resolve_local(&reference).is_ok()))
}

/// Columns of the terminal; of a pipe as many as all columns need.
fn width() -> usize {
    let written = std::env::var("COLUMNS").ok().and_then(|columns| columns.parse().ok());
    let asked =
        || terminal_size::terminal_size().map(|(terminal_size::Width(columns), _)| usize::from(columns));
    written.or_else(asked).unwrap_or(usize::MAX)
}

/// Columns of the whole table.
const WIDE: usize = 124;
/// Columns of the table without licence and place.
const NARROW: usize = 82;

fn text(rows: &[Row], device: Option<&Device>, width: usize) -> String {
    let mut text = String::new();
    let count = if rows.len() == 1 { "1 model".to_owned() } else { format!("{} models", rows.len()) };
    match device {
        Some(device) => {
            let usable = format_bytes(device.usable_bytes);
            writeln!(text, "{count}; ✓ fits {device}, of which a run may use {usable}").ok();
        }
        None => {
            writeln!(text, "{count}; this system does not tell its memory: give --device").ok();
        }
    }
    if width < NARROW {
        for row in rows {
            write_card(&mut text, row, width);
        }
    } else {
        write_table(&mut text, rows, width >= WIDE);
    }
    writeln!(
        text,
        "\nGB at most; rows of {NEEDS_TOKENS} tokens one at a time, adapters of rank {NEEDS_RANK}.\n\
         ~ counted for another trainer: this version does not train it."
    )
    .ok();
    text
}

fn write_table(text: &mut String, rows: &[Row], wide: bool) {
    let longest = rows.iter().map(|row| row.alias.len()).max().unwrap_or(0).max(5);
    let header = ["run q4", "qlora", "lora", "full"];
    write!(text, "\n{:<longest$}  {:>7}  {:>5} ", "model", "params", "ctx").ok();
    for name in header {
        write!(text, " {name:>7}  ").ok();
    }
    writeln!(text, "{}", if wide { " here  licence" } else { "" }).ok();
    for row in rows {
        let (parameters, context) = (format_parameters(row.parameters), tokens(row.context));
        write!(text, "{:<longest$}  {parameters:>7}  {context:>5} ", row.alias).ok();
        for (column, need) in row.needs_text().into_iter().enumerate() {
            // Running a model is no training.
            let other = if column > 0 && !row.trainable { "~" } else { "" };
            write!(text, " {:>9}", format!("{other}{need}")).ok();
        }
        if wide {
            write!(text, "  {:<4}  {}", if row.here.is_some() { "yes" } else { "" }, row.licence).ok();
        }
        let trimmed = text.trim_end().len();
        text.truncate(trimmed);
        text.push('\n');
    }
}

/// A model on two or three lines.
fn write_card(text: &mut String, row: &Row, width: usize) {
    let here = if row.here.is_some() { ", here" } else { "" };
    let trains = if row.trainable { "" } else { ", not trained by this version" };
    let head = format!(
        "{}  {}, {} tokens{here}{trains}",
        row.alias,
        format_parameters(row.parameters),
        tokens(row.context)
    );
    let needs: Vec<String> = ["run q4", "qlora", "lora", "full"]
        .into_iter()
        .zip(row.needs_text())
        .map(|(name, need)| format!("{name} {}", need.trim_end()))
        .collect();
    writeln!(text, "\n{head}").ok();
    let mut line = String::new();
    for need in needs {
        if !line.is_empty() && line.chars().count() + 4 + need.chars().count() > width {
            writeln!(text, "  {line}").ok();
            line.clear();
        }
        if !line.is_empty() {
            line.push_str(", ");
        }
        line.push_str(&need);
    }
    writeln!(text, "  {line}").ok();
}

/// "4k", "128k": context lengths are powers of two or near one.
fn tokens(count: u64) -> String {
    if count.is_multiple_of(1024) { format!("{}k", count / 1024) } else { count.to_string() }
}
