//! The trained model of a run, and the rows that exports of it are held against.

use std::cell::RefCell;
use std::path::Path;
use std::sync::Arc;

use burn::tensor::Device;
use miette::Result;
use tune_data::{
    ChatTemplate, Clock, DataSource, LoadOptions, MicroBatch, Overlong, Sample, Tokenizer, TrainOn,
};
use tune_eval::{BlockMoments, Evaluation, Moments, evaluate};
use tune_export::InputMoments;
use tune_formats::BaseModel;
use tune_formats::peft::Adapter;
use tune_models::{Llama, Quantization};
use tune_recipe::RunSpec;

use crate::inputs;
use crate::model::check_ids;

/// Tokens of the held-out rows that are used at most: as many as tell a percent of retention.
const HELD_OUT_TOKENS: usize = 8192;
/// Tokens of the training rows whose activations are used at most.
const ACTIVATION_TOKENS: usize = 16_384;
/// Tokens that go through the model at once.
const BATCH_TOKENS: usize = 1024;
/// For runs without rows that were held out.
const SHIPPED_TEXT: &str = include_str!("../../../tests/e2e/text.txt");

/// Some rows, and where they come from.
pub struct Rows {
    /// What they are, for people.
    pub origin: String,
    /// Ready for the model.
    pub batches: Vec<MicroBatch>,
}

/// The trained model of a run.
pub struct Trained<'a> {
    /// The base that it was trained over.
    pub base: &'a BaseModel,
    /// What training added; empty where it changed the weights themselves.
    pub adapter: &'a Adapter,
    /// Base and adapter.
    pub model: Llama,
    /// Text ↔ ids, as in training.
    pub tokenizer: &'a Tokenizer,
    /// Rows that it was not trained on.
    pub held_out: Rows,
    /// Loss of the base on them.
    pub base_loss: Evaluation,
    /// Rows that it was trained on; none where they are not there any more.
    training: Vec<MicroBatch>,
}

impl<'a> Trained<'a> {
    /// `base` with `adapter`, and the rows of the run, if it is one. `untrained` is the base where training changed its
    /// weights; `data` is a file to use in place of the run's own rows.
    pub fn open(
        base: &'a BaseModel,
        adapter: &'a Adapter,
        tokenizer: &'a Tokenizer,
        spec: Option<&RunSpec>,
        untrained: Option<&BaseModel>,
        data: Option<&Path>,
    ) -> Result<Self> {
        let quantization = spec.map_or(Quantization::Keep, tune_train::quantization);
        let mut model = tune_models::load(base, quantization, &Device::flex())?.releasing();
        if !adapter.layers.is_empty() {
            adapter.check_base(base)?;
            model.attach_frozen(adapter)?;
        }
        let (training, held_out) = rows(base, tokenizer, spec, data)?;
        let plain = match untrained {
            Some(untrained) => tune_models::load(untrained, quantization, &Device::flex())?.releasing(),
            None => model.without_adapters(),
        };
        let mut base_loss = Evaluation::default();
        held_out.batches.iter().for_each(|batch| base_loss += evaluate(&plain, batch));
        Ok(Self { base, adapter, model, tokenizer, held_out, base_loss, training })
    }

    /// What the layers of the trained model are fed by its training rows; `None` without such rows.
    pub fn activations(&self) -> Option<Activations<'_>> {
        let moments = Moments::new(&self.model, &self.training);
        (!self.training.is_empty()).then(|| Activations(RefCell::new((moments, None))))
    }
}

/// The way of the training rows through the model, block by block as it is asked.
pub struct Activations<'m>(RefCell<(Moments<'m>, Option<Current>)>);

struct Current {
    layer: usize,
    inputs: Vec<(Vec<&'static str>, Arc<InputMoments>)>,
}

impl From<BlockMoments> for Current {
    fn from(block: BlockMoments) -> Self {
        let shared = |(names, d_in, sums)| (names, Arc::new(InputMoments { d_in, sums }));
        Self { layer: block.layer, inputs: block.inputs.into_iter().map(shared).collect() }
    }
}

impl Activations<'_> {
    /// The moments of the inputs of the linear layer at a module path. Layers come in the order of the forward pass.
    pub fn of(&self, module: &str) -> Option<Arc<InputMoments>> {
        let (layer, part) = module.strip_prefix("model.layers.")?.split_once('.')?;
        let (layer, name): (usize, _) = (layer.parse().ok()?, part.rsplit('.').next()?);
        let (moments, current) = &mut *self.0.borrow_mut();
        while current.as_ref().is_none_or(|current| current.layer < layer) {
            *current = None; // before the next: the moments of one block are held, not of two
            *current = Some(moments.next_block()?.into());
        }
        let current = current.as_ref().filter(|current| current.layer == layer)?;
        current.inputs.iter().find(|(names, _)| names.contains(&name)).map(|(_, moments)| moments.clone())
    }
}

