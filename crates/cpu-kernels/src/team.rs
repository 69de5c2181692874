//! The one set of threads that every operation runs on.
//!
//! A job is a number of tasks, taken one by one from a counter, so that a thread which loses its
//! core for a moment delays only the task it holds, and a thread that wakes late finds nothing left
//! and delays nobody. The caller takes part. Between jobs the others spin for a moment, as the next
//! operation of a step follows within a microsecond, and then sleep.
//!
//! ```text
//! claim = | job number (32 bits) | next task (32 bits) |
//!
//! caller   write job, done = 0 -> claim = (job + 1, 0) -> take tasks -> wait until done = tasks
//! others   claim's job is new   -> take tasks by compare-exchange -> done += 1 each
//! ```
//!
//! A task is taken by a compare-exchange that fails if the job has changed, so whoever takes one
//! has read that job's fields and not a later one's: those of the next are written elsewhere while
//! the claim of this one, all of it taken, can still be seen.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// How long a thread spins for the next job before it sleeps.
const SPIN: Duration = Duration::from_micros(50);
/// Spins between two looks at the clock, or before the caller lets others have its core.
const SPINS: u32 = 64;

/// What a job's tasks call: (context, task, thread).
type Call = unsafe fn(*const (), usize, usize);

/// What a job consists of.
#[derive(Default)]
struct Job {
    tasks: AtomicUsize,
    call: AtomicPtr<()>,
    context: AtomicPtr<()>,
}

struct Shared {
    claim: AtomicU64,
    done: AtomicUsize,
    /// By job number, the last two in turn.
    jobs: [Job; 2],
    sleeping: AtomicUsize,
    panicked: AtomicBool,
    closing: AtomicBool,
}

/// A set of threads that runs one job at a time.
pub struct Team {
    shared: Arc<Shared>,
    others: Vec<JoinHandle<()>>,
    one_job: Mutex<()>,
}

impl Team {
    /// `threads` includes the one that will call `run`; the others are started now, with `nice`
    /// added to their niceness.
    ///
    /// # Errors
    /// If a thread cannot be started.
    pub fn new(threads: usize, nice: i32) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            claim: AtomicU64::new(0),
            done: AtomicUsize::new(0),
            jobs: <[Job; 2]>::default(),
            sleeping: AtomicUsize::new(0),
            panicked: AtomicBool::new(false),
            closing: AtomicBool::new(false),
        });
        let mut team = Self {
            shared,
            others: Vec::new(),
            one_job: Mutex::new(()),
        };
        for thread in 1..threads.max(1) {
            let shared = Arc::clone(&team.shared);
            let body = move || {
                lower_priority(nice);
                shared.work(thread);
            };
            team.others.push(
                thread::Builder::new()
                    .name(format!("kernels-{thread}"))
                    .spawn(body)?,
            );
        }
        Ok(team)
    }

    /// Threads that take part in a job, the caller's included.
    #[must_use]
    pub fn threads(&self) -> usize {
        self.others.len() + 1
    }

    /// Call `task(index, thread)` once for every index below `tasks`, in any order, on any thread;
    /// `thread` is below `threads()` and differs between calls that run at the same time.
    ///
    /// # Panics
    /// If a task did; all others have ended by then.
    pub fn run<F: Fn(usize, usize) + Sync>(&self, tasks: usize, task: F) {
        unsafe fn call<F: Fn(usize, usize)>(context: *const (), index: usize, thread: usize) {
            // SAFETY: `run` passes its own `task`, which outlives the job.
            unsafe { (*context.cast::<F>())(index, thread) }
        }
        assert!(u32::try_from(tasks).is_ok(), "{tasks} tasks");
        let _one_job = self.one_job.lock();
        if self.others.is_empty() || tasks <= 1 {
            (0..tasks).for_each(|index| task(index, 0));
            return;
        }
        let shared = &*self.shared;
        let context = std::ptr::from_ref(&task).cast();
        let job = (shared.claim.load(Ordering::Relaxed) >> 32).wrapping_add(1) << 32;
        shared.prepare(job, tasks, call::<F>, context);
        shared.claim.store(job, Ordering::SeqCst);
        if shared.sleeping.load(Ordering::SeqCst) > 0 {
            self.others.iter().for_each(|other| other.thread().unpark());
        }
        shared.take_tasks(job, 0);
        let mut spins = 0;
        while shared.done.load(Ordering::Acquire) < tasks {
            spins += 1;
            if spins % SPINS == 0 {
                thread::yield_now();
            } else {
                std::hint::spin_loop();
            }
        }
        if shared.panicked.swap(false, Ordering::Relaxed) {
            panic!("a task panicked");
        }
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        self.shared.closing.store(true, Ordering::SeqCst);
        for other in self.others.drain(..) {
            other.thread().unpark();
            // A task's panic was caught where it ran: the thread itself cannot have failed.
            drop(other.join());
        }
    }
}

impl Shared {
    fn job(&self, claim: u64) -> &Job {
        &self.jobs[(claim >> 32) as usize % 2]
    }

    /// Write down the job to come. All tasks of the one before it have been done.
    fn prepare(&self, claim: u64, tasks: usize, call: Call, context: *const ()) {
        let job = self.job(claim);
        // Whoever reads these finds a later claim than that of the job they replace.
        job.call.store(call as *mut (), Ordering::Release);
        job.context.store(context.cast_mut(), Ordering::Release);
        job.tasks.store(tasks, Ordering::Release);
        self.done.store(0, Ordering::Relaxed);
    }

