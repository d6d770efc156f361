//! The client of an Ollama server, against a double of one, and against a real one where there is one:
//!
//! ```sh
//! TUNE_TEST_OLLAMA=1 OLLAMA_HOST=… cargo test -p tune-hub --test ollama_server
//! ```
//!
//! `TUNE_TEST_OLLAMA` may also name a model of that server; otherwise its first one is asked.

#[path = "support/ollama.rs"]
mod ollama;
mod support;

use std::fs;
use std::io::Write as _;
use std::net::TcpListener;

use ollama::OllamaDouble;
use serde_json::json;
use support::{closed_endpoint, gguf, text};
use tune_hub::{Blob, HubError, Message, NewModel, OllamaHost, OllamaServer, Upload};

fn connect(double: &OllamaDouble) -> OllamaServer {
    OllamaServer::connect(&OllamaHost::parse(Some(&double.address))).unwrap()
}

fn shown(error: &HubError, double: &OllamaDouble) -> String {
    text(error, &[(&double.address, "HOST")])
}

fn file(contents: &[u8]) -> (tempfile::NamedTempFile, Blob) {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(contents).unwrap();
    let blob = Blob::of_file(file.path()).unwrap();
    (file, blob)
}

fn user(content: &str) -> Vec<Message> {
    vec![Message { role: "user".into(), content: content.into() }]
}

/// Files that are made a model: weights, then an adapter over them.
fn model(name: &str, weights: Blob) -> NewModel {
    NewModel { name: name.into(), files: vec![("model.gguf".into(), weights)], ..NewModel::default() }
}

#[test]
fn a_server_that_is_not_there_or_is_another_or_is_old() {
    let closed = closed_endpoint();
    let error = OllamaServer::connect(&OllamaHost::parse(Some(&closed))).unwrap_err();
    insta::assert_snapshot!(text(&error, &[(&closed, "URL")]), @r"
    no Ollama server at URL: Connection refused
    help: start it with `ollama serve`, or set OLLAMA_HOST to the address of the one to use
    ");

    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let _ = stream.unwrap().write_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n\r\nno");
        }
    });
    let error = OllamaServer::connect(&OllamaHost::parse(Some(&address))).unwrap_err();
    assert!(error.to_string().ends_with("something else answers there (404 Not Found)"), "{error}");

    let old = OllamaDouble::start("0.5.4");
    let error = OllamaServer::connect(&OllamaHost::parse(Some(&old.address))).unwrap_err();
    insta::assert_snapshot!(shown(&error, &old), @r"
    Ollama 0.5.4 is too old for exporting to it: expected 0.5.5 or newer
    help: update it: https://ollama.com/download
    ");
}

#[test]
fn a_file_is_sent_once_and_its_progress_is_told() {
    let double = OllamaDouble::start("0.33.3");
    let server = connect(&double);
    let (file, blob) = file(&gguf(300_000));
    assert!(!server.has_blob(&blob).unwrap());
    let mut told = Vec::new();
    assert_eq!(server.upload(file.path(), &blob, &mut |sent| told.push(sent)).unwrap(), Upload::Sent);
    assert_eq!(told.last(), Some(&blob.bytes));
    assert!(told.is_sorted());
    assert_eq!(double.state().blobs[&blob.digest()], fs::read(file.path()).unwrap());
    assert_eq!(server.upload(file.path(), &blob, &mut |_| panic!("sent again")).unwrap(), Upload::Existing);
    assert_eq!(double.uploads(), 1);
}

#[test]
fn a_server_that_dies_in_mid_upload_gets_the_rest_of_the_files_next_time() {
    let double = OllamaDouble::start("0.33.3");
    let server = connect(&double);
    // larger than what the sockets buffer
    let (first, first_blob) = file(&gguf(1000));
    let (second, second_blob) = file(&gguf(16 << 20));
    server.upload(first.path(), &first_blob, &mut |_| ()).unwrap();
    double.state().hang_up_after = Some(100_000);
    let error = server.upload(second.path(), &second_blob, &mut |_| ()).unwrap_err();
    let HubError::OllamaUpload { sent, bytes, .. } = error else { panic!("{error:?}") };
    assert!(sent > 0 && sent < bytes, "{sent} of {bytes}");
    assert_eq!(double.state().blobs.len(), 1, "nothing is kept of half a file");

    assert_eq!(server.upload(first.path(), &first_blob, &mut |_| ()).unwrap(), Upload::Existing);
    assert_eq!(server.upload(second.path(), &second_blob, &mut |_| ()).unwrap(), Upload::Sent);
}

