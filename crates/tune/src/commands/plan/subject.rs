//! The model of a plan, as far as it is known without fetching it.

use tune_formats::{BaseModel, gguf};
use tune_hub::ModelRef;
use tune_plan::advice::Question;
use tune_plan::{CatalogueModel, PlanInput, Shape, WeightBytes};
use tune_recipe::{BaseFacts, Method, Overlong, Quantization, RunSpec};

use super::Target;
use crate::calibration;
use crate::disk_room::Tensors;
use crate::exit::UsageError;
use crate::{download, inputs};

/// A model.
pub struct Subject {
    pub name: String,
    pub shape: Shape,
    pub base: Option<BaseModel>,
    pub facts: Option<BaseFacts>,
    /// The longest context that it was made for.
    pub context: Option<u64>,
}

impl Subject {
    /// One that is known by its dimensions.
    pub fn published(model: &CatalogueModel, shape: Shape) -> Self {
        Self { name: model.name.clone(), shape, base: None, facts: None, context: Some(model.context) }
    }

    /// Its weights as the run holds them.
    pub fn weights(&self, method: Method, quantization: Quantization) -> miette::Result<WeightBytes> {
        Ok(match &self.base {
            Some(base) => tune_plan::from_model(base, quantization)?,
            None => tune_plan::from_shape(&self.shape, method),
        })
    }

    /// Its weights where their blocks are in four bits, or as stored where they are quantised already.
    pub fn four_bit(&self) -> miette::Result<Option<WeightBytes>> {
        self.weights(Method::Qlora, Quantization::Nf4).map(Some)
    }

    /// What an export of it is made of.
    pub fn tensors(&self) -> Tensors<'_> {
        Tensors { shape: &self.shape, base: self.base.as_ref() }
    }

    /// The question that a recipe over this model asks.
    pub fn question(&self, spec: &RunSpec, target: &Target) -> miette::Result<Question> {
        let weights = self.weights(spec.adapter.method, spec.model.quantization)?;
        let model = self.name.clone();
        let calibration = calibration::current();
        Ok(Question {
            input: PlanInput::from_spec(spec, model, self.shape, weights, calibration, target.budget_bytes),
            pool: target.pool,
            keeps_what_fits: !spec.origins.is_written("train.gradient_checkpointing"),
            lora_alpha: spec.origins.is_written("adapter.lora_alpha").then_some(spec.adapter.lora_alpha),
            four_bit: self.four_bit()?,
            context: self.context,
            sequence_is_fixed: spec.data_options.overlong == Overlong::Error,
            rank_may_change: spec.adapter.init_adapter.is_none(),
            layers_may_change: spec.adapter.init_adapter.is_none(),
            model_may_change: spec.adapter.init_adapter.is_none(),
        })
    }
}

/// Looks for a model on this machine, then among the published ones.
pub fn find(name: &str) -> miette::Result<Subject> {
    let published = tune_plan::find_in_catalogue(name);
    let reference = match (ModelRef::parse(name), published) {
        (Ok(reference), _) => Some(reference),
        (Err(_), Some(_)) => None,
        (Err(error), None) => return Err(error.into()),
    };
    match reference.as_ref().map(download::resolve_local) {
        Some(Ok(resolved)) => {
            let base = tune_formats::open(&resolved.path)?;
            let shape = Shape::from(&base.config);
            let facts = inputs::facts(&base);
            let context = Some(facts.max_position_embeddings as u64);
            return Ok(Subject {
                name: base.name.clone(),
                shape,
                base: Some(base),
                facts: Some(facts),
                context,
            });
        }
        // A path, or a store without network: the error says what is wrong, and fetching would not help.
        Some(Err(error)) if !is_remote(reference.as_ref()) && published.is_none() => return Err(error.into()),
        Some(Err(_)) | None => {}
    }
    if let Some((model, shape)) = published.and_then(|model| Some((model, model.shape()?))) {
        say_what_was_chosen(name, model);
        let trainable = gguf::names::architecture(&model.architecture).is_some();
        eprintln!(
            "note        {} is not on this machine: planned by its published dimensions{}",
            model.name,
            if trainable { "" } else { ", and this version cannot train its architecture yet" }
        );
        return Ok(Subject::published(model, shape));
    }
    Err(UsageError::report(
        format!("{name} is not on this machine"),
        format!("fetch it first: tune pull {name}; or give a size, such as --model 7b"),
    ))
}

/// A name that no model has, and which one is planned instead.
pub fn say_what_was_chosen(name: &str, model: &CatalogueModel) {
    if model.stands_for(name) {
        eprintln!(
            "note        no model is called {name}: planned as {}, the nearest that exists",
            model.name
        );
    }
}

fn is_remote(reference: Option<&ModelRef>) -> bool {
    matches!(reference, Some(ModelRef::Hub(_) | ModelRef::Catalogue(_)))
}
