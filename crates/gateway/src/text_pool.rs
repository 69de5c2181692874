//! Threads for templates and tokenising, which may take milliseconds and must not hold up the async threads.
//!
//! Handing over a greeting, and taking it back, takes as long as its few words do. So short work is done where it comes
//! from as long as work of its kind was quick for its model. What turns out slow there makes the next eight go the
//! long way: a template that does not end holds up others once in nine times at the most.
//!
//! Short work goes before long work, and long work lets it in between: where it calls its [`Pause`], the thread does
//! what short work waits there. So a thread that tokenises a whole book answers a greeting meanwhile.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};
use tokio::sync::oneshot;

use crate::error::{ApiError, ApiResult};

/// Work on more text than this is long: about 1 ms of tokenising.
const SHORT_BYTES: usize = 4096;

/// Work that took no longer is worth no hand-over.
const QUICK: Duration = Duration::from_micros(100);

/// So often in a row it has to have been quick.
const QUICK_IN_A_ROW: u32 = 8;

/// After so much short work in a row, a piece of long work is done.
const SHORT_IN_A_ROW: usize = 8;

type Job = Box<dyn FnOnce(&mut Pause) + Send>;

/// A few threads behind one bounded queue; they end when the pool is dropped.
pub struct TextPool {
    queue: Arc<Queue>,
    threads: Vec<JoinHandle<()>>,
}

struct Queue {
    limit: usize,
    jobs: Mutex<Jobs>,
    /// A job came, or the end.
    came: Condvar,
}

#[derive(Default)]
struct Jobs {
    short: VecDeque<Job>,
    long: VecDeque<Job>,
    short_in_a_row: usize,
    ended: bool,
}

/// How quick one kind of a model's short work was lately; at first it is thought not to be.
#[derive(Default)]
pub struct Pace {
    quick_in_a_row: AtomicU32,
}

impl Pace {
    fn is_quick(&self) -> bool {
        self.quick_in_a_row.load(Relaxed) >= QUICK_IN_A_ROW
    }

    fn took(&self, time: Duration) {
        if time > QUICK {
            self.quick_in_a_row.store(0, Relaxed);
        } else if !self.is_quick() {
            self.quick_in_a_row.fetch_add(1, Relaxed);
        }
    }
}

/// What a running job calls now and then: short work that waits is done there.
pub struct Pause<'a> {
    /// `None` within short work, which is never interrupted.
    queue: Option<&'a Queue>,
    took: Duration,
}

impl Pause<'_> {
    /// Lets other threads have the core, and does short work that waits, up to [`SHORT_IN_A_ROW`] of it.
    pub fn take(&mut self) {
        let Some(queue) = self.queue else { return };
        let start = Instant::now();
        // The threads that read and write the sockets may share the core, and would wait for whole time slices.
        std::thread::yield_now();
        for _ in 0..SHORT_IN_A_ROW {
            let Some(job) = queue.jobs.lock().short.pop_front() else {
                break;
            };
            job(&mut Pause::none());
        }
        self.took += start.elapsed();
    }

    /// How long all pauses took so far.
    #[must_use]
    pub fn took(&self) -> Duration {
        self.took
    }

    fn none() -> Pause<'static> {
        Pause {
            queue: None,
            took: Duration::ZERO,
        }
    }
}

impl TextPool {
    /// # Errors
    /// If the operating system refuses a thread.
    pub fn start(threads: usize, limit: usize) -> std::io::Result<TextPool> {
        let mut pool = TextPool {
            queue: Arc::new(Queue {
                limit,
                jobs: Mutex::default(),
                came: Condvar::new(),
            }),
            threads: Vec::with_capacity(threads),
        };
        for index in 0..threads {
            let queue = Arc::clone(&pool.queue);
            let thread = std::thread::Builder::new()
                .name(format!("text-{index}"))
                .spawn(move || queue.work())?;
            pool.threads.push(thread);
        }
        Ok(pool)
    }

