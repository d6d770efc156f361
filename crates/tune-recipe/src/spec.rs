//! Every option of a run: name, type, default and meaning.
//!
//! Names are those of PEFT, TRL and Axolotl where they agree. Each default is argued in `docs/defaults.md`.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::origin::Origins;
use crate::values::{Budget, Layers, Resume, TargetModules};

/// A run with every value resolved.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct RunSpec {
    /// `[run]`
    pub run: Run,
    /// `[model]`
    pub model: Model,
    /// `[adapter]`
    pub adapter: Adapter,
    /// `[[data]]`, in the order written
    pub data: Vec<Data>,
    /// `[data_options]`
    pub data_options: DataOptions,
    /// `[train]`
    pub train: Train,
    /// `[memory]`
    pub memory: Memory,
    /// `[eval]`
    pub eval: Eval,
    /// `[checkpoint]`
    pub checkpoint: Checkpoint,
    /// `[export]`
    pub export: Export,
    /// `[samples]`
    pub samples: Samples,
    /// Where each value comes from.
    pub origins: Origins,
    /// What the user should hear about how the recipe was read, one sentence each.
    pub notes: Vec<String>,
}

/// `[run]`: what the run is called and where it is written.
#[derive(Clone, Debug, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Run {
    /// Name of the run; the recipe's file name without its extension when absent.
    pub name: String,
    /// Folder that the run writes; `runs/NAME` when absent.
    pub out: PathBuf,
}

/// `[model]`: the frozen base.
#[derive(Clone, Debug, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Model {
    /// Required. Catalogue alias, directory, `.gguf` file, `ollama:NAME[:TAG]` or `hf:OWNER/REPO[@REV]`.
    pub base: String,
    /// Type in which activations are computed. "auto" is `bf16` where the processor multiplies it faster than
    /// `f32`, else `f32`.
    pub dtype: Dtype,
    /// What happens to the base's weights on load. "auto" is `nf4` for a 16-bit base under QLoRA, else `keep`.
    pub quantization: Quantization,
}

/// Type in which activations are computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// 32-bit floats.
    #[default]
    F32,
    /// 16-bit brain floats in matrix products and between operations; sums, norms, losses, adapters and their
    /// gradients stay 32-bit.
    Bf16,
}

/// What happens to the base's weights on load.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Quantization {
    /// Used as stored, memory-mapped: 4-bit blocks stay 4-bit blocks, 16-bit weights stay 16-bit.
    #[default]
    Keep,
    /// 16- and 32-bit block linears become NF4 with double quantisation; already quantised ones are kept.
    Nf4,
    /// Only a 16- or 32-bit base is accepted, and it is used as stored.
    None,
}

/// `[adapter]`: what is trained. Names as in PEFT.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Adapter {
    /// Method.
    #[serde(rename = "type")]
    pub method: Method,
    /// Rank of the update.
    pub r: usize,
    /// Numerator of the scale; `2 r` when absent.
    pub lora_alpha: f64,
    /// Probability of dropping an input feature of the update while training, in `[0, 1)`.
    pub lora_dropout: f64,
    /// Linear layers that get an adapter.
    pub target_modules: TargetModules,
    /// Scale by `lora_alpha / sqrt(r)` instead of `lora_alpha / r` (rank-stabilised LoRA).
    pub use_rslora: bool,
    /// Blocks that get adapters.
    pub layers: Layers,
    /// PEFT adapter folder to start from, instead of a fresh update of zero.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub init_adapter: Option<PathBuf>,
}

impl Default for Adapter {
    fn default() -> Self {
        Self {
            method: Method::Qlora,
            r: 16,
            lora_alpha: 32.0,
            lora_dropout: 0.0,
            target_modules: TargetModules::AllLinear,
            use_rslora: false,
            layers: Layers::All,
            init_adapter: None,
        }
    }
}

impl Adapter {
    /// Factor on the update `x Aᵀ Bᵀ`: `α / r`, or `α / sqrt(r)` with rank stabilisation.
    pub fn scale(&self) -> f64 {
        let rank = self.r as f64;
        self.lora_alpha / if self.use_rslora { rank.sqrt() } else { rank }
    }
}

