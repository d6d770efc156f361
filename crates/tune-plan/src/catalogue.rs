//! Dimensions of published models, for plans made before anything is fetched.
//!
//! From the models' published configurations. Only plain decoders are here, whose memory the estimate can count.

use crate::Shape;

/// A published model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CatalogueShape {
    /// Short name, as Ollama writes it.
    pub alias: &'static str,
    /// Its own name.
    pub name: &'static str,
    /// As in a GGUF's `general.architecture`.
    pub architecture: &'static str,
    /// Its dimensions.
    pub shape: Shape,
}

/// All of them.
pub fn catalogue() -> &'static [CatalogueShape] {
    &CATALOGUE
}

/// The model with this short name or own name, whatever its case.
pub fn find(name: &str) -> Option<&'static CatalogueShape> {
    let name = name.strip_prefix("ollama:").unwrap_or(name);
    CATALOGUE
        .iter()
        .find(|entry| entry.alias.eq_ignore_ascii_case(name) || entry.name.eq_ignore_ascii_case(name))
}

static CATALOGUE: [CatalogueShape; 24] = [
    // layers, d_model, d_ff, heads, KV heads, head_dim, vocab; tied
    entry("llama2:7b", "Llama-2-7B", Family::Llama, [32, 4096, 11008, 32, 32, 128, 32000], false),
    entry("llama2:13b", "Llama-2-13B", Family::Llama, [40, 5120, 13824, 40, 40, 128, 32000], false),
    entry("llama:30b", "LLaMA-30B", Family::Llama, [60, 6656, 17920, 52, 52, 128, 32000], false),
    entry("llama2:70b", "Llama-2-70B", Family::Llama, [80, 8192, 28672, 64, 8, 128, 32000], false),
    entry("llama3.1:8b", "Llama-3.1-8B", Family::Llama, [32, 4096, 14336, 32, 8, 128, 128_256], false),
    entry("llama3.2:1b", "Llama-3.2-1B", Family::Llama, [16, 2048, 8192, 32, 8, 64, 128_256], true),
    entry("llama3.2:3b", "Llama-3.2-3B", Family::Llama, [28, 3072, 8192, 24, 8, 128, 128_256], true),
    entry("smollm2:135m", "SmolLM2-135M", Family::Llama, [30, 576, 1536, 9, 3, 64, 49152], true),
    entry("smollm2:360m", "SmolLM2-360M", Family::Llama, [32, 960, 2560, 15, 5, 64, 49152], true),
    entry("smollm2:1.7b", "SmolLM2-1.7B", Family::Llama, [24, 2048, 8192, 32, 32, 64, 49152], true),
    entry("qwen2.5:0.5b", "Qwen2.5-0.5B", Family::Qwen2, [24, 896, 4864, 14, 2, 64, 151_936], true),
    entry("qwen2.5:1.5b", "Qwen2.5-1.5B", Family::Qwen2, [28, 1536, 8960, 12, 2, 128, 151_936], true),
    entry("qwen2.5:3b", "Qwen2.5-3B", Family::Qwen2, [36, 2048, 11008, 16, 2, 128, 151_936], true),
    entry("qwen2.5:7b", "Qwen2.5-7B", Family::Qwen2, [28, 3584, 18944, 28, 4, 128, 152_064], false),
    entry("qwen2.5:14b", "Qwen2.5-14B", Family::Qwen2, [48, 5120, 13824, 40, 8, 128, 152_064], false),
    entry("qwen3:0.6b", "Qwen3-0.6B", Family::Qwen3, [28, 1024, 3072, 16, 8, 128, 151_936], true),
    entry("qwen3:1.7b", "Qwen3-1.7B", Family::Qwen3, [28, 2048, 6144, 16, 8, 128, 151_936], true),
    entry("qwen3:4b", "Qwen3-4B", Family::Qwen3, [36, 2560, 9728, 32, 8, 128, 151_936], true),
    entry("qwen3:8b", "Qwen3-8B", Family::Qwen3, [36, 4096, 12288, 32, 8, 128, 151_936], false),
    entry("qwen3:14b", "Qwen3-14B", Family::Qwen3, [40, 5120, 17408, 40, 8, 128, 151_936], false),
    entry("qwen3:32b", "Qwen3-32B", Family::Qwen3, [64, 5120, 25600, 64, 8, 128, 151_936], false),
    entry(
        "deepseek-r1:8b",
        "DeepSeek-R1-0528-Qwen3-8B",
        Family::Qwen3,
        [36, 4096, 12288, 32, 8, 128, 151_936],
        false,
    ),
    entry(
        "deepseek-r1:8b-llama-distill",
        "DeepSeek-R1-Distill-Llama-8B",
        Family::Llama,
        [32, 4096, 14336, 32, 8, 128, 128_256],
        false,
    ),
    entry("mistral:7b", "Mistral-7B-v0.3", Family::Llama, [32, 4096, 14336, 32, 8, 128, 32768], false),
];