    /// Take tasks of the job that `claim` belonged to until none is left or another job began.
    fn take_tasks(&self, mut claim: u64, thread: usize) {
        let number = claim >> 32;
        let job = self.job(claim);
        loop {
            let tasks = job.tasks.load(Ordering::Acquire);
            let call = job.call.load(Ordering::Acquire);
            let context = job.context.load(Ordering::Acquire);
            let index = (claim & u64::from(u32::MAX)) as usize;
            if claim >> 32 != number || index >= tasks {
                return;
            }
            let next =
                self.claim
                    .compare_exchange(claim, claim + 1, Ordering::AcqRel, Ordering::Acquire);
            match next {
                Err(now) => claim = now,
                Ok(_) => {
                    // SAFETY: the exchange succeeded, so `call` and `context` are this job's, and
                    // `run` keeps them alive until this task is counted as done.
                    let ran = catch_unwind(AssertUnwindSafe(|| unsafe {
                        std::mem::transmute::<*mut (), Call>(call)(context, index, thread);
                    }));
                    if ran.is_err() {
                        self.panicked.store(true, Ordering::Relaxed);
                    }
                    self.done.fetch_add(1, Ordering::Release);
                    claim = self.claim.load(Ordering::Acquire);
                }
            }
        }
    }

    /// What every thread but the caller's does.
    fn work(&self, thread: usize) {
        let mut seen = 0;
        while !self.closing.load(Ordering::SeqCst) {
            let claim = self.claim.load(Ordering::Acquire);
            if claim >> 32 == seen {
                self.wait(seen);
            } else {
                seen = claim >> 32;
                self.take_tasks(claim, thread);
            }
        }
    }

    /// Spin, then sleep, until there is a job after `seen`, or the team is closing.
    fn wait(&self, seen: u64) {
        let nothing = || {
            self.claim.load(Ordering::SeqCst) >> 32 == seen && !self.closing.load(Ordering::SeqCst)
        };
        let began = Instant::now();
        while began.elapsed() < SPIN {
            for _ in 0..SPINS {
                if self.claim.load(Ordering::Relaxed) >> 32 != seen {
                    return;
                }
                std::hint::spin_loop();
            }
        }
        self.sleeping.fetch_add(1, Ordering::SeqCst);
        while nothing() {
            thread::park();
        }
        self.sleeping.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Add to this thread's niceness. It may fail, and then the thread competes as it did.
fn lower_priority(nice: i32) {
    #[cfg(target_os = "linux")]
    if nice != 0 {
        // SAFETY: plain system calls; on Linux `who` 0 is the calling thread.
        unsafe {
            let now = libc::getpriority(libc::PRIO_PROCESS, 0);
            libc::setpriority(libc::PRIO_PROCESS, 0, now + nice);
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = nice;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once_whatever_the_threads() {
        for threads in [1, 2, 3, 8] {
            let team = Team::new(threads, 0).unwrap();
            for tasks in [0, 1, 2, 7, 1000] {
                let runs: Vec<_> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                for _ in 0..20 {
                    team.run(tasks, |index, thread| {
                        assert!(thread < threads);
                        runs[index].fetch_add(1, Ordering::Relaxed);
                    });
                }
                assert!(runs.iter().all(|n| n.load(Ordering::Relaxed) == 20));
            }
        }
    }

    #[test]
    fn sleepers_wake_for_a_job_that_needs_them() {
        let team = Team::new(2, 0).unwrap();
        for _ in 0..50 {
            while team.shared.sleeping.load(Ordering::SeqCst) == 0 {
                thread::yield_now();
            }
            // Two tasks that wait for each other end only if two threads take them.
            let met = AtomicUsize::new(0);
            team.run(2, |_, _| {
                met.fetch_add(1, Ordering::SeqCst);
                while met.load(Ordering::SeqCst) < 2 {
                    thread::yield_now();
                }
            });
        }
    }

    #[test]
    fn who_comes_late_takes_nothing_of_a_job_that_is_being_prepared() {
        unsafe fn count(context: *const (), _: usize, _: usize) {
            // SAFETY: the test's own counter.
            unsafe { (*context.cast::<AtomicUsize>()).fetch_add(1, Ordering::Relaxed) };
        }
        let team = Team::new(1, 0).unwrap();
        let (shared, ran) = (&team.shared, AtomicUsize::new(0));
        let context = std::ptr::from_ref(&ran).cast();
        shared.prepare(1 << 32, 2, count, context);
        shared.claim.store(1 << 32, Ordering::SeqCst);
        shared.take_tasks(1 << 32, 0);
        shared.prepare(2 << 32, 10, count, context);
        shared.take_tasks(shared.claim.load(Ordering::SeqCst), 1);
        assert_eq!(ran.load(Ordering::Relaxed), 2);
    }

    #[test]
    fn a_panicking_task_is_reported_and_the_team_goes_on() {
        let team = Team::new(2, 0).unwrap();
        let result = catch_unwind(AssertUnwindSafe(|| {
            team.run(10, |index, _| assert_ne!(index, 5));
        }));
        assert!(result.is_err());
        let ran = AtomicUsize::new(0);
        team.run(10, |_, _| {
            ran.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(ran.load(Ordering::Relaxed), 10);
    }
}
