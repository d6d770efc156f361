//! The allocator of a run: large blocks are mappings of their own, kept when they are freed, and counted.
//!
//! A training step frees and allocates blocks of the same sizes again and again. Giving them back to the system costs
//! up to a fifth of the step, in page faults. A heap that keeps everything grows by whatever does not fit into its
//! holes, and nobody can predict by how much. So a freed block is kept for the next of its size, and what is kept is
//! bounded: blocks in use and kept ones together never exceed the most that was ever in use. A block of another size
//! takes over the pages of a kept one, so that a growing run only faults in what it grows by.
//!
//! Hence the resident memory of large blocks is exactly the peak of their sizes, each rounded up to whole pages, and a
//! memory plan is a sum. Smaller blocks are the system allocator's. Elsewhere than on Linux it has all, and nothing is
//! counted.

use std::alloc::{GlobalAlloc, Layout, System};
use std::ptr::{self, NonNull};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Blocks from this size on are large: matrices of an adapter are, k's and v's too. Smaller ones are a small part of a run's
/// memory, and many.
const LARGE: usize = 8 << 10;

/// Sizes are rounded up to these; so are the pages of all systems that run this.
const PAGE: usize = if cfg!(target_arch = "aarch64") { 64 << 10 } else { 4 << 10 };

/// Blocks that are kept at most; the oldest goes. A step of a model of 70 blocks frees 980 gradients at once.
const MOST_KEPT: usize = 1024;

/// The allocator. `#[global_allocator] static BLOCKS: Blocks = Blocks;`
#[derive(Debug)]
pub struct Blocks;

/// What [`end_phase`] knows by name at most.
const MOST_PHASES: usize = 16;

/// Ends a phase of the program: the most that was in use since the end of the one before counts for `name`.
pub fn end_phase(name: &'static str) {
    let mut pool = pool();
    let peak = pool.peak;
    pool.peak = pool.in_use;
    let known = |phase: &&mut Option<(&'static str, usize)>| phase.is_none_or(|(other, _)| other == name);
    if let Some(phase) = pool.phases.iter_mut().find(known) {
        *phase = Some((name, phase.map_or(peak, |(_, before)| before.max(peak))));
    }
}

/// The most bytes of large blocks that were in use in each phase so far, in the order in which they first ended. All 0
/// where [`Blocks`] is not the allocator.
pub fn phase_peaks() -> Vec<(&'static str, u64)> {
    // Not while the pool is locked: collecting allocates.
    let phases = pool().phases;
    phases.into_iter().flatten().map(|(name, peak)| (name, peak as u64)).collect()
}

/// Bytes of the large blocks that are in use.
pub fn blocks_in_use() -> u64 {
    pool().in_use as u64
}

/// Gives the kept blocks back to the system, because what comes next needs others.
pub(crate) fn return_kept() {
    let mut pool = pool();
    pool.bound = pool.in_use;
    pool.return_beyond_bound();
}

fn is_large(layout: Layout) -> bool {
    cfg!(target_os = "linux") && layout.size() >= LARGE && layout.align() <= PAGE
}

fn rounded(size: usize) -> Option<usize> {
    size.checked_next_multiple_of(PAGE)
}

// SAFETY: a large block is a mapping, or a part of one, that `Pool` hands to one caller at a time; its length is derived
// from the layout alone, so that freeing finds it again. Everything else is the system allocator's, and which of the two
// it is also follows from the layout alone.
#[allow(unsafe_code)]
unsafe impl GlobalAlloc for Blocks {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if !is_large(layout) {
            // SAFETY: passed on.
            return unsafe { System.alloc(layout) };
        }
        let Some(len) = rounded(layout.size()) else { return ptr::null_mut() };
        pool().take(len).map_or(ptr::null_mut(), |(block, _)| block.as_ptr())
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if !is_large(layout) {
            // SAFETY: passed on.
            return unsafe { System.alloc_zeroed(layout) };
        }
        let Some(len) = rounded(layout.size()) else { return ptr::null_mut() };
        let Some((block, used)) = pool().take(len) else { return ptr::null_mut() };
        // SAFETY: the block has `len` bytes, and no more than those are used; what is fresh is zero.
        unsafe { block.as_ptr().write_bytes(0, used) };
        block.as_ptr()
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        if !is_large(layout) {
            // SAFETY: passed on.
            return unsafe { System.dealloc(block, layout) };
        }
        if let (Some(block), Some(len)) = (NonNull::new(block), rounded(layout.size())) {
            pool().give_back(Kept { block, len });
        }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        // SAFETY: the caller's promise: `new_size` is not 0 and does not overflow when rounded up to the alignment.
        let new_layout = unsafe { Layout::from_size_align_unchecked(new_size, layout.align()) };
        match (is_large(layout), is_large(new_layout)) {
            // SAFETY: passed on.
            (false, false) => return unsafe { System.realloc(block, layout, new_size) },
            (true, true) => {
                let (Some(block), Some(old), Some(new)) =
                    (NonNull::new(block), rounded(layout.size()), rounded(new_size))
                else {
                    return ptr::null_mut();
                };
                let resized = pool().resize(Kept { block, len: old }, new);
                return resized.map_or(ptr::null_mut(), NonNull::as_ptr);
            }
            _ => {}
        }
        // SAFETY: the new layout is valid.
        let new = unsafe { self.alloc(new_layout) };
        if !new.is_null() {
            // SAFETY: both blocks hold at least the smaller size, and they are different blocks.
            unsafe {
                ptr::copy_nonoverlapping(block, new, layout.size().min(new_size));
                self.dealloc(block, layout);
            }
        }
        new
    }
}

