//! What every request used, written in batches by one task.
//!
//! A request has one row, by its start and a number made here. It is written when the request ends, and, marked
//! `running`, in every interval while it lasts, so that a killed gateway loses at most one interval (and one write) of
//! tokens. A row that is not `running` any more never changes: nothing is counted twice, however often a write is
//! repeated.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;
use tokio::sync::{mpsc, watch};

use crate::accounts::{Settings, Shared};
use crate::key::Key;
use crate::usage_table::UsageTable;

/// Rows of one transaction.
const BATCH: usize = 500;
const PRUNE_EVERY: Duration = Duration::from_secs(60);
const PRUNE_AT_ONCE: i64 = 10_000;
pub const RUNNING: &str = "running";

/// What one request has used so far.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Usage {
    pub request_id: Arc<str>,
    pub key: Option<Arc<Key>>,
    pub model: Arc<str>,
    pub route: &'static str,
    /// The same whenever it is asked for, as it is part of the row's name.
    pub started_at_ms: i64,
    pub duration_us: i64,
    pub first_token_us: Option<i64>,
    pub prompt_tokens: i64,
    pub cached_tokens: i64,
    pub output_tokens: i64,
    /// How often a choice went on after its replica's death.
    pub replays: i64,
    pub status: i64,
    /// `ok`, `error`, `client_left`; [`RUNNING`] until it is known.
    pub outcome: &'static str,
    /// What the model's safety hooks did, as `ACTION:HOOK`; "" for nothing.
    pub safety: String,
}

/// A request that still runs, for the writer to look at.
pub trait Live: Send + Sync {
    fn usage(&self) -> Usage;
}

type Running = (Instant, Arc<dyn Live>);

/// Requests that run, and the way of those that ended to the writer.
pub struct Meters {
    next: AtomicU64,
    live: Mutex<HashMap<u64, Running>>,
    ended: mpsc::Sender<(u64, Usage)>,
    waiting: AtomicUsize,
    stop: watch::Sender<bool>,
    pub(crate) written: AtomicU64,
    pub(crate) lost: AtomicU64,
}

impl Meters {
    pub(crate) fn new(settings: &Settings) -> (Arc<Meters>, mpsc::Receiver<(u64, Usage)>) {
        let (ended, records) = mpsc::channel(settings.usage_queue.max(1));
        let meters = Meters {
            next: AtomicU64::new(0),
            live: Mutex::default(),
            ended,
            waiting: AtomicUsize::new(0),
            stop: watch::Sender::new(false),
            written: AtomicU64::new(0),
            lost: AtomicU64::new(0),
        };
        (Arc::new(meters), records)
    }

    /// Watches a request until [`Meters::end`] is called with the number that this returns.
    pub fn begin(&self, live: Arc<dyn Live>) -> u64 {
        let number = self.next.fetch_add(1, Relaxed);
        self.live.lock().insert(number, (Instant::now(), live));
        number
    }

    /// Never waits: if too much waits for the writer, this request's usage is lost, and counted as such.
    pub fn end(&self, number: u64, usage: Usage) {
        self.live.lock().remove(&number);
        self.waiting.fetch_add(1, Relaxed);
        if self.ended.try_send((number, usage)).is_err() {
            self.waiting.fetch_sub(1, Relaxed);
            self.lost.fetch_add(1, Relaxed);
        }
    }

    /// Ended requests that are not written yet.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.waiting.load(Relaxed)
    }

    pub(crate) fn close(&self) {
        self.stop.send_replace(true);
    }

    fn running_longer_than(&self, time: Duration) -> Vec<(u64, Usage)> {
        let now = Instant::now();
        // The requests' own locks are taken outside of this one.
        let live: Vec<(u64, Arc<dyn Live>)> = self
            .live
            .lock()
            .iter()
            .filter(|(_, (since, _))| now.saturating_duration_since(*since) >= time)
            .map(|(number, (_, live))| (*number, Arc::clone(live)))
            .collect();
        live.into_iter()
            .map(|(number, live)| (number, live.usage()))
            .collect()
    }
}

pub(crate) struct Writer {
    shared: Arc<Shared>,
    meters: Arc<Meters>,
    interval: Duration,
    kept: Duration,
    pruned: Option<Instant>,
    table: UsageTable,
}

impl Writer {
    pub fn new(shared: Arc<Shared>, meters: Arc<Meters>, settings: &Settings) -> Writer {
        Writer {
            table: UsageTable::new(shared.database.clone()),
            shared,
            meters,
            interval: settings.usage_interval,
            kept: settings.usage_kept,
            pruned: None,
        }
    }

    pub async fn run(mut self, mut records: mpsc::Receiver<(u64, Usage)>) {
        let mut stop = self.meters.stop.subscribe();
        let mut tick = tokio::time::interval(self.interval);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut batch = Vec::with_capacity(BATCH);
        loop {
            let room = BATCH - batch.len();
            let due = tokio::select! {
                _ = stop.wait_for(|stop| *stop) => break,
                _ = tick.tick() => true,
                _ = records.recv_many(&mut batch, room), if room > 0 => batch.len() >= BATCH,
            };
            if !due {
                continue;
            }
            let full = batch.len() >= BATCH;
            if !self.write_ended(&mut batch).await {
                // The database is down: what comes meanwhile waits in the queue.
                tokio::select! {
                    _ = stop.wait_for(|stop| *stop) => break,
                    () = tokio::time::sleep(self.interval) => {}
                }
            } else if !full {
                self.write_running().await;
                self.prune().await;
            }
        }
        records.close();
        // Accounts::shutdown bounds how long this may take.
        loop {
            let room = BATCH - batch.len();
            let more = room == 0 || records.recv_many(&mut batch, room).await > 0;
            if batch.is_empty() && !more {
                break;
            }
            if !self.write_ended(&mut batch).await {
                tokio::time::sleep(self.interval.min(Duration::from_millis(200))).await;
            }
        }
    }

    /// Empties `batch` into the database; false, and `batch` as it was, if it did not take it.
    async fn write_ended(&mut self, batch: &mut Vec<(u64, Usage)>) -> bool {
        if batch.is_empty() {
            return true;
        }
        let written = self.table.write(batch).await;
        self.shared.heard(written.as_ref().copied());
        if written.is_err() {
            return false;
        }
        self.meters.waiting.fetch_sub(batch.len(), Relaxed);
        self.meters.written.fetch_add(batch.len() as u64, Relaxed);
        batch.clear();
        true
    }

    async fn write_running(&mut self) {
        let running = self.meters.running_longer_than(self.interval);
        for chunk in running.chunks(BATCH) {
            // Not tried again: the next interval brings newer figures.
            if let Err(error) = self.table.write(chunk).await {
                self.shared.heard(Err(&error));
                return;
            }
        }
    }

    async fn prune(&mut self) {
        let now = Instant::now();
        if self.pruned.is_some_and(|at| now - at < PRUNE_EVERY) {
            return;
        }
        self.pruned = Some(now);
        let before_ms = unix_ms() - i64::try_from(self.kept.as_millis()).unwrap_or(i64::MAX / 2);
        if let Err(error) = self.table.forget(before_ms, PRUNE_AT_ONCE).await {
            tracing::debug!(%error, "old usage stays a little longer");
        }
    }
}

fn unix_ms() -> i64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}
