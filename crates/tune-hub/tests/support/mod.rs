//! What the tests of this crate share: options inside a temporary folder, a double of the Hub, a double of pip.
#![allow(dead_code, unreachable_pub, missing_docs)]

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread;

use miette::Diagnostic as _;
use sha2::{Digest as _, Sha256};
use tune_hub::{CatalogueEntry, HubError, ModelRef, Options, Progress, Resolved};

/// Everything inside `home`; a Hub that refuses connections; no pip.
pub fn options(home: &Path) -> Options {
    let home_text = OsString::from(home);
    let mut options = Options::from_env(|name| (name == "HOME").then(|| home_text.clone()));
    options.cache_dir = home.join("tune-cache");
    options.ollama_stores = vec![home.join("ollama")];
    options.hub.endpoint = closed_endpoint();
    options.pip = vec![vec![home.join("no-such-pip").into()]];
    options
}

/// An address at which nothing listens.
pub fn closed_endpoint() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    format!("http://{}", listener.local_addr().unwrap())
}

pub fn resolve(reference: &ModelRef, options: &Options) -> (Result<Resolved, HubError>, Vec<Progress>) {
    let mut events = Vec::new();
    let result = tune_hub::resolve(reference, options, &mut |event| events.push(event));
    (result, events)
}

pub fn resolve_text(reference: &str, options: &Options) -> Result<Resolved, HubError> {
    resolve(&ModelRef::parse(reference).unwrap(), options).0
}

/// Message and help, with what differs between runs replaced.
pub fn text(error: &HubError, replace: &[(&str, &str)]) -> String {
    let help = error.help().map_or_else(|| "none".to_owned(), |help| help.to_string());
    let text =
        replace.iter().fold(format!("{error}\nhelp: {help}"), |text, (from, to)| text.replace(from, to));
    // "Connection refused (os error 111)": the number is the platform's
    let parts: Vec<&str> = text.split(" (os error ").collect();
    let rest = parts[1..].iter().map(|part| part.split_once(')').map_or(*part, |(_, rest)| rest));
    parts[..1].iter().copied().chain(rest).collect()
}

pub fn sha256(data: &[u8]) -> String {
    Sha256::digest(data)
        .iter()
        .flat_map(|byte| [byte >> 4, byte & 15])
        .map(|digit| b"0123456789abcdef"[usize::from(digit)] as char)
        .collect()
}

/// A GGUF-like file: the magic and `len` further bytes that are not all alike.
pub fn gguf(len: usize) -> Vec<u8> {
    b"GGUF".iter().copied().chain((0..len).map(|n| (n * 31 % 251) as u8)).collect()
}

pub fn entry(toml: &str) -> ModelRef {
    let entry: CatalogueEntry = toml::from_str(toml).unwrap();
    ModelRef::Catalogue(Box::leak(Box::new(entry)))
}

/// A zip file named as pip names wheels.
pub fn wheel(folder: &Path, package: &str, member: &str, contents: &[u8]) {
    fs::create_dir_all(folder).unwrap();
    let file = fs::File::create(folder.join(format!("{package}-1.0-py3-none-any.whl"))).unwrap();
    let mut zip = zip::ZipWriter::new(file);
    zip.start_file(member, zip::write::SimpleFileOptions::default()).unwrap();
    zip.write_all(contents).unwrap();
    zip.finish().unwrap();
}

/// A program that behaves like pip: copies `wheels/PACKAGE-*.whl` to `--dest`, and notes its arguments.
#[cfg(unix)]
pub fn pip(folder: &Path, wheels: &Path) -> Vec<OsString> {
    let script = format!(
        r#"if [ "$1" = --version ]; then echo "pip 99.0"; exit 0; fi
echo "$@" >> '{folder}/pip.log'
while [ $# -gt 1 ]; do
  if [ "$1" = --dest ]; then dest=$2; fi
  shift
done
cp '{wheels}'/"${{1%%==*}}"-*.whl "$dest"
"#,
        folder = folder.display(),
        wheels = wheels.display()
    );
    program(folder, "pip", &script)
}

#[cfg(unix)]
pub fn program(folder: &Path, name: &str, script: &str) -> Vec<OsString> {
    let path = folder.join(name);
    fs::write(&path, script).unwrap();
    // through the shell: a file just written may still count as busy when it is executed itself
    vec!["/bin/sh".into(), path.into()]
}

pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// A double of the Hub on a loopback port. It speaks just enough of the protocol: listings, ranges, etags.
pub struct Hub {
    pub endpoint: String,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    /// `OWNER/REPO` → path → contents
    repos: BTreeMap<String, BTreeMap<String, Vec<u8>>>,
    requests: Vec<Request>,
    /// Answer downloads with these bytes flipped.
    corrupt: bool,
    /// Close the next download's connection after so many bytes.
    close_after: Option<usize>,
}

#[derive(Debug, Clone)]
pub struct Request {
    pub path: String,
    /// First byte asked for; a request for byte 0 alone asks for the file's properties.
    pub from: Option<usize>,
    pub only_first: bool,
    pub authorization: Option<String>,
}

impl Hub {
    pub fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let state = Arc::new(Mutex::new(State::default()));
        let shared = Arc::clone(&state);
        thread::spawn(move || {
            for stream in listener.incoming() {
                // a client that closes early is none of the server's business
                let _ = answer(stream.unwrap(), &shared);
            }
        });
        Self { endpoint, state }
    }

    pub fn put(&self, repo: &str, file: &str, contents: &[u8]) -> &Self {
        let mut state = self.state.lock().unwrap();
        state.repos.entry(repo.to_owned()).or_default().insert(file.to_owned(), contents.to_owned());
        self
    }

    pub fn corrupt(&self, corrupt: bool) {
        self.state.lock().unwrap().corrupt = corrupt;
    }

    pub fn close_next_download_after(&self, bytes: usize) {
        self.state.lock().unwrap().close_after = Some(bytes);
    }

    pub fn requests(&self) -> Vec<Request> {
        self.state.lock().unwrap().requests.clone()
    }

    /// First bytes of the downloads of a file, in order.
    pub fn downloads(&self, file: &str) -> Vec<usize> {
        let of_file = |request: &Request| request.path.ends_with(file) && !request.only_first;
        self.requests().into_iter().filter(of_file).filter_map(|request| request.from).collect()
    }
}

