//! Text of a recipe and overrides → [`RunSpec`], or all that is wrong with them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use miette::NamedSource;
use serde::de::DeserializeOwned;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use crate::check;
use crate::error::{Place, Problem, RecipeError};
use crate::names;
use crate::origin::Origin;
use crate::spec::{Data, RunSpec};

/// A value given on the command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Override {
    /// Path and value, `train.learning_rate=1e-4`.
    assignment: String,
    /// The flag it came from.
    flag: &'static str,
}

impl Override {
    /// From the argument of `--set`: `section.key=value`, the value in TOML or, where that fails, a plain
    /// string. An entry of `[[data]]` is `data.0.path`; the number may be left out when there is one entry.
    pub fn set(assignment: impl Into<String>) -> Self {
        Self { assignment: assignment.into(), flag: "--set" }
    }

    /// From a flag of its own, such as `--out`, whose value is a string.
    pub fn flag(flag: &'static str, path: &str, value: &str) -> Self {
        Self { assignment: format!("{path}={}", toml::Value::String(value.to_owned())), flag }
    }
}

/// Reads the recipe at `path` and applies `overrides` in order.
///
/// # Errors
/// [`RecipeError::Read`] when the file cannot be read, [`RecipeError::Invalid`] with every problem otherwise.
pub fn load(path: &Path, overrides: &[Override]) -> Result<RunSpec, RecipeError> {
    let text = std::fs::read_to_string(path)
        .map_err(|source| RecipeError::Read { path: path.to_owned(), source })?;
    let mut spec = parse(&path.to_string_lossy(), &text, overrides)?;
    if let Some(folder) = path.parent() {
        find_beside(folder, &mut spec);
    }
    Ok(spec)
}

/// Reads a recipe from `text`; `name` stands for its path in messages and names the run.
///
/// # Errors
/// [`RecipeError::Invalid`] with every problem.
pub fn parse(name: &str, text: &str, overrides: &[Override]) -> Result<RunSpec, RecipeError> {
    let mut reader = Reader::default();
    let mut spec = reader.read(name, text, overrides);
    if reader.is_broken {
        // Half a document would only add problems that are not there.
        return Err(RecipeError::Invalid { name: name.to_owned(), problems: reader.problems });
    }
    if spec.run.name.is_empty() && !spec.origins.is_written("run.name") {
        let stem = Path::new(name).file_stem().map(|stem| stem.to_string_lossy().into_owned());
        spec.run.name = stem.unwrap_or_else(|| "run".into());
        spec.origins.set("run.name", Origin::Auto("from the recipe's file name".into()));
    }
    if !spec.origins.is_written("run.out") {
        spec.run.out = Path::new("runs").join(&spec.run.name);
        spec.origins.set("run.out", Origin::Auto("from the run's name".into()));
    }
    // Ranges are checked even when a key was unknown: the user sees all problems in one go.
    check::check(&spec, &mut |path, problem| {
        if !reader.unusable.contains(path) {
            let place = reader.places.get(path).cloned();
            reader.problems.push(problem.at(place));
        }
    });
    if let Err(problem) = spec.derive(None) {
        let place = reader.places.get("train.effective_batch_size").cloned();
        reader.problems.push(problem.at(place));
    }
    if reader.problems.is_empty() {
        return Ok(spec);
    }
    reader.problems.sort_by_key(Problem::offset);
    Err(RecipeError::Invalid { name: name.to_owned(), problems: reader.problems })
}

/// Files that are not in the working directory but beside the recipe are taken from there.
fn find_beside(folder: &Path, spec: &mut RunSpec) {
    let find = |path: &mut PathBuf| {
        let beside = folder.join(&*path);
        if path.is_relative() && !path.exists() && beside.exists() {
            *path = beside;
        }
    };
    spec.data.iter_mut().for_each(|data| find(&mut data.path));
    spec.adapter.init_adapter.as_mut().map(find);
    let mut base = PathBuf::from(&spec.model.base);
    find(&mut base);
    spec.model.base = base.to_string_lossy().into_owned();
}

/// One `key = value`.
struct Entry<'t> {
    key: Spanned<String>,
    value: Spanned<DeValue<'t>>,
    source_code: NamedSource<Arc<str>>,
    origin: Origin,
}

