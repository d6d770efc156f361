//! The storage types of GGUF tensors: names, block geometry, and the way to their codecs.

use crate::{Decoded, InstructionSet, codebook_quants, encode, float, k_quants, legacy_quants};

/// How the values of a tensor are stored: a block of [`block_len`](Self::block_len) consecutive values of a row
/// takes [`block_bytes`](Self::block_bytes) bytes.
///
/// The numbers are those of the GGUF tensor-info record.
#[allow(non_camel_case_types)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u32)]
pub enum BlockType {
    /// IEEE single precision.
    F32 = 0,
    /// IEEE half precision.
    F16 = 1,
    /// 4 bits and one scale per 32 values.
    Q4_0 = 2,
    /// 4 bits, scale and minimum per 32 values.
    Q4_1 = 3,
    /// 5 bits and one scale per 32 values.
    Q5_0 = 6,
    /// 5 bits, scale and minimum per 32 values.
    Q5_1 = 7,
    /// 8 bits and one scale per 32 values.
    Q8_0 = 8,
    /// 2 bits, 16 sub-blocks of 16 values with 4-bit scales and minima.
    Q2K = 10,
    /// 3 bits, 16 sub-blocks of 16 values with 6-bit scales.
    Q3K = 11,
    /// 4 bits, 8 sub-blocks of 32 values with 6-bit scales and minima.
    Q4K = 12,
    /// 5 bits, 8 sub-blocks of 32 values with 6-bit scales and minima.
    Q5K = 13,
    /// 6 bits, 16 sub-blocks of 16 values with 8-bit scales.
    Q6K = 14,
    /// 4-bit index into a non-linear table, one scale per 32 values.
    IQ4NL = 20,
    /// 4-bit index into a non-linear table, 8 sub-blocks of 32 values with 6-bit scales.
    IQ4XS = 23,
    /// The upper half of an IEEE single.
    BF16 = 30,
    /// E2M1 floats with a power-of-two scale per 32 values.
    MXFP4 = 39,
}

impl BlockType {
    /// Every type, in the order of its GGUF number.
    pub const ALL: [Self; 16] = [
        Self::F32,
        Self::F16,
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
        Self::Q8_0,
        Self::Q2K,
        Self::Q3K,
        Self::Q4K,
        Self::Q5K,
        Self::Q6K,
        Self::IQ4NL,
        Self::IQ4XS,
        Self::BF16,
        Self::MXFP4,
    ];

    /// The number that GGUF files store.
    pub const fn ggml_id(self) -> u32 {
        self as u32
    }

