//! A running Ollama server, over its HTTP API.
//!
//! ```text
//! HEAD, POST /api/blobs/sha256:HEX   is a file there; send it
//! POST /api/create                   make a model of files that are there
//! POST /api/show, GET /api/tags      what is there
//! POST /api/chat, /api/generate      answers, rendered prompts, probabilities of tokens
//! ```
//!
//! A server never keeps half a file: an upload that breaks off is sent again as a whole, and one that was finished is
//! not sent twice.

use std::fs::File;
use std::io::{BufRead as _, BufReader, Read};
use std::path::Path;
use std::time::Duration;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use ureq::http::{Response, StatusCode};
use ureq::{Agent, Body, SendBody};

use crate::error::HubError;
use crate::ollama::Message;
use crate::ollama_host::OllamaHost;
use crate::ollama_model::{Blob, NewModel, ShownModel};
use crate::ollama_version::OllamaVersion;

/// A server that has answered.
#[derive(Debug)]
pub struct OllamaServer {
    host: OllamaHost,
    agent: Agent,
    version: OllamaVersion,
}

/// What became of an upload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Upload {
    /// The server has it from now on.
    Sent,
    /// The server had it.
    Existing,
}

/// An answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    /// The text.
    pub text: String,
    /// `stop`, or `length` where the limit of tokens ended it.
    pub done_reason: String,
}

/// A token that may come next.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct NextToken {
    /// Its text; of a token that is not whole text, a replacement character.
    pub token: String,
    /// Its bytes; older servers leave them out.
    #[serde(default)]
    pub bytes: Vec<u8>,
    /// Natural logarithm of its probability.
    pub logprob: f64,
}

/// The most tokens that a server lists.
pub const MOST_LOGPROBS: usize = 20;

/// Time to find the server and to connect to it.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);

/// Time for an answer that needs no model.
const QUICK_LIMIT: Duration = Duration::from_secs(15);

impl OllamaServer {
    /// Asks the server for its version.
    ///
    /// # Errors
    /// [`HubError::NoOllamaServer`] where nothing, or something else, answers; [`HubError::OllamaTooOld`].
    pub fn connect(host: &OllamaHost) -> Result<Self, HubError> {
        #[derive(Deserialize)]
        struct Answer {
            version: String,
        }
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .timeout_resolve(Some(CONNECT_LIMIT))
            .timeout_connect(Some(CONNECT_LIMIT));
        // a proxy for the internet does not know this machine's own ports
        let config = if host.is_local() { config.proxy(None) } else { config };
        let agent = Agent::from(config.build());
        let no_server = |reason: String| HubError::NoOllamaServer { url: host.to_string(), reason };
        let call = agent.get(host.url("api/version")).config().timeout_global(Some(QUICK_LIMIT)).build();
        let mut response = call.call().map_err(|error| no_server(reason_of(&error)))?;
        if response.status() != StatusCode::OK {
            return Err(no_server(format!("something else answers there ({})", response.status())));
        }
        let answer: Answer = response
            .body_mut()
            .read_json()
            .map_err(|_| no_server("something else answers there (no version of Ollama)".to_owned()))?;
        let version = OllamaVersion::parse(&answer.version);
        version.require("exporting to it", OllamaVersion::CREATES_FROM_BLOBS)?;
        Ok(Self { host: host.clone(), agent, version })
    }

    /// Its version.
    pub fn version(&self) -> &OllamaVersion {
        &self.version
    }

    /// Its address.
    pub fn host(&self) -> &OllamaHost {
        &self.host
    }

    /// Names of the models that it has.
    ///
    /// # Errors
    /// A server that has gone.
    pub fn models(&self) -> Result<Vec<String>, HubError> {
        #[derive(Deserialize)]
        struct Answer {
            models: Vec<Listed>,
        }
        #[derive(Deserialize)]
        struct Listed {
            name: String,
        }
        let what = "the list of models";
        let response = self.get("api/tags", what)?;
        let answer: Answer = self.read(self.checked(response, what)?, what)?;
        Ok(answer.models.into_iter().map(|model| model.name).collect())
    }

