//! `tune data`: what a recipe's rows become. Counts, lengths, and which text is trained.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use indicatif::HumanCount;
use miette::IntoDiagnostic;
use owo_colors::{OwoColorize, Stream};
use serde_json::json;
use tune_data::{BatchOptions, Batcher, Dataset, PreviewSpan, Report, SourceReport, preview};
use tune_recipe::Override;

use crate::inputs::{self, Inputs};

/// Widest bar of the histogram, in characters.
const BAR: usize = 40;

/// Longest text of a previewed sample, in characters.
const PREVIEW: usize = 4000;

#[derive(clap::Args)]
#[command(
    after_help = "Trained text is green, or stands in ⟦ ⟧ where there is no colour; the rest is only read.\n\n\
                        Examples:\n  tune data recipes/quickstart.toml\n  \
                        tune data recipes/code.toml --samples 5 --set data_options.sequence_len=512\n\n\
                        Tokens are kept for the next start, here and in train: TUNE_CACHE moves them, TUNE_NO_CACHE=1 \
                        keeps none."
)]
pub struct Args {
    /// The recipe
    recipe: PathBuf,
    /// Change one value of the recipe; may be given several times
    #[arg(long, value_name = "SECTION.KEY=VALUE")]
    set: Vec<String>,
    /// Samples to show, taken evenly from all
    #[arg(long, short = 'n', value_name = "N", default_value_t = 2)]
    samples: usize,
    /// One JSON object
    #[arg(long)]
    json: bool,
}

pub fn run(args: &Args) -> miette::Result<ExitCode> {
    let overrides: Vec<Override> = args.set.iter().map(Override::set).collect();
    let inputs = inputs::open(&args.recipe, &overrides)?;
    let dataset = inputs.dataset()?;
    let shown = shown(dataset.samples.len(), args.samples);
    if args.json {
        let text = serde_json::to_string_pretty(&as_json(&inputs, &dataset, &shown)).into_diagnostic()?;
        println!("{text}");
        return Ok(ExitCode::SUCCESS);
    }
    print!("{}", counts(&dataset.report));
    print!("{}", histogram(&dataset.report));
    print!("{}", batches(&inputs, &dataset)?);
    for index in shown {
        print!("{}", sample(&inputs, &dataset, index));
    }
    Ok(ExitCode::SUCCESS)
}

/// Positions of `count` samples, evenly from all.
fn shown(len: usize, count: usize) -> Vec<usize> {
    let count = count.min(len);
    (0..count).map(|i| i * len / count).collect()
}

fn counts(report: &Report) -> String {
    let mut out = String::new();
    for source in &report.sources {
        let format = source.format.map_or_else(|| "no rows".to_owned(), |format| format.to_string());
        let _ = writeln!(out, "{} ({format})", bold(&source.path.display().to_string()));
        let _ = writeln!(
            out,
            "  {} → {}, {}, {} of them trained ({})",
            number(source.rows, "row"),
            number(source.samples, "sample"),
            number(source.tokens, "token"),
            HumanCount(source.trained_tokens as u64),
            share(source.trained_tokens, source.tokens),
        );
        for line in fates(source, report.sequence_len) {
            let _ = writeln!(out, "  {}", yellow(&line));
        }
    }
    if report.sources.len() > 1 {
        let _ = writeln!(
            out,
            "all: {} → {}, {}, {} of them trained ({})",
            number(report.rows(), "row"),
            number(report.samples(), "sample"),
            number(report.tokens(), "token"),
            HumanCount(report.trained_tokens() as u64),
            share(report.trained_tokens(), report.tokens()),
        );
    }
    out
}

/// What became of the rows that are not simply used.
fn fates(source: &SourceReport, limit: usize) -> Vec<String> {
    [
        (source.overlong, format!("left out: longer than sequence_len = {limit}")),
        (source.without_target, "left out: no token to train on".to_owned()),
        (source.text_lost, "left out: the chat template drops what the assistant said".to_owned()),
        (source.truncated, format!("cut at sequence_len = {limit}")),
        (source.endless, "never say when to stop: the answer ends without an end-of-turn token".to_owned()),
        (source.split, format!("split into samples of at most sequence_len = {limit}")),
    ]
    .into_iter()
    .filter(|(count, _)| *count > 0)
    .map(|(count, fate)| format!("{} {fate}", number(count, "row")))
    .collect()
}

fn histogram(report: &Report) -> String {
    let lengths = report.lengths();
    let buckets = report.histogram();
    let Some(longest) = lengths.last() else { return String::new() };
    let at = |share: f64| lengths[((lengths.len() - 1) as f64 * share).round() as usize];
    let mut out = format!(
        "\n{}, before any cutting: median {}, 95 % up to {}, longest {longest}\n",
        bold("length in tokens"),
        at(0.5),
        at(0.95),
    );
    let most = buckets.iter().map(|bucket| bucket.count).max().unwrap_or(0).max(1);
    let digits = longest.to_string().len().max(report.sequence_len.to_string().len());
    for bucket in &buckets {
        // a row that exists has a bar that can be seen
        let width = (bucket.count * BAR).div_ceil(most);
        let range = format!("{:>digits$}–{:<digits$}", bucket.from, bucket.to);
        let beyond = if bucket.from > report.sequence_len { "  beyond sequence_len" } else { "" };
        let _ = writeln!(out, "  {range}  {:<BAR$} {}{}", "█".repeat(width), bucket.count, yellow(beyond));
    }
    out
}

