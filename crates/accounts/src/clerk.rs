//! The one task that asks the database for keys and leases, so that requests do not.
//!
//! ```text
//! requests --(bounded queue)--> clerk --(a few at a time)--> database
//!                                 `--> key ring, ledgers
//! ```
//!
//! Questions for the same key are one question; of each key there is at most one sync on its way.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use tokio::sync::{mpsc, oneshot};

use crate::accounts::Shared;
use crate::error::Result;
use crate::keyring::KeyState;
use crate::ledger::{Answer, Report};
use crate::secret::SecretHash;
use crate::store::Found;
use crate::{lease, store};

const AT_ONCE: usize = 4;
const MAX_SYNCS_A_TICK: usize = 256;
const MAX_WAITING: usize = 4096;
const TICK: Duration = Duration::from_secs(1);
/// A key that nobody used for this long gives its leases back.
const IDLE: Duration = Duration::from_secs(60);
const FORGET_EVERY: Duration = Duration::from_secs(3600);
/// Budgets of months are the longest.
const OLD_MS: i64 = 62 * 24 * 3600 * 1000;

pub(crate) enum Job {
    Find(SecretHash, Option<oneshot::Sender<Result<()>>>),
    Sync(Arc<KeyState>),
    /// Gives all leases back and ends.
    Close,
}

enum Done {
    Opened(Result<bool>),
    Found(SecretHash, Result<Found>),
    Synced {
        state: Arc<KeyState>,
        asked: Instant,
        reports: Vec<Report>,
        answers: Result<Vec<Answer>>,
    },
    Forgot,
}

pub(crate) struct Clerk {
    shared: Arc<Shared>,
    running: FuturesUnordered<BoxFuture<'static, Done>>,
    finding: HashMap<SecretHash, Vec<oneshot::Sender<Result<()>>>>,
    waiting: usize,
    /// Keys in use, by id.
    active: HashMap<String, Arc<KeyState>>,
    /// Keys whose sync is on its way.
    syncing: HashMap<String, Again>,
    migrated: bool,
    opening: bool,
    forgot: Option<Instant>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Again {
    No,
    Yes,
}

impl Clerk {
    pub fn new(shared: Arc<Shared>) -> Clerk {
        Clerk {
            shared,
            running: FuturesUnordered::new(),
            finding: HashMap::new(),
            waiting: 0,
            active: HashMap::new(),
            syncing: HashMap::new(),
            migrated: false,
            opening: false,
            forgot: None,
        }
    }

