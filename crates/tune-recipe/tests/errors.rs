//! What a user reads when a recipe is wrong.

use miette::{GraphicalReportHandler, GraphicalTheme};
use tune_recipe::{BaseFacts, Override, RecipeError, parse};

const SMALLEST: &str = "[model]\nbase = \"smollm2:135m\"\n\n[[data]]\npath = \"d.jsonl\"\n";

fn rendered(error: &RecipeError) -> String {
    let mut text = String::new();
    GraphicalReportHandler::new_themed(GraphicalTheme::unicode_nocolor())
        .with_width(100)
        .render_report(&mut text, error)
        .unwrap();
    text
}

fn wrong(text: &str, overrides: &[&str]) -> String {
    let overrides: Vec<_> = overrides.iter().map(|o| Override::set(*o)).collect();
    rendered(&parse("recipes/x.toml", text, &overrides).unwrap_err())
}

#[test]
fn one_unknown_key() {
    insta::assert_snapshot!(wrong(&format!("{SMALLEST}\n[train]\nlearning_rte = 1e-4\n"), &[]));
}

#[test]
fn every_problem_at_once() {
    insta::assert_snapshot!(wrong(
        r#"version = 2
learning_rate = 1e-4

[model]
base = 7
dtype = "int3"

[adapters]
r = 16

[adapter]
type = "qlorra"
r = 0
lora_r = 8
layers = "9-3"
learning_rate = 1e-4

[[data]]
path = "d.jsonl"
formt = "auto"

[data_options]
val_split = 1.5

[train]
lr_scheduler = "cosin"
num_epochs = -1
seed = "x"
qqqq = 1

[memory]
budget = "6 pints"

[export]
targets = ["gguf-lora", "gguf", "mp3"]
"#,
        &[]
    ));
}

#[test]
fn broken_toml() {
    insta::assert_snapshot!(wrong("[model\nbase = \"b\n[[data]]\npath = \"d\"", &[]));
}

#[test]
fn nothing_but_nothing() {
    insta::assert_snapshot!(wrong("", &[]));
}

#[test]
fn bad_overrides() {
    insta::assert_snapshot!(wrong(
        SMALLEST,
        &[
            "train.seed",
            "seed=3",
            "trian.seed=3",
            "train.lr_schedule=cosine",
            "data.4.path=x",
            "train.seed=many"
        ]
    ));
}

#[test]
fn batch_sizes_that_do_not_multiply() {
    insta::assert_snapshot!(wrong(
        &format!("{SMALLEST}[train]\nmicro_batch_size = 3\neffective_batch_size = 16\n"),
        &[]
    ));
}

#[test]
fn a_missing_file() {
    insta::assert_snapshot!(rendered(&tune_recipe::load("no/such.toml".as_ref(), &[]).unwrap_err()));
}

#[test]
fn a_recipe_for_another_base() {
    let text = format!(
        "{SMALLEST}[adapter]\nlayers = [0, 31, 40]\ntarget_modules = [\"q_proj\", \"qkv_proj\"]\n\
         [data_options]\nsequence_len = 9000"
    );
    let mut spec = parse("recipes/x.toml", &text, &[]).unwrap();
    let base = BaseFacts {
        parameters: 1,
        quantized: false,
        num_hidden_layers: 30,
        max_position_embeddings: 8192,
        linear_names: vec!["q_proj".into(), "k_proj".into()],
    };
    insta::assert_snapshot!(rendered(&spec.refine(&base).unwrap_err()));
}

proptest::proptest! {
    /// Whatever the text, the reader answers with a value or with problems.
    #[test]
    fn no_text_makes_it_panic(text in "(\\[{0,2}[a-z_]{0,8}\\]{0,2}|[a-z_]{1,8} ?= ?[-0-9a-z\"\\[\\].,{}]{0,9}|\n){0,12}", set in ".{0,20}") {
        let _ = parse("x", &text, &[Override::set(set)]);
    }
}
