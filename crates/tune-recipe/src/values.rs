//! Option values with a spelling of their own: `"all-linear"`, `"8-23"`, `"6 GiB"`.

use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// Linear layers that get an adapter.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub enum TargetModules {
    /// `"all-linear"`: every linear layer of the blocks, not the output head.
    #[default]
    AllLinear,
    /// The named ones, e.g. `["q_proj", "v_proj"]`.
    Names(Vec<String>),
}

impl TargetModules {
    /// Whether the linear layer called `name` (`q_proj`) gets an adapter.
    pub fn contains(&self, name: &str) -> bool {
        match self {
            Self::AllLinear => true,
            Self::Names(names) => names.iter().any(|n| n == name),
        }
    }
}

impl Serialize for TargetModules {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::AllLinear => serializer.serialize_str("all-linear"),
            Self::Names(names) => names.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for TargetModules {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        const EXPECTED: &str = "\"all-linear\" or a list such as [\"q_proj\", \"v_proj\"]";
        match StringOr::deserialize(deserializer, EXPECTED)? {
            StringOr::String(s) if s == "all-linear" => Ok(Self::AllLinear),
            StringOr::String(s) => Err(de::Error::custom(format!("expected {EXPECTED}, got {s:?}"))),
            StringOr::Strings(names) => Ok(Self::Names(names)),
            StringOr::Integers(list) if list.is_empty() => {
                Err(de::Error::custom(format!("expected {EXPECTED}, got an empty list")))
            }
            StringOr::Integers(_) | StringOr::Integer(_) => {
                Err(de::Error::custom(format!("expected {EXPECTED}, got a number")))
            }
        }
    }
}

/// Blocks that get adapters, counted from 0.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub enum Layers {
    /// `"all"`.
    #[default]
    All,
    /// `[0, 5, 9]`, or `"8-23"` with both ends included.
    Only(Vec<usize>),
}

impl Layers {
    /// Whether block `layer` gets adapters.
    pub fn contains(&self, layer: usize) -> bool {
        match self {
            Self::All => true,
            Self::Only(layers) => layers.contains(&layer),
        }
    }
}

impl Serialize for Layers {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::All => serializer.serialize_str("all"),
            Self::Only(layers) => layers.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for Layers {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        const EXPECTED: &str = "\"all\", a range such as \"8-23\", or a list such as [0, 1, 2]";
        /// Above any real model's depth, and small enough that a mistyped range cannot fill memory.
        const MOST: i64 = 10_000;
        let wrong = |got: String| de::Error::custom(format!("expected {EXPECTED}, got {got}"));
        match StringOr::deserialize(deserializer, EXPECTED)? {
            StringOr::String(s) if s == "all" => Ok(Self::All),
            StringOr::String(s) => {
                let ends = s.split_once('-').and_then(|(first, last)| {
                    Some((first.trim().parse::<usize>().ok()?, last.trim().parse::<usize>().ok()?))
                });
                match ends {
                    Some((first, last)) if first <= last && last < MOST as usize => {
                        Ok(Self::Only((first..=last).collect()))
                    }
                    _ => Err(wrong(format!("{s:?}"))),
                }
            }
            StringOr::Integers(layers) => {
                if let Some(bad) = layers.iter().find(|&&l| !(0..MOST).contains(&l)) {
                    return Err(wrong(bad.to_string()));
                }
                if layers.is_empty() {
                    return Err(wrong("an empty list".into()));
                }
                let mut layers: Vec<usize> = layers.into_iter().map(|l| l as usize).collect();
                layers.sort_unstable();
                layers.dedup();
                Ok(Self::Only(layers))
            }
            StringOr::Integer(n) => Err(wrong(n.to_string())),
            StringOr::Strings(_) => Err(wrong("a list of strings".into())),
        }
    }
}

/// Memory that a run may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Budget {
    /// What the machine reports as usable.
    #[default]
    Auto,
    /// So many bytes.
    Bytes(u64),
}

impl Serialize for Budget {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Auto => serializer.serialize_str("auto"),
            Self::Bytes(bytes) => serializer.serialize_u64(*bytes),
        }
    }
}

