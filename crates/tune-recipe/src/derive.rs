//! Values that depend on other values: everything left to "auto".

use serde::Serialize;
use serde::de::DeserializeOwned;
use toml::{Table, Value};

use crate::error::{Problem, RecipeError};
use crate::names;
use crate::origin::Origin;
use crate::spec::{Dtype, Method, Quantization, RunSpec};
use crate::values::{Layers, TargetModules};

/// What is known of the base model once its header has been read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BaseFacts {
    /// Weights of the base, counted one by one.
    pub parameters: u64,
    /// Whether the block linears are stored in a quantised type.
    pub quantized: bool,
    /// Number of blocks.
    pub num_hidden_layers: usize,
    /// Longest context that the base was made for, in tokens.
    pub max_position_embeddings: usize,
    /// Names of a block's linear layers: `q_proj`, `k_proj` …
    pub linear_names: Vec<String>,
}

/// Tokens of one micro-batch that "auto" aims at: enough rows for the matrix products, and few enough that the
/// activations of one block stay small.
const MICRO_BATCH_TOKENS: usize = 2048;

/// Above this many parameters the learning rate is halved. The sources give 2e-4 up to 14B and 1e-4 from 30B.
const LARGE_BASE: u64 = 15_000_000_000;

impl RunSpec {
    /// Chooses again what was left to "auto", now that the base is known, and checks what the recipe says about
    /// its layers.
    ///
    /// # Errors
    /// [`RecipeError::Unsuited`] with every problem.
    pub fn refine(&mut self, base: &BaseFacts) -> Result<(), RecipeError> {
        let mut problems = Vec::new();
        let suits = |origin: &Origin| match origin {
            Origin::Default | Origin::Auto(_) => String::new(),
            written => format!(" ({written})"),
        };
        if let Layers::Only(layers) = &self.adapter.layers {
            let blocks = base.num_hidden_layers;
            let beyond: Vec<_> = layers.iter().filter(|&&l| l >= blocks).map(usize::to_string).collect();
            if !beyond.is_empty() {
                let origin = suits(self.origins.get("adapter.layers"));
                let message = format!(
                    "adapter.layers{origin}: expected blocks 0 to {}, got {}",
                    blocks.saturating_sub(1),
                    beyond.join(", ")
                );
                problems.push(Problem::new(message));
            }
        }
        if let TargetModules::Names(names) = &self.adapter.target_modules {
            for name in names.iter().filter(|name| !base.linear_names.contains(name)) {
                let origin = suits(self.origins.get("adapter.target_modules"));
                let message =
                    format!("adapter.target_modules{origin}: the base has no linear layer {name:?}");
                let help = format!("its layers are {}, or \"all-linear\"", base.linear_names.join(", "));
                problems.push(Problem::new(message).help(help));
            }
        }
        if self.model.quantization == Quantization::None
            && self.origins.is_written("model.quantization")
            && base.quantized
        {
            let message = "model.quantization is \"none\" and the base is stored quantised";
            let help = "name a 16-bit base, or write quantization = \"keep\" to train over it as it is";
            problems.push(Problem::new(message).help(help));
        }
        let (wanted, longest) = (self.data_options.sequence_len, base.max_position_embeddings);
        if wanted > longest {
            if self.origins.is_written("data_options.sequence_len") {
                let message = format!(
                    "data_options.sequence_len: the base was made for at most {longest} tokens, got {wanted}"
                );
                problems.push(Problem::new(message).help(format!("write sequence_len = {longest}")));
            } else {
                self.data_options.sequence_len = longest;
                let reason = Origin::Auto("the longest context of the base".into());
                self.origins.set("data_options.sequence_len", reason);
            }
        }
        problems.extend(self.derive(Some(base)).err().map(|problem| *problem));
        if problems.is_empty() { Ok(()) } else { Err(RecipeError::Unsuited { problems }) }
    }

    /// Takes `fastest`, the type that this machine multiplies fastest, unless the recipe names one.
    pub fn prefer_dtype(&mut self, fastest: Dtype) {
        if !self.origins.is_written("model.dtype") {
            self.model.dtype = fastest;
        }
    }

