//! A double of an Ollama server, built from the documented rules of its API and from what servers were seen to do.
//! It keeps blobs and models in memory and runs no model: it checks what it is sent as the real one does, in
//! `server/create.go` and `server/routes.go` of Ollama, and no more. A test against it shows that `tune` speaks the
//! protocol; only a real server shows that a model answers.
#![allow(dead_code, unreachable_pub, missing_docs)]

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;

use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

/// A double of a server on a loopback port.
pub struct OllamaDouble {
    /// For `OLLAMA_HOST`.
    pub address: String,
    state: Arc<Mutex<State>>,
}

/// What the double has and how it behaves.
pub struct State {
    pub version: String,
    /// Digest → bytes.
    pub blobs: BTreeMap<String, Vec<u8>>,
    /// Name with tag → the request that made it, or what a test put there.
    pub models: BTreeMap<String, Value>,
    /// Method and path of every request.
    pub requests: Vec<String>,
    /// Close the next upload's connection after so many bytes.
    pub hang_up_after: Option<usize>,
    /// Answer the next upload after so many bytes that the disk is full, as Ollama does: 500, then it hangs up.
    pub disk_full_after: Option<usize>,
    /// Read so many bytes of the next upload, then read nothing more and keep the connection.
    pub stall_after: Option<usize>,
    /// Take the next upload for another file.
    pub corrupt_next: bool,
    /// An error line in the middle of the next creation.
    pub fail_create: Option<String>,
    /// End the next creation's stream without `success`.
    pub cut_create: bool,
    /// How a conversation is rendered for the model that the request made.
    pub render: fn(&Value, &[(String, String)]) -> String,
    /// Whether a model with an adapter is refused; by its version where this is not set.
    pub refuses_adapters: Option<bool>,
    /// Whether `_debug_render_only` is known.
    pub tells_prompts: bool,
    pub answer: String,
    /// What every model is said to be stored as.
    pub quantization_level: &'static str,
    /// The likeliest next tokens of a model after a text; where this is not set, answers have no `logprobs`.
    pub probabilities: Option<Probabilities>,
}

/// Of the request that made the model, a prompt and a number: so many tokens as bytes, with the natural logarithms of their
/// probabilities.
pub type Probabilities = Box<dyn Fn(&Value, &str, usize) -> Vec<(Vec<u8>, f64)> + Send>;

