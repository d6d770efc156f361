//! What this machine offers, and what this process has used of it.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

static START: OnceLock<Instant> = OnceLock::new();

/// Called first in `main`: [`age`] counts from here.
pub fn note_the_start() {
    START.get_or_init(Instant::now);
}

/// How long this process has been running.
pub fn age() -> Duration {
    START.get_or_init(Instant::now).elapsed()
}

/// Seconds of processor time that all threads of this process have used, in user and in system mode. `None` where the
/// system does not tell.
pub fn cpu_seconds() -> Option<f64> {
    #[cfg(unix)]
    #[allow(unsafe_code)]
    {
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: `time` is a valid, writable timespec.
        let failed = unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &raw mut time) } != 0;
        (!failed).then_some(time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9)
    }
    #[cfg(not(unix))]
    None
}

use tune_plan::Device;
use tune_recipe::Dtype;

/// Bytes that a run may use: nine tenths of what is available now, but not the last 1.5 GiB. `None` where the
/// system does not tell.
pub fn usable_memory() -> Option<u64> {
    const RESERVE: u64 = 3 << 29;
    let available = tune_memory::available_bytes()?;
    Some((available / 10 * 9).min(available.saturating_sub(RESERVE)))
}

/// This machine as a device to plan for. `None` where the system does not tell.
pub fn device() -> Option<Device> {
    Some(Device::measured(tune_memory::total_bytes()?, usable_memory()?))
}

/// The type that this processor multiplies fastest.
pub fn fastest_dtype() -> Dtype {
    if tune_kernels::bf16::is_fast() { Dtype::Bf16 } else { Dtype::F32 }
}

/// Ends the program quietly when the reader of its output goes (`tune data … | head`), as other programs do. A training
/// run must not: it goes on without a reader.
pub fn end_with_the_reader() {
    #[cfg(unix)]
    #[allow(unsafe_code)]
    // SAFETY: restores the default action of a signal, before any thread is started.
    unsafe {
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
    }
}