/// Training method.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    /// Low-rank update over a frozen base.
    Lora,
    /// The same over a quantised frozen base.
    #[default]
    Qlora,
    /// All weights.
    Full,
}

/// One `[[data]]` entry.
#[derive(Clone, Debug, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Data {
    /// Required. JSONL file, looked up in the working directory and then beside the recipe.
    pub path: PathBuf,
    /// Format of its rows.
    pub format: DataFormat,
    /// Which tokens are prediction targets.
    pub train_on: TrainOn,
}

/// Format of the rows of a JSONL file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DataFormat {
    /// Detected from the keys of the rows.
    #[default]
    Auto,
    /// `{"messages": [{"role", "content"}, …]}`, as in OpenAI's chat format.
    #[serde(alias = "openai", alias = "chat")]
    Messages,
    /// `{"conversations": [{"from", "value"}, …]}`.
    Sharegpt,
    /// `{"instruction", "input", "output"}`.
    Alpaca,
    /// `{"prompt", "completion"}`.
    #[serde(alias = "prompt_completion")]
    PromptCompletion,
    /// `{"text"}`.
    Text,
    /// `{"input_ids", "labels"}`, already tokenised.
    #[serde(alias = "input_ids")]
    InputIds,
}

/// Which tokens are prediction targets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TrainOn {
    /// Every assistant turn with its end-of-turn token.
    #[default]
    Assistant,
    /// The last assistant turn only.
    Last,
    /// Every token.
    All,
    /// Everything after the prompt.
    Completion,
}

/// `[data_options]`: rows → token sequences.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DataOptions {
    /// Longest sequence, in tokens.
    pub sequence_len: usize,
    /// What happens to a longer row.
    pub overlong: Overlong,
    /// Short rows share one sequence, each with its own attention and positions.
    pub packing: bool,
    /// Share of the rows held out to measure `val_loss`, in `[0, 1)`.
    pub val_split: f64,
}

impl Default for DataOptions {
    fn default() -> Self {
        Self { sequence_len: 2048, overlong: Overlong::Drop, packing: true, val_split: 0.05 }
    }
}

/// What happens to a row longer than `sequence_len`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Overlong {
    /// Left out, and counted.
    #[default]
    Drop,
    /// Cut at the end.
    Truncate,
    /// Cut into several rows.
    Split,
    /// The run stops with an error.
    Error,
}

/// `[train]`: optimisation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Train {
    /// Passes over the training rows; may be a fraction.
    pub num_epochs: f64,
    /// Optimizer steps of the whole run; replaces `num_epochs` when present.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_steps: Option<usize>,
    /// Sequences that go through the model at once. "auto" fills about 2048 tokens.
    pub micro_batch_size: usize,
    /// Sequences per optimizer step: `micro_batch_size × gradient_accumulation_steps`.
    pub effective_batch_size: usize,
    /// Micro-batches per optimizer step; `effective_batch_size / micro_batch_size` when absent.
    pub gradient_accumulation_steps: usize,
    /// Peak learning rate. "auto" depends on the method and the size of the base.
    pub learning_rate: f64,
    /// Shape of the learning rate after warm-up.
    pub lr_scheduler: LrScheduler,
    /// Share of the optimizer steps in which the learning rate rises from zero, in `[0, 1]`.
    pub warmup_ratio: f64,
    /// Optimizer, with the type of its state.
    pub optimizer: Optimizer,
    /// AdamW: decoupled decay per step, times the learning rate.
    pub weight_decay: f64,
    /// AdamW: decay of the first moment.
    pub adam_beta1: f64,
    /// AdamW: decay of the second moment.
    pub adam_beta2: f64,
    /// AdamW: added to the root of the second moment.
    pub adam_epsilon: f64,
    /// Longest L2 norm of the gradient of all trained parameters together; `0` does not clip.
    pub max_grad_norm: f64,
    /// Type in which the gradients of a step are kept until all are known; sums are made in `f32`.
    pub gradient_dtype: Dtype,
    /// Keep only each block's input and run the block again in backward. "auto" does so for as few blocks as the
    /// memory budget allows.
    pub gradient_checkpointing: bool,
    /// Type in which the inputs of blocks that run again are kept.
    pub block_input_dtype: Dtype,
    /// Seed of initialisation, shuffling, dropout and the validation split.
    pub seed: u64,
    /// Draw the rows in a new order each epoch.
    pub shuffle: bool,
    /// Optimizer steps between two lines of the log.
    pub logging_steps: usize,
}

