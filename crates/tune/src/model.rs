//! A model opened for use: from a reference or a run folder, with an adapter if there is one.

use std::path::{Path, PathBuf};

use burn::tensor::Device;
use tune_data::{ChatTemplate, Clock, Message, Tokenizer};
use tune_formats::{BaseModel, peft};
use tune_hub::ModelRef;
use tune_models::{Llama, Quantization};
use tune_recipe::{Method, RunSpec};
use tune_train::{RunFolder, quantization};

use crate::commands::export::trained_in_full;
use crate::download;
use crate::exit::UsageError;

/// Which model to use.
#[derive(clap::Args)]
pub struct ModelArgs {
    /// Alias, directory, .gguf file, ollama:NAME, hf:OWNER/REPO, or the folder of a run
    pub model: String,
    /// PEFT adapter folder to put over the model
    #[arg(long, value_name = "DIR")]
    pub adapter: Option<PathBuf>,
    /// Use the adapter also over weights that it was not trained on
    #[arg(long)]
    pub any_base: bool,
}

/// A model ready to run.
pub struct Opened {
    /// Its files.
    pub base: BaseModel,
    /// Text ↔ ids.
    pub tokenizer: Tokenizer,
    /// The network, with its adapter.
    pub model: Llama,
}

/// Opens the model that `args` name.
pub fn open(args: &ModelArgs) -> miette::Result<Opened> {
    let run = RunFolder::new(&args.model);
    let (reference, adapter, quantization) = if run.recipe().is_file() {
        let spec = tune_recipe::load(&run.recipe(), &[])?;
        if spec.adapter.method == Method::Full {
            return open_trained(&run, &spec, args);
        }
        let adapter = args.adapter.clone().unwrap_or_else(|| run.adapter());
        (spec.model.base.clone(), Some(adapter), quantization(&spec))
    } else {
        (args.model.clone(), args.adapter.clone(), Quantization::Keep)
    };
    let (base, model) = load(&reference, quantization, adapter.as_deref(), args.any_base)?;
    let tokenizer = Tokenizer::from_base(&base)?;
    Ok(Opened { base, tokenizer, model })
}

/// Opens what a run that trains all weights has left.
fn open_trained(run: &RunFolder, spec: &RunSpec, args: &ModelArgs) -> miette::Result<Opened> {
    let path = download::resolve(&ModelRef::parse(&spec.model.base)?, false)?.path;
    let base = trained_base(run, &path)?;
    if !args.any_base {
        trained_in_full(run)?.require_trained_base(&tune_formats::open(&path)?)?;
    }
    let mut model = tune_models::load(&base, Quantization::Keep, &Device::flex())?;
    if let Some(path) = &args.adapter {
        let adapter = peft::read(path)?;
        check_adapter(&adapter, &base, args.any_base)?;
        model.attach_weights(&adapter, 0.0)?;
    }
    let tokenizer = Tokenizer::from_base(&base)?;
    Ok(Opened { base, tokenizer, model })
}

/// The base at `path`, with its tokenizer and metadata as in training, and the trained weights of `run`.
pub fn trained_base(run: &RunFolder, path: &Path) -> miette::Result<BaseModel> {
    if !run.is_finished() {
        return Err(UsageError::report(
            format!("{} has no model yet", run.root().display()),
            format!("finish the run: tune train {}", run.recipe().display()),
        ));
    }
    Ok(BaseModel { weights: tune_formats::hf::open_weights(&run.model())?, ..tune_formats::open(path)? })
}

/// Refuses an adapter that does not fit, or that was trained on other weights.
pub fn check_adapter(adapter: &peft::Adapter, base: &BaseModel, any_base: bool) -> miette::Result<()> {
    adapter.check_base(base)?;
    if !any_base {
        adapter.require_trained_base(base)?;
    }
    Ok(())
}

/// A tokenizer may know ids that the weights have no row for, when its files belong to another model.
pub fn check_ids<'a>(ids: impl IntoIterator<Item = &'a u32>, base: &BaseModel) -> miette::Result<()> {
    let rows = base.config.vocab_size;
    match ids.into_iter().find(|id| **id as usize >= rows) {
        None => Ok(()),
        Some(id) => Err(UsageError::report(
            format!("the tokenizer of {} gives id {id}, and its embedding has {rows} rows", base.name),
            "tokenizer and weights are of different models: fetch the model again",
        )),
    }
}

fn load(
    reference: &str,
    quantization: Quantization,
    adapter: Option<&Path>,
    any_base: bool,
) -> miette::Result<(BaseModel, Llama)> {
    let resolved = download::resolve(&ModelRef::parse(reference)?, false)?;
    let base = tune_formats::open(&resolved.path)?;
    let mut model = tune_models::load(&base, quantization, &Device::flex())?;
    if let Some(path) = adapter {
        let adapter = peft::read(path)?;
        check_adapter(&adapter, &base, any_base)?;
        model.attach_weights(&adapter, 0.0)?;
    }
    Ok((base, model))
}

impl Opened {
    /// The model's chat template.
    pub fn template(&self) -> miette::Result<ChatTemplate> {
        Ok(ChatTemplate::from_base(&self.base, &self.tokenizer, Clock::Now)?)
    }

    /// Ids of a conversation that waits for the assistant's answer.
    pub fn chat_ids(&self, template: &ChatTemplate, messages: &[Message]) -> miette::Result<Vec<u32>> {
        self.ids(&template.render(messages, None, true)?)
    }

    /// Ids of a text that begins a sequence.
    pub fn ids(&self, text: &str) -> miette::Result<Vec<u32>> {
        let ids = self.tokenizer.encode_sequence(text)?;
        check_ids(&ids, &self.base)?;
        Ok(ids)
    }
}
