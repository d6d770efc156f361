//! Held-out prompts, answered by the base and by the tuned model: what the run has changed.

use std::ops::ControlFlow;

use tune_data::Message;
use tune_eval::{Sampler, SamplerConfig, generate};
use tune_models::Llama;
use tune_recipe::Method;
use tune_train::quantization;

use crate::inputs::Inputs;
use crate::model::check_ids;

/// One prompt with both answers.
pub struct Sample {
    /// The prompt.
    pub prompt: String,
    /// What the base says.
    pub before: String,
    /// What the tuned model says.
    pub after: String,
}

/// Answers the prompts of the recipe's `[samples]` greedily, as the base and as `tuned`.
pub fn before_and_after(inputs: &Inputs, tuned: &Llama) -> miette::Result<Vec<Sample>> {
    let samples = &inputs.spec.samples;
    if samples.prompts.is_empty() {
        return Ok(Vec::new());
    }
    let base = if inputs.spec.adapter.method == Method::Full {
        let base = tune_models::load(&inputs.base, quantization(&inputs.spec), tuned.device())?;
        base.with_arithmetic(tuned.arithmetic())
    } else {
        tuned.without_adapters()
    };
    samples
        .prompts
        .iter()
        .map(|prompt| {
            let ids = prompt_ids(inputs, prompt)?;
            let answer = |model| answer(inputs, model, &ids);
            Ok(Sample { prompt: prompt.clone(), before: answer(&base), after: answer(tuned) })
        })
        .collect()
}

fn prompt_ids(inputs: &Inputs, prompt: &str) -> miette::Result<Vec<u32>> {
    let text = match &inputs.template {
        Some(template) => {
            let system = inputs.spec.samples.system.as_deref();
            let mut messages: Vec<Message> =
                system.map(|text| Message::new("system", text)).into_iter().collect();
            messages.push(Message::new("user", prompt));
            template.render(&messages, None, true)?
        }
        None => prompt.to_string(),
    };
    let ids = inputs.tokenizer.encode_sequence(&text)?;
    check_ids(&ids, &inputs.base)?;
    Ok(ids)
}

fn answer(inputs: &Inputs, model: &Llama, prompt: &[u32]) -> String {
    let most = inputs.spec.samples.max_tokens;
    let context = model.config().max_position_embeddings;
    let mut cache = model.kv_cache((prompt.len() + most).min(context));
    let stops = &inputs.base.special.eos_ids;
    let mut greedy = Sampler::new(SamplerConfig::default());
    let generation =
        generate(model, &mut cache, prompt, most, stops, &mut greedy, &mut |_| ControlFlow::Continue(()));
    inputs.tokenizer.decode(&generation.tokens).trim().to_string()
}
