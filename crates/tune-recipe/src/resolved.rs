//! [`RunSpec`] → text: every value with its origin, in a form that [`parse`](crate::parse) reads again.

use std::fmt::Write as _;

use serde::Serialize;
use toml::{Table, Value};

use crate::names;
use crate::origin::Origin;
use crate::spec::RunSpec;

/// One resolved value.
#[derive(Clone, Debug, PartialEq)]
pub struct Line<'a> {
    /// `train.learning_rate`, `data.0.path`.
    pub path: String,
    /// The value.
    pub value: Value,
    /// Where it comes from.
    pub origin: &'a Origin,
}

impl RunSpec {
    /// Every value in the order of the sections.
    pub fn lines(&self) -> Vec<Line<'_>> {
        let mut lines = Vec::new();
        self.for_each_section(|_, path, table| {
            for (key, value) in table {
                let path = format!("{path}.{key}");
                let origin = self.origins.get(&path);
                lines.push(Line { path, value, origin });
            }
        });
        lines
    }

    /// The whole run as a recipe, each value followed by its origin. Reading it back gives the same values.
    pub fn to_toml(&self) -> String {
        let mut text = String::from(
            "# Every value of this run, and where it came from. `tune train` reads this file.\nversion = 1\n",
        );
        self.for_each_section(|section, path, table| {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "\n{}", names::header(section));
            for (key, value) in table {
                let origin = self.origins.get(&format!("{path}.{key}"));
                let _ = writeln!(text, "{key} = {value}  # {origin}");
            }
        });
        text
    }

    fn for_each_section(&self, mut f: impl FnMut(&'static str, &str, Table)) {
        f("run", "run", table(&self.run));
        f("model", "model", table(&self.model));
        f("adapter", "adapter", table(&self.adapter));
        for (i, data) in self.data.iter().enumerate() {
            f("data", &format!("data.{i}"), table(data));
        }
        f("data_options", "data_options", table(&self.data_options));
        f("train", "train", table(&self.train));
        f("memory", "memory", table(&self.memory));
        f("eval", "eval", table(&self.eval));
        f("checkpoint", "checkpoint", table(&self.checkpoint));
        f("export", "export", table(&self.export));
        f("samples", "samples", table(&self.samples));
    }
}

/// A section as a table. Every field of every section is a TOML value: the one exception, a path that is not
/// UTF-8, cannot come out of a recipe, which is UTF-8 itself.
fn table<T: Serialize>(section: &T) -> Table {
    Table::try_from(section).unwrap_or_default()
}