fn batches(inputs: &Inputs, dataset: &Dataset) -> miette::Result<String> {
    let (options, seed) = (&inputs.spec.data_options, inputs.spec.train.seed);
    let (train, held_out) = dataset.split(options.val_split, seed);
    let (samples, tokens) = (train.len(), train.iter().map(tune_data::Sample::len).sum::<usize>());
    let batcher = Batcher::new(
        train,
        BatchOptions {
            sequence_len: options.sequence_len,
            micro_batch_size: 1,
            packing: options.packing,
            shuffle: inputs.spec.train.shuffle,
            seed,
        },
    )?;
    let sequences = batcher.epoch(0).len();
    let mut out = format!("\n{}: {} a pass", bold("training"), number(samples, "sample"));
    if options.packing {
        let room = sequences * options.sequence_len;
        let _ = write!(
            out,
            ", packed into {} of at most {} tokens ({} full)",
            number(sequences, "sequence"),
            options.sequence_len,
            share(tokens, room)
        );
    }
    let _ = writeln!(out, "; {} held out for validation", number(held_out.len(), "sample"));
    Ok(out)
}

fn sample(inputs: &Inputs, dataset: &Dataset, index: usize) -> String {
    let (sample, origin) = (&dataset.samples[index], dataset.origins[index]);
    let path = &dataset.report.sources[origin.source].path;
    let mut out = format!(
        "\n{} {}:{}, {}, {} trained\n",
        bold(&format!("sample {}", index + 1)),
        path.display(),
        origin.line,
        number(sample.len(), "token"),
        HumanCount(sample.trained_tokens() as u64),
    );
    let mut left = PREVIEW;
    for span in preview(sample, &inputs.tokenizer) {
        let length = span.text.chars().count();
        let text: String = span.text.chars().take(left).map(visible).collect();
        out += &painted(&PreviewSpan { text, ..span });
        if length > left {
            out += "\n… (the rest is not shown)";
            break;
        }
        left -= length;
    }
    out + "\n"
}

fn painted(span: &PreviewSpan) -> String {
    let text = &span.text;
    if !colored() {
        return if span.trained { format!("⟦{text}⟧") } else { text.clone() };
    }
    // line by line: pagers and terminals forget a colour at the end of a line
    let paint = |line: &str| match (span.trained, line.is_empty()) {
        (_, true) => String::new(),
        (true, false) => line.green().to_string(),
        (false, false) => line.dimmed().to_string(),
    };
    text.split('\n').map(paint).collect::<Vec<_>>().join("\n")
}

/// Control characters as their pictures: rows may hold escape sequences, and the terminal is not theirs.
fn visible(character: char) -> char {
    match character {
        '\n' | '\t' => character,
        '\u{7f}' => '␡',
        '\0'..='\u{1f}' => char::from_u32(0x2400 + u32::from(character)).unwrap_or('�'),
        '\u{80}'..='\u{9f}' => '�',
        _ => character,
    }
}

fn as_json(inputs: &Inputs, dataset: &Dataset, shown: &[usize]) -> serde_json::Value {
    let report = &dataset.report;
    let samples: Vec<_> = shown
        .iter()
        .map(|&index| {
            let origin = dataset.origins[index];
            json!({
                "path": report.sources[origin.source].path,
                "line": origin.line,
                "tokens": dataset.samples[index].len(),
                "trained_tokens": dataset.samples[index].trained_tokens(),
                "spans": preview(&dataset.samples[index], &inputs.tokenizer),
            })
        })
        .collect();
    json!({
        "rows": report.rows(),
        "samples": report.samples(),
        "tokens": report.tokens(),
        "trained_tokens": report.trained_tokens(),
        "dropped": report.dropped(),
        "sequence_len": report.sequence_len,
        "sources": report.sources,
        "histogram": report.histogram(),
        "preview": samples,
    })
}

fn number(count: usize, noun: &str) -> String {
    let plural = if count == 1 { "" } else { "s" };
    format!("{} {noun}{plural}", HumanCount(count as u64))
}

fn share(part: usize, whole: usize) -> String {
    format!("{:.1} %", 100.0 * part as f64 / whole.max(1) as f64)
}

fn bold(text: &str) -> String {
    text.if_supports_color(Stream::Stdout, |text| text.bold()).to_string()
}

fn yellow(text: &str) -> String {
    text.if_supports_color(Stream::Stdout, |text| text.yellow()).to_string()
}

/// Standard output shows colours: a terminal, and neither NO_COLOR nor TERM=dumb.
fn colored() -> bool {
    "x".if_supports_color(Stream::Stdout, |text| text.bold()).to_string() != "x"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_taken_evenly() {
        assert_eq!(shown(10, 2), [0, 5]);
        assert_eq!(shown(2, 5), [0, 1]);
        assert_eq!(shown(0, 3), [0; 0]);
    }

    #[test]
    fn escape_sequences_are_shown_not_obeyed() {
        let text: String = "a\u{1b}[31m\tb\n\u{7f}\u{9b}".chars().map(visible).collect();
        assert_eq!(text, "a␛[31m\tb\n␡�");
    }
}
