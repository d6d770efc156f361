//! Loss and adapter gradients of one micro-batch.
//!
//! ```text
//! L = scale · Σ −log p(target)      over the trained positions of the micro-batch
//! ```
//!
//! Each block has a graph of its own, and backward takes them last to first. With block checkpointing (Chen et al.
//! 2016, arXiv 1604.06174) only the last blocks keep theirs; of the others the input is kept, and their forward
//! pass runs again with a graph when backward comes to them. By then the graphs behind them are gone, so the peak
//! is one block above what is kept. Blocks below the lowest adapter need neither.

use burn::tensor::{Gradients, Int, Tensor};
use tune_adapters::Dropout;
use tune_data::MicroBatch;
use tune_kernels::{Arithmetic, linear_cross_entropy, seed_gradient};
use tune_models::{Block, Context, Layout, Llama};

/// Rows of the hidden states that go through the head at once in `f32`.
const LOSS_CHUNK: usize = 128;

/// Returns the loss, scaled, and the gradients of A and B of every adapter, in the order of
/// [`Llama::adapters_mut`]. The last `kept_blocks` blocks keep their graph, the others are run twice. A micro-batch
/// without a trained token has loss 0 and no gradients.
pub fn loss_and_gradients(
    model: &Llama,
    batch: &MicroBatch,
    scale: f64,
    kept_blocks: usize,
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

    let mut kept = Vec::with_capacity(adapted.len());
    let first_graph = adapted.len().saturating_sub(kept_blocks);
    let output = adapted.iter().enumerate().fold(input, |x, (i, block)| {
        if i < first_graph {
            kept.push(Kept::Input(x.clone()));
            block.forward(x, &context)
        } else {
            let graph = Graph::of(block, x, &context, i > 0);
            let y = graph.y.clone().inner();
            kept.push(Kept::Graph(graph));
            y
        }
    });

    let hidden = output.autodiff().require_grad();
    let loss = trained.loss(model, hidden.clone(), scale);
    let value = f64::from(loss.clone().into_scalar::<f32>());
    let mut upstream = hidden.grad_remove(&mut loss.backward());
    drop((hidden, loss));

    let mut gradients = Vec::with_capacity(adapted.len());
    for (i, (block, kept)) in adapted.iter().zip(kept).enumerate().rev() {
        let Some(dy) = upstream.take() else { break };
        let Graph { block, x, y } = match kept {
            Kept::Graph(graph) => graph,
            Kept::Input(x) => Graph::of(block, x, &context, i > 0),
        };
        let mut tape = seed_gradient(y, dy).backward();
        upstream = x.grad_remove(&mut tape);
        gradients.push(adapter_gradients(&block, &mut tape));
    }
    gradients.reverse();
    (value, gradients.concat())
}

/// What is kept of a block's forward pass: its input, to run it again, or its graph.
enum Kept {
    Input(Tensor<2>),
    Graph(Graph),
}

/// A block's forward pass with a graph.
struct Graph {
    block: Block,
    x: Tensor<2>,
    y: Tensor<2>,
}

impl Graph {
    /// The lowest block needs no gradient of its input.
    fn of(block: &Block, x: Tensor<2>, context: &Context, wants_dx: bool) -> Self {
        let block = block.tracked();
        let x = if wants_dx { x.autodiff().require_grad() } else { x.autodiff() };
        let y = block.forward(x.clone(), context);
        Self { block, x, y }
    }
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
