//! How far an export may be from the trained model, by the type that it is stored in.
//!
//! Calibrated on two tuned models with nearly every type, with room: ten times and more of the largest KL that was seen from
//! six bits on, 2.7 times and more below; Q2_K, which fits neither, is only measured on two smaller ones.
//! `docs/verify.md` has the measured tables. They tell rounding from damage, not a
//! good file from a better one; how much of the fine-tune a file keeps is judged by its retention.

use std::fmt;

use miette::Result;
use serde::Serialize;
use tune_eval::Agreement;
use tune_formats::{BaseModel, ModelConfig};
use tune_quant::BlockType;

/// Limits of one type.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Limits {
    /// Largest mean KL(trained ‖ export), in nats.
    pub max_mean_kl: f64,
    /// Smallest share of equal most likely tokens.
    pub min_top1: f64,
}

impl Limits {
    /// Nothing is asked.
    pub const NONE: Self = Self { max_mean_kl: f64::INFINITY, min_top1: 0.0 };

    /// Two readings of one file.
    pub const SAME_FILE: Self = Self { max_mean_kl: 0.0, min_top1: 1.0 };

    /// The limits of a file by the name of its mix, such as Q4_K_M.
    pub fn of_mix(name: &str) -> Self {
        let name = name.to_uppercase();
        Self::of(name.trim_end_matches("_S").trim_end_matches("_M").trim_end_matches("_L"))
    }

    /// The limits of a type, or of `adapter`.
    pub fn of(stored_as: &str) -> Self {
        let (max_mean_kl, min_top1) = match stored_as {
            "adapter" | "F32" => (1e-6, 0.999),
            "F16" => (1e-5, 0.99),
            "BF16" => (5e-4, 0.98),
            "Q8_0" => (5e-3, 0.96),
            "Q6_K" => (5e-2, 0.94),
            "Q5_K" | "Q5_0" | "Q5_1" => (0.2, 0.9),
            "Q4_K" | "Q4_0" | "Q4_1" | "IQ4_NL" | "MXFP4" => (0.5, 0.8),
            "Q3_K" => (1.0, 0.7),
            _ => (3.0, 0.4),
        };
        Self { max_mean_kl, min_top1 }
    }

    /// What exceeds them.
    pub fn problems(&self, agreement: &Agreement, stored_as: &str) -> Vec<String> {
        let mut problems = Vec::new();
        let (kl, top1) = (agreement.mean_kl(), agreement.top1());
        if kl.is_nan() || kl > self.max_mean_kl {
            problems.push(format!(
                "mean KL from the trained model is {kl:.2e} nats, at most {:.0e} is rounding to {stored_as}",
                self.max_mean_kl
            ));
        }
        // Of few tokens the share is known badly: three standard errors below the limit is evidence, less is not.
        let least = self.min_top1;
        let uncertainty = 3.0 * (least * (1.0 - least) / agreement.tokens().max(1) as f64).sqrt();
        if top1 < least - uncertainty {
            problems.push(format!(
                "{:.1} % of the most likely tokens are those of the trained model, at least {:.1} % is usual for \
                 {stored_as}",
                100.0 * top1,
                100.0 * self.min_top1
            ));
        }
        problems
    }
}

impl fmt::Display for Limits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if *self == Self::NONE {
            return f.write_str("merged onto another base, no limits");
        }
        write!(f, "at most {:.0e}, at least {:.1} %", self.max_mean_kl, 100.0 * self.min_top1)
    }
}

/// The type with the fewest bits among the linear layers.
pub fn coarsest_type(model: &BaseModel) -> Result<String> {
    let mut coarsest: Option<(f64, String)> = None;
    for layer in 0..model.config.num_hidden_layers {
        for (name, ..) in model.config.block_linears() {
            let matrix =
                model.weights.matrix(&format!("{}.weight", ModelConfig::linear_path(layer, name)))?;
            let bits = BlockType::from_name(matrix.type_name()).map_or(4.5, BlockType::bits_per_weight);
            if coarsest.as_ref().is_none_or(|(least, _)| bits < *least) {
                coarsest = Some((bits, matrix.type_name().to_owned()));
            }
        }
    }
    Ok(coarsest.map_or_else(|| "F32".to_owned(), |(_, name)| name))
}

#[cfg(test)]
mod tests {
    use tune_eval::Evaluation;

    use super::*;

    #[test]
    fn what_exceeds_a_limit_is_named_with_it() {
        let tokens = Evaluation { loss_sum: 100.0, tokens: 100 };
        let agreement = Agreement { kl_sum: 2.0, same_top1: 85, reference: tokens, other: tokens };
        let few = Evaluation { loss_sum: 10.0, tokens: 10 };
        let unsure = Agreement { kl_sum: 0.0, same_top1: 9, reference: few, other: few };
        assert_eq!(Limits::of("Q8_0").problems(&unsure, "Q8_0"), Vec::<String>::new());
        assert_eq!(Limits::of("Q4_0").problems(&agreement, "Q4_0"), Vec::<String>::new());
        let problems = Limits::of("Q8_0").problems(&agreement, "Q8_0");
        assert_eq!(problems.len(), 2, "{problems:?}");
        assert!(problems[0].contains("2.00e-2 nats, at most 5e-3"), "{problems:?}");
        assert!(problems[1].starts_with("85.0 %"), "{problems:?}");
        assert_eq!(Limits::of_mix("q4_k_m"), Limits::of("Q4_K"));
        let broken = Agreement { kl_sum: f64::NAN, ..agreement };
        assert!(!Limits::of("Q2_K").problems(&broken, "Q2_K").is_empty(), "logits that are no numbers");
    }
}
