//! What a decoder is made of, in groups of equal blocks: enough to count its parameters, the adapters over it, what a
//! training step keeps and what its cache holds.
//!
//! One description covers plain decoders, mixtures of experts, sliding windows, blocks that share keys and values, gated
//! delta nets and per-layer embeddings. A plain decoder is also a [`Shape`], which the estimate of our own training
//! counts with.

use serde::{Deserialize, Serialize};

use crate::Shape;
use crate::cache_type::CacheType;

/// A decoder.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layout {
    /// Rows of the embedding.
    pub vocab_size: u64,
    /// Width of the residual stream.
    pub hidden_size: u64,
    /// The output head is the embedding.
    pub tied: bool,
    /// Width of a second embedding that each block looks up on its own; 0 without.
    #[serde(default)]
    pub embedding_per_layer: u64,
    /// Its blocks, equal ones together.
    pub layers: Vec<LayerGroup>,
}

/// Equal blocks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerGroup {
    /// How many.
    pub count: u64,
    /// What mixes positions.
    pub mixer: Mixer,
    /// What follows it.
    pub mlp: Mlp,
    /// Norms of the width of the model.
    #[serde(default = "two")]
    pub norms: u64,
}

/// What mixes positions.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mixer {
    /// Softmax attention.
    Attention(Attention),
    /// A linear recurrence with a state of fixed size, with a convolution in front.
    DeltaNet(DeltaNet),
}

/// Softmax attention.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Attention {
    /// Query heads.
    pub heads: u64,
    /// Key and value heads.
    pub kv_heads: u64,
    /// Width of one head.
    pub head_dim: u64,
    /// Positions that are seen, where it is not all of them.
    #[serde(default)]
    pub window: Option<u64>,
    /// Where values come from.
    #[serde(default)]
    pub values: Values,
    /// What it has beside its projections.
    #[serde(default)]
    pub with: Vec<AttentionPart>,
}

/// Where the values of an attention come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Values {
    /// From their own projection.
    #[default]
    Own,
    /// The projected keys are the values too, before either is normalised: one projection, two caches.
    Keys,
    /// Keys and values are those of an earlier block: no projection, no cache.
    Shared,
}

/// What an attention may have beside its projections.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AttentionPart {
    /// Queries and keys of a head are normalised.
    QkNorm,
    /// Values are normalised, without a weight.
    ValueNorm,
    /// Biases on q, k and v.
    QkvBias,
    /// A bias on the output.
    OutputBias,
    /// The query projection also makes a gate for the output.
    OutputGate,
    /// A number a head that takes part in the softmax.
    Sinks,
    /// q, k and v are one projection.
    Fused,
}

/// A gated delta net.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeltaNet {
    /// Heads of queries, and of keys.
    pub qk_heads: u64,
    /// Heads of values.
    pub v_heads: u64,
    /// Width of one head.
    pub head_dim: u64,
    /// Positions that the convolution sees.
    pub kernel: u64,
}

/// What follows the mixer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mlp {
    /// Width of the gated MLP that every token goes through, a shared expert included; 0 without.
    #[serde(default)]
    pub width: u64,
    /// Gate and up are one projection.
    #[serde(default)]
    pub fused: bool,
    /// Experts of which a token goes through some.
    #[serde(default)]
    pub experts: Option<Experts>,
}

/// Routed experts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Experts {
    /// How many there are.
    pub count: u64,
    /// How many a token goes through.
    pub active: u64,
    /// Width of one.
    pub width: u64,
    /// What they have beside their matrices and the router.
    #[serde(default)]
    pub with: Vec<ExpertsPart>,
}

/// What routed experts may have beside their matrices and the router.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExpertsPart {
    /// Biases in experts and router.
    Bias,
    /// A gate on the shared expert.
    SharedGate,
    /// A gain of the router's input and one number an expert.
    Scales,
    /// Norms of their own before and behind, and one behind the dense MLP.
    Norms,
}

/// A linear layer of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Linear {
    /// PEFT name, or the published one.
    pub name: &'static str,
    /// Width of its output.
    pub d_out: u64,
    /// Width of its input.
    pub d_in: u64,
    /// Whether it is one of the seven that carry adapters, or their counterpart.
    pub adapted: bool,
}

/// Parameters by what they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize)]
pub struct Split {
    /// Linear layers of all blocks, routers included, experts not.
    pub linears: u64,
    /// Routed experts.
    pub experts: u64,
    /// The embedding.
    pub embedding: u64,
    /// The embedding of the blocks: only ever looked up, so it can stay in main memory.
    pub embedding_per_layer: u64,
    /// The output head, unless it is the embedding.
    pub head: u64,
    /// Norms, biases, convolutions.
    pub vectors: u64,
}

impl Split {
    /// All of them.
    pub fn total(&self) -> u64 {
        self.linears + self.experts + self.embedding + self.embedding_per_layer + self.head + self.vectors
    }
}

impl Layout {
    /// Blocks.
    pub fn blocks(&self) -> u64 {
        self.layers.iter().map(|group| group.count).sum()
    }

