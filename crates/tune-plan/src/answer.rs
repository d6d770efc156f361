//! A plan with all that follows from it. Its JSON form is a stable interface, described in `docs/memory.md`.

use serde::{Deserialize, Serialize};

use crate::advice::{Question, Room, Way};
use crate::estimate::{Basis, MemoryPlan, Term};
use crate::gap::Gap;
use crate::memory::{Pool, Split};

/// Version of the JSON form. It grows when a field changes its meaning or goes; fields may be added without.
pub const SCHEMA_VERSION: u32 = 1;

/// Plan, verdict and advice.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Answer {
    /// [`SCHEMA_VERSION`].
    pub version: u32,
    /// Reference, estimate and verdict.
    #[serde(flatten)]
    pub plan: MemoryPlan,
    /// What the budget is called, where it has a name.
    pub device: Option<String>,
    /// Which memory the verdict is about.
    pub memory: Split,
    /// Budget minus need; negative where the run does not fit.
    pub margin_bytes: Option<i64>,
    /// Reference against estimate.
    pub gap: Option<Gap>,
    /// What the run writes.
    pub disk: Vec<Term>,
    /// Ways to make it fit, least harm first; none where it fits.
    pub ways: Vec<Way>,
    /// How far it can grow; nothing where it does not fit.
    pub room: Vec<Room>,
}

impl Answer {
    /// The answer to `question`.
    pub fn to(question: &Question, device: Option<String>, disk: Vec<Term>) -> Self {
        let mut answer = Self::of(question.plan(), question.pool);
        answer.ways = question.ways();
        answer.room = question.room();
        answer.device = device;
        answer.disk = disk;
        answer
    }

    /// A plan alone.
    pub fn of(plan: MemoryPlan, pool: Pool) -> Self {
        let memory = pool.split(&plan);
        let margin = plan.budget_bytes.map(|budget| {
            let margin = i128::from(budget) - i128::from(memory.needed_bytes);
            i64::try_from(margin).unwrap_or(if margin < 0 { i64::MIN } else { i64::MAX })
        });
        Self {
            version: SCHEMA_VERSION,
            device: None,
            memory,
            margin_bytes: margin,
            gap: Gap::of(&plan),
            disk: Vec::new(),
            ways: Vec::new(),
            room: Vec::new(),
            plan,
        }
    }

    /// The same beside the reference for a size label, in place of the one for the counted parameters.
    #[must_use]
    pub fn beside(mut self, reference: crate::Reference) -> Self {
        self.plan.reference = reference;
        self.gap = Gap::of(&self.plan);
        self
    }

    /// Bytes of everything that the run writes.
    pub fn disk_bytes(&self) -> u64 {
        self.disk.iter().fold(0, |sum: u64, term| sum.saturating_add(term.bytes))
    }

    /// Whether the figure is only the rule of thumb.
    pub fn is_rough(&self) -> bool {
        self.plan.estimate.basis == Basis::Reference
    }
}

impl MemoryPlan {
    /// The terms that live at the peak.
    pub fn live_terms(&self) -> Vec<&Term> {
        let phase =
            self.estimate.phases.iter().find(|phase| Some(&phase.name) == self.estimate.peak_phase.as_ref());
        let lives = |term: &&Term| phase.is_none_or(|phase| phase.terms.contains(&term.name));
        self.estimate.terms.iter().filter(lives).collect()
    }
}
