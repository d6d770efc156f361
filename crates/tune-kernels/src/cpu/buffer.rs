//! Buffers that are not cleared before they are written, and scratch space that is kept between calls.

use std::any::Any;
use std::cell::RefCell;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::{Deref, DerefMut, Range};

use bytemuck::Zeroable;
use half::bf16;

/// What a kernel writes.
pub(crate) trait Value: Copy + Send + Sync {
    /// Shows in tests where a kernel forgot an element.
    const POISON: Self;
}

impl Value for f32 {
    const POISON: Self = f32::NAN;
}

impl<T: Value> Value for (T, T) {
    const POISON: Self = (T::POISON, T::POISON);
}

impl Value for bf16 {
    const POISON: Self = bf16::NAN;
}

/// A new vector of which every element is still to be written. Clearing the outputs of a step first would cost
/// as much memory traffic as the element-wise kernels themselves.
pub(crate) struct Unwritten<T = f32> {
    values: Vec<T>,
    len: usize,
}

impl<T: Value> Unwritten<T> {
    pub(crate) fn new(len: usize) -> Self {
        let mut values = Vec::with_capacity(len);
        if cfg!(test) {
            values.resize(len, T::POISON);
            values.clear();
        }
        Self { values, len }
    }

    /// The elements, to be written.
    pub(crate) fn slots(&mut self) -> &mut [MaybeUninit<T>] {
        &mut self.values.spare_capacity_mut()[..self.len]
    }

    /// The finished vector.
    ///
    /// # Safety
    /// Every slot must have been written.
    #[allow(unsafe_code)]
    pub(crate) unsafe fn written(mut self) -> Vec<T> {
        // SAFETY: the capacity is at least `len`, and the caller has written the first `len` elements.
        unsafe { self.values.set_len(self.len) };
        self.values
    }
}

/// Written values as slots that can be written again.
pub(crate) fn as_slots<T: Value>(values: &mut [T]) -> &mut [MaybeUninit<T>] {
    // SAFETY: same layout. The slots are only ever given values, never made uninitialised: nothing in this crate
    // writes `MaybeUninit::uninit()`.
    #[allow(unsafe_code)]
    unsafe {
        &mut *(std::ptr::from_mut(values) as *mut [MaybeUninit<T>])
    }
}

/// Slots that several tasks write at once, each its own interleaved part (a head's columns, say).
#[derive(Clone, Copy)]
pub(crate) struct SharedSlots<'a, T = f32> {
    start: *mut MaybeUninit<T>,
    len: usize,
    borrow: PhantomData<&'a mut [MaybeUninit<T>]>,
}

// SAFETY: a `SharedSlots` is a mutable borrow of plain values; only `from` and `range` touch them, and their contract rules
// out two tasks with the same element.
#[allow(unsafe_code)]
unsafe impl<T: Value> Send for SharedSlots<'_, T> {}
// SAFETY: as above.
#[allow(unsafe_code)]
unsafe impl<T: Value> Sync for SharedSlots<'_, T> {}

impl<'a, T: Value> SharedSlots<'a, T> {
    pub(crate) fn new(slots: &'a mut [MaybeUninit<T>]) -> Self {
        Self { start: slots.as_mut_ptr(), len: slots.len(), borrow: PhantomData }
    }

    /// A pointer to the element at `offset`, with the number of elements from there to the end.
    ///
    /// # Safety
    /// While the pointer is used, no other task may touch the elements that are reached through it.
    #[allow(unsafe_code)]
    pub(crate) unsafe fn from(self, offset: usize) -> (*mut T, usize) {
        assert!(offset <= self.len, "offset {offset} in {} elements", self.len);
        // SAFETY: `offset` is within the borrowed slice or one past its end.
        (unsafe { self.start.add(offset) }.cast(), self.len - offset)
    }

    /// The `len` slots from `offset` on.
    ///
    /// # Safety
    /// While they are borrowed, no other task may touch them.
    #[allow(unsafe_code)]
    pub(crate) unsafe fn range(self, offset: usize, len: usize) -> &'a mut [MaybeUninit<T>] {
        assert!(offset + len <= self.len, "{len} elements from {offset} of {}", self.len);
        // SAFETY: within the borrowed slice; the caller rules out a second borrow.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(offset), len) }
    }
}

thread_local! {
    /// Buffers of this thread that are not in use.
    static FREE: RefCell<Vec<Box<dyn Any>>> = const { RefCell::new(Vec::new()) };
}

/// Runs `work` with buffers whose contents are unspecified. They stay with the thread for the next call. Calls may
/// nest, also through tasks that a waiting thread picks up.
pub(crate) fn with_buffers<T: Default + 'static, R>(work: impl FnOnce(&mut T) -> R) -> R {
    let kept = FREE.with_borrow_mut(|free| {
        let last = free.iter().rposition(|buffers| buffers.is::<T>())?;
        free.swap_remove(last).downcast::<T>().ok()
    });
    let mut buffers = kept.unwrap_or_default();
    let result = work(&mut buffers);
    FREE.with_borrow_mut(|free| free.push(buffers));
    result
}

/// [`with_buffers`] with `len` floats.
pub(crate) fn with_scratch<R>(len: usize, work: impl FnOnce(&mut [f32]) -> R) -> R {
    with_buffers(|buffer: &mut Vec<f32>| {
        if buffer.len() < len {
            buffer.resize(len, 0.0);
        }
        work(&mut buffer[..len])
    })
}

/// A buffer that a thread keeps, which begins where no load of a register crosses a cache line. It reads as the
/// slice that was last taken.
pub(crate) struct Buffer<T> {
    values: Vec<T>,
    range: Range<usize>,
}

impl<T> Default for Buffer<T> {
    fn default() -> Self {
        Self { values: Vec::new(), range: 0..0 }
    }
}

impl<T: Copy + Zeroable> Buffer<T> {
    /// `len` values, which are what the last use left.
    pub(crate) fn take(&mut self, len: usize) -> &mut [T] {
        const LINE: usize = 64;
        let most = len + LINE / size_of::<T>().min(LINE);
        if self.values.len() < most {
            self.values.resize(most, T::zeroed());
        }
        let first = self.values.as_ptr().align_offset(LINE);
        self.range = first..first + len;
        &mut self.values[self.range.clone()]
    }
}

impl<T> Deref for Buffer<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.values[self.range.clone()]
    }
}

impl<T> DerefMut for Buffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.values[self.range.clone()]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nested_scratch_buffers_are_distinct_and_reused() {
        let first = with_scratch(8, |outer| {
            outer.fill(1.0);
            with_scratch(8, |inner| inner.fill(2.0));
            assert_eq!(outer, [1.0; 8]);
            outer.as_ptr() as usize
        });
        let second = with_scratch(4, |again| again.as_ptr() as usize);
        assert_eq!(first, second);
    }
}
