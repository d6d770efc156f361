//! Where the bytes of a run lie: in one memory, or on both sides of a bus.

use serde::{Deserialize, Serialize};

use crate::estimate::{Estimate, MemoryPlan, PhaseBytes, Term, permille};

/// Which memory a budget is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Pool {
    /// One memory for everything: the CPU backend, and Apple's unified memory.
    #[default]
    Shared,
    /// The memory of a graphics card, beside that of the host.
    Device,
}

/// Half-width of the range around what lies on a card, in thousandths: nothing was measured there yet.
const DEVICE_MARGIN_PERMILLE: u64 = 50;

/// What lies in which memory at the peak.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Split {
    /// Which memory the budget is.
    pub pool: Pool,
    /// Upper end of what the budget is compared with.
    pub needed_bytes: u64,
    /// On the host beside a device; 0 where there is one memory.
    pub host_bytes: u64,
}

impl Pool {
    /// Where the parts of `plan` lie.
    pub fn split(self, plan: &MemoryPlan) -> Split {
        let estimate = &plan.estimate;
        match self {
            Self::Shared => Split { pool: self, needed_bytes: estimate.upper_bytes, host_bytes: 0 },
            Self::Device => {
                let peak =
                    estimate.phases.iter().find(|phase| Some(&phase.name) == estimate.peak_phase.as_ref());
                let host = peak.map_or(0, |peak| host_bytes(estimate, peak));
                let on_device = estimate.peak_bytes.saturating_sub(host);
                let margin = permille(on_device, DEVICE_MARGIN_PERMILLE)
                    .max(estimate.upper_bytes - estimate.peak_bytes);
                Split { pool: self, needed_bytes: on_device.saturating_add(margin), host_bytes: host }
            }
        }
    }

    /// Upper end of what the budget is compared with.
    pub fn needed_bytes(self, plan: &MemoryPlan) -> u64 {
        self.split(plan).needed_bytes
    }
}

/// Beside a device, the program with its tokenizer and rows stays on the host.
const HOST: [&str; 4] = ["process", "tokenizer", "tokenizer while read", "rows"];

/// What of a phase lies on the host where there is a device.
pub(crate) fn host_bytes(estimate: &Estimate, phase: &PhaseBytes) -> u64 {
    let terms = estimate.terms.iter().filter(|term| is_on_host(term) && phase.terms.contains(&term.name));
    terms.fold(0, |sum: u64, term| sum.saturating_add(term.bytes))
}

/// Whether a term lies on the host where there is a device.
pub fn is_on_host(term: &Term) -> bool {
    HOST.contains(&&*term.name)
}
