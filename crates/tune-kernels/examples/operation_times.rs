//! Times every operation at the shapes of SmolLM2-135M, 512 tokens, forward and backward, against the bare f32
//! matrix product of the same shape: `cargo run -p tune-kernels --example operation_times [threads]`.
//!
//! The program `tune` keeps freed memory in the heap; here `GLIBC_TUNABLES=glibc.malloc.mmap_max=0:\
//! glibc.malloc.trim_threshold=4294967296:glibc.malloc.top_pad=67108864` does the same.

#![allow(missing_docs, clippy::print_stdout)]

use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

use burn::tensor::{DType, Device, Distribution, Tensor};
use tune_kernels::{
    Arithmetic, AttentionSpan, FrozenVector, FrozenWeight, RotaryTable, bf16, causal_attention,
    frozen_linear, linear_cross_entropy, lora_linear, rms_norm, rope, swiglu, token_losses,
};
use tune_quant::{BlockType, RowOrder, StoredMatrix};

const TOKENS: usize = 512;
const D_MODEL: usize = 576;
const D_FF: usize = 1536;
const KV: usize = 192;
const VOCAB: usize = 49152;
const HEAD_DIM: usize = 64;
const RANK: usize = 16;

fn main() {
    let threads = std::env::args().nth(1).and_then(|n| n.parse().ok()).unwrap_or(0);
    rayon::ThreadPoolBuilder::new().num_threads(threads).build_global().expect("first use of the pool");
    println!("{} threads; milliseconds, best of several runs", rayon::current_num_threads());

    println!("\nmatrix products: bare f32 gemm; frozen and LoRA forward; frozen and LoRA backward");
    for (name, d_out, d_in) in
        [("q, o", D_MODEL, D_MODEL), ("gate, up", D_FF, D_MODEL), ("down", D_MODEL, D_FF)]
    {
        let bare = bare_gemm(TOKENS, d_out, d_in);
        for block_type in [BlockType::F32, BlockType::BF16, BlockType::Q8_0, BlockType::Q4_1] {
            let w = weight(block_type, d_out, d_in);
            let (a, b) = (random([RANK, d_in]), random([d_out, RANK]));
            let times = [
                forward(&[random([TOKENS, d_in])], |x| frozen_linear(x[0].clone(), &w)),
                forward(&[random([TOKENS, d_in])], |x| {
                    lora_linear(x[0].clone(), &w, a.clone(), b.clone(), 1.0)
                }),
                backward(&[random([TOKENS, d_in])], |x| frozen_linear(x[0].clone(), &w)),
                backward(&[random([TOKENS, d_in]), a.clone(), b.clone()], |x| {
                    lora_linear(x[0].clone(), &w, x[1].clone(), x[2].clone(), 1.0)
                }),
            ];
            let [f, lf, b, lb] = times.map(|t| format!("{:6.2} ({:.2}x)", t * 1e3, t / bare));
            println!("{name:9} {block_type:?}\tgemm {:6.2}  {f}  {lf}  {b}  {lb}", bare * 1e3);
        }
    }

    println!("\nother operations: forward; backward");
    let gain = FrozenVector::from(vec![1.0; D_MODEL]);
    report("rms_norm", &[[TOKENS, D_MODEL]], |x| rms_norm(x[0].clone(), &gain, 1e-5));
    let table = rotary(TOKENS);
    report("rope q", &[[TOKENS, D_MODEL]], |x| rope(x[0].clone(), &table));
    report("swiglu", &[[TOKENS, D_FF]; 2], |x| swiglu(x[0].clone(), x[1].clone()));
    for documents in [1, 4] {
        let length = TOKENS / documents;
        let span =
            |i: usize| AttentionSpan { q: i * length..(i + 1) * length, k: i * length..(i + 1) * length };
        let spans: Arc<[_]> = (0..documents).map(span).collect();
        report(
            &format!("attention, {documents} documents"),
            &[[TOKENS, D_MODEL], [TOKENS, KV], [TOKENS, KV]],
            |x| causal_attention(x[0].clone(), x[1].clone(), x[2].clone(), spans.clone(), HEAD_DIM),
        );
    }

    self_attention_rates();

    println!("\nhead, 256 trained tokens: bare gemm; loss with gradient (two products); losses alone");
    let bare = bare_gemm(256, VOCAB, D_MODEL);
    let targets: Arc<[u32]> = (0..256).map(|t| t * 17).collect();
    for block_type in [BlockType::Q8_0, BlockType::Q4_1] {
        let head = weight(block_type, VOCAB, D_MODEL);
        let x = random([256, D_MODEL]);
        let tracked = [x.clone().autodiff().require_grad()];
        let loss = |x: &[Tensor<2>]| {
            linear_cross_entropy(
                x[0].clone(),
                &head.clone().into(),
                targets.clone(),
                1.0,
                256,
                Arithmetic::F32,
            )
            .reshape([1, 1])
        };
        let graph = forward(&tracked, loss) + backward(&tracked, loss);
        let plain = best(|| drop(black_box(token_losses(x.clone(), &head, &targets, Arithmetic::F32))));
        println!("{block_type:?}\tgemm {:.1}  {:.1}  {:.1}", bare * 1e3, graph * 1e3, plain * 1e3);
    }

    println!("\none token of generation: frozen_linear of a gate projection, and of the head");
    for block_type in [BlockType::F32, BlockType::BF16, BlockType::Q8_0, BlockType::Q4_1] {
        let times = [(D_FF, D_MODEL), (VOCAB, D_MODEL)].map(|(d_out, d_in)| {
            let w = weight(block_type, d_out, d_in);
            forward(&[random([1, d_in])], |x| frozen_linear(x[0].clone(), &w))
        });
        println!("{block_type:?}\t{:.3}  {:.3}", times[0] * 1e3, times[1] * 1e3);
    }
}

