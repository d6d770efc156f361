//! The Hugging Face Hub, through the crate `hf-hub`: its cache, its resumed downloads.
//!
//! What is added here: a listing with time limits first (so that a machine without the Hub learns it in seconds), the
//! choice of files, a snapshot that is named only when it is whole, checksums, and a limit on silence: `hf-hub` itself
//! waits for ever.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread;
use std::time::Duration;

use hf_hub::api::sync::{Api, ApiBuilder, ApiError};
use hf_hub::{Cache, Repo, RepoType};

use crate::catalogue::PinnedFile;
use crate::checksum::{is_sha256, sha256_of_file};
use crate::error::HubError;
use crate::hf_files::{self, Listed, Listing};
use crate::model_ref::HubRef;
use crate::options::Options;
use crate::resolve::Progress;

/// A model of the Hub's cache.
#[derive(Debug)]
pub(crate) struct HubModel {
    /// The GGUF file (its first part, if it is split) or the snapshot folder.
    pub(crate) path: PathBuf,
    /// The commit it belongs to.
    pub(crate) commit: String,
}

/// The model as it lies in the cache, if it is whole. Opens no connection.
pub(crate) fn cached(reference: &HubRef, pinned: Option<&PinnedFile>, options: &Options) -> Option<HubModel> {
    let cache = Cache::new(options.hub.cache_dir.clone());
    let revision = reference.revision.as_deref().unwrap_or(MAIN);
    let repo = Repo::with_revision(reference.repository(), RepoType::Model, revision.to_owned());
    let folder = cache.path().join(repo.folder_name());
    // a full commit needs no entry in refs/
    let named = fs::read_to_string(folder.join("refs").join(revision)).ok();
    let commit = named.as_deref().map_or(revision, str::trim).to_owned();
    if !is_commit(&commit) {
        return None;
    }
    let snapshot = cache.repo(repo).pointer_path(&commit);
    let path = match &reference.file {
        Some(file) => {
            let path = snapshot.join(file);
            let bytes = fs::metadata(&path).ok()?.len();
            if pinned.is_some_and(|pinned| pinned.bytes != bytes) {
                return None;
            }
            hf_files::all_parts(file).iter().all(|part| snapshot.join(part).is_file()).then_some(path)?
        }
        None => hf_files::whole_model(&snapshot)?,
    };
    Some(HubModel { path, commit })
}

/// Downloads what is missing and returns the model in the cache.
pub(crate) fn fetch(
    reference: &HubRef,
    pinned: Option<&PinnedFile>,
    options: &Options,
    progress: &mut dyn FnMut(Progress),
) -> Result<HubModel, HubError> {
    if options.hub.offline {
        return Err(HubError::Offline {
            reference: format!("hf:{reference}"),
            cache: options.hub.cache_dir.clone(),
        });
    }
    let cache = Cache::new(options.hub.cache_dir.clone());
    let api = ApiBuilder::from_cache(cache.clone())
        .with_endpoint(options.hub.endpoint.clone())
        .with_token(options.hub.token.as_ref().map(|token| token.reveal().to_owned()))
        .with_progress(false)
        .with_retries(3)
        .with_user_agent("tune", env!("CARGO_PKG_VERSION"))
        .build()
        .map_err(|error| HubError::Unreachable {
            endpoint: options.hub.endpoint.clone(),
            reason: error.to_string(),
        })?;

    let listing = list(&api, reference, &options.hub.endpoint)?;
    let files = hf_files::choose(&listing, reference)?;
    let all = Fetch {
        api: &api,
        cache: &cache,
        reference,
        endpoint: &options.hub.endpoint,
        commit: &listing.sha,
        pinned,
    };
    for file in &files {
        download(&all, file, progress)?;
    }

    // named only now: an interrupted download is never taken for a model
    let revision = reference.revision.clone().unwrap_or_else(|| MAIN.to_owned());
    let repo = Repo::with_revision(reference.repository(), RepoType::Model, revision);
    let repo = cache.repo(repo);
    repo.create_ref(&listing.sha).map_err(HubError::io(cache.path()))?;
    let snapshot = repo.pointer_path(&listing.sha);
    let path = match &reference.file {
        Some(file) => snapshot.join(file),
        None => hf_files::whole_model(&snapshot).ok_or_else(|| HubError::Unusable {
            what: format!("hf:{reference}"),
            reason: "its weights are incomplete: a file of the index is missing".to_owned(),
            help: "choose another revision: hf:OWNER/REPO@REVISION".to_owned(),
        })?,
    };
    Ok(HubModel { path, commit: listing.sha })
}

const MAIN: &str = "main";

/// Time to find the host and to connect to it.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);

/// Time for the whole listing.
const LISTING_LIMIT: Duration = Duration::from_secs(10);

