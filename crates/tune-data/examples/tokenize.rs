//! Times what stands between a start and the first batch, for a model and files of rows:
//! `cargo run --release -p tune-data --example tokenize -- MODEL FILE.jsonl… [--repeat N]`.
//!
//! Prints one JSON object: seconds to open the model, to build its tokenizer and template, and to turn the rows into
//! samples (the best of N times).

#![allow(missing_docs, clippy::print_stdout)]

use std::path::{Path, PathBuf};
use std::time::Instant;

use serde_json::json;
use tune_data::{ChatTemplate, Clock, DataSource, LoadOptions, Overlong, Tokenizer, TrainOn, load};

fn main() {
    let mut arguments: Vec<String> = std::env::args().skip(1).collect();
    let repeat = arguments.iter().position(|argument| argument == "--repeat").map_or(1, |at| {
        let count = arguments.drain(at..).nth(1);
        count.and_then(|count| count.parse().ok()).expect("--repeat N")
    });
    let [model, files @ ..] = arguments.as_slice() else { panic!("MODEL FILE.jsonl… [--repeat N]") };

    let (open, base) = timed(|| tune_formats::open(Path::new(model)).expect("a model"));
    let (build, tokenizer) = timed(|| Tokenizer::from_base(&base).expect("a tokenizer"));
    let (parse, template) = timed(|| ChatTemplate::from_base(&base, &tokenizer, Clock::Fixed).ok());
    let source =
        |path: &String| DataSource { path: PathBuf::from(path), format: None, train_on: TrainOn::Assistant };
    let sources: Vec<_> = files.iter().map(source).collect();
    let options = LoadOptions {
        sequence_len: usize::MAX,
        overlong: Overlong::Drop,
        vocab_size: base.config.vocab_size,
    };
    let runs = (0..repeat).map(|_| {
        timed(|| load(&sources, &options, &tokenizer, template.as_ref(), &base.name).expect("rows"))
    });
    let (tokenise, dataset) = runs.min_by(|a, b| a.0.total_cmp(&b.0)).expect("at least one run");
    let bytes: u64 = files.iter().map(|path| std::fs::metadata(path).expect("a file").len()).sum();
    let ids = dataset.samples.iter().flat_map(|sample| &sample.input_ids);
    // order matters to this sum: the same for a rival that gives the same ids
    let digest = ids.fold(0u64, |sum, id| sum.wrapping_mul(1_000_003).wrapping_add(u64::from(*id) + 1));
    println!(
        "{}",
        json!({
            "open_s": open,
            "tokenizer_s": build,
            "template_s": parse,
            "tokenise_s": tokenise,
            "rows": dataset.report.rows(),
            "tokens": dataset.report.tokens(),
            "bytes": bytes,
            "digest": format!("{digest:016x}"),
        })
    );
}

fn timed<T>(action: impl FnOnce() -> T) -> (f64, T) {
    let start = Instant::now();
    let value = action();
    (start.elapsed().as_secs_f64(), value)
}
