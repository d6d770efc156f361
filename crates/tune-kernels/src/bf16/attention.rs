//! Causal grouped-query self-attention for training, with the rotary embedding inside.
//!
//! ```text
//! Q, K rotated    S = Q Kᵀ / √head_dim    P = softmax over the visible keys of S    O = P V
//! dV = Pᵀ dO    dP = dO Vᵀ    dS = P (dP - rowsum(dO O))    dQ = dS K / √head_dim    dK = dSᵀ Q / √head_dim
//! ```
//!
//! qkv `[tokens, (heads + 2 kv_heads) · head_dim]`: the columns of all queries, all keys, all values, as they come
//! out of one projection; o `[tokens, heads · head_dim]`. Query head `h` reads key head `h / (heads / kv_heads)`.
//! A span is one document, in which a token sees itself and the tokens before it.
//!
//! Blocks of queries meet blocks of keys with a running maximum and sum, and backward forms P again from the saved
//! logarithm of each row's sum (Dao et al. 2022, arXiv 2205.14135; the order of loops of Dao 2023, arXiv
//! 2307.08691). Everything that is multiplied is `bf16`: rotated queries and keys, P and dS; softmax, all sums and
//! the rotation are `f32`. Saved: qkv and o (shared with the graph) and one `f32` per token and head.

mod backward;
mod flex;
mod forward;
mod operands;

use std::ops::Range;
use std::sync::Arc;

use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, Dispatch, backend_extension};
use burn::tensor::{DType, Tensor};

use crate::{AttentionSpan, RotaryTable};

/// Causal attention inside each span, of queries and keys that are rotated here; heads share keys and values in
/// groups.
///
/// # Shapes
/// `qkv` `bf16` `[tokens, (heads + 2 kv_heads) · head_dim]` -> `bf16` `[tokens, heads · head_dim]`. Tokens outside
/// every span give zeros.
///
/// # Panics
/// When `qkv` is not `bf16`, the shapes do not agree, or spans have other keys than their queries, overlap, are
/// out of order or out of range.
pub fn self_attention(
    qkv: Tensor<2>,
    rotary: &RotaryTable,
    spans: Arc<[AttentionSpan]>,
    heads: usize,
    kv_heads: usize,
) -> Tensor<2> {
    let [tokens, features] = qkv.dims();
    assert_eq!(qkv.dtype(), DType::BF16, "self_attention: type of qkv");
    assert!(
        kv_heads > 0 && heads > 0 && heads.is_multiple_of(kv_heads),
        "self_attention: {heads} heads in groups for {kv_heads} heads of keys"
    );
    let layout = Layout { heads, kv_heads, dim: rotary.head_dim() };
    assert!(
        layout.dim > 0 && features == layout.width(),
        "self_attention: {heads} + 2 · {kv_heads} heads of {} in qkv [{tokens}, {features}]",
        layout.dim
    );
    assert_eq!(rotary.tokens(), tokens, "self_attention: tokens of the table for qkv [{tokens}, {features}]");
    let end = spans.iter().fold(0, |end, span| {
        assert_eq!(span.q, span.k, "self_attention: keys of a span");
        assert!(
            end <= span.q.start && span.q.start <= span.q.end,
            "self_attention: {:?} after {end}",
            span.q
        );
        span.q.end
    });
    assert!(end <= tokens, "self_attention: spans up to {end} of {tokens} tokens");
    let qkv = qkv.into_dispatch();
    Tensor::from_dispatch(<Dispatch as SelfAttention>::self_attention(qkv, rotary.clone(), spans, layout))
}

/// The columns of qkv.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Layout {
    heads: usize,
    kv_heads: usize,
    dim: usize,
}

impl Layout {
    fn width(self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.dim
    }

    /// The query heads that share a key head.
    fn group(self) -> usize {
        self.heads / self.kv_heads
    }

    fn heads_of(self, kv_head: usize) -> Range<usize> {
        kv_head * self.group()..(kv_head + 1) * self.group()
    }

    fn q_column(self, head: usize) -> usize {
        head * self.dim
    }

    fn k_column(self, kv_head: usize) -> usize {
        (self.heads + kv_head) * self.dim
    }