/// Silence after which a download counts as broken off.
const SILENCE_LIMIT: Duration = Duration::from_mins(1);

fn list(api: &Api, reference: &HubRef, endpoint: &str) -> Result<Listing, HubError> {
    let listing = || -> Result<Listing, ureq::Error> {
        api.repo(repo_at(reference, reference.revision.as_deref().unwrap_or(MAIN)))
            .info_request()
            .query("blobs", "true")
            .config()
            .timeout_resolve(Some(CONNECT_LIMIT))
            .timeout_connect(Some(CONNECT_LIMIT))
            .timeout_global(Some(LISTING_LIMIT))
            .build()
            .call()?
            .body_mut()
            .read_json()
    };
    let listing = listing().map_err(|error| refused_or_unreachable(&error, reference, endpoint))?;
    if is_commit(&listing.sha) {
        Ok(listing)
    } else {
        Err(HubError::Unreachable {
            endpoint: endpoint.to_owned(),
            reason: format!("it answers with commit `{}`, expected 40 hexadecimal digits", listing.sha),
        })
    }
}

fn repo_at(reference: &HubRef, revision: &str) -> Repo {
    Repo::with_revision(reference.repository(), RepoType::Model, revision.to_owned())
}

fn is_commit(text: &str) -> bool {
    text.len() == 40 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

fn refused_or_unreachable(error: &ureq::Error, reference: &HubRef, endpoint: &str) -> HubError {
    let refused = |reason: &str, help: String| HubError::Refused {
        reference: format!("hf:{reference}"),
        reason: reason.to_owned(),
        help,
    };
    match error {
        // without a token the Hub answers 401 for what does not exist, too
        ureq::Error::StatusCode(401) => refused(
            "it does not exist, or it is private or gated (status 401)",
            format!(
                "check the spelling of {}; for a gated model accept its terms at {endpoint}/{} and set HF_TOKEN",
                reference.repository(),
                reference.repository()
            ),
        ),
        ureq::Error::StatusCode(403) => refused(
            "this token has no access to it (status 403)",
            format!(
                "accept the model's terms at {endpoint}/{}, with the account of HF_TOKEN",
                reference.repository()
            ),
        ),
        ureq::Error::StatusCode(404) => refused(
            &format!(
                "no such repository or revision `{}` (status 404)",
                reference.revision.as_deref().unwrap_or(MAIN)
            ),
            format!("look at {endpoint}/{}", reference.repository()),
        ),
        ureq::Error::StatusCode(429) => refused(
            "too many requests (status 429)",
            "wait a minute, or set HF_TOKEN for a higher limit".to_owned(),
        ),
        other => HubError::Unreachable { endpoint: endpoint.to_owned(), reason: connection_reason(other) },
    }
}

fn connection_reason(error: &ureq::Error) -> String {
    match error {
        ureq::Error::HostNotFound => "its name cannot be resolved".to_owned(),
        ureq::Error::Timeout(ureq::Timeout::Resolve | ureq::Timeout::Connect) => {
            format!("no connection within {} s", CONNECT_LIMIT.as_secs())
        }
        ureq::Error::Timeout(_) => format!("no answer within {} s", LISTING_LIMIT.as_secs()),
        other => {
            let reason = match other {
                ureq::Error::Io(error) => error.to_string(),
                other => other.to_string(),
            };
            if reason.contains("certificate") {
                format!("{reason} (a proxy that replaces certificates, or a wrong clock?)")
            } else {
                reason
            }
        }
    }
}

/// What all files of one fetch have in common.
struct Fetch<'a> {
    api: &'a Api,
    cache: &'a Cache,
    reference: &'a HubRef,
    endpoint: &'a str,
    commit: &'a str,
    pinned: Option<&'a PinnedFile>,
}