impl Entry<'_> {
    fn key_place(&self) -> Place {
        Place { source_code: self.source_code.clone(), span: self.key.span().into() }
    }

    fn value_place(&self) -> Place {
        Place { source_code: self.source_code.clone(), span: self.value.span().into() }
    }
}

/// Entries of one section, in the order written.
type Section<'t> = Vec<Entry<'t>>;

#[derive(Default)]
struct Reader {
    problems: Vec<Problem>,
    notes: Vec<String>,
    /// Where each written value stands.
    places: BTreeMap<String, Place>,
    /// Written values of a wrong type.
    unusable: BTreeSet<String>,
    /// The text is not TOML.
    is_broken: bool,
}

impl Reader {
    fn read(&mut self, name: &str, text: &str, overrides: &[Override]) -> RunSpec {
        let source_code = NamedSource::new(name, Arc::<str>::from(text));
        let (table, errors) = DeTable::parse_recoverable(text);
        self.is_broken = !errors.is_empty();
        for error in errors {
            let place =
                error.span().map(|span| Place { source_code: source_code.clone(), span: span.into() });
            self.problems.push(Problem::new(format!("not TOML: {}", error.message())).at(place));
        }
        let (mut sections, mut data) = self.split(table.into_inner(), &source_code);
        for o in overrides {
            self.apply(o, &mut sections, &mut data);
        }

        let mut spec = RunSpec::default();
        let mut take = |name: &str| sections.remove(name).unwrap_or_default();
        spec.run = self.section("run", "run", take("run"), &mut spec.origins);
        spec.model = self.section("model", "model", take("model"), &mut spec.origins);
        spec.adapter = self.section("adapter", "adapter", take("adapter"), &mut spec.origins);
        for (i, entries) in data.into_iter().enumerate() {
            let data: Data = self.section("data", &format!("data.{i}"), entries, &mut spec.origins);
            spec.data.push(data);
        }
        spec.data_options =
            self.section("data_options", "data_options", take("data_options"), &mut spec.origins);
        spec.train = self.section("train", "train", take("train"), &mut spec.origins);
        spec.memory = self.section("memory", "memory", take("memory"), &mut spec.origins);
        spec.eval = self.section("eval", "eval", take("eval"), &mut spec.origins);
        spec.checkpoint = self.section("checkpoint", "checkpoint", take("checkpoint"), &mut spec.origins);
        spec.export = self.section("export", "export", take("export"), &mut spec.origins);
        spec.samples = self.section("samples", "samples", take("samples"), &mut spec.origins);
        spec.notes = std::mem::take(&mut self.notes);
        spec
    }

