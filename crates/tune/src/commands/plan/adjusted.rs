//! `tune plan RECIPE --fit`: the recipe with the changes that make it fit.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use miette::IntoDiagnostic;
use tune_plan::Answer;
use tune_recipe::RunSpec;

use super::subject::{self, Subject};
use super::{Args, Target};
use crate::exit::{DOES_NOT_FIT, UsageError};

/// Writes the adjusted recipe, with what `--set` says in it, after planning it once more as it was written.
pub fn write(
    recipe: &Path,
    args: &Args,
    spec: &RunSpec,
    subject: &Subject,
    target: &Target,
    answer: &Answer,
) -> miette::Result<ExitCode> {
    let settings = match (answer.plan.fits, answer.ways.first()) {
        (Some(true), _) => Vec::new(),
        (Some(false), Some(way)) => way.settings.clone(),
        (Some(false), None) => {
            eprintln!("not written: no change of this recipe is enough");
            return Ok(ExitCode::from(DOES_NOT_FIT));
        }
        (None, _) => {
            return Err(UsageError::report(
                "--fit: this system does not tell how much memory is usable",
                "say what to fit into: --device 8GiB",
            ));
        }
    };
    let out = args.out.clone().unwrap_or_else(|| beside(recipe));
    if args.out.is_none() && out.exists() {
        return Err(UsageError::report(
            format!("{} exists already", out.display()),
            format!("name it to overwrite it: --out {}", out.display()),
        ));
    }
    let text = std::fs::read_to_string(recipe).into_diagnostic()?;
    let moved = moved_paths(recipe, &out, spec);
    let assignments: Vec<String> = args.set.iter().cloned().chain(moved).chain(settings.clone()).collect();
    let text = tune_recipe::edit(&recipe.to_string_lossy(), &text, &assignments)?;
    check(&out, &text, subject, target)?;
    std::fs::write(&out, text)
        .into_diagnostic()
        .map_err(|error| error.wrap_err(format!("cannot write {}", out.display())))?;
    for setting in &settings {
        eprintln!("changed     {setting}");
    }
    if settings.is_empty() {
        eprintln!("unchanged   it fits as it is");
    }
    eprintln!("wrote       {}", out.display());
    Ok(ExitCode::SUCCESS)
}

/// `code.toml` becomes `code-fit.toml`.
fn beside(recipe: &Path) -> PathBuf {
    let stem = recipe.file_stem().unwrap_or_default().to_string_lossy();
    recipe.with_file_name(format!("{stem}-fit.toml"))
}

/// Files that a recipe in another folder would no longer find beside it.
fn moved_paths(recipe: &Path, out: &Path, spec: &RunSpec) -> Vec<String> {
    let folder = |path: &Path| path.parent().map(Path::to_path_buf).unwrap_or_default();
    if folder(recipe) == folder(out) {
        return Vec::new();
    }
    let beside = |path: &Path| path.is_relative() && path.starts_with(folder(recipe)) && path.exists();
    let quoted = |path: &Path| toml::Value::String(path.to_string_lossy().into_owned());
    let data = spec.data.iter().enumerate().filter(|(_, data)| beside(&data.path));
    let mut moved: Vec<String> =
        data.map(|(i, data)| format!("data.{i}.path={}", quoted(&data.path))).collect();
    if beside(Path::new(&spec.model.base)) {
        moved.push(format!("model.base={}", quoted(Path::new(&spec.model.base))));
    }
    moved
}

/// Plans the text that is about to be written: what does not fit is never called fitting.
fn check(out: &Path, text: &str, subject: &Subject, target: &Target) -> miette::Result<()> {
    let mut spec = tune_recipe::parse(&out.to_string_lossy(), text, &[])?;
    spec.prefer_dtype(target.dtype);
    let other;
    let subject = match tune_plan::find_in_catalogue(&spec.model.base) {
        Some(model) if subject.base.is_none() || model.name != subject.name => {
            other = subject::find(&spec.model.base)?;
            &other
        }
        _ => subject,
    };
    if let Some(facts) = &subject.facts {
        spec.refine(facts)?;
    }
    let plan = subject.question(&spec, target)?.plan();
    if plan.fits == Some(true) {
        return Ok(());
    }
    Err(miette::miette!(
        help = "this is a mistake of tune plan: please report it with the recipe",
        "the adjusted recipe would still not fit"
    ))
}
