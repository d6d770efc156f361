//! Llama: the decoder of Llama 2 and 3, SmolLM2, TinyLlama and Mistral without a sliding window.
//!
//! ```text
//! h = x + o(attention(rope(q), rope(k), v))     q, k, v of RMSNorm(x)
//! y = h + down(silu(gate) ⊙ up)                 gate, up of RMSNorm(h)
//! ```
//!
//! Touvron et al. 2023, arXiv 2307.09288; grouped-query attention: Ainslie et al. 2023, arXiv 2305.13245.
//! Weights `[d_out, d_in]` under their Hugging Face names: frozen and as stored, or trained, all of them.

use std::collections::BTreeMap;

use burn::tensor::{Device, Tensor};
use tune_adapters::{Lora, LoraConfig, Targets};
use tune_formats::peft::{Adapter, LoraWeights};
use tune_formats::{ModelConfig, Weights};
use tune_kernels::bf16::{Input, project, self_attention};
use tune_kernels::{
    Arithmetic, FrozenVector, FrozenWeight, RotaryTable, Vector, Weight, causal_attention, embedding,
    frozen_linear, rope, swiglu,
};
use tune_quant::StoredMatrix;

use crate::layers::rotary_frequencies;
use crate::{Context, KvCache, Layout, Linear, ModelError, Quantization, RmsNorm, TrainedWeights};

/// A Llama with frozen weights and optional adapters, or with trained weights.
#[derive(Clone)]
pub struct Llama {
    config: ModelConfig,
    device: Device,
    embed_tokens: Weight, // [vocab, d_model]
    blocks: Vec<Block>,
    norm: RmsNorm,
    lm_head: Option<Weight>, // [vocab, d_model]; none when it is the embedding
    frequencies: Vec<f32>,   // [head_dim / 2]
    arithmetic: Arithmetic,
    is_releasing: bool,
}

/// One layer: attention and gated MLP, each behind a norm and beside the residual stream.
#[derive(Clone)]
pub struct Block {
    input_norm: RmsNorm,
    attention: Attention,
    post_attention_norm: RmsNorm,
    mlp: Mlp,
}

#[derive(Clone)]
struct Attention {
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    o_proj: Linear,
    head_dim: usize,
}

#[derive(Clone)]
struct Mlp {
    gate_proj: Linear,
    up_proj: Linear,
    down_proj: Linear,
}

/// What follows the blocks.
#[derive(Clone)]
pub struct Output {
    /// The final norm.
    pub norm: RmsNorm,
    /// The output head `[vocab, d_model]`.
    pub head: Weight,
}

/// A trained parameter.
pub struct Parameter<'a> {
    /// Its name in a safetensors file: Hugging Face's for a weight, PEFT's without prefix for a part of an adapter.
    pub name: String,
    /// A vector is one row.
    pub tensor: &'a mut Tensor<2>,
    /// A bias or the gain of a norm.
    pub is_vector: bool,
}

/// A linear layer that carries an adapter, under its Hugging Face module path.
pub struct AdapterSlot<'a> {
    /// E.g. `model.layers.0.self_attn.q_proj`.
    pub path: String,
    /// The adapter there.
    pub adapter: &'a mut Lora,
}

impl Llama {
    /// Reads nothing but norms and biases; matrices stay where `weights` has them.
    pub fn load(
        config: &ModelConfig,
        weights: &dyn Weights,
        quantization: Quantization,
        device: &Device,
    ) -> Result<Self, ModelError> {
        let mut loader = Loader { config, weights, quantization, mismatches: Vec::new() };
        let (vocab, d_model) = (config.vocab_size, config.hidden_size);
        let embed_tokens = loader.matrix("model.embed_tokens.weight", vocab, d_model)?;
        let blocks =
            (0..config.num_hidden_layers).map(|layer| loader.block(layer)).collect::<Result<_, _>>()?;
        let norm = loader.norm("model.norm.weight")?;
        let lm_head = if config.tie_word_embeddings {
            None
        } else {
            Some(loader.matrix("lm_head.weight", vocab, d_model)?)
        };
        if !loader.mismatches.is_empty() {
            return Err(ModelError::Shapes { mismatches: loader.mismatches });
        }
        Ok(Self {
            config: config.clone(),
            device: device.clone(),
            embed_tokens: embed_tokens.into(),
            blocks,
            norm,
            lm_head: lm_head.map(Weight::from),
            frequencies: rotary_frequencies(config),
            arithmetic: Arithmetic::F32,
            is_releasing: false,
        })
    }

