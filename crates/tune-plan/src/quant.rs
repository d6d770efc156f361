//! Formats that weights are kept in for inference: what the founding rule takes them for, and what files of them really
//! take.
//!
//! A file of one name mixes types: embedding and output are wider than the rest. The bits of a weight of a whole file are
//! those that llama.cpp measured on Llama 3.1 8B (tools/quantize/README.md; the types without K from its sizes of Llama 3
//! 8B). Other models differ by a few per cent, most where the embedding is a large part; the header of a file gives its
//! own bytes exactly.

/// A format of weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quant {
    /// As llama.cpp and Ollama write it, in lower case.
    pub name: &'static str,
    /// Bits of a weight by the founding rule.
    pub bits: u32,
    /// Bits of a weight of a whole file, in ten-thousandths.
    pub file_bits: u64,
}

/// All of them.
pub const QUANTS: [Quant; 24] = [
    quant("q2_k", 2, 31_593),
    quant("q3_k_s", 3, 36_429),
    quant("q3_k_m", 3, 39_960),
    quant("q3_k_l", 3, 42_979),
    quant("iq4_xs", 4, 44_597),
    quant("iq4_nl", 4, 46_818),
    quant("q4_0", 4, 46_430),
    quant("q4_1", 4, 51_130),
    quant("q4_k_s", 4, 46_672),
    quant("q4_k_m", 4, 48_944),
    quant("q5_0", 5, 55_730),
    quant("q5_1", 5, 60_440),
    quant("q5_k_s", 5, 55_704),
    quant("q5_k_m", 5, 57_036),
    quant("q6_k", 6, 65_633),
    quant("q8_0", 8, 85_008),
    quant("fp8", 8, 80_000),
    quant("int8", 8, 80_000),
    // 4-bit linear layers, 16-bit embedding and output.
    quant("nf4", 4, 56_811),
    quant("f16", 16, 160_005),
    quant("bf16", 16, 160_005),
    quant("fp16", 16, 160_005),
    quant("f32", 32, 320_000),
    quant("fp32", 32, 320_000),
];

/// What a name without a type means: what Ollama serves under it.
const SHORT: [(&str, &str); 9] = [
    ("q2", "q2_k"),
    ("q3", "q3_k_m"),
    ("q4", "q4_k_m"),
    ("q4_k", "q4_k_m"),
    ("q5", "q5_k_m"),
    ("q5_k", "q5_k_m"),
    ("q6", "q6_k"),
    ("q8", "q8_0"),
    ("q3_k", "q3_k_m"),
];

impl Quant {
    /// The format of this name: `q4`, `Q4_K_M`, `q8_0`, `bf16`.
    pub fn parse(name: &str) -> Option<Self> {
        let name = name.to_ascii_lowercase().replace('-', "_");
        let name = SHORT.iter().find(|(short, _)| *short == name).map_or(&*name, |(_, long)| long);
        QUANTS.into_iter().find(|quant| quant.name == name)
    }

    /// Bytes of a file with so many parameters.
    pub fn bytes(self, parameters: u64) -> u64 {
        (u128::from(parameters) * u128::from(self.file_bits) / 80_000) as u64
    }
}

const fn quant(name: &'static str, bits: u32, file_bits: u64) -> Quant {
    Quant { name, bits, file_bits }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        for (name, long) in SHORT {
            assert_eq!(Quant::parse(name).map(|quant| quant.name), Some(long));
        }
        for quant in QUANTS {
            assert_eq!(Quant::parse(&quant.name.to_uppercase()), Some(quant));
        }
        assert_eq!(Quant::parse("q4-K-M"), Quant::parse("q4"));
        assert_eq!(Quant::parse("q7"), None);
    }

    #[test]
    fn a_file_of_llama_3_1_8b() {
        let gib = |name: &str| Quant::parse(name).unwrap().bytes(8_030_261_248) as f64 / f64::from(1 << 30);
        for (name, published) in
            [("q4_k_m", 4.58), ("q8_0", 7.95), ("q2_k", 2.95), ("q6_k", 6.14), ("f16", 14.96), ("q4_0", 4.34)]
        {
            assert!((gib(name) - published).abs() < 0.006, "{name}: {}", gib(name));
        }
    }

    #[test]
    fn files_are_wider_than_their_names_say() {
        for quant in QUANTS {
            assert!(quant.file_bits >= u64::from(quant.bits) * 10_000, "{}", quant.name);
        }
    }
}