    fn v_column(self, kv_head: usize) -> usize {
        (self.heads + self.kv_heads + kv_head) * self.dim
    }

    fn score_scale(self) -> f32 {
        1.0 / (self.dim as f32).sqrt()
    }

    /// What queries are multiplied by before they are rounded, so that scores are powers of two.
    fn query_scale(self) -> f32 {
        self.score_scale() * std::f32::consts::LOG2_E
    }
}

/// The differentiable operation.
#[backend_extension(Flex, Autodiff)]
pub(crate) trait SelfAttention: Backend {
    fn self_attention(
        qkv: FloatTensor<Self>,
        rotary: RotaryTable,
        spans: Arc<[AttentionSpan]>,
        layout: Layout,
    ) -> FloatTensor<Self>;
}

/// The kernels of one backend.
pub(crate) trait SelfAttentionKernels: Backend {
    /// o, and the logarithm to base 2 of each row's sum of exponentials, `f32` `[tokens, heads]`.
    fn forward(
        qkv: FloatTensor<Self>,
        rotary: &RotaryTable,
        spans: &[AttentionSpan],
        layout: Layout,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);
    /// The gradient of qkv.
    fn backward(saved: Saved<Self>, d_o: FloatTensor<Self>) -> FloatTensor<Self>;
}

/// What backward needs.
#[derive(Clone, Debug)]
pub(crate) struct Saved<B: Backend> {
    qkv: FloatTensor<B>,
    o: FloatTensor<B>,
    log_sums: FloatTensor<B>,
    rotary: RotaryTable,
    spans: Arc<[AttentionSpan]>,
    layout: Layout,
}

impl<B: SelfAttentionKernels, C: CheckpointStrategy> SelfAttention for Autodiff<B, C> {
    fn self_attention(
        qkv: FloatTensor<Self>,
        rotary: RotaryTable,
        spans: Arc<[AttentionSpan]>,
        layout: Layout,
    ) -> FloatTensor<Self> {
        let (qkv, node) = qkv.into_parts();
        let (o, log_sums) = B::forward(qkv.clone(), &rotary, &spans, layout);
        match SelfAttentionBackward.prepare::<C>([node]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                prep.finish(Saved { qkv, o: o.clone(), log_sums, rotary, spans, layout }, o)
            }
            OpsKind::UnTracked(prep) => prep.finish(o),
        }
    }
}

#[derive(Debug)]
struct SelfAttentionBackward;

impl<B: SelfAttentionKernels> Backward<B, 1> for SelfAttentionBackward {
    type State = Saved<B>;

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let d_o = grads.consume::<B>(&ops.node);
        let [node] = ops.parents;
        if let Some(node) = node {
            grads.register::<B>(node.id, B::backward(ops.state, d_o));
        }
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;
    use crate::testing::{random, values};
    use crate::{causal_attention, rope};

    fn document(tokens: Range<usize>) -> AttentionSpan {
        AttentionSpan { q: tokens.clone(), k: tokens }
    }

    fn documents(lengths: &[usize]) -> Arc<[AttentionSpan]> {
        let ends = lengths.iter().scan(0, |end, length| {
            *end += length;
            Some(*end)
        });
        ends.zip(lengths).map(|(end, length)| document(end - length..end)).collect()
    }

    fn layout(heads: usize, kv_heads: usize, dim: usize) -> Layout {
        Layout { heads, kv_heads, dim }
    }

    /// Positions begin anew in each document.
    fn rotary(spans: &[AttentionSpan], dim: usize) -> RotaryTable {
        let positions: Vec<u32> = spans.iter().flat_map(|span| 0..span.q.len() as u32).collect();
        let frequencies: Vec<f32> =
            (0..dim / 2).map(|j| 10_000_f32.powf(-2.0 * j as f32 / dim as f32)).collect();
        RotaryTable::new(&positions, &frequencies, 1.0)
    }

    fn halves(x: Tensor<2>) -> Tensor<2> {
        x.cast(DType::BF16)
    }

    fn floats(x: Tensor<2>) -> Vec<f32> {
        values(x.cast(DType::F32))
    }