    /// The same model with other arithmetic in its blocks and its loss; a loaded model computes in `f32`.
    pub fn with_arithmetic(self, arithmetic: Arithmetic) -> Self {
        Self { arithmetic, ..self }
    }

    /// The same model for a few passes over many tokens: what is mapped of a block from a file leaves memory when the block
    /// has answered, so that the pages of one block are held and not those of all.
    pub fn releasing(self) -> Self {
        Self { is_releasing: true, ..self }
    }

    /// A block has answered.
    pub fn leave(&self, block: &Block) {
        if self.is_releasing {
            block.linears().iter().for_each(|(_, linear)| linear.release());
        }
    }

    /// In what matrix products are made.
    pub fn arithmetic(&self) -> Arithmetic {
        self.arithmetic
    }

    /// Puts a fresh adapter beside every target.
    pub fn attach(&mut self, config: &LoraConfig, targets: &Targets, seed: u64) {
        let device = self.device.clone();
        for (layer, block) in self.blocks.iter_mut().enumerate() {
            for (index, (name, linear)) in block.linears_mut().into_iter().enumerate() {
                if targets.contains(layer, name) {
                    let shape = [linear.weight.rows(), linear.weight.cols()];
                    linear.adapter = Some(Lora::init(config, shape, seed, stream(layer, index), &device));
                }
            }
        }
    }

    /// Puts copies of the factors of `adapter` beside the layers that it names by module path, to be trained, and none
    /// beside the others. `dropout` is used while training.
    ///
    /// # Errors
    /// Layers that the model does not have, or has in other shapes: all of them.
    pub fn attach_weights(&mut self, adapter: &Adapter, dropout: f64) -> Result<(), ModelError> {
        let device = self.device.clone();
        self.attach_each(adapter, dropout, |config, lora, stream| {
            let (a, b) = (lora.a.values().into_owned(), lora.b.values().into_owned());
            Lora::from_weights(config, [lora.d_out, lora.d_in], a, b, stream, &device)
        })
    }

    /// The same to answer only: the factors stay as and where they are stored, and each forward pass decodes those of the
    /// layer that it is in.
    ///
    /// # Errors
    /// As [`attach_weights`](Self::attach_weights).
    pub fn attach_frozen(&mut self, adapter: &Adapter) -> Result<(), ModelError> {
        self.attach_each(adapter, 0.0, |config, lora, stream| {
            Lora::frozen(config, lora.a.matrix(lora.d_in).into(), lora.b.matrix(lora.r).into(), stream)
        })
    }

    fn attach_each(
        &mut self,
        adapter: &Adapter,
        dropout: f64,
        make: impl Fn(&LoraConfig, &LoraWeights, u64) -> Lora,
    ) -> Result<(), ModelError> {
        let mut unknown: Vec<String> = adapter.layers.keys().cloned().collect();
        let mut mismatches = Vec::new();
        for (layer, block) in self.blocks.iter_mut().enumerate() {
            for (index, (name, linear)) in block.linears_mut().into_iter().enumerate() {
                let path = ModelConfig::linear_path(layer, name);
                linear.adapter = None;
                let Some(lora) = adapter.layers.get(&path) else { continue };
                unknown.retain(|p| *p != path);
                let shape = [linear.weight.rows(), linear.weight.cols()];
                if [lora.d_out, lora.d_in] != shape {
                    let got = [lora.d_out, lora.d_in];
                    mismatches.push(format!("{path}: expected [d_out, d_in] = {shape:?}, got {got:?}"));
                    continue;
                }
                let config = LoraConfig {
                    rank: lora.r,
                    alpha: adapter.config.lora_alpha,
                    use_rslora: adapter.config.use_rslora,
                    dropout,
                };
                linear.adapter = Some(make(&config, lora, stream(layer, index)));
            }
        }
        mismatches.extend(unknown.into_iter().map(|path| format!("{path}: no such layer in the base")));
        if mismatches.is_empty() { Ok(()) } else { Err(ModelError::Adapter { mismatches }) }
    }

    /// Makes every weight a trained tensor, decoded from what it is stored as.
    pub fn unfreeze(&mut self) {
        let device = &self.device;
        self.embed_tokens = self.embed_tokens.unfrozen(device);
        for block in &mut self.blocks {
            for (_, linear) in block.linears_mut() {
                *linear = linear.unfrozen(device);
            }
            block.input_norm = block.input_norm.unfrozen(device);
            block.post_attention_norm = block.post_attention_norm.unfrozen(device);
        }
        self.norm = self.norm.unfrozen(device);
        self.lm_head = self.lm_head.as_ref().map(|head| head.unfrozen(device));
    }

