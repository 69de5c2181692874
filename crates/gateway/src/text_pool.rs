//! Threads for templates and tokenising, which take milliseconds and must not hold up the async threads.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::thread::JoinHandle;

use parking_lot::Mutex;
use tokio::sync::oneshot;

use crate::error::{ApiError, ApiResult};

type Job = Box<dyn FnOnce() + Send>;

/// A few threads behind one bounded queue; they end when the pool is dropped.
pub struct TextPool {
    jobs: Option<SyncSender<Job>>,
    threads: Vec<JoinHandle<()>>,
    queued: Arc<AtomicUsize>,
    limit: usize,
}

impl TextPool {
    /// # Errors
    /// If the operating system refuses a thread.
    pub fn start(threads: usize, limit: usize) -> std::io::Result<TextPool> {
        let (jobs, queue) = sync_channel::<Job>(limit);
        let queue = Arc::new(Mutex::new(queue));
        let threads = (0..threads)
            .map(|index| {
                let queue = Arc::clone(&queue);
                std::thread::Builder::new()
                    .name(format!("text-{index}"))
                    .spawn(move || work(&queue))
            })
            .collect::<Result<_, _>>()?;
        Ok(TextPool {
            jobs: Some(jobs),
            threads,
            queued: Arc::default(),
            limit,
        })
    }

    /// Runs `job` on one of the threads; a job whose caller has gone before its turn is not run.
    ///
    /// # Errors
    /// 503 when the queue is full, 500 when the job panics.
    pub async fn run<T: Send + 'static>(
        &self,
        job: impl FnOnce() -> T + Send + 'static,
    ) -> ApiResult<T> {
        let (answer, answered) = oneshot::channel();
        let queued = Arc::clone(&self.queued);
        let job: Job = Box::new(move || {
            queued.fetch_sub(1, Relaxed);
            if !answer.is_closed()
                && let Ok(result) = catch_unwind(AssertUnwindSafe(job))
            {
                // The caller may have gone meanwhile.
                let _ = answer.send(result);
            }
        });
        self.queued.fetch_add(1, Relaxed);
        let sent = self.jobs.as_ref().map(|jobs| jobs.try_send(job));
        match sent {
            Some(Ok(())) => answered
                .await
                .map_err(|_| ApiError::internal("handling this request's text failed")),
            Some(Err(TrySendError::Full(_))) => {
                self.queued.fetch_sub(1, Relaxed);
                let message = format!(
                    "all {} places in the queue for tokenising (text_queue) are taken",
                    self.limit
                );
                Err(ApiError::busy("overloaded", message, 1))
            }
            Some(Err(TrySendError::Disconnected(_))) | None => {
                Err(ApiError::internal("no thread for text is left"))
            }
        }
    }

    /// Jobs that wait for a thread.
    #[must_use]
    pub fn queued(&self) -> usize {
        self.queued.load(Relaxed)
    }
}

fn work(queue: &Mutex<Receiver<Job>>) {
    loop {
        let next = queue.lock().recv();
        match next {
            Ok(job) => job(),
            Err(_) => return,
        }
    }
}

impl Drop for TextPool {
    fn drop(&mut self) {
        self.jobs = None;
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
            busy.run(move || {
                let _ = started.send(());
                let _ = gate.recv();
            })
            .await
        });
        has_started.await.unwrap();
        let waiting = Arc::clone(&pool);
        let second = tokio::spawn(async move { waiting.run(|| 2).await });
        while pool.queued() == 0 {
            tokio::task::yield_now().await;
        }
        assert_eq!(pool.run(|| 3).await.unwrap_err().status.as_u16(), 503);
        release.send(()).unwrap();
        first.await.unwrap().unwrap();
        assert_eq!(second.await.unwrap().unwrap(), 2);
        let panicked = pool.run(|| assert_eq!(1, 2)).await.unwrap_err();
        assert_eq!(panicked.status.as_u16(), 500);
        assert_eq!(pool.run(|| 4).await.unwrap(), 4);
    }
}
