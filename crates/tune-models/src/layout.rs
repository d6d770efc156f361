//! Where the documents of a forward pass lie on the token axis.

use std::ops::Range;
use std::sync::Arc;

use tune_kernels::AttentionSpan;

/// Positions and attention spans of the tokens of one forward pass.
#[derive(Clone, Debug)]
pub struct Layout {
    /// Position of each token in its own document; restarts at 0 in each.
    pub positions: Vec<u32>,
    /// Which keys each query sees.
    pub spans: Arc<[AttentionSpan]>,
}

impl Layout {
    /// Documents side by side: each attends to itself only.
    pub fn documents(documents: &[Range<usize>]) -> Self {
        let positions = documents.iter().flat_map(|d| 0..d.len() as u32).collect();
        let spans = documents.iter().map(|d| AttentionSpan { q: d.clone(), k: d.clone() }).collect();
        Self { positions, spans }
    }

    /// `new` tokens after `past` cached ones of a single document.
    pub fn continuation(past: usize, new: usize) -> Self {
        let span = AttentionSpan { q: 0..new, k: 0..past + new };
        Self { positions: (past as u32..(past + new) as u32).collect(), spans: Arc::from([span]) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_restart_in_each_document() {
        let layout = Layout::documents(&[0..3, 3..5]);
        assert_eq!(layout.positions, [0, 1, 2, 0, 1]);
        assert_eq!(layout.spans.len(), 2);
        assert_eq!(layout.spans[1].q, 3..5);
        assert_eq!(layout.spans[1].k, 3..5);
    }

    #[test]
    fn a_continuation_sees_the_cached_tokens() {
        let layout = Layout::continuation(4, 2);
        assert_eq!(layout.positions, [4, 5]);
        assert_eq!((layout.spans[0].q.clone(), layout.spans[0].k.clone()), (0..2, 0..6));
    }
}
