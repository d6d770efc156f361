//! `tune bench make-model`: a model of a published shape, or of any other, with random weights.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;

use indicatif::{BinaryBytes, ProgressBar, ProgressStyle};
use tune_export::{
    BYTE_TOKENS, ExportEvent, FileType, RandomModel, byte_tokenizer, tokenizer_keys, write_random_model,
};
use tune_formats::gguf::Metadata;
use tune_formats::{ModelConfig, gguf};
use tune_hub::ModelRef;

use crate::download;
use crate::exit::UsageError;

#[derive(clap::Args)]
#[command(
    after_help = "The weights are random and have the sizes of a model before training; nothing can be learned from \
                  what it says. Without --tokenizer a text has one token for each byte.\n\n\
                  Examples:\n  tune bench make-model llama2:7b --type q4_0 --out 7b.gguf\n  \
                  tune bench make-model llama3.1:8b --type q4_k_m --layers 2 --out small.gguf\n  \
                  tune bench make-model smollm2:135m --tokenizer smollm2:135m --type bf16 --out random.gguf"
)]
pub struct Args {
    /// A published model whose shape it gets: see tune models
    shape: String,
    /// GGUF file to write
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// What most matrices are stored as, as in tune export: q4_0, q4_k_m, q8_0, bf16, ...
    #[arg(long = "type", value_name = "TYPE", default_value = "q4_0")]
    file_type: String,
    /// Blocks [default: the shape's, like the options that follow]
    #[arg(long, value_name = "N")]
    layers: Option<usize>,
    /// Width of the residual stream
    #[arg(long, value_name = "N")]
    d_model: Option<usize>,
    /// Width of the MLP
    #[arg(long, value_name = "N")]
    d_ff: Option<usize>,
    /// Query heads
    #[arg(long, value_name = "N")]
    heads: Option<usize>,
    /// Key and value heads
    #[arg(long, value_name = "N")]
    kv_heads: Option<usize>,
    /// Width of a head [default: d_model / heads where one of them is given]
    #[arg(long, value_name = "N")]
    head_dim: Option<usize>,
    /// Tokens of the vocabulary
    #[arg(long, value_name = "N")]
    vocab: Option<usize>,
    /// Whether the output head is the embedding
    #[arg(long, value_name = "true|false")]
    tied: Option<bool>,
    /// Longest context
    #[arg(long, value_name = "TOKENS", default_value_t = 4096)]
    context: usize,
    /// Model whose tokenizer and chat template it gets
    #[arg(long, value_name = "NAME|PATH")]
    tokenizer: Option<String>,
    /// Decides every weight
    #[arg(long, value_name = "N", default_value_t = 42)]
    seed: u64,
}

pub fn run(args: &Args) -> miette::Result<ExitCode> {
    let file_type = FileType::from_name(&args.file_type).ok_or_else(|| {
        let known: Vec<String> = FileType::ALL.iter().map(|t| t.name().to_lowercase()).collect();
        UsageError::report(
            format!("unknown type \"{}\"", args.file_type),
            format!("one of {}", known.join(" ")),
        )
    })?;
    let (tokenizer, vocab) = match &args.tokenizer {
        Some(model) => {
            let path = download::resolve(&ModelRef::parse(model)?, false)?.path;
            let base = tune_formats::open(&path)?;
            (Some(tokenizer_keys(&base)?), Some(base.config.vocab_size))
        }
        None => (None, None),
    };
    let config = config(args, vocab)?;
    let tokenizer: Metadata = tokenizer.unwrap_or_else(|| byte_tokenizer(config.vocab_size));
    let name = args.out.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();

    let bar = bar();
    let model =
        RandomModel { name: &name, config: &config, file_type, tokenizer: &tokenizer, seed: args.seed };
    write_random_model(&model, &args.out, &mut |event| match event {
        ExportEvent::Started { tensors, bytes } => {
            bar.set_length(tensors as u64);
            bar.println(format!("writing   {}", BinaryBytes(bytes)));
        }
        ExportEvent::Wrote { done, .. } => bar.set_position(done as u64),
        ExportEvent::Verified { .. } => {}
    })?;
    bar.finish_and_clear();
    let base = tune_formats::open(&args.out)?;
    eprintln!(
        "wrote     {:.1} M parameters, {}, as {file_type}",
        base.parameters() as f64 / 1e6,
        BinaryBytes(std::fs::metadata(&args.out).map_or(0, |file| file.len())),
    );
    println!("{}", args.out.display());
    Ok(ExitCode::SUCCESS)
}

/// The shape of the published model with what is given changed. `vocab` is that of a named tokenizer.
fn config(args: &Args, vocab: Option<usize>) -> miette::Result<ModelConfig> {
    let model = tune_plan::find_in_catalogue(&args.shape).ok_or_else(|| {
        UsageError::report(
            format!("no published shape is called \"{}\"", args.shape),
            "take one that the planner knows, such as llama2:7b or smollm2:135m, and change it with --layers, --d-model, ...",
        )
    })?;
    let known = gguf::names::architecture(&model.architecture).zip(model.shape());
    let (architecture, shape) = known.ok_or_else(|| {
        UsageError::report(
            format!("{} is of architecture {}, which cannot be trained yet", model.name, model.architecture),
            format!("take a shape of architecture {}", gguf::names::ARCHITECTURES.join(" or ")),
        )
    })?;
    let hidden_size = args.d_model.unwrap_or(shape.hidden_size as usize);
    let heads = args.heads.unwrap_or(shape.num_attention_heads as usize);
    let head_dim = match args.head_dim {
        Some(given) => given,
        None if args.d_model.is_some() || args.heads.is_some() => hidden_size / heads.max(1),
        None => shape.head_dim as usize,
    };
    let vocab_size = args.vocab.or(vocab).unwrap_or(shape.vocab_size as usize);
    let config = ModelConfig {
        architecture,
        vocab_size,
        hidden_size,
        intermediate_size: args.d_ff.unwrap_or(shape.intermediate_size as usize),
        num_hidden_layers: args.layers.unwrap_or(shape.num_hidden_layers as usize),
        num_attention_heads: heads,
        num_key_value_heads: args.kv_heads.unwrap_or_else(|| heads.min(shape.num_key_value_heads as usize)),
        head_dim,
        rms_norm_eps: 1e-5,
        rope_theta: 10_000.0,
        rope_scaling: None,
        max_position_embeddings: args.context,
        tie_word_embeddings: args.tied.unwrap_or(shape.tied),
        attention_bias: shape.attention_bias,
    };
    let mut problems = config.problems();
    match vocab {
        Some(vocab) if vocab != vocab_size => {
            problems.push(format!("--vocab is {vocab_size}, and the tokenizer has {vocab} tokens"));
        }
        None if vocab_size < BYTE_TOKENS => {
            problems.push(format!("the vocabulary has {vocab_size} tokens, expected {BYTE_TOKENS} or more"));
        }
        _ => {}
    }
    if problems.is_empty() {
        return Ok(config);
    }
    Err(UsageError::report(
        problems.join("\n"),
        "change --layers, --d-model, --d-ff, --heads, --kv-heads or --vocab",
    ))
}

fn bar() -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{wide_bar} {pos}/{len} tensors");
    ProgressBar::new(0).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}
