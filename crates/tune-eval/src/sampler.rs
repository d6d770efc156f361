//! Choosing the next token from logits: greedy, or temperature with top-k, top-p and min-p.
//!
//! Filters apply in the order top-k, top-p, min-p, temperature, as in llama.cpp's default chain. Nucleus
//! sampling: Holtzman et al. 2019, arXiv 1904.09751.

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
        let mut candidates: Vec<(u32, f64)> =
            logits.iter().enumerate().map(|(id, logit)| (id as u32, f64::from(*logit))).collect();
        self.penalise_repetitions(&mut candidates, history);
        let by_logit = |a: &(u32, f64), b: &(u32, f64)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
        if self.config.temperature <= 0.0 {
            return candidates.into_iter().min_by(by_logit).map_or(0, |(id, _)| id);
        }
        let k = if self.config.top_k == 0 { candidates.len() } else { self.config.top_k };
        if k < candidates.len() {
            candidates.select_nth_unstable_by(k, by_logit);
            candidates.truncate(k);
        }
        candidates.sort_unstable_by(by_logit);
        self.keep_likely(&mut candidates);
        self.draw(&candidates)
    }

    fn penalise_repetitions(&self, candidates: &mut [(u32, f64)], history: &[u32]) {
        if (self.config.repeat_penalty - 1.0).abs() < f64::EPSILON {
            return;
        }
        let start = history.len().saturating_sub(self.config.repeat_last_n);
        let mut recent = history[start..].to_vec();
        recent.sort_unstable();
        recent.dedup();
        for id in recent {
            if let Some((_, logit)) = candidates.get_mut(id as usize) {
                let penalty = self.config.repeat_penalty;
                *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
            }
        }
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
