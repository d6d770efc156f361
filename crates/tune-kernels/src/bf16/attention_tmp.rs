use std::sync::Arc;
use burn::tensor::{DType, Tensor};
use crate::{AttentionSpan, RotaryTable};
pub fn self_attention(qkv: Tensor<2>, rotary: &RotaryTable, spans: Arc<[AttentionSpan]>, heads: usize, kv_heads: usize) -> Tensor<2> {
    let d = rotary.head_dim();
    let qkv = qkv.cast(DType::F32);
    let part = |first: usize, n: usize| qkv.clone().narrow(1, first * d, n * d);
    let (q, k, v) = (part(0, heads), part(heads, kv_heads), part(heads + kv_heads, kv_heads));
    crate::causal_attention(crate::rope(q, rotary), crate::rope(k, rotary), v, spans, d).cast(DType::BF16)
}
