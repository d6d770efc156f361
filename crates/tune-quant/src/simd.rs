//! The block decoders written for one instruction set each, and the choice among them.
//!
//! The scalar decoders beside the encoders are the reference; those here give the same values faster. All are written
//! once for both kinds of output, see [`Out`].

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod x86;

use std::sync::LazyLock;

use half::bf16;

use crate::float::f32_to_bf16;
use crate::{BlockType, nf4};

/// Instructions to decode with. A value exists only where the processor has them, and the operating system lets
/// programs use their registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InstructionSet(Level);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Level {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl InstructionSet {
    /// What every processor has: the scalar reference.
    pub const PORTABLE: Self = Self(Level::Portable);

    /// The fastest instructions of this processor.
    pub fn best() -> Self {
        static BEST: LazyLock<InstructionSet> =
            LazyLock::new(|| InstructionSet::available().next().unwrap_or(InstructionSet::PORTABLE));
        *BEST
    }

    /// All that this processor can run, the fastest first.
    pub fn available() -> impl Iterator<Item = Self> {
        #[cfg(target_arch = "x86_64")]
        let extensions = [(Level::Avx512, has_avx512()), (Level::Avx2, has_avx2())];
        #[cfg(not(target_arch = "x86_64"))]
        let extensions: [(Level, bool); 0] = [];
        let extensions = extensions.into_iter().filter(|(_, has)| *has).map(|(level, _)| Self(level));
        extensions.chain([Self::PORTABLE])
    }

    /// A name for tables and messages.
    pub const fn name(self) -> &'static str {
        match self.0 {
            Level::Portable => "portable",
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => "AVX2",
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => "AVX-512",
        }
    }

    /// Decodes whole blocks; the caller has compared the lengths.
    #[allow(unsafe_code)]
    pub(crate) fn decode<T: Decoded>(self, block_type: BlockType, bytes: &[u8], out: &mut [T]) {
        match self.0 {
            Level::Portable => T::decode_portable(block_type, bytes, out),
            // SAFETY: this value exists, so the processor has what `has_avx2` looks for.
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => unsafe { avx2::decode(block_type, bytes, out) },
            // SAFETY: this value exists, so the processor has what `has_avx512` looks for.
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => unsafe { avx512::decode(block_type, bytes, out) },
        }
    }

    /// Decodes whole NF4 blocks: `scales` gives the scale of each.
    #[allow(unsafe_code)]
    pub(crate) fn decode_nf4<T: Decoded>(
        self,
        packed: &[[u8; nf4::BLOCK / 2]],
        scales: impl Iterator<Item = f32>,
        out: &mut [[T; nf4::BLOCK]],
    ) {
        match self.0 {
            Level::Portable => nf4::decode_blocks(packed, scales, out),
            // SAFETY: this value exists, so the processor has what `has_avx2` looks for.
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => unsafe { avx2::nf4(packed, scales, out) },
            // SAFETY: this value exists, so the processor has what `has_avx512` looks for.
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => unsafe { avx512::nf4(packed, scales, out) },
        }
    }
}

/// What the functions of [`avx2`] enable.
#[cfg(target_arch = "x86_64")]
fn has_avx2() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
}

/// What the functions of [`avx512`] enable, and what those features imply.
#[cfg(target_arch = "x86_64")]
fn has_avx512() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512vbmi")
        && is_x86_feature_detected!("avx512bf16")
        && has_avx2()
}

/// A type that blocks decode to: `f32`, exactly; or `bf16`, the exact value rounded to nearest, ties to even. A NaN
/// stays one.
pub trait Decoded: sealed::Decoded {}

impl Decoded for f32 {}
impl Decoded for bf16 {}

/// Where 32 decoded values go. A decoder generic in its output passes this on to the few functions that differ;
/// after inlining, nothing is left of the choice.
#[derive(Debug)]
pub enum Out<'a> {
    F32(&'a mut [f32; 32]),
    Bf16(&'a mut [bf16; 32]),
}

mod sealed {
    use super::{BlockType, Out};

    pub trait Decoded: Copy {
        fn out(values: &mut [Self; 32]) -> Out<'_>;
        fn from_f32(value: f32) -> Self;
        fn decode_portable(block_type: BlockType, bytes: &[u8], out: &mut [Self]);
    }
}

impl sealed::Decoded for f32 {
    #[inline]
    fn out(values: &mut [Self; 32]) -> Out<'_> {
        Out::F32(values)
    }

    #[inline]
    fn from_f32(value: f32) -> Self {
        value
    }

    fn decode_portable(block_type: BlockType, bytes: &[u8], out: &mut [Self]) {
        block_type.decode_portable(bytes, out);
    }
}

impl sealed::Decoded for bf16 {
    #[inline]
    fn out(values: &mut [Self; 32]) -> Out<'_> {
        Out::Bf16(values)
    }

    #[inline]
    fn from_f32(value: f32) -> Self {
        Self::from_bits(f32_to_bf16(value))
    }

    fn decode_portable(block_type: BlockType, bytes: &[u8], out: &mut [Self]) {
        const LEN: usize = 256;
        if block_type == BlockType::BF16 {
            let bits = bytes.as_chunks().0;
            out.iter_mut().zip(bits).for_each(|(out, bits)| *out = Self::from_le_bytes(*bits));
            return;
        }
        if out.is_empty() {
            return;
        }
        let part_bytes = LEN / block_type.block_len() * block_type.block_bytes();
        let mut values = [0.0; LEN];
        for (bytes, out) in bytes.chunks(part_bytes).zip(out.chunks_mut(LEN)) {
            let values = &mut values[..out.len()];
            block_type.decode_portable(bytes, values);
            out.iter_mut().zip(values).for_each(|(out, value)| *out = Self::from_f32(*value));
        }
    }
}
