//! Learning rate by optimizer step: warm-up, then cosine, linear or constant.

use std::f64::consts::PI;

use tune_recipe::LrScheduler;

/// The learning rate of every step of a run.
#[derive(Clone, Copy, Debug)]
pub struct Schedule {
    shape: LrScheduler,
    peak: f64,
    warmup_steps: usize,
    total_steps: usize,
}

impl Schedule {
    /// `warmup_ratio` of `total_steps`, rounded up, rise linearly to `peak`.
    pub fn new(shape: LrScheduler, peak: f64, warmup_ratio: f64, total_steps: usize) -> Self {
        let warmup_steps = (warmup_ratio * total_steps as f64).ceil() as usize;
        Self { shape, peak, warmup_steps, total_steps }
    }

    /// Learning rate of `step`, counted from 1. No step has rate zero: the first of the warm-up is already
    /// above it and the last of the decay still is.
    pub fn learning_rate(&self, step: usize) -> f64 {
        if step <= self.warmup_steps {
            return self.peak * step as f64 / self.warmup_steps as f64;
        }
        let decay_steps = (self.total_steps - self.warmup_steps).max(1);
        let progress = ((step - 1 - self.warmup_steps) as f64 / decay_steps as f64).min(1.0);
        self.peak
            * match self.shape {
                LrScheduler::Constant => 1.0,
                LrScheduler::Linear => 1.0 - progress,
                LrScheduler::Cosine => 0.5 * (1.0 + (PI * progress).cos()),
            }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rates(shape: LrScheduler, warmup_ratio: f64) -> Vec<f64> {
        let schedule = Schedule::new(shape, 1.0, warmup_ratio, 10);
        (1..=10).map(|step| schedule.learning_rate(step)).collect()
    }

    #[test]
    fn warm_up_rises_to_the_peak_and_decay_falls_from_it() {
        for shape in [LrScheduler::Cosine, LrScheduler::Linear] {
            let rates = rates(shape, 0.4);
            assert_eq!(&rates[..5], [0.25, 0.5, 0.75, 1.0, 1.0]);
            assert!(rates[4..].windows(2).all(|pair| pair[1] < pair[0]));
            assert!(rates[9] > 0.0);
        }
    }

    #[test]
    fn half_way_down_cosine_and_linear_are_at_half() {
        for shape in [LrScheduler::Cosine, LrScheduler::Linear] {
            assert!((rates(shape, 0.0)[5] - 0.5).abs() < 1e-12);
        }
    }

    #[test]
    fn constant_stays_at_the_peak_without_warm_up() {
        assert_eq!(rates(LrScheduler::Constant, 0.0), [1.0; 10]);
    }
}
