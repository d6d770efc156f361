//! Loss and gradients of one micro-batch.
//!
//! ```text
//! L = scale · Σ −log p(target)      over the trained positions of the micro-batch
//! ```
//!
//! Each block has a graph of its own, and backward takes them last to first. With block checkpointing (Chen et al.
//! 2016, arXiv 1604.06174) only the last blocks keep theirs; of the others the input is kept, and their forward
//! pass runs again with a graph when backward comes to them. By then the graphs behind them are gone. Blocks below the lowest adapter need neither. The gradients of a block are added to
//! those of earlier micro-batches as soon as they are known, so there is never a second set of all of them.

use std::ops::ControlFlow;

use burn::tensor::{FloatDType, Gradients, Int, Tensor};
use tune_adapters::Dropout;
use tune_data::MicroBatch;
use tune_kernels::{Arithmetic, add_embedding_gradient, alias, linear_cross_entropy, on_pool, seed_gradient};
use tune_memory::end_phase;
use tune_models::{Block, Context, Layout, Llama, Output};

/// Rows of the hidden states that go through the head at once in `f32`.
const LOSS_CHUNK: usize = 128;

/// How micro-batches go through the model.
#[derive(Clone, Copy, Debug)]
pub struct Pass {
    /// Factor on the sum of the losses.
    pub scale: f64,
    /// The last blocks, so many, keep their graph; the others are run twice.
    pub kept_blocks: usize,
    /// Which entries the adapters drop.
    pub dropout: Option<Dropout>,
    /// In what the inputs of blocks that run twice are kept. The loss does not depend on it.
    pub block_input_dtype: FloatDType,
    /// In what the sums of gradients are kept. They are made in `f32`.
    pub gradient_dtype: FloatDType,
}

impl Pass {
    /// Everything in `f32`, without dropout.
    pub fn new(scale: f64, kept_blocks: usize) -> Self {
        let f32 = FloatDType::F32;
        Self { scale, kept_blocks, dropout: None, block_input_dtype: f32, gradient_dtype: f32 }
    }

    /// About how much work a micro-batch is, in forward passes of a block: what [`GradientSum::add`] reports adds up to it.
    pub fn work(&self, model: &Llama) -> usize {
        let blocks = model.blocks();
        let Some(lowest) = blocks.iter().position(Block::is_trained) else { return 0 };
        let traversed = blocks.len() - lowest;
        let again = traversed.saturating_sub(self.kept_blocks);
        blocks.len() + BACKWARD * traversed + again
    }
}

/// The backward pass of a block, in forward passes.
const BACKWARD: usize = 2;

/// Returns the loss, scaled, and the gradients of every trained parameter, in the order of
/// [`Llama::parameters_mut`]; see [`GradientSum::add`].
pub fn loss_and_gradients(
    model: &Llama,
    batch: &MicroBatch,
    scale: f64,
    kept_blocks: usize,
    dropout: Option<Dropout>,
) -> (f64, Vec<Tensor<2>>) {
    let mut sum = GradientSum::default();
    let pass = Pass { dropout, ..Pass::new(scale, kept_blocks) };
    let loss = sum.add(model, batch, &pass, &mut |_| ControlFlow::Continue(()));
    (loss.unwrap_or_default(), sum.into_gradients())
}

/// Gradients of the micro-batches of a step, added up; empty before the first one.
#[derive(Default)]
pub struct GradientSum {
    /// Of the token embedding, if it is trained.
    embedding: Vec<Tensor<2>>,
    /// Of each block from the lowest trained one up.
    blocks: Vec<Vec<Tensor<2>>>,
    /// Of the final norm and of a head of its own, if they are trained.
    output: Vec<Tensor<2>>,
}

impl GradientSum {
    /// Adds the gradients of a micro-batch and returns its loss, scaled. A micro-batch without a trained token has loss 0
    /// and adds nothing. After each block `watch` is told how much of [`Pass::work`] that was; when it says so, the
    /// rest is left out, the sums are worthless and there is no loss.
    pub fn add(
        &mut self,
        model: &Llama,
        batch: &MicroBatch,
        pass: &Pass,
        watch: &mut dyn FnMut(usize) -> ControlFlow<()>,
    ) -> Option<f64> {
        let Pass { kept_blocks, dropout, block_input_dtype, gradient_dtype, .. } = *pass;
        let lowest = model.blocks().iter().position(Block::is_trained);
        let trained = Trained::of(batch);
        let (Some(lowest), false) = (lowest, trained.targets.is_empty()) else {
            return watch(pass.work(model)).is_continue().then_some(0.0);
        };
        let trains_embedding = model.embedding().trained().is_some();
        let context = model.context(&Layout::documents(&batch.documents), dropout);
        let (below, blocks) = model.blocks().split_at(lowest);
        let mut hidden = model.embed(&batch.input_ids);
        for block in below {
            hidden = on_pool(|| block.forward(hidden, &context));
            if watch(1).is_break() {
                return None;
            }
        }
        let wants_dx = |i: usize| i > 0 || trains_embedding;

        let mut kept = Vec::with_capacity(blocks.len());
        let first_graph = blocks.len().saturating_sub(kept_blocks);
        for (i, block) in blocks.iter().enumerate() {
            if i < first_graph {
                kept.push(Kept::Input(hidden.clone().cast(block_input_dtype)));
                hidden = on_pool(|| block.forward(hidden, &context));
            } else {
                let (graph, y) = on_pool(|| Graph::of(block, hidden, &context, wants_dx(i)));
                kept.push(Kept::Graph(graph));
                hidden = y;
            }
            if watch(1).is_break() {
                return None;
            }
        }

        end_phase("forward");
        let (loss, mut upstream) = on_pool(|| self.add_output(model, hidden, trained, pass));
        end_phase("loss");
        self.blocks.resize_with(blocks.len(), Vec::new);
        for (i, (block, kept)) in blocks.iter().zip(kept).enumerate().rev() {
            let Some(dy) = upstream.take() else { break };
            let (Graph { mut block, input, output }, work) = match kept {
                Kept::Graph(graph) => (graph, BACKWARD),
                Kept::Input(x) => {
                    let x = x.cast(FloatDType::F32);
                    (on_pool(|| Graph::of(block, x, &context, wants_dx(i)).0), 1 + BACKWARD)
                }
            };
            let mut tape = on_pool(|| seed_gradient(output, dy).backward());
            upstream = input.grad_remove(&mut tape);
            let parameters = block.parameters_mut(lowest + i);
            let gradients = parameters.into_iter().map(|parameter| gradient(parameter.tensor, &mut tape));
            add(&mut self.blocks[i], gradients.collect(), gradient_dtype);
            if watch(work).is_break() {
                return None;
            }
        }
        if let Some(dx) = upstream.filter(|_| trains_embedding) {
            let zero = || Tensor::zeros([model.embedding().rows(), model.embedding().cols()], model.device());
            let sum = self.embedding.pop().map_or_else(zero, |sum| sum.cast(FloatDType::F32));
            let sum = add_embedding_gradient(sum, &batch.input_ids, &dx);
            self.embedding.push(sum.cast(gradient_dtype));
        }
        end_phase("block");
        Some(loss)
    }

