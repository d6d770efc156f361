//! The same artefact in another program: what it thinks comes next, against our own reading of the same file.

use std::fmt;
use std::path::Path;

use miette::Result;
use serde::Serialize;
use tune_data::{IGNORED, MicroBatch};
use tune_eval::top_logprobs;
use tune_hub::{LlamaServer, MOST_LOGPROBS, NextToken, OllamaServer};
use tune_models::Llama;

use crate::limits::Limits;
use crate::trained::Trained;

/// Positions that are asked for.
const POSITIONS: usize = 32;
/// Tokens over which KL is taken; the rest counts as one.
const TOP: usize = 16;
/// Tokens that the other program lists.
const LISTED: usize = 64;
/// llama.cpp rounds activations to 8 bits where weights are quantised: 2.5e-3 nats and 95 % on SmolLM2.
const MAX_MEAN_KL: f64 = 2e-2;
const MIN_TOP1: f64 = 0.85;

/// How far another program agrees with our own reading of the same file.
#[derive(Clone, Debug, Serialize)]
pub struct EngineAgreement {
    /// What it is.
    pub engine: String,
    /// Positions compared.
    pub positions: usize,
    /// Mean KL(ours ‖ theirs) over the most likely tokens, in nats.
    pub mean_kl: f64,
    /// Share of positions with the same most likely token.
    pub top1: f64,
}

impl EngineAgreement {
    /// From the sums of KL and of equal top tokens over some positions.
    fn of(engine: &str, (kl, same, positions): (f64, usize, usize)) -> Self {
        let count = positions as f64;
        Self { engine: engine.to_owned(), positions, mean_kl: kl / count, top1: same as f64 / count }
    }

    /// What is wrong, if anything. `limits` is what lies between the two models beside the engine.
    pub fn problem(&self, limits: Limits) -> Option<String> {
        let Self { engine, positions, mean_kl, top1 } = self;
        let (most, least) = (MAX_MEAN_KL + limits.max_mean_kl, MIN_TOP1.min(limits.min_top1));
        let bad = mean_kl.is_nan() || *mean_kl > most || *top1 < least;
        bad.then(|| {
            format!(
                "{engine} reads another model: mean KL {mean_kl:.2e} nats (at most {most:.0e}), top-1 {:.1} % (at \
                 least {:.0} %) at {positions} positions",
                100.0 * top1,
                100.0 * least
            )
        })
    }
}

impl fmt::Display for EngineAgreement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { engine, positions, mean_kl, top1 } = self;
        write!(
            f,
            "{engine:9} mean KL {mean_kl:.2e} nats, top-1 {:.1} % with our reading of it, at {positions} positions",
            100.0 * top1
        )
    }
}

/// Runs a GGUF file in llama.cpp, an adapter over its base; `None` where the base is no GGUF file.
pub fn llama_cpp(
    program: &Path,
    artefact: &Path,
    base: Option<&Path>,
    is_adapter: bool,
    model: &Llama,
    trained: &Trained<'_>,
) -> Result<Option<EngineAgreement>> {
    let (file, adapter) = match (is_adapter, base) {
        (true, None) => return Ok(None),
        (true, Some(base)) => (base, Some(artefact)),
        (false, _) => (artefact, None),
    };
    let questions = questions(&trained.held_out.batches);
    let longest = questions.iter().map(|(ids, _)| ids.len()).max().unwrap_or(0);
    let server = LlamaServer::start(program, file, adapter, (longest + 8).next_multiple_of(256))?;
    let mut sums = (0.0, 0, 0);
    for (ids, at) in &questions {
        let ours = top_logprobs(model, &asked(ids, at), TOP);
        for (&position, ours) in at.iter().zip(&ours) {
            let theirs = server.next_tokens(&ids[..=position], LISTED)?;
            sums.0 += kl(ours, &theirs);
            sums.1 += usize::from(theirs.first().map(|top| top.0) == ours.first().map(|top| top.0));
            sums.2 += 1;
        }
    }
    Ok(Some(EngineAgreement::of("llama.cpp", sums)))
}

/// A document of which the positions `at` are asked.
fn asked(ids: &[u32], at: &[usize]) -> MicroBatch {
    let mut targets = vec![IGNORED; ids.len()];
    for &position in at {
        targets[position] = 0;
    }
    MicroBatch { input_ids: ids.to_vec(), targets, documents: vec![0..ids.len()] }
}