    /// What it says of a model; `None` where it does not have it.
    ///
    /// # Errors
    /// A server that has gone or refuses.
    pub fn show(&self, model: &str) -> Result<Option<ShownModel>, HubError> {
        let what = format!("to show {model}");
        let response = self.post("api/show", &json!({ "model": model }), Some(QUICK_LIMIT), &what)?;
        if response.status() == StatusCode::NOT_FOUND {
            return Ok(None);
        }
        self.read(self.checked(response, &what)?, &what).map(Some)
    }

    /// Whether it has a file.
    ///
    /// # Errors
    /// A server that has gone.
    pub fn has_blob(&self, blob: &Blob) -> Result<bool, HubError> {
        let what = format!("to look for sha256:{}", blob.sha256);
        let call = self.agent.head(self.blob_url(blob)).config().timeout_global(Some(QUICK_LIMIT)).build();
        let response = call.call().map_err(|error| self.broken(&what, &error))?;
        match response.status() {
            StatusCode::OK => Ok(true),
            StatusCode::NOT_FOUND => Ok(false),
            _ => Err(self.refusal(response, &what)),
        }
    }

    /// Sends a file unless the server has it. `sent` is told how many of its bytes are on their way.
    ///
    /// # Errors
    /// A file that cannot be read or that has changed since its checksum was taken, a full disk of the server, a
    /// server that goes away.
    pub fn upload(&self, path: &Path, blob: &Blob, sent: &mut dyn FnMut(u64)) -> Result<Upload, HubError> {
        if self.has_blob(blob)? {
            return Ok(Upload::Existing);
        }
        let file = File::open(path).map_err(HubError::io(path))?;
        let what = format!("the upload of {}", path.display());
        let mut counted = Counted { inner: file, count: 0, sent };
        let call = self.agent.post(self.blob_url(blob)).header("Content-Length", blob.bytes.to_string());
        let response = call.send(SendBody::from_reader(&mut counted));
        let count = counted.count;
        let response = response.map_err(|error| match error {
            // a local file that shrinks, and a server that hangs up, look alike
            ureq::Error::Io(_) | ureq::Error::ConnectionFailed if count < blob.bytes => {
                HubError::OllamaUpload {
                    file: path.to_owned(),
                    sent: count,
                    bytes: blob.bytes,
                    reason: reason_of(&error),
                }
            }
            error => self.broken(&what, &error),
        })?;
        match response.status() {
            StatusCode::OK => Ok(Upload::Existing),
            StatusCode::CREATED => Ok(Upload::Sent),
            _ => Err(self.refusal(response, &what)),
        }
    }

    /// Creates or replaces a model. `status` is told what the server does.
    ///
    /// A server that says success may still have made a model that does not run: ask it something.
    ///
    /// # Errors
    /// [`HubError::OllamaRefused`] with the server's reason; a server that goes away.
    pub fn create(&self, model: &NewModel, status: &mut dyn FnMut(&str)) -> Result<(), HubError> {
        let what = format!("to create {}", model.name);
        let response = self.post("api/create", &model.request(), None, &what)?;
        let response = self.checked(response, &what)?;
        // a large model takes a long body of progress, and hours at most
        let body = response.into_body().into_with_config().limit(u64::MAX).reader();
        let mut succeeded = false;
        for line in BufReader::new(body).lines() {
            let line = line.map_err(|error| self.broken(&what, &ureq::Error::Io(error)))?;
            if line.trim().is_empty() {
                continue;
            }
            let line: Value = serde_json::from_str(&line).map_err(|_| self.nonsense(&what, &line))?;
            if let Some(error) = line["error"].as_str() {
                return Err(self.refused(&what, error));
            }
            if let Some(text) = line["status"].as_str() {
                succeeded = text == "success";
                status(text);
            }
        }
        if succeeded { Ok(()) } else { Err(self.refused(&what, "it stopped without saying why")) }
    }