impl OllamaDouble {
    pub fn start(version: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let state = Arc::new(Mutex::new(State {
            version: version.to_owned(),
            blobs: BTreeMap::new(),
            models: BTreeMap::new(),
            requests: Vec::new(),
            hang_up_after: None,
            disk_full_after: None,
            stall_after: None,
            corrupt_next: false,
            fail_create: None,
            cut_create: false,
            render: chatml,
            refuses_adapters: None,
            tells_prompts: true,
            answer: "Fine, thank you.".to_owned(),
            quantization_level: "Q4_0",
            probabilities: None,
        }));
        let shared = Arc::clone(&state);
        thread::spawn(move || {
            for stream in listener.incoming() {
                let shared = Arc::clone(&shared);
                // a client that closes early is none of the server's business
                thread::spawn(move || serve(stream.unwrap(), &shared));
            }
        });
        Self { address, state }
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// How many files came in whole.
    pub fn uploads(&self) -> usize {
        self.state().requests.iter().filter(|request| request.starts_with("POST /api/blobs/")).count()
    }

    /// A pulled model, with the checksum of its weights.
    pub fn pull(&self, name: &str, weights: &[u8]) -> String {
        let digest = digest(weights);
        let mut state = self.state();
        state.blobs.insert(digest.clone(), weights.to_owned());
        state.models.insert(full_name(name), json!({ "files": { "model.gguf": digest } }));
        digest
    }
}

/// ChatML with the system prompt of the model: as a server renders most small models.
pub fn chatml(model: &Value, messages: &[(String, String)]) -> String {
    let system =
        model["system"].as_str().filter(|_| messages.first().is_none_or(|(role, _)| role != "system"));
    let turns = system.map(|text| ("system", text)).into_iter();
    let turns = turns.chain(messages.iter().map(|(role, content)| (role.as_str(), content.as_str())));
    let text: String =
        turns.map(|(role, content)| format!("<|im_start|>{role}\n{content}<|im_end|>\n")).collect();
    text + "<|im_start|>assistant\n"
}

pub fn digest(bytes: &[u8]) -> String {
    let hex: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}

/// A request without its body.
struct Head {
    method: String,
    path: String,
    length: usize,
    chunked: bool,
}

fn serve(mut stream: TcpStream, state: &Mutex<State>) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let head = read_head(&mut reader)?;
    state.lock().unwrap().requests.push(format!("{} {}", head.method, head.path));
    match (head.method.as_str(), head.path.as_str()) {
        ("GET", "/api/version") => {
            let version = state.lock().unwrap().version.clone();
            answer(&mut stream, 200, &json!({ "version": version }))
        }
        ("GET", "/api/tags") => {
            let state = state.lock().unwrap();
            let models: Vec<Value> =
                state.models.keys().map(|name| json!({ "name": name, "model": name })).collect();
            answer(&mut stream, 200, &json!({ "models": models }))
        }
        (method, path) if path.starts_with("/api/blobs/") => {
            let digest = path.trim_start_matches("/api/blobs/").to_owned();
            let hex = digest.strip_prefix("sha256:").unwrap_or_default();
            if hex.len() != 64 || !hex.bytes().all(|byte| byte.is_ascii_hexdigit()) {
                return answer(&mut stream, 400, &json!({ "error": "invalid digest format" }));
            }
            let there = state.lock().unwrap().blobs.contains_key(&digest);
            match method {
                "HEAD" => head_only(&mut stream, if there { 200 } else { 404 }),
                _ if there => answer(&mut stream, 200, &Value::Null),
                _ => receive(&mut stream, &mut reader, &head, &digest, state),
            }
        }
        ("POST", path) => {
            let body = read_body(&mut reader, &head, usize::MAX)?;
            let Ok(request) = serde_json::from_slice::<Value>(&body) else {
                return answer(&mut stream, 400, &json!({ "error": "invalid JSON" }));
            };
            match path {
                "/api/create" => create(&mut stream, &request, &mut state.lock().unwrap()),
                "/api/show" => show(&mut stream, &request, &state.lock().unwrap()),
                "/api/chat" | "/api/generate" => {
                    generate(&mut stream, path, &request, &state.lock().unwrap())
                }
                _ => answer(&mut stream, 404, &json!({ "error": "not found" })),
            }
        }
        _ => answer(&mut stream, 404, &json!({ "error": "not found" })),
    }
}

/// 201, or 400 where the bytes are not those of the digest. Nothing is kept of what breaks off.
fn receive(
    stream: &mut TcpStream,
    reader: &mut BufReader<TcpStream>,
    head: &Head,
    expected: &str,
    state: &Mutex<State>,
) -> std::io::Result<()> {
    let (hang_up, full, stall) = {
        let mut state = state.lock().unwrap();
        (state.hang_up_after.take(), state.disk_full_after.take(), state.stall_after.take())
    };
    if let Some(bytes) = hang_up.or(full).or(stall) {
        read_body(reader, head, bytes)?;
        if full.is_some() {
            let error = "write /models/blobs/sha256-123: no space left on device";
            answer(stream, 500, &json!({ "error": error }))?;
        }
        while stall.is_some() {
            thread::park();
        }
        return Ok(());
    }
    let bytes = read_body(reader, head, usize::MAX)?;
    if !head.chunked && bytes.len() < head.length {
        return Ok(()); // the client went away
    }
    let mut state = state.lock().unwrap();
    let got = if std::mem::take(&mut state.corrupt_next) { digest(b"other") } else { digest(&bytes) };
    if got != expected {
        let error = format!("digest mismatch, expected {expected:?}, got {got:?}");
        return answer(stream, 400, &json!({ "error": error }));
    }
    state.blobs.insert(got, bytes);
    answer(stream, 201, &Value::Null)
}