    /// Every trained parameter in a fixed order: embedding, blocks, final norm, head. A tied head is the embedding.
    pub fn parameters_mut(&mut self) -> Vec<Parameter<'_>> {
        let mut parameters = Vec::new();
        parameters.extend(of_weight("model.embed_tokens.weight".into(), &mut self.embed_tokens));
        for (layer, block) in self.blocks.iter_mut().enumerate() {
            parameters.extend(block.parameters_mut(layer));
        }
        parameters.extend(of_norm("model.norm.weight".into(), &mut self.norm));
        parameters.extend(self.lm_head.as_mut().and_then(|head| of_weight("lm_head.weight".into(), head)));
        parameters
    }

    /// The weights, if they are trained.
    pub fn trained_weights(&self) -> Option<TrainedWeights> {
        self.embed_tokens.trained()?;
        let (mut matrices, mut vectors) = (BTreeMap::new(), BTreeMap::new());
        for Parameter { name, tensor, is_vector } in self.clone().parameters_mut() {
            if is_vector {
                vectors.insert(name, FrozenVector::from(tensor.to_data().iter::<f32>().collect::<Vec<_>>()));
            } else {
                matrices.insert(name, Weight::Trained(tensor.clone()).stored());
            }
        }
        Some(TrainedWeights::new(matrices, vectors))
    }

    /// The same model without its adapters: the base.
    pub fn without_adapters(&self) -> Self {
        let mut base = self.clone();
        for (_, linear) in base.blocks.iter_mut().flat_map(Block::linears_mut) {
            linear.adapter = None;
        }
        base
    }

    /// All adapters in a fixed order: by layer, then in the order in which a block applies its linears.
    pub fn adapters_mut(&mut self) -> Vec<AdapterSlot<'_>> {
        self.blocks
            .iter_mut()
            .enumerate()
            .flat_map(|(layer, block)| {
                block.linears_mut().into_iter().filter_map(move |(name, linear)| {
                    let path = ModelConfig::linear_path(layer, name);
                    linear.adapter.as_mut().map(|adapter| AdapterSlot { path, adapter })
                })
            })
            .collect()
    }

    /// The hyper-parameters.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Where the tensors live.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The layers, first to last.
    pub fn blocks(&self) -> &[Block] {
        &self.blocks
    }

    /// The token embedding `[vocab, d_model]`.
    pub fn embedding(&self) -> &Weight {
        &self.embed_tokens
    }

    /// The output head `[vocab, d_model]` as it stands.
    pub fn head(&self) -> FrozenWeight {
        self.lm_head.as_ref().unwrap_or(&self.embed_tokens).stored()
    }

    /// Whether the head is the embedding.
    pub fn is_tied(&self) -> bool {
        self.lm_head.is_none()
    }

    /// What follows the blocks.
    pub fn output(&self) -> Output {
        let head = self.lm_head.as_ref().unwrap_or(&self.embed_tokens);
        Output { norm: self.norm.clone(), head: head.clone() }
    }

    /// What the blocks need besides their input.
    pub fn context(&self, layout: &Layout, dropout: Option<tune_adapters::Dropout>) -> Context {
        let rotary = RotaryTable::new(&layout.positions, &self.frequencies, 1.0);
        Context { rotary, spans: layout.spans.clone(), dropout, arithmetic: self.arithmetic }
    }

    /// The input of the first block, `[tokens, d_model]`.
    pub fn embed(&self, ids: &[u32]) -> Tensor<2> {
        embedding(&self.embed_tokens.stored(), ids, &self.device)
    }

    /// The final norm, in front of the head.
    pub fn final_norm(&self, hidden: Tensor<2>) -> Tensor<2> {
        self.norm.forward(hidden)
    }

    /// Output of the final norm for all tokens, without a graph: `[tokens, d_model]`.
    pub fn hidden(&self, ids: &[u32], layout: &Layout) -> Tensor<2> {
        let context = self.context(layout, None);
        let mut x = self.embed(ids);
        for block in &self.blocks {
            x = block.forward(x, &context);
            self.leave(block);
        }
        self.final_norm(x)
    }

    /// The same for `ids` after the tokens in `cache`, which takes them in.
    pub fn hidden_cached(&self, ids: &[u32], cache: &mut KvCache) -> Tensor<2> {
        let context = self.context(&Layout::continuation(cache.len(), ids.len()), None);
        let mut x = self.embed(ids);
        for (layer, block) in self.blocks.iter().enumerate() {
            x = block.forward_cached(x, &context, layer, cache);
        }
        cache.advance(ids.len());
        self.final_norm(x)
    }

    /// An empty cache for at most `capacity` tokens.
    pub fn kv_cache(&self, capacity: usize) -> KvCache {
        KvCache::new(self.blocks.len(), capacity)
    }

    /// Logits `[tokens, vocab]` of hidden states behind the final norm. For a few tokens only: training and
    /// evaluation never hold them for a whole micro-batch.
    pub fn logits(&self, hidden: Tensor<2>) -> Tensor<2> {
        frozen_linear(hidden, &self.head())
    }
}

