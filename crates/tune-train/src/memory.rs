//! How much memory this process has used at most, as the operating system counts it.

/// Peak resident set in bytes, mapped pages included: `VmHWM` on Linux, `ru_maxrss` elsewhere on Unix.
/// `None` where the system does not tell.
pub fn peak_memory_bytes() -> Option<u64> {
    if let Ok(status) = std::fs::read_to_string("/proc/self/status") {
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
        let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
        return Some(kib * 1024);
    }
    max_rss()
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
        let before = super::peak_memory_bytes().expect("known on this system");
        let touched = vec![1u8; before as usize + (64 << 20)];
        assert!(touched.iter().step_by(4096).all(|byte| *byte == 1));
        assert!(super::peak_memory_bytes().expect("known") >= before + (60 << 20));
    }
}
