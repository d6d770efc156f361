//! Supervised fine-tuning: the run, from the opened base to the trained adapter, or to trained weights.
//!
//! Loss of a step: Σ −log p(target) over all its micro-batches, divided by all its trained tokens — not the mean
//! of the micro-batches' means, which would weigh short ones more.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use burn::tensor::{Device, FloatDType, Tensor};
use sha2::{Digest, Sha256};
use tune_adapters::Dropout;
use tune_data::{Batcher, MicroBatch};
use tune_eval::{Evaluation, evaluate};
use tune_formats::provenance::{Provenance, sha256_of};
use tune_formats::{BaseModel, peft};
use tune_kernels::Arithmetic;
use tune_memory::{end_phase, peak_resident_bytes};
use tune_models::{Llama, Quantization};
use tune_recipe::{Method, Optimizer, RunSpec};

use crate::adapter::{adapt, parameters, trained_adapter};
use crate::checkpoint::{self, State, Trained};
use crate::run_folder::MetricsLog;
use crate::steps::{Step, steps};
use crate::{
    AdamW, AdamWConfig, Event, GradientSum, Pass, RunFolder, Schedule, StepMetrics, TrainError,
    clip_grad_norm,
};

/// What a run needs.
pub struct Setup<'a> {
    /// The resolved recipe.
    pub spec: &'a RunSpec,
    /// The opened base.
    pub base: &'a BaseModel,
    /// Rows to train on.
    pub train: Batcher,
    /// Rows held out; may have none.
    pub validation: Batcher,
    /// Where everything is written.
    pub folder: RunFolder,
    /// What the run was predicted to need, for `plan.json`.
    pub plan: String,
    /// Blocks that keep their activations for backward; the others run twice.
    pub kept_blocks: usize,
    /// The checkpoint to go on from.
    pub resume_from: Option<PathBuf>,
    /// Set from outside to save and stop.
    pub stop: &'a AtomicBool,
    /// What the run may use, if that is known.
    pub memory_limit: Option<MemoryLimit>,
}

/// Memory that a run may use. The peak of resident memory is compared with it after every micro-batch and every step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryLimit {
    /// In bytes.
    pub bytes: u64,
    /// Beyond it the run saves and stops; otherwise it only says so.
    pub stops: bool,
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// The adapter is in the run folder; trained weights are in the last checkpoint and in the model.
    Completed,
    /// Stopped from outside; a checkpoint is saved.
    Interrupted,
    /// More memory was used than the run may use; a checkpoint is saved.
    OverBudget {
        /// Peak of resident memory.
        peak_bytes: u64,
    },
}

/// A run that ended without an error.
pub struct Outcome {
    /// How it ended.
    pub finish: Finish,
    /// Optimizer steps taken.
    pub steps: usize,
    /// The trained model.
    pub model: Llama,
    /// What its weights come from.
    pub provenance: Provenance,
}

