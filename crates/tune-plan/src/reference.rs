//! The reference: rules of thumb by method and size, and the formulas behind them.
//!
//! | method | bits | 7B | 13B | 30B | 70B | 110B |
//! |---|---|---|---|---|---|---|
//! | full  | 16 | 67 | 125 | 288 | 672 | 1056 |
//! | LoRA  | 16 | 15 |  28 |  63 | 146 |  229 |
//! | QLoRA |  8 |  9 |  17 |  38 |  88 |  138 |
//! | QLoRA |  4 |  5 |   9 |  20 |  46 |   72 |
//!
//! GB (10⁹ bytes). Source of the cells: Y. Lu, "How much VRAM do I need for LLM model fine-tuning?", Modal, 2024.
//! The source gives no formula; the closed forms here reproduce all twenty cells, in integers so that no rounding
//! error can move one. The table knows no batch, sequence length, rank or vocabulary: it is a floor.

use serde::{Deserialize, Serialize};
use tune_recipe::Method;

/// A figure of the reference table with the formula that gives it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Reference {
    /// Method of the row.
    pub method: Method,
    /// Bits of a stored weight: 16, 8 or 4.
    pub bits: u32,
    /// Parameters that the formula was given.
    pub parameters: u64,
    /// The parameters are a size label ("7b"), not a count.
    pub nominal: bool,
    /// The figure, in GB.
    pub gb: u64,
    /// The same before rounding.
    pub exact_gb: f64,
    /// How it comes about: `ceil(0.65 · 7)`.
    pub formula: String,
    /// What running the model without training takes, by the rule P · Z · 1.2.
    pub inference_bytes: u64,
}

/// A row of the table.
#[derive(Clone, Copy)]
struct Row {
    /// Hundredths of a GB per billion parameters.
    hundredths: u64,
    rounding: Rounding,
}

#[derive(Clone, Copy)]
enum Rounding {
    Up,
    HalfUp,
}

const FULL_16: Row = Row { hundredths: 960, rounding: Rounding::HalfUp };
const LORA_16: Row = Row { hundredths: 208, rounding: Rounding::Up };
const QLORA_8: Row = Row { hundredths: 125, rounding: Rounding::Up };
const QLORA_4: Row = Row { hundredths: 65, rounding: Rounding::Up };

/// The reference figure for a model of so many parameters. `bits` is the width of a weight as stored: it tells
/// the two rows of QLoRA apart, and a LoRA over a base that is stored in 8 or 4 bits is counted as QLoRA.
pub fn reference(method: Method, bits: u32, parameters: u64, nominal: bool) -> Reference {
    let (row, method, bits) = match (method, bits) {
        (Method::Full, _) => (FULL_16, Method::Full, 16),
        (Method::Lora, 9..) => (LORA_16, Method::Lora, 16),
        (Method::Lora | Method::Qlora, 6..) => (QLORA_8, Method::Qlora, 8),
        (Method::Lora | Method::Qlora, _) => (QLORA_4, Method::Qlora, 4),
    };
    let factor = format!("{}.{:02}", row.hundredths / 100, row.hundredths % 100);
    let factor = factor.trim_end_matches('0');
    let billions = billions(parameters);
    let formula = match row.rounding {
        Rounding::Up => format!("ceil({factor} · {billions})"),
        Rounding::HalfUp => format!("round({factor} · {billions})"),
    };
    Reference {
        method,
        bits,
        parameters,
        nominal,
        gb: row.gb(parameters),
        exact_gb: row.hundredths as f64 * parameters as f64 / 1e11,
        formula,
        inference_bytes: model_bytes(parameters, bits),
    }
}

/// Inference memory by the founding rule `P · Z · 1.2`, in bytes: P parameters of `bits` bits and a fifth more.
pub fn model_bytes(parameters: u64, bits: u32) -> u64 {
    // P · bits / 8 · 6 / 5
    (u128::from(parameters) * u128::from(bits) * 6 / 40) as u64
}

