//! Loops over a handful of tasks, whose threads wait for each other without going to sleep.
//!
//! A block of a model is dozens of parallel loops of less than a millisecond, and to put a thread to sleep and wake it
//! again takes a good part of that. So while [`on_pool`] runs, the other threads of the pool stay awake: they take tasks
//! of the loops that its thread begins, and jobs of the pool in between. Anywhere else, and inside of a task, a loop is
//! one of the pool's own.
//!
//! A loop is a number: which loop it is, how many tasks it has, and how many of them are taken. It goes on until
//! whoever took a task has done it, so what it points to lives at least as long.

#![allow(unsafe_code)]

use std::any::Any;
use std::cell::{Cell, UnsafeCell};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use rayon::Yield;
use rayon::prelude::*;

/// Runs `work` on a thread of the pool. Until it returns, the other threads stay awake.
pub fn on_pool<R: Send>(work: impl FnOnce() -> R + Send) -> R {
    rayon::scope(|_| {
        if TEAM.get().is_some() {
            return work();
        }
        let (team, lead) = (Team::default(), rayon::current_thread_index());
        rayon::scope(|helpers| {
            helpers.spawn_broadcast(|_, context| {
                if Some(context.index()) != lead {
                    team.help();
                }
            });
            let _end = Session::begin(&team);
            work()
        })
    })
}

/// Does `work` for each of `tasks`, on all threads.
pub(crate) fn for_each<T: Send>(tasks: Vec<T>, work: impl Fn(T) + Sync) {
    if tasks.len() <= 1 {
        return tasks.into_iter().for_each(work);
    }
    match TEAM.get().filter(|_| tasks.len() as u64 <= COUNT_MASK) {
        // SAFETY: `on_pool` is running further down this stack, and its team with it.
        Some(team) => unsafe { team.as_ref() }.run(tasks, work),
        None => tasks.into_par_iter().with_max_len(1).for_each(&work),
    }
}

/// [`for_each`], with the results in the order of `tasks`.
pub(crate) fn map<T: Send, R: Send>(tasks: Vec<T>, work: impl Fn(T) -> R + Sync) -> Vec<R> {
    let mut results: Vec<Option<R>> = tasks.iter().map(|_| None).collect();
    for_each(tasks.into_iter().zip(&mut results).collect(), |(task, result)| *result = Some(work(task)));
    results.into_iter().flatten().collect()
}

thread_local! {
    /// Who helps this thread.
    static TEAM: Cell<Option<NonNull<Team>>> = const { Cell::new(None) };
}

/// A thread and its helpers.
#[derive(Default)]
struct Team {
    /// The number of the loop, [`COUNT_BITS`] for how many tasks it has, and as many for how many are taken.
    state: Line<AtomicU64>,
    /// Tasks of the loop that are done.
    done: Line<AtomicUsize>,
    /// What the loop does. Written while no loop goes on, read by whoever has taken a task.
    work: UnsafeCell<Option<Work>>,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    is_over: AtomicBool,
}

type Work = NonNull<dyn Fn(usize) + Sync>;

// SAFETY: `work` is shared as its comment says; everything else may be shared anyway.
unsafe impl Sync for Team {}

/// Apart from its neighbours, which other threads write.
#[derive(Default)]
#[repr(align(64))]
struct Line<T>(T);

const COUNT_BITS: u32 = 20;
const COUNT_MASK: u64 = (1 << COUNT_BITS) - 1;

impl Team {
    fn run<T: Send>(&self, tasks: Vec<T>, work: impl Fn(T) + Sync) {
        let count = tasks.len();
        let tasks = Tasks(tasks.into_iter().map(|task| UnsafeCell::new(Some(task))).collect());
        // SAFETY: each number is taken once.
        let work = |i| unsafe { tasks.take(i) }.into_iter().for_each(&work);
        let work: &(dyn Fn(usize) + Sync) = &work;
        let _alone = NoTeam::begin();
        // SAFETY: no loop goes on, so no other thread reads this. The lifetime is left out: nobody calls `work` after all
        // tasks are done, for which this function waits.
        unsafe {
            *self.work.get() =
                Some(std::mem::transmute::<NonNull<dyn Fn(usize) + Sync + '_>, Work>(NonNull::from(work)));
        }
        self.done.0.store(0, Ordering::Relaxed);
        let before = self.state.0.load(Ordering::Relaxed) >> (2 * COUNT_BITS);
        let state = before.wrapping_add(1) << (2 * COUNT_BITS) | (count as u64) << COUNT_BITS;
        self.state.0.store(state, Ordering::Release);
        while self.do_one() {}
        let mut turns = 0;
        while self.done.0.load(Ordering::Acquire) < count {
            wait(&mut turns);
        }
        if let Some(panic) = self.panic.lock().unwrap_or_else(PoisonError::into_inner).take() {
            resume_unwind(panic);
        }
    }

    /// Takes a task and does it, if there is one.
    fn do_one(&self) -> bool {
        let take = |state: u64| (state & COUNT_MASK < state >> COUNT_BITS & COUNT_MASK).then_some(state + 1);
        let taken = self.state.0.fetch_update(Ordering::Acquire, Ordering::Acquire, take);
        let Ok(state) = taken else { return false };
        let result = catch_unwind(AssertUnwindSafe(|| {
            // SAFETY: the loop of this task goes on until the task is done, so what it does is there and stays.
            let work = unsafe { (*self.work.get()).map(|work| work.as_ref()) };
            if let Some(work) = work {
                work((state & COUNT_MASK) as usize);
            }
        }));
        if let Err(panic) = result {
            *self.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(panic);
        }
        self.done.0.fetch_add(1, Ordering::Release);
        true
    }

    /// Does tasks until the session is over.
    fn help(&self) {
        let _alone = NoTeam::begin();
        let mut turns = 0;
        while !self.is_over.load(Ordering::Acquire) {
            let asks_the_pool = turns % POOL_EVERY == POOL_EVERY - 1;
            if self.do_one() || asks_the_pool && rayon::yield_now() == Some(Yield::Executed) {
                turns = 0;
            } else {
                wait(&mut turns);
            }
        }
    }
}

/// Turns of waiting between two looks at the jobs of the pool.
const POOL_EVERY: u32 = 8;

/// One turn of waiting: some ten nanoseconds for the first half millisecond, later as long as others use the processor.
/// Nothing of a block takes longer, unless others do: then giving way at once would double the time of a step.
fn wait(turns: &mut u32) {
    const SHORT: u32 = 10_000;
    *turns = turns.wrapping_add(1);
    if *turns < SHORT {
        std::hint::spin_loop();
    } else {
        std::thread::yield_now();
    }
}

/// While it lives, the team helps this thread.
struct Session<'a>(&'a Team);

