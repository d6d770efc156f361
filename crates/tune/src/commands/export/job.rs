//! One export: progress, and what the user should know about the result.

use std::cell::{OnceCell, RefCell};
use std::path::Path;

use indicatif::ProgressBar;
use miette::Result;
use tune_data::{ChatTemplate, Clock, Message, Tokenizer};
use tune_export::{
    ExportError, ExportEvent, ExportOptions, ExportReport, ExportRequest, ExportTarget, MergeRoute,
    OllamaBase, StoredUpdate, Verification, export,
};
use tune_formats::peft::Adapter;
use tune_formats::{BaseModel, Source};
use tune_hub::OllamaSettings;
use tune_recipe::{Export, Merge, Quantization, RunSpec, Verify};
use tune_train::RunFolder;

use crate::loss_plot;
use crate::model_card::{self, Card};
use crate::progress::{self, show_proof};
use crate::proof::{Proof, prove};
use crate::trained::Trained;

/// What is exported.
pub struct Job<'a> {
    pub name: &'a str,
    pub reference: &'a str,
    /// What the base sets in Ollama, where it is from there.
    pub ollama: Option<&'a OllamaSettings>,
    pub base: &'a BaseModel,
    pub adapter: &'a Adapter,
    pub tokenizer: &'a Tokenizer,
    pub licence: Option<&'a str>,
    pub run: Option<(&'a RunSpec, &'a RunFolder)>,
    pub max_shard_bytes: Option<u64>,
    /// The untrained base, where training changed its weights.
    pub untrained: Option<&'a BaseModel>,
    /// The base that training used, where the export is merged onto another one.
    pub trained_over: Option<&'a BaseModel>,
    /// `[export]` of the recipe, with what the command line says.
    pub settings: Export,
    /// The trained model, once it is needed.
    pub opened: OnceCell<Trained<'a>>,
}

impl<'a> Job<'a> {
    /// Exports with a progress bar, and tells what the user should know about the result.
    pub fn write(&self, target: ExportTarget, out: &Path, replace_folder: bool) -> Result<ExportReport> {
        if !self.adapter.layers.is_empty() && self.adapter.trained_on(self.base)? == Some(false) {
            eprintln!(
                "note      the adapter was trained over other weights of this model than {}",
                self.reference
            );
        }
        let over_nf4 = self.spec().is_some_and(|spec| spec.model.quantization == Quantization::Nf4);
        if over_nf4 && matches!(target, ExportTarget::Gguf(_) | ExportTarget::Safetensors) {
            eprintln!("note      trained over NF4, merged into the weights that NF4 was made from");
        }
        // The date that training used, so that a template which shows one is recognised.
        let template = match &self.base.chat_template {
            Some(_) => Some(ChatTemplate::from_base(self.base, self.tokenizer, Clock::Fixed)?),
            None => None,
        };
        let render = |messages: &[(&str, &str)], add_generation_prompt: bool| {
            let messages: Vec<Message> =
                messages.iter().map(|(role, content)| Message::new(role, content)).collect();
            template.as_ref()?.render(&messages, None, add_generation_prompt).ok()
        };
        let tokenizer_json = match (&self.base.source, target) {
            (Source::Gguf(_), ExportTarget::Safetensors) => tune_data::gguf_tokenizer_json(self.base)?,
            _ => None,
        };
        let trained = self.trained(target)?;
        let route = self.route(target);
        let activations = match (trained, route) {
            (Some(trained), MergeRoute::Gptq) => trained.activations(),
            _ => None,
        };
        if route == MergeRoute::Gptq && activations.is_none() {
            eprintln!(
                "note      the training rows are not there, so {target} is merged without error feedback"
            );
        }
        let moments = |module: &str| activations.as_ref()?.of(module);
        let proof = RefCell::new(None);
        let bar = progress::bar("tensors");
        bar.set_message(target.to_string());
        let judge = |place: &Path| self.judge(place, target, trained, &bar, &proof);
        let companions = if target.is_folder() { self.companions(target)? } else { Vec::new() };
        let settings = self.ollama.cloned().unwrap_or_default();
        let stop: Vec<String> = settings.stop().into_iter().map(str::to_owned).collect();
        let options = ExportOptions {
            name: Some(self.name),
            chat_template: None,
            ollama_base: self.reference.strip_prefix("ollama:").map(|name| OllamaBase {
                name,
                template: settings.template.as_deref(),
                system: settings.system.as_deref(),
                stop: &stop,
            }),
            tokenizer_json: tokenizer_json.as_deref(),
            max_shard_bytes: self.max_shard_bytes,
            companions: &companions,
            route,
            activations: Some(&moments),
            verification: match self.settings.verify {
                Verify::Strict => Verification::Strict,
                Verify::Warn => Verification::Warn,
                Verify::Off => Verification::Off,
            },
            judge: Some(&judge),
            replace_folder,
            render: Some(&render),
        };
        let request = ExportRequest { base: self.base, adapter: self.adapter, target, out, options };
        let report = export(&request, &mut |event| show(&bar, event));
        bar.finish_and_clear();
        let report = report?;
        for note in &report.notes {
            eprintln!("note      {note}");
        }
        if let Some(update) = report.stored_update {
            tell_update(route, update);
        }
        if let Some(proof) = proof.into_inner() {
            proof.lines().iter().for_each(|line| eprintln!("{line}"));
        }
        Ok(report)
    }

