//! What a recipe names, opened: the base with its tokenizer and template, and the rows.

use std::path::Path;

use tune_data::{ChatTemplate, Clock, DataSource, Dataset, Format, LoadOptions, TokenCache, Tokenizer};
use tune_formats::{BaseModel, ModelConfig};
use tune_hub::{ModelRef, Resolved};
use tune_recipe::{BaseFacts, DataFormat, Override, RunSpec};

use crate::model::check_ids;
use crate::{download, machine};

/// A recipe and the base that it names.
pub struct Inputs {
    /// The recipe, with every "auto" resolved for this base.
    pub spec: RunSpec,
    /// Where the base came from.
    pub resolved: Resolved,
    /// The base.
    pub base: BaseModel,
    /// Text ↔ ids.
    pub tokenizer: Tokenizer,
    /// The base's chat template, if it has one.
    pub template: Option<ChatTemplate>,
}

/// Reads the recipe and opens its base, fetching it first if need be.
pub fn open(recipe: &Path, overrides: &[Override]) -> miette::Result<Inputs> {
    of_spec(tune_recipe::load(recipe, overrides)?)
}

/// Opens the base that `spec` names, fetching it first if need be.
pub fn of_spec(mut spec: RunSpec) -> miette::Result<Inputs> {
    spec.prefer_dtype(machine::fastest_dtype());
    let resolved = download::resolve(&ModelRef::parse(&spec.model.base)?, false)?;
    let base = tune_formats::open(&resolved.path)?;
    spec.refine(&facts(&base))?;
    let tokenizer = Tokenizer::from_base(&base)?;
    let template = match &base.chat_template {
        // A fixed date: the same rows give the same tokens on any day.
        Some(_) => Some(ChatTemplate::from_base(&base, &tokenizer, Clock::Fixed)?),
        None => None,
    };
    Ok(Inputs { spec, resolved, base, tokenizer, template })
}

impl Inputs {
    /// The recipe's rows, tokenised. They are kept for the next run unless `TUNE_NO_CACHE` is set.
    pub fn dataset(&self) -> miette::Result<Dataset> {
        let sources = self.sources();
        let options = LoadOptions {
            sequence_len: self.spec.data_options.sequence_len,
            overlong: overlong(self.spec.data_options.overlong),
            vocab_size: self.base.config.vocab_size,
        };
        let (tokenizer, template, name) = (&self.tokenizer, self.template.as_ref(), &self.base.name);
        let dataset = match tune_hub::Options::from_env(|name| std::env::var_os(name)).token_cache_dir {
            Some(folder) => TokenCache::new(folder).load(&sources, &options, tokenizer, template, name)?,
            None => tune_data::load(&sources, &options, tokenizer, template, name)?,
        };
        check_ids(dataset.samples.iter().flat_map(|sample| &sample.input_ids), &self.base)?;
        Ok(dataset)
    }

    /// The files that the recipe names.
    pub fn sources(&self) -> Vec<DataSource> {
        let source = |data: &tune_recipe::Data| DataSource {
            path: data.path.clone(),
            format: format(data.format),
            train_on: train_on(data.train_on),
        };
        self.spec.data.iter().map(source).collect()
    }
}

/// What "auto" values of a recipe depend on.
pub fn facts(base: &BaseModel) -> BaseFacts {
    let stored = base.weights.matrix(&format!("{}.weight", ModelConfig::linear_path(0, "q_proj")));
    BaseFacts {
        parameters: base.parameters(),
        quantized: stored.is_ok_and(|matrix| matrix.is_quantized()),
        num_hidden_layers: base.config.num_hidden_layers,
        max_position_embeddings: base.config.max_position_embeddings,
        linear_names: base.config.block_linears().iter().map(|(name, ..)| (*name).to_string()).collect(),
    }
}

fn format(format: DataFormat) -> Option<Format> {
    match format {
        DataFormat::Auto => None,
        DataFormat::Messages => Some(Format::Messages),
        DataFormat::Sharegpt => Some(Format::Sharegpt),
        DataFormat::Alpaca => Some(Format::Alpaca),
        DataFormat::PromptCompletion => Some(Format::PromptCompletion),
        DataFormat::Text => Some(Format::Text),
        DataFormat::InputIds => Some(Format::InputIds),
    }
}

fn train_on(train_on: tune_recipe::TrainOn) -> tune_data::TrainOn {
    match train_on {
        tune_recipe::TrainOn::Assistant => tune_data::TrainOn::Assistant,
        tune_recipe::TrainOn::Last => tune_data::TrainOn::Last,
        tune_recipe::TrainOn::All => tune_data::TrainOn::All,
        tune_recipe::TrainOn::Completion => tune_data::TrainOn::Completion,
    }
}

fn overlong(overlong: tune_recipe::Overlong) -> tune_data::Overlong {
    match overlong {
        tune_recipe::Overlong::Drop => tune_data::Overlong::Drop,
        tune_recipe::Overlong::Truncate => tune_data::Overlong::Truncate,
        tune_recipe::Overlong::Split => tune_data::Overlong::Split,
        tune_recipe::Overlong::Error => tune_data::Overlong::Error,
    }
}