impl Default for Train {
    fn default() -> Self {
        Self {
            num_epochs: 2.0,
            max_steps: None,
            micro_batch_size: 1,
            effective_batch_size: 16,
            gradient_accumulation_steps: 16,
            learning_rate: 2e-4,
            lr_scheduler: LrScheduler::Cosine,
            warmup_ratio: 0.05,
            optimizer: Optimizer::Adamw,
            weight_decay: 0.01,
            adam_beta1: 0.9,
            adam_beta2: 0.999,
            adam_epsilon: 1e-8,
            max_grad_norm: 1.0,
            gradient_dtype: Dtype::F32,
            gradient_checkpointing: true,
            block_input_dtype: Dtype::F32,
            seed: 42,
            shuffle: true,
            logging_steps: 1,
        }
    }
}

/// Optimizer, with the type of its state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Optimizer {
    /// AdamW with 32-bit moments.
    #[default]
    #[serde(alias = "adamw_torch", alias = "adamw_hf")]
    Adamw,
    /// AdamW with moments of 8 bits and a scale for each 256 of them.
    #[serde(
        rename = "adamw_8bit",
        alias = "adamw_bnb_8bit",
        alias = "paged_adamw_8bit",
        alias = "adamw_torch_8bit",
        alias = "adamw8bit"
    )]
    Adamw8bit,
}

/// Shape of the learning rate after warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LrScheduler {
    /// Half a cosine from the peak to zero.
    #[default]
    Cosine,
    /// A straight line from the peak to zero.
    Linear,
    /// The peak throughout.
    Constant,
}

/// `[memory]`: the gate before the start.
#[derive(Clone, Debug, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Memory {
    /// Memory that the run may use: "auto" asks the machine, else a size such as `"6 GiB"`.
    pub budget: Budget,
    /// What happens when the estimate is larger.
    pub on_exceed: OnExceed,
}

/// What happens when the estimate exceeds the budget.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnExceed {
    /// The run does not start.
    #[default]
    Refuse,
    /// The micro-batch is made smaller until the run fits, and the change is reported.
    Fit,
    /// The run starts after a warning.
    Warn,
}

/// `[eval]`: validation while training.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Eval {
    /// Optimizer steps between two validations; `0` validates only at the end.
    pub eval_steps: usize,
    /// Stop after so many validations without a lower loss; never when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub early_stopping_patience: Option<usize>,
}

impl Default for Eval {
    fn default() -> Self {
        Self { eval_steps: 50, early_stopping_patience: None }
    }
}

/// `[checkpoint]`: saving and resuming.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Checkpoint {
    /// Optimizer steps between two checkpoints; `0` saves only at the end.
    pub save_steps: usize,
    /// Checkpoints kept; the oldest is removed.
    pub save_total_limit: usize,
    /// Where to continue from: "auto" (the newest checkpoint of the run folder), "never" or a path.
    pub resume: Resume,
}

impl Default for Checkpoint {
    fn default() -> Self {
        Self { save_steps: 100, save_total_limit: 2, resume: Resume::Auto }
    }
}

/// `[export]`: what is written after training.
#[derive(Clone, Debug, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Export {
    /// `gguf-lora`, `gguf:TYPE`, `peft`, `safetensors` or `ollama:NAME`; none when absent.
    pub targets: Vec<String>,
    /// What happens when an exported file differs from what was trained.
    pub verify: Verify,
}

/// What happens when an exported file differs from what was trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verify {
    /// The export fails.
    #[default]
    Strict,
    /// The export warns.
    Warn,
    /// The file is not compared.
    Off,
}

/// `[samples]`: prompts answered by the base and by the tuned model at the end of the run, side by side.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Samples {
    /// Held-out prompts; nothing is printed when empty.
    pub prompts: Vec<String>,
    /// System message before each prompt.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub system: Option<String>,
    /// Longest answer, in tokens.
    pub max_tokens: usize,
}

impl Default for Samples {
    fn default() -> Self {
        Self { prompts: Vec::new(), system: None, max_tokens: 96 }
    }
}