    /// Sorts a document into its sections. `[[data]]` entries are kept apart, in order.
    fn split<'t>(
        &mut self,
        table: DeTable<'t>,
        source_code: &NamedSource<Arc<str>>,
    ) -> (BTreeMap<String, Section<'t>>, Vec<Section<'t>>) {
        let mut sections = BTreeMap::new();
        let mut data = Vec::new();
        let entries = |table: DeTable<'t>| -> Section<'t> {
            let entry = |(key, value): (Spanned<_>, _)| {
                let span = key.span();
                let key: String = std::borrow::Cow::into_owned(key.into_inner());
                let key = Spanned::new(span, key);
                Entry { key, value, source_code: source_code.clone(), origin: Origin::Recipe }
            };
            table.into_iter().map(entry).collect()
        };
        for (name, value) in table {
            let name_place = Place { source_code: source_code.clone(), span: name.span().into() };
            let value_place = Place { source_code: source_code.clone(), span: value.span().into() };
            let name = name.into_inner();
            match (&*name, value.into_inner()) {
                ("version", DeValue::Integer(n)) if n.as_str() == "1" => {}
                ("version", _) => self.problems.push(
                    Problem::new("unknown version of the recipe format")
                        .label("this `tune` reads version 1")
                        .at(Some(value_place)),
                ),
                ("data", DeValue::Array(array)) => {
                    for item in array {
                        match item.into_inner() {
                            DeValue::Table(table) => data.push(entries(table)),
                            _ => self.problems.push(
                                Problem::new("each entry of `data` is a table")
                                    .help("write [[data]] and, below it, path = \"file.jsonl\"")
                                    .at(Some(value_place.clone())),
                            ),
                        }
                    }
                }
                ("data", DeValue::Table(table)) => {
                    self.notes.push("[data] is read as one [[data]] entry".into());
                    data.push(entries(table));
                }
                (section, DeValue::Table(table)) if names::sections().iter().any(|(n, _)| *n == section) => {
                    sections.insert(section.to_owned(), entries(table));
                }
                (section, _) if names::sections().iter().any(|(n, _)| *n == section) => self.problems.push(
                    Problem::new(format!("`{section}` is a section, not a value"))
                        .help(format!("write {} on a line of its own", names::header(section)))
                        .at(Some(name_place)),
                ),
                (section, DeValue::Table(_)) => self.problems.push(
                    Problem::new(format!("unknown section [{section}]"))
                        .maybe_help(names::meant_section(section))
                        .label("unknown")
                        .at(Some(name_place)),
                ),
                (key, _) => self.problems.push(
                    Problem::new(format!("`{key}` stands outside of any section"))
                        .maybe_help(names::meant_section(key))
                        .label("unknown")
                        .at(Some(name_place)),
                ),
            }
        }
        (sections, data)
    }

    /// Puts one command-line value over what the recipe says.
    fn apply<'t>(
        &mut self,
        o: &'t Override,
        sections: &mut BTreeMap<String, Section<'t>>,
        data: &mut Vec<Section<'t>>,
    ) {
        let text: &'t str = &o.assignment;
        let source_code = NamedSource::new(o.flag, Arc::<str>::from(text));
        let all = Place { source_code: source_code.clone(), span: (0, text.len()).into() };
        let Some((path, value)) = text.split_once('=') else {
            let problem = Problem::new("expected section.key=value").at(Some(all));
            return self.problems.push(problem.help("for example: --set train.learning_rate=1e-4"));
        };
        let Some((section, key)) = path.trim().rsplit_once('.') else {
            let help = names::meant_section(path.trim()).unwrap_or("for example: --set train.seed=7".into());
            return self
                .problems
                .push(Problem::new(format!("`{}` has no section", path.trim())).help(help).at(Some(all)));
        };
        let entries = match section.strip_prefix("data").map(|rest| rest.strip_prefix('.').unwrap_or(rest)) {
            Some(index) if !section.starts_with("data_") => {
                if index.is_empty() && data.is_empty() {
                    data.push(Section::new());
                }
                let count = data.len();
                let index = if index.is_empty() && count == 1 { Some(0) } else { index.parse().ok() };
                let Some(entries) = index.and_then(|i: usize| data.get_mut(i)) else {
                    let problem = Problem::new(format!("`{section}` names none of the {count} data entries"));
                    let help = format!("count from 0: data.0.{key}");
                    return self.problems.push(problem.help(help).at(Some(all)));
                };
                entries
            }
            _ if names::sections().iter().any(|(name, _)| *name == section) => {
                sections.entry(section.to_owned()).or_default()
            }
            _ => {
                return self.problems.push(
                    Problem::new(format!("unknown section [{section}]"))
                        .maybe_help(names::meant_section(section))
                        .at(Some(all)),
                );
            }
        };
        let section = if section.starts_with("data.") { "data" } else { section };
        let start = path.len() + 1;
        let value = match DeValue::parse(value.trim()) {
            Ok(parsed) => parsed.into_inner(),
            Err(_) => DeValue::String(value.trim().into()),
        };
        let ours = names::alias(section, key).unwrap_or(key);
        entries.retain(|e| e.key.get_ref() != ours && names::alias(section, e.key.get_ref()) != Some(ours));
        let key_start = path.find(key).unwrap_or(0);
        entries.push(Entry {
            key: Spanned::new(key_start..key_start + key.len(), key.to_owned()),
            value: Spanned::new(start..text.len(), value),
            source_code,
            origin: Origin::CommandLine(o.flag),
        });
    }

    /// Reads the entries of one section, each on its own so that one bad value does not hide the next.
    fn section<T: DeserializeOwned + Default>(
        &mut self,
        section: &str,
        path: &str,
        entries: Section<'_>,
        origins: &mut crate::origin::Origins,
    ) -> T {
        let known = names::sections().into_iter().find(|(name, _)| *name == section).map_or(&[][..], |s| s.1);
        let mut good = DeTable::new();
        for entry in entries {
            let written = entry.key.get_ref();
            let key = match names::alias(section, written) {
                Some(ours) => {
                    self.notes.push(format!("{path}.{written} is read as {path}.{ours}"));
                    ours
                }
                None => written,
            };
            if !known.contains(&key) {
                self.problems.push(
                    Problem::new(format!("unknown key `{key}` in {}", names::header(section)))
                        .help(
                            names::meant_key(section, key)
                                .unwrap_or_else(|| format!("known keys: {}", known.join(", "))),
                        )
                        .label("unknown")
                        .at(Some(entry.key_place())),
                );
                continue;
            }
            let full = format!("{path}.{key}");
            let may_be_auto = names::AUTO.contains(&&*full);
            if may_be_auto && entry.value.get_ref().as_str() == Some("auto") {
                continue;
            }
            if good.keys().any(|k| k.get_ref() == key) {
                let problem = Problem::new(format!("`{full}` is given twice"));
                let help = format!("`{written}` is another name of `{key}`: keep one");
                self.problems.push(problem.help(help).at(Some(entry.key_place())));
                continue;
            }
            match single::<T>(key, &entry) {
                Ok(value) => {
                    good.insert(Spanned::new(entry.key.span(), key.to_owned().into()), value);
                    origins.set(&full, entry.origin.clone());
                    self.places.insert(full, entry.value_place());
                }
                Err(error) => {
                    let problem = wrong_value(&full, &error, may_be_auto);
                    self.problems.push(problem.at(Some(entry.value_place())));
                    self.unusable.insert(full);
                }
            }
        }
        deserialize(good).unwrap_or_else(|error| {
            self.problems.push(Problem::new(format!("{}: {}", names::header(section), error.message())));
            T::default()
        })
    }
}

