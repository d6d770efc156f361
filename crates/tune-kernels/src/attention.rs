//! Causal attention inside spans of the token axis.
use std::ops::Range;
use std::sync::Arc;

use burn::tensor::{Bool, Tensor, activation};

/// One document: its queries and the keys they may see.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttentionSpan {
    /// Rows of `q`.
    pub q: Range<usize>,
    /// Rows of `k` and `v`.
    pub k: Range<usize>,
}

/// Causal grouped-query attention inside each span.
pub fn causal_attention(
    q: Tensor<2>,
    k: Tensor<2>,
    v: Tensor<2>,
    spans: Arc<[AttentionSpan]>,
    head_dim: usize,
) -> Tensor<2> {
    reference(q, k, v, &spans, head_dim)
}

/// The same in plain tensor operations.
pub fn reference(
    q: Tensor<2>,
    k: Tensor<2>,
    v: Tensor<2>,
    spans: &[AttentionSpan],
    head_dim: usize,
) -> Tensor<2> {
    let device = q.device();
    let (heads, kv_heads) = (q.dims()[1] / head_dim, k.dims()[1] / head_dim);
    let columns = |t: &Tensor<2>, rows: &Range<usize>, head: usize| {
        t.clone().slice([rows.clone(), head * head_dim..(head + 1) * head_dim])
    };
    let of_span = |span: &AttentionSpan| {
        let hidden_keys = span.k.len() - span.q.len();
        let future = Tensor::<2, Bool>::tril_mask([span.q.len(), span.k.len()], hidden_keys as i64, &device);
        let of_head = |head: usize| {
            let kv_head = head / (heads / kv_heads);
            let scores = columns(&q, &span.q, head).matmul(columns(&k, &span.k, kv_head).transpose());
            let scores =
                scores.div_scalar((head_dim as f32).sqrt()).mask_fill(future.clone(), f32::NEG_INFINITY);
            activation::softmax(scores, 1).matmul(columns(&v, &span.k, kv_head)) // [q_len, head_dim]
        };
        Tensor::cat((0..heads).map(of_head).collect(), 1)
    };
    Tensor::cat(spans.iter().map(of_span).collect(), 0)
}