fn answer(mut stream: TcpStream, state: &Mutex<State>) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let first = lines.next().transpose()?.unwrap_or_default();
    let path = first.split(' ').nth(1).unwrap_or_default().to_owned();
    let mut request = Request { path, from: None, only_first: false, authorization: None };
    for line in lines {
        let line = line?;
        match line.split_once(": ") {
            Some((name, value)) if name.eq_ignore_ascii_case("range") => {
                let (from, to) = value.strip_prefix("bytes=").unwrap().split_once('-').unwrap();
                request.from = from.parse().ok();
                request.only_first = to == "0";
            }
            Some((name, value)) if name.eq_ignore_ascii_case("authorization") => {
                request.authorization = Some(value.to_owned());
            }
            Some(_) => {}
            None => break,
        }
    }
    let mut state = state.lock().unwrap();
    state.requests.push(request.clone());

    let path = request.path.split('?').next().unwrap();
    let parts: Vec<&str> = path.trim_start_matches('/').splitn(5, '/').collect();
    match parts[..] {
        ["api", "models", owner, repo, rest] => {
            let Some(files) = state.repos.get(&format!("{owner}/{repo}")) else {
                return respond(&mut stream, "401 Unauthorized", &[], b"{}");
            };
            if !["revision/main", &format!("revision/{COMMIT}")].contains(&rest) {
                return respond(&mut stream, "404 Not Found", &[], b"{}");
            }
            let siblings: Vec<_> = files.iter().map(|(name, contents)| listed(name, contents)).collect();
            let listing = serde_json::json!({"sha": COMMIT, "siblings": siblings});
            respond(
                &mut stream,
                "200 OK",
                &["Content-Type: application/json"],
                listing.to_string().as_bytes(),
            )
        }
        [owner, repo, "resolve", _, file] => {
            let contents =
                state.repos.get(&format!("{owner}/{repo}")).and_then(|files| files.get(file)).cloned();
            let Some(mut contents) = contents else {
                return respond(&mut stream, "404 Not Found", &[], b"{}");
            };
            let etag = if is_large(file) { sha256(&contents) } else { sha256(&contents)[..40].to_owned() };
            if state.corrupt {
                contents.iter_mut().skip(4).for_each(|byte| *byte ^= 0x55);
            }
            let from = request.from.unwrap_or(0);
            let to = if request.only_first { 1 } else { contents.len() };
            if from >= to {
                return respond(&mut stream, "416 Range Not Satisfiable", &[], b"");
            }
            let headers = [
                format!("ETag: \"{etag}\""),
                format!("X-Repo-Commit: {COMMIT}"),
                format!("Content-Range: bytes {from}-{}/{}", to - 1, contents.len()),
            ];
            let body = &contents[from..to];
            let close_after = if request.only_first { None } else { state.close_after.take() };
            let sent = close_after.map_or(body, |bytes| &body[..bytes.min(body.len())]);
            head(&mut stream, "206 Partial Content", &headers.each_ref().map(String::as_str), body.len())?;
            stream.write_all(sent)
        }
        _ => respond(&mut stream, "404 Not Found", &[], b"{}"),
    }
}

fn is_large(name: &str) -> bool {
    Path::new(name).extension().is_some_and(|extension| extension == "gguf" || extension == "safetensors")
}

fn listed(name: &str, contents: &[u8]) -> serde_json::Value {
    let mut listed = serde_json::json!({"rfilename": name, "size": contents.len()});
    if is_large(name) {
        listed["lfs"] =
            serde_json::json!({"sha256": sha256(contents), "size": contents.len(), "pointerSize": 134});
    }
    listed
}

fn respond(stream: &mut TcpStream, status: &str, headers: &[&str], body: &[u8]) -> std::io::Result<()> {
    head(stream, status, headers, body.len())?;
    stream.write_all(body)
}

fn head(stream: &mut TcpStream, status: &str, headers: &[&str], len: usize) -> std::io::Result<()> {
    write!(stream, "HTTP/1.1 {status}\r\nContent-Length: {len}\r\nConnection: close\r\n")?;
    for header in headers {
        write!(stream, "{header}\r\n")?;
    }
    stream.write_all(b"\r\n")
}

/// All files below a folder, relative, sorted.
pub fn files_below(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(next) = folders.pop() {
        for entry in fs::read_dir(&next).into_iter().flatten() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                found.push(path.strip_prefix(folder).unwrap().to_owned());
            }
        }
    }
    found.sort();
    found
}
