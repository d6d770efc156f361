//! Second moments of what the linear layers of a model are fed, block by block.
//!
//! ```text
//! H = Σ x xᵀ      over the tokens of some rows, x [d_in]
//! ```
//!
//! Only the residual stream of the rows `[tokens, d_model]` and the moments of one block are held.

use burn::tensor::Tensor;
use tune_data::MicroBatch;
use tune_models::{Context, Layout, Llama};

/// A model on its way through some rows.
pub struct Moments<'a> {
    model: &'a Llama,
    streams: Vec<(Tensor<2>, Context)>,
    next: usize,
}

/// The moments of one block.
pub struct BlockMoments {
    /// Number of the block.
    pub layer: usize,
    /// Names of the linear layers that share an input, its features, and H `[d_in, d_in]`, row-major.
    pub inputs: Vec<(Vec<&'static str>, usize, Vec<f32>)>,
}

impl<'a> Moments<'a> {
    /// In front of the first block.
    pub fn new(model: &'a Llama, rows: &[MicroBatch]) -> Self {
        let stream = |batch: &MicroBatch| {
            let layout = Layout::documents(&batch.documents);
            (model.embed(&batch.input_ids), model.context(&layout, None))
        };
        Self { model, streams: rows.iter().map(stream).collect(), next: 0 }
    }

    /// The moments of the next block; `None` after the last one.
    pub fn next_block(&mut self) -> Option<BlockMoments> {
        let layer = self.next;
        let block = self.model.blocks().get(layer)?;
        let mut sums: Vec<(Vec<&'static str>, Tensor<2>)> = Vec::new();
        for (stream, context) in &mut self.streams {
            let x = stream.clone();
            let mut group = 0;
            *stream = block.observe(x, context, &mut |names, x| {
                let product = x.clone().transpose().matmul(x.clone());
                match sums.get_mut(group) {
                    Some((_, sum)) => *sum = sum.clone() + product,
                    None => sums.push((names.to_vec(), product)),
                }
                group += 1;
            });
        }
        self.model.leave(block);
        self.next += 1;
        let inputs = sums.into_iter().map(|(names, sum)| {
            let d_in = sum.dims()[0];
            (names, d_in, sum.into_data().iter::<f32>().collect())
        });
        Some(BlockMoments { layer, inputs: inputs.collect() })
    }
}
