//! Every recipe of the repository loads, says how to run it, and names data that exist.

use std::fs;
use std::path::Path;

use tune_recipe::load;

#[test]
fn every_recipe_loads_and_has_a_header() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let mut count = 0;
    for entry in fs::read_dir(root.join("recipes")).unwrap() {
        let path = entry.unwrap().path();
        let file = path.file_name().unwrap().to_str().unwrap();
        let spec = load(&path, &[]).unwrap_or_else(|error| panic!("{file}: {error:?}"));
        count += 1;

        assert!(spec.notes.is_empty(), "{file}: {:?}", spec.notes);
        assert!(!spec.export.targets.is_empty(), "{file} exports nothing");
        for data in &spec.data {
            assert!(root.join(&data.path).is_file(), "{file}: {} is missing", data.path.display());
        }

        let text = fs::read_to_string(&path).unwrap();
        let header: Vec<&str> = text.lines().take_while(|line| line.starts_with('#')).collect();
        let command = format!("#   command    cargo run --release -- train recipes/{file}");
        assert!(header.contains(&command.as_str()), "{file}: the header lacks {command:?}");
        assert!(header.iter().any(|line| line.starts_with("#   hardware   ")), "{file}: no hardware");
    }
    assert!(count >= 4, "found {count} recipes");
}

/// What a run shows as "before" and "after" must not be what it was trained on.
#[test]
fn samples_are_held_out() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    for (recipe, data) in [("quickstart", "quickstart"), ("code", "code")] {
        let spec = load(&root.join(format!("recipes/{recipe}.toml")), &[]).unwrap();
        let user_turns = |file: String| -> Vec<String> {
            let text = fs::read_to_string(root.join("datasets").join(file)).unwrap();
            let row = |line: &str| -> serde_json::Value { serde_json::from_str(line).unwrap() };
            text.lines()
                .map(|line| row(line)["messages"][0]["content"].as_str().unwrap().to_owned())
                .collect()
        };
        let trained = user_turns(format!("{data}.jsonl"));
        let held_out = user_turns(format!("{data}.eval.jsonl"));
        assert!(spec.samples.prompts.len() >= 3);
        for prompt in &spec.samples.prompts {
            assert!(held_out.contains(prompt), "{recipe}: not in the held-out rows: {prompt}");
        }
        let both: Vec<_> = held_out.iter().filter(|prompt| trained.contains(prompt)).collect();
        assert!(both.is_empty(), "{data}: in both files: {both:?}");
    }
}
