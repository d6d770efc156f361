//! The data sets of the repository obey the rules that `datasets/README.md` states.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use serde_json::Value;

/// User and assistant turn of every row.
fn rows(file: &str) -> Vec<(String, String)> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../datasets").join(file);
    let text = fs::read_to_string(path).unwrap();
    let row = |(number, line): (usize, &str)| {
        let row: Value = serde_json::from_str(line).unwrap_or_else(|e| panic!("{file}:{}: {e}", number + 1));
        let turn = |index: usize, role: &str| {
            let message = &row["messages"][index];
            assert_eq!(message["role"], role, "{file}:{}", number + 1);
            message["content"].as_str().unwrap().to_owned()
        };
        assert_eq!(row["messages"].as_array().unwrap().len(), 2, "{file}:{}", number + 1);
        (turn(0, "user"), turn(1, "assistant"))
    };
    let rows: Vec<_> = text.lines().enumerate().map(row).collect();
    let distinct: BTreeSet<_> = rows.iter().map(|(prompt, _)| prompt).collect();
    assert_eq!(distinct.len(), rows.len(), "{file}: a prompt occurs twice");
    rows
}

fn assert_one_of(value: &str, allowed: &str, answer: &str) {
    assert!(allowed.split(' ').any(|word| value == word), "{value:?} is not one of {allowed}: {answer}");
}

#[test]
fn tickets() {
    let components = "login billing search notifications files editor calendar reports";
    for (report, answer) in [rows("quickstart.jsonl"), rows("quickstart.eval.jsonl")].concat() {
        let words = report.split_whitespace().count();
        assert!((10..=40).contains(&words), "{words} words: {report}");

        assert!(!answer.contains('\n'), "{answer}");
        let ticket: serde_json::Map<String, Value> = serde_json::from_str(&answer).unwrap();
        // A map sorts or keeps its keys depending on a feature of serde_json; the text does neither.
        let places =
            ["type", "component", "priority", "title"].map(|key| answer.find(&format!("\"{key}\": ")));
        assert!(ticket.len() == 4 && places.iter().all(Option::is_some) && places.is_sorted(), "{answer}");
        let value = |key: &str| ticket[key].as_str().unwrap();
        assert_one_of(value("type"), "bug feature question chore", &answer);
        assert_one_of(value("component"), components, &answer);
        assert_one_of(value("priority"), "low medium high", &answer);

        let title = value("title");
        assert!((2..=9).contains(&title.split(' ').count()), "{title}");
        assert!(!title.ends_with(['.', '?', '!']) && title.starts_with(char::is_uppercase), "{title}");
        let asks = ["How ", "Whether ", "What ", "When ", "Where ", "Which ", "Who ", "Why "];
        let is_question = asks.iter().any(|word| title.starts_with(word));
        assert_eq!(is_question, value("type") == "question", "{answer}");
    }
    assert_eq!(rows("quickstart.jsonl").len(), 216);
    assert_eq!(rows("quickstart.eval.jsonl").len(), 16);
}

#[test]
fn commit_messages() {
    let types = "feat fix docs style refactor perf test build ci chore";
    for (diff, message) in [rows("code.jsonl"), rows("code.eval.jsonl")].concat() {
        assert!(diff.starts_with("diff --git a/") && !diff.ends_with('\n'), "{diff}");
        assert!(message.chars().count() <= 72 && !message.contains('\n'), "{message}");
        let (head, subject) = message.split_once(": ").unwrap_or_else(|| panic!("no colon: {message}"));
        let (kind, scope) = match head.trim_end_matches('!').split_once('(') {
            Some((kind, scope)) => (kind, Some(scope.strip_suffix(')').unwrap())),
            None => (head.trim_end_matches('!'), None),
        };
        assert_one_of(kind, types, &message);
        assert!(!subject.starts_with(char::is_uppercase) && !subject.ends_with('.'), "{message}");
        match (kind, scope) {
            ("docs" | "style" | "ci" | "chore" | "build", None) | ("build", Some("deps")) => {}
            // the folder or the file that the change is in
            ("feat" | "fix" | "refactor" | "perf" | "test", Some(scope)) => {
                let paths = diff.lines().next().unwrap().to_lowercase().replace('-', "");
                assert!(paths.contains(&scope.replace('-', "")), "{scope} is not in {paths}");
            }
            _ => panic!("scope does not suit the type: {message}"),
        }
    }
    assert_eq!(rows("code.jsonl").len(), 218);
    assert_eq!(rows("code.eval.jsonl").len(), 20);
}
