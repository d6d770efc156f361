//! Values that have the right type and still cannot be run.

use crate::error::Problem;
use crate::spec::RunSpec;

/// Hands every problem of `spec` to `report` with the path of the value.
pub(crate) fn check(spec: &RunSpec, report: &mut dyn FnMut(&str, Problem)) {
    let mut require = |path: &str, holds: bool, expected: &str, got: String| {
        if !holds {
            report(path, Problem::new(format!("{path}: expected {expected}, got {got}")));
        }
    };
    let a = &spec.adapter;
    require("adapter.r", (1..=4096).contains(&a.r), "a rank from 1 to 4096", a.r.to_string());
    require("adapter.lora_alpha", positive(a.lora_alpha), "a number above 0", a.lora_alpha.to_string());
    require(
        "adapter.lora_dropout",
        share(a.lora_dropout),
        "a share from 0 up to 1",
        a.lora_dropout.to_string(),
    );

    let d = &spec.data_options;
    require("data_options.sequence_len", d.sequence_len >= 2, "2 tokens or more", d.sequence_len.to_string());
    require("data_options.val_split", share(d.val_split), "a share from 0 up to 1", d.val_split.to_string());

    let t = &spec.train;
    let at_least_one = |n: usize| n >= 1;
    require("train.num_epochs", positive(t.num_epochs), "a number above 0", t.num_epochs.to_string());
    require("train.max_steps", t.max_steps.is_none_or(at_least_one), "1 or more", "0".into());
    require("train.micro_batch_size", at_least_one(t.micro_batch_size), "1 or more", "0".into());
    require("train.effective_batch_size", at_least_one(t.effective_batch_size), "1 or more", "0".into());
    let accumulation = t.gradient_accumulation_steps;
    require("train.gradient_accumulation_steps", at_least_one(accumulation), "1 or more", "0".into());
    require(
        "train.learning_rate",
        positive(t.learning_rate),
        "a number above 0",
        t.learning_rate.to_string(),
    );
    let warmup = t.warmup_ratio;
    require("train.warmup_ratio", (0.0..=1.0).contains(&warmup), "a share from 0 to 1", warmup.to_string());
    require("train.weight_decay", not_negative(t.weight_decay), "0 or more", t.weight_decay.to_string());
    require("train.adam_beta1", share(t.adam_beta1), "a number from 0 up to 1", t.adam_beta1.to_string());
    require("train.adam_beta2", share(t.adam_beta2), "a number from 0 up to 1", t.adam_beta2.to_string());
    require("train.adam_epsilon", positive(t.adam_epsilon), "a number above 0", t.adam_epsilon.to_string());
    require("train.max_grad_norm", not_negative(t.max_grad_norm), "0 or more", t.max_grad_norm.to_string());
    require("train.logging_steps", at_least_one(t.logging_steps), "1 or more", "0".into());

    let patience = spec.eval.early_stopping_patience;
    require("eval.early_stopping_patience", patience.is_none_or(at_least_one), "1 or more", "0".into());
    let limit = spec.checkpoint.save_total_limit;
    require("checkpoint.save_total_limit", at_least_one(limit), "1 or more", "0".into());
    let least = spec.export.min_retention;
    require("export.min_retention", least <= 1.0, "a share of 1 at most", least.to_string());
    require("samples.max_tokens", at_least_one(spec.samples.max_tokens), "1 or more", "0".into());

    let name = &spec.run.name;
    let is_a_name = !name.is_empty() && !name.contains(['/', '\\']) && name != "." && name != "..";
    require("run.name", is_a_name, "a name without slashes", format!("{name:?}"));
    let patience_without_validation = patience.is_some() && d.val_split == 0.0;
    let got = "data_options.val_split = 0".into();
    require(
        "eval.early_stopping_patience",
        !patience_without_validation,
        "rows held out to validate on",
        got,
    );

    for (i, target) in spec.export.targets.iter().enumerate() {
        let (kind, rest) = target.split_once(':').map_or((target.as_str(), None), |(k, r)| (k, Some(r)));
        let known = match kind {
            "gguf-lora" | "peft" | "safetensors" => rest.is_none(),
            "gguf" | "ollama" => rest.is_some_and(|rest| !rest.is_empty()),
            _ => false,
        };
        let expected = "gguf-lora, gguf:TYPE, peft, safetensors or ollama:NAME";
        if !known {
            let message = format!("export.targets: entry {}: expected {expected}, got {target:?}", i + 1);
            report("export.targets", Problem::new(message));
        }
    }

    if spec.model.base.is_empty() {
        report(
            "model.base",
            Problem::new("model.base is missing").help(
                "name the model to start from: [model] base = \"smollm2:135m\", a folder, or a .gguf file",
            ),
        );
    }
    if spec.data.is_empty() {
        report(
            "data",
            Problem::new("there is no [[data]] entry")
                .help("add [[data]] and, below it, path = \"file.jsonl\""),
        );
    }
    for (i, data) in spec.data.iter().enumerate() {
        if data.path.as_os_str().is_empty() {
            report(&format!("data.{i}.path"), Problem::new(format!("data.{i}.path is missing")));
        }
    }
}

fn positive(x: f64) -> bool {
    x > 0.0 && x.is_finite()
}

fn not_negative(x: f64) -> bool {
    x >= 0.0 && x.is_finite()
}

/// In `[0, 1)`.
fn share(x: f64) -> bool {
    (0.0..1.0).contains(&x)
}