impl Output {
    /// The same with what is trained of it as leaves of a fresh autodiff graph.
    pub fn tracked(&self) -> Self {
        Self { norm: self.norm.tracked(), head: self.head.tracked() }
    }

    /// What is trained of it: the gain of the norm, then the head.
    pub fn trained(&self) -> Vec<&Tensor<2>> {
        self.norm.gain.trained().into_iter().chain(self.head.trained()).collect()
    }
}

impl Block {
    /// # Shapes
    ///
    /// - x, output: `[tokens, d_model]`
    pub fn forward(&self, x: Tensor<2>, context: &Context) -> Tensor<2> {
        // The fused operations know no dropout.
        let drops = context.dropout.is_some() && self.has_dropout();
        if context.arithmetic == Arithmetic::Bf16 && !drops {
            return self.forward_bf16(x, context);
        }
        let normed = self.input_norm.forward(x.clone());
        let h = x + self.attention.forward(normed, context);
        self.mlp_residual(h, context)
    }

    /// The same in `f32` and without a graph, showing the input of each linear layer, `[tokens, d_in]`, with the names
    /// of the layers that share it.
    pub fn observe(
        &self,
        x: Tensor<2>,
        context: &Context,
        see: &mut dyn FnMut(&[&'static str], &Tensor<2>),
    ) -> Tensor<2> {
        let Self { attention: a, mlp: m, .. } = self;
        let normed = self.input_norm.forward(x.clone());
        see(&["q_proj", "k_proj", "v_proj"], &normed);
        let (q, k, v) = a.qkv(normed, context);
        let mixed = causal_attention(q, k, v, context.spans.clone(), a.head_dim);
        see(&["o_proj"], &mixed);
        let h = x + a.o_proj.forward(mixed, None);
        let normed = self.post_attention_norm.forward(h.clone());
        see(&["gate_proj", "up_proj"], &normed);
        let gated = swiglu(m.gate_proj.forward(normed.clone(), None), m.up_proj.forward(normed, None));
        see(&["down_proj"], &gated);
        h + m.down_proj.forward(gated, None)
    }

    /// The same in fused operations; the residual stream stays `f32`.
    fn forward_bf16(&self, x: Tensor<2>, context: &Context) -> Tensor<2> {
        let Self { attention: a, mlp: m, .. } = self;
        let device = x.device().inner();
        let [q, k, v] = [&a.q_proj, &a.k_proj, &a.v_proj].map(|linear| linear.layer(&device));
        let qkv = project(self.input_norm.input(x.clone()), &[q, k, v], None);
        let [heads, kv_heads] = [&a.q_proj, &a.k_proj].map(|linear| linear.weight.rows() / a.head_dim);
        let mixed = self_attention(qkv, &context.rotary, context.spans.clone(), heads, kv_heads);
        let h = project(Input::Plain(mixed), &[a.o_proj.layer(&device)], Some(x));
        let [gate, up] = [&m.gate_proj, &m.up_proj].map(|linear| linear.layer(&device));
        let gate_up = project(self.post_attention_norm.input(h.clone()), &[gate, up], None);
        project(Input::SwiGlu(gate_up), &[m.down_proj.layer(&device)], Some(h))
    }

    /// The same block with what is trained of it as leaves of a fresh autodiff graph.
    pub fn tracked(&self) -> Self {
        let mut block = self.clone();
        for (_, linear) in block.linears_mut() {
            *linear = linear.tracked();
        }
        block.input_norm = block.input_norm.tracked();
        block.post_attention_norm = block.post_attention_norm.tracked();
        block
    }

    /// Whether any linear of this block is trained.
    pub fn is_trained(&self) -> bool {
        self.linears().iter().any(|(_, linear)| linear.is_trained())
    }

    /// Every trained parameter of this block, which is number `layer`, in the order of the forward pass.
    pub fn parameters_mut(&mut self, layer: usize) -> Vec<Parameter<'_>> {
        let Self { input_norm, attention: a, post_attention_norm, mlp: m } = self;
        let norm = |part: &str| format!("model.layers.{layer}.{part}.weight");
        let linear = |(name, linear)| of_linear(&ModelConfig::linear_path(layer, name), linear);
        let attention = [
            ("q_proj", &mut a.q_proj),
            ("k_proj", &mut a.k_proj),
            ("v_proj", &mut a.v_proj),
            ("o_proj", &mut a.o_proj),
        ];
        let mlp =
            [("gate_proj", &mut m.gate_proj), ("up_proj", &mut m.up_proj), ("down_proj", &mut m.down_proj)];
        let mut parameters = Vec::new();
        parameters.extend(of_norm(norm("input_layernorm"), input_norm));
        parameters.extend(attention.into_iter().flat_map(linear));
        parameters.extend(of_norm(norm("post_attention_layernorm"), post_attention_norm));
        parameters.extend(mlp.into_iter().flat_map(linear));
        parameters
    }

    fn has_dropout(&self) -> bool {
        self.linears().iter().any(|(_, linear)| linear.adapter.as_ref().is_some_and(Lora::has_dropout))
    }

    /// The linear layers by PEFT name, in the order in which the block applies them.
    pub fn linears(&self) -> [(&'static str, &Linear); 7] {
        let Self { attention: a, mlp: m, .. } = self;
        [
            ("q_proj", &a.q_proj),
            ("k_proj", &a.k_proj),
            ("v_proj", &a.v_proj),
            ("o_proj", &a.o_proj),
            ("gate_proj", &m.gate_proj),
            ("up_proj", &m.up_proj),
            ("down_proj", &m.down_proj),
        ]
    }

    fn linears_mut(&mut self) -> [(&'static str, &mut Linear); 7] {
        let Self { attention: a, mlp: m, .. } = self;
        [
            ("q_proj", &mut a.q_proj),
            ("k_proj", &mut a.k_proj),
            ("v_proj", &mut a.v_proj),
            ("o_proj", &mut a.o_proj),
            ("gate_proj", &mut m.gate_proj),
            ("up_proj", &mut m.up_proj),
            ("down_proj", &mut m.down_proj),
        ]
    }

    fn forward_cached(
        &self,
        x: Tensor<2>,
        context: &Context,
        layer: usize,
        cache: &mut KvCache,
    ) -> Tensor<2> {
        let normed = self.input_norm.forward(x.clone());
        let (q, k, v) = self.attention.qkv(normed, context);
        let (k, v) = cache.append(layer, k, v);
        let h = x + self.attention.attend(q, k, v, context);
        self.mlp_residual(h, context)
    }

    fn mlp_residual(&self, h: Tensor<2>, context: &Context) -> Tensor<2> {
        let normed = self.post_attention_norm.forward(h.clone());
        h + self.mlp.forward(normed, context)
    }
}

impl Attention {
    fn forward(&self, x: Tensor<2>, context: &Context) -> Tensor<2> {
        let (q, k, v) = self.qkv(x, context);
        self.attend(q, k, v, context)
    }

    fn qkv(&self, x: Tensor<2>, context: &Context) -> (Tensor<2>, Tensor<2>, Tensor<2>) {
        let q = self.q_proj.forward(x.clone(), context.dropout); // [tokens, n_heads · head_dim]
        let k = self.k_proj.forward(x.clone(), context.dropout); // [tokens, n_kv_heads · head_dim]
        let v = self.v_proj.forward(x, context.dropout);
        (rope(q, &context.rotary), rope(k, &context.rotary), v)
    }

    fn attend(&self, q: Tensor<2>, k: Tensor<2>, v: Tensor<2>, context: &Context) -> Tensor<2> {
        let mixed = causal_attention(q, k, v, context.spans.clone(), self.head_dim);
        self.o_proj.forward(mixed, context.dropout)
    }
}

impl Mlp {
    fn forward(&self, x: Tensor<2>, context: &Context) -> Tensor<2> {
        let gate = self.gate_proj.forward(x.clone(), context.dropout); // [tokens, d_ff]
        let up = self.up_proj.forward(x, context.dropout);
        self.down_proj.forward(swiglu(gate, up), context.dropout)
    }
}

fn of_linear<'a>(path: &str, linear: &'a mut Linear) -> Vec<Parameter<'a>> {
    let mut parameters: Vec<_> =
        of_weight(format!("{path}.weight"), &mut linear.weight).into_iter().collect();
    let bias = linear.bias.as_mut().and_then(|bias| of_vector(format!("{path}.bias"), bias));
    parameters.extend(bias);
    if let Some(adapter) = &mut linear.adapter {
        let parts = [("lora_A", &mut adapter.a), ("lora_B", &mut adapter.b)];
        parameters.extend(
            parts.into_iter().filter_map(|(part, factor)| of_weight(format!("{path}.{part}.weight"), factor)),
        );
    }
    parameters
}

fn of_norm(name: String, norm: &mut RmsNorm) -> Option<Parameter<'_>> {
    of_vector(name, &mut norm.gain)
}