    /// All weights, tied ones once.
    pub fn parameters(&self) -> u64 {
        self.split().total()
    }

    /// Parameters by what they are.
    pub fn split(&self) -> Split {
        let mut split = Split {
            embedding: self.vocab_size * self.hidden_size,
            embedding_per_layer: self.vocab_size * self.blocks() * self.embedding_per_layer,
            head: if self.tied { 0 } else { self.vocab_size * self.hidden_size },
            // The final norm.
            vectors: self.hidden_size,
            ..Split::default()
        };
        if self.embedding_per_layer > 0 {
            let width = self.blocks() * self.embedding_per_layer;
            split.linears += self.hidden_size * width;
            split.vectors += self.embedding_per_layer;
        }
        for group in &self.layers {
            let linears: u64 = self.linears(group).iter().map(|linear| linear.d_out * linear.d_in).sum();
            split.linears += group.count * linears;
            split.experts += group.count * self.expert_parameters(group);
            split.vectors += group.count * self.vector_parameters(group);
        }
        split
    }

    /// The linear layers of one block of a group, without those of routed experts.
    pub fn linears(&self, group: &LayerGroup) -> Vec<Linear> {
        let d = self.hidden_size;
        let adapted = |name, d_out, d_in| Linear { name, d_out, d_in, adapted: true };
        let plain = |name, d_out, d_in| Linear { name, d_out, d_in, adapted: false };
        let mut linears = match &group.mixer {
            Mixer::Attention(attention) => {
                let (q, kv) = (attention.q(), attention.kv());
                let q_out = if attention.has(AttentionPart::OutputGate) { 2 * q } else { q };
                let mut linears = match (attention.values, attention.has(AttentionPart::Fused)) {
                    (_, true) => vec![adapted("qkv_proj", q_out + 2 * kv, d)],
                    (Values::Own, _) => {
                        vec![adapted("q_proj", q_out, d), adapted("k_proj", kv, d), adapted("v_proj", kv, d)]
                    }
                    (Values::Keys, _) => vec![adapted("q_proj", q_out, d), adapted("k_proj", kv, d)],
                    (Values::Shared, _) => vec![adapted("q_proj", q_out, d)],
                };
                linears.push(adapted("o_proj", d, q));
                linears
            }
            Mixer::DeltaNet(net) => vec![
                adapted("in_proj_qkv", net.convolved(), d),
                adapted("in_proj_z", net.v(), d),
                plain("in_proj_a", net.v_heads, d),
                plain("in_proj_b", net.v_heads, d),
                adapted("out_proj", d, net.v()),
            ],
        };
        let f = group.mlp.width;
        if f > 0 {
            match group.mlp.fused {
                true => linears.push(adapted("gate_up_proj", 2 * f, d)),
                false => linears.extend([adapted("gate_proj", f, d), adapted("up_proj", f, d)]),
            }
            linears.push(adapted("down_proj", d, f));
        }
        if let Some(experts) = &group.mlp.experts {
            linears.push(plain("router", experts.count, d));
            if experts.has(ExpertsPart::SharedGate) {
                linears.push(plain("shared_expert_gate", 1, d));
            }
        }
        if self.embedding_per_layer > 0 {
            linears.push(plain("per_layer_input_gate", self.embedding_per_layer, d));
            linears.push(plain("per_layer_projection", d, self.embedding_per_layer));
        }
        linears
    }

    /// Adapter parameters per rank, with adapters on the seven linear layers of every block or on their counterparts;
    /// none on routed experts.
    pub fn adapter_parameters_per_rank(&self) -> u64 {
        let of_block = |group: &LayerGroup| {
            let adapted = self.linears(group).into_iter().filter(|linear| linear.adapted);
            adapted.map(|linear| linear.d_out + linear.d_in).sum::<u64>()
        };
        self.layers.iter().map(|group| group.count * of_block(group)).sum()
    }

    /// The cache of one conversation of so many tokens, exactly: a window keeps no more than its width, shared keys and
    /// values are kept once, and a delta net keeps a state of fixed size.
    pub fn cache_bytes(&self, tokens: u64, cache: CacheType) -> u64 {
        let of_block = |group: &LayerGroup| match &group.mixer {
            Mixer::Attention(attention) if attention.values == Values::Shared => 0,
            Mixer::Attention(attention) => {
                let kept = attention.window.map_or(tokens, |window| window.min(tokens));
                cache.bytes(attention.kv().saturating_mul(2).saturating_mul(kept))
            }
            // A state in 32 bits, and what the convolution sees in 16.
            Mixer::DeltaNet(net) => {
                4 * net.v_heads * net.head_dim * net.head_dim + 2 * net.convolved() * net.kernel
            }
        };
        self.layers
            .iter()
            .fold(0, |sum: u64, group| sum.saturating_add(group.count.saturating_mul(of_block(group))))
    }

