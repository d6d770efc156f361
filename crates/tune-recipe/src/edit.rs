//! Changes of a recipe's text that leave comments, order and spelling as the user wrote them.

use toml_edit::{ArrayOfTables, DocumentMut, Item, Table, TableLike, Value};

use crate::error::{Problem, RecipeError};
use crate::names;

/// The text of a recipe with these `section.key=value` in it, as `--set` takes them. A key that stands there under another
/// tool's name keeps that name; one that is missing is added at the end of its section. Later assignments win.
///
/// # Errors
/// [`RecipeError::Invalid`] for text that is not TOML and for what is no assignment.
pub fn edit(name: &str, text: &str, assignments: &[String]) -> Result<String, RecipeError> {
    let invalid = |message: String| RecipeError::Invalid {
        name: name.to_owned(),
        problems: vec![Problem::new(message)],
    };
    let mut document: DocumentMut = text
        .parse()
        .map_err(|error: toml_edit::TomlError| invalid(format!("not TOML: {}", error.message())))?;
    for assignment in assignments {
        let split = assignment.split_once('=').and_then(|(path, value)| {
            let (section, key) = path.trim().rsplit_once('.')?;
            Some((section, key, value.trim()))
        });
        let (section, key, value) =
            split.ok_or_else(|| invalid(format!("expected section.key=value, got {assignment:?}")))?;
        let value = value.parse::<Value>().unwrap_or_else(|_| Value::from(value));
        let (name, table) = section_of(&mut document, section)
            .ok_or_else(|| invalid(format!("`{section}` is no section of this recipe")))?;
        let ours = names::alias(name, key).unwrap_or(key);
        let is_same = |other: &str| other == ours || names::alias(name, other) == Some(ours);
        let written = table.iter().map(|(key, _)| key.to_owned()).find(|key| is_same(key));
        put(table, written.as_deref().unwrap_or(ours), value);
    }
    Ok(document.to_string())
}

/// The table of `section` (`train`, `data`, `data.1`), made where it is missing, with the name of its kind.
fn section_of<'d>(
    document: &'d mut DocumentMut,
    section: &str,
) -> Option<(&'static str, &'d mut dyn TableLike)> {
    let (kind, index) = match section.split_once('.') {
        Some((kind, index)) => (kind, index.parse().ok()?),
        None => (section, 0),
    };
    let (kind, _) = names::sections().into_iter().find(|(name, _)| *name == kind)?;
    if kind == "data" {
        let fresh = || Item::ArrayOfTables(ArrayOfTables::from_iter([Table::new()]));
        let item = document.entry(kind).or_insert_with(fresh);
        let table: &mut dyn TableLike = match item {
            Item::ArrayOfTables(tables) => tables.get_mut(index)?,
            Item::Value(Value::Array(array)) => array.get_mut(index)?.as_inline_table_mut()?,
            item => item.as_table_like_mut().filter(|_| index == 0)?,
        };
        return Some((kind, table));
    }
    if section != kind {
        return None;
    }
    let item = document.entry(kind).or_insert_with(|| Item::Table(Table::new()));
    Some((kind, item.as_table_like_mut()?))
}

/// Puts a value in the place of another, with the space and the comment around it.
fn put(table: &mut dyn TableLike, key: &str, mut value: Value) {
    if let Some(Item::Value(old)) = table.get_mut(key) {
        *value.decor_mut() = old.decor().clone();
        *old = value;
        return;
    }
    table.insert(key, Item::Value(value));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Override, parse};

    const RECIPE: &str = "# My recipe.\nversion = 1\n\n[model]\nbase = \"b\"  # the base\n\n[data_options]\n\
                          max_seq_length = 2048   # long tickets\n\n[[data]]\npath = \"d\"\n\n[train]\n\
                          # Two at once.\nmicro_batch_size = 2\nlearning_rate = 1e-4 # slow\n";

    fn edited(assignments: &[&str]) -> String {
        let assignments: Vec<String> = assignments.iter().map(ToString::to_string).collect();
        edit("t", RECIPE, &assignments).expect("editable")
    }

    #[test]
    fn comments_order_and_names_stay() {
        let text = edited(&["data_options.sequence_len=512", "train.micro_batch_size=1", "adapter.r=8"]);
        let expected = RECIPE.replace("2048", "512").replace("micro_batch_size = 2", "micro_batch_size = 1");
        assert_eq!(text, expected + "\n[adapter]\nr = 8\n");
    }

    #[test]
    fn an_edited_recipe_says_what_the_settings_say() {
        let assignments = [
            "train.micro_batch_size=4",
            "adapter.layers=\"1-3\"",
            "data.0.path=other.jsonl",
            "train.seed=7",
            "model.base=smollm2:135m",
        ];
        let overrides: Vec<_> = assignments.iter().map(|a| Override::set(*a)).collect();
        let (set, written) = (
            parse("t", RECIPE, &overrides).expect("valid"),
            parse("t", &edited(&assignments), &[]).expect("valid"),
        );
        let values = |spec: &crate::RunSpec| -> Vec<_> {
            spec.lines().into_iter().map(|line| (line.path.clone(), line.value.clone())).collect()
        };
        assert_eq!(values(&set), values(&written));
    }

    #[test]
    fn inline_sections_are_edited_in_place() {
        let text = "model = { base = \"b\" }\ndata = [{ path = \"d\" }]\n";
        let assignments = ["model.base=\"c\"".to_owned(), "data.0.path=\"e\"".to_owned()];
        assert_eq!(
            edit("t", text, &assignments).expect("editable"),
            "model = { base = \"c\" }\ndata = [{ path = \"e\" }]\n"
        );
    }

    #[test]
    fn what_is_no_setting_is_an_error() {
        for wrong in ["seed", "seed=1", "trian.seed=1", "data.4.path=x", "train.x.seed=1"] {
            assert!(edit("t", RECIPE, &[wrong.to_owned()]).is_err(), "{wrong}");
        }
        assert!(edit("t", "[model", &[]).is_err());
    }
}
