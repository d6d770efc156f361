//! Causal grouped-query attention inside spans of the token axis, without a matrix of all scores.
//!
//! ```text
//! S = Q Kᵀ / √head_dim     P = softmax over the visible keys of S     O = P V
//! dV = Pᵀ dO    dP = dO Vᵀ    dS = P (dP - rowsum(dO O))    dQ = dS K / √head_dim    dK = dSᵀ Q / √head_dim
//! ```
//!
//! q, o `[tokens, heads · head_dim]`; k, v `[key tokens, kv_heads · head_dim]`; query head `h` reads key head
//! `h / (heads / kv_heads)`. A span is one document: its queries are the last of its keys, so query `i` sees
//! keys `0 ..= key_len - query_len + i`. In training both ranges of a span are the same; in generation the keys
//! come from a cache and are more.
//!
//! Blocks of queries meet blocks of keys with a running maximum and sum, and backward forms P again from the
//! saved logarithm of each row's sum (Dao et al. 2022, arXiv 2205.14135, algorithms 1 and 4), so memory does not
//! grow with the square of the length. Saved: q, k, v, o (shared with the graph) and one value per token and head.

mod flex;

use std::ops::Range;
use std::sync::Arc;

use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, Dispatch, backend_extension};
use burn::tensor::{Bool, Tensor, activation};

pub(crate) use flex::clear_uncovered;

/// One document: its queries, and the keys that they may see. The queries are the last of the keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttentionSpan {
    /// Rows of `q`.
    pub q: Range<usize>,
    /// Rows of `k` and `v`, at least as many.
    pub k: Range<usize>,
}

/// Causal attention inside each span; heads share keys and values in groups.
///
/// # Shapes
/// `q` `[tokens, heads · head_dim]`, `k` and `v` `[key tokens, kv_heads · head_dim]` ->
/// `[tokens, heads · head_dim]`. Tokens outside every span give zeros.
///
/// # Panics
/// When the shapes do not agree, or spans overlap, are out of order or out of range, or have fewer keys than
/// queries.
pub fn causal_attention(
    q: Tensor<2>,
    k: Tensor<2>,
    v: Tensor<2>,
    spans: Arc<[AttentionSpan]>,
    head_dim: usize,
) -> Tensor<2> {
    let ([tokens, q_features], [key_tokens, k_features]) = (q.dims(), k.dims());
    assert_eq!(k.dims(), v.dims(), "causal_attention: shapes of k and v");
    assert!(
        head_dim > 0 && k_features > 0 && k_features.is_multiple_of(head_dim),
        "causal_attention: heads of {head_dim} in k [{key_tokens}, {k_features}]"
    );
    assert!(
        q_features.is_multiple_of(k_features),
        "causal_attention: q [{tokens}, {q_features}] in groups for k [{key_tokens}, {k_features}]"
    );
    assert_in_order(spans.iter().map(|span| &span.q), tokens, "queries");
    assert_in_order(spans.iter().map(|span| &span.k), key_tokens, "keys");
    for span in spans.iter() {
        assert!(span.q.len() <= span.k.len(), "causal_attention: {span:?} has fewer keys than queries");
    }
    let heads = Heads { q: q_features / head_dim, kv: k_features / head_dim, dim: head_dim };
    let (q, k, v) = (q.into_dispatch(), k.into_dispatch(), v.into_dispatch());
    Tensor::from_dispatch(<Dispatch as CausalAttention>::causal_attention(q, k, v, spans, heads))
}

fn assert_in_order<'a>(ranges: impl Iterator<Item = &'a Range<usize>>, len: usize, what: &str) {
    let end = ranges.fold(0, |end, range| {
        assert!(
            end <= range.start && range.start <= range.end,
            "causal_attention: {what} {range:?} after {end}"
        );
        range.end
    });
    assert!(end <= len, "causal_attention: {what} up to {end} of {len}");
}