/// What attention in `bf16` does of the products that it needs: two forward and, as usual, twice that backward,
/// although scores are made again.
fn self_attention_rates() {
    println!("\nself-attention in bf16, useful GFLOP/s and milliseconds: forward; backward");
    for (tokens, documents) in [(256, 1), (512, 1), (1024, 1), (2048, 1), (8192, 1), (2048, 8), (2048, 64)] {
        let length = tokens / documents;
        let span =
            |i: usize| AttentionSpan { q: i * length..(i + 1) * length, k: i * length..(i + 1) * length };
        let spans: Arc<[_]> = (0..documents).map(span).collect();
        let table = rotary(tokens);
        let qkv = [random([tokens, D_MODEL + 2 * KV]).cast(DType::BF16)];
        let attention = |x: &[Tensor<2>]| {
            let (heads, kv_heads) = (D_MODEL / HEAD_DIM, KV / HEAD_DIM);
            bf16::self_attention(x[0].clone(), &table, spans.clone(), heads, kv_heads)
        };
        let (forward, backward) = (forward(&qkv, attention), backward(&qkv, attention));
        let useful = 1e-9 * (2 * 2 * tokens * length / 2 * D_MODEL) as f64;
        println!(
            "{documents:2} × {length:4} tokens {:9.1} {:8.3}; {:9.1} {:8.3}",
            useful / forward,
            forward * 1e3,
            2.0 * useful / backward,
            backward * 1e3,
        );
    }
}

fn rotary(tokens: usize) -> RotaryTable {
    let frequencies: Vec<f32> = (0..HEAD_DIM / 2).map(|j| 1e4_f32.powf(-(j as f32) / 32.0)).collect();
    RotaryTable::new(&(0..tokens as u32).collect::<Vec<_>>(), &frequencies, 1.0)
}

fn report(name: &str, shapes: &[[usize; 2]], operation: impl Fn(&[Tensor<2>]) -> Tensor<2>) {
    let inputs: Vec<_> = shapes.iter().map(|shape| random(*shape)).collect();
    let (forward, backward) = (forward(&inputs, &operation), backward(&inputs, &operation));
    println!("{name:24} {:.3}  {:.3}", forward * 1e3, backward * 1e3);
}

fn forward(inputs: &[Tensor<2>], operation: impl Fn(&[Tensor<2>]) -> Tensor<2>) -> f64 {
    best(|| drop(black_box(operation(inputs))))
}

/// Time of the backward pass of one operation alone.
fn backward(inputs: &[Tensor<2>], operation: impl Fn(&[Tensor<2>]) -> Tensor<2>) -> f64 {
    let mut best = f64::INFINITY;
    let begin = Instant::now();
    while begin.elapsed().as_secs_f64() < 0.6 {
        let inputs: Vec<_> = inputs.iter().map(|x| x.clone().autodiff().require_grad()).collect();
        let y = operation(&inputs);
        let start = Instant::now();
        black_box(y.backward());
        best = best.min(start.elapsed().as_secs_f64());
    }
    best
}

fn best(run: impl Fn()) -> f64 {
    let mut best = f64::INFINITY;
    let begin = Instant::now();
    while begin.elapsed().as_secs_f64() < 0.6 {
        let start = Instant::now();
        run();
        best = best.min(start.elapsed().as_secs_f64());
    }
    best
}

fn bare_gemm(m: usize, n: usize, k: usize) -> f64 {
    let (x, w) = (vec![0.5_f32; m * k], vec![0.5_f32; n * k]);
    let threads = gemm::Parallelism::Rayon(0);
    best(|| {
        let mut y = vec![0.0_f32; m * n];
        let (n_stride, k_stride) = (n as isize, k as isize);
        // SAFETY: the strides describe row-major matrices of the sizes allocated above.
        #[allow(unsafe_code)]
        unsafe {
            gemm::gemm(
                m,
                n,
                k,
                y.as_mut_ptr(),
                1,
                n_stride,
                false,
                x.as_ptr(),
                1,
                k_stride,
                w.as_ptr(),
                k_stride,
                1,
                0.0,
                1.0,
                false,
                false,
                false,
                threads,
            );
        }
        black_box(y);
    })
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
