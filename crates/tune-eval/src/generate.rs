//! Continuing a text token by token over a KV cache.

use std::ops::ControlFlow;

use tune_models::{KvCache, Llama};

use crate::Sampler;

/// Tokens of the prompt that go through the model at once.
const PROMPT_CHUNK: usize = 512;

/// Why a generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopReason {
    /// The model ended its answer.
    EndOfTurn,
    /// As many tokens as asked for.
    Length,
    /// The context is full.
    Context,
    /// The caller wanted no more.
    Cancelled,
}

/// A finished generation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Generation {
    /// The new tokens, without the one that ended them.
    pub tokens: Vec<u32>,
    /// Why they end.
    pub stop: StopReason,
}

/// Feeds `prompt` into `cache` and continues it by at most `max_tokens`, until one of `stop_ids`.
///
/// `cache` may already hold earlier turns; afterwards it holds the prompt and all new tokens but the last one
/// chosen. `on_token` sees every new token as it is chosen. The prompt must not be empty and must fit.
pub fn generate(
    model: &Llama,
    cache: &mut KvCache,
    prompt: &[u32],
    max_tokens: usize,
    stop_ids: &[u32],
    sampler: &mut Sampler,
    on_token: &mut dyn FnMut(u32) -> ControlFlow<()>,
) -> Generation {
    let mut history = prompt.to_vec();
    let mut pending = prompt.to_vec();
    let mut tokens = Vec::new();
    let stop = loop {
        if tokens.len() >= max_tokens {
            break StopReason::Length;
        }
        if pending.len() > cache.remaining() {
            break StopReason::Context;
        }
        // On a thread of the pool: from outside, each of the hundreds of small parallel loops of a token would put
        // this thread to sleep and wake it again.
        let logits = rayon::scope(|_| last_logits(model, cache, &pending));
        let next = sampler.next(&logits, &history);
        if stop_ids.contains(&next) {
            break StopReason::EndOfTurn;
        }
        history.push(next);
        tokens.push(next);
        pending = vec![next];
        if on_token(next).is_break() {
            break StopReason::Cancelled;
        }
    };
    Generation { tokens, stop }
}

fn last_logits(model: &Llama, cache: &mut KvCache, ids: &[u32]) -> Vec<f32> {
    let mut last = None;
    for chunk in ids.chunks(PROMPT_CHUNK) {
        last = Some(model.hidden_cached(chunk, cache));
    }
    let Some(hidden) = last else { return Vec::new() };
    let [tokens, d_model] = hidden.dims();
    let hidden = hidden.slice([tokens - 1..tokens, 0..d_model]);
    model.logits(hidden).into_data().iter::<f32>().collect()
}
