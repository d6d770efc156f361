//! Embedding: rows of a table, decoded one by one.
//!
//! ```text
//! y[t] = W[ids[t]]        dW[id] = Σ dy[t] over the t with ids[t] = id
//! ```
//!
//! W `[vocab, d_model]`; `ids` `[tokens]`; y `[tokens, d_model]`. It is the first operation of a model and stands outside
//! every graph: whoever trains W adds dy to its gradient.

use burn::backend::Flex;
use burn::tensor::{Device, Tensor, TensorData};

use crate::weight::flex;
use crate::{FrozenWeight, cpu};

/// The embeddings of `ids`: decodes only the rows asked for.
///
/// # Shapes
/// `ids` `[tokens]` -> `[tokens, w.cols()]`, on `device`, untracked.
///
/// # Panics
/// When an id is not below `w.rows()`.
pub fn embedding(w: &FrozenWeight, ids: &[u32], device: &Device) -> Tensor<2> {
    let (vocab, d_model) = (w.rows(), w.cols());
    let mut values = vec![0.0; ids.len() * d_model];
    for (id, out) in ids.iter().zip(values.chunks_exact_mut(d_model)) {
        assert!((*id as usize) < vocab, "embedding: token id {id} in a vocabulary of {vocab}");
        w.matrix().decode_row(*id as usize, out);
    }
    Tensor::from_data(TensorData::new(values, [ids.len(), d_model]), device)
}

/// Adds the gradient of an embedding to `gradient`, in the order of the tokens, in place unless it is shared.
///
/// # Shapes
/// `gradient` `[vocab, d_model]`, `ids` `[tokens]`, `dy` `[tokens, d_model]` -> `[vocab, d_model]`
///
/// # Panics
/// When the shapes do not agree, or an id is not below `vocab`.
pub fn add_embedding_gradient(gradient: Tensor<2>, ids: &[u32], dy: &Tensor<2>) -> Tensor<2> {
    let [vocab, d_model] = gradient.dims();
    assert_eq!(
        dy.dims(),
        [ids.len(), d_model],
        "add_embedding_gradient: dy for a table [{vocab}, {d_model}]"
    );
    let dy = flex(dy);
    let dy: &[f32] = cpu::values(&dy);
    let gradient =
        gradient.try_into_primitive::<Flex>().expect("a tensor of the CPU backend, without a graph");
    // In place, unless somebody else holds it.
    let mut gradient = if gradient.is_contiguous() { gradient } else { gradient.to_contiguous() };
    let sums = gradient.storage_mut::<f32>();
    for (id, dy) in ids.iter().zip(dy.chunks_exact(d_model.max(1))) {
        let id = *id as usize;
        assert!(id < vocab, "add_embedding_gradient: token id {id} in a vocabulary of {vocab}");
        for (sum, dy) in sums[id * d_model..][..d_model].iter_mut().zip(dy) {
            *sum += dy;
        }
    }
    Tensor::from_primitive::<Flex>(gradient)
}

#[cfg(test)]
mod tests {
    use tune_quant::BlockType;

    use super::*;
    use crate::testing::{frozen, random, values};

    #[test]
    fn rows_of_the_table_in_the_order_asked_for() {
        let w = frozen(BlockType::Q8_0, [6, 32]);
        let device = Device::flex();
        let got = embedding(&w, &[5, 0, 5], &device);
        let want = w.decode(&device);
        let row = |i: usize| want.clone().narrow(0, i, 1);
        assert_eq!(values(got), values(Tensor::cat(vec![row(5), row(0), row(5)], 0)));
        assert_eq!(embedding(&w, &[], &device).dims(), [0, 32]);
    }

    #[test]
    fn gradients_of_a_repeated_token_add_up() {
        let (gradient, dy) = (random(1, [6, 3]), random(2, [3, 3]));
        let mut want = values(gradient.clone());
        for (t, id) in [5, 0, 5].into_iter().enumerate() {
            for (i, dy) in values(dy.clone())[3 * t..][..3].iter().enumerate() {
                want[3 * id + i] += dy;
            }
        }
        assert_eq!(values(add_embedding_gradient(gradient, &[5, 0, 5], &dy)), want);
    }

    #[test]
    #[should_panic(expected = "token id 6 in a vocabulary of 6")]
    fn an_unknown_id_is_refused() {
        embedding(&frozen(BlockType::Q8_0, [6, 32]), &[6], &Device::flex());
    }
}
