//! What the decoders of both x86 instruction sets share: tables, and scales that are packed in bits.

pub(super) const FROM_MINUS_16: [f32; 16] = count_from(-16.0);
pub(super) const FROM_MINUS_8: [f32; 16] = count_from(-8.0);
pub(super) const FROM_0: [f32; 16] = count_from(0.0);
pub(super) const FROM_16: [f32; 16] = count_from(16.0);

/// The blocks of `bytes` with the values of each.
#[inline]
pub(super) fn blocks<'a, const BYTES: usize, const LEN: usize, T>(
    bytes: &'a [u8],
    out: &'a mut [T],
) -> impl Iterator<Item = (&'a [u8; BYTES], &'a mut [T; LEN])> {
    bytes.as_chunks().0.iter().zip(out.as_chunks_mut().0)
}

/// `N` bytes of a block from `start` on.
#[inline]
pub(super) fn part<const N: usize>(block: &[u8], start: usize) -> &[u8; N] {
    block[start..].first_chunk().expect("a part lies inside its block")
}

/// The scales and then the minima of the eight sub-blocks of Q4_K and Q5_K, from their packed form.
#[inline]
pub(super) fn scales_and_mins(packed: &[u8; 12]) -> [u8; 16] {
    let word = |at| u32::from_le_bytes(*part(packed, at));
    let (first, second, third) = (word(0), word(4), word(8));
    let upper = |word: u32| word >> 2 & 0x3030_3030;
    let words = [
        first & 0x3F3F_3F3F,
        third & 0x0F0F_0F0F | upper(first),
        second & 0x3F3F_3F3F,
        third >> 4 & 0x0F0F_0F0F | upper(second),
    ];
    bytes_of(words)
}

/// The 16 scales of Q3_K, 32 too large, from their packed form.
#[inline]
pub(super) fn q3_k_scales(packed: &[u8; 12]) -> [u8; 16] {
    let word = |at| u32::from_le_bytes(*part(packed, at));
    let (first, second, upper) = (word(0), word(4), word(8));
    let words = [
        first & 0x0F0F_0F0F | upper << 4 & 0x3030_3030,
        second & 0x0F0F_0F0F | upper << 2 & 0x3030_3030,
        first >> 4 & 0x0F0F_0F0F | upper & 0x3030_3030,
        second >> 4 & 0x0F0F_0F0F | upper >> 2 & 0x3030_3030,
    ];
    bytes_of(words)
}

/// The eight scales of IQ4_XS, 32 too large, from their upper and lower bits.
#[inline]
pub(super) fn iq4_xs_scales(upper: u16, lower: u32) -> [u8; 8] {
    // halve the fields of a register and move the upper half of each, until there is one to a byte
    let (mut upper, mut lower) = (u64::from(upper), u64::from(lower));
    lower = (lower | lower << 16) & 0x0000_FFFF_0000_FFFF;
    lower = (lower | lower << 8) & 0x00FF_00FF_00FF_00FF;
    lower = (lower | lower << 4) & 0x0F0F_0F0F_0F0F_0F0F;
    upper = (upper | upper << 24) & 0x0000_00FF_0000_00FF;
    upper = (upper | upper << 12) & 0x000F_000F_000F_000F;
    upper = (upper | upper << 6) & 0x0303_0303_0303_0303;
    (lower | upper << 4).to_le_bytes()
}

#[inline]
fn bytes_of(words: [u32; 4]) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes.as_chunks_mut().0.iter_mut().zip(words).for_each(|(bytes, word)| *bytes = word.to_le_bytes());
    bytes
}

/// The values of 16 consecutive codes.
const fn count_from(start: f32) -> [f32; 16] {
    let mut values = [start; 16];
    let mut i = 1;
    while i < 16 {
        values[i] = values[i - 1] + 1.0;
        i += 1;
    }
    values
}