fn of_weight(name: String, weight: &mut Weight) -> Option<Parameter<'_>> {
    weight.trained_mut().map(|tensor| Parameter { name, tensor, is_vector: false })
}

fn of_vector(name: String, vector: &mut Vector) -> Option<Parameter<'_>> {
    vector.trained_mut().map(|tensor| Parameter { name, tensor, is_vector: true })
}

/// Reads the weights and collects every shape that does not fit, to report them together.
struct Loader<'a> {
    config: &'a ModelConfig,
    weights: &'a dyn Weights,
    quantization: Quantization,
    mismatches: Vec<String>,
}

impl Loader<'_> {
    fn block(&mut self, layer: usize) -> Result<Block, ModelError> {
        let [q, k, v, o, gate, up, down] =
            self.config.block_linears().map(|(name, d_out, d_in)| self.linear(layer, name, d_out, d_in));
        let norm = |part| format!("model.layers.{layer}.{part}.weight");
        Ok(Block {
            input_norm: self.norm(&norm("input_layernorm"))?,
            attention: Attention {
                q_proj: q?,
                k_proj: k?,
                v_proj: v?,
                o_proj: o?,
                head_dim: self.config.head_dim,
            },
            post_attention_norm: self.norm(&norm("post_attention_layernorm"))?,
            mlp: Mlp { gate_proj: gate?, up_proj: up?, down_proj: down? },
        })
    }

    fn linear(&mut self, layer: usize, name: &str, d_out: usize, d_in: usize) -> Result<Linear, ModelError> {
        let path = ModelConfig::linear_path(layer, name);
        let stored = self.matrix(&format!("{path}.weight"), d_out, d_in)?;
        let weight = match self.quantization {
            Quantization::Nf4 if !stored.is_quantized() => {
                let quantised = stored.to_nf4();
                stored.release();
                quantised
            }
            _ => stored,
        };
        let bias_name = format!("{path}.bias");
        let bias = if self.weights.shape(&bias_name).is_some() {
            Some(self.vector(&bias_name, d_out)?.into())
        } else {
            None
        };
        Ok(Linear { weight: weight.into(), bias, adapter: None })
    }

    fn norm(&mut self, name: &str) -> Result<RmsNorm, ModelError> {
        Ok(RmsNorm::new(self.vector(name, self.config.hidden_size)?, self.config.rms_norm_eps))
    }

    fn matrix(&mut self, name: &str, rows: usize, cols: usize) -> Result<StoredMatrix, ModelError> {
        let stored = self.weights.matrix(name)?;
        if (stored.rows(), stored.cols()) != (rows, cols) {
            let got = [stored.rows(), stored.cols()];
            self.mismatches.push(format!("{name}: expected {:?}, got {got:?}", [rows, cols]));
        }
        Ok(stored)
    }

    fn vector(&mut self, name: &str, len: usize) -> Result<Vec<f32>, ModelError> {
        let values = self.weights.vector(name)?;
        if values.len() != len {
            self.mismatches.push(format!("{name}: expected [{len}], got [{}]", values.len()));
            return Ok(vec![0.0; len]);
        }
        Ok(values)
    }
}

/// Tells the adapters of a model apart, independently of which of them exist.
fn stream(layer: usize, index: usize) -> u64 {
    (layer * tune_adapters::LINEARS.len() + index) as u64
}