/// Trains adapters over a frozen base, or all weights.
#[allow(clippy::too_many_lines, reason = "the run reads top to bottom")]
pub fn sft(setup: &Setup<'_>, on_event: &mut dyn FnMut(Event)) -> Result<Outcome, TrainError> {
    let Setup { spec, base, folder, .. } = setup;
    let device = Device::flex();

    // Load and adapt.
    let mut model = tune_models::load(base, quantization(spec), &device)?.with_arithmetic(arithmetic(spec));
    match spec.adapter.method {
        Method::Full => model.unfreeze(),
        Method::Lora | Method::Qlora => adapt(&mut model, spec, base)?,
    }

    end_phase("load");

    // Data.
    let steps = steps(&setup.train, &spec.train)?;
    if steps.is_empty() {
        return Err(TrainError::NoSteps);
    }
    let held_out: Vec<MicroBatch> =
        setup.validation.epoch(0).iter().map(|plan| setup.validation.micro_batch(plan)).collect();

    // Optimiser, and where an earlier run left everything.
    let schedule = Schedule::new(
        spec.train.lr_scheduler,
        spec.train.learning_rate,
        spec.train.warmup_ratio,
        steps.len(),
    );
    let mut state = State { settings: settings(setup)?, ..State::default() };
    let mut adam = fresh_optimizer(spec, &mut model);
    if let Some(path) = &setup.resume_from {
        (adam, state) = resume(setup, path, &mut model, &state.settings)?;
    }
    let mut saved_at = setup.resume_from.as_ref().map(|_| state.step);
    // The folder is this run's own from here on: nothing is written before it is known not to be another's.
    folder.write(&folder.recipe(), spec.to_toml().as_bytes())?;
    folder.write(&folder.plan(), setup.plan.as_bytes())?;
    if state.step < steps.len() {
        checkpoint::set_aside_after(folder, state.step)?;
        folder.set_result_aside()?;
    }
    let exempt = model.parameters_mut().iter().map(|parameter| parameter.is_vector).collect();
    let mut adam = adam.without_decay_of(exempt);
    let mut log = MetricsLog::open(folder, state.step)?;
    on_event(Event::Started {
        total_steps: steps.len(),
        resumed_from: state.step,
        trainable_parameters: parameters(&mut model).iter().map(|(_, p)| p.shape().num_elements()).sum(),
        base_parameters: base.parameters(),
    });

    // What training is measured against: without steps, an adapter changes nothing.
    let mut val_loss_before = if state.step == 0 { validate(&model, &held_out) } else { None };

    // Loop.
    let mut finish = Finish::Completed;
    let mut watch = Watch { limit: setup.memory_limit, has_told: false };
    while state.step < steps.len() && !is_exhausted(&state, spec) {
        let started = Instant::now();
        let number = state.step + 1;
        let batch = match accumulate(setup, &model, &steps[state.step], number, &mut watch, on_event) {
            Ok(batch) => batch,
            Err(stopped) => {
                finish = stopped;
                break;
            }
        };
        if !batch.loss.is_finite() {
            return Err(TrainError::Diverged { step: number, what: "loss", value: batch.loss });
        }
        let mut gradients = batch.gradients;
        let grad_norm = clip_grad_norm(&mut gradients, spec.train.max_grad_norm);
        if !grad_norm.is_finite() {
            return Err(TrainError::Diverged { step: number, what: "gradient", value: grad_norm });
        }
        let learning_rate = schedule.learning_rate(number);
        if !gradients.is_empty() {
            let parameters = parameters(&mut model).into_iter().map(|(_, parameter)| parameter).collect();
            adam.step(learning_rate, parameters, gradients);
        }
        end_phase("step");
        state.step = number;
        let seconds = started.elapsed().as_secs_f64();

        let due = spec.eval.eval_steps > 0 && number.is_multiple_of(spec.eval.eval_steps);
        let val_loss = (due || number == steps.len()).then(|| validate(&model, &held_out)).flatten();
        end_phase("validation");
        state.elapsed_s += started.elapsed().as_secs_f64();
        let metrics = StepMetrics {
            step: number,
            epoch: steps[number - 1].epoch,
            loss: batch.loss,
            learning_rate,
            grad_norm,
            tokens: batch.tokens,
            trained_tokens: batch.trained_tokens,
            tokens_per_second: batch.tokens as f64 / seconds,
            peak_memory_bytes: peak_resident_bytes(),
            elapsed_s: state.elapsed_s,
            val_loss,
            val_loss_before: val_loss_before.take(),
        };
        log.push(&metrics)?;
        on_event(Event::Step(metrics));

        track_validation(&mut state, val_loss);
        if spec.checkpoint.save_steps > 0 && number.is_multiple_of(spec.checkpoint.save_steps) {
            let path = save(setup, &state, &mut model, &adam)?;
            saved_at = Some(number);
            on_event(Event::Saved { path });
        }
        if is_exhausted(&state, spec) && number < steps.len() {
            on_event(Event::StoppedEarly { step: number });
        } else if number < steps.len() {
            // A run that has taken its last step has nothing to gain from stopping.
            if let Some(stopped) = watch.look(on_event) {
                finish = stopped;
                break;
            }
        }
    }

    // Save.
    if saved_at != Some(state.step) && state.step > 0 {
        let path = save(setup, &state, &mut model, &adam)?;
        on_event(Event::Saved { path });
    }
    let provenance = provenance(setup)?;
    if finish == Finish::Completed && spec.adapter.method != Method::Full {
        let adapter = trained_adapter(&mut model, spec, provenance.clone());
        peft::write(&folder.adapter(), &adapter)?;
    }
    Ok(Outcome { finish, steps: state.step, model, provenance })
}