    /// What the founding formula of the cache takes from a configuration: blocks, key-value heads, width of a head.
    pub fn stated_cache_dimensions(&self) -> (u64, u64, u64) {
        let stated = self.layers.iter().find_map(|group| match &group.mixer {
            Mixer::Attention(attention) => Some((attention.kv_heads, attention.head_dim)),
            Mixer::DeltaNet(_) => None,
        });
        let (kv_heads, head_dim) = stated.unwrap_or_default();
        (self.blocks(), kv_heads, head_dim)
    }

    /// The same as a plain decoder, if it is one: equal blocks of full attention and a gated MLP.
    pub fn shape(&self) -> Option<Shape> {
        let [LayerGroup { count, mixer: Mixer::Attention(attention), mlp, norms: 2 }] = &self.layers[..]
        else {
            return None;
        };
        let known = |part: &AttentionPart| matches!(part, AttentionPart::QkvBias | AttentionPart::QkNorm);
        let plain = attention.window.is_none()
            && attention.values == Values::Own
            && attention.with.iter().all(known)
            && !mlp.fused
            && mlp.experts.is_none()
            && self.embedding_per_layer == 0;
        plain.then(|| Shape {
            vocab_size: self.vocab_size,
            hidden_size: self.hidden_size,
            intermediate_size: mlp.width,
            num_hidden_layers: *count,
            num_attention_heads: attention.heads,
            num_key_value_heads: attention.kv_heads,
            head_dim: attention.head_dim,
            tied: self.tied,
            attention_bias: attention.has(AttentionPart::QkvBias),
            qk_norm: attention.has(AttentionPart::QkNorm),
        })
    }

    fn expert_parameters(&self, group: &LayerGroup) -> u64 {
        let Some(experts) = &group.mlp.experts else { return 0 };
        let biases = if experts.has(ExpertsPart::Bias) { 2 * experts.width + self.hidden_size } else { 0 };
        experts.count * (3 * experts.width * self.hidden_size + biases)
    }

    fn vector_parameters(&self, group: &LayerGroup) -> u64 {
        let d = self.hidden_size;
        let per_layer_norm = if self.embedding_per_layer > 0 { d } else { 0 };
        let of_mixer = match &group.mixer {
            Mixer::Attention(a) => {
                let keys = u64::from(a.values != Values::Shared);
                let part = |part, parameters| if a.has(part) { parameters } else { 0 };
                part(AttentionPart::QkNorm, (1 + keys) * a.head_dim)
                    + part(AttentionPart::QkvBias, a.q() + 2 * a.kv())
                    + part(AttentionPart::OutputBias, d)
                    + part(AttentionPart::Sinks, a.heads)
            }
            // The convolution, a decay and a step bias a head, the gated norm.
            Mixer::DeltaNet(net) => net.convolved() * net.kernel + 2 * net.v_heads + net.head_dim,
        };
        let of_experts = group.mlp.experts.as_ref().map_or(0, |experts| {
            let part = |part, parameters| if experts.has(part) { parameters } else { 0 };
            part(ExpertsPart::Bias, experts.count)
                + part(ExpertsPart::Scales, d + experts.count)
                + part(ExpertsPart::Norms, 3 * d)
        });
        group.norms * d + per_layer_norm + of_mixer + of_experts
    }
}

impl From<&Shape> for Layout {
    fn from(shape: &Shape) -> Self {
        let mut with = Vec::new();
        if shape.attention_bias {
            with.push(AttentionPart::QkvBias);
        }
        if shape.qk_norm {
            with.push(AttentionPart::QkNorm);
        }
        let attention = Attention {
            heads: shape.num_attention_heads,
            kv_heads: shape.num_key_value_heads,
            head_dim: shape.head_dim,
            window: None,
            values: Values::Own,
            with,
        };
        let group = LayerGroup {
            count: shape.num_hidden_layers,
            mixer: Mixer::Attention(attention),
            mlp: Mlp { width: shape.intermediate_size, fused: false, experts: None },
            norms: two(),
        };
        Self {
            vocab_size: shape.vocab_size,
            hidden_size: shape.hidden_size,
            tied: shape.tied,
            embedding_per_layer: 0,
            layers: vec![group],
        }
    }
}

impl Attention {
    /// Width of all query heads.
    pub fn q(&self) -> u64 {
        self.heads * self.head_dim
    }

    /// Width of all key heads, and of all value heads.
    pub fn kv(&self) -> u64 {
        self.kv_heads * self.head_dim
    }

    /// Whether it has this part.
    pub fn has(&self, part: AttentionPart) -> bool {
        self.with.contains(&part)
    }
}

impl DeltaNet {
    /// Width of all value heads.
    pub fn v(&self) -> u64 {
        self.v_heads * self.head_dim
    }

    /// Width of queries, keys and values: what goes through the convolution.
    pub fn convolved(&self) -> u64 {
        2 * self.qk_heads * self.head_dim + self.v()
    }
}

impl Experts {
    /// Whether they have this part.
    pub fn has(&self, part: ExpertsPart) -> bool {
        self.with.contains(&part)
    }
}

fn two() -> u64 {
    2
}