    /// Runs `job` on about `bytes` of text of a model with this `pace`: here and now if it will be quick, or else as
    /// [`TextPool::run`] does. Returns also how long it took, without pauses.
    ///
    /// # Errors
    /// As [`TextPool::run`].
    pub async fn run_paced<T: Send + 'static>(
        &self,
        pace: &Pace,
        bytes: usize,
        job: impl FnOnce(&mut Pause) -> T + Send + 'static,
    ) -> ApiResult<(T, Duration)> {
        let timed = move |pause: &mut Pause| {
            let start = Instant::now();
            let done = job(pause);
            (done, start.elapsed().saturating_sub(pause.took()))
        };
        let is_short = bytes <= SHORT_BYTES;
        let ran = if is_short && pace.is_quick() {
            catch_unwind(AssertUnwindSafe(|| timed(&mut Pause::none()))).map_err(|_| failed())
        } else {
            self.run(bytes, timed).await
        };
        if is_short {
            pace.took(ran.as_ref().map_or(Duration::MAX, |(_, took)| *took));
        }
        ran
    }

    /// Runs `job` on about `bytes` of text on one of the threads; a job whose caller has gone before its turn is not
    /// run.
    ///
    /// # Errors
    /// 503 when the queue is full, 500 when the job panics.
    pub async fn run<T: Send + 'static>(
        &self,
        bytes: usize,
        job: impl FnOnce(&mut Pause) -> T + Send + 'static,
    ) -> ApiResult<T> {
        let (answer, answered) = oneshot::channel();
        let job: Job = Box::new(move |pause| {
            if !answer.is_closed()
                && let Ok(result) = catch_unwind(AssertUnwindSafe(|| job(pause)))
            {
                // The caller may have gone meanwhile.
                let _ = answer.send(result);
            }
        });
        if !self.queue.put(bytes, job) {
            let message = format!(
                "all {} places in the queue for tokenising (text_queue) are taken",
                self.queue.limit
            );
            return Err(ApiError::busy("overloaded", message, 1));
        }
        answered.await.map_err(|_| failed())
    }

    /// Jobs that wait for a thread.
    #[must_use]
    pub fn queued(&self) -> usize {
        self.queue.jobs.lock().waiting()
    }
}

fn failed() -> Box<ApiError> {
    ApiError::internal("handling this request's text failed")
}

impl Jobs {
    fn waiting(&self) -> usize {
        self.short.len() + self.long.len()
    }

    /// The next job, and whether it is long.
    fn next(&mut self) -> Option<(Job, bool)> {
        if (self.short_in_a_row < SHORT_IN_A_ROW || self.long.is_empty())
            && let Some(job) = self.short.pop_front()
        {
            self.short_in_a_row += 1;
            return Some((job, false));
        }
        self.short_in_a_row = 0;
        self.long.pop_front().map(|job| (job, true))
    }
}

impl Queue {
    /// Whether there was a place.
    fn put(&self, bytes: usize, job: Job) -> bool {
        let mut jobs = self.jobs.lock();
        if jobs.waiting() >= self.limit {
            return false;
        }
        if bytes > SHORT_BYTES {
            jobs.long.push_back(job);
        } else {
            jobs.short.push_back(job);
        }
        self.came.notify_one();
        true
    }

    /// A thread's life: what was put before the end is still done.
    fn work(&self) {
        while let Some((job, is_long)) = self.take() {
            job(&mut Pause {
                queue: is_long.then_some(self),
                took: Duration::ZERO,
            });
        }
    }

    /// The next job, and whether it is long; waits for one. `None` at the end.
    fn take(&self) -> Option<(Job, bool)> {
        let mut jobs = self.jobs.lock();
        let mut has_yielded = false;
        loop {
            if let Some(next) = jobs.next() {
                return Some(next);
            }
            if jobs.ended {
                return None;
            }
            if has_yielded {
                self.came.wait(&mut jobs);
            } else {
                // Who brings jobs may share the core: let it bring more before this thread sleeps, and each of
                // them has to wake it.
                has_yielded = true;
                MutexGuard::unlocked(&mut jobs, std::thread::yield_now);
            }
        }
    }
}

