//! `ollama:NAME`: a trained run as a model of a running Ollama server.
//!
//! ```text
//! base of the server, adapter sent        a base from Ollama; no copy of the weights
//! base and adapter sent                   another GGUF base
//! merged weights sent (gguf:q8_0)         all else, and servers from 0.34.1 on, which refuse adapters
//! ```
//!
//! Then the server is asked what prompt it makes of a conversation, which has to be the one of training, for one answer,
//! since it says success of models that do not run, and how likely next tokens are, as likely as the trained model thinks.

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use indicatif::HumanBytes;
use miette::Result;
use tune_data::{ChatTemplate, Clock, Message};
use tune_export::{ExportReport, ExportTarget, FileType, bos_text, is_same_prompt, ollama_prompt};
use tune_formats::Source;
use tune_formats::modelfile::{Modelfile, Parameter};
use tune_hub::{Blob, HubError, NewModel, OllamaName, OllamaServer, Resolved, ShownModel, Upload};
use tune_recipe::Verify;

use super::Job;
use crate::exit::{NotAsTrained, UsageError};
use crate::limits::Limits;
use crate::{download, engines};

/// What is sent where an adapter will not do.
const MERGED: ExportTarget = ExportTarget::Gguf(FileType::Q8_0);

/// Tokens of the answer that is shown.
const ANSWER_TOKENS: usize = 128;

/// `ollama:NAME`, or `ollama:NAME?TARGET` with what is sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OllamaTarget {
    /// The model to create.
    pub name: OllamaName,
    /// `gguf-lora` or `gguf:TYPE`; chosen by base and server where it is not given.
    pub upload: Option<ExportTarget>,
}

impl OllamaTarget {
    /// Reads what stands after `ollama:`.
    pub fn parse(text: &str) -> Result<Self> {
        let (name, upload) = text.split_once('?').map_or((text, None), |(name, upload)| (name, Some(upload)));
        let name = name.parse().map_err(|reason: String| {
            UsageError::report(
                format!("\"ollama:{text}\" names no model: {reason}"),
                "write ollama:NAME, such as ollama:my-code",
            )
        })?;
        let upload = upload.map(super::parse_file_target).transpose()?;
        if let Some(target @ (ExportTarget::Peft | ExportTarget::Safetensors)) = upload {
            return Err(UsageError::report(
                format!("Ollama does not take \"{target}\" without loss"),
                "write ollama:NAME?gguf-lora or ollama:NAME?gguf:TYPE",
            ));
        }
        Ok(Self { name, upload })
    }
}

/// The server that `OLLAMA_HOST` names.
pub fn connect() -> Result<OllamaServer, HubError> {
    let options = tune_hub::Options::from_env(|name| std::env::var_os(name));
    OllamaServer::connect(&options.ollama_host)
}

/// One model to create.
pub struct Creation<'a> {
    pub job: &'a Job<'a>,
    pub target: &'a OllamaTarget,
    /// Where the base came from.
    pub resolved: &'a Resolved,
    /// Folder for the files that are sent.
    pub folder: &'a Path,
    /// All weights were trained, so there is no adapter.
    pub trains_all: bool,
    /// What the new model is asked.
    pub question: Vec<Message>,
    /// Whether the base of the server may have other weights than those trained on.
    pub any_base: bool,
}

