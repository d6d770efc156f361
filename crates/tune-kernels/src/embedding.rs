//! Embedding: the rows of a frozen table, decoded one by one.
//!
//! ```text
//! y[t] = W[ids[t]]
//! ```
//!
//! W `[vocab, d_model]` frozen; `ids` `[tokens]`; y `[tokens, d_model]`. Nothing is saved: there is no backward.

use burn::tensor::{Device, Tensor, TensorData};

use crate::FrozenWeight;

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

#[cfg(test)]
mod tests {
    use tune_quant::BlockType;

    use super::*;
    use crate::testing::{frozen, values};

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
    #[should_panic(expected = "token id 6 in a vocabulary of 6")]
    fn an_unknown_id_is_refused() {
        embedding(&frozen(BlockType::Q8_0, [6, 32]), &[6], &Device::flex());
    }
}
