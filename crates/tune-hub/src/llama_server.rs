//! A real llama.cpp, where one is installed: its `llama-server`, started on the loopback interface for as long as it
//! is asked.
//!
//! `TUNE_LLAMA_SERVER` names the program, else `llama-server` is looked for on `PATH`. Tokens go in as ids, so no
//! tokenizer stands between the two engines; what comes back are the most likely next tokens with their
//! log-probabilities.

use std::ffi::OsString;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde_json::{Value, json};

use crate::HubError;

/// The variable that names the program; `off` says that there is none.
pub const LLAMA_SERVER: &str = "TUNE_LLAMA_SERVER";

/// Time to load the model.
const START_LIMIT: Duration = Duration::from_mins(5);
/// Time for one answer.
const ANSWER_LIMIT: Duration = Duration::from_mins(2);

/// The program, if there is one. `variable` reads the environment.
pub fn find_llama_server(variable: impl Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    match variable(LLAMA_SERVER).filter(|value| !value.is_empty()) {
        Some(named) if named == "off" => None,
        Some(named) => Some(PathBuf::from(named)),
        None => {
            let name = if cfg!(windows) { "llama-server.exe" } else { "llama-server" };
            let path = variable("PATH")?;
            std::env::split_paths(&path).map(|folder| folder.join(name)).find(|program| program.is_file())
        }
    }
}

/// A running server. It ends when this is dropped.
#[derive(Debug)]
pub struct LlamaServer {
    process: Child,
    agent: ureq::Agent,
    url: String,
}

impl LlamaServer {
    /// Starts `program` with a model, an adapter over it if there is one, and room for `context` tokens; returns when it
    /// is ready.
    ///
    /// # Errors
    /// A program that does not start, refuses the model, or does not answer.
    pub fn start(
        program: &Path,
        model: &Path,
        adapter: Option<&Path>,
        context: usize,
    ) -> Result<Self, HubError> {
        let port = free_port().map_err(|error| failed(program, &format!("no free port: {error}")))?;
        let mut command = Command::new(program);
        command.arg("--model").arg(model).args(["--host", "127.0.0.1", "--port", &port.to_string()]);
        command.args(["--ctx-size", &context.to_string(), "--parallel", "1"]);
        if let Some(adapter) = adapter {
            command.arg("--lora").arg(adapter);
        }
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let process = command.spawn().map_err(|error| failed(program, &error.to_string()))?;
        let config = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .proxy(None) // a proxy for the internet does not know this machine's own ports
            .timeout_global(Some(ANSWER_LIMIT));
        let agent = ureq::Agent::from(config.build());
        let mut server = Self { process, agent, url: format!("http://127.0.0.1:{port}") };
        server.wait_until_ready(program)?;
        Ok(server)
    }

    /// The `n` most likely tokens after `ids`, with the natural logarithms of their probabilities, falling.
    ///
    /// # Errors
    /// A server that has gone or answers something else.
    pub fn next_tokens(&self, ids: &[u32], n: usize) -> Result<Vec<(u32, f64)>, HubError> {
        let question = json!({
            "prompt": ids, "n_predict": 1, "n_probs": n, "temperature": 0.0, "cache_prompt": true,
            "post_sampling_probs": false,
        });
        let url = format!("{}/completion", self.url);
        let mut response = self
            .agent
            .post(&url)
            .header("content-type", "application/json")
            .send(question.to_string())
            .map_err(|error| self.broken(&error.to_string()))?;
        let text = response.body_mut().read_to_string().map_err(|error| self.broken(&error.to_string()))?;
        if response.status() != 200 {
            return Err(self.broken(&format!("{}: {text}", response.status())));
        }
        probabilities(&text).ok_or_else(|| self.broken("no completion_probabilities in its answer"))
    }

    fn wait_until_ready(&mut self, program: &Path) -> Result<(), HubError> {
        let started = Instant::now();
        loop {
            if let Ok(Some(status)) = self.process.try_wait() {
                return Err(failed(
                    program,
                    &format!("it ended at once ({status}); it may not load the model"),
                ));
            }
            let health = self.agent.get(format!("{}/health", self.url)).call();
            if health.is_ok_and(|response| response.status() == 200) {
                return Ok(());
            }
            if started.elapsed() > START_LIMIT {
                let waited = START_LIMIT.as_secs();
                return Err(failed(program, &format!("it is not ready after {waited} s")));
            }
            thread::sleep(Duration::from_millis(100));
        }
    }

    fn broken(&self, reason: &str) -> HubError {
        HubError::Unusable {
            what: format!("llama-server at {}", self.url),
            reason: reason.to_owned(),
            help: format!("name another program in {LLAMA_SERVER}, or set it to \"off\""),
        }
    }
}

impl Drop for LlamaServer {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn failed(program: &Path, reason: &str) -> HubError {
    HubError::Unusable {
        what: program.display().to_string(),
        reason: reason.to_owned(),
        help: format!("name another llama-server in {LLAMA_SERVER}, or set it to \"off\""),
    }
}

/// A port that was free a moment ago.
fn free_port() -> std::io::Result<u16> {
    Ok(TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port())
}

fn probabilities(answer: &str) -> Option<Vec<(u32, f64)>> {
    #[derive(Deserialize)]
    struct Listed {
        id: u32,
        logprob: f64,
    }
    let answer: Value = serde_json::from_str(answer).ok()?;
    let listed = answer.get("completion_probabilities")?.get(0)?.get("top_logprobs")?;
    let listed: Vec<Listed> = serde_json::from_value(listed.clone()).ok()?;
    Some(listed.into_iter().map(|token| (token.id, token.logprob)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_named_program_comes_first_and_off_is_none() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let on_path = folder.path().join(if cfg!(windows) { "llama-server.exe" } else { "llama-server" });
        std::fs::write(&on_path, "").expect("written");
        let found = |named: Option<&str>| {
            find_llama_server(|name| match name {
                LLAMA_SERVER => named.map(OsString::from),
                _ => Some(folder.path().into()),
            })
        };
        assert_eq!(found(None), Some(on_path));
        assert_eq!(found(Some("/opt/llama-server")), Some("/opt/llama-server".into()));
        assert_eq!(found(Some("off")), None);
        assert_eq!(find_llama_server(|_| None), None);
    }

    #[test]
    fn the_answer_of_a_server_is_read() {
        let answer = r#"{"content": " a", "completion_probabilities": [{"id": 5, "token": " a", "logprob": -0.1,
            "top_logprobs": [{"id": 5, "token": " a", "bytes": [32, 97], "logprob": -0.1},
                             {"id": 9, "token": "b", "bytes": [98], "logprob": -2.5}]}]}"#;
        assert_eq!(probabilities(answer), Some(vec![(5, -0.1), (9, -2.5)]));
        assert_eq!(probabilities("{}"), None);
    }

    #[test]
    fn a_program_that_does_not_serve_is_an_error_and_no_wait() {
        let program = Path::new("/no/such/llama-server");
        let error = LlamaServer::start(program, Path::new("m.gguf"), None, 64).expect_err("refused");
        assert!(error.to_string().starts_with("/no/such/llama-server: "), "{error}");
    }
}