impl Creation<'_> {
    /// Writes the files, sends them, creates the model, checks its prompts and shows an answer.
    pub fn run(&self) -> Result<()> {
        let server = connect();
        let upload = self.upload(server.as_ref().ok())?;
        let report = self.write(upload)?;
        let server = match server {
            Ok(server) => server,
            Err(error) => {
                eprintln!(
                    "files     {} is written, and {} is not in Ollama yet",
                    report.path.display(),
                    self.target.name
                );
                if let Some(modelfile) = &report.modelfile {
                    eprintln!("later     ollama create {} -f {}", self.target.name, modelfile.display());
                }
                return Err(error.into());
            }
        };
        let (upload, report) = match self.create(&server, upload, &report) {
            Err(error) if self.may_merge_instead(&error, upload) => {
                eprintln!("note      this server takes no adapters: merged weights ({MERGED}) are sent");
                let report = self.write(MERGED)?;
                self.create(&server, MERGED, &report)?;
                (MERGED, report)
            }
            created => created.map(|()| (upload, report))?,
        };
        self.check(&server, upload, &report)
    }

    /// What is sent to this server.
    fn upload(&self, server: Option<&OllamaServer>) -> Result<ExportTarget> {
        let refuses = server.filter(|server| !server.version().takes_adapters());
        if let Some(given) = self.target.upload {
            return match refuses {
                Some(server) if given == ExportTarget::GgufLora => Err(UsageError::report(
                    format!("Ollama {} takes no adapters", server.version()),
                    format!("send merged weights: ollama:{}?{MERGED}", self.target.name),
                )),
                _ => Ok(given),
            };
        }
        if self.trains_all || matches!(self.job.base.source, Source::HfDirectory(_)) {
            return Ok(MERGED);
        }
        if let Some(server) = refuses {
            eprintln!(
                "note      Ollama {} takes no adapters: merged weights ({MERGED}) are sent",
                server.version()
            );
            return Ok(MERGED);
        }
        Ok(ExportTarget::GgufLora)
    }

    /// A server that says only when it is asked that it takes no adapters.
    fn may_merge_instead(&self, error: &miette::Report, upload: ExportTarget) -> bool {
        let refused = matches!(
            error.downcast_ref(),
            Some(HubError::OllamaRefused { reason, .. }) if reason.contains("adapters are no longer supported")
        );
        refused && upload == ExportTarget::GgufLora && self.target.upload.is_none()
    }

    fn write(&self, upload: ExportTarget) -> Result<ExportReport> {
        let report = self.job.write(upload, &self.folder.join(upload.file_name(self.job.name)), true)?;
        eprintln!("wrote     {} ({})", report.path.display(), HumanBytes(report.bytes));
        Ok(report)
    }

    /// Sends what the server does not have and makes the model of it.
    fn create(&self, server: &OllamaServer, upload: ExportTarget, report: &ExportReport) -> Result<()> {
        let mut model = NewModel { name: self.target.name.to_string(), ..NewModel::default() };
        if let Some(modelfile) = &report.ollama {
            describe(modelfile, &mut model);
        }
        let exported = send(server, &report.path, None)?;
        if upload == ExportTarget::GgufLora {
            model.adapter = Some(("adapter.gguf".to_owned(), exported));
            model.from = self.base_of(server)?;
            if model.from.is_none() {
                model.files = self.send_base(server)?;
            }
        } else {
            model.files = vec![("model.gguf".to_owned(), exported)];
        }
        let spinner = download::spinner(&format!("creating {}", model.name));
        let created = server.create(&model, &mut |status| spinner.set_message(format!("ollama: {status}")));
        spinner.finish_and_clear();
        created?;
        eprintln!("created   {} at {}", model.name, server.host());
        Ok(())
    }

    /// The server's own copy of the base; `None` where it does not have it.
    fn base_of(&self, server: &OllamaServer) -> Result<Option<String>> {
        let Some(name) = self.job.reference.strip_prefix("ollama:") else { return Ok(None) };
        let Some(shown) = server.show(name)? else {
            eprintln!("note      {} has no {name}: the base is sent as well", server.host());
            return Ok(None);
        };
        match shown.sha256() {
            None => eprintln!(
                "note      the server does not tell the checksum of {name}; taken for the trained base"
            ),
            Some(found) => {
                let trained = self.base_sha256()?;
                if found != trained && !self.any_base {
                    return Err(UsageError::report(
                        format!(
                            "{name} at {} is not the base that was trained on: expected sha256 {trained}, got {found}",
                            server.host()
                        ),
                        format!(
                            "it was pulled anew: train over it, or send the old base along with ollama:{}?{MERGED}, or pass \
                             --any-base",
                            self.target.name
                        ),
                    ));
                }
            }
        }
        Ok(Some(name.to_owned()))
    }

    fn base_sha256(&self) -> Result<Cow<'_, str>> {
        match &self.resolved.sha256 {
            Some(sha256) => Ok(sha256.into()),
            None => Ok(Blob::of_file(&self.resolved.path)?.sha256.into()),
        }
    }

    fn send_base(&self, server: &OllamaServer) -> Result<Vec<(String, Blob)>> {
        let parts: Vec<PathBuf> = match &self.job.base.source {
            Source::Gguf(file) => file.parts().map(Path::to_owned).collect(),
            Source::HfDirectory(_) => Vec::new(),
        };
        let known = self.resolved.sha256.as_deref().filter(|_| parts.len() == 1);
        let name = |part: &Path| match parts.len() {
            // in a store it has the name of its checksum
            1 => "base.gguf".to_owned(),
            // the server puts parts together by their names
            _ => part.file_name().unwrap_or_default().to_string_lossy().into_owned(),
        };
        parts.iter().map(|part| Ok((name(part), send(server, part, known)?))).collect()
    }

    /// Compares prompts and probabilities of the server with those of training, and shows an answer.
    fn check(&self, server: &OllamaServer, upload: ExportTarget, report: &ExportReport) -> Result<()> {
        let name = self.target.name.to_string();
        let shown = server.show(&name)?.unwrap_or_default();
        let spinner = download::spinner(&format!("asking {name}"));
        let problems = self.prompt_problems(server, &name, &shown);
        let answer = server.chat(&name, &as_hub(&self.question), ANSWER_TOKENS);
        spinner.finish_and_clear();
        let (mut problems, answer) = (problems?, answer?);
        let asked = self.question.last().map(Message::content).unwrap_or_default();
        eprintln!("asked     {asked}");
        eprintln!("answered  {}", answer.text.trim());
        if answer.text.trim().is_empty() {
            problems.push("its answer to the question above is empty".to_owned());
        }
        if let Some(sent) = report.ollama.as_ref().and_then(|modelfile| modelfile.adapter.as_ref())
            && !shown.modelfile.is_empty()
            && !shown.has_adapter()
        {
            problems.push(format!("the server has left out the adapter {sent}"));
        }
        problems.extend(self.answer_problem(server, &name, &shown, upload)?);
        match (problems.is_empty(), self.verify()) {
            (true, _) | (_, Verify::Off) => {}
            (false, Verify::Warn) => problems.iter().for_each(|problem| eprintln!("warning   {problem}")),
            (false, Verify::Strict) => return Err(NotAsTrained { name, problems }.into()),
        }
        eprintln!("try       ollama run {}", self.target.name);
        Ok(())
    }

    fn prompt_problems(&self, server: &OllamaServer, name: &str, shown: &ShownModel) -> Result<Vec<String>> {
        let base = self.job.base;
        if base.chat_template.is_none() || self.verify() == Verify::Off {
            return Ok(Vec::new());
        }
        let trained = ChatTemplate::from_base(base, self.job.tokenizer, Clock::Fixed)?;
        let today = ChatTemplate::from_base(base, self.job.tokenizer, Clock::Now)?;
        let bos = bos_text(base)?;
        let mut problems = Vec::new();
        let mut untold = false;
        for messages in self.conversations() {
            // what the model's own template refuses, nothing can be held to
            let Ok(wanted) = trained.render(&messages, None, true) else { continue };
            let found = match server.render(name, &as_hub(&messages))? {
                Some(found) => found,
                None => {
                    let pairs: Vec<(&str, &str)> =
                        messages.iter().map(|message| (message.role(), message.content())).collect();
                    let system = Some(shown.system.as_str()).filter(|text| !text.is_empty());
                    match ollama_prompt(&shown.template, system, &pairs) {
                        Some(found) => found,
                        None => {
                            untold = true;
                            continue;
                        }
                    }
                }
            };
            if is_same_prompt(&found, &wanted, bos.as_deref()) {
                continue;
            }
            if today
                .render(&messages, None, true)
                .is_ok_and(|now| is_same_prompt(&found, &now, bos.as_deref()))
            {
                eprintln!(
                    "note      the server puts today's date into the prompt, where training had a fixed one"
                );
                continue;
            }
            problems
                .push(format!("it was trained on the prompt {wanted:?}, and the server makes it {found:?}"));
        }
        if untold {
            eprintln!(
                "note      this server does not tell its prompts, and its template is not known here: unchecked"
            );
        } else if problems.is_empty() {
            eprintln!("prompts   the server makes the prompts of training");
        }
        problems.truncate(1);
        Ok(problems)
    }

    /// Whether next tokens are as likely to the server as to the trained model.
    fn answer_problem(
        &self,
        server: &OllamaServer,
        name: &str,
        shown: &ShownModel,
        upload: ExportTarget,
    ) -> Result<Option<String>> {
        if self.verify() == Verify::Off {
            return Ok(None);
        }
        let Some(trained) = self.job.trained(upload)? else { return Ok(None) };
        let spinner = download::spinner(&format!("comparing {name} with the trained model"));
        let agreement = engines::ollama(server, name, trained);
        spinner.finish_and_clear();
        match agreement {
            Ok(Some(agreement)) => {
                eprintln!("{agreement}");
                Ok(agreement.problem(Limits::of_mix(&shown.details.quantization_level)))
            }
            Ok(None) => Ok(None),
            Err(error) if tells_no_probabilities(&error) => {
                eprintln!("note      this server tells no probabilities: its answers are not compared");
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    fn verify(&self) -> Verify {
        self.job.settings.verify
    }

    /// The question, and the turns that templates differ in.
    fn conversations(&self) -> Vec<Vec<Message>> {
        let (user, answer) =
            (Message::new("user", "Is it far?"), Message::new("assistant", "No, two miles."));
        let thanks = Message::new("user", "Thank you.");
        vec![
            self.question.clone(),
            vec![user.clone()],
            vec![user.clone(), answer, thanks],
            vec![Message::new("system", "Answer briefly."), user],
        ]
    }
}

fn tells_no_probabilities(error: &miette::Report) -> bool {
    matches!(
        error.downcast_ref(),
        Some(HubError::OllamaTooOld { .. } | HubError::OllamaTellsNoLogprobs { .. })
    )
}

/// Sends one file unless the server has it, with a bar.
fn send(server: &OllamaServer, path: &Path, sha256: Option<&str>) -> Result<Blob> {
    let shown = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let blob = match sha256 {
        Some(sha256) => {
            let bytes = std::fs::metadata(path)
                .map_err(|source| HubError::Io { path: path.to_owned(), source })?
                .len();
            Blob { sha256: sha256.to_owned(), bytes }
        }
        None => {
            let spinner = download::spinner(&format!("checksum of {shown}"));
            let blob = Blob::of_file(path);
            spinner.finish_and_clear();
            blob?
        }
    };
    let bar = download::bytes_bar(blob.bytes, &format!("{shown} to {}", server.host()));
    let sent = server.upload(path, &blob, &mut |bytes| bar.set_position(bytes));
    bar.finish_and_clear();
    match sent? {
        Upload::Sent => eprintln!("sent      {shown} ({})", HumanBytes(blob.bytes)),
        Upload::Existing => eprintln!("there     {shown}, not sent again"),
    }
    Ok(blob)
}

/// Template, system prompt, parameters and licence, whether a Modelfile can say them or not.
fn describe(modelfile: &Modelfile, model: &mut NewModel) {
    model.template.clone_from(&modelfile.template);
    model.system.clone_from(&modelfile.system);
    model.license.clone_from(&modelfile.license);
    for (name, value) in &modelfile.parameters {
        let value = match value {
            Parameter::Int(value) => (*value).into(),
            Parameter::Float(value) => (*value).into(),
            Parameter::Bool(value) => (*value).into(),
            Parameter::Text(text) => {
                let texts =
                    model.parameters.entry(name.clone()).or_insert_with(|| Vec::<String>::new().into());
                if let Some(texts) = texts.as_array_mut() {
                    texts.push(text.as_str().into());
                }
                continue;
            }
        };
        model.parameters.insert(name.clone(), value);
    }
}

fn as_hub(messages: &[Message]) -> Vec<tune_hub::Message> {
    let message = |message: &Message| tune_hub::Message {
        role: message.role().to_owned(),
        content: message.content().to_owned(),
    };
    messages.iter().map(message).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_names_a_model_and_perhaps_what_is_sent() {
        let target = OllamaTarget::parse("my-code").expect("a name");
        assert_eq!((target.name.to_string().as_str(), target.upload), ("my-code:latest", None));
        let target = OllamaTarget::parse("me/my-code:v2?gguf:q6_k").expect("a name and a type");
        assert_eq!(target.name.to_string(), "me/my-code:v2");
        assert_eq!(target.upload.map(|upload| upload.to_string()).as_deref(), Some("gguf:q6_k"));
        for wrong in ["", "two words", "a?b", "a?peft", "a?safetensors"] {
            assert!(OllamaTarget::parse(wrong).is_err(), "{wrong:?}");
        }
    }
}
