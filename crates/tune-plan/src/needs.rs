//! What each method needs of a catalogue model, at settings that are the same for all.

use serde::Serialize;
use tune_formats::gguf;
use tune_recipe::{Dtype, Method};

use crate::inference::{InferenceInput, KnownModel, inference};
use crate::{CacheType, CatalogueModel, PlanInput, Quant, estimate, from_shape, generic_plan};

/// Tokens of the conversation, and of the longest row that is trained on.
pub const NEEDS_TOKENS: u64 = 2048;

/// Rank of the adapters.
pub const NEEDS_RANK: u64 = 16;

/// Upper ends of the estimates, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Needs {
    /// To run it in 4 bits, with one conversation of [`NEEDS_TOKENS`].
    pub inference: u64,
    /// To train adapters over 4-bit weights, on one row of [`NEEDS_TOKENS`] at a time.
    pub qlora: u64,
    /// The same over 16-bit weights.
    pub lora: u64,
    /// To train every weight.
    pub full: u64,
}

/// Whether this version trains models of this architecture.
pub fn is_trainable(model: &CatalogueModel) -> bool {
    model.shape().is_some() && gguf::names::architecture(&model.architecture).is_some()
}

/// What each method needs: by our own estimate where this version trains the model, otherwise by that of a trainer as
/// most are.
pub fn needs(model: &CatalogueModel, dtype: Dtype) -> Needs {
    let training = |method| match model.shape().filter(|_| is_trainable(model)) {
        Some(shape) => {
            let input = PlanInput {
                rank: NEEDS_RANK,
                sequence_len: NEEDS_TOKENS,
                dtype,
                ..PlanInput::of(model.name.clone(), shape, from_shape(&shape, method), method)
            };
            estimate(&input).estimate.upper_bytes
        }
        None => generic_plan(model, method, NEEDS_RANK, NEEDS_TOKENS, 1, None).estimate.upper_bytes,
    };
    let running = InferenceInput {
        model: model.name.clone(),
        parameters: model.layout.parameters(),
        known: KnownModel::Dimensions(model.layout.clone()),
        quant: Quant::Q4_K_M,
        context: NEEDS_TOKENS,
        users: 1,
        cache: CacheType::Fp16,
        budget_bytes: None,
    };
    Needs {
        inference: inference(&running).estimate.upper_bytes,
        qlora: training(Method::Qlora),
        lora: training(Method::Lora),
        full: training(Method::Full),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{catalogue, find_in_catalogue};

    #[test]
    fn methods_are_ordered_in_every_model() {
        for model in catalogue() {
            let needs = needs(model, Dtype::Bf16);
            assert!(needs.qlora < needs.lora && needs.lora < needs.full, "{}: {needs:?}", model.alias);
            assert!(needs.inference < needs.full, "{}", model.alias);
        }
    }

    #[test]
    fn what_this_version_trains() {
        let trains = |alias| is_trainable(find_in_catalogue(alias).unwrap());
        assert!(trains("smollm2:135m") && trains("llama3.1:8b") && trains("mistral:7b"));
        assert!(!trains("gemma4:12b") && !trains("gpt-oss:20b"));
    }
}
