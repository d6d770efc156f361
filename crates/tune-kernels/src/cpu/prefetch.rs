//! Asking for memory before it is needed, where the processor cannot foresee it.

/// Asks for all cache lines of `values`.
#[inline(always)]
#[allow(clippy::inline_always, reason = "one instruction for each cache line")]
pub(crate) fn prefetch<T>(values: &[T]) {
    const LINE: usize = 64;
    #[cfg(target_arch = "x86_64")]
    for byte in (0..size_of_val(values)).step_by(LINE) {
        // SAFETY: asking for an address has no effect, whatever is there.
        #[allow(unsafe_code)]
        unsafe {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            _mm_prefetch::<_MM_HINT_T0>(values.as_ptr().cast::<i8>().wrapping_add(byte));
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (values, LINE);
}

/// Asks for the part `at .. at + len` of `values`, as far as it is there.
#[inline(always)]
#[allow(clippy::inline_always, reason = "as above")]
pub(crate) fn prefetch_part<T>(values: &[T], at: usize, len: usize) {
    if let Some(part) = values.get(at..at + len) {
        prefetch(part);
    }
}