fn download(fetch: &Fetch, file: &Listed, progress: &mut dyn FnMut(Progress)) -> Result<(), HubError> {
    let &Fetch { api, cache, reference, endpoint, commit, pinned } = fetch;
    let repo = repo_at(reference, commit);
    let pointer = cache.repo(repo.clone()).pointer_path(commit).join(&file.name);
    let shown = format!("{}/{}", reference.repository(), file.name);
    let bytes = pinned.map(|pinned| pinned.bytes).or_else(|| file.bytes());
    if fs::metadata(&pointer).is_ok_and(|there| bytes.is_none_or(|bytes| bytes == there.len())) {
        return Ok(());
    }
    remove_pointer_and_blob(&pointer);
    let part = file.sha256().map(|sha256| cache.repo(repo.clone()).blob_path(sha256).with_extension("part"));
    if let (Some(part), Some(bytes)) = (&part, bytes) {
        // a whole one would be asked for its rest, and the server has none to give
        if fs::metadata(part).is_ok_and(|there| there.len() >= bytes) {
            fs::remove_file(part).map_err(HubError::io(part))?;
        }
    }

    progress(Progress::Started { file: file.name.clone(), from: shown.clone(), bytes });
    let failed = |reason: String| HubError::Download { file: shown.clone(), reason };
    let path = in_thread(api.clone(), repo, &file.name, progress).map_err(|error| match error {
        Broken::Off(reason) => failed(reason),
        Broken::Api(ApiError::IoError(source)) => HubError::Io { path: cache.path().clone(), source },
        Broken::Api(ApiError::RequestError(error)) => match *error {
            ureq::Error::StatusCode(401 | 403) => refused_or_unreachable(&error, reference, endpoint),
            ref other => failed(connection_reason(other)),
        },
        Broken::Api(other) => failed(other.to_string()),
    })?;

    let got = fs::metadata(&path).map_err(HubError::io(&path))?.len();
    if let Some(expected) = bytes.filter(|expected| *expected != got) {
        keep_as_part(&path, part.as_deref().filter(|_| got < expected));
        return Err(failed(format!("expected {expected} bytes, got {got}")));
    }
    verify(&path, &shown, file, pinned, progress)?;
    progress(Progress::Finished { file: file.name.clone() });
    Ok(())
}

/// Compares with the pinned checksum or, without one, with the one that the Hub lists (large files have one).
fn verify(
    path: &Path,
    shown: &str,
    file: &Listed,
    pinned: Option<&PinnedFile>,
    progress: &mut dyn FnMut(Progress),
) -> Result<(), HubError> {
    let listed = file.sha256().map(str::to_owned).or_else(|| {
        // the cache names a blob by the server's etag, which is the checksum for large files
        let blob = path.canonicalize().ok()?;
        blob.file_name()?.to_str().filter(|name| is_sha256(name)).map(str::to_owned)
    });
    let Some(expected) = pinned.map(|pinned| pinned.sha256.clone()).or(listed) else {
        return Ok(());
    };
    progress(Progress::Verifying { file: file.name.clone() });
    let got = sha256_of_file(path).map_err(HubError::io(path))?;
    if got == expected {
        return Ok(());
    }
    remove_pointer_and_blob(path);
    Err(HubError::Checksum { file: shown.to_owned(), expected, got })
}

/// Removes a file of a snapshot and what it points to; what is not there needs no removing.
fn remove_pointer_and_blob(pointer: &Path) {
    if let Ok(blob) = pointer.canonicalize() {
        let _ = fs::remove_file(blob);
    }
    let _ = fs::remove_file(pointer);
}

/// Takes a file that is too short out of the snapshot, and keeps its bytes for the next attempt if they have a place.
fn keep_as_part(pointer: &Path, part: Option<&Path>) {
    if let (Some(part), Ok(blob)) = (part, pointer.canonicalize()) {
        let _ = fs::rename(blob, part);
    }
    remove_pointer_and_blob(pointer);
}

enum Broken {
    Off(String),
    Api(ApiError),
}

enum Event {
    Begins,
    More(u64),
    Done(Box<Result<PathBuf, ApiError>>),
}

/// Runs the download in a thread of its own, so that a silent server or a fault inside it ends in an error here.
fn in_thread(
    api: Api,
    repo: Repo,
    file: &str,
    progress: &mut dyn FnMut(Progress),
) -> Result<PathBuf, Broken> {
    let (sender, events) = mpsc::channel();
    let name = file.to_owned();
    thread::spawn(move || {
        let result = api.repo(repo).download_with_progress(&name, Channel(sender.clone()));
        let _ = sender.send(Event::Done(Box::new(result)));
    });
    let mut done = 0;
    loop {
        match events.recv_timeout(SILENCE_LIMIT) {
            // a retry starts counting anew
            Ok(Event::Begins) => done = 0,
            Ok(Event::More(bytes)) => {
                done += bytes;
                progress(Progress::Bytes { done });
            }
            Ok(Event::Done(result)) => return result.map_err(Broken::Api),
            Err(RecvTimeoutError::Timeout) => {
                return Err(Broken::Off(format!("no data for {} s", SILENCE_LIMIT.as_secs())));
            }
            Err(RecvTimeoutError::Disconnected) => {
                return Err(Broken::Off("the server's answer cannot be understood".to_owned()));
            }
        }
    }
}

struct Channel(Sender<Event>);

impl hf_hub::api::Progress for Channel {
    fn init(&mut self, _size: usize, _filename: &str) {
        let _ = self.0.send(Event::Begins);
    }

    fn update(&mut self, size: usize) {
        let _ = self.0.send(Event::More(size as u64));
    }

    fn finish(&mut self) {}
}
