//! Every operation gives the same bits again, whatever the number of threads.

use std::sync::Arc;

use burn::tensor::{DType, Tensor};
use tune_quant::BlockType;

use crate::testing::{frozen, random, values};
use crate::{AttentionSpan, FrozenVector, FrozenWeight, RotaryTable};

/// A block of a model in miniature: every operation, forward and backward. The loss and all gradients.
fn step() -> Vec<f32> {
    const TOKENS: usize = 200;
    const D_MODEL: usize = 128;
    let weight = |rows: usize, cols: usize| frozen(BlockType::Q4_0, [rows, cols]);
    let tracked = |seed: u64, shape: [usize; 2]| random(seed, shape).autodiff().require_grad();
    let [x, a, b] = [tracked(1, [TOKENS, D_MODEL]), tracked(2, [8, D_MODEL]), tracked(3, [D_MODEL, 8])];
    let gain = FrozenVector::from(vec![0.5; D_MODEL]);
    let table = RotaryTable::new(&(0..TOKENS as u32).collect::<Vec<_>>(), &[1.0, 0.1, 0.01, 0.001], 1.0);
    let spans: Arc<[_]> = [0..150, 150..200].map(|rows| AttentionSpan { q: rows.clone(), k: rows }).into();
    let targets: Arc<[u32]> = (0..TOKENS as u32).collect();

    let normed = crate::rms_norm(x.clone(), &gain, 1e-5);
    let q = crate::lora_linear(normed.clone(), &weight(D_MODEL, D_MODEL), a.clone(), b.clone(), 0.5);
    let kv = |w: FrozenWeight| crate::frozen_linear(normed.clone(), &w);
    let (k, v) = (kv(weight(32, D_MODEL)), kv(weight(32, D_MODEL)));
    let (q, k) = (crate::rope(q, &table), crate::rope(k, &table));
    let attended = crate::causal_attention(q, k, v, spans, 8);
    let ff = crate::swiglu(
        crate::frozen_linear(attended.clone(), &weight(5000, D_MODEL)),
        crate::frozen_linear(attended, &weight(5000, D_MODEL)),
    );
    let hidden = crate::frozen_linear(ff, &frozen(BlockType::F32, [D_MODEL, 5000]));
    let loss = crate::linear_cross_entropy(
        hidden,
        &weight(5000, D_MODEL).into(),
        targets,
        0.1,
        64,
        crate::Arithmetic::F32,
    );
    let gradients = loss.backward();
    let gradient = |x: &Tensor<2>| values(x.grad(&gradients).expect("a gradient of each tracked tensor"));
    [values(loss.inner()), gradient(&x), gradient(&a), gradient(&b)].concat()
}

/// Attention in `bf16` over long and short documents, forward and backward. o and the gradient.
fn self_attention() -> Vec<f32> {
    let spans: Arc<[_]> =
        [0..700, 700..703, 703..900].map(|rows| AttentionSpan { q: rows.clone(), k: rows }).into();
    let table = RotaryTable::new(&(0..900).collect::<Vec<_>>(), &[1.0, 0.3, 0.1, 0.03], 1.0);
    let qkv = random(1, [900, 64]).cast(DType::BF16).autodiff().require_grad();
    let o = crate::bf16::self_attention(qkv.clone(), &table, spans, 4, 2);
    let gradients = (o.clone() * random(2, [900, 32]).cast(DType::BF16).autodiff()).sum().backward();
    let gradient = qkv.grad(&gradients).expect("a gradient of qkv");
    [values(o.inner()), values(gradient)].concat()
}

#[test]
fn the_same_bits_with_any_number_of_threads() {
    assert_same_bits(step);
    assert_same_bits(self_attention);
}

fn assert_same_bits(run: fn() -> Vec<f32>) {
    let with_threads = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool of threads");
        pool.install(run)
    };
    let want = with_threads(1);
    assert!(want.iter().all(|value| value.is_finite()));
    for threads in [1, 2, 3, 7] {
        let got = with_threads(threads);
        let same = got.iter().zip(&want).filter(|(got, want)| got.to_bits() == want.to_bits()).count();
        assert_eq!(same, want.len(), "equal values with {threads} threads");
    }
}