impl Drop for TextPool {
    fn drop(&mut self) {
        self.queue.jobs.lock().ended = true;
        self.queue.came.notify_all();
        for thread in self.threads.drain(..) {
            // A job's panic was caught; nothing else can fail there.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_full_queue_refuses_and_a_panic_is_an_error() {
        let pool = Arc::new(TextPool::start(1, 1).unwrap());
        let (release, gate) = std::sync::mpsc::channel::<()>();
        let (started, has_started) = oneshot::channel();
        let busy = Arc::clone(&pool);
        let first = tokio::spawn(async move {
            busy.run(0, move |_| {
                let _ = started.send(());
                let _ = gate.recv();
            })
            .await
        });
        has_started.await.unwrap();
        let waiting = Arc::clone(&pool);
        let second = tokio::spawn(async move { waiting.run(0, |_| 2).await });
        while pool.queued() == 0 {
            tokio::task::yield_now().await;
        }
        assert_eq!(pool.run(0, |_| 3).await.unwrap_err().status.as_u16(), 503);
        release.send(()).unwrap();
        first.await.unwrap().unwrap();
        assert_eq!(second.await.unwrap().unwrap(), 2);
        let panicked = pool.run(0, |_| assert_eq!(1, 2)).await.unwrap_err();
        assert_eq!(panicked.status.as_u16(), 500);
        assert_eq!(pool.run(0, |_| 4).await.unwrap(), 4);
    }

    #[tokio::test]
    async fn only_short_work_that_was_quick_is_done_in_place() {
        let pool = TextPool::start(1, 100).unwrap();
        let pace = Pace::default();
        let here = std::thread::current().id();
        let mut was_here = Vec::new();
        let slow = 20;
        for number in 0..30 {
            let job = move |_: &mut Pause| {
                if number == slow {
                    std::thread::sleep(2 * QUICK);
                }
                std::thread::current().id() == here
            };
            // On a busy machine any of them may take long: then it is told so.
            let (in_place, took) = pool.run_paced(&pace, SHORT_BYTES, job).await.unwrap();
            was_here.push((in_place, took <= QUICK));
        }
        let mut quick = 0;
        for (in_place, was_quick) in was_here {
            assert_eq!(in_place, quick >= QUICK_IN_A_ROW);
            quick = if was_quick { quick + 1 } else { 0 };
        }
        let quick = Pace {
            quick_in_a_row: AtomicU32::new(QUICK_IN_A_ROW),
        };
        let job = move |_: &mut Pause| std::thread::current().id() == here;
        assert!(pool.run_paced(&quick, SHORT_BYTES, job).await.unwrap().0);
        let quick = Pace {
            quick_in_a_row: AtomicU32::new(QUICK_IN_A_ROW),
        };
        let long = pool.run_paced(&quick, SHORT_BYTES + 1, job).await.unwrap();
        assert!(!long.0);
        let panicked = pool.run_paced(&quick, 1, |_| assert_eq!(1, 2)).await;
        assert_eq!(panicked.unwrap_err().status.as_u16(), 500);
        assert!(!quick.is_quick());
    }

    #[tokio::test]
    async fn long_work_lets_short_work_in_and_has_its_turn() {
        let pool = Arc::new(TextPool::start(1, 100).unwrap());
        let order = Arc::new(Mutex::new(Vec::new()));
        let (release, gate) = std::sync::mpsc::channel::<()>();
        let (started, has_started) = oneshot::channel();
        let spawn = |name: &'static str, bytes: usize| {
            let (pool, order) = (Arc::clone(&pool), Arc::clone(&order));
            tokio::spawn(async move { pool.run(bytes, move |_| order.lock().push(name)).await })
        };
        let (running, told) = (Arc::clone(&pool), Arc::clone(&order));
        let first = tokio::spawn(async move {
            running
                .run(SHORT_BYTES + 1, move |pause| {
                    let _ = started.send(());
                    let _ = gate.recv();
                    pause.take();
                    told.lock().push("first long");
                })
                .await
        });
        has_started.await.unwrap();
        let mut jobs = vec![spawn("long", SHORT_BYTES + 1)];
        jobs.extend((0..20).map(|_| spawn("short", SHORT_BYTES)));
        while pool.queued() < jobs.len() {
            tokio::task::yield_now().await;
        }
        release.send(()).unwrap();
        for job in jobs {
            job.await.unwrap().unwrap();
        }
        first.await.unwrap().unwrap();
        let order = order.lock();
        let place = |name| order.iter().position(|done| *done == name);
        assert_eq!(place("first long"), Some(SHORT_IN_A_ROW));
        assert_eq!(place("long"), Some(2 * SHORT_IN_A_ROW + 1));
    }
}
