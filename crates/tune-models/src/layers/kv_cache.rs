//! Keys and values of the tokens that a model has already seen.

use burn::tensor::{Device, Tensor};

/// The cache of one generation: room for `capacity` tokens in every layer, allocated once.
pub struct KvCache {
    layers: Vec<Option<(Tensor<2>, Tensor<2>)>>, // [capacity, n_kv_heads · head_dim]
    len: usize,
    capacity: usize,
}

impl KvCache {
    /// An empty cache for `capacity` tokens of `n_layers` layers with `width` = kv heads · head_dim.
    pub fn new(n_layers: usize, capacity: usize, width: usize, device: &Device) -> Self {
        let empty =
            || Some((Tensor::zeros([capacity, width], device), Tensor::zeros([capacity, width], device)));
        Self { layers: (0..n_layers).map(|_| empty()).collect(), len: 0, capacity }
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
        let [new, width] = k.dims();
        let rows = self.len..self.len + new;
        // Taken out, so that the buffer has one owner and is written in place.
        let (keys, values) = self.layers[layer].take().unwrap_or_else(|| {
            let device = k.device();
            (Tensor::zeros([self.capacity, width], &device), Tensor::zeros([self.capacity, width], &device))
        });
        let keys = keys.slice_assign([rows.clone(), 0..width], k);
        let values = values.slice_assign([rows, 0..width], v);
        self.layers[layer] = Some((keys.clone(), values.clone()));
        (keys, values)
    }

    /// Counts `new` tokens as cached, after every layer has appended them.
    pub(crate) fn advance(&mut self, new: usize) {
        self.len += new;
    }
}
