//! `tune plan --device DEVICE`: every method by model size.

use std::fmt::Write as _;

use tune_plan::advice::Question;
use tune_plan::{
    CatalogueModel, PlanInput, Shape, find_in_catalogue, format_bytes, in_bits, parse_size, reference,
};
use tune_recipe::Method;

use super::{Target, paint};
use crate::calibration;

/// Sizes with the model that stands for each, where this version can count one.
const SIZES: [(&str, &str); 9] = [
    ("1B", "llama3.2:1b"),
    ("3B", "llama3.2:3b"),
    ("7B", "llama2:7b"),
    ("8B", "llama3.1:8b"),
    ("13B", "llama2:13b"),
    ("14B", "qwen3:14b"),
    ("27B", ""),
    ("30B", "llama:30b"),
    ("70B", "llama2:70b"),
];

/// Below this width there is one line a cell.
const WIDE: usize = 64;

/// The model that a bare size usually means.
pub fn usual_model(parameters: u64) -> Option<(&'static CatalogueModel, Shape)> {
    let (_, alias) = SIZES.iter().find(|(label, _)| parse_size(label) == Some(parameters))?;
    known(alias)
}

/// A published model whose runs can be counted.
fn known(alias: &str) -> Option<(&'static CatalogueModel, Shape)> {
    let model = find_in_catalogue(alias)?;
    Some((model, model.shape()?))
}

/// The table for `target`.
pub fn text(target: &Target, sequence_len: u64, batch: u64, rank: u64) -> String {
    let mut text = String::new();
    let whose = target.name.clone().unwrap_or_else(|| "the run".into());
    match target.budget_bytes {
        Some(budget) => writeln!(text, "device      {whose}, {} for a run", format_bytes(budget)).ok(),
        None => writeln!(text, "device      {whose}; it does not tell how much memory is usable").ok(),
    };
    writeln!(text, "run         {sequence_len} tokens × {batch}, rank {rank}, gradient checkpointing").ok();
    let wide = paint::width() >= WIDE;
    if wide {
        writeln!(text, "\n  {:<6}{:>13}{:>13}{:>13}{:>13}", "", "inference", "qlora", "lora", "full").ok();
    } else {
        text.push('\n');
    }
    for (label, alias) in SIZES {
        let cells = [
            ("inference", inference(label, alias, sequence_len)),
            ("qlora", trained(label, alias, Method::Qlora, target, sequence_len, batch, rank)),
            ("lora", trained(label, alias, Method::Lora, target, sequence_len, batch, rank)),
            ("full", trained(label, alias, Method::Full, target, sequence_len, batch, rank)),
        ];
        let cells = cells.map(|(name, (needed, is_rough))| {
            let mark = match target.budget_bytes {
                Some(budget) if needed <= budget => " yes",
                Some(_) => "  no",
                None => "",
            };
            let sign = if is_rough { "~" } else { "" };
            (name, format!("{sign}{}{mark}", format_bytes(needed)))
        });
        if wide {
            let cells: String = cells.iter().map(|(_, cell)| format!("{cell:>13}")).collect();
            writeln!(text, "  {label:<6}{cells}").ok();
        } else {
            for (name, cell) in &cells {
                writeln!(text, "  {label:<6}{name:<10}{cell:>14}").ok();
            }
        }
    }
    text.push_str(
        "\n  Upper ends of the estimate for the usual model of each size; ~ is the rule of thumb.\n",
    );
    text.push_str(
        "  Inference is in 4 bits with a 16-bit cache; qlora over NF4, lora and full over 16 bits.\n",
    );
    text
}

/// Bytes to run the model in four bits with a cache for so many tokens.
fn inference(label: &str, alias: &str, tokens: u64) -> (u64, bool) {
    let parameters = parse_size(label).unwrap_or(0);
    let weights = reference::model_bytes(parameters, 4);
    let cache = known(alias).map_or(0, |(_, s)| {
        reference::kv_cache_bytes(1, tokens, s.num_hidden_layers, s.num_key_value_heads, s.head_dim, 2)
    });
    (weights.saturating_add(cache), true)
}

/// Bytes to train it.
fn trained(
    label: &str,
    alias: &str,
    method: Method,
    target: &Target,
    sequence_len: u64,
    batch: u64,
    rank: u64,
) -> (u64, bool) {
    let bits = if method == Method::Qlora { 4 } else { 16 };
    let Some((model, shape)) = known(alias) else {
        let figure = reference::reference(method, bits, parse_size(label).unwrap_or(0), true).gb;
        return (figure.saturating_mul(1_000_000_000), true);
    };
    let input = PlanInput {
        rank,
        sequence_len,
        micro_batch_size: batch,
        dtype: target.dtype,
        calibration: calibration::current(),
        budget_bytes: target.budget_bytes,
        ..PlanInput::of(model.name.clone(), shape, in_bits(&shape, bits), method)
    };
    (target.pool.needed_bytes(&Question::about(input, target.pool).plan()), false)
}
