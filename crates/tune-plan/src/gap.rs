//! Reference and estimate side by side, and where the difference comes from.
//!
//! The reference table says nothing of its parts. Its factors can be read as parts (bytes a parameter):
//!
//! | row | weights | trained | overhead |
//! |---|---|---|---|
//! | full, 9.6  | 2    | 2 gradients + 4 moments in 16 bits | a fifth of the three |
//! | LoRA, 2.08 | 2    | 0.08, half a percent at 16 bytes   | none |
//! | QLoRA, 1.25 | 1   | 0.05                               | a fifth of the weights |
//! | QLoRA, 0.65 | 0.5 | 0.05                               | a fifth of the weights |
//!
//! That is a reading, not where the table came from. Differences are taken part by part, so they add up to the gap.

use serde::{Deserialize, Serialize};
use tune_recipe::Method;

use crate::estimate::{Basis, MemoryPlan};
use crate::picture::Part;
use crate::reference::Reference;

/// The estimate's peak against the reference.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gap {
    /// Peak of the estimate minus the reference figure.
    pub bytes: i64,
    /// Weights, what is trained, and the rest, in both.
    pub rows: Vec<Row>,
    /// What the difference consists of, largest first. Adds up to `bytes`.
    pub causes: Vec<Cause>,
}

/// A part as both count it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Row {
    /// What it is.
    pub name: String,
    /// In the reference, as its factor can be read.
    pub reference_bytes: u64,
    /// In the estimate, at its peak.
    pub estimate_bytes: u64,
}

/// One part of the difference.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cause {
    /// What it is.
    pub name: String,
    /// How much it adds to the reference; negative where it takes away.
    pub bytes: i64,
}

impl Gap {
    /// The gap of a plan; `None` where the reference stands in for the estimate.
    pub fn of(plan: &MemoryPlan) -> Option<Self> {
        if plan.estimate.basis == Basis::Reference {
            return None;
        }
        let reading = Reading::of(&plan.reference);
        let live = plan.live_terms();
        let sum = |wanted: &dyn Fn(Part) -> bool| {
            let terms = live.iter().filter(|term| wanted(Part::of(&term.name)));
            terms.fold(0, |sum: u64, term| sum.saturating_add(term.bytes))
        };
        let is_trained = |part| matches!(part, Part::Adapters | Part::Gradients | Part::Optimizer);
        let weights = sum(&|part| part == Part::Weights);
        let trained = sum(&is_trained);
        let other = plan.estimate.peak_bytes.saturating_sub(weights).saturating_sub(trained);
        let figure = plan.reference.gb.saturating_mul(1_000_000_000);
        let rest = figure.saturating_sub(reading.weights).saturating_sub(reading.trained);
        let row = |name: &str, reference_bytes, estimate_bytes| Row {
            name: name.into(),
            reference_bytes,
            estimate_bytes,
        };
        let rows = vec![
            row("weights", reading.weights, weights),
            row("adapters, gradients, optimizer", reading.trained, trained),
            row("everything else", rest, other),
        ];

        let mut causes = vec![
            cause("weights", difference(weights, reading.weights)),
            cause("adapters, gradients, optimizer", difference(trained, reading.trained)),
            cause(
                "the reference's overhead and rounding",
                difference(reading.weights.saturating_add(reading.trained), figure),
            ),
        ];
        let rest = live.iter().filter(|term| {
            let part = Part::of(&term.name);
            part != Part::Weights && !is_trained(part)
        });
        causes.extend(rest.map(|term| cause(&term.name, difference(term.bytes, 0))));
        let bytes = difference(plan.estimate.peak_bytes, figure);
        // What is left is nobody's: pages of the allocator that hold nothing.
        let left = causes.iter().fold(bytes, |left, cause| left.saturating_sub(cause.bytes));
        causes.push(cause("unused room of the allocator", left));
        causes.retain(|cause| cause.bytes != 0);
        causes.sort_by_key(|cause| std::cmp::Reverse(cause.bytes.unsigned_abs()));
        Some(Self { bytes, rows, causes })
    }
}

/// The reference by parts, in bytes.
struct Reading {
    weights: u64,
    trained: u64,
}

impl Reading {
    fn of(reference: &Reference) -> Self {
        // Thousandths of a byte a parameter.
        let (weights, trained) = match (reference.method, reference.bits) {
            (Method::Full, _) => (2000, 6000),
            (Method::Lora, _) => (2000, 80),
            (Method::Qlora, 6..) => (1000, 50),
            (Method::Qlora, _) => (500, 50),
        };
        let bytes = |permille: u64| {
            let bytes = u128::from(reference.parameters) * u128::from(permille) / 1000;
            u64::try_from(bytes).unwrap_or(u64::MAX)
        };
        Self { weights: bytes(weights), trained: bytes(trained) }
    }
}

fn cause(name: &str, bytes: i64) -> Cause {
    Cause { name: name.into(), bytes }
}

fn difference(a: u64, b: u64) -> i64 {
    let difference = i128::from(a) - i128::from(b);
    i64::try_from(difference).unwrap_or(if difference < 0 { i64::MIN } else { i64::MAX })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference::reference;

    #[test]
    fn the_readings_stay_below_the_figures() {
        for (method, bits) in [(Method::Full, 16), (Method::Lora, 16), (Method::Qlora, 8), (Method::Qlora, 4)]
        {
            for size in [7, 13, 30, 70, 110] {
                let reference = reference(method, bits, size * 1_000_000_000, true);
                let reading = Reading::of(&reference);
                assert!(
                    reading.weights + reading.trained <= reference.gb * 1_000_000_000,
                    "{method:?} {size}"
                );
            }
        }
    }
}
