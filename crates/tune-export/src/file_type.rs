//! The types that llama.cpp's `llama-quantize` gives the matrices of a file, tensor by tensor.
//!
//! A file type names the type of most matrices. In the mixes (`_S`, `_M`), those through which all information of a
//! block must pass get more bits, in some layers or in all; the output head always does. A row that is not a whole
//! number of 256-value blocks takes the next larger type with blocks of 32. The rules are llama.cpp's, without an
//! importance matrix and for dense models, so that a file written here equals the file it would write.
//!
//! Departure: llama.cpp keeps MXFP4 for the experts of a mixture and stores a dense model under that name as Q8_0
//! throughout. Here MXFP4 means it: the matrices of all blocks, with embedding and head in Q8_0.

use std::fmt;

use tune_formats::ModelConfig;
use tune_quant::BlockType;

/// What most matrices of a GGUF file are stored as: `general.file_type`.
#[allow(non_camel_case_types)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileType {
    /// Single precision throughout.
    F32,
    /// Half precision.
    F16,
    /// The upper halves of singles.
    BF16,
    /// 8 bits.
    Q8_0,
    /// 6 bits.
    Q6_K,
    /// 5 bits, 6 in half of the layers for attention values and the way down.
    Q5_K_M,
    /// 5 bits.
    Q5_K_S,
    /// 5 bits with minimum.
    Q5_1,
    /// 5 bits.
    Q5_0,
    /// 4 bits, 6 in half of the layers for attention values and the way down.
    Q4_K_M,
    /// 4 bits, 5 in the first layers for attention values and the way down.
    Q4_K_S,
    /// 4 bits with minimum.
    Q4_1,
    /// 4 bits.
    Q4_0,
    /// 4 bits on a non-linear scale.
    IQ4_NL,
    /// 4-bit floats with a power-of-two scale.
    MXFP4,
    /// 3 bits, 4 or 5 for attention values, attention output and the way down.
    Q3_K_M,
    /// 2 bits, 3 or 4 for attention values, attention output and the way down.
    Q2_K,
}

/// What the choice depends on, apart from the tensor.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ModelShape {
    n_layers: usize,
    n_heads: usize,
    n_kv_heads: usize,
    /// The file has no output matrix; the embedding serves as one.
    tied: bool,
}

impl FileType {
    /// Every file type, from fine to coarse.
    pub const ALL: [Self; 17] = [
        Self::F32,
        Self::F16,
        Self::BF16,
        Self::Q8_0,
        Self::Q6_K,
        Self::Q5_K_M,
        Self::Q5_K_S,
        Self::Q5_1,
        Self::Q5_0,
        Self::Q4_K_M,
        Self::Q4_K_S,
        Self::Q4_1,
        Self::Q4_0,
        Self::IQ4_NL,
        Self::MXFP4,
        Self::Q3_K_M,
        Self::Q2_K,
    ];

    /// The file type called `name` in any case; `Q4_K` and the like are short for the `_M` mix, as in llama.cpp.
    pub fn from_name(name: &str) -> Option<Self> {
        let is = |full: &str| {
            full.eq_ignore_ascii_case(name)
                || full.strip_suffix("_M").is_some_and(|short| short.eq_ignore_ascii_case(name))
        };
        Self::ALL.into_iter().find(|file_type| is(file_type.name()))
    }

