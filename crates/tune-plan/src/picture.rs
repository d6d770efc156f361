//! The phases of a plan as bars of letters, which need no colour to be read.

use crate::estimate::{MemoryPlan, Term};
use crate::memory::{Pool, host_bytes, is_on_host};

/// What a stretch of a bar stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Base or trained weights.
    Weights,
    /// Adapters.
    Adapters,
    /// Moments.
    Optimizer,
    /// Gradients.
    Gradients,
    /// What blocks keep for backward.
    Kept,
    /// What one block needs while it runs.
    Block,
    /// Logits and what belongs to them.
    Loss,
    /// Program, tokenizer, scratch.
    Process,
    /// Room in the allocator.
    Unused,
}

impl Part {
    /// All parts in the order of a bar.
    pub const ALL: [Self; 9] = [
        Self::Weights,
        Self::Adapters,
        Self::Optimizer,
        Self::Gradients,
        Self::Kept,
        Self::Block,
        Self::Loss,
        Self::Process,
        Self::Unused,
    ];

    /// The part that a term belongs to.
    pub fn of(term: &str) -> Self {
        match term {
            "adapters" | "trained weights" => Self::Adapters,
            name if name.contains("optimizer") || name.contains("moments") => Self::Optimizer,
            "block gradients" => Self::Block,
            "gradient of the head" | "gradients of the loss" => Self::Loss,
            name if name.starts_with("gradients") => Self::Gradients,
            name if name.contains("logits") || name.contains("loss") => Self::Loss,
            "block inputs" | "activations" => Self::Kept,
            name if name.contains("block") || name.contains("activations") => Self::Block,
            name if name.contains("weights") && !name.contains("decoded") => Self::Weights,
            _ => Self::Process,
        }
    }

    /// Its letter.
    pub fn letter(self) -> char {
        match self {
            Self::Weights => 'W',
            Self::Adapters => 'A',
            Self::Optimizer => 'O',
            Self::Gradients => 'G',
            Self::Kept => 'K',
            Self::Block => 'B',
            Self::Loss => 'L',
            Self::Process => 'P',
            Self::Unused => '+',
        }
    }

    /// Its colour, red, green and blue: neighbours in a bar differ in hue and in lightness.
    pub fn colour(self) -> [u8; 3] {
        match self {
            Self::Weights => [0x3b, 0x6f, 0xb6],
            Self::Adapters => [0x2a, 0x9d, 0x8f],
            Self::Optimizer => [0x7b, 0xc8, 0x9c],
            Self::Gradients => [0xb5, 0xcf, 0x5b],
            Self::Kept => [0xf2, 0xc1, 0x4e],
            Self::Block => [0xf0, 0x8a, 0x4b],
            Self::Loss => [0xd1, 0x49, 0x5b],
            Self::Process => [0x8d, 0x6a, 0x9f],
            Self::Unused => [0xb8, 0xb8, 0xc0],
        }
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Weights => "weights",
            Self::Adapters => "adapters",
            Self::Optimizer => "optimizer",
            Self::Gradients => "gradients",
            Self::Kept => "kept for backward",
            Self::Block => "one block",
            Self::Loss => "loss",
            Self::Process => "program",
            Self::Unused => "unused room",
        }
    }
}

/// One phase as a bar.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bar {
    /// `load`, `loss`, `block` or `step`.
    pub phase: String,
    /// Bytes of the phase in the memory that the budget is.
    pub bytes: u64,
    /// Bytes by part, in the order of [`Part::ALL`], without those that are not there.
    pub parts: Vec<(Part, u64)>,
}

/// The bars of a plan.
pub fn bars(plan: &MemoryPlan, pool: Pool) -> Vec<Bar> {
    let of_phase = |phase: &crate::PhaseBytes| {
        let lives =
            |term: &&Term| phase.terms.contains(&term.name) && !(pool == Pool::Device && is_on_host(term));
        let terms: Vec<&Term> = plan.estimate.terms.iter().filter(lives).collect();
        let on_host: u64 = match pool {
            Pool::Shared => 0,
            Pool::Device => host_bytes(&plan.estimate, phase),
        };
        let bytes = phase.bytes.saturating_sub(on_host);
        let sum = |part| {
            let terms = terms.iter().filter(|term| Part::of(&term.name) == part);
            terms.fold(0, |sum: u64, term| sum.saturating_add(term.bytes))
        };
        let mut parts: Vec<_> = Part::ALL.map(|part| (part, sum(part))).into();
        let named = parts.iter().fold(0, |sum: u64, (_, bytes)| sum.saturating_add(*bytes));
        parts.push((Part::Unused, bytes.saturating_sub(named)));
        parts.retain(|(_, bytes)| *bytes > 0);
        Bar { phase: phase.name.clone().into_owned(), bytes, parts }
    };
    // Reading the tokenizer takes nothing of a device.
    plan.estimate.phases.iter().map(of_phase).filter(|bar| bar.bytes > 0).collect()
}

impl Bar {
    /// What goes on in the phase.
    pub fn title(&self) -> &'static str {
        match &*self.phase {
            "load" => "reading the tokenizer",
            "loss" => "loss",
            "block" => "backward of a block",
            _ => "optimizer step",
        }
    }

    /// Columns of each part where `full` bytes are `width` columns wide. Together they are as many as the whole bar,
    /// rounded once; a part below half a column may have none.
    pub fn columns(&self, full: u64, width: usize) -> Vec<(Part, usize)> {
        let column =
            |bytes: u128| ((bytes * width as u128 + u128::from(full) / 2) / u128::from(full.max(1))) as usize;
        let (mut sum, mut at) = (0u128, 0);
        let columns = self.parts.iter().map(|(part, bytes)| {
            sum += u128::from(*bytes);
            let end = column(sum).min(width);
            let wide = end.saturating_sub(at);
            at = end;
            (*part, wide)
        });
        columns.filter(|(_, wide)| *wide > 0).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_add_up_and_stay_inside() {
        let bar = Bar {
            phase: "loss".into(),
            bytes: 100,
            parts: vec![(Part::Weights, 60), (Part::Loss, 3), (Part::Process, 37)],
        };
        let columns = bar.columns(200, 40);
        assert_eq!(columns, [(Part::Weights, 12), (Part::Loss, 1), (Part::Process, 7)]);
        for width in 0..50 {
            let sum: usize = bar.columns(100, width).iter().map(|(_, wide)| wide).sum();
            assert_eq!(sum, width);
            assert!(bar.columns(10, width).iter().map(|(_, wide)| wide).sum::<usize>() <= width);
        }
        assert!(bar.columns(0, 10).len() <= 3);
    }
}
