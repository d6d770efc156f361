//! Choosing the next token from logits: greedy, or temperature with top-k, top-p and min-p.
//!
//! Filters apply in the order top-k, top-p, min-p, temperature, as in llama.cpp's default chain. Nucleus
//! sampling: Holtzman et al. 2019, arXiv 1904.09751.

use std::borrow::Cow;
use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// How tokens are chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SamplerConfig {
    /// Divides the logits; `0` always takes the most likely token.
    pub temperature: f64,
    /// Only the `k` most likely tokens; `0` for all.
    pub top_k: usize,
    /// Only the most likely tokens that together reach this probability.
    pub top_p: f64,
    /// Only tokens at least this likely, relative to the most likely one.
    pub min_p: f64,
    /// Divides the logits of tokens among the last `repeat_last_n`, if positive; multiplies them otherwise.
    pub repeat_penalty: f64,
    /// How far back repetitions count.
    pub repeat_last_n: usize,
    /// The same seed gives the same text.
    pub seed: u64,
}

impl Default for SamplerConfig {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 40,
            top_p: 0.95,
            min_p: 0.05,
            repeat_penalty: 1.0,
            repeat_last_n: 64,
            seed: 42,
        }
    }
}

/// Chooses tokens one after the other.
pub struct Sampler {
    config: SamplerConfig,
    rng: ChaCha8Rng,
}

impl Sampler {
    /// A sampler at the start of its random sequence.
    pub fn new(config: SamplerConfig) -> Self {
        Self { config, rng: ChaCha8Rng::seed_from_u64(config.seed) }
    }

    /// The next token after `history`, given the `logits` of the whole vocabulary.
    pub fn next(&mut self, logits: &[f32], history: &[u32]) -> u32 {
        let logits = self.penalise_repetitions(logits, history);
        let k = match self.config.top_k {
            _ if self.config.temperature <= 0.0 => 1,
            0 => logits.len(),
            k => k,
        };
        let mut candidates = most_likely(&logits, k);
        if k > 1 {
            self.keep_likely(&mut candidates);
        }
        self.draw(&candidates)
    }

    fn penalise_repetitions<'a>(&self, logits: &'a [f32], history: &[u32]) -> Cow<'a, [f32]> {
        if (self.config.repeat_penalty - 1.0).abs() < f64::EPSILON {
            return logits.into();
        }
        let start = history.len().saturating_sub(self.config.repeat_last_n);
        let mut recent = history[start..].to_vec();
        recent.sort_unstable();
        recent.dedup();
        let mut logits = logits.to_vec();
        for id in recent {
            if let Some(logit) = logits.get_mut(id as usize) {
                let penalty = self.config.repeat_penalty;
                let (value, positive) = (f64::from(*logit), *logit > 0.0);
                *logit = if positive { value / penalty } else { value * penalty } as f32;
            }
        }
        logits.into()
    }

    /// Top-p and min-p on candidates sorted by falling logit. At least one stays.
    fn keep_likely(&self, candidates: &mut Vec<(u32, f64)>) {
        let weights = weights(candidates, 1.0);
        let total: f64 = weights.iter().sum();
        let mut reached = 0.0;
        let keep = weights
            .iter()
            .take_while(|weight| {
                let enough = reached >= self.config.top_p * total || **weight < self.config.min_p;
                reached += **weight;
                !enough
            })
            .count();
        candidates.truncate(keep.max(1));
    }

    fn draw(&mut self, candidates: &[(u32, f64)]) -> u32 {
        if let [(id, _)] = candidates {
            return *id;
        }
        let weights = weights(candidates, self.config.temperature);
        let total: f64 = weights.iter().sum();
        if !(total.is_finite() && total > 0.0) {
            return candidates.first().map_or(0, |(id, _)| *id); // logits that are no numbers
        }
        let mut point = self.rng.random_range(0.0..total);
        for ((id, _), weight) in candidates.iter().zip(&weights) {
            if point < *weight {
                return *id;
            }
            point -= weight;
        }
        candidates.last().map_or(0, |(id, _)| *id)
    }
}

