//! How much of an update the weights of an exported file hold. What that does to the model's answers is another
//! question, and only running the model tells: *retention* is measured there, on held-out data.
//!
//! With the base's weights W, the wanted W + Δ and what the file holds, W + Δ̂:
//!
//! ```text
//! kept  = ⟨Δ̂, Δ⟩ / ⟨Δ, Δ⟩        1 when nothing is lost, 0 when the file is the base
//! error = ‖Δ̂ − Δ‖ / ‖Δ‖
//! ```
//!
//! Typical updates are a few percent of a weight, less than a step of a 4-bit grid, so rounding to the nearest can
//! erase them.

use std::ops::{Add, AddAssign};

use serde::Serialize;

/// The part of the adapter's update that the exported weights hold, over all changed matrices.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct StoredUpdate {
    /// Component of the stored change along the wanted one; 1 is perfect.
    pub kept: f64,
    /// Rounding error relative to the wanted change; 0 is perfect.
    pub error: f64,
    /// Wanted change relative to the weights.
    pub relative_update: f64,
}

/// Sums over changed weights.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Effect {
    wanted_wanted: f64,
    stored_wanted: f64,
    error_error: f64,
    base_base: f64,
}

impl Effect {
    pub(crate) fn of_rows(base: &[f32], merged: &[f32], stored: &[f32]) -> Self {
        // Several sums at a time, for one waits for itself; the order is the same on every machine.
        let mut lanes = [Self::default(); 8];
        let chunks = base.chunks(8).zip(merged.chunks(8)).zip(stored.chunks(8));
        for ((base, merged), stored) in chunks {
            for (((lane, &base), &merged), &stored) in lanes.iter_mut().zip(base).zip(merged).zip(stored) {
                let wanted = f64::from(merged) - f64::from(base);
                let error = f64::from(stored) - f64::from(merged);
                lane.wanted_wanted += wanted * wanted;
                lane.stored_wanted += (wanted + error) * wanted;
                lane.error_error += error * error;
                lane.base_base += f64::from(base) * f64::from(base);
            }
        }
        lanes.into_iter().fold(Self::default(), Add::add)
    }

    /// `None` when the adapter changes nothing.
    pub(crate) fn stored_update(self) -> Option<StoredUpdate> {
        (self.wanted_wanted > 0.0).then(|| StoredUpdate {
            kept: self.stored_wanted / self.wanted_wanted,
            error: (self.error_error / self.wanted_wanted).sqrt(),
            relative_update: (self.wanted_wanted / self.base_base).sqrt(),
        })
    }
}

impl Add for Effect {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            wanted_wanted: self.wanted_wanted + other.wanted_wanted,
            stored_wanted: self.stored_wanted + other.stored_wanted,
            error_error: self.error_error + other.error_error,
            base_base: self.base_base + other.base_base,
        }
    }
}

impl AddAssign for Effect {
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn perfect_and_erased() {
        let (base, merged) = ([1.0, 2.0, -3.0], [1.1, 2.0, -3.2]);
        let perfect = Effect::of_rows(&base, &merged, &merged).stored_update().expect("changed");
        assert!((perfect.kept - 1.0).abs() < 1e-12 && perfect.error < 1e-12, "{perfect:?}");
        let erased = Effect::of_rows(&base, &merged, &base).stored_update().expect("changed");
        assert!(erased.kept.abs() < 1e-12 && (erased.error - 1.0).abs() < 1e-12, "{erased:?}");
        assert_eq!(Effect::of_rows(&base, &base, &base).stored_update(), None);
    }
}
