//! Loss and adapter gradients of one micro-batch.
//!
//! ```text
//! L = scale · Σ −log p(target)      over the trained positions of the micro-batch
//! ```
//!
//! With block checkpointing (Chen et al. 2016, arXiv 1604.06174) the forward pass keeps each block's input and
//! no graph; backward runs one block at a time again with a graph, last to first, and injects the gradient of
//! its output as the sum Σ y ⊙ dL/dy, whose gradient is dL/dy. Blocks below the lowest adapter need neither.

use burn::tensor::{Gradients, Int, Tensor};
use tune_adapters::Dropout;
use tune_data::MicroBatch;
use tune_kernels::{Arithmetic, linear_cross_entropy};
use tune_models::{Block, Context, Layout, Llama};

/// Rows of the hidden states that go through the head at once in `f32`.
const LOSS_CHUNK: usize = 128;

/// Returns the loss, scaled, and the gradients of A and B of every adapter, in the order of
/// [`Llama::adapters_mut`]. A micro-batch without a trained token has loss 0 and no gradients.
pub fn loss_and_gradients(
    model: &Llama,
    batch: &MicroBatch,
    scale: f64,
    checkpointing: bool,
    dropout: Option<Dropout>,
) -> (f64, Vec<Tensor<2>>) {
    let lowest = model.blocks().iter().position(Block::is_adapted);
    let trained = Trained::of(batch);
    let (Some(lowest), false) = (lowest, trained.targets.is_empty()) else {
        return (0.0, Vec::new());
    };
    let context = model.context(&Layout::documents(&batch.documents), dropout);
    let (frozen, adapted) = model.blocks().split_at(lowest);
    let input = frozen.iter().fold(model.embed(&batch.input_ids), |x, block| block.forward(x, &context));
    if checkpointing {
        block_by_block(model, adapted, input, &context, trained, scale)
    } else {
        in_one_graph(model, adapted, input, &context, trained, scale)
    }
}

fn block_by_block(
    model: &Llama,
    blocks: &[Block],
    input: Tensor<2>,
    context: &Context,
    trained: Trained,
    scale: f64,
) -> (f64, Vec<Tensor<2>>) {
    let mut inputs = Vec::with_capacity(blocks.len());
    let output = blocks.iter().fold(input, |x, block| {
        inputs.push(x.clone());
        block.forward(x, context)
    });

    let hidden = output.autodiff().require_grad();
    let loss = trained.loss(model, hidden.clone(), scale);
    let value = f64::from(loss.clone().into_scalar::<f32>());
    let mut upstream = hidden.grad_remove(&mut loss.backward());

    let mut gradients = Vec::with_capacity(blocks.len());
    for (block, input) in blocks.iter().zip(inputs).rev() {
        let Some(dy) = upstream.take() else { break };
        let block = block.tracked();
        let x = input.autodiff().require_grad();
        let y = block.forward(x.clone(), context);
        let mut tape = (y * dy.autodiff()).sum().backward();
        upstream = x.grad_remove(&mut tape);
        gradients.push(adapter_gradients(&block, &mut tape));
    }
    gradients.reverse();
    (value, gradients.concat())
}

fn in_one_graph(
    model: &Llama,
    blocks: &[Block],
    input: Tensor<2>,
    context: &Context,
    trained: Trained,
    scale: f64,
) -> (f64, Vec<Tensor<2>>) {
    let blocks: Vec<Block> = blocks.iter().map(Block::tracked).collect();
    let hidden = blocks.iter().fold(input.autodiff(), |x, block| block.forward(x, context));
    let loss = trained.loss(model, hidden, scale);
    let value = f64::from(loss.clone().into_scalar::<f32>());
    let mut tape = loss.backward();
    (value, blocks.iter().flat_map(|block| adapter_gradients(block, &mut tape)).collect())
}

fn adapter_gradients(block: &Block, tape: &mut Gradients) -> Vec<Tensor<2>> {
    let mut gradients = Vec::new();
    for (_, linear) in block.linears() {
        for parameter in linear.adapter.iter().flat_map(|adapter| [&adapter.a, &adapter.b]) {
            let zero = || Tensor::zeros(parameter.dims(), &parameter.device().inner());
            gradients.push(parameter.grad_remove(tape).unwrap_or_else(zero));
        }
    }
    gradients
}

/// The positions that are trained, and what each should predict.
struct Trained {
    positions: Vec<i32>,
    targets: Vec<u32>,
}

impl Trained {
    fn of(batch: &MicroBatch) -> Self {
        let trained = batch.targets.iter().enumerate().filter(|(_, target)| **target >= 0);
        let (positions, targets) = trained.map(|(i, target)| (i as i32, *target as u32)).unzip();
        Self { positions, targets }
    }

    /// Only trained positions pass the final norm and the head.
    fn loss(self, model: &Llama, hidden: Tensor<2>, scale: f64) -> Tensor<1> {
        let positions = Tensor::<1, Int>::from_data(self.positions.as_slice(), &hidden.device());
        let trained = model.final_norm(hidden.select(0, positions)); // [trained, d_model]
        let chunk = match model.arithmetic() {
            Arithmetic::F32 => LOSS_CHUNK,
            Arithmetic::Bf16 => 2 * LOSS_CHUNK, // the same bytes
        };
        let (scale, targets) = (scale as f32, self.targets.into());
        linear_cross_entropy(trained, model.head(), targets, scale, chunk, model.arithmetic())
    }
}
