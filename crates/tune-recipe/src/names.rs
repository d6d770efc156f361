//! Names of sections and keys: which exist, what other tools call them, and what was probably meant.

use serde::de::{self, Deserialize, Deserializer, Visitor};
use serde::forward_to_deserialize_any;

use crate::spec::{Adapter, Checkpoint, Data, DataOptions, Eval, Export, Memory, Model, Run, Samples, Train};

/// The sections of a recipe with their keys, in the order in which they are written.
pub fn sections() -> [(&'static str, &'static [&'static str]); 11] {
    [
        ("run", keys::<Run>()),
        ("model", keys::<Model>()),
        ("adapter", keys::<Adapter>()),
        ("data", keys::<Data>()),
        ("data_options", keys::<DataOptions>()),
        ("train", keys::<Train>()),
        ("memory", keys::<Memory>()),
        ("eval", keys::<Eval>()),
        ("checkpoint", keys::<Checkpoint>()),
        ("export", keys::<Export>()),
        ("samples", keys::<Samples>()),
    ]
}

/// Keys that may be `"auto"`.
pub(crate) const AUTO: [&str; 8] = [
    "model.dtype",
    "model.quantization",
    "adapter.lora_alpha",
    "train.micro_batch_size",
    "train.effective_batch_size",
    "train.gradient_accumulation_steps",
    "train.learning_rate",
    "train.gradient_checkpointing",
];

/// Names that other tools use: section, other name, our name.
const ALIASES: [(&str, &str, &str); 25] = [
    ("model", "base_model", "base"),
    ("model", "model_name_or_path", "base"),
    ("adapter", "lora_r", "r"),
    ("adapter", "lora_rank", "r"),
    ("adapter", "rank", "r"),
    ("adapter", "alpha", "lora_alpha"),
    ("adapter", "dropout", "lora_dropout"),
    ("adapter", "lora_target_modules", "target_modules"),
    ("adapter", "lora_target", "target_modules"),
    ("adapter", "layers_to_transform", "layers"),
    ("data_options", "max_seq_length", "sequence_len"),
    ("data_options", "max_length", "sequence_len"),
    ("data_options", "cutoff_len", "sequence_len"),
    ("data_options", "sample_packing", "packing"),
    ("data_options", "val_set_size", "val_split"),
    ("train", "per_device_train_batch_size", "micro_batch_size"),
    ("train", "batch_size", "micro_batch_size"),
    ("train", "num_train_epochs", "num_epochs"),
    ("train", "epochs", "num_epochs"),
    ("train", "lr_scheduler_type", "lr_scheduler"),
    ("train", "lr", "learning_rate"),
    ("train", "adam_eps", "adam_epsilon"),
    ("train", "optim", "optimizer"),
    ("train", "gradient_clipping", "max_grad_norm"),
    ("checkpoint", "save_limit", "save_total_limit"),
];

/// Our name of `key` of `section`, if `key` is what another tool calls it.
pub(crate) fn alias(section: &str, key: &str) -> Option<&'static str> {
    ALIASES.iter().find(|(s, other, _)| *s == section && *other == key).map(|(_, _, ours)| *ours)
}

/// What somebody who wrote the unknown `key` in `section` probably meant.
pub(crate) fn meant_key(section: &str, key: &str) -> Option<String> {
    let elsewhere = sections().into_iter().find_map(|(other, keys)| {
        let ours = keys.iter().find(|k| **k == key).copied().or_else(|| alias(other, key));
        ours.filter(|_| other != section).map(|ours| format!("`{ours}` belongs in {}", header(other)))
    });
    elsewhere.or_else(|| {
        let (_, keys) = sections().into_iter().find(|(name, _)| *name == section)?;
        let others = ALIASES.iter().filter(|(s, _, _)| *s == section).map(|(_, other, ours)| (*other, *ours));
        let near = nearest(key, keys.iter().map(|k| (*k, *k)).chain(others))?;
        Some(format!("did you mean `{near}`?"))
    })
}

/// What somebody who wrote the unknown `section` probably meant.
pub(crate) fn meant_section(section: &str) -> Option<String> {
    let key_of = sections().into_iter().find_map(|(name, keys)| {
        let ours = keys.iter().find(|k| **k == section).copied().or_else(|| alias(name, section))?;
        Some(format!("`{ours}` belongs in {}", header(name)))
    });
    key_of.or_else(|| {
        let near = nearest(section, sections().into_iter().map(|(name, _)| (name, name)))?;
        Some(format!("did you mean {}?", header(near)))
    })
}

/// The header of a section as it is written.
pub(crate) fn header(section: &str) -> String {
    if section == "data" { "[[data]]".into() } else { format!("[{section}]") }
}

/// The value beside the candidate nearest to `word`, if one is near enough to be what was meant.
pub(crate) fn nearest<'a>(
    word: &str,
    candidates: impl Iterator<Item = (&'a str, &'a str)>,
) -> Option<&'a str> {
    let word = word.to_lowercase();
    candidates
        .map(|(candidate, value)| (strsim::jaro_winkler(&word, candidate), value))
        .filter(|(score, _)| *score >= 0.8)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, value)| value)
}

/// The field names of a struct, as serde knows them: the derive hands them to `deserialize_struct`.
fn keys<T: for<'de> Deserialize<'de>>() -> &'static [&'static str] {
    struct Capture<'a>(&'a mut &'static [&'static str]);

    impl<'de> Deserializer<'de> for Capture<'_> {
        type Error = de::value::Error;

        fn deserialize_struct<V: Visitor<'de>>(
            self,
            _: &'static str,
            fields: &'static [&'static str],
            _: V,
        ) -> Result<V::Value, Self::Error> {
            *self.0 = fields;
            Err(de::Error::custom("only the names are wanted"))
        }

        fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Self::Error> {
            Err(de::Error::custom("a section is a struct"))
        }

        forward_to_deserialize_any! {
            bool i8 i16 i32 i64 u8 u16 u32 u64 f32 f64 char str string bytes byte_buf option unit unit_struct
            newtype_struct seq tuple tuple_struct map enum identifier ignored_any
        }
    }

    let mut fields: &'static [&'static str] = &[];
    let captured = T::deserialize(Capture(&mut fields));
    debug_assert!(captured.is_err());
    fields
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_alias_and_every_auto_names_a_key() {
        for (section, other, ours) in ALIASES {
            let (_, keys) = sections().into_iter().find(|(name, _)| *name == section).unwrap();
            assert!(keys.contains(&ours), "{section}.{ours}");
            assert!(!keys.contains(&other), "{section}.{other} is a key and an alias");
        }
        for path in AUTO {
            let (section, key) = path.split_once('.').unwrap();
            assert!(
                sections().into_iter().any(|(name, keys)| name == section && keys.contains(&key)),
                "{path}"
            );
        }
    }

    #[test]
    fn a_mistyped_or_misplaced_name_is_recognised() {
        assert_eq!(meant_key("train", "learning_rte").as_deref(), Some("did you mean `learning_rate`?"));
        assert_eq!(meant_key("train", "lora_alpha").as_deref(), Some("`lora_alpha` belongs in [adapter]"));
        assert_eq!(
            meant_key("train", "cutoff_len").as_deref(),
            Some("`sequence_len` belongs in [data_options]")
        );
        assert_eq!(meant_key("train", "zzz"), None);
        assert_eq!(meant_section("training").as_deref(), Some("did you mean [train]?"));
        assert_eq!(meant_section("learning_rate").as_deref(), Some("`learning_rate` belongs in [train]"));
    }
}
