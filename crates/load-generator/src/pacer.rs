//! The second thread: wakes at exact times, which the runtime's millisecond timer cannot.

use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::sync::mpsc as channel;

/// How often the event loop's delay is probed.
const PROBE_EVERY: Duration = Duration::from_millis(10);
/// Ticks the loop may be behind before the pacer waits for it; a late tick keeps its due time.
const QUEUED_TICKS: usize = 1024;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tick {
    /// A request is due.
    Arrival(Instant),
    /// Nothing but the moment: how late it is seen is how late a chunk would be.
    Probe(Instant),
    /// No arrival will follow.
    ArrivalsEnd,
}

/// Owner of the thread; dropping it ends and joins it.
pub(crate) struct Pacer {
    ticks: channel::Receiver<Tick>,
    stop: Option<mpsc::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Pacer {
    /// Starts ticking; `arrivals` are ascending offsets from `start`.
    pub fn start(
        start: Instant,
        arrivals: impl Iterator<Item = Duration> + Send + 'static,
    ) -> std::io::Result<Pacer> {
        let (tick_sender, ticks) = channel::channel(QUEUED_TICKS);
        let (stop, stopped) = mpsc::channel();
        let thread = std::thread::Builder::new()
            .name("bench-pacer".into())
            .spawn(move || {
                pace(start, arrivals, &tick_sender, &stopped);
            })?;
        Ok(Pacer {
            ticks,
            stop: Some(stop),
            thread: Some(thread),
        })
    }

    /// The next tick; None only if the thread died.
    pub async fn next(&mut self) -> Option<Tick> {
        self.ticks.recv().await
    }
}

impl Drop for Pacer {
    fn drop(&mut self) {
        self.stop.take();
        self.ticks.close();
        if let Some(thread) = self.thread.take() {
            // A panic there has shown itself already: `next` gave None before the arrivals' end.
            thread.join().unwrap_or_default();
        }
    }
}

/// Sends each tick when it is due, until the other side is gone.
fn pace(
    start: Instant,
    arrivals: impl Iterator<Item = Duration>,
    ticks: &channel::Sender<Tick>,
    stopped: &mpsc::Receiver<()>,
) {
    let mut arrivals = arrivals.map(|offset| start + offset).fuse();
    let mut arrival = arrivals.next();
    let mut probe = start + PROBE_EVERY;
    if arrival.is_none() && ticks.blocking_send(Tick::ArrivalsEnd).is_err() {
        return;
    }
    loop {
        let tick = match arrival {
            Some(due) if due <= probe => Tick::Arrival(due),
            _ => Tick::Probe(probe),
        };
        let (Tick::Arrival(due) | Tick::Probe(due)) = tick else {
            return;
        };
        let wait = due.saturating_duration_since(Instant::now());
        if !wait.is_zero() && stopped.recv_timeout(wait) != Err(RecvTimeoutError::Timeout) {
            return;
        }
        if ticks.blocking_send(tick).is_err() {
            return;
        }
        match tick {
            Tick::Arrival(_) => {
                arrival = arrivals.next();
                if arrival.is_none() && ticks.blocking_send(Tick::ArrivalsEnd).is_err() {
                    return;
                }
            }
            // A probe that was itself late must not be followed by a burst of overdue ones.
            _ => probe = (probe + PROBE_EVERY).max(Instant::now()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn arrivals_come_in_order_between_probes_and_never_early() {
        let start = Instant::now();
        let offsets = [0, 3, 3, 25].map(Duration::from_millis);
        let mut pacer = Pacer::start(start, offsets.into_iter()).expect("thread");
        let (mut seen, mut probes) = (Vec::new(), 0);
        while let Some(tick) = pacer.next().await {
            match tick {
                Tick::Arrival(due) => {
                    assert!(Instant::now() >= due);
                    seen.push(due - start);
                }
                Tick::Probe(due) => {
                    assert!(Instant::now() >= due);
                    probes += 1;
                }
                Tick::ArrivalsEnd => break,
            }
        }
        assert_eq!(seen, offsets);
        assert!(probes >= 1);
    }

    #[tokio::test]
    async fn dropping_it_while_an_arrival_is_far_away_returns() {
        let far = std::iter::once(Duration::from_secs(3600));
        let mut pacer = Pacer::start(Instant::now(), far).expect("thread");
        assert!(matches!(pacer.next().await, Some(Tick::Probe(_))));
        drop(pacer);
    }
}
