//! The least that a quantiser has to do: read a file, write as many bytes as the result has, make them durable.
//!
//! ```sh
//! cargo run --release -p tune-export --example copy -- IN BYTES OUT [--no-sync]
//! ```
//!
//! The input is mapped and all its bytes are added up on all cores; the first BYTES of it are written from the mapping. What is
//! beyond the length of the input is written as zeros.
#![allow(unsafe_code)]

use std::fs::File;
use std::io::{Error, ErrorKind, Result, Write};

use rayon::prelude::*;

/// Bytes that one thread adds up at a time, and that are written at once.
const PIECE: usize = 1 << 20;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [input, bytes, out, rest @ ..] = &arguments[..] else {
        return Err(Error::new(ErrorKind::InvalidInput, "usage: copy IN BYTES OUT [--no-sync]"));
    };
    let bytes: usize = bytes.parse().map_err(|error| Error::new(ErrorKind::InvalidInput, error))?;
    let file = File::open(input)?;
    // SAFETY: read only, and nothing here writes to the input.
    let input = unsafe { memmap2::Mmap::map(&file) }?;
    let mut out = File::create(out)?;
    let (sum, written) = rayon::join(
        || input.par_chunks(PIECE).map(sum).reduce(|| 0, u64::wrapping_add),
        || {
            input[..bytes.min(input.len())].chunks(PIECE).try_for_each(|piece| out.write_all(piece))?;
            let zeros = vec![0; PIECE];
            let beyond = bytes.saturating_sub(input.len());
            (0..beyond).step_by(PIECE).try_for_each(|at| out.write_all(&zeros[..PIECE.min(beyond - at)]))?;
            if rest.iter().any(|flag| flag == "--no-sync") { Ok(()) } else { out.sync_all() }
        },
    );
    written?;
    println!("{} bytes read with the sum {sum:x}, {bytes} written", input.len());
    Ok(())
}

fn sum(piece: &[u8]) -> u64 {
    piece.as_chunks().0.iter().fold(0, |sum, bytes| sum.wrapping_add(u64::from_le_bytes(*bytes)))
}