#[test]
fn what_the_server_says_of_a_file_is_passed_on() {
    let double = OllamaDouble::start("0.33.3");
    let server = connect(&double);
    let (sent, blob) = file(&gguf(1000));
    double.state().corrupt_next = true;
    let error = server.upload(sent.path(), &blob, &mut |_| ()).unwrap_err();
    let message = shown(&error, &double);
    assert!(message.contains("digest mismatch"), "{message}");
    assert!(message.contains("help: the file changed while it was sent"), "{message}");

    // the last of a small file: the answer can still be read
    double.state().disk_full_after = Some(usize::MAX);
    let error = server.upload(sent.path(), &blob, &mut |_| ()).unwrap_err();
    let message = shown(&error, &double);
    assert!(message.contains("no space left on device"), "{message}");
    assert!(message.contains("help: the disk of the Ollama server is full"), "{message}");

    // in the middle of a large one the server hangs up
    let (large, blob) = file(&gguf(16 << 20));
    double.state().disk_full_after = Some(100_000);
    let error = server.upload(large.path(), &blob, &mut |_| ()).unwrap_err();
    let message = shown(&error, &double);
    assert!(message.contains("full") || message.contains("no space left"), "{message}");
}

#[test]
fn a_model_is_made_of_files_and_of_another_model() {
    let double = OllamaDouble::start("0.33.3");
    let server = connect(&double);
    let (weights, weights_blob) = file(&gguf(1000));
    server.upload(weights.path(), &weights_blob, &mut |_| ()).unwrap();
    let mut statuses = Vec::new();
    let base = NewModel {
        template: Some("{{ .Prompt }}\"\"\"".into()),
        system: Some("Be brief.".into()),
        parameters: json!({ "stop": ["<|im_end|>"] }).as_object().cloned().unwrap(),
        ..model("base", weights_blob.clone())
    };
    server.create(&base, &mut |status| statuses.push(status.to_owned())).unwrap();
    assert_eq!(statuses, ["parsing GGUF", "writing manifest", "success"]);
    let shown = server.show("base").unwrap().expect("it is there");
    assert_eq!(shown.sha256(), Some(&*weights_blob.sha256));
    assert_eq!((shown.template.as_str(), shown.system.as_str()), ("{{ .Prompt }}\"\"\"", "Be brief."));
    assert_eq!(server.show("other").unwrap(), None);

    let (adapter, adapter_blob) = file(b"GGUF general.type adapter");
    server.upload(adapter.path(), &adapter_blob, &mut |_| ()).unwrap();
    let tuned = NewModel {
        name: "tuned".into(),
        from: Some("base".into()),
        adapter: Some(("adapter.gguf".into(), adapter_blob)),
        ..NewModel::default()
    };
    server.create(&tuned, &mut |_| ()).unwrap();
    let shown = server.show("tuned").unwrap().expect("it is there");
    assert!(shown.has_adapter());
    assert_eq!(shown.sha256(), Some(&*weights_blob.sha256), "no copy of the weights");
    assert_eq!(server.models().unwrap(), ["base:latest", "tuned:latest"]);
}