static POOL: Mutex<Pool> = Mutex::new(Pool::new());

fn pool() -> MutexGuard<'static, Pool> {
    POOL.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A freed block: pages of a mapping.
#[derive(Clone, Copy)]
struct Kept {
    block: NonNull<u8>,
    len: usize,
}

/// Kept blocks and the count. Allocates nothing itself.
struct Pool {
    /// Oldest first.
    kept: [Option<Kept>; MOST_KEPT],
    count: usize,
    kept_bytes: usize,
    in_use: usize,
    /// Most that was in use since the last phase ended.
    peak: usize,
    phases: [Option<(&'static str, usize)>; MOST_PHASES],
    /// Most that was ever in use: in use and kept together stay within it.
    bound: usize,
}

// SAFETY: a kept block belongs to the pool alone.
#[allow(unsafe_code)]
unsafe impl Send for Pool {}

impl Pool {
    const fn new() -> Self {
        Self {
            kept: [None; MOST_KEPT],
            count: 0,
            kept_bytes: 0,
            in_use: 0,
            peak: 0,
            phases: [None; MOST_PHASES],
            bound: 0,
        }
    }

    /// A block of `len` bytes and how many of its first bytes were used before; the others are zero. `None` when the
    /// system has no more.
    fn take(&mut self, len: usize) -> Option<(NonNull<u8>, usize)> {
        self.count_in(len);
        let taken = self.reuse(len).or_else(|| {
            self.return_beyond_bound();
            map(len).map(|block| (block, 0))
        });
        if taken.is_none() {
            self.in_use -= len;
        }
        taken
    }

    fn give_back(&mut self, freed: Kept) {
        self.in_use -= freed.len;
        self.keep(freed);
    }

    /// A block in use, longer or shorter. `None` when the system has no more: then it is as it was.
    fn resize(&mut self, block: Kept, len: usize) -> Option<NonNull<u8>> {
        if len <= block.len {
            // SAFETY: `len` is not more than the block's size.
            #[allow(unsafe_code)]
            let rest = unsafe { block.block.add(len) };
            if len < block.len {
                self.give_back(Kept { block: rest, len: block.len - len });
            }
            return Some(block.block);
        }
        self.count_in(len - block.len);
        self.return_beyond_bound();
        let grown = grow(block, len);
        if grown.is_none() {
            self.in_use -= len - block.len;
        }
        grown
    }

    fn count_in(&mut self, len: usize) {
        self.in_use += len;
        self.peak = self.peak.max(self.in_use);
        self.bound = self.bound.max(self.in_use);
    }

    /// A kept block of this size, else a part of the smallest that is larger, else the largest, grown.
    fn reuse(&mut self, len: usize) -> Option<(NonNull<u8>, usize)> {
        let sizes =
            || self.kept[..self.count].iter().enumerate().filter_map(|(i, kept)| Some((i, (*kept)?.len)));
        // The newest of the same size: most of it may still be in a cache.
        if let Some((index, _)) = sizes().rev().find(|(_, size)| *size == len) {
            return Some((self.remove(index)?.block, len));
        }
        if let Some((index, size)) = sizes().filter(|(_, size)| *size > len).min_by_key(|(_, size)| *size) {
            let Kept { block, .. } = self.remove(index)?;
            // SAFETY: `len` is less than the block's size.
            #[allow(unsafe_code)]
            let rest = unsafe { block.add(len) };
            self.keep(Kept { block: rest, len: size - len });
            return Some((block, len));
        }
        let (index, size) = sizes().max_by_key(|(_, size)| *size)?;
        let smaller = self.remove(index)?;
        // What the block grows by is new: the bound holds before and after.
        self.return_beyond_bound();
        match grow(smaller, len) {
            Some(block) => Some((block, size)),
            None => {
                unmap(smaller);
                None
            }
        }
    }

    fn keep(&mut self, block: Kept) {
        if self.count == MOST_KEPT
            && let Some(oldest) = self.remove(0)
        {
            unmap(oldest);
        }
        self.kept[self.count] = Some(block);
        self.count += 1;
        self.kept_bytes += block.len;
    }

    fn remove(&mut self, index: usize) -> Option<Kept> {
        let removed = self.kept[index].take()?;
        self.kept[index..self.count].rotate_left(1);
        self.count -= 1;
        self.kept_bytes -= removed.len;
        Some(removed)
    }

    /// Returns kept blocks, oldest first, until the bound holds.
    fn return_beyond_bound(&mut self) {
        while self.in_use + self.kept_bytes > self.bound {
            let Some(oldest) = self.remove(0) else { break };
            unmap(oldest);
        }
    }
}

#[cfg(target_os = "linux")]
#[allow(unsafe_code)]
fn map(len: usize) -> Option<NonNull<u8>> {
    let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: a new private mapping at an address of the system's choice touches no other memory.
    let start = unsafe { libc::mmap(ptr::null_mut(), len, protection, flags, -1, 0) };
    if start == libc::MAP_FAILED { None } else { NonNull::new(start.cast()) }
}

/// The same pages and fresh ones behind them, perhaps at another address.
#[cfg(target_os = "linux")]
#[allow(unsafe_code)]
fn grow(block: Kept, len: usize) -> Option<NonNull<u8>> {
    // SAFETY: the block is mapped and nobody uses it.
    let start = unsafe { libc::mremap(block.block.as_ptr().cast(), block.len, len, libc::MREMAP_MAYMOVE) };
    if start == libc::MAP_FAILED { None } else { NonNull::new(start.cast()) }
}

#[cfg(target_os = "linux")]
#[allow(unsafe_code)]
fn unmap(block: Kept) {
    // SAFETY: the block is mapped and nobody uses it. Should the system refuse, the pages stay, unused.
    unsafe { libc::munmap(block.block.as_ptr().cast(), block.len) };
}

#[cfg(not(target_os = "linux"))]
fn map(_: usize) -> Option<NonNull<u8>> {
    None
}

#[cfg(not(target_os = "linux"))]
fn grow(_: Kept, _: usize) -> Option<NonNull<u8>> {
    None
}

#[cfg(not(target_os = "linux"))]
fn unmap(_: Kept) {}