impl<'de> Deserialize<'de> for Budget {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        const EXPECTED: &str = "\"auto\", a size such as \"6 GiB\" or \"8 GB\", or a number of bytes";
        let wrong = |got: String| de::Error::custom(format!("expected {EXPECTED}, got {got}"));
        match StringOr::deserialize(deserializer, EXPECTED)? {
            StringOr::String(s) if s == "auto" => Ok(Self::Auto),
            StringOr::String(s) => match parse_bytes(&s) {
                Some(bytes) => Ok(Self::Bytes(bytes)),
                None => Err(wrong(format!("{s:?}"))),
            },
            StringOr::Integer(n) if n > 0 => Ok(Self::Bytes(n as u64)),
            StringOr::Integer(n) => Err(wrong(n.to_string())),
            StringOr::Strings(_) | StringOr::Integers(_) => Err(wrong("a list".into())),
        }
    }
}

/// Bytes of a size as people write it: `"6 GiB"`, `"8GB"`, `"512 MiB"`, `"6442450944"`. `None` for anything
/// else, zero included.
pub fn parse_bytes(text: &str) -> Option<u64> {
    let text = text.trim();
    let split = text.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let scale: u64 = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "kb" => 1_000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "tb" => 1_000_000_000_000,
        "kib" => 1 << 10,
        "mib" => 1 << 20,
        "gib" => 1 << 30,
        "tib" => 1 << 40,
        _ => return None,
    };
    let bytes = if let Ok(whole) = number.parse::<u64>() {
        whole.checked_mul(scale)?
    } else {
        // A float to integer cast saturates.
        (number.parse::<f64>().ok()? * scale as f64) as u64
    };
    // TOML integers are signed.
    (1..=i64::MAX as u64).contains(&bytes).then_some(bytes)
}

/// Where a run continues from.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub enum Resume {
    /// The newest checkpoint of the run folder, if there is one.
    #[default]
    Auto,
    /// From the start.
    Never,
    /// The checkpoint in this folder.
    Path(PathBuf),
}

impl From<&str> for Resume {
    fn from(text: &str) -> Self {
        match text {
            "auto" => Self::Auto,
            "never" => Self::Never,
            path => Self::Path(path.into()),
        }
    }
}

impl Serialize for Resume {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Auto => serializer.serialize_str("auto"),
            Self::Never => serializer.serialize_str("never"),
            Self::Path(path) => path.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for Resume {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(Self::from(String::deserialize(deserializer)?.as_str()))
    }
}

/// A value that is a word or something structured.
enum StringOr {
    String(String),
    Integer(i64),
    Strings(Vec<String>),
    Integers(Vec<i64>),
}

impl StringOr {
    fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
        expected: &'static str,
    ) -> Result<Self, D::Error> {
        struct Visitor(&'static str);

        impl<'de> de::Visitor<'de> for Visitor {
            type Value = StringOr;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.0)
            }

            fn visit_str<E: de::Error>(self, s: &str) -> Result<StringOr, E> {
                Ok(StringOr::String(s.into()))
            }

            fn visit_i64<E: de::Error>(self, n: i64) -> Result<StringOr, E> {
                Ok(StringOr::Integer(n))
            }

            fn visit_u64<E: de::Error>(self, n: u64) -> Result<StringOr, E> {
                i64::try_from(n)
                    .map(StringOr::Integer)
                    .map_err(|_| E::invalid_value(de::Unexpected::Unsigned(n), &self))
            }

            fn visit_seq<A: de::SeqAccess<'de>>(self, mut seq: A) -> Result<StringOr, A::Error> {
                #[derive(Deserialize)]
                #[serde(untagged)]
                enum Item {
                    Integer(i64),
                    String(String),
                }
                let mut strings = Vec::new();
                let mut integers = Vec::new();
                while let Some(item) = seq.next_element()? {
                    match item {
                        Item::Integer(n) => integers.push(n),
                        Item::String(s) => strings.push(s),
                    }
                }
                match (strings.is_empty(), integers.is_empty()) {
                    (true, _) => Ok(StringOr::Integers(integers)),
                    (false, true) => Ok(StringOr::Strings(strings)),
                    (false, false) => {
                        Err(de::Error::custom(format!("expected {}, got a mixed list", self.0)))
                    }
                }
            }
        }

        deserializer.deserialize_any(Visitor(expected))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_people_write_them() {
        assert_eq!(parse_bytes("6 GiB"), Some(6 << 30));
        assert_eq!(parse_bytes("8GB"), Some(8_000_000_000));
        assert_eq!(parse_bytes("1.5 gib"), Some(3 << 29));
        assert_eq!(parse_bytes("123"), Some(123));
        for bad in ["", "GB", "6 pints", "-1 GB", "0 GB", "1e30 GB", "99999999999 TiB", "8388608 TiB"] {
            assert_eq!(parse_bytes(bad), None, "{bad:?}");
        }
    }
}
