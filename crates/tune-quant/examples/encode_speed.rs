//! Our encoders against ggml's on the same values, one thread each, taking turns.
//!
//! ```sh
//! cargo run --release -p tune-quant --example encode_speed -- path/to/libggml-base.so [values.f32]
//! ```
//!
//! The library is anything that exports `ggml_quantize_chunk`: `libggml-base.so` of a llama.cpp build, or the module
//! inside the Python package xllamacpp. The values are little-endian singles, a multiple of 256 of them; without a
//! file they are four million drawn from a bell-shaped distribution. Times are CPU times of the thread, the best of
//! several rounds. The bytes are compared as well, and a difference ends the program with status 1.
#![allow(unsafe_code)]

use std::ffi::{CString, c_char, c_int, c_void};
use std::process::ExitCode;
use std::time::Duration;

use tune_quant::BlockType;

const ROUNDS: usize = 3;
const VALUES: usize = 1 << 22;
/// Values that are encoded by one call, as much as a row of a large matrix.
const ROW: usize = 4096;

/// `size_t ggml_quantize_chunk(type, src, dst, start, nrows, n_per_row, imatrix)`
type QuantizeChunk = unsafe extern "C" fn(c_int, *const f32, *mut c_void, i64, i64, i64, *const f32) -> usize;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let Some(library) = arguments.first() else {
        eprintln!("usage: encode_speed LIBRARY [VALUES]");
        return ExitCode::from(2);
    };
    let Some(reference) = load(library) else {
        eprintln!("{library}: no library with ggml_quantize_chunk");
        return ExitCode::from(2);
    };
    let values = match arguments.get(1) {
        None => bell_shaped(VALUES),
        Some(path) => match std::fs::read(path) {
            Ok(bytes) => bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
            Err(error) => {
                eprintln!("{path}: {error}");
                return ExitCode::from(2);
            }
        },
    };
    let values = &values[..values.len() / 256 * 256];
    println!("{} values, {ROUNDS} rounds, ns of CPU time a value", values.len());
    println!("type       ours   ggml  ratio  bytes");
    let mut all_equal = true;
    for block_type in BlockType::ALL.into_iter().filter(|t| t.is_quantized() && t.can_encode()) {
        let (mut ours, mut theirs) = (vec![], vec![0_u8; block_type.row_bytes(values.len()).unwrap_or(0)]);
        let mut best = [Duration::MAX; 2];
        for _ in 0..ROUNDS {
            ours.clear();
            best[0] = best[0].min(cpu_time(|| {
                for row in values.chunks(ROW) {
                    block_type.encode(row, &mut ours);
                }
            }));
            best[1] = best[1].min(cpu_time(|| {
                let mut at = 0;
                for row in values.chunks(ROW) {
                    // SAFETY: both buffers hold the row, and ggml writes as many bytes as `row_bytes` says.
                    at += unsafe {
                        let to = theirs.as_mut_ptr().add(at).cast();
                        let id = block_type.ggml_id() as c_int;
                        reference(id, row.as_ptr(), to, 0, 1, row.len() as i64, std::ptr::null())
                    };
                }
            }));
        }
        let [our_time, their_time] = best.map(|time| time.as_secs_f64() * 1e9 / values.len() as f64);
        let verdict = match ours.iter().zip(&theirs).position(|(a, b)| a != b) {
            None => "equal".to_owned(),
            Some(at) => format!("differ in block {}", at / block_type.block_bytes()),
        };
        all_equal &= ours == theirs;
        let ratio = their_time / our_time;
        println!("{:8} {our_time:6.2} {their_time:6.2} {ratio:6.1}  {verdict}", block_type.name());
    }
    if all_equal { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn load(library: &str) -> Option<QuantizeChunk> {
    let (path, name) = (CString::new(library).ok()?, c"ggml_quantize_chunk");
    // SAFETY: the library's initialisers are trusted as much as its code; the symbol has had this type for years.
    unsafe {
        let handle = libc::dlopen(path.as_ptr().cast::<c_char>(), libc::RTLD_LAZY);
        if handle.is_null() {
            return None;
        }
        let symbol = libc::dlsym(handle, name.as_ptr());
        (!symbol.is_null()).then(|| std::mem::transmute::<*mut c_void, QuantizeChunk>(symbol))
    }
}

/// CPU time of this thread in `work`.
fn cpu_time(work: impl FnOnce()) -> Duration {
    let now = || {
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: writes the time into a valid place.
        unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
        Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
    };
    let start = now();
    work();
    now().saturating_sub(start)
}

/// Sums of four uniform numbers.
fn bell_shaped(count: usize) -> Vec<f32> {
    let mut state = 1_u32;
    let mut uniform = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / 8_388_608.0 - 1.0
    };
    (0..count).map(|_| 0.02 * (uniform() + uniform() + uniform() + uniform())).collect()
}
