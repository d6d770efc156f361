//! Folders and files on this machine.

mod support;

use std::fs;

use support::{gguf, options, resolve, resolve_text, text};
use tune_hub::ModelRef;

#[test]
fn a_folder_and_a_file_are_used_as_they_are() {
    let home = tempfile::tempdir().unwrap();
    let options = options(home.path());
    let folder = home.path().join("my-model");
    fs::create_dir(&folder).unwrap();
    fs::write(folder.join("config.json"), "{}").unwrap();
    let file = home.path().join("My.Q4_1.gguf");
    fs::write(&file, gguf(4)).unwrap();

    let (resolved, events) = resolve(&ModelRef::parse_in("my-model", home.path()).unwrap(), &options);
    assert!(events.is_empty());
    let resolved = resolved.unwrap();
    assert_eq!((resolved.path, resolved.name.as_str()), (folder, "my-model"));
    let resolved = resolve_text("~/My.Q4_1.gguf", &options).unwrap();
    assert_eq!((resolved.path.clone(), resolved.name.as_str()), (file, "My.Q4_1"));
    assert_eq!(resolved.reference, resolved.path.display().to_string(), "`~` means another folder elsewhere");
}

#[test]
fn what_is_not_there_or_not_a_model_is_told_apart() {
    let home = tempfile::tempdir().unwrap();
    let options = options(home.path());
    let add = |name: &str, contents: &[u8]| fs::write(home.path().join(name), contents).unwrap();
    add("good.gguf", &gguf(4));
    add("bad.gguf", b"PK\x03\x04 and more");
    add("empty.gguf", b"");
    add("model.safetensors", b"x");
    fs::create_dir(home.path().join("empty")).unwrap();
    let shown = |name: &str| {
        let reference = ModelRef::parse_in(name, home.path()).unwrap();
        let error = resolve(&reference, &options).0.unwrap_err();
        text(&error, &[(&home.path().display().to_string(), "HOME")])
    };
    insta::assert_snapshot!(shown("god.gguf"), @r"
    HOME/god.gguf: no such file
    help: HOME has bad.gguf, empty.gguf, good.gguf
    ");
    insta::assert_snapshot!(shown("./nowhere"), @r"
    HOME/./nowhere: no such folder
    help: check the path
    ");
    insta::assert_snapshot!(shown("no/such.gguf"), @r"
    HOME/no/such.gguf: no such file
    help: the folder HOME/no does not exist either
    ");
    insta::assert_snapshot!(shown("bad.gguf"), @r#"
    HOME/bad.gguf: not a GGUF file: expected the magic bytes "GGUF", got "PK\x03\x04"
    help: name a .gguf file, or a folder in Hugging Face layout
    "#);
    insta::assert_snapshot!(shown("empty.gguf"), @r"
    HOME/empty.gguf: the file is empty
    help: name a .gguf file, or a folder in Hugging Face layout
    ");
    insta::assert_snapshot!(shown("./empty"), @r"
    HOME/./empty: expected a folder in Hugging Face layout, it has no config.json
    help: name the folder that holds config.json, tokenizer.json and *.safetensors, or a .gguf file
    ");
    insta::assert_snapshot!(shown("model.safetensors"), @r#"
    HOME/model.safetensors: not a GGUF file: expected the magic bytes "GGUF", got "x"
    help: name the folder that the file is in, not the file
    "#);
}
