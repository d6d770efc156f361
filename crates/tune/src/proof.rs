//! Whether an artefact answers as the model that was trained: its weights, its template and tokens, and its logits on
//! held-out rows, read again by our own reader and by a real llama.cpp where there is one.

use std::path::{Path, PathBuf};

use burn::tensor::Device;
use miette::Result;
use serde::Serialize;
use tune_eval::{Agreement, compare};
use tune_export::{ExportError, WeightCheck, check_weights};
use tune_formats::gguf::{self, GgufFile};
use tune_formats::peft::{self, Adapter};
use tune_formats::{BaseModel, Source};
use tune_models::{Llama, Quantization};

use crate::engines::{self, EngineAgreement};
use crate::limits::{Limits, coarsest_type};
use crate::trained::Trained;

/// What was found out about an artefact.
#[derive(Clone, Debug, Serialize)]
pub struct Proof {
    /// The file or folder.
    pub artefact: PathBuf,
    /// Its coarsest block type, or `adapter`.
    pub stored_as: String,
    /// The rows that were used.
    pub data: String,
    /// Tokens that were predicted.
    pub tokens: usize,
    /// Perplexity of the base on them.
    pub perplexity_base: f64,
    /// Of the trained model.
    pub perplexity_trained: f64,
    /// Of the artefact.
    pub perplexity_export: f64,
    /// (PPL base − PPL export) / (PPL base − PPL trained); `None` where training did not lower the perplexity.
    pub retention: Option<f64>,
    /// Mean KL(trained ‖ export), in nats.
    pub mean_kl: f64,
    /// Share of tokens for which both think the same most likely.
    pub top1: f64,
    /// What the type allows.
    pub limits: Limits,
    /// The tensor that differs most from base and adapter, relative to what its type allows.
    pub worst_tensor: Option<String>,
    /// Other programs that ran it.
    pub engines: Vec<EngineAgreement>,
    /// Everything that is wrong.
    pub problems: Vec<String>,
    /// The file holds what base and adapter say, rounded to its type.
    #[serde(skip)]
    pub is_sound: bool,
}

/// An artefact, opened.
enum Artefact {
    Model(Box<BaseModel>),
    Adapter(Box<Adapter>),
}

/// What is done while an artefact is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// So many tensors are compared with base and adapter.
    Weights { done: usize, tensors: usize },
    /// So many batches of held-out rows are answered.
    Answers { done: usize, batches: usize },
    /// Another program runs the file.
    Engine,
}

/// Reads `path` as a model and holds it against the trained one. `merged_onto` is the base of a merged model, where it
/// is not the one that training used; `llama_server` is another program to run it in.
///
/// # Errors
/// An artefact that cannot be read as a model over this base.
pub fn prove(
    path: &Path,
    trained: &Trained<'_>,
    merged_onto: Option<&BaseModel>,
    llama_server: Option<&Path>,
    progress: &dyn Fn(Step),
) -> Result<Proof> {
    let artefact = open(path, trained)?;
    let mut problems = Vec::new();
    let (stored_as, model, worst_tensor) = match &artefact {
        Artefact::Model(found) => {
            problems.extend(dialogue_problems(found, trained));
            let base = merged_onto.unwrap_or(trained.base);
            let checks = check_weights(base, trained.adapter, found, &mut |done, tensors| {
                progress(Step::Weights { done, tensors });
            })?;
            problems.extend(checks.iter().filter_map(WeightCheck::problem));
            let model = tune_models::load(found, Quantization::Keep, &Device::flex())?.releasing();
            (coarsest_type(found)?, model, worst(&checks))
        }
        Artefact::Adapter(adapter) => ("adapter".to_owned(), over_base(adapter, trained)?, None),
    };
    let mut agreement = Agreement::default();
    let batches = &trained.held_out.batches;
    for (done, batch) in batches.iter().enumerate() {
        progress(Step::Answers { done, batches: batches.len() });
        agreement += compare(&trained.model, &model, batch);
    }
    let is_sound = problems.is_empty();
    // Weights merged onto another base answer as that base lets them: there is no rounding to hold them to.
    let limits = if merged_onto.is_some() { Limits::NONE } else { Limits::of(&stored_as) };
    problems.extend(limits.problems(&agreement, &stored_as));
    let engines = match llama_server.filter(|_| is_gguf(path)) {
        None => Vec::new(),
        Some(program) => {
            progress(Step::Engine);
            let over = matches!(artefact, Artefact::Adapter(_)).then(|| gguf_of(trained.base)).flatten();
            let found = engines::llama_cpp(
                program,
                path,
                over,
                matches!(artefact, Artefact::Adapter(_)),
                &model,
                trained,
            );
            found?.into_iter().collect()
        }
    };
    problems.extend(engines.iter().filter_map(|engine| engine.problem(Limits::SAME_FILE)));
    Ok(Proof {
        artefact: path.to_owned(),
        stored_as,
        data: trained.held_out.origin.clone(),
        tokens: agreement.tokens(),
        perplexity_base: trained.base_loss.perplexity(),
        perplexity_trained: agreement.reference.perplexity(),
        perplexity_export: agreement.other.perplexity(),
        retention: agreement.retention(&trained.base_loss),
        mean_kl: agreement.mean_kl().max(0.0),
        top1: agreement.top1(),
        limits,
        worst_tensor,
        engines,
        problems,
        is_sound,
    })
}