/// Asks a model that a running Ollama has, against the trained model itself: what lies between the two is the export and
/// the server. Texts go in, past every template, and tokens come back as text. `None` where no text of the held-out rows
/// could be asked.
pub fn ollama(server: &OllamaServer, name: &str, trained: &Trained<'_>) -> Result<Option<EngineAgreement>> {
    let mut sums = (0.0, 0, 0);
    for (ids, at) in &questions(&trained.held_out.batches) {
        let ours = top_logprobs(&trained.model, &asked(ids, at), TOP);
        for (&position, ours) in at.iter().zip(&ours) {
            let Some(text) = text_before(trained, &ids[..=position]) else { continue };
            let theirs = server.next_tokens(name, &text, MOST_LOGPROBS)?;
            // their tokens under our ids; those that show the same replacement character differ in their bytes
            let id_of = |token: &NextToken| {
                let bytes = if token.bytes.is_empty() { token.token.as_bytes() } else { &token.bytes };
                let found = ours.iter().find(|(id, _)| trained.tokenizer.token_bytes(*id) == bytes);
                found.map_or(u32::MAX, |(id, _)| *id)
            };
            let theirs: Vec<(u32, f64)> = theirs.iter().map(|token| (id_of(token), token.logprob)).collect();
            sums.0 += kl(ours, &theirs);
            sums.1 += usize::from(theirs.first().map(|top| top.0) == ours.first().map(|top| top.0));
            sums.2 += 1;
        }
    }
    Ok((sums.2 > 0).then(|| EngineAgreement::of("ollama", sums)))
}

/// The text of the tokens up to a position, without the one that begins every sequence, which the server adds. `None`
/// where the text alone would be cut into other tokens.
fn text_before(trained: &Trained<'_>, ids: &[u32]) -> Option<String> {
    let special = trained.tokenizer.special();
    let begins = special.add_bos && special.bos.is_some() && ids.first().copied() == special.bos;
    let ids = &ids[usize::from(begins)..];
    let text = trained.tokenizer.decode(ids);
    (trained.tokenizer.encode(&text, true).ok()? == ids).then_some(text)
}

/// Documents with some of the positions whose next token is a target, spread over all rows.
fn questions(batches: &[MicroBatch]) -> Vec<(Vec<u32>, Vec<usize>)> {
    let mut documents: Vec<(Vec<u32>, Vec<usize>)> = Vec::new();
    for batch in batches {
        for document in &batch.documents {
            let targets = &batch.targets[document.clone()];
            let at: Vec<usize> = (0..targets.len()).filter(|&i| targets[i] >= 0).collect();
            if !at.is_empty() {
                documents.push((batch.input_ids[document.clone()].to_vec(), at));
            }
        }
    }
    let step = documents.len().div_ceil(8).max(1);
    let mut chosen: Vec<_> = documents.into_iter().step_by(step).collect();
    let each = POSITIONS.div_ceil(chosen.len().max(1));
    for (_, at) in &mut chosen {
        let step = at.len().div_ceil(each).max(1);
        *at = at.iter().copied().step_by(step).collect();
    }
    chosen
}

/// Σ p (log p − log q) over our most likely tokens, and over all others together.
fn kl(ours: &[(u32, f64)], theirs: &[(u32, f64)]) -> f64 {
    let unlisted = theirs.last().map_or(f64::NEG_INFINITY, |last| last.1);
    let (mut sum, mut rest_p, mut rest_q) = (0.0, 1.0, 1.0);
    for (id, log_p) in ours {
        let log_q = theirs.iter().find(|(other, _)| other == id).map_or(unlisted, |(_, log_q)| *log_q);
        sum += log_p.exp() * (log_p - log_q);
        rest_p -= log_p.exp();
        rest_q -= log_q.exp();
    }
    let (rest_p, rest_q) = (rest_p.max(1e-9), rest_q.max(1e-9));
    (sum + rest_p * (rest_p / rest_q).ln()).max(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kl_over_the_top_is_zero_for_the_same_and_large_for_another_model() {
        let ours = [(3, 0.6_f64.ln()), (7, 0.3_f64.ln())];
        assert!(kl(&ours, &ours) < 1e-12);
        assert!(kl(&ours, &[(7, 0.6_f64.ln()), (3, 0.3_f64.ln())]) > 0.2);
        assert!(kl(&ours, &[(1, 0.9_f64.ln()), (2, 1e-6_f64.ln())]) > 1.0);
    }

    #[test]
    fn questions_are_spread_over_documents_and_end_before_a_target() {
        let batch = MicroBatch {
            input_ids: (0..40).collect(),
            targets: (0..40).map(|i| if i % 20 > 5 && i % 20 < 19 { 1 } else { -100 }).collect(),
            documents: vec![0..20, 20..40],
        };
        let questions = questions(&[batch]);
        assert_eq!(questions.len(), 2);
        assert!(questions.iter().all(|(ids, at)| ids.len() == 20 && at.iter().all(|&i| i > 5 && i < 19)));
    }
}