/// [`causal_attention`] in plain tensor operations, for spans that cover every query. One `[queries, keys]`
/// matrix for each head.
pub fn reference(
    q: &Tensor<2>,
    k: &Tensor<2>,
    v: &Tensor<2>,
    spans: &[AttentionSpan],
    head_dim: usize,
) -> Tensor<2> {
    let device = q.device();
    let (heads, kv_heads) = (q.dims()[1] / head_dim, k.dims()[1] / head_dim);
    let columns = |t: &Tensor<2>, rows: &Range<usize>, head: usize| {
        t.clone().slice([rows.clone(), head * head_dim..(head + 1) * head_dim])
    };
    let of_span = |span: &AttentionSpan| {
        let earlier_keys = (span.k.len() - span.q.len()) as i64;
        let future = Tensor::<2, Bool>::tril_mask([span.q.len(), span.k.len()], earlier_keys, &device);
        let of_head = |head: usize| {
            let kv_head = head / (heads / kv_heads);
            let scores = columns(q, &span.q, head).matmul(columns(k, &span.k, kv_head).transpose());
            let scores = scores.div_scalar((head_dim as f32).sqrt()); // [queries, keys]
            let scores = scores.mask_fill(future.clone(), f32::NEG_INFINITY);
            activation::softmax(scores, 1).matmul(columns(v, &span.k, kv_head)) // [queries, head_dim]
        };
        Tensor::cat((0..heads).map(of_head).collect(), 1)
    };
    Tensor::cat(spans.iter().map(of_span).collect(), 0)
}

/// How the features of q, k and v divide into heads.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Heads {
    q: usize,
    kv: usize,
    dim: usize,
}

impl Heads {
    /// The key head that query head `head` reads.
    fn kv_of(self, head: usize) -> usize {
        head / (self.q / self.kv)
    }

    fn score_scale(self) -> f32 {
        1.0 / (self.dim as f32).sqrt()
    }
}

/// The differentiable operation.
#[backend_extension(Flex, Autodiff)]
pub(crate) trait CausalAttention: Backend {
    fn causal_attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        spans: Arc<[AttentionSpan]>,
        heads: Heads,
    ) -> FloatTensor<Self>;
}

/// The kernels of one backend.
pub(crate) trait CausalAttentionKernels: Backend {
    /// o, and the logarithm of each row's sum of exponentials, `[tokens, heads]`.
    fn forward(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        spans: &[AttentionSpan],
        heads: Heads,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);
    /// dq, dk and dv.
    fn backward(saved: Saved<Self>, d_o: FloatTensor<Self>) -> [FloatTensor<Self>; 3];
}

/// What backward needs.
#[derive(Clone, Debug)]
pub(crate) struct Saved<B: Backend> {
    q: FloatTensor<B>,
    k: FloatTensor<B>,
    v: FloatTensor<B>,
    o: FloatTensor<B>,
    log_sums: FloatTensor<B>,
    spans: Arc<[AttentionSpan]>,
    heads: Heads,
}

impl<B: CausalAttentionKernels, C: CheckpointStrategy> CausalAttention for Autodiff<B, C> {
    fn causal_attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        spans: Arc<[AttentionSpan]>,
        heads: Heads,
    ) -> FloatTensor<Self> {
        let (q, q_node) = q.into_parts();
        let (k, k_node) = k.into_parts();
        let (v, v_node) = v.into_parts();
        let (o, log_sums) = B::forward(q.clone(), k.clone(), v.clone(), &spans, heads);
        match CausalAttentionBackward.prepare::<C>([q_node, k_node, v_node]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish(Saved { q, k, v, o: o.clone(), log_sums, spans, heads }, o),
            OpsKind::UnTracked(prep) => prep.finish(o),
        }
    }
}

#[derive(Debug)]
struct CausalAttentionBackward;

impl<B: CausalAttentionKernels> Backward<B, 3> for CausalAttentionBackward {
    type State = Saved<B>;

    fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, _: &mut Checkpointer) {
        let d_o = grads.consume::<B>(&ops.node);
        for (node, gradient) in ops.parents.into_iter().zip(B::backward(ops.state, d_o)) {
            if let Some(node) = node {
                grads.register::<B>(node.id, gradient);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, assert_gradients, random, values};

    fn document(tokens: Range<usize>) -> AttentionSpan {
        AttentionSpan { q: tokens.clone(), k: tokens }
    }

    fn assert_equals_the_reference(heads: Heads, spans: &[AttentionSpan]) {
        let (tokens, key_tokens) = (spans[spans.len() - 1].q.end, spans[spans.len() - 1].k.end);
        let spans: Arc<[AttentionSpan]> = spans.into();
        let k_shape = [key_tokens, heads.kv * heads.dim];
        assert_gradients(
            &[random(1, [tokens, heads.q * heads.dim]) * 3.0, random(2, k_shape) * 3.0, random(3, k_shape)],
            |x| causal_attention(x[0].clone(), x[1].clone(), x[2].clone(), spans.clone(), heads.dim),
            |x| reference(&x[0], &x[1], &x[2], &spans, heads.dim),
        );
    }

    #[test]
    fn equals_the_reference() {
        let heads = |q, kv, dim| Heads { q, kv, dim };
        assert_equals_the_reference(heads(1, 1, 1), &[document(0..1)]);
        assert_equals_the_reference(heads(4, 2, 8), &[document(0..5)]);
        assert_equals_the_reference(heads(3, 3, 5), &[document(0..70)]);
        assert_equals_the_reference(heads(6, 2, 16), &[document(0..3), document(3..40), document(40..41)]);
    }

    #[test]
    fn documents_longer_than_a_block_of_keys() {
        assert_equals_the_reference(Heads { q: 2, kv: 1, dim: 8 }, &[document(0..300), document(300..700)]);
    }

    #[test]
    fn fewer_queries_than_keys() {
        let heads = Heads { q: 4, kv: 2, dim: 8 };
        for (queries, keys) in [(1, 2), (1, 600), (7, 300), (100, 400)] {
            assert_equals_the_reference(heads, &[AttentionSpan { q: 0..queries, k: 0..keys }]);
        }
        let cached = AttentionSpan { q: 0..3, k: 0..10 };
        assert_equals_the_reference(heads, &[cached, AttentionSpan { q: 3..4, k: 10..15 }]);
    }

    #[test]
    fn packed_documents_are_as_if_alone() {
        let (q, k, v) = (random(1, [90, 24]), random(2, [90, 8]), random(3, [90, 8]));
        let packed: Arc<[_]> = [document(0..20), document(20..21), document(21..90)].into();
        let got = causal_attention(q.clone(), k.clone(), v.clone(), packed.clone(), 8);
        for span in packed.iter() {
            let rows = |t: &Tensor<2>| t.clone().narrow(0, span.q.start, span.q.len());
            let alone: Arc<[_]> = [document(0..span.q.len())].into();
            let want = causal_attention(rows(&q), rows(&k), rows(&v), alone, 8);
            assert_eq!(values(rows(&got)), values(want), "{span:?}");
        }
    }

    #[test]
    fn a_later_token_changes_nothing_before_it() {
        let (q, k, v) = (random(1, [70, 16]), random(2, [70, 16]), random(3, [70, 16]));
        let spans: Arc<[_]> = [document(0..70)].into();
        let before = causal_attention(q.clone(), k.clone(), v.clone(), spans.clone(), 8);
        let change = |t: Tensor<2>| t.slice_assign([69..70, 0..16], random(4, [1, 16]) * 100.0);
        let after = causal_attention(q, change(k), change(v), spans, 8);
        assert_eq!(values(before.clone().narrow(0, 0, 69)), values(after.clone().narrow(0, 0, 69)));
        assert_ne!(values(before.narrow(0, 69, 1)), values(after.narrow(0, 69, 1)));
    }

    #[test]
    fn tokens_outside_every_span_give_zeros_and_get_no_gradient() {
        let spans: Arc<[_]> = [document(2..5), document(7..9)].into();
        let inputs =
            [random(1, [10, 8]), random(2, [10, 8]), random(3, [10, 8])].map(|x| x.autodiff().require_grad());
        let [q, k, v] = inputs.clone();
        let o = causal_attention(q, k, v, spans, 4);
        let gradients = o.clone().sum().backward();
        let gradients = inputs.map(|x| values(x.grad(&gradients).expect("a gradient of each input")));
        for (i, row) in [0, 1, 5, 6, 9].into_iter().map(|row| (row, row * 8..(row + 1) * 8)) {
            assert_eq!(values(o.clone().inner())[row.clone()], [0.0; 8], "row {i} of o");
            assert!(gradients.iter().all(|g| g[row.clone()] == [0.0; 8]), "row {i} of the gradients");
        }
    }

    #[test]
    fn large_scores_stay_finite() {
        let (q, k, v) = (random(1, [40, 8]) * 300.0, random(2, [40, 8]) * 300.0, random(3, [40, 8]));
        let spans: Arc<[_]> = [document(0..40)].into();
        let got = values(causal_attention(q.clone(), k.clone(), v.clone(), spans.clone(), 8));
        assert_close("output", &got, &values(reference(&q, &k, &v, &spans, 8)), 1e-4);
    }

    #[test]
    #[should_panic(expected = "keys 4..8 after 6")]
    fn overlapping_spans_are_refused() {
        let x = random(1, [8, 8]);
        let spans = [AttentionSpan { q: 0..4, k: 0..6 }, document(4..8)].into();
        causal_attention(x.clone(), x.clone(), x, spans, 8);
    }

    #[test]
    #[should_panic(expected = "fewer keys than queries")]
    fn more_queries_than_keys_are_refused() {
        let x = random(1, [8, 8]);
        causal_attention(x.clone(), x.clone(), x, [AttentionSpan { q: 0..4, k: 0..3 }].into(), 8);
    }
}
