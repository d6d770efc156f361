//! Every operation at the shapes of SmolLM2-135M: this crate in `bf16` and in `f32`, and burn's plain tensor
//! operations, forward with its backward. Criterion's `Gelem/s` are useful GFLOP/s of all cores: compare with the
//! register peak that `tune bench peak` prints.
//!
//! `cargo bench -p tune-kernels --bench operations -- [FILTER] [--quick]`

#![allow(missing_docs)]

use std::hint::black_box;
use std::sync::Arc;

use burn::tensor::{DType, Device, Distribution, Gradients, Tensor};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use tune_kernels::bf16::{Input, Layer, project, projection_reference, self_attention};
use tune_kernels::{
    Arithmetic, AttentionSpan, FrozenVector, FrozenWeight, RotaryTable, Weight, attention, causal_attention,
    frozen_linear, linear_cross_entropy, lora_linear, rms_norm, rope, swiglu,
};
use tune_quant::{BlockType, RowOrder, StoredMatrix};

const TOKENS: usize = 512;
const D_MODEL: usize = 576;
const D_FF: usize = 1536;
const KV: usize = 192;
const VOCAB: usize = 49152;
const HEAD_DIM: usize = 64;
const RANK: usize = 16;

/// Forward and for the gradient of x over the frozen weight; over A and B also for their own gradients.
fn projection_flop(d_in: usize, d_outs: &[usize]) -> u64 {
    let of_layer = |d_out: usize| 4 * d_in * d_out + 6 * RANK * (d_in + d_out);
    (TOKENS * d_outs.iter().map(|d_out| of_layer(*d_out)).sum::<usize>()) as u64
}

fn projections(criterion: &mut Criterion) {
    for block_type in [BlockType::Q4_1, BlockType::Q4_0, BlockType::Q8_0, BlockType::BF16] {
        let mut group = criterion.benchmark_group(format!("projection {}", block_type.name()));
        for (name, d_in, d_outs) in
            [("qkv", D_MODEL, &[D_MODEL, KV, KV][..]), ("gate up", D_MODEL, &[D_FF, D_FF])]
        {
            let layers: Vec<Layer> = d_outs.iter().map(|d_out| layer(block_type, *d_out, d_in)).collect();
            let gain = FrozenVector::from(vec![1.0; d_in]);
            let normed = |x: &Tensor<2>| Input::Norm { x: x.clone(), gain: gain.clone().into(), eps: 1e-5 };
            let x = [random([TOKENS, d_in])];
            group.throughput(Throughput::Elements(projection_flop(d_in, d_outs)));
            group.bench_function(BenchmarkId::new("bf16", name), |b| {
                b.iter(|| both_ways(&x, |x| project(normed(&x[0]), &layers, None)));
            });
            group.bench_function(BenchmarkId::new("f32", name), |b| {
                b.iter(|| {
                    both_ways(&x, |x| {
                        let u = rms_norm(x[0].clone(), &gain, 1e-5);
                        Tensor::cat(layers.iter().map(|layer| plain_layer(&u, layer)).collect(), 1)
                    })
                });
            });
            group.bench_function(BenchmarkId::new("burn", name), |b| {
                b.iter(|| both_ways(&x, |x| projection_reference(normed(&x[0]), &layers, None)));
            });
        }
        let layers = [layer(block_type, D_MODEL, D_FF)];
        let (gate_up, residual) = (random([TOKENS, 2 * D_FF]), random([TOKENS, D_MODEL]));
        let halves = [gate_up.clone().cast(DType::BF16)];
        let floats = [gate_up];
        group.throughput(Throughput::Elements(projection_flop(D_FF, &[D_MODEL])));
        group.bench_function(BenchmarkId::new("bf16", "down"), |b| {
            b.iter(|| {
                both_ways(&halves, |x| project(Input::SwiGlu(x[0].clone()), &layers, Some(residual.clone())))
            });
        });
        group.bench_function(BenchmarkId::new("f32", "down"), |b| {
            b.iter(|| {
                both_ways(&floats, |x| {
                    let [gate, up] = [0, D_FF].map(|first| x[0].clone().narrow(1, first, D_FF));
                    plain_layer(&swiglu(gate, up), &layers[0]) + residual.clone().autodiff()
                })
            });
        });
        group.bench_function(BenchmarkId::new("burn", "down"), |b| {
            b.iter(|| {
                both_ways(&floats, |x| {
                    let residual = residual.clone().autodiff();
                    projection_reference(Input::SwiGlu(x[0].clone()), &layers, Some(residual))
                })
            });
        });
        group.finish();
    }
}