/// The value of `entry` if `T` accepts it for `key`. A value from the command line that is no TOML of the
/// wanted type is tried as a plain string too: `--set run.name=42`.
fn single<'t, T: DeserializeOwned>(
    key: &str,
    entry: &Entry<'t>,
) -> Result<Spanned<DeValue<'t>>, toml::de::Error> {
    let try_value = |value: Spanned<DeValue<'t>>| {
        let mut table = DeTable::new();
        table.insert(Spanned::new(entry.key.span(), key.to_owned().into()), value);
        deserialize::<T>(table)
    };
    match try_value(entry.value.clone()) {
        Ok(_) => Ok(entry.value.clone()),
        Err(error) => {
            let text = entry.source_code.inner().get(entry.value.span()).unwrap_or_default().trim();
            let string = Spanned::new(entry.value.span(), DeValue::String(text.to_owned().into()));
            let from_command_line = matches!(entry.origin, Origin::CommandLine(_));
            if from_command_line && try_value(string.clone()).is_ok() { Ok(string) } else { Err(error) }
        }
    }
}

fn deserialize<T: DeserializeOwned>(table: DeTable<'_>) -> Result<T, toml::de::Error> {
    T::deserialize(toml::Deserializer::from(Spanned::new(0..0, table)))
}

/// Serde's message in the words of a recipe.
fn wrong_value(path: &str, error: &toml::de::Error, may_be_auto: bool) -> Problem {
    let mut message = error.message().to_owned();
    for (rust, plain) in [
        ("expected usize", "expected a whole number"),
        ("expected u64", "expected a whole number"),
        ("expected u32", "expected a whole number"),
        ("expected f64", "expected a number"),
        ("expected a boolean", "expected true or false"),
        ("expected a sequence", "expected a list"),
        ("expected path string", "expected a path"),
        ("unknown variant", "unknown value"),
    ] {
        message = message.replace(rust, plain);
    }
    if may_be_auto {
        message.push_str(", or \"auto\"");
    }
    // "unknown value `cosin`, expected one of `cosine`, `linear`": the words in backticks after the first.
    let mut quoted = message.split('`').skip(1).step_by(2);
    let meant = quoted.next().and_then(|got| names::nearest(got, quoted.map(|w| (w, w))));
    let help = meant.map(|meant| format!("did you mean \"{meant}\"?"));
    Problem::new(format!("{path}: {message}")).maybe_help(help)
}