/// The `k` largest logits with their tokens, falling; the lower token first of equals.
fn most_likely(logits: &[f32], k: usize) -> Vec<(u32, f64)> {
    let all = || (0..).zip(logits).map(|(id, logit)| Reverse(Candidate { logit: *logit, id }));
    let mut best: Vec<Reverse<Candidate>> = if k >= logits.len() {
        all().collect()
    } else {
        // The worst of the best so far is on top: nearly every logit of a large vocabulary is turned away there.
        let mut best: BinaryHeap<_> = all().take(k).collect();
        for candidate in all().skip(k) {
            if let Some(mut worst) = best.peek_mut()
                && candidate < *worst
            {
                *worst = candidate;
            }
        }
        best.into_vec()
    };
    best.sort_unstable();
    best.into_iter().map(|Reverse(Candidate { logit, id })| (id, f64::from(logit))).collect()
}

/// A token and its logit, ordered by likelihood.
#[derive(Clone, Copy)]
struct Candidate {
    logit: f32,
    id: u32,
}

impl Ord for Candidate {
    fn cmp(&self, other: &Self) -> Ordering {
        self.logit.total_cmp(&other.logit).then(other.id.cmp(&self.id))
    }
}

impl PartialOrd for Candidate {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Candidate {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Candidate {}

/// exp((logit − largest) / temperature): the most likely candidate has weight 1.
fn weights(candidates: &[(u32, f64)], temperature: f64) -> Vec<f64> {
    let largest = candidates.first().map_or(0.0, |(_, logit)| *logit);
    candidates.iter().map(|(_, logit)| ((logit - largest) / temperature).exp()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const OPEN: SamplerConfig = SamplerConfig {
        temperature: 1.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        repeat_penalty: 1.0,
        repeat_last_n: 64,
        seed: 1,
    };

    fn drawn(config: SamplerConfig, logits: &[f32]) -> Vec<usize> {
        let mut sampler = Sampler::new(config);
        let mut counts = vec![0; logits.len()];
        (0..4000).for_each(|_| counts[sampler.next(logits, &[]) as usize] += 1);
        counts
    }

    #[test]
    fn greedy_takes_the_largest_logit_and_the_lowest_id_of_equals() {
        let mut sampler = Sampler::new(SamplerConfig::default());
        assert_eq!(sampler.next(&[0.0, 3.0, 3.0, -1.0], &[]), 1);
    }

    #[test]
    fn open_sampling_follows_the_softmax() {
        // p = 1/2, 1/4, 1/4
        let counts = drawn(OPEN, &[2f32.ln(), 0.0, 0.0]);
        assert!((1850..2150).contains(&counts[0]), "{counts:?}");
        assert!((850..1150).contains(&counts[1]), "{counts:?}");
    }

    #[test]
    fn the_most_likely_are_those_of_a_full_sort() {
        let logits: Vec<f32> = (0..500).map(|i| ((i * 37 % 101) as f32).sin()).collect(); // with many equals
        let mut sorted: Vec<(u32, f64)> = (0..).zip(logits.iter().map(|l| f64::from(*l))).collect();
        sorted.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        for k in [1, 2, 40, 499, 500, 501] {
            assert_eq!(most_likely(&logits, k), sorted[..k.min(500)], "{k}");
        }
        assert_eq!(most_likely(&[], 3), []);
    }

    #[test]
    fn top_k_top_p_and_min_p_cut_the_tail() {
        let logits = [0.0, 2.0, 1.0, -1.0];
        let kept = |config| drawn(config, &logits).iter().map(|n| *n > 0).collect::<Vec<_>>();
        assert_eq!(kept(SamplerConfig { top_k: 2, ..OPEN }), [false, true, true, false]);
        // softmax ≈ 0.087, 0.644, 0.237, 0.032
        assert_eq!(kept(SamplerConfig { top_p: 0.6, ..OPEN }), [false, true, false, false]);
        assert_eq!(kept(SamplerConfig { min_p: 0.1, ..OPEN }), [true, true, true, false]);
    }

    #[test]
    fn the_same_seed_draws_the_same_tokens() {
        let logits = [0.0, 0.1, 0.2, 0.3];
        assert_eq!(drawn(OPEN, &logits), drawn(OPEN, &logits));
        assert_ne!(drawn(OPEN, &logits), drawn(SamplerConfig { seed: 2, ..OPEN }, &logits));
    }

    #[test]
    fn repetitions_are_penalised_inside_their_window() {
        let config = SamplerConfig { repeat_penalty: 2.0, repeat_last_n: 1, ..SamplerConfig::default() };
        let mut sampler = Sampler::new(config);
        assert_eq!(sampler.next(&[1.0, 1.5], &[0, 1]), 0);
        assert_eq!(sampler.next(&[1.0, 1.5], &[1, 0]), 1);
    }
}