fn attentions(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("attention");
    for tokens in [512, 2048] {
        let spans: Arc<[_]> = [AttentionSpan { q: 0..tokens, k: 0..tokens }].into();
        let table = rotary(tokens);
        let qkv = [random([tokens, D_MODEL + 2 * KV])];
        let halves = [qkv[0].clone().cast(DType::BF16)];
        let parts = |qkv: &Tensor<2>| {
            let part = |first, width| qkv.clone().narrow(1, first, width);
            let (q, k, v) = (part(0, D_MODEL), part(D_MODEL, KV), part(D_MODEL + KV, KV));
            (rope(q, &table), rope(k, &table), v)
        };
        // two products forward and twice that backward, half of each behind the mask
        group.throughput(Throughput::Elements((3 * 2 * tokens * tokens * D_MODEL) as u64));
        group.bench_function(BenchmarkId::new("bf16", tokens), |b| {
            let (heads, kv_heads) = (D_MODEL / HEAD_DIM, KV / HEAD_DIM);
            b.iter(|| {
                both_ways(&halves, |x| self_attention(x[0].clone(), &table, spans.clone(), heads, kv_heads))
            });
        });
        group.bench_function(BenchmarkId::new("f32", tokens), |b| {
            b.iter(|| {
                both_ways(&qkv, |x| {
                    let (q, k, v) = parts(&x[0]);
                    causal_attention(q, k, v, spans.clone(), HEAD_DIM)
                })
            });
        });
        group.bench_function(BenchmarkId::new("burn", tokens), |b| {
            b.iter(|| {
                both_ways(&qkv, |x| {
                    let (q, k, v) = parts(&x[0]);
                    attention::reference(&q, &k, &v, &spans, HEAD_DIM)
                })
            });
        });
    }
    group.finish();
}

fn losses(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("loss");
    let head = weight(BlockType::Q8_0, VOCAB, D_MODEL);
    let targets: Arc<[u32]> = (0..TOKENS as u32).map(|t| t * 17).collect();
    let x = [random([TOKENS, D_MODEL])];
    group.throughput(Throughput::Elements((4 * TOKENS * VOCAB * D_MODEL) as u64));
    for (name, arithmetic, chunk) in [("bf16", Arithmetic::Bf16, 256), ("f32", Arithmetic::F32, 128)] {
        group.bench_function(name, |b| {
            b.iter(|| {
                both_ways(&x, |x| {
                    let targets = targets.clone();
                    linear_cross_entropy(x[0].clone(), &head.clone().into(), targets, 1.0, chunk, arithmetic)
                        .reshape([1, 1])
                })
            });
        });
    }
    group.bench_function("burn", |b| {
        b.iter(|| {
            both_ways(&x, |x| {
                tune_kernels::linear_cross_entropy::reference(x[0].clone(), &head, &targets)
                    .sum()
                    .reshape([1, 1])
            })
        });
    });
    group.finish();
}

/// One token of generation: every weight is read once, so the rate is that of weights.
fn decoding(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("one token");
    for block_type in [BlockType::Q4_0, BlockType::Q4_1, BlockType::Q8_0, BlockType::BF16] {
        let (x, w) = (random([1, D_MODEL]), weight(block_type, VOCAB, D_MODEL));
        group.throughput(Throughput::Elements((VOCAB * D_MODEL) as u64));
        group.bench_function(block_type.name(), |b| b.iter(|| frozen_linear(x.clone(), &w)));
    }
    group.finish();
}

fn both_ways(inputs: &[Tensor<2>], operation: impl Fn(&[Tensor<2>]) -> Tensor<2>) -> Gradients {
    let tracked: Vec<_> = inputs.iter().map(|x| x.clone().autodiff().require_grad()).collect();
    black_box(operation(&tracked).backward())
}

fn plain_layer(u: &Tensor<2>, layer: &Layer) -> Tensor<2> {
    let (Weight::Frozen(w), Some((a, b, scale))) = (&layer.weight, &layer.adapter) else {
        unreachable!("every layer here is frozen and has an adapter")
    };
    lora_linear(u.clone(), w, a.clone(), b.clone(), *scale)
}

fn layer(block_type: BlockType, d_out: usize, d_in: usize) -> Layer {
    let [a, b] = [[RANK, d_in], [d_out, RANK]].map(|shape| random(shape).autodiff().require_grad());
    Layer { weight: weight(block_type, d_out, d_in).into(), bias: None, adapter: Some((a, b, 2.0)) }
}

fn rotary(tokens: usize) -> RotaryTable {
    let frequencies: Vec<f32> = (0..HEAD_DIM / 2).map(|j| 1e4_f32.powf(-(j as f32) / 32.0)).collect();
    RotaryTable::new(&(0..tokens as u32).collect::<Vec<_>>(), &frequencies, 1.0)
}

fn random(shape: [usize; 2]) -> Tensor<2> {
    Tensor::random(shape, Distribution::Uniform(-1.0, 1.0), &Device::flex())
}

fn weight(block_type: BlockType, rows: usize, cols: usize) -> FrozenWeight {
    let values: Vec<f32> = (0..rows * cols).map(|i| ((i * 7919) % 1000) as f32 / 1000.0 - 0.5).collect();
    let mut bytes = Vec::new();
    block_type.encode(&values, &mut bytes);
    let matrix = StoredMatrix::from_blocks(block_type, rows, cols, bytes.into(), RowOrder::Natural);
    matrix.expect("whole blocks in each row").into()
}

criterion_group!(operations, projections, attentions, losses, decoding);
criterion_main!(operations);