/// Training rows and held-out rows: of `data`, else of the run, else a text of this program.
fn rows(
    base: &BaseModel,
    tokenizer: &Tokenizer,
    spec: Option<&RunSpec>,
    data: Option<&Path>,
) -> Result<(Vec<MicroBatch>, Rows)> {
    let of_run = match spec {
        Some(spec) if spec.data.iter().all(|data| data.path.is_file()) => {
            Some(run_rows(base, tokenizer, spec)?)
        }
        _ => None,
    };
    let (training, held_out) = of_run.unwrap_or_default();
    let training = batches(&training, ACTIVATION_TOKENS);
    let (origin, samples) = match data {
        Some(path) => (format!("rows of {}", path.display()), file_rows(base, tokenizer, spec, path)?),
        None if !held_out.is_empty() => ("rows that the run held out".to_owned(), held_out),
        None => {
            ("a text of tune's own (the run held no rows out)".to_owned(), shipped_rows(base, tokenizer)?)
        }
    };
    let batches = batches(&samples, HELD_OUT_TOKENS);
    Ok((training, Rows { origin, batches }))
}

fn run_rows(base: &BaseModel, tokenizer: &Tokenizer, spec: &RunSpec) -> Result<(Vec<Sample>, Vec<Sample>)> {
    let dataset = inputs::dataset(spec, base, tokenizer, template(base, tokenizer)?.as_ref())?;
    Ok(dataset.split(spec.data_options.val_split, spec.train.seed))
}

fn file_rows(
    base: &BaseModel,
    tokenizer: &Tokenizer,
    spec: Option<&RunSpec>,
    path: &Path,
) -> Result<Vec<Sample>> {
    let train_on = spec.and_then(|spec| spec.data.first()).map(|data| inputs::train_on(data.train_on));
    let source =
        DataSource { path: path.to_owned(), format: None, train_on: train_on.unwrap_or(TrainOn::Assistant) };
    let options = LoadOptions {
        sequence_len: base.config.max_position_embeddings.min(2048),
        overlong: Overlong::Drop,
        vocab_size: base.config.vocab_size,
    };
    let template = template(base, tokenizer)?;
    let dataset = tune_data::load(&[source], &options, tokenizer, template.as_ref(), &base.name)?;
    check_ids(dataset.samples.iter().flat_map(|sample| &sample.input_ids), base)?;
    Ok(dataset.samples)
}

/// Paragraphs, each a document of its own; every token counts.
fn shipped_rows(base: &BaseModel, tokenizer: &Tokenizer) -> Result<Vec<Sample>> {
    let longest = base.config.max_position_embeddings;
    let mut samples = Vec::new();
    for paragraph in SHIPPED_TEXT.split("\n\n") {
        let mut ids = tokenizer.encode_sequence(paragraph)?;
        ids.truncate(longest);
        let all = vec![true; ids.len()];
        samples.push(Sample::new(ids, all));
    }
    check_ids(samples.iter().flat_map(|sample| &sample.input_ids), base)?;
    Ok(samples)
}

/// The chat template, with the date that training used.
pub fn template(base: &BaseModel, tokenizer: &Tokenizer) -> Result<Option<ChatTemplate>> {
    match &base.chat_template {
        Some(_) => Ok(Some(ChatTemplate::from_base(base, tokenizer, Clock::Fixed)?)),
        None => Ok(None),
    }
}

/// Samples side by side, up to a number of tokens in all. Where there are more, every so-manieth is taken.
fn batches(samples: &[Sample], most: usize) -> Vec<MicroBatch> {
    let total: usize = samples.iter().map(Sample::len).sum();
    let step = total.div_ceil(most).max(1);
    let chosen: Vec<&Sample> = samples.iter().step_by(step).filter(|sample| !sample.is_empty()).collect();
    let mut batches = Vec::new();
    let mut row: Vec<&Sample> = Vec::new();
    for sample in chosen {
        if !row.is_empty() && row.iter().map(|s| s.len()).sum::<usize>() + sample.len() > BATCH_TOKENS {
            batches.push(MicroBatch::of(row.drain(..)));
        }
        row.push(sample);
    }
    if !row.is_empty() {
        batches.push(MicroBatch::of(row));
    }
    batches
}