    /// The name that GGUF tools print.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::BF16 => "BF16",
            Self::Q8_0 => "Q8_0",
            Self::Q6_K => "Q6_K",
            Self::Q5_K_M => "Q5_K_M",
            Self::Q5_K_S => "Q5_K_S",
            Self::Q5_1 => "Q5_1",
            Self::Q5_0 => "Q5_0",
            Self::Q4_K_M => "Q4_K_M",
            Self::Q4_K_S => "Q4_K_S",
            Self::Q4_1 => "Q4_1",
            Self::Q4_0 => "Q4_0",
            Self::IQ4_NL => "IQ4_NL",
            Self::MXFP4 => "MXFP4",
            Self::Q3_K_M => "Q3_K_M",
            Self::Q2_K => "Q2_K",
        }
    }

    /// The number in `general.file_type`.
    pub const fn number(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Q4_0 => 2,
            Self::Q4_1 => 3,
            Self::Q8_0 => 7,
            Self::Q5_0 => 8,
            Self::Q5_1 => 9,
            Self::Q2_K => 10,
            Self::Q3_K_M => 12,
            Self::Q4_K_S => 14,
            Self::Q4_K_M => 15,
            Self::Q5_K_S => 16,
            Self::Q5_K_M => 17,
            Self::Q6_K => 18,
            Self::IQ4_NL => 25,
            Self::BF16 => 32,
            Self::MXFP4 => 38,
        }
    }

    /// Whether most matrices have fewer than 16 bits.
    pub const fn is_quantized(self) -> bool {
        self.usual().is_quantized()
    }

    /// The type of the tensor with this GGUF name and shape (row-major).
    pub(crate) fn of_tensor(self, name: &str, shape: &[usize], model: ModelShape) -> BlockType {
        let &[_, cols] = shape else { return BlockType::F32 };
        let usual = self.usual();
        if !usual.is_quantized() {
            return usual;
        }
        let is_embedding = name == "token_embd.weight";
        let wanted = if name == "output.weight" || is_embedding && model.tied {
            self.of_head(cols)
        } else if is_embedding && self == Self::MXFP4 {
            BlockType::Q8_0
        } else if let Some((layer, part)) = layer_and_part(name) {
            match part {
                "attn_v.weight" => self.of_attention_values(layer, model),
                "attn_output.weight" => self.of_attention_output(),
                "ffn_down.weight" => self.of_way_down(layer, model.n_layers),
                _ => usual,
            }
        } else {
            usual
        };
        fitting(wanted, cols)
    }

    /// The type of most matrices.
    const fn usual(self) -> BlockType {
        match self {
            Self::F32 => BlockType::F32,
            Self::F16 => BlockType::F16,
            Self::BF16 => BlockType::BF16,
            Self::Q8_0 => BlockType::Q8_0,
            Self::Q6_K => BlockType::Q6K,
            Self::Q5_K_M | Self::Q5_K_S => BlockType::Q5K,
            Self::Q5_1 => BlockType::Q5_1,
            Self::Q5_0 => BlockType::Q5_0,
            Self::Q4_K_M | Self::Q4_K_S => BlockType::Q4K,
            Self::Q4_1 => BlockType::Q4_1,
            Self::Q4_0 => BlockType::Q4_0,
            Self::IQ4_NL => BlockType::IQ4NL,
            Self::MXFP4 => BlockType::MXFP4,
            Self::Q3_K_M => BlockType::Q3K,
            Self::Q2_K => BlockType::Q2K,
        }
    }

    /// The output matrix, or the embedding that serves as one. Whether its rows fit is asked of the usual type: a row
    /// of 32-value blocks may still be no whole number of Q6_K blocks, and is then seen to by [`fitting`].
    fn of_head(self, cols: usize) -> BlockType {
        let usual = self.usual();
        if matches!(self, Self::MXFP4 | Self::Q8_0) || !cols.is_multiple_of(usual.block_len()) {
            BlockType::Q8_0
        } else {
            BlockType::Q6K
        }
    }

    fn of_attention_values(self, layer: usize, model: ModelShape) -> BlockType {
        let shared_by_four = model.n_heads / model.n_kv_heads.max(1) >= 4;
        let wanted = match self {
            Self::Q2_K if shared_by_four => BlockType::Q4K,
            Self::Q2_K => BlockType::Q3K,
            Self::Q3_K_M if layer < 2 => BlockType::Q5K,
            Self::Q3_K_M => BlockType::Q4K,
            Self::Q4_K_S if layer < 4 => BlockType::Q5K,
            Self::Q4_K_M | Self::Q5_K_M if deserves_more_bits(layer, model.n_layers) => BlockType::Q6K,
            Self::IQ4_NL if shared_by_four => BlockType::Q5K,
            _ => self.usual(),
        };
        // The shape of Llama 70B, whose value matrices are an eighth of the query matrices.
        let is_70b = model.n_layers == 80 && model.n_heads != model.n_kv_heads;
        if is_70b && matches!(wanted, BlockType::Q3K | BlockType::Q4K) { BlockType::Q5K } else { wanted }
    }

    fn of_attention_output(self) -> BlockType {
        match self {
            Self::Q2_K => BlockType::Q3K,
            Self::Q3_K_M => BlockType::Q4K,
            _ => self.usual(),
        }
    }

    fn of_way_down(self, layer: usize, n_layers: usize) -> BlockType {
        match self {
            Self::Q2_K => BlockType::Q3K,
            Self::Q3_K_M if layer < n_layers / 16 => BlockType::Q5K,
            Self::Q3_K_M => BlockType::Q4K,
            Self::Q4_K_M | Self::Q5_K_M if deserves_more_bits(layer, n_layers) => BlockType::Q6K,
            Self::Q4_K_S | Self::IQ4_NL if layer < n_layers / 8 => BlockType::Q5K,
            _ => self.usual(),
        }
    }
}

impl fmt::Display for FileType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl ModelShape {
    pub(crate) fn new(config: &ModelConfig, tied: bool) -> Self {
        Self::of(config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads, tied)
    }