#[test]
fn refusals_of_a_creation_say_what_to_do() {
    let double = OllamaDouble::start("0.34.1");
    let server = connect(&double);
    let (weights, blob) = file(&gguf(1000));
    let refused = |model: &NewModel| shown(&server.create(model, &mut |_| ()).unwrap_err(), &double);

    // 500: the blob was never sent
    let message = refused(&model("mine", blob.clone()));
    assert!(message.contains("no such file or directory"), "{message}");
    assert!(message.contains("help: the server has lost a file that was sent"), "{message}");

    server.upload(weights.path(), &blob, &mut |_| ()).unwrap();
    let with_adapter =
        NewModel { adapter: Some(("a.gguf".into(), blob.clone())), ..model("mine", blob.clone()) };
    insta::assert_snapshot!(refused(&with_adapter), @r"
    Ollama at http://HOST refuses to create mine: LoRA adapters are no longer supported
    help: servers from 0.34.1 on take merged models only: export to ollama:NAME?gguf:q8_0
    ");
    assert!(refused(&model("two words", blob.clone())).contains("write [NAMESPACE/]MODEL[:TAG]"));
    assert!(
        refused(&NewModel { name: "mine".into(), ..NewModel::default() })
            .contains("neither 'from' or 'files'")
    );

    // 200, and an error line
    double.state().fail_create = Some("unsupported architecture".into());
    let message = refused(&model("mine", blob.clone()));
    assert!(
        message.contains("unsupported architecture") && message.contains("help: update Ollama"),
        "{message}"
    );
    // 200, and no last line
    double.state().cut_create = true;
    assert!(refused(&model("mine", blob)).contains("it stopped without saying why"));
    assert!(double.state().models.is_empty());
}

#[test]
fn a_broken_model_is_created_and_fails_when_it_is_asked() {
    let double = OllamaDouble::start("0.33.3");
    let server = connect(&double);
    let (adapter, blob) = file(b"GGUF general.type adapter");
    server.upload(adapter.path(), &blob, &mut |_| ()).unwrap();
    server.create(&model("mine", blob), &mut |_| ()).unwrap();
    let error = server.chat("mine", &user("hi"), 8).unwrap_err();
    assert!(error.to_string().ends_with("refuses to answer with mine: unable to load model"), "{error}");
}

#[test]
fn prompts_answers_and_probabilities() {
    let double = OllamaDouble::start("0.33.3");
    let server = connect(&double);
    double.pull("base:1b", &gguf(10));
    let rendered = server.render("base:1b", &user("How are you?")).unwrap();
    assert_eq!(
        rendered.as_deref(),
        Some("<|im_start|>user\nHow are you?<|im_end|>\n<|im_start|>assistant\n")
    );
    assert_eq!(server.chat("base:1b", &user("How are you?"), 8).unwrap().text, "Fine, thank you.");
    let error = server.next_tokens("base:1b", "How are", 3).unwrap_err();
    assert!(matches!(error, HubError::OllamaTellsNoLogprobs { .. }), "{error}");
    double.state().probabilities = Some(Box::new(|_, prompt, top| {
        assert_eq!(prompt, "How are");
        (0..top).map(|n| (format!(" t{n}").into_bytes(), -0.5 - n as f64)).collect()
    }));
    let tokens = server.next_tokens("base:1b", "How are", 3).unwrap();
    let told: Vec<(&str, f64)> = tokens.iter().map(|token| (token.token.as_str(), token.logprob)).collect();
    assert_eq!(told, [(" t0", -0.5), (" t1", -1.5), (" t2", -2.5)]);
    assert_eq!(tokens[2].bytes, b" t2");
    // servers list 20 at most and refuse more
    assert_eq!(server.next_tokens("base:1b", "How are", 100).unwrap().len(), 20);

    double.state().tells_prompts = false;
    assert_eq!(
        server.render("base:1b", &user("How are you?")).unwrap(),
        None,
        "an older server answers instead"
    );
    let error = server.chat("other", &user("hi"), 8).unwrap_err();
    assert!(error.to_string().contains("model 'other' not found"), "{error}");

    let old = OllamaDouble::start("0.12.10");
    old.pull("base:1b", &gguf(10));
    let error = connect(&old).next_tokens("base:1b", "How are", 3).unwrap_err();
    assert!(matches!(error, HubError::OllamaTooOld { .. }), "{error}");
}

#[test]
fn a_server_that_goes_away_between_two_calls() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    std::thread::spawn(move || {
        let mut stream = listener.accept().unwrap().0;
        let _ = std::io::Read::read(&mut stream, &mut [0; 1024]);
        let body = r#"{"version":"0.33.3"}"#;
        let length = body.len();
        write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}")
            .unwrap();
    });
    let server = OllamaServer::connect(&OllamaHost::parse(Some(&address))).unwrap();
    let error = server.show("base").unwrap_err();
    insta::assert_snapshot!(text(&error, &[(&address, "HOST")]), @r"
    Ollama at http://HOST broke off to show base: Connection refused
    help: check that it runs (`ollama serve`) and run the same command again: what it has already is not sent twice
    ");
}

/// A real server, with a model of its own.
#[test]
fn real_server_shows_renders_answers_and_tells_probabilities() {
    let Some(wanted) = std::env::var_os("TUNE_TEST_OLLAMA") else {
        eprintln!(
            "SKIPPED: no real Ollama server; set TUNE_TEST_OLLAMA=1 (and OLLAMA_HOST) to test against one"
        );
        return;
    };
    let host = OllamaHost::parse(std::env::var("OLLAMA_HOST").ok().as_deref());
    let server = OllamaServer::connect(&host).expect("TUNE_TEST_OLLAMA says that there is a server");
    let models = server.models().unwrap();
    let wanted = wanted.to_string_lossy().into_owned();
    let name = if wanted == "1" { models.first().expect("a pulled model").clone() } else { wanted };

    let shown = server.show(&name).unwrap().expect("it is listed");
    assert!(shown.sha256().is_some(), "{}", shown.modelfile);
    let rendered = server.render(&name, &user("How are you?")).unwrap();
    assert!(rendered.is_none_or(|text| text.contains("How are you?")));
    assert!(!server.chat(&name, &user("How are you?"), 16).unwrap().text.is_empty());
    let tokens = server.next_tokens(&name, "How are", 5).unwrap();
    assert_eq!(tokens.len(), 5);
    assert!(tokens.iter().all(|token| token.logprob <= 0.0));

    let nothing = Blob { sha256: "0".repeat(64), bytes: 1 };
    assert!(!server.has_blob(&nothing).unwrap());
    let (file, mut blob) = file(b"GGUF nothing");
    blob.sha256 = nothing.sha256;
    let error = server.upload(file.path(), &blob, &mut |_| ()).unwrap_err();
    assert!(error.to_string().contains("digest mismatch"), "{error}");
}