    /// o, and the gradient of qkv for a gradient `weighting` of o.
    fn both(
        qkv: &Tensor<2>,
        weighting: &Tensor<2>,
        attention: impl Fn(Tensor<2>) -> Tensor<2>,
    ) -> [Vec<f32>; 2] {
        let qkv = qkv.clone().autodiff().require_grad();
        let o = attention(qkv.clone());
        let gradients = (o.clone() * weighting.clone().autodiff()).sum().backward();
        [floats(o.inner()), floats(qkv.grad(&gradients).expect("a gradient of qkv"))]
    }

    fn reference(
        qkv: &Tensor<2>,
        rotary: &RotaryTable,
        spans: &Arc<[AttentionSpan]>,
        l: Layout,
    ) -> Tensor<2> {
        let columns = |first: usize, heads: usize| qkv.clone().narrow(1, first, heads * l.dim);
        let (q, k) = (columns(0, l.heads), columns(l.k_column(0), l.kv_heads));
        let v = columns(l.v_column(0), l.kv_heads);
        causal_attention(rope(q, rotary), rope(k, rotary), v, spans.clone(), l.dim)
    }

    fn assert_near(what: &str, got: &[f32], want: &[f32]) {
        assert_eq!(got.len(), want.len(), "{what}: number of values");
        let largest = want.iter().fold(1e-6_f32, |a, b| a.max(b.abs()));
        let mut sum = 0.0;
        for (i, (got, want)) in got.iter().zip(want).enumerate() {
            let error = (got - want).abs() / largest;
            assert!(error <= 2e-2, "{what}[{i}]: got {got}, want {want}, largest {largest}");
            sum += error;
        }
        let mean = sum / got.len() as f32;
        assert!(mean <= 2e-3, "{what}: mean error {mean}");
    }

    fn assert_equals_the_reference(layout: Layout, lengths: &[usize]) {
        let spans = documents(lengths);
        let tokens = spans[spans.len() - 1].q.end;
        let rotary = rotary(&spans, layout.dim);
        let qkv = halves(random(1, [tokens, layout.width()]) * 2.0);
        let weighting = halves(random(2, [tokens, layout.heads * layout.dim]));
        let fast = |qkv| self_attention(qkv, &rotary, spans.clone(), layout.heads, layout.kv_heads);
        let got = both(&qkv, &weighting, fast);
        assert_eq!(floats(fast(qkv.clone())), got[0], "o without and with a graph");
        let float = |x: &Tensor<2>| x.clone().cast(DType::F32);
        let want = both(&float(&qkv), &float(&weighting), |qkv| reference(&qkv, &rotary, &spans, layout));
        let name = format!("{layout:?}, documents of {lengths:?}");
        assert_near(&format!("o of {name}"), &got[0], &want[0]);
        let part = |gradient: &[f32], columns: Range<usize>| -> Vec<f32> {
            gradient.chunks(layout.width()).flat_map(|row| row[columns.clone()].to_vec()).collect()
        };
        let (k, v) = (layout.k_column(0), layout.v_column(0));
        for (name_of, columns) in [("dq", 0..k), ("dk", k..v), ("dv", v..layout.width())] {
            let [got, want] = [&got[1], &want[1]].map(|gradient| part(gradient, columns.clone()));
            assert_near(&format!("{name_of} of {name}"), &got, &want);
        }
    }

    #[test]
    fn equals_the_reference() {
        assert_equals_the_reference(layout(1, 1, 2), &[1]);
        assert_equals_the_reference(layout(4, 2, 8), &[5]);
        assert_equals_the_reference(layout(3, 3, 6), &[70]);
        assert_equals_the_reference(layout(6, 2, 16), &[3, 37, 1, 200, 0, 2]);
        assert_equals_the_reference(layout(9, 3, 64), &[256]);
        assert_equals_the_reference(layout(2, 1, 128), &[130]);
        assert_equals_the_reference(layout(2, 2, 80), &[33, 64]);
        assert_equals_the_reference(layout(2, 1, 96), &[97]);
    }

    #[test]
    fn documents_of_several_tasks() {
        assert_equals_the_reference(layout(3, 1, 64), &[603]);
        assert_equals_the_reference(layout(2, 2, 32), &[1, 1500]);
    }