    /// Puts `value`, in TOML, in the place of the one at `path` (`train.seed`) for this reason. What is left to "auto" and
    /// depends on it is chosen by the next [`RunSpec::refine`]. `false` where there is no such value.
    pub fn change(&mut self, path: &str, value: &str, reason: &str) -> bool {
        let Some((section, key)) = path.split_once('.') else { return false };
        let Some(value) =
            toml::from_str::<Table>(&format!("value = {value}")).ok().and_then(|mut t| t.remove("value"))
        else {
            return false;
        };
        // "auto" is what a value is when nobody wrote it.
        let is_auto = value.as_str() == Some("auto") && names::AUTO.contains(&path);
        let changed = is_auto
            || match section {
                "model" => put(&mut self.model, key, value),
                "adapter" => put(&mut self.adapter, key, value),
                "data_options" => put(&mut self.data_options, key, value),
                "train" => put(&mut self.train, key, value),
                _ => false,
            };
        if changed {
            let origin = if is_auto { Origin::Default } else { Origin::Changed(reason.into()) };
            self.origins.set(path, origin);
        }
        changed
    }

    /// Fills in every value that nobody wrote and that depends on another one.
    pub(crate) fn derive(&mut self, base: Option<&BaseFacts>) -> Result<(), Box<Problem>> {
        if !self.origins.is_written("adapter.lora_alpha") {
            self.adapter.lora_alpha = 2.0 * self.adapter.r as f64;
            self.auto("adapter.lora_alpha", "2 r");
        }
        self.auto("model.dtype", "the type of this device's kernels");
        if !self.origins.is_written("model.quantization") {
            let (quantization, reason) = match (self.adapter.method, base) {
                (Method::Qlora, Some(base)) if base.quantized => {
                    (Quantization::Keep, "the base is stored quantised")
                }
                (Method::Qlora, _) => (Quantization::Nf4, "QLoRA over a 16-bit base"),
                (Method::Lora | Method::Full, _) => (Quantization::Keep, "the base is used as stored"),
            };
            self.model.quantization = quantization;
            self.auto("model.quantization", reason);
        }
        if !self.origins.is_written("train.learning_rate") {
            let large = base.is_some_and(|base| base.parameters > LARGE_BASE);
            let (rate, reason) = match (self.adapter.method, large) {
                (Method::Full, _) => (2e-5, "all weights are trained"),
                (_, false) => (2e-4, "low-rank update, base of at most 15B"),
                (_, true) => (1e-4, "low-rank update, base above 15B"),
            };
            self.train.learning_rate = rate;
            self.auto("train.learning_rate", reason);
        }
        self.auto(
            "train.gradient_checkpointing",
            "as many blocks as fit in the budget keep their activations",
        );
        self.derive_batch()
    }

    /// `effective_batch_size = micro_batch_size × gradient_accumulation_steps`, from whichever are written.
    fn derive_batch(&mut self) -> Result<(), Box<Problem>> {
        let written = |key: &str| self.origins.is_written(&format!("train.{key}"));
        let (micro_written, effective_written, steps_written) = (
            written("micro_batch_size"),
            written("effective_batch_size"),
            written("gradient_accumulation_steps"),
        );
        let default = crate::spec::Train::default().effective_batch_size;
        let fits = (MICRO_BATCH_TOKENS / self.data_options.sequence_len.max(1)).max(1);
        let t = &mut self.train;
        let (micro, effective, steps) =
            (t.micro_batch_size.max(1), t.effective_batch_size.max(1), t.gradient_accumulation_steps.max(1));
        let too_large =
            || Box::new(Problem::new("train: micro_batch_size × gradient_accumulation_steps is too large"));
        let (micro, effective, steps) = match (micro_written, effective_written, steps_written) {
            (true, true, true) => (micro, effective, steps),
            (true, true, false) => (micro, effective, effective / micro),
            (true, false, false) => {
                let steps = default.div_ceil(micro);
                (micro, micro.checked_mul(steps).ok_or_else(too_large)?, steps)
            }
            (true, false, true) => (micro, micro.checked_mul(steps).ok_or_else(too_large)?, steps),
            (false, true, true) => (effective / steps, effective, steps),
            (false, false, true) => (fits, fits.checked_mul(steps).ok_or_else(too_large)?, steps),
            (false, _, false) => {
                let effective = if effective_written { effective } else { default };
                let micro = largest_divisor(effective, fits);
                (micro, effective, effective / micro)
            }
        };
        if micro.checked_mul(steps) != Some(effective) {
            let got = match (micro_written, steps_written) {
                (true, true) => format!("{micro} × {steps} instead of {effective}"),
                (true, false) => format!("{effective}, no multiple of micro_batch_size = {micro}"),
                (false, _) => format!("{effective}, no multiple of gradient_accumulation_steps = {steps}"),
            };
            let message = format!(
                "train.effective_batch_size: expected micro_batch_size × gradient_accumulation_steps, got {got}"
            );
            let problem = Problem::new(message).help("leave one of the three out, and it is computed");
            return Err(Box::new(problem));
        }
        (t.micro_batch_size, t.effective_batch_size, t.gradient_accumulation_steps) =
            (micro, effective, steps);
        self.auto("train.micro_batch_size", "about 2048 tokens at once");
        if effective != default {
            self.auto("train.effective_batch_size", "micro_batch_size × gradient_accumulation_steps");
        }
        self.auto("train.gradient_accumulation_steps", "effective_batch_size / micro_batch_size");
        Ok(())
    }

