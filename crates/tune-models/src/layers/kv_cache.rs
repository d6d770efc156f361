//! Keys and values of the tokens that a model has already seen.

use burn::tensor::Tensor;

/// Buffers grow by at least this many tokens.
const BLOCK: usize = 256;

/// The cache of one generation: at most `capacity` tokens in every layer. Memory is taken as tokens arrive.
pub struct KvCache {
    layers: Vec<Option<(Tensor<2>, Tensor<2>)>>, // [allocated tokens, n_kv_heads · head_dim]
    len: usize,
    capacity: usize,
}

impl KvCache {
    /// An empty cache for `capacity` tokens of `n_layers` layers.
    pub fn new(n_layers: usize, capacity: usize) -> Self {
        Self { layers: (0..n_layers).map(|_| None).collect(), len: 0, capacity }
    }

    /// Tokens in the cache.
    pub fn len(&self) -> usize {
        self.len
    }

    /// No token has been seen yet.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Tokens that still fit.
    pub fn remaining(&self) -> usize {
        self.capacity - self.len
    }

    /// Forgets all tokens after the first `len`.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// Writes the new tokens' keys and values of `layer` behind the cached ones and returns the whole buffers;
    /// rows beyond [`len`](Self::len) plus the new tokens are not yet meaningful.
    pub(crate) fn append(&mut self, layer: usize, k: Tensor<2>, v: Tensor<2>) -> (Tensor<2>, Tensor<2>) {
        let old = self.layers[layer].take(); // so that a buffer has one owner and is written in place
        let (keys, values) = old.unzip();
        let keys = self.write(keys, k);
        let values = self.write(values, v);
        self.layers[layer] = Some((keys.clone(), values.clone()));
        (keys, values)
    }

    /// `buffer` with `new` rows after the first `len`, in a larger one if it has no room for them.
    fn write(&self, buffer: Option<Tensor<2>>, new: Tensor<2>) -> Tensor<2> {
        let ([tokens, width], device) = (new.dims(), new.device());
        let end = self.len + tokens;
        let allocated = buffer.as_ref().map_or(0, |buffer| buffer.dims()[0]);
        let buffer = match buffer {
            Some(buffer) if end <= allocated => buffer,
            smaller => {
                // Half as much again each time, so that copying costs little however long the text becomes.
                let rows = end.max(allocated + allocated / 2).next_multiple_of(BLOCK).min(self.capacity);
                let larger = Tensor::zeros([rows.max(end), width], &device);
                match smaller {
                    Some(old) if self.len > 0 => {
                        let rows = [0..self.len, 0..width];
                        larger.slice_assign(rows.clone(), old.slice(rows))
                    }
                    _ => larger,
                }
            }
        };
        buffer.slice_assign([self.len..end, 0..width], new)
    }

    /// Counts `new` tokens as cached, after every layer has appended them.
    pub(crate) fn advance(&mut self, new: usize) {
        self.len += new;
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, TensorData};

    use super::*;

    fn rows(range: std::ops::Range<usize>) -> Tensor<2> {
        let values: Vec<f32> = range.clone().flat_map(|row| [row as f32, -(row as f32)]).collect();
        Tensor::from_data(TensorData::new(values, [range.len(), 2]), &Device::flex())
    }

    #[test]
    fn tokens_stay_while_the_buffers_grow() {
        let mut cache = KvCache::new(1, 3000);
        for end in [3, 4, 255, 257, 1000, 2999, 3000] {
            let new = cache.len()..end;
            let (k, v) = cache.append(0, rows(new.clone()), rows(new.clone()) + 0.5);
            cache.advance(new.len());
            let allocated = k.dims()[0];
            assert!((end..=3000.min(2 * end + 2 * BLOCK)).contains(&allocated), "{allocated} for {end}");
            let filled = |t: Tensor<2>| t.slice([0..end, 0..2]).into_data();
            assert_eq!(filled(k), rows(0..end).into_data());
            assert_eq!(filled(v), (rows(0..end) + 0.5).into_data());
        }
        assert_eq!(cache.remaining(), 0);
    }

    #[test]
    fn what_is_forgotten_is_written_over() {
        let mut cache = KvCache::new(1, 10);
        cache.append(0, rows(0..5), rows(0..5));
        cache.advance(5);
        cache.truncate(2);
        let (k, _) = cache.append(0, rows(7..8), rows(7..8));
        assert_eq!(k.slice([0..3, 0..1]).into_data().iter::<f32>().collect::<Vec<_>>(), [0.0, 1.0, 7.0]);
    }
}
