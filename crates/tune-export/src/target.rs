//! What a run can be exported to.

use std::fmt;
use std::str::FromStr;

use tune_quant::BlockType;

use crate::{ExportError, FileType};

/// What a run can be exported to, as written after `--to`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExportTarget {
    /// `gguf-lora`: the adapter alone, for llama.cpp and Ollama over the unchanged base.
    GgufLora,
    /// `gguf:TYPE`: base and adapter merged into one GGUF file whose matrices have this type or mix of types.
    Gguf(FileType),
    /// `peft`: the adapter alone, as a PEFT folder.
    Peft,
    /// `safetensors`: base and adapter merged into a folder in Hugging Face layout.
    Safetensors,
}

impl ExportTarget {
    /// Every target that can be written.
    pub fn all() -> impl Iterator<Item = Self> {
        [Self::GgufLora, Self::Peft, Self::Safetensors].into_iter().chain(FileType::ALL.map(Self::Gguf))
    }

    /// Whether the result is a folder.
    pub fn is_folder(self) -> bool {
        matches!(self, Self::Peft | Self::Safetensors)
    }

    /// File or folder name for a model called `name`, where the user gives only a directory.
    pub fn file_name(self, name: &str) -> String {
        match self {
            Self::GgufLora => format!("{name}.lora.gguf"),
            Self::Gguf(file_type) => format!("{name}.{file_type}.gguf"),
            Self::Peft => format!("{name}-adapter"),
            Self::Safetensors => name.to_owned(),
        }
    }
}

impl fmt::Display for ExportTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::GgufLora => f.write_str("gguf-lora"),
            Self::Gguf(file_type) => write!(f, "gguf:{}", file_type.name().to_lowercase()),
            Self::Peft => f.write_str("peft"),
            Self::Safetensors => f.write_str("safetensors"),
        }
    }
}

impl FromStr for ExportTarget {
    type Err = ExportError;

    fn from_str(text: &str) -> Result<Self, ExportError> {
        let wanted = text.to_lowercase();
        if let Some(target) = Self::all().find(|target| target.to_string() == wanted) {
            return Ok(target);
        }
        let wanted_type = wanted.strip_prefix("gguf:");
        if let Some(file_type) = wanted_type.and_then(FileType::from_name) {
            return Ok(Self::Gguf(file_type));
        }
        let known: Vec<String> = Self::all().map(|target| target.to_string()).collect();
        let help = match wanted_type.and_then(BlockType::from_name) {
            Some(block_type) => format!(
                "{} can be read but not written: export gguf:f16 and run llama.cpp's llama-quantize on it, or choose \
                 one of {}",
                block_type.name(),
                known.join(", ")
            ),
            None => format!("one of {}", known.join(", ")),
        };
        Err(ExportError::Target { given: text.to_owned(), help })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_target_parses_as_it_prints() {
        for target in ExportTarget::all() {
            assert_eq!(target.to_string().parse::<ExportTarget>().ok(), Some(target));
        }
        assert_eq!("GGUF:Q8_0".parse::<ExportTarget>().ok(), Some(ExportTarget::Gguf(FileType::Q8_0)));
        assert_eq!("gguf:q5_k".parse::<ExportTarget>().ok(), Some(ExportTarget::Gguf(FileType::Q5_K_M)));
    }

    #[test]
    fn what_cannot_be_written_is_refused_with_a_way_out() {
        let help = |text: &str| match text.parse::<ExportTarget>() {
            Err(ExportError::Target { help, .. }) => help,
            other => panic!("{other:?}"),
        };
        assert!(help("gguf:iq4_xs").starts_with("IQ4_XS can be read but not written"));
        assert!(help("onnx").starts_with("one of gguf-lora, peft, safetensors, gguf:f32"));
    }
}
