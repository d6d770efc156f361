//! How a merged weight becomes one of few values.

use std::fmt;
use std::sync::Arc;

use crate::{FileType, InputMoments};

/// How a merged weight becomes one of few values. `docs/merging.md` has what each of them keeps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MergeRoute {
    /// The nearest codes under the scales of the base, where the type stays; small updates vanish.
    Rtn,
    /// Scales and codes anew, byte for byte as `llama-quantize` makes them.
    #[default]
    Refit,
    /// Codes with error feedback over training activations; the scales of the base, where the type stays.
    Gptq,
}

impl MergeRoute {
    /// The route that keeps most of a fine-tune in files of this type, at a price that it is worth.
    pub const fn best_for(file_type: FileType) -> Self {
        match file_type {
            FileType::F32 | FileType::F16 | FileType::BF16 | FileType::Q8_0 => Self::Refit,
            _ => Self::Gptq,
        }
    }

    /// As written after `--merge`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Rtn => "rtn",
            Self::Refit => "refit",
            Self::Gptq => "gptq",
        }
    }
}

impl fmt::Display for MergeRoute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Gives the moments of the inputs of a linear layer, by module path; asked in the order of the forward pass. `None`
/// for layers that were not observed.
pub type Activations<'a> = dyn Fn(&str) -> Option<Arc<InputMoments>> + 'a;