    pub async fn run(mut self, mut jobs: mpsc::Receiver<Job>) {
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                Some(done) = self.running.next(), if !self.running.is_empty() => self.done(done),
                job = jobs.recv(), if self.running.len() < AT_ONCE => match job {
                    Some(Job::Find(hash, reply)) => self.find(hash, reply),
                    Some(Job::Sync(state)) => self.sync(state),
                    Some(Job::Close) | None => break,
                },
                _ = tick.tick() => self.tick(),
            }
        }
        self.close().await;
    }

    fn find(&mut self, hash: SecretHash, reply: Option<oneshot::Sender<Result<()>>>) {
        if self.waiting >= MAX_WAITING {
            // Dropping the reply tells the request that it was not heard.
            return;
        }
        self.waiting += usize::from(reply.is_some());
        let first = !self.finding.contains_key(&hash);
        self.finding.entry(hash).or_default().extend(reply);
        if first {
            let database = self.shared.database.clone();
            let work = async move { Done::Found(hash, store::find(&database, &hash).await) };
            self.running.push(Box::pin(work));
        }
    }

    fn sync(&mut self, state: Arc<KeyState>) {
        // Before the ledgers are read: a request that asks from now on is heard again.
        state.sync_asked.store(false, Relaxed);
        self.start_sync(state, false);
    }

    fn start_sync(&mut self, state: Arc<KeyState>, close: bool) {
        let id = state.key().id.clone();
        if let Some(again) = self.syncing.get_mut(&id) {
            *again = Again::Yes;
            return;
        }
        let asked = Instant::now();
        let reports = state.reports(close, asked, self.shared.lease);
        if reports.is_empty() {
            return;
        }
        self.syncing.insert(id.clone(), Again::No);
        let shared = Arc::clone(&self.shared);
        self.running.push(Box::pin(async move {
            let synced = lease::sync(
                &shared.database,
                &shared.gateway,
                &id,
                &reports,
                shared.lease,
            );
            let answers = synced.await;
            Done::Synced {
                state,
                asked,
                reports,
                answers,
            }
        }));
    }

    fn done(&mut self, done: Done) {
        match done {
            Done::Opened(opened) => {
                self.opening = false;
                self.shared.heard(opened.as_ref().map(|_| ()));
                if let Ok(any) = opened {
                    self.migrated = true;
                    self.shared.set_keys_exist(any);
                }
            }
            Done::Found(hash, found) => {
                self.shared.heard(found.as_ref().map(|_| ()));
                let result = match found {
                    Ok(found) => {
                        self.take_in(hash, found);
                        Ok(())
                    }
                    Err(error) => {
                        self.shared.ring.refresh_failed(&hash);
                        Err(error)
                    }
                };
                for reply in self.finding.remove(&hash).unwrap_or_default() {
                    self.waiting -= 1;
                    let _ = reply.send(result.clone());
                }
            }
            Done::Synced {
                state,
                asked,
                reports,
                answers,
            } => {
                self.shared.heard(answers.as_ref().map(|_| ()));
                let failed = answers.is_err();
                if let Ok(answers) = answers {
                    state.apply(&reports, &answers, asked, self.shared.lease);
                }
                state.syncs.send_modify(|count| *count += 1);
                let again = self.syncing.remove(&state.key().id);
                // After a failure the tick tries again: asking at once would only add to the database's trouble.
                if !failed && again == Some(Again::Yes) {
                    self.start_sync(state, false);
                }
            }
            Done::Forgot => {}
        }
    }

    fn take_in(&mut self, hash: SecretHash, found: Found) {
        let active = &mut self.active;
        let state_of = |key: crate::key::Key| {
            let state = active.get(&key.id).map(Arc::clone);
            match state {
                Some(state) => {
                    state.update(key);
                    state
                }
                None => {
                    let id = key.id.clone();
                    let state = KeyState::new(key);
                    active.insert(id, Arc::clone(&state));
                    state
                }
            }
        };
        self.shared.ring.put(hash, found, state_of, Instant::now());
    }

    fn tick(&mut self) {
        let now = Instant::now();
        if !self.opening && (!self.migrated || !self.shared.keys_known_to_exist()) {
            self.open();
        }
        let lease = self.shared.lease;
        let mut idle = Vec::new();
        let mut due = Vec::new();
        for (id, state) in &self.active {
            // Two of the holders are this table and the ring; others are requests.
            if state.idle_for(now) > IDLE && Arc::strong_count(state) <= 2 {
                idle.push(id.clone());
            } else if state.wants_sync(now, lease) {
                due.push(Arc::clone(state));
            }
        }
        // While the database is down one question at a time finds out when it is back.
        let most = if self.shared.is_down() {
            1
        } else {
            MAX_SYNCS_A_TICK
        };
        for state in due.into_iter().take(most) {
            self.start_sync(state, false);
        }
        for id in idle {
            if self.syncing.contains_key(&id) {
                continue;
            }
            if let Some(state) = self.active.remove(&id) {
                self.shared.ring.forget(&state);
                self.start_sync(state, true);
            }
        }
        if self.migrated && self.forgot.is_none_or(|at| now - at > FORGET_EVERY) {
            self.forgot = Some(now);
            let database = self.shared.database.clone();
            self.running.push(Box::pin(async move {
                if let Err(error) = lease::forget_old(&database, OLD_MS).await {
                    tracing::warn!(%error, "old budgets stay for another hour");
                }
                Done::Forgot
            }));
        }
    }

    fn open(&mut self) {
        self.opening = true;
        let database = self.shared.database.clone();
        let migrated = self.migrated;
        self.running.push(Box::pin(async move {
            let opened = async {
                if !migrated {
                    database.migrate().await?;
                }
                store::any(&database).await
            };
            Done::Opened(opened.await)
        }));
    }

    async fn close(mut self) {
        while let Some(done) = self.running.next().await {
            self.done(done);
        }
        for state in std::mem::take(&mut self.active).into_values() {
            self.start_sync(state, true);
            if self.running.len() >= AT_ONCE {
                self.running.next().await;
            }
        }
        while self.running.next().await.is_some() {}
    }
}
