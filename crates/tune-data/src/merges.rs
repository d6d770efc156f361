//! The merge loop of byte-level BPE, with a memory of the pieces it has seen.
//!
//! Of all neighbours that a merge joins, the pair of the lowest rank is joined first, and the leftmost among equals,
//! until no merge applies. Sennrich et al. 2016, arXiv 1508.07909, algorithm 1; on bytes as in GPT-2.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use rustc_hash::FxHashMap;

/// Longest piece that is remembered, in bytes.
const REMEMBERED_BYTES: usize = 64;

/// Pieces that are remembered at a time; a few MiB.
const REMEMBERED_PIECES: usize = 1 << 15;

/// The merges of a vocabulary.
pub(crate) struct Merges {
    /// Id of each byte; bytes without one vanish before merging, as in the tokenizers crate.
    bytes: [Option<u32>; 256],
    /// Rank and result, by left and right.
    pairs: FxHashMap<(u32, u32), (u32, u32)>,
    /// Pieces that are tokens whatever the merges say.
    whole: FxHashMap<Box<[u8]>, u32>,
}

/// What one thread at a time needs for merging, and the pieces it has seen.
#[derive(Default)]
pub(crate) struct Words {
    /// Place in `ids`, by piece.
    seen: FxHashMap<Box<[u8]>, (usize, usize)>,
    ids: Vec<u32>,
    merging: Merging,
}

#[derive(Default)]
struct Merging {
    symbols: Vec<Symbol>,
    /// Rank, left symbol, end of the right one in bytes, and result; lowest first.
    queue: BinaryHeap<Reverse<(u32, u32, u32, u32)>>,
    result: Vec<u32>,
}

/// A part of the piece that is a token so far. The known bytes of a piece are numbered, and a symbol has the number of
/// its first.
#[derive(Clone, Copy)]
struct Symbol {
    id: u32,
    /// First byte of the symbol before it; [`NONE`] for the first.
    previous: u32,
    /// Its end: the first byte of the symbol after it. Zero for a symbol that went into the one before it.
    end: u32,
}

const NONE: u32 = u32::MAX;

impl Merges {
    /// `pairs`: left, right and result, in the order of their ranks; the last of equal pairs counts.
    pub(crate) fn new(
        bytes: &[Option<u32>; 256],
        pairs: impl ExactSizeIterator<Item = (u32, u32, u32)>,
        whole: FxHashMap<Box<[u8]>, u32>,
    ) -> Self {
        let mut ranks = FxHashMap::with_capacity_and_hasher(pairs.len(), rustc_hash::FxBuildHasher);
        ranks.extend(pairs.zip(0..).map(|((left, right, result), rank)| ((left, right), (rank, result))));
        Self { bytes: *bytes, pairs: ranks, whole }
    }

    /// The byte has a token.
    pub(crate) fn knows(&self, byte: u8) -> bool {
        self.bytes[usize::from(byte)].is_some()
    }