    /// The sums in the order of [`Llama::parameters_mut`].
    pub fn into_gradients(self) -> Vec<Tensor<2>> {
        [self.embedding, self.blocks.concat(), self.output].concat()
    }

    /// The loss over `hidden`, the output of the last block, and the gradient of that.
    fn add_output(
        &mut self,
        model: &Llama,
        hidden: Tensor<2>,
        trained: Trained,
        pass: &Pass,
    ) -> (f64, Option<Tensor<2>>) {
        let hidden = hidden.autodiff().require_grad();
        let output = model.output().tracked();
        let loss = trained.loss(&output, hidden.clone(), pass.scale, model.arithmetic());
        let value = f64::from(loss.clone().into_scalar::<f32>());
        let mut tape = loss.backward();
        let mut gradients: Vec<_> =
            output.trained().into_iter().map(|parameter| gradient(parameter, &mut tape)).collect();
        if model.is_tied() && output.head.trained().is_some() {
            let of_head = gradients.pop();
            add(&mut self.embedding, of_head.into_iter().collect(), pass.gradient_dtype);
        }
        add(&mut self.output, gradients, pass.gradient_dtype);
        (value, hidden.grad_remove(&mut tape))
    }
}

/// Takes the gradient of a tracked parameter.
fn gradient(parameter: &Tensor<2>, tape: &mut Gradients) -> Tensor<2> {
    let zero = || Tensor::zeros(parameter.dims(), &parameter.device().inner());
    parameter.grad_remove(tape).unwrap_or_else(zero)
}

/// Adds in place, and keeps the sums in `dtype`.
fn add(sums: &mut Vec<Tensor<2>>, gradients: Vec<Tensor<2>>, dtype: FloatDType) {
    if sums.is_empty() {
        *sums = gradients.into_iter().map(|gradient| gradient.cast(dtype)).collect();
        return;
    }
    for (sum, gradient) in sums.iter_mut().zip(gradients) {
        let placeholder = Tensor::empty([0, 0], &sum.device());
        let before = std::mem::replace(sum, placeholder).cast(FloatDType::F32);
        *sum = (before + gradient).cast(dtype);
    }
}

/// What is kept of a block's forward pass: its input, to run it again, or its graph.
#[allow(clippy::large_enum_variant, reason = "one for each block")]
enum Kept {
    Input(Tensor<2>),
    Graph(Graph),
}

/// A block's forward pass with a graph. Of its input and output only the places in the graph are held: their values
/// are kept by the operations that need them, if any does.
struct Graph {
    block: Block,
    input: Tensor<2>,
    output: Tensor<2>,
}

impl Graph {
    /// The graph of `block` at `x`, and y. The lowest block needs no gradient of its input, unless the embedding is
    /// trained.
    fn of(block: &Block, x: Tensor<2>, context: &Context, wants_dx: bool) -> (Self, Tensor<2>) {
        let nothing = Tensor::empty([0, 0], &x.device());
        let block = block.tracked();
        let leaf = nothing.clone().autodiff();
        let input = if wants_dx { leaf.require_grad() } else { leaf };
        let y = block.forward(alias(input.clone(), x), context);
        let output = alias(y.clone(), nothing);
        (Self { block, input, output }, y.inner())
    }
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
    fn loss(self, output: &Output, hidden: Tensor<2>, scale: f64, arithmetic: Arithmetic) -> Tensor<1> {
        let positions = Tensor::<1, Int>::from_data(self.positions.as_slice(), &hidden.device());
        let trained = output.norm.forward(hidden.select(0, positions)); // [trained, d_model]
        let chunk = match arithmetic {
            Arithmetic::F32 => LOSS_CHUNK,
            Arithmetic::Bf16 => 2 * LOSS_CHUNK, // the same bytes
        };
        let (scale, targets) = (scale as f32, self.targets.into());
        linear_cross_entropy(trained, &output.head, targets, scale, chunk, arithmetic)
    }
}