impl Proof {
    /// Fails where less than `least` of the fine-tune is there, naming the targets that keep more.
    pub fn require_retention(&self, target: &str, least: f64) -> Result<(), ExportError> {
        match self.retention {
            Some(retention) if retention < least => Err(ExportError::LosesTooMuch {
                target: target.to_owned(),
                what: format!(
                    "it keeps {:.1} % of what was learned on {}, at least {:.1} % is asked for",
                    100.0 * retention,
                    self.data,
                    100.0 * least
                ),
                help: "export the adapter (--to gguf-lora), which loses nothing, or eight bits (--to gguf:q8_0); \
                       --min-retention 0 takes this file as it is"
                    .to_owned(),
            }),
            _ => Ok(()),
        }
    }

    /// A few lines for people.
    pub fn lines(&self) -> Vec<String> {
        let share = |share: f64| format!("{:.1} %", 100.0 * share);
        let kept = match self.retention {
            Some(retention) => format!("retention {}", share(retention)),
            None => "no retention: training did not lower the perplexity of these rows".to_owned(),
        };
        let mut lines = vec![
            format!("tokens    {} of {}", self.tokens, self.data),
            format!(
                "perplex.  {:.3} base, {:.3} trained, {:.3} export; {kept}",
                self.perplexity_base, self.perplexity_trained, self.perplexity_export
            ),
            format!(
                "agrees    mean KL {:.2e} nats, top-1 {} with the trained model ({}: {})",
                self.mean_kl,
                share(self.top1),
                self.stored_as,
                self.limits
            ),
        ];
        lines.extend(self.engines.iter().map(ToString::to_string));
        lines
    }
}

fn open(path: &Path, trained: &Trained<'_>) -> Result<Artefact> {
    if path.join("adapter_config.json").is_file() {
        return Ok(Artefact::Adapter(Box::new(peft::read(path)?)));
    }
    if path.is_file() && gguf::is_adapter(&GgufFile::open(path)?) {
        return Ok(Artefact::Adapter(Box::new(gguf::read_adapter(path, &trained.base.config)?)));
    }
    Ok(Artefact::Model(Box::new(tune_formats::open(path)?)))
}

fn over_base(adapter: &Adapter, trained: &Trained<'_>) -> Result<Llama> {
    adapter.check_base(trained.base)?;
    let mut model = trained.model.without_adapters();
    model.attach_frozen(adapter)?;
    Ok(model)
}

/// The template, the ids of texts, and the ids with a role of their own must be those of training.
fn dialogue_problems(found: &BaseModel, trained: &Trained<'_>) -> Vec<String> {
    let mut problems = Vec::new();
    let wanted = trained.base.chat_template.as_deref().map(tune_export::stored_template);
    if found.chat_template != wanted {
        problems.push(match (&found.chat_template, &wanted) {
            (Some(_), Some(_)) => "the chat template is not the one of training".to_owned(),
            (None, _) => "the chat template of training is missing".to_owned(),
            (Some(_), None) => "there is a chat template, and training used none".to_owned(),
        });
    }
    if found.special != trained.base.special {
        problems.push("the ids that begin, end or fill a sequence are not those of training".to_owned());
    }
    match tune_data::Tokenizer::from_base(found) {
        Err(error) => problems.push(format!("its tokenizer cannot be read: {error}")),
        Ok(tokenizer) => {
            let differs = trained.held_out.batches.iter().flat_map(|batch| {
                batch
                    .documents
                    .iter()
                    .map(|document| trained.tokenizer.decode(&batch.input_ids[document.clone()]))
            });
            let differs = differs.take(64).find(|text| {
                let ids = [&tokenizer, trained.tokenizer].map(|tokenizer| tokenizer.encode(text, true).ok());
                ids[0] != ids[1]
            });
            if let Some(text) = differs {
                let start: String = text.chars().take(40).collect();
                problems.push(format!("its tokenizer gives other ids for {start:?}"));
            }
        }
    }
    problems
}

fn worst(checks: &[WeightCheck]) -> Option<String> {
    let share = |check: &WeightCheck| check.error / check.limit;
    let worst = checks.iter().max_by(|a, b| share(a).total_cmp(&share(b)))?;
    let WeightCheck { tensor, stored_as, error, scale, limit } = worst;
    Some(format!("{tensor} ({stored_as}): error {error:.2e} of {limit:.2e}, scale {scale:.5}"))
}

fn is_gguf(path: &Path) -> bool {
    path.is_file() && GgufFile::open(path).is_ok()
}

fn gguf_of(base: &BaseModel) -> Option<&Path> {
    match &base.source {
        Source::Gguf(_) => Some(&base.path),
        Source::HfDirectory(_) => None,
    }
}