    /// The prompt that the server makes of a conversation; `None` where it is too old to tell.
    ///
    /// # Errors
    /// A model that is not there or cannot be loaded; a server that goes away.
    pub fn render(&self, model: &str, messages: &[Message]) -> Result<Option<String>, HubError> {
        #[derive(Deserialize)]
        struct Answer {
            #[serde(rename = "_debug_info")]
            debug_info: Option<DebugInfo>,
        }
        #[derive(Deserialize)]
        struct DebugInfo {
            rendered_template: String,
        }
        let what = format!("to render a prompt of {model}");
        let request = json!({
            "model": model, "messages": written(messages), "stream": false, "_debug_render_only": true,
            // one that does not know the key answers, and need not answer at length
            "options": { "num_predict": 1 },
        });
        let response = self.checked(self.post("api/chat", &request, None, &what)?, &what)?;
        let answer: Answer = self.read(response, &what)?;
        Ok(answer.debug_info.map(|info| info.rendered_template))
    }

    /// The likeliest answer to a conversation, of `num_predict` tokens at most.
    ///
    /// # Errors
    /// A model that is not there or cannot be loaded; a server that goes away.
    pub fn chat(&self, model: &str, messages: &[Message], num_predict: usize) -> Result<Answer, HubError> {
        #[derive(Deserialize)]
        struct Chat {
            message: Message,
            #[serde(default)]
            done_reason: String,
        }
        let what = format!("to answer with {model}");
        let request = json!({
            "model": model, "messages": written(messages), "stream": false,
            "options": { "num_predict": num_predict, "temperature": 0, "seed": 0 },
        });
        let response = self.checked(self.post("api/chat", &request, None, &what)?, &what)?;
        let Chat { message, done_reason } = self.read(response, &what)?;
        Ok(Answer { text: message.content, done_reason })
    }

    /// The `top` likeliest tokens after a text, likeliest first. The text goes past every template; the server puts
    /// the model's BOS token before it where the model wants one.
    ///
    /// # Errors
    /// [`HubError::OllamaTooOld`] before 0.12.11; [`HubError::OllamaTellsNoLogprobs`] of a server that leaves them out; a
    /// model that is not there or cannot be loaded; a server that goes away.
    pub fn next_tokens(&self, model: &str, prompt: &str, top: usize) -> Result<Vec<NextToken>, HubError> {
        #[derive(Deserialize)]
        struct Answer {
            #[serde(default)]
            logprobs: Vec<Position>,
        }
        #[derive(Deserialize)]
        struct Position {
            #[serde(default)]
            top_logprobs: Vec<NextToken>,
        }
        self.version.require("probabilities of tokens", OllamaVersion::TELLS_LOGPROBS)?;
        let what = format!("probabilities of {model}");
        let request = json!({
            "model": model, "prompt": prompt, "raw": true, "stream": false,
            "logprobs": true, "top_logprobs": top.clamp(1, MOST_LOGPROBS),
            "options": { "num_predict": 1, "temperature": 0, "seed": 0 },
        });
        let response = self.checked(self.post("api/generate", &request, None, &what)?, &what)?;
        let answer: Answer = self.read(response, &what)?;
        let first = answer.logprobs.into_iter().next().map(|position| position.top_logprobs);
        let mut tokens = first
            .filter(|tokens| !tokens.is_empty())
            .ok_or_else(|| HubError::OllamaTellsNoLogprobs { model: model.to_owned() })?;
        tokens.sort_by(|a, b| b.logprob.total_cmp(&a.logprob));
        Ok(tokens)
    }

    fn blob_url(&self, blob: &Blob) -> String {
        self.host.url(&format!("api/blobs/sha256:{}", blob.sha256))
    }

    fn get(&self, call: &str, what: &str) -> Result<Response<Body>, HubError> {
        let call = self.agent.get(self.host.url(call)).config().timeout_global(Some(QUICK_LIMIT)).build();
        call.call().map_err(|error| self.broken(what, &error))
    }

