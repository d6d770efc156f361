//! Types that a key-value cache is kept in.

use serde::Serialize;

/// Type of a cache's elements.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum CacheType {
    /// 16-bit numbers of either kind.
    #[default]
    Fp16,
    /// 8-bit numbers without scales.
    Fp8,
    /// Blocks of 32 numbers of 8 bits with a 16-bit scale.
    #[serde(rename = "q8_0")]
    Q8_0,
    /// Blocks of 32 numbers of 4 bits with a 16-bit scale.
    #[serde(rename = "q4_0")]
    Q4_0,
}

impl CacheType {
    /// The type of this name: `fp16`, `f16`, `bf16`, `fp8`, `q8_0`, `q4_0`.
    pub fn parse(name: &str) -> Option<Self> {
        Some(match name.to_ascii_lowercase().as_str() {
            "fp16" | "f16" | "bf16" | "16" => Self::Fp16,
            "fp8" | "f8" | "e4m3" | "8" => Self::Fp8,
            "q8_0" | "q8" => Self::Q8_0,
            "q4_0" | "q4" => Self::Q4_0,
            _ => return None,
        })
    }

    /// As it is written.
    pub fn name(self) -> &'static str {
        match self {
            Self::Fp16 => "fp16",
            Self::Fp8 => "fp8",
            Self::Q8_0 => "q8_0",
            Self::Q4_0 => "q4_0",
        }
    }

    /// Bytes of so many elements, up to the next whole block.
    pub fn bytes(self, elements: u64) -> u64 {
        let (block, bytes) = match self {
            Self::Fp16 => (1, 2),
            Self::Fp8 => (1, 1),
            Self::Q8_0 => (32, 34),
            Self::Q4_0 => (32, 18),
        };
        elements.div_ceil(block).saturating_mul(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_bytes() {
        for cache in [CacheType::Fp16, CacheType::Fp8, CacheType::Q8_0, CacheType::Q4_0] {
            assert_eq!(CacheType::parse(cache.name()), Some(cache));
        }
        assert_eq!(CacheType::parse("BF16"), Some(CacheType::Fp16));
        assert_eq!(CacheType::parse("q3_0"), None);
        let bytes = |cache: CacheType| cache.bytes(1024);
        assert_eq!(
            [CacheType::Fp16, CacheType::Fp8, CacheType::Q8_0, CacheType::Q4_0].map(bytes),
            [2048, 1024, 1088, 576]
        );
    }
}