    /// Records why a value was chosen, unless a person wrote it.
    fn auto(&mut self, path: &str, reason: &str) {
        if !self.origins.is_written(path) {
            self.origins.set(path, Origin::Auto(reason.into()));
        }
    }
}

/// Puts a value into a section; `false` where it has no such key or takes no such value.
fn put<T: Serialize + DeserializeOwned>(section: &mut T, key: &str, value: Value) -> bool {
    let Ok(mut table) = Table::try_from(&*section) else { return false };
    table.insert(key.to_owned(), value);
    table.try_into().map(|changed| *section = changed).is_ok()
}

/// The largest divisor of `n` that is at most `limit`, and at least 1.
fn largest_divisor(n: usize, limit: usize) -> usize {
    (1..=limit.min(n)).rev().find(|d| n.is_multiple_of(*d)).unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use crate::{Override, parse};

    fn batch(overrides: &[&str]) -> (usize, usize, usize) {
        let overrides: Vec<_> = overrides.iter().map(|o| Override::set(format!("train.{o}"))).collect();
        let spec = parse(
            "t",
            "[model]\nbase=\"b\"\n[[data]]\npath=\"d\"\n[data_options]\nsequence_len=512",
            &overrides,
        );
        let t = spec.unwrap().train;
        (t.micro_batch_size, t.gradient_accumulation_steps, t.effective_batch_size)
    }

    #[test]
    fn any_two_of_the_three_batch_sizes_give_the_third() {
        assert_eq!(batch(&[]), (4, 4, 16));
        assert_eq!(batch(&["micro_batch_size=2"]), (2, 8, 16));
        assert_eq!(batch(&["micro_batch_size=3"]), (3, 6, 18));
        assert_eq!(batch(&["micro_batch_size=40"]), (40, 1, 40));
        assert_eq!(batch(&["effective_batch_size=6"]), (3, 2, 6));
        assert_eq!(batch(&["gradient_accumulation_steps=2"]), (4, 2, 8));
        assert_eq!(batch(&["effective_batch_size=24", "gradient_accumulation_steps=3"]), (8, 3, 24));
        assert_eq!(batch(&["micro_batch_size=2", "gradient_accumulation_steps=3"]), (2, 3, 6));
        assert_eq!(batch(&["micro_batch_size=auto", "effective_batch_size=1"]), (1, 1, 1));
    }

    #[test]
    fn a_changed_value_counts_as_written_and_says_why() {
        let mut spec = parse("t", "[model]\nbase=\"b\"\n[[data]]\npath=\"d\"", &[]).unwrap();
        assert!(spec.change("train.micro_batch_size", "2", "to fit in memory"));
        assert!(spec.change("adapter.layers", "\"2-3\"", "to fit in memory"));
        assert_eq!(spec.train.micro_batch_size, 2);
        assert_eq!(spec.adapter.layers, crate::Layers::Only(vec![2, 3]));
        assert!(spec.origins.is_written("train.micro_batch_size"));
        assert!(spec.to_toml().contains("micro_batch_size = 2  # changed: to fit in memory"));
        for (path, value) in [
            ("train.sed", "1"),
            ("train.seed", "\"x\""),
            ("seed", "1"),
            ("trian.seed", "1"),
            ("train.seed", ""),
        ] {
            assert!(!spec.change(path, value, "no"), "{path} {value}");
        }
    }
}
