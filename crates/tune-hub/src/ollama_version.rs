//! Versions of Ollama, and what came and went with them.

use std::fmt;

use crate::error::HubError;

/// Version of an Ollama server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OllamaVersion {
    /// As the server writes it.
    text: String,
    /// `None` for a build of one's own, such as `0.0.0`; it is taken for a new one.
    number: Option<[u32; 3]>,
}

impl OllamaVersion {
    /// `/api/create` takes files that were uploaded before.
    pub const CREATES_FROM_BLOBS: [u32; 3] = [0, 5, 5];
    /// `logprobs` and `top_logprobs`.
    pub const TELLS_LOGPROBS: [u32; 3] = [0, 12, 11];
    /// The first that refuses to create a model with an adapter.
    pub const REFUSES_ADAPTERS: [u32; 3] = [0, 34, 1];

    /// Reads a version such as `0.33.1` or `0.34.0-rc2`.
    pub fn parse(text: &str) -> Self {
        let release = text.trim().trim_start_matches('v').split(['-', '+']).next().unwrap_or_default();
        let parts: Option<Vec<u32>> = release.split('.').map(|part| part.parse().ok()).collect();
        let number =
            parts.and_then(|parts| <[u32; 3]>::try_from(parts).ok()).filter(|&number| number != [0; 3]);
        Self { text: text.trim().to_owned(), number }
    }

    /// Whether it is this version or a newer one.
    pub fn is_at_least(&self, number: [u32; 3]) -> bool {
        self.number.is_none_or(|own| own >= number)
    }

    /// Whether models with an adapter can be created, as far as the version tells. A server that refuses them
    /// nevertheless says so.
    pub fn takes_adapters(&self) -> bool {
        self.number.is_none_or(|own| own < Self::REFUSES_ADAPTERS)
    }

    pub(crate) fn require(&self, what: &'static str, number: [u32; 3]) -> Result<(), HubError> {
        if self.is_at_least(number) {
            return Ok(());
        }
        let needed = number.map(|part| part.to_string()).join(".");
        Err(HubError::OllamaTooOld { found: self.text.clone(), needed, what })
    }
}

impl fmt::Display for OllamaVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adapters_went_with_0_34_1() {
        for (text, takes) in
            [("0.12.10", true), ("0.33.3", true), ("0.34.0", true), ("0.34.1", false), ("0.40.0", false)]
        {
            assert_eq!(OllamaVersion::parse(text).takes_adapters(), takes, "{text}");
        }
    }

    #[test]
    fn builds_without_a_number_count_as_new_and_as_able() {
        for text in ["0.0.0", "dev", ""] {
            let version = OllamaVersion::parse(text);
            assert!(version.takes_adapters() && version.is_at_least(OllamaVersion::TELLS_LOGPROBS), "{text}");
        }
        assert!(!OllamaVersion::parse("0.5.4").is_at_least(OllamaVersion::CREATES_FROM_BLOBS));
        assert!(OllamaVersion::parse("v0.5.5-rc1").is_at_least(OllamaVersion::CREATES_FROM_BLOBS));
    }
}