/// What distinguishes families here: Qwen 2 has biases on q, k and v, Qwen 3 norms on q and k.
#[derive(Clone, Copy)]
enum Family {
    Llama,
    Qwen2,
    Qwen3,
}

const fn entry(
    alias: &'static str,
    name: &'static str,
    family: Family,
    [layers, d_model, d_ff, heads, kv_heads, head_dim, vocab]: [u64; 7],
    tied: bool,
) -> CatalogueShape {
    let shape = Shape {
        vocab_size: vocab,
        hidden_size: d_model,
        intermediate_size: d_ff,
        num_hidden_layers: layers,
        num_attention_heads: heads,
        num_key_value_heads: kv_heads,
        head_dim,
        tied,
        attention_bias: matches!(family, Family::Qwen2),
        qk_norm: matches!(family, Family::Qwen3),
    };
    let architecture = match family {
        Family::Llama => "llama",
        Family::Qwen2 => "qwen2",
        Family::Qwen3 => "qwen3",
    };
    CatalogueShape { alias, name, architecture, shape }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tune_recipe::{Layers, TargetModules};

    #[test]
    fn counts_equal_the_published_ones() {
        // Parameters, and adapter parameters per rank on all seven linears.
        let published = [
            ("llama2:7b", 6_738_415_616, 2_498_560),
            ("llama2:13b", 13_015_864_320, 3_911_680),
            ("llama:30b", 32_528_943_616, 7_618_560),
            ("llama2:70b", 68_976_648_192, 12_943_360),
            ("llama3.1:8b", 8_030_261_248, 2_621_440),
            ("llama3.2:1b", 1_235_814_400, 704_512),
            ("llama3.2:3b", 3_212_749_824, 1_519_616),
            ("smollm2:135m", 134_515_008, 305_280),
            ("smollm2:360m", 361_821_120, 542_720),
            ("smollm2:1.7b", 1_711_376_384, 1_130_496),
            ("qwen2.5:0.5b", 494_032_768, 549_888),
            ("qwen2.5:1.5b", 1_543_714_304, 1_154_048),
            ("qwen2.5:3b", 3_085_938_688, 1_870_848),
            ("qwen2.5:7b", 7_615_616_512, 2_523_136),
            ("qwen2.5:14b", 14_770_033_664, 4_300_800),
            ("qwen3:0.6b", 596_049_920, 630_784),
            ("qwen3:1.7b", 1_720_574_976, 1_089_536),
            ("qwen3:4b", 4_022_468_096, 2_064_384),
            ("qwen3:8b", 8_190_735_360, 2_727_936),
            ("qwen3:14b", 14_768_307_200, 4_014_080),
            ("qwen3:32b", 32_762_123_264, 8_388_608),
            ("deepseek-r1:8b", 8_190_735_360, 2_727_936),
            ("deepseek-r1:8b-llama-distill", 8_030_261_248, 2_621_440),
            ("mistral:7b", 7_248_023_552, 2_621_440),
        ];
        assert_eq!(published.len(), CATALOGUE.len());
        for (alias, parameters, per_rank) in published {
            let shape = find(alias).unwrap().shape;
            assert_eq!(shape.parameters(), parameters, "{alias}");
            let got = shape.adapter_parameters_per_rank(&TargetModules::AllLinear, &Layers::All);
            assert_eq!(got, per_rank, "{alias}");
        }
    }

    #[test]
    fn names_are_found_in_any_case() {
        assert_eq!(find("SmolLM2-135M"), find("smollm2:135m"));
        assert_eq!(find("ollama:qwen3:8b"), find("Qwen3-8B"));
        assert_eq!(find("gpt-9"), None);
    }
}
