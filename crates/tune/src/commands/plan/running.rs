//! `tune plan --method inference`: what running a model takes.

use std::process::ExitCode;

use miette::IntoDiagnostic;
use tune_plan::{CacheType, InferenceInput, KnownModel, Layout, QUANTS, Quant, inference};
use tune_recipe::{Budget, Quantization};

use super::{Args, Target, subject};
use crate::exit::{DOES_NOT_FIT, UsageError};

/// Shows what running a model takes. A bare size decides nothing unless a device is given.
pub fn plan(model: &str, args: &Args, device: Option<Target>) -> miette::Result<ExitCode> {
    let cache = CacheType::parse(&args.kv_cache).ok_or_else(|| {
        UsageError::report(
            format!("--kv-cache: {:?} is no type of a cache", args.kv_cache),
            "write fp16, fp8, q8_0 or q4_0",
        )
    })?;
    let asked = args.quant.as_deref().map(quant).transpose()?;
    let is_asked = device.is_some();
    let target = device.unwrap_or_else(|| Target::of_budget(Budget::Auto));
    let input = |name: String, parameters, known, quant| InferenceInput {
        model: name,
        parameters,
        known,
        quant,
        context: args.seq,
        users: args.users,
        cache,
        budget_bytes: target.budget_bytes,
    };
    let (input, decides) = if let Some(parameters) = tune_plan::parse_size(model) {
        (input(model.to_owned(), parameters, KnownModel::Size, asked.unwrap_or(Quant::Q4_K_M)), is_asked)
    } else if let Some(published) =
        tune_plan::find_in_catalogue(model).filter(|model| model.shape().is_none())
    {
        subject::say_what_was_chosen(model, published);
        let known = KnownModel::Dimensions(published.layout.clone());
        let quant = asked.unwrap_or(Quant::Q4_K_M);
        (input(published.name.clone(), published.layout.parameters(), known, quant), true)
    } else {
        let subject = subject::find(model)?;
        let layout = Layout::from(&subject.shape);
        let parameters = layout.parameters();
        let (known, quant) = match (&subject.base, asked) {
            (Some(base), None) => {
                let stored = tune_plan::from_model(base, Quantization::Keep)?;
                (KnownModel::File { weights: stored.held, layout }, Quant::of_bits(stored.linear_bits))
            }
            (_, asked) => (KnownModel::Dimensions(layout), asked.unwrap_or(Quant::Q4_K_M)),
        };
        (input(subject.name.clone(), parameters, known, quant), true)
    };
    let plan = inference(&input);
    if args.json {
        println!("{}", serde_json::to_string_pretty(&plan).into_diagnostic()?);
    } else {
        print!("{plan}");
    }
    Ok(if decides && plan.fits == Some(false) { ExitCode::from(DOES_NOT_FIT) } else { ExitCode::SUCCESS })
}

fn quant(name: &str) -> miette::Result<Quant> {
    Quant::parse(name).ok_or_else(|| {
        let names: Vec<&str> = QUANTS.iter().map(|quant| quant.name).collect();
        UsageError::report(
            format!("--quant: {name:?} is no format of weights"),
            format!("write q2 to q8, or one of {}", names.join(", ")),
        )
    })
}