/// How a run holds its frozen weights.
pub fn quantization(spec: &RunSpec) -> Quantization {
    match spec.model.quantization {
        tune_recipe::Quantization::Nf4 => Quantization::Nf4,
        tune_recipe::Quantization::Keep | tune_recipe::Quantization::None => Quantization::Keep,
    }
}

/// In what a run multiplies.
pub fn arithmetic(spec: &RunSpec) -> Arithmetic {
    match spec.model.dtype {
        tune_recipe::Dtype::F32 => Arithmetic::F32,
        tune_recipe::Dtype::Bf16 => Arithmetic::Bf16,
    }
}

/// Gradient of one optimizer step and what went into it.
struct StepBatch {
    loss: f64,
    gradients: Vec<Tensor<2>>,
    tokens: usize,
    trained_tokens: usize,
}

/// Compares what is resident with what a run may use.
struct Watch {
    limit: Option<MemoryLimit>,
    has_told: bool,
}

impl Watch {
    /// How the run ends, if it has to: the peak never falls again, so looking now and then misses nothing.
    fn look(&mut self, on_event: &mut dyn FnMut(Event)) -> Option<Finish> {
        let (limit, peak_bytes) = self.limit.zip(peak_resident_bytes())?;
        if peak_bytes <= limit.bytes {
            return None;
        }
        if !std::mem::replace(&mut self.has_told, true) {
            on_event(Event::OverBudget { peak_bytes, budget_bytes: limit.bytes });
        }
        limit.stops.then_some(Finish::OverBudget { peak_bytes })
    }
}