    pub fn spec(&self) -> Option<&RunSpec> {
        self.run.map(|(spec, _)| spec)
    }

    /// The model card, and the picture that it shows.
    fn companions(&self, target: ExportTarget) -> Result<Vec<(&'static str, String)>> {
        let digest = match &self.adapter.config.provenance.base_digest {
            Some(digest) => digest.clone(),
            None => self.base.digest()?,
        };
        let card = Card {
            name: self.name,
            target,
            reference: self.reference,
            licence: self.licence,
            base: self.base,
            digest: &digest,
            run: self.run,
        };
        let mut companions = vec![("README.md", card.render())];
        if let Some((_, folder)) = self.run {
            let curve = loss_plot::svg(&folder.read_metrics()?);
            companions.extend(curve.map(|svg| (model_card::LOSS_CURVE, svg)));
        }
        Ok(companions)
    }

    /// The trained model, where it is needed: opened once.
    pub fn trained(&self, target: ExportTarget) -> Result<Option<&Trained<'a>>> {
        // without a run there are no rows for error feedback either
        let has_feedback = self.route(target) == MergeRoute::Gptq && self.run.is_some();
        if self.settings.verify == Verify::Off && !has_feedback {
            return Ok(None);
        }
        if let Some(opened) = self.opened.get() {
            return Ok(Some(opened));
        }
        let base = self.trained_over.unwrap_or(self.base);
        let trained = Trained::open(base, self.adapter, self.tokenizer, self.spec(), self.untrained, None)?;
        Ok(Some(self.opened.get_or_init(|| trained)))
    }

    fn route(&self, target: ExportTarget) -> MergeRoute {
        match (self.settings.merge, target) {
            (Merge::Rtn, _) => MergeRoute::Rtn,
            (Merge::Gptq, ExportTarget::Gguf(file_type)) if file_type.is_quantized() => MergeRoute::Gptq,
            (Merge::Auto, ExportTarget::Gguf(file_type)) => MergeRoute::best_for(file_type),
            (Merge::Refit | Merge::Gptq | Merge::Auto, _) => MergeRoute::Refit,
        }
    }

    /// Reads the file again as a model and compares its answers, before it gets its name.
    fn judge(
        &self,
        place: &Path,
        target: ExportTarget,
        trained: Option<&Trained<'_>>,
        bar: &ProgressBar,
        found: &RefCell<Option<Proof>>,
    ) -> Result<Vec<String>, ExportError> {
        let Some(trained) = trained else { return Ok(Vec::new()) };
        let server = tune_hub::find_llama_server(|name| std::env::var_os(name));
        let merged_onto = self.trained_over.map(|_| self.base);
        let proof = prove(place, trained, merged_onto, server.as_deref(), &|step| show_proof(bar, step));
        let proof = match proof {
            Ok(proof) => proof,
            Err(error) => return Ok(vec![format!("it cannot be read as a model: {error}")]),
        };
        // Weights that are as meant and answer otherwise have lost it to rounding, which repeating does not mend.
        if proof.is_sound {
            proof.require_retention(&target.to_string(), self.settings.min_retention)?;
        }
        Ok(found.borrow_mut().insert(proof).problems.clone())
    }
}

fn tell_update(route: MergeRoute, update: StoredUpdate) {
    eprintln!(
        "merged    by {route}: {:.1} % of the update is in the weights, which it changes by {:.2} %; rounding adds {:.0} % \
         of it",
        100.0 * update.kept,
        100.0 * update.relative_update,
        100.0 * update.error,
    );
}

fn show(bar: &ProgressBar, event: ExportEvent) {
    match event {
        ExportEvent::Started { tensors, .. } => bar.set_length(2 * tensors as u64),
        ExportEvent::Wrote { done, .. } => {
            bar.set_message("writing");
            bar.set_position(done as u64);
        }
        ExportEvent::Verified { done, tensors } => {
            bar.set_message("verifying");
            bar.set_position((tensors + done) as u64);
        }
    }
}
