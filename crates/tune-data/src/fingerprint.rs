//! What tokens depend on, in one number.

use sha2::{Digest as _, Sha256};

/// SHA-256 over parts that cannot run into each other.
pub(crate) struct Fingerprint(Sha256);

impl Fingerprint {
    pub(crate) fn new() -> Self {
        Self(Sha256::new())
    }

    /// The next part.
    pub(crate) fn part(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.update((bytes.len() as u64).to_le_bytes());
        self.0.update(bytes);
        self
    }

    /// Several parts, and how many there are.
    pub(crate) fn list<T: AsRef<[u8]>>(&mut self, parts: &[T]) -> &mut Self {
        self.0.update((parts.len() as u64).to_le_bytes());
        parts.iter().fold(self, |print, part| print.part(part.as_ref()))
    }

    /// A value as its `Debug` form shows it.
    pub(crate) fn value(&mut self, value: &impl std::fmt::Debug) -> &mut Self {
        self.part(format!("{value:?}").as_bytes())
    }

    pub(crate) fn finish(&self) -> [u8; 32] {
        self.0.clone().finalize().into()
    }
}

/// SHA-256 of bytes.
pub(crate) fn sha256(bytes: &[u8]) -> [u8; 32] {
    Sha256::digest(bytes).into()
}