fn create(stream: &mut TcpStream, request: &Value, state: &mut State) -> std::io::Result<()> {
    let refuse =
        |stream: &mut TcpStream, status, error: String| answer(stream, status, &json!({ "error": error }));
    let name = request["model"].as_str().unwrap_or_default();
    if name.is_empty() || name.contains(' ') {
        return refuse(stream, 400, "invalid model name".into());
    }
    let parameters = request["parameters"].as_object().cloned().unwrap_or_default();
    if let Some(unknown) =
        parameters.keys().find(|key| !["stop", "temperature", "num_ctx", "seed"].contains(&&***key))
    {
        return refuse(stream, 400, format!("unknown parameter '{unknown}'"));
    }
    let list = |key: &str| request[key].as_object().cloned().unwrap_or_default();
    let (files, adapters) = (list("files"), list("adapters"));
    if !adapters.is_empty() && state.refuses_adapters.unwrap_or(version_of(&state.version) >= [0, 34, 1]) {
        return refuse(stream, 400, "LoRA adapters are no longer supported".into());
    }
    if let Some(path) =
        files.keys().chain(adapters.keys()).find(|path| path.starts_with('/') || path.contains(".."))
    {
        return refuse(stream, 400, format!("file path must be relative: {path}"));
    }
    let from = request["from"].as_str();
    if from.is_none() && files.is_empty() {
        return refuse(stream, 400, "neither 'from' or 'files' was specified".into());
    }
    for digest in files.values().chain(adapters.values()) {
        let digest = digest.as_str().unwrap_or_default();
        let Some(bytes) = state.blobs.get(digest) else {
            let file = digest.replace(':', "-");
            return refuse(stream, 500, format!("open /models/blobs/{file}: no such file or directory"));
        };
        if !bytes.starts_with(b"GGUF") {
            return refuse(stream, 400, "supplied file was not in GGUF format".into());
        }
    }
    // from here on the answer is a stream, and an error is one of its lines
    let mut lines = vec![json!({ "status": "parsing GGUF" })];
    let mut made = request.clone();
    let mut fails = state.fail_create.take();
    if let Some(from) = from {
        // a real server would pull it
        match state.models.get(&full_name(from)).cloned() {
            None => fails = fails.or_else(|| Some("pull model manifest: file does not exist".into())),
            Some(base) => {
                for key in ["files", "template", "system", "parameters"] {
                    if made[key].is_null() && !base[key].is_null() {
                        made[key] = base[key].clone();
                    }
                }
            }
        }
    }
    if let Some(error) = fails {
        lines.push(json!({ "error": error }));
    } else if !std::mem::take(&mut state.cut_create) {
        // broken combinations are taken as well: an adapter as the model, a model as the adapter
        lines.push(json!({ "status": "writing manifest" }));
        lines.push(json!({ "status": "success" }));
        state.models.insert(full_name(name), made);
    }
    let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
    respond(stream, 200, "application/x-ndjson", text.as_bytes())
}

fn show(stream: &mut TcpStream, request: &Value, state: &State) -> std::io::Result<()> {
    let name = request["model"].as_str().unwrap_or_default();
    let Some(model) = state.models.get(&full_name(name)) else {
        return answer(stream, 404, &json!({ "error": format!("model '{name}' not found") }));
    };
    let path = |files: &Value| {
        let digest = files.as_object().and_then(|files| files.values().next()?.as_str().map(str::to_owned));
        format!("/models/blobs/{}", digest.unwrap_or_default().replace(':', "-"))
    };
    let mut modelfile = format!("# Modelfile generated by \"ollama show\"\nFROM {}\n", path(&model["files"]));
    if model["adapters"].is_object() {
        modelfile.extend(["ADAPTER ", &path(&model["adapters"]), "\n"]);
    }
    let shown = json!({
        "modelfile": modelfile,
        "template": model["template"].as_str().unwrap_or("{{ .Prompt }}"),
        "system": model["system"].as_str().unwrap_or_default(),
        "details": { "format": "gguf", "family": "llama", "quantization_level": state.quantization_level },
    });
    answer(stream, 200, &shown)
}