/// Key-value cache by the founding rule `2 · C · T · L · (N / g) · D · Z`, in bytes, for C conversations of T
/// tokens, L layers, N / g key-value heads of D numbers of Z bytes.
pub fn kv_cache_bytes(
    conversations: u64,
    tokens: u64,
    layers: u64,
    kv_heads: u64,
    head_dim: u64,
    bytes: u64,
) -> u64 {
    [conversations, tokens, layers, kv_heads, head_dim, bytes].into_iter().fold(2, u64::saturating_mul)
}

impl Row {
    fn gb(self, parameters: u64) -> u64 {
        let per_gb = 100 * 1_000_000_000u128;
        let hundredths = u128::from(self.hundredths) * u128::from(parameters);
        let gb = match self.rounding {
            Rounding::Up => hundredths.div_ceil(per_gb),
            Rounding::HalfUp => (hundredths + per_gb / 2) / per_gb,
        };
        u64::try_from(gb).unwrap_or(u64::MAX)
    }
}

/// Parameters in billions: three decimals, or three figures below one billion. "7", "6.738", "0.135".
pub(crate) fn billions(parameters: u64) -> String {
    let value = parameters as f64 / 1e9;
    let zeros_after_the_point =
        if value > 0.0 && value < 1.0 { (-value.log10()).floor() as usize } else { 0 };
    let text = format!("{value:.*}", zeros_after_the_point + 3);
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZES: [u64; 5] = [7, 13, 30, 70, 110];
    const TABLE: [(Method, u32, [u64; 5]); 4] = [
        (Method::Full, 16, [67, 125, 288, 672, 1056]),
        (Method::Lora, 16, [15, 28, 63, 146, 229]),
        (Method::Qlora, 8, [9, 17, 38, 88, 138]),
        (Method::Qlora, 4, [5, 9, 20, 46, 72]),
    ];

    #[test]
    fn all_twenty_cells_are_exact() {
        for (method, bits, cells) in TABLE {
            for (size, cell) in SIZES.into_iter().zip(cells) {
                let got = reference(method, bits, size * 1_000_000_000, true);
                assert_eq!(got.gb, cell, "{method:?} {bits} bits {size}B");
            }
        }
    }

    #[test]
    fn a_figure_carries_its_formula() {
        let got = |method, bits, parameters| reference(method, bits, parameters, true).formula;
        assert_eq!(got(Method::Qlora, 4, 7_000_000_000), "ceil(0.65 · 7)");
        assert_eq!(got(Method::Full, 16, 110_000_000_000), "round(9.6 · 110)");
        assert_eq!(got(Method::Lora, 16, 6_738_415_616), "ceil(2.08 · 6.738)");
        assert_eq!(got(Method::Lora, 16, 134_515_008), "ceil(2.08 · 0.135)");
        assert_eq!(got(Method::Lora, 16, 150_000), "ceil(2.08 · 0.00015)");
    }

    #[test]
    fn exact_counts_give_other_cells_than_labels() {
        // Llama-2-7B, counted.
        let cells = [(Method::Full, 16), (Method::Lora, 16), (Method::Qlora, 4)]
            .map(|(method, bits)| reference(method, bits, 6_738_415_616, false).gb);
        assert_eq!(cells, [65, 15, 5]);
    }

    #[test]
    fn the_row_follows_the_width_of_the_stored_weights() {
        let row = |method, bits| {
            let r = reference(method, bits, 7_000_000_000, true);
            (r.method, r.bits)
        };
        assert_eq!(row(Method::Lora, 4), (Method::Qlora, 4));
        assert_eq!(row(Method::Lora, 16), (Method::Lora, 16));
        assert_eq!(row(Method::Qlora, 5), (Method::Qlora, 4));
        assert_eq!(row(Method::Qlora, 9), (Method::Qlora, 8));
    }

    #[test]
    fn founding_rules() {
        assert_eq!(model_bytes(8_000_000_000, 4), 4_800_000_000);
        assert_eq!(model_bytes(7_000_000_000, 16), 16_800_000_000);
        // Llama 3.1 8B, one conversation of 8192 tokens in 16 bits: 1.074 GB.
        assert_eq!(kv_cache_bytes(1, 8192, 32, 8, 128, 2), 1_073_741_824);
        assert_eq!(kv_cache_bytes(u64::MAX, 2, 1, 1, 1, 1), u64::MAX);
    }
}
