//! Wakes tasks at exact times, which the runtime's timer of milliseconds cannot: a thread that waits for the next.

use std::collections::BTreeMap;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::thread::JoinHandle;
use std::time::Instant;

/// Owner of the thread; dropping it ends and joins it, and no alarm rings any more.
pub(crate) struct Alarms {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// Ready at its time.
pub(crate) struct Alarm {
    due: Instant,
    /// Tells apart what is due at one moment; given when it is first waited for.
    number: Option<u64>,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    waiting: Mutex<Waiting>,
    changed: Condvar,
}

#[derive(Default)]
struct Waiting {
    tasks: BTreeMap<(Instant, u64), Waker>,
    numbers: u64,
    ended: bool,
}

impl Alarms {
    pub(crate) fn start() -> io::Result<Alarms> {
        let shared = Arc::<Shared>::default();
        let rung = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("alarms".into())
            .spawn(move || rung.ring())?;
        Ok(Alarms {
            shared,
            thread: Some(thread),
        })
    }

    pub(crate) fn at(&self, due: Instant) -> Alarm {
        Alarm {
            due,
            number: None,
            shared: Arc::clone(&self.shared),
        }
    }
}

impl Drop for Alarms {
    fn drop(&mut self) {
        self.shared.lock().ended = true;
        self.shared.changed.notify_one();
        if let Some(thread) = self.thread.take() {
            // What it could panic with is a waker's, whose task has shown it.
            thread.join().unwrap_or_default();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ring(&self) {
        let mut waiting = self.lock();
        while !waiting.ended {
            let now = Instant::now();
            let Some(first) = waiting.tasks.first_entry() else {
                waiting = self
                    .changed
                    .wait(waiting)
                    .unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let (due, _) = *first.key();
            if due > now {
                let waited = self.changed.wait_timeout(waiting, due - now);
                (waiting, _) = waited.unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            let task = first.remove();
            drop(waiting);
            task.wake();
            waiting = self.lock();
        }
    }
}

impl Future for Alarm {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        if Instant::now() >= self.due {
            return Poll::Ready(());
        }
        let shared = Arc::clone(&self.shared);
        let mut waiting = shared.lock();
        let number = *self.number.get_or_insert_with(|| {
            waiting.numbers += 1;
            waiting.numbers
        });
        let key = (self.due, number);
        waiting.tasks.insert(key, context.waker().clone());
        if waiting
            .tasks
            .first_key_value()
            .is_some_and(|(first, _)| *first == key)
        {
            shared.changed.notify_one();
        }
        Poll::Pending
    }
}

impl Drop for Alarm {
    fn drop(&mut self) {
        if let Some(number) = self.number {
            self.shared.lock().tasks.remove(&(self.due, number));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn alarms_ring_in_their_order_and_never_early() {
        let alarms = Alarms::start().unwrap();
        let now = Instant::now();
        let (late, early) = (
            now + Duration::from_millis(20),
            now + Duration::from_millis(5),
        );
        let (late_alarm, early_alarm) = (alarms.at(late), alarms.at(early));
        let rung = Mutex::new(Vec::new());
        tokio::join!(
            async {
                late_alarm.await;
                assert!(Instant::now() >= late);
                rung.lock().unwrap().push("late");
            },
            async {
                early_alarm.await;
                assert!(Instant::now() >= early);
                rung.lock().unwrap().push("early");
            },
        );
        assert_eq!(rung.into_inner().unwrap(), ["early", "late"]);
        alarms.at(now).await;
        assert!(alarms.shared.lock().tasks.is_empty());
    }

    #[tokio::test]
    async fn an_alarm_that_nobody_waits_for_is_forgotten() {
        let alarms = Alarms::start().unwrap();
        let mut alarm = alarms.at(Instant::now() + Duration::from_secs(3600));
        let waited =
            std::future::poll_fn(|context| Poll::Ready(Pin::new(&mut alarm).poll(context)));
        assert!(waited.await.is_pending());
        assert_eq!(alarms.shared.lock().tasks.len(), 1);
        drop(alarm);
        assert!(alarms.shared.lock().tasks.is_empty());
    }
}