    fn post(
        &self,
        call: &str,
        request: &Value,
        limit: Option<Duration>,
        what: &str,
    ) -> Result<Response<Body>, HubError> {
        let call = self.agent.post(self.host.url(call)).config().timeout_global(limit).build();
        call.send_json(request).map_err(|error| self.broken(what, &error))
    }

    fn checked(&self, response: Response<Body>, what: &str) -> Result<Response<Body>, HubError> {
        if response.status().is_success() { Ok(response) } else { Err(self.refusal(response, what)) }
    }

    fn read<T: DeserializeOwned>(&self, mut response: Response<Body>, what: &str) -> Result<T, HubError> {
        let text = response.body_mut().read_to_string().map_err(|error| self.broken(what, &error))?;
        serde_json::from_str(&text).map_err(|_| self.nonsense(what, &text))
    }

    /// The server's own words, of an answer that is not a success.
    fn refusal(&self, mut response: Response<Body>, what: &str) -> HubError {
        let text = response.body_mut().read_to_string().unwrap_or_default();
        let error = serde_json::from_str::<Value>(&text).ok();
        match error.as_ref().and_then(|error| error["error"].as_str()) {
            Some(error) => self.refused(what, error),
            None => self.refused(what, &format!("it answers {}", response.status())),
        }
    }

    fn refused(&self, what: &str, reason: &str) -> HubError {
        HubError::OllamaRefused {
            url: self.host.to_string(),
            what: what.to_owned(),
            reason: reason.to_owned(),
            help: help_for(reason, &self.host).to_owned(),
        }
    }

    fn nonsense(&self, what: &str, text: &str) -> HubError {
        let shown: String = text.chars().take(80).collect();
        self.refused(what, &format!("its answer is not understood: {shown}"))
    }

    /// A server that answered before and does not now.
    fn broken(&self, what: &str, error: &ureq::Error) -> HubError {
        HubError::OllamaGone { url: self.host.to_string(), what: what.to_owned(), reason: reason_of(error) }
    }
}

fn written(messages: &[Message]) -> Vec<Value> {
    messages.iter().map(|message| json!({ "role": message.role, "content": message.content })).collect()
}

fn reason_of(error: &ureq::Error) -> String {
    match error {
        ureq::Error::HostNotFound => "its name cannot be resolved".to_owned(),
        ureq::Error::Timeout(_) => "it does not answer in time".to_owned(),
        ureq::Error::Io(error) => error.to_string(),
        other => other.to_string(),
    }
}

/// What to do about the refusals that are known.
fn help_for(reason: &str, host: &OllamaHost) -> &'static str {
    let reason = reason.to_lowercase();
    let has = |part: &str| reason.contains(part);
    if has("no space left") || has("disk quota") {
        "the disk of the Ollama server is full: remove models with `ollama rm`, or move the store with OLLAMA_MODELS"
    } else if has("adapters are no longer supported") {
        "servers from 0.34.1 on take merged models only: export to ollama:NAME?gguf:q8_0"
    } else if has("digest mismatch") {
        "the file changed while it was sent: run the same command again, and nothing beside it on the same folder"
    } else if has("blob") && (has("not found") || has("no such file")) || has("no such file") {
        "the server has lost a file that was sent (a cleaned store?): run the same command again to send it"
    } else if has("invalid model name") {
        "write [NAMESPACE/]MODEL[:TAG] with letters, digits, `-`, `_` and `.`"
    } else if has("unsupported architecture") || has("unknown model architecture") {
        "update Ollama"
    } else if has("requires more system memory") || has("out of memory") {
        "the machine of the server has too little memory free: stop other models with `ollama stop`"
    } else if host.is_local() {
        "the server's log says more: `journalctl -u ollama`, or ~/.ollama/logs/server.log"
    } else {
        "the log on the server's machine says more: `journalctl -u ollama`"
    }
}

/// Tells how much has been read.
struct Counted<'a, R> {
    inner: R,
    count: u64,
    sent: &'a mut dyn FnMut(u64),
}

impl<R: Read> Read for Counted<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let n = self.inner.read(buffer)?;
        self.count += n as u64;
        (self.sent)(self.count);
        Ok(n)
    }
}
