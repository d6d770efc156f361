//! `deploy/docker-compose.yml`: pinned, healthy, on this machine only, and silent.

use std::path::{Path, PathBuf};
use std::process::Command;

use saphyr::{LoadableYamlNode, Scalar, Yaml};
use serde_json::Value;

fn path() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/docker-compose.yml")
}

fn compose() -> Value {
    let text = std::fs::read_to_string(path()).expect("the compose file");
    let documents = Yaml::load_from_str(&text).expect("YAML");
    as_json(documents.first().expect("a document"))
}

fn as_json(yaml: &Yaml<'_>) -> Value {
    match yaml {
        Yaml::Value(Scalar::String(text)) => text.as_ref().into(),
        Yaml::Value(Scalar::Integer(number)) => (*number).into(),
        Yaml::Value(Scalar::Boolean(flag)) => (*flag).into(),
        Yaml::Value(Scalar::Null) => Value::Null,
        Yaml::Sequence(items) => items.iter().map(as_json).collect(),
        Yaml::Mapping(map) => {
            let key = |key: &Yaml<'_>| key.as_str().expect("keys are text").to_owned();
            Value::Object(map.iter().map(|(name, value)| (key(name), as_json(value))).collect())
        }
        other => panic!("unexpected in a compose file: {other:?}"),
    }
}

#[test]
fn images_are_pinned_and_ports_stay_on_this_machine() {
    let compose = compose();
    let services = compose["services"].as_object().expect("services");
    assert_eq!(services.keys().collect::<Vec<_>>(), ["ollama", "open-webui"]);
    for (name, service) in services {
        let image = service["image"].as_str().expect("an image");
        let tag = image.rsplit_once(':').map_or("", |(_, tag)| tag);
        assert!(
            tag.contains('.') && tag.contains(|c: char| c.is_ascii_digit()),
            "{name}: {image} is not pinned"
        );
        for port in service["ports"].as_array().expect("ports") {
            assert!(port.as_str().is_some_and(|port| port.starts_with("127.0.0.1:")), "{name}: {port}");
        }
        let test = service["healthcheck"]["test"].as_array().expect("a health check");
        assert_eq!(test[0], "CMD", "{name}");
        for volume in service["volumes"].as_array().expect("volumes") {
            let source = volume.as_str().and_then(|volume| volume.split(':').next()).expect("a volume");
            let is_folder = source.starts_with(['.', '/', '$']);
            assert!(
                is_folder || compose["volumes"].get(source).is_some(),
                "{name}: {source} is not declared"
            );
        }
    }
    assert_eq!(services["open-webui"]["depends_on"]["ollama"]["condition"], "service_healthy");
}

#[test]
fn open_webui_asks_ollama_and_nobody_else() {
    let compose = compose();
    let environment = &compose["services"]["open-webui"]["environment"];
    assert_eq!(environment["OLLAMA_BASE_URL"], "http://ollama:11434");
    for (name, value) in [
        ("OFFLINE_MODE", "True"),
        ("ANONYMIZED_TELEMETRY", "False"),
        ("DO_NOT_TRACK", "True"),
        ("SCARF_NO_ANALYTICS", "True"),
        ("ENABLE_OPENAI_API", "False"),
        ("ENABLE_VERSION_UPDATE_CHECK", "False"),
    ] {
        // text: YAML's own booleans are written differently by its readers
        assert_eq!(environment[name], value, "{name}");
    }
    assert_eq!(compose["services"]["ollama"]["environment"]["OLLAMA_NO_CLOUD"], "1");
}

/// By Docker's own reader, which needs no daemon for it.
#[test]
fn docker_compose_resolves_it() {
    let file = path();
    let readers: [&[&str]; 2] = [&["docker", "compose"], &["docker-compose"]];
    let works = |reader: &&&[&str]| {
        let version = Command::new(reader[0]).args(&reader[1..]).arg("version").output();
        version.is_ok_and(|output| output.status.success())
    };
    let Some(reader) = readers.iter().find(works) else {
        eprintln!("SKIPPED: neither `docker compose` nor `docker-compose` is here");
        return;
    };
    let output = Command::new(reader[0]).args(&reader[1..]).arg("-f").arg(&file).arg("config").output();
    let output = output.expect("it runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