fn generate(stream: &mut TcpStream, path: &str, request: &Value, state: &State) -> std::io::Result<()> {
    let name = request["model"].as_str().unwrap_or_default();
    let Some(model) = state.models.get(&full_name(name)) else {
        return answer(stream, 404, &json!({ "error": format!("model '{name}' not found") }));
    };
    let kind = |files: &Value| {
        let digest = files.as_object().and_then(|files| files.values().next()?.as_str().map(str::to_owned));
        let bytes = digest.and_then(|digest| state.blobs.get(&digest)).map(Vec::as_slice).unwrap_or_default();
        // the value of `general.type` follows its key
        let key = b"general.type";
        let after = bytes.windows(key.len()).position(|window| window == key).map(|at| at + key.len());
        after.is_some_and(|at| {
            bytes[at..bytes.len().min(at + 24)].windows(7).any(|window| window == b"adapter")
        })
    };
    // what creation has let through shows when the model is loaded
    if kind(&model["files"]) || model["adapters"].is_object() && !kind(&model["adapters"]) {
        return answer(stream, 500, &json!({ "error": "unable to load model" }));
    }
    let messages: Vec<(String, String)> = request["messages"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|m| (m["role"].as_str().unwrap().to_owned(), m["content"].as_str().unwrap().to_owned()))
        .collect();
    if request["_debug_render_only"] == true && state.tells_prompts {
        let rendered = (state.render)(model, &messages);
        return answer(
            stream,
            200,
            &json!({ "model": name, "_debug_info": { "rendered_template": rendered } }),
        );
    }
    let mut answered = json!({ "model": name, "done": true, "done_reason": "stop" });
    if path == "/api/chat" {
        answered["message"] = json!({ "role": "assistant", "content": state.answer });
    } else {
        answered["response"] = json!(state.answer);
    }
    if request["logprobs"] == true {
        let top = request["top_logprobs"].as_u64().unwrap_or(0);
        if top > 20 {
            return answer(stream, 400, &json!({ "error": "top_logprobs must be between 0 and 20" }));
        }
        if let Some(probabilities) = &state.probabilities {
            let prompt = request["prompt"].as_str().unwrap_or_default();
            let tokens: Vec<Value> = probabilities(model, prompt, top as usize)
                .into_iter()
                .map(|(bytes, logprob)| json!({ "token": String::from_utf8_lossy(&bytes), "bytes": bytes, "logprob": logprob }))
                .collect();
            answered["logprobs"] = json!([{ "top_logprobs": tokens }]);
        }
    }
    answer(stream, 200, &answered)
}

fn full_name(name: &str) -> String {
    if name.contains(':') { name.to_owned() } else { format!("{name}:latest") }
}

fn version_of(text: &str) -> [u32; 3] {
    let mut parts = text.split('.').map(|part| part.parse().unwrap_or(0));
    [(); 3].map(|()| parts.next().unwrap_or(0))
}

fn read_head(reader: &mut BufReader<TcpStream>) -> std::io::Result<Head> {
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let mut parts = line.split(' ').map(str::to_owned);
    let (method, path) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    let mut head = Head { method, path, length: 0, chunked: false };
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 || line.trim().is_empty() {
            return Ok(head);
        }
        let (name, value) = line.split_once(':').unwrap_or((&line, ""));
        match name.to_ascii_lowercase().as_str() {
            "content-length" => head.length = value.trim().parse().unwrap(),
            "transfer-encoding" => head.chunked = true,
            _ => {}
        }
    }
}

/// The body, or its first bytes.
fn read_body(reader: &mut BufReader<TcpStream>, head: &Head, most: usize) -> std::io::Result<Vec<u8>> {
    let mut body = Vec::new();
    if !head.chunked {
        reader.take(head.length.min(most) as u64).read_to_end(&mut body)?;
        return Ok(body);
    }
    loop {
        let mut size = String::new();
        reader.read_line(&mut size)?;
        let size = usize::from_str_radix(size.trim(), 16).unwrap_or(0);
        reader.take(size as u64).read_to_end(&mut body)?;
        reader.read_line(&mut String::new())?;
        if size == 0 || body.len() >= most {
            return Ok(body);
        }
    }
}

fn answer(stream: &mut TcpStream, status: u16, body: &Value) -> std::io::Result<()> {
    let text = if body.is_null() { String::new() } else { body.to_string() };
    respond(stream, status, "application/json", text.as_bytes())
}

fn head_only(stream: &mut TcpStream, status: u16) -> std::io::Result<()> {
    write!(stream, "HTTP/1.1 {status} x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
}

fn respond(stream: &mut TcpStream, status: u16, kind: &str, body: &[u8]) -> std::io::Result<()> {
    let length = body.len();
    write!(
        stream,
        "HTTP/1.1 {status} x\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n"
    )?;
    stream.write_all(body)
}