impl<'a> Session<'a> {
    fn begin(team: &'a Team) -> Self {
        TEAM.set(Some(NonNull::from(team)));
        Self(team)
    }
}

impl Drop for Session<'_> {
    fn drop(&mut self) {
        TEAM.set(None);
        self.0.is_over.store(true, Ordering::Release);
    }
}

/// While it lives, nobody helps this thread.
struct NoTeam(Option<NonNull<Team>>);

impl NoTeam {
    fn begin() -> Self {
        Self(TEAM.take())
    }
}

impl Drop for NoTeam {
    fn drop(&mut self) {
        TEAM.set(self.0);
    }
}

/// Tasks of which each is taken out by the thread that does it.
struct Tasks<T>(Vec<UnsafeCell<Option<T>>>);

// SAFETY: a task moves to the one thread that takes it.
unsafe impl<T: Send> Sync for Tasks<T> {}

impl<T> Tasks<T> {
    /// # Safety
    /// No two calls with the same number go on at once.
    unsafe fn take(&self, i: usize) -> Option<T> {
        // SAFETY: only this call touches the cell.
        unsafe { (*self.0[i].get()).take() }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU32;

    use super::*;

    #[test]
    fn every_task_is_done_once_in_every_loop() {
        let counts: Vec<AtomicU32> = (0..1000).map(|_| AtomicU32::new(0)).collect();
        on_pool(|| {
            for round in 0..200 {
                let tasks: Vec<&AtomicU32> = counts.iter().take(round * 5).collect();
                for_each(tasks, |count| {
                    count.fetch_add(1, Ordering::Relaxed);
                });
            }
        });
        for (i, count) in counts.iter().enumerate() {
            let want = (0..200).filter(|round| i < round * 5).count() as u32;
            assert_eq!(count.load(Ordering::Relaxed), want, "task {i}");
        }
    }

    #[test]
    fn results_are_in_order_with_and_without_a_team_and_inside_a_task() {
        let squares = |n: u64| map((0..n).collect(), |i| i * i);
        let want = |n: u64| (0..n).map(|i| i * i).collect::<Vec<_>>();
        assert_eq!(squares(70), want(70));
        let nested = on_pool(|| {
            assert_eq!(squares(70), want(70));
            map((0..20).collect(), squares)
        });
        assert_eq!(nested, (0..20).map(want).collect::<Vec<_>>());
        let on_many_threads: Vec<u64> = on_pool(|| {
            (0..500_u64).into_par_iter().map(|i| on_pool(|| squares(i % 5).len() as u64)).collect()
        });
        assert_eq!(on_many_threads, (0..500).map(|i| i % 5).collect::<Vec<_>>());
    }

    #[test]
    fn a_panic_of_a_task_reaches_the_caller_after_all_others_are_done() {
        let done = AtomicU32::new(0);
        let result = catch_unwind(AssertUnwindSafe(|| {
            on_pool(|| {
                for_each((0..50).collect(), |i| {
                    assert_ne!(i, 7, "task {i}");
                    done.fetch_add(1, Ordering::Relaxed);
                });
            });
        }));
        assert!(result.is_err());
        assert_eq!(done.load(Ordering::Relaxed), 49);
        assert_eq!(on_pool(|| map(vec![1, 2, 3], |i| i + 1)), [2, 3, 4]);
    }

    #[test]
    fn several_callers_at_once() {
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for n in 0..50 {
                        assert_eq!(
                            on_pool(|| map((0..n).collect(), |i: usize| i + n)),
                            (n..2 * n).collect::<Vec<_>>()
                        );
                    }
                });
            }
        });
    }
}