    /// The type with GGUF number `id`, or `None` for types this crate does not read.
    pub fn from_ggml_id(id: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|t| t.ggml_id() == id)
    }

    /// The type called `name`, in any case (`q8_0`, `BF16`, `Q4_K`).
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|t| t.name().eq_ignore_ascii_case(name))
    }

    /// The name that GGUF tools print.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::BF16 => "BF16",
            Self::Q4_0 => "Q4_0",
            Self::Q4_1 => "Q4_1",
            Self::Q5_0 => "Q5_0",
            Self::Q5_1 => "Q5_1",
            Self::Q8_0 => "Q8_0",
            Self::Q2K => "Q2_K",
            Self::Q3K => "Q3_K",
            Self::Q4K => "Q4_K",
            Self::Q5K => "Q5_K",
            Self::Q6K => "Q6_K",
            Self::IQ4NL => "IQ4_NL",
            Self::IQ4XS => "IQ4_XS",
            Self::MXFP4 => "MXFP4",
        }
    }

    /// Values in a block; the length of a row must be a multiple of it.
    pub const fn block_len(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::BF16 => 1,
            Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 | Self::Q8_0 | Self::IQ4NL | Self::MXFP4 => 32,
            Self::Q2K | Self::Q3K | Self::Q4K | Self::Q5K | Self::Q6K | Self::IQ4XS => 256,
        }
    }

    /// Bytes that a block occupies.
    pub const fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
            Self::Q4_0 | Self::IQ4NL => 18,
            Self::Q4_1 => 20,
            Self::Q5_0 => 22,
            Self::Q5_1 => 24,
            Self::Q8_0 => 34,
            Self::MXFP4 => 17,
            Self::Q2K => 84,
            Self::Q3K => 110,
            Self::Q4K => 144,
            Self::Q5K => 176,
            Self::Q6K => 210,
            Self::IQ4XS => 136,
        }
    }

    /// Bytes of a row of `cols` values, or `None` when it is not a whole number of blocks or does not fit `usize`.
    pub const fn row_bytes(self, cols: usize) -> Option<usize> {
        // a division by a length not known when compiling takes as long as a block; all lengths are powers of two
        if cols & (self.block_len() - 1) == 0 {
            (cols >> self.block_len().trailing_zeros()).checked_mul(self.block_bytes())
        } else {
            None
        }
    }

    /// Storage per value, block overhead included.
    pub fn bits_per_weight(self) -> f64 {
        (self.block_bytes() * 8) as f64 / self.block_len() as f64
    }

    /// Whether values are stored in fewer than 16 bits.
    pub const fn is_quantized(self) -> bool {
        self.block_len() > 1
    }

    /// Decodes whole blocks: `bytes` holds `out.len() / block_len` blocks.
    ///
    /// Into `f32`, the result is bit-exact with the reference implementation of GGUF, on every processor. Into
    /// `bf16`, it is that value rounded; values stored as BF16 are copied.
    ///
    /// # Panics
    ///
    /// If the lengths do not match.
    pub fn decode<T: Decoded>(self, bytes: &[u8], out: &mut [T]) {
        self.decode_with(InstructionSet::best(), bytes, out);
    }

    /// [`decode`](Self::decode) by other instructions than the fastest, to compare and to measure.
    pub fn decode_with<T: Decoded>(self, instructions: InstructionSet, bytes: &[u8], out: &mut [T]) {
        assert_eq!(
            Some(bytes.len()),
            self.row_bytes(out.len()),
            "bytes of {} {} values",
            out.len(),
            self.name()
        );
        instructions.decode(self, bytes, out);
    }

    /// Whether [`encode`](Self::encode) knows this type.
    pub const fn can_encode(self) -> bool {
        !matches!(self, Self::IQ4XS)
    }

    /// Encodes `values` (whole blocks) and appends the bytes to `out`; see [`encode_into`](Self::encode_into).
    ///
    /// # Panics
    ///
    /// If `values` is not a whole number of blocks, or the type cannot be encoded
    /// ([`can_encode`](Self::can_encode)).
    pub fn encode(self, values: &[f32], out: &mut Vec<u8>) {
        let bytes = self.row_bytes(values.len());
        assert!(bytes.is_some(), "{} values are not whole {} blocks", values.len(), self.name());
        let start = out.len();
        out.resize(start + bytes.unwrap_or(0), 0);
        self.encode_into(values, &mut out[start..]);
    }

    /// Encodes `values` (whole blocks) into `out`, byte-identical to the reference implementation of GGUF without an
    /// importance matrix.
    ///
    /// A block whose scale exceeds the range of a half stores an infinite scale, as the reference does; who
    /// writes files checks that the values decode to finite ones.
    ///
    /// # Panics
    ///
    /// If the lengths do not match, or the type cannot be encoded ([`can_encode`](Self::can_encode)).
    pub fn encode_into(self, values: &[f32], out: &mut [u8]) {
        let bytes = self.row_bytes(values.len());
        assert_eq!(Some(out.len()), bytes, "bytes of {} {} values", values.len(), self.name());
        encode::encode(self, values, out);
    }

    /// The scalar reference.
    pub(crate) fn decode_portable(self, bytes: &[u8], out: &mut [f32]) {
        match self {
            Self::F32 => float::decode_f32(bytes, out),
            Self::F16 => float::decode_f16(bytes, out),
            Self::BF16 => float::decode_bf16(bytes, out),
            Self::Q4_0 => decode_blocks(bytes, out, legacy_quants::decode_q4_0),
            Self::Q4_1 => decode_blocks(bytes, out, legacy_quants::decode_q4_1),
            Self::Q5_0 => decode_blocks(bytes, out, legacy_quants::decode_q5_0),
            Self::Q5_1 => decode_blocks(bytes, out, legacy_quants::decode_q5_1),
            Self::Q8_0 => decode_blocks(bytes, out, legacy_quants::decode_q8_0),
            Self::Q2K => decode_blocks(bytes, out, k_quants::decode_q2_k),
            Self::Q3K => decode_blocks(bytes, out, k_quants::decode_q3_k),
            Self::Q4K => decode_blocks(bytes, out, k_quants::decode_q4_k),
            Self::Q5K => decode_blocks(bytes, out, k_quants::decode_q5_k),
            Self::Q6K => decode_blocks(bytes, out, k_quants::decode_q6_k),
            Self::IQ4NL => decode_blocks(bytes, out, codebook_quants::decode_iq4_nl),
            Self::IQ4XS => decode_blocks(bytes, out, codebook_quants::decode_iq4_xs),
            Self::MXFP4 => decode_blocks(bytes, out, codebook_quants::decode_mxfp4),
        }
    }
}

/// Runs the decoder of one block over all of them; the array types leave no bounds check in the loops.
fn decode_blocks<const BYTES: usize, const LEN: usize>(
    bytes: &[u8],
    out: &mut [f32],
    decode: impl Fn(&[u8; BYTES], &mut [f32; LEN]),
) {
    for (block, values) in bytes.as_chunks::<BYTES>().0.iter().zip(out.as_chunks_mut::<LEN>().0) {
        decode(block, values);
    }
}