    #[test]
    fn packed_documents_are_as_if_alone() {
        let l = layout(4, 2, 16);
        let spans = documents(&[20, 1, 301, 50]);
        let qkv = halves(random(1, [372, l.width()]));
        let weighting = halves(random(2, [372, 64]));
        let table = rotary(&spans, l.dim);
        let run =
            |qkv: &Tensor<2>, weighting: &Tensor<2>, table: &RotaryTable, spans: Arc<[AttentionSpan]>| {
                both(qkv, weighting, |qkv| self_attention(qkv, table, spans.clone(), l.heads, l.kv_heads))
            };
        let [o, gradient] = run(&qkv, &weighting, &table, spans.clone());
        for span in spans.iter() {
            let rows = |t: &Tensor<2>| t.clone().narrow(0, span.q.start, span.q.len());
            let alone = documents(&[span.q.len()]);
            let want = run(&rows(&qkv), &rows(&weighting), &rotary(&alone, l.dim), alone);
            assert_eq!(o[span.q.start * 64..span.q.end * 64], want[0], "o of {span:?}");
            assert_eq!(
                gradient[span.q.start * l.width()..span.q.end * l.width()],
                want[1],
                "gradient of {span:?}"
            );
        }
    }

    #[test]
    fn a_later_token_changes_nothing_before_it() {
        let l = layout(2, 1, 16);
        let spans = documents(&[270]);
        let table = rotary(&spans, l.dim);
        let run = |qkv| floats(self_attention(qkv, &table, spans.clone(), l.heads, l.kv_heads));
        let qkv = random(1, [270, l.width()]);
        let before = run(halves(qkv.clone()));
        for token in [269, 200, 31] {
            let change = random(4, [270 - token, l.width()]) * 100.0;
            let after = run(halves(qkv.clone().slice_assign([token..270, 0..l.width()], change)));
            assert_eq!(before[..token * 32], after[..token * 32]);
            assert_ne!(before[token * 32..], after[token * 32..]);
        }
    }

    #[test]
    fn tokens_outside_every_span_give_zeros_and_get_no_gradient() {
        let l = layout(2, 1, 4);
        let spans: Arc<[_]> = [document(2..5), document(7..9)].into();
        let table = RotaryTable::new(&[0; 10], &[1.0, 0.1], 1.0);
        let (qkv, weighting) = (halves(random(1, [10, 16])), halves(random(2, [10, 8])));
        let [o, gradient] =
            both(&qkv, &weighting, |qkv| self_attention(qkv, &table, spans.clone(), l.heads, l.kv_heads));
        for row in 0..10 {
            let covered = spans.iter().any(|span| span.q.contains(&row));
            assert_eq!(o[row * 8..(row + 1) * 8] == [0.0; 8], !covered, "row {row} of o");
            assert_eq!(
                gradient[row * 16..(row + 1) * 16] == [0.0; 16],
                !covered,
                "row {row} of the gradient"
            );
        }
    }

    #[test]
    fn large_scores_stay_finite() {
        let l = layout(2, 1, 8);
        let spans = documents(&[300]);
        let table = rotary(&spans, l.dim);
        let (qkv, weighting) = (halves(random(1, [300, 32]) * 300.0), halves(random(2, [300, 16])));
        let all =
            both(&qkv, &weighting, |qkv| self_attention(qkv, &table, spans.clone(), l.heads, l.kv_heads));
        assert!(all.iter().flatten().all(|value| value.is_finite()));
    }

    #[test]
    fn no_tokens() {
        let qkv = Tensor::empty([0, 32], (&Device::flex(), DType::BF16));
        let o = self_attention(qkv, &RotaryTable::new(&[], &[1.0; 4], 1.0), [].into(), 2, 1);
        assert_eq!(o.dims(), [0, 16]);
    }

    #[test]
    #[should_panic(expected = "keys of a span")]
    fn other_keys_than_queries_are_refused() {
        let span = AttentionSpan { q: 0..2, k: 0..4 };
        let qkv = halves(random(1, [4, 12]));
        self_attention(qkv, &RotaryTable::new(&[0; 4], &[1.0, 1.0], 1.0), [span].into(), 1, 1);
    }
}