/// Sums the gradients of a step's micro-batches. An error says how the run ends before the step is taken.
fn accumulate(
    setup: &Setup<'_>,
    model: &Llama,
    step: &Step,
    number: usize,
    watch: &mut Watch,
    on_event: &mut dyn FnMut(Event),
) -> Result<StepBatch, Finish> {
    let spec = setup.spec;
    let micro_batches: Vec<MicroBatch> =
        step.micro_batches.iter().map(|plan| setup.train.micro_batch(plan)).collect();
    let mut sum = StepBatch {
        loss: 0.0,
        gradients: Vec::new(),
        tokens: micro_batches.iter().map(MicroBatch::len).sum(),
        trained_tokens: micro_batches.iter().map(MicroBatch::trained_tokens).sum(),
    };
    let scale = 1.0 / sum.trained_tokens.max(1) as f64;
    let mut gradients = GradientSum::default();
    let pass = Pass {
        block_input_dtype: float_dtype(spec.train.block_input_dtype),
        gradient_dtype: float_dtype(spec.train.gradient_dtype),
        ..Pass::new(scale, setup.kept_blocks)
    };
    let work = pass.work(model) * micro_batches.len();
    let mut done = 0;
    let stopped = Cell::new(None);
    let mut go_on = |more| {
        done += more;
        on_event(Event::Progress { step: number, share: done as f64 / work.max(1) as f64 });
        let stop = setup.stop.load(Ordering::Relaxed).then_some(Finish::Interrupted);
        stopped.set(stop.or_else(|| watch.look(on_event)));
        if stopped.get().is_some() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    for (index, micro_batch) in micro_batches.iter().enumerate() {
        let dropout = Some(Dropout { key: dropout_key(spec.train.seed, number, index) });
        let loss = gradients.add(model, micro_batch, &Pass { dropout, ..pass }, &mut go_on);
        let Some(loss) = loss else { return Err(stopped.get().unwrap_or(Finish::Interrupted)) };
        sum.loss += loss;
    }
    sum.gradients = gradients.into_gradients();
    Ok(sum)
}

/// Mean loss over the held-out rows; `None` when there are none.
fn validate(model: &Llama, held_out: &[MicroBatch]) -> Option<f64> {
    let mut total = Evaluation::default();
    for micro_batch in held_out {
        total += evaluate(model, micro_batch);
    }
    (total.tokens > 0).then(|| total.loss())
}

/// Counts validations without a new lowest loss.
fn track_validation(state: &mut State, val_loss: Option<f64>) {
    let Some(val_loss) = val_loss else { return };
    if state.best_val_loss.is_none_or(|best| val_loss < best) {
        state.best_val_loss = Some(val_loss);
        state.validations_without_progress = 0;
    } else {
        state.validations_without_progress += 1;
    }
}

/// Validation has not improved for as long as the recipe allows.
fn is_exhausted(state: &State, spec: &RunSpec) -> bool {
    spec.eval.early_stopping_patience.is_some_and(|patience| state.validations_without_progress >= patience)
}

fn save(setup: &Setup<'_>, state: &State, model: &mut Llama, adam: &AdamW) -> Result<PathBuf, TrainError> {
    let trained = match setup.spec.adapter.method {
        Method::Full => {
            let weights = parameters(model).into_iter().map(|(name, tensor)| (name, tensor.clone()));
            Trained::Weights(weights.collect())
        }
        Method::Lora | Method::Qlora => {
            Trained::Adapter(Box::new(trained_adapter(model, setup.spec, provenance(setup)?)))
        }
    };
    let names = parameters(model).into_iter().map(|(name, _)| name);
    let moments: Vec<_> = names.zip(adam.moments()).collect();
    let saved =
        checkpoint::save(&setup.folder, state, &trained, &moments, setup.spec.checkpoint.save_total_limit);
    end_phase("checkpoint");
    saved
}

/// Restores what is trained and the optimiser from a checkpoint of the same run.
fn resume(
    setup: &Setup<'_>,
    path: &Path,
    model: &mut Llama,
    settings: &BTreeMap<String, String>,
) -> Result<(AdamW, State), TrainError> {
    let mut checkpoint = checkpoint::load(path, model.device())?;
    let differences = differences(&checkpoint.state.settings, settings);
    if !differences.is_empty() {
        return Err(TrainError::OtherRun { folder: setup.folder.root().to_path_buf(), differences });
    }
    let unusable = |reason: String| TrainError::Checkpoint { path: path.to_path_buf(), reason };
    match checkpoint.trained {
        Trained::Adapter(adapter) => model.attach_weights(&adapter, setup.spec.adapter.lora_dropout)?,
        Trained::Weights(mut weights) => {
            for (name, tensor) in parameters(model) {
                let saved = weights.remove(&name).filter(|saved| saved.dims() == tensor.dims());
                *tensor = saved.ok_or_else(|| unusable(format!("no {name} in the shape of the base")))?;
            }
        }
    }
    let missing = |name: &str| unusable(format!("no optimizer state for {name} in its shape"));
    let moments = parameters(model)
        .into_iter()
        .map(|(name, parameter)| {
            let moments = checkpoint.moments.remove(&name).filter(|moments| moments.fit(parameter.dims()));
            moments.ok_or_else(|| missing(&name))
        })
        .collect::<Result<Vec<_>, _>>()?;
    let adam = AdamW::resume(adamw_config(setup.spec), checkpoint.state.step as u64, moments);
    Ok((adam, checkpoint.state))
}

/// Every setting that decides the course of a run. Where files are written, how often it is saved and what is
/// printed may change when a run is resumed; these may not.
fn settings(setup: &Setup<'_>) -> Result<BTreeMap<String, String>, TrainError> {
    const FREE: [&str; 3] = ["model.base", "train.logging_steps", "train.gradient_checkpointing"];
    let spec = setup.spec;
    let sections = [
        ("model", serde_json::to_value(&spec.model)),
        ("adapter", serde_json::to_value(&spec.adapter)),
        ("data_options", serde_json::to_value(&spec.data_options)),
        ("train", serde_json::to_value(&spec.train)),
    ];
    let mut settings = BTreeMap::new();
    for (section, values) in sections {
        for (key, value) in values.iter().filter_map(serde_json::Value::as_object).flatten() {
            settings.insert(format!("{section}.{key}"), value.to_string());
        }
    }
    settings.retain(|key, _| !FREE.contains(&key.as_str()));
    settings.insert("base".into(), setup.base.digest()?);
    settings.insert("data".into(), digest([&setup.train, &setup.validation]));
    Ok(settings)
}

/// What the trained weights come from.
fn provenance(setup: &Setup<'_>) -> Result<Provenance, TrainError> {
    let mut recipe = settings(setup)?;
    // a path of this machine says nothing elsewhere
    recipe.remove("adapter.init_adapter");
    Ok(Provenance {
        base_digest: recipe.remove("base"),
        data_digest: recipe.remove("data"),
        template_digest: setup.base.chat_template.as_deref().map(sha256_of),
        recipe: serde_json::to_string(&recipe).ok(),
        version: Some(env!("CARGO_PKG_VERSION").to_owned()),
    })
}

/// SHA-256 over the tokens and the mask of all rows.
fn digest(sides: [&Batcher; 2]) -> String {
    let mut hash = Sha256::new();
    for side in sides {
        hash.update(side.samples().len().to_le_bytes());
        for sample in side.samples() {
            hash.update(sample.len().to_le_bytes());
            sample.input_ids.iter().for_each(|id| hash.update(id.to_le_bytes()));
            sample.trained.iter().for_each(|trained| hash.update([u8::from(*trained)]));
        }
    }
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

fn differences(saved: &BTreeMap<String, String>, now: &BTreeMap<String, String>) -> Vec<String> {
    let keys: std::collections::BTreeSet<_> = saved.keys().chain(now.keys()).collect();
    let value =
        |map: &BTreeMap<String, String>, key| map.get(key).cloned().unwrap_or_else(|| "absent".into());
    keys.into_iter()
        .filter(|key| saved.get(*key) != now.get(*key))
        .map(|key| format!("{key}: {} in the checkpoint, {} now", value(saved, key), value(now, key)))
        .collect()
}

/// Zero moments for all that is trained.
fn fresh_optimizer(spec: &RunSpec, model: &mut Llama) -> AdamW {
    let parameters = parameters(model);
    let tensors = parameters.iter().map(|(_, tensor)| &**tensor);
    match spec.train.optimizer {
        Optimizer::Adamw => AdamW::new(adamw_config(spec), tensors),
        Optimizer::Adamw8bit => AdamW::new_8bit(adamw_config(spec), tensors),
    }
}

fn float_dtype(dtype: tune_recipe::Dtype) -> FloatDType {
    match dtype {
        tune_recipe::Dtype::F32 => FloatDType::F32,
        tune_recipe::Dtype::Bf16 => FloatDType::BF16,
    }
}

fn adamw_config(spec: &RunSpec) -> AdamWConfig {
    AdamWConfig {
        beta1: spec.train.adam_beta1,
        beta2: spec.train.adam_beta2,
        epsilon: spec.train.adam_epsilon,
        weight_decay: spec.train.weight_decay,
    }
}

/// SplitMix64 over seed, step and micro-batch (Steele et al. 2014).
fn dropout_key(seed: u64, step: usize, index: usize) -> u64 {
    let mut key = seed;
    for part in [step as u64, index as u64] {
        key = key.wrapping_add(part).wrapping_add(0x9E37_79B9_7F4A_7C15);
        key = (key ^ (key >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        key = (key ^ (key >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        key ^= key >> 31;
    }
    key
}
