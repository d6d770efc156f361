//! What of this process is resident, as the operating system counts it.

/// Peak resident set in bytes, mapped pages included: `VmHWM` on Linux, `ru_maxrss` elsewhere on Unix.
/// `None` where the system does not tell.
pub fn peak_resident_bytes() -> Option<u64> {
    match std::fs::read_to_string("/proc/self/status") {
        Ok(status) => field(&status, "VmHWM:"),
        Err(_) => max_rss(),
    }
}

/// Resident set in bytes at this moment; `None` where the system does not tell.
pub fn resident_bytes() -> Option<u64> {
    field(&std::fs::read_to_string("/proc/self/status").ok()?, "VmRSS:")
}

/// A line of `/proc/*/status` or `/proc/meminfo`, in bytes.
pub(crate) fn field(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

/// Gives what the program holds and does not use back to the system: kept blocks, and with glibc what the heap of small
/// ones holds free.
pub fn return_free_memory() {
    crate::blocks::return_kept();
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    #[allow(unsafe_code)]
    // SAFETY: malloc_trim only releases pages that hold no block, under the allocator's own locks.
    unsafe {
        libc::malloc_trim(0);
    }
}

#[cfg(unix)]
#[allow(unsafe_code)]
fn max_rss() -> Option<u64> {
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: `usage` is a valid, writable rusage, and every bit pattern of its integer fields is valid.
    let usage = unsafe {
        if libc::getrusage(libc::RUSAGE_SELF, usage.as_mut_ptr()) != 0 {
            return None;
        }
        usage.assume_init()
    };
    // Kilobytes on Linux, bytes on macOS.
    let unit = if cfg!(target_os = "macos") { 1 } else { 1024 };
    Some(usage.ru_maxrss as u64 * unit)
}

#[cfg(not(unix))]
fn max_rss() -> Option<u64> {
    None
}

#[cfg(test)]
mod tests {
    #[test]
    fn touching_memory_raises_the_peak() {
        let before = super::peak_resident_bytes().expect("known on this system");
        let touched = vec![1u8; before as usize + (64 << 20)];
        assert!(touched.iter().step_by(4096).all(|byte| *byte == 1));
        assert!(super::resident_bytes().expect("known") >= touched.len() as u64);
        assert!(super::peak_resident_bytes().expect("known") >= before + (60 << 20));
    }
}