    /// Ids of a piece of text.
    pub(crate) fn ids<'a>(&self, piece: &[u8], words: &'a mut Words) -> &'a [u32] {
        if let Some(&(start, end)) = words.seen.get(piece) {
            return &words.ids[start..end];
        }
        match self.whole.get(piece) {
            Some(id) => {
                words.merging.result.clear();
                words.merging.result.push(*id);
            }
            None => self.merge(piece, &mut words.merging),
        }
        if piece.len() <= REMEMBERED_BYTES {
            if words.seen.len() == REMEMBERED_PIECES {
                words.seen.clear();
                words.ids.clear();
            }
            let start = words.ids.len();
            words.ids.extend_from_slice(&words.merging.result);
            words.seen.insert(piece.into(), (start, words.ids.len()));
        }
        &words.merging.result
    }

    fn merge(&self, piece: &[u8], merging: &mut Merging) {
        let Merging { symbols, queue, result } = merging;
        symbols.clear();
        queue.clear();
        let known = piece.iter().filter_map(|byte| self.bytes[usize::from(*byte)]);
        // the number before zero is NONE
        symbols.extend((0..).zip(known).map(|(at, id)| Symbol {
            id,
            previous: u32::wrapping_sub(at, 1),
            end: at + 1,
        }));
        let offer = |symbols: &[Symbol], queue: &mut BinaryHeap<_>, left: u32| {
            let first = symbols[left as usize];
            let Some(second) = symbols.get(first.end as usize) else { return };
            if let Some(&(rank, result)) = self.pairs.get(&(first.id, second.id)) {
                queue.push(Reverse((rank, left, second.end, result)));
            }
        };
        for left in 0..symbols.len() as u32 {
            offer(symbols, queue, left);
        }
        while let Some(Reverse((_, left, end, id))) = queue.pop() {
            let first = symbols[left as usize];
            // a pair that is no longer there: one of the two has grown or has gone into another
            if first.end == 0 || symbols.get(first.end as usize).is_none_or(|second| second.end != end) {
                continue;
            }
            symbols[first.end as usize].end = 0;
            symbols[left as usize] = Symbol { id, end, ..first };
            if let Some(after) = symbols.get_mut(end as usize) {
                after.previous = left;
            }
            if first.previous != NONE {
                offer(symbols, queue, first.previous);
            }
            offer(symbols, queue, left);
        }
        result.clear();
        let mut at = 0;
        while let Some(symbol) = symbols.get(at) {
            result.push(symbol.id);
            at = symbol.end as usize;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Merges over bytes, which are their own ids, but for an x that has none.
    fn merges(pairs: &[(u32, u32)]) -> Merges {
        let results = (256..).zip(pairs).map(|(id, (left, right))| (*left, *right, id));
        Merges::new(
            &std::array::from_fn(|byte| (byte != usize::from(b'x')).then_some(byte as u32)),
            results.collect::<Vec<_>>().into_iter(),
            FxHashMap::default(),
        )
    }

    /// The definition: over and over, the lowest rank and the leftmost.
    fn plain(merges: &Merges, piece: &[u8]) -> Vec<u32> {
        let mut ids: Vec<u32> = piece.iter().filter_map(|byte| merges.bytes[usize::from(*byte)]).collect();
        loop {
            let pairs = ids.windows(2).enumerate();
            let ranked = pairs.filter_map(|(at, pair)| Some((merges.pairs.get(&(pair[0], pair[1]))?, at)));
            let Some((&(_, result), at)) = ranked.min() else { return ids };
            ids.splice(at..at + 2, [result]);
        }
    }

    proptest! {
        #[test]
        fn merging_follows_the_definition(
            pieces in proptest::collection::vec("[abcdx]{0,80}", 1..4),
            // parts are earlier tokens: the first four letters, then results
            parts in proptest::collection::vec((any::<u32>(), any::<u32>()), 0..40),
        ) {
            let token = |part: u32, made: u32| match part % (4 + made) {
                letter @ 0..4 => u32::from(b'a') + letter,
                result => 256 + result - 4,
            };
            let pairs: Vec<_> = (0..).zip(parts).map(|(made, (l, r))| (token(l, made), token(r, made))).collect();
            let merges = merges(&pairs);
            let mut words = Words::default();
            for piece in pieces.iter().chain(&pieces) {
                prop_assert_eq!(merges.ids(piece.as_bytes(), &mut words), plain(&merges, piece.as_bytes()));
            }
        }
    }

    #[test]
    fn memory_of_pieces_is_bounded() {
        let merges = merges(&[(b'1'.into(), b'2'.into())]);
        let mut words = Words::default();
        for number in 0..REMEMBERED_PIECES + 10 {
            let piece = number.to_string();
            assert_eq!(merges.ids(piece.as_bytes(), &mut words), plain(&merges, piece.as_bytes()));
        }
        assert_eq!(words.seen.len(), 10);
        let long = [b'1'; REMEMBERED_BYTES + 1];
        merges.ids(&long, &mut words);
        assert_eq!(words.seen.len(), 10);
    }
}