    pub(crate) const fn of(n_layers: usize, n_heads: usize, n_kv_heads: usize, tied: bool) -> Self {
        Self { n_layers, n_heads, n_kv_heads, tied }
    }
}

/// The first and last eighth of the layers, and every third between them.
fn deserves_more_bits(layer: usize, n_layers: usize) -> bool {
    let eighth = n_layers / 8;
    layer < eighth || layer >= 7 * n_layers / 8 || (layer - eighth) % 3 == 2
}

/// `blk.7.attn_v.weight` → layer 7, `attn_v.weight`.
fn layer_and_part(name: &str) -> Option<(usize, &str)> {
    let (layer, part) = name.strip_prefix("blk.")?.split_once('.')?;
    Some((layer.parse().ok()?, part))
}

/// The type itself, or one with smaller blocks where rows are no whole number of its own.
fn fitting(wanted: BlockType, cols: usize) -> BlockType {
    let fits = |block_type: BlockType| cols.is_multiple_of(block_type.block_len());
    if fits(wanted) {
        return wanted;
    }
    let smaller = match wanted {
        BlockType::Q2K | BlockType::Q3K => BlockType::Q4_0,
        BlockType::Q4K => BlockType::Q5_0,
        BlockType::Q5K => BlockType::Q5_1,
        BlockType::Q6K => BlockType::Q8_0,
        BlockType::IQ4XS => BlockType::IQ4NL,
        _ => BlockType::F16,
    };
    if fits(smaller) { smaller } else { BlockType::F16 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(n_layers: usize, n_kv_heads: usize, tied: bool) -> ModelShape {
        ModelShape { n_layers, n_heads: 8, n_kv_heads, tied }
    }

    fn of_layers(file_type: FileType, part: &str, cols: usize, model: ModelShape) -> Vec<&'static str> {
        let of_layer = |layer| file_type.of_tensor(&format!("blk.{layer}.{part}.weight"), &[8, cols], model);
        (0..model.n_layers).map(|layer| of_layer(layer).name()).collect()
    }

    /// The layers whose matrix is of this type.
    fn layers_of(types: &[&str], wanted: &str) -> Vec<usize> {
        (0..types.len()).filter(|&layer| types[layer] == wanted).collect()
    }

    #[test]
    fn names_and_short_names_lead_back() {
        for file_type in FileType::ALL {
            assert_eq!(FileType::from_name(&file_type.name().to_lowercase()), Some(file_type));
        }
        assert_eq!(FileType::from_name("q4_k"), Some(FileType::Q4_K_M));
        assert_eq!(FileType::from_name("iq4_xs"), None);
    }

    /// What llama.cpp writes for an untied model of sixteen layers whose rows are whole blocks of 256.
    #[test]
    fn mixes_of_a_plain_model() {
        let model = shape(16, 2, false);
        let single = |file_type: FileType, name: &str| file_type.of_tensor(name, &[8, 256], model).name();
        for (file_type, usual, head) in [
            (FileType::F32, "F32", "F32"),
            (FileType::BF16, "BF16", "BF16"),
            (FileType::Q8_0, "Q8_0", "Q8_0"),
            (FileType::Q6_K, "Q6_K", "Q6_K"),
            (FileType::Q5_K_M, "Q5_K", "Q6_K"),
            (FileType::Q5_K_S, "Q5_K", "Q6_K"),
            (FileType::Q5_1, "Q5_1", "Q6_K"),
            (FileType::Q4_K_M, "Q4_K", "Q6_K"),
            (FileType::Q4_K_S, "Q4_K", "Q6_K"),
            (FileType::Q4_0, "Q4_0", "Q6_K"),
            (FileType::IQ4_NL, "IQ4_NL", "Q6_K"),
            (FileType::Q3_K_M, "Q3_K", "Q6_K"),
            (FileType::Q2_K, "Q2_K", "Q6_K"),
        ] {
            assert_eq!(single(file_type, "token_embd.weight"), usual);
            assert_eq!(single(file_type, "output.weight"), head, "{file_type}");
            for part in ["attn_q", "attn_k", "ffn_gate", "ffn_up"] {
                assert_eq!(single(file_type, &format!("blk.3.{part}.weight")), usual, "{file_type}");
            }
            assert_eq!(file_type.of_tensor("blk.3.attn_norm.weight", &[256], model), BlockType::F32);
        }
        assert_eq!(single(FileType::MXFP4, "token_embd.weight"), "Q8_0");
        assert_eq!(single(FileType::MXFP4, "output.weight"), "Q8_0");
        assert_eq!(single(FileType::MXFP4, "blk.0.ffn_down.weight"), "MXFP4");

        let more = [0, 1, 4, 7, 10, 13, 14, 15];
        for (file_type, part, wanted, layers) in [
            (FileType::Q4_K_M, "attn_v", "Q6_K", &more[..]),
            (FileType::Q5_K_M, "ffn_down", "Q6_K", &more[..]),
            (FileType::Q4_K_S, "attn_v", "Q5_K", &[0, 1, 2, 3]),
            (FileType::Q4_K_S, "ffn_down", "Q5_K", &[0, 1]),
            (FileType::Q5_K_S, "attn_v", "Q6_K", &[]),
            (FileType::Q3_K_M, "attn_v", "Q5_K", &[0, 1]),
            (FileType::Q3_K_M, "ffn_down", "Q5_K", &[0]),
            (FileType::IQ4_NL, "ffn_down", "Q5_K", &[0, 1]),
        ] {
            assert_eq!(
                layers_of(&of_layers(file_type, part, 256, model), wanted),
                layers,
                "{file_type} {part}"
            );
        }
        let all = |file_type, part| {
            let types = of_layers(file_type, part, 256, model);
            assert!(types.iter().all(|found| *found == types[15]));
            types[15]
        };
        assert_eq!(all(FileType::Q2_K, "attn_v"), "Q4_K");
        assert_eq!(all(FileType::Q2_K, "ffn_down"), "Q3_K");
        assert_eq!(all(FileType::Q2_K, "attn_output"), "Q3_K");
        assert_eq!(all(FileType::Q3_K_M, "attn_output"), "Q4_K");
        assert_eq!(all(FileType::IQ4_NL, "attn_v"), "Q5_K");
        assert_eq!(of_layers(FileType::Q3_K_M, "ffn_down", 256, model)[1], "Q4_K");
        let alone = shape(16, 8, false);
        assert_eq!(of_layers(FileType::Q2_K, "attn_v", 256, alone)[0], "Q3_K");
        assert_eq!(of_layers(FileType::IQ4_NL, "attn_v", 256, alone)[0], "IQ4_NL");
    }

    /// SmolLM2: tied, 30 layers, rows of 576 (no whole number of 256) and, on the way down, of 1536.
    #[test]
    fn rows_that_are_not_whole_blocks_take_smaller_ones() {
        let model = ModelShape { n_layers: 30, n_heads: 9, n_kv_heads: 3, tied: true };
        let of = |file_type: FileType, name: &str, cols| file_type.of_tensor(name, &[8, cols], model).name();
        let embedding = FileType::ALL.map(|file_type| of(file_type, "token_embd.weight", 576));
        assert_eq!(embedding[..3], ["F32", "F16", "BF16"]);
        assert!(embedding[3..].iter().all(|found| *found == "Q8_0"), "{embedding:?}");
        for (file_type, small, large) in [
            (FileType::Q6_K, "Q8_0", "Q6_K"),
            (FileType::Q5_K_S, "Q5_1", "Q5_K"),
            (FileType::Q4_K_M, "Q5_0", "Q4_K"),
            (FileType::Q3_K_M, "Q4_0", "Q3_K"),
            (FileType::Q2_K, "Q4_0", "Q2_K"),
            (FileType::IQ4_NL, "IQ4_NL", "IQ4_NL"),
        ] {
            assert_eq!(of(file_type, "blk.9.attn_q.weight", 576), small);
            assert_eq!(of(file_type, "blk.9.ffn_up.weight", 1536), large);
        }
        let more = [0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 26, 27, 28, 29];
        let values = of_layers(FileType::Q4_K_M, "attn_v", 576, model);
        assert_eq!((layers_of(&values, "Q8_0"), values[3]), (more.to_vec(), "Q5_0"));
        assert_eq!(layers_of(&of_layers(FileType::Q4_K_M, "ffn_down", 1536, model), "Q6_K"), more);
        assert_eq!(layers_of(&of_layers(FileType::Q4_K_S, "attn_v", 576, model), "Q5_1"), [0, 1, 2, 3]);
        assert_eq!(of(FileType::Q8_0, "blk.0.attn_q.weight", 48), "F16");
        assert_eq!(of(FileType::Q4_K_M, "blk.0.attn_q.weight", 48), "F16");
    }

    #[test]
    fn value_matrices_of_llama_70b_have_five_bits() {
        let model = shape(80, 1, false);
        let values = of_layers(FileType::Q4_K_M, "attn_v", 256, model);
        assert_eq!((values[0], values[10]), ("Q6_K", "Q5_K"));
        assert_eq!(of_layers(FileType::Q4_K_M, "ffn_down", 256, model)[10], "Q4_K");
        assert_eq!(of_layers(FileType::Q4_K_M, "attn_v", 256, shape(80, 8, false))[10], "Q4_K");
    }
}
