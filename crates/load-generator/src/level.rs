//! Drives one level: a closed loop of clients, or an open loop of scheduled sends.
//!
//! ```text
//!   warm-up (closed, forgotten) ──> measured ──> LevelReport
//!                                     │
//!              closed: N tasks, each sends, waits for the end, sends again
//!              open:   the pacer's arrivals, one task each, never waiting for an answer
//! ```
//!
//! What a task sends is one request, or a conversation: its further turns follow their answers.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::watch;
use tokio::task::{JoinError, JoinSet};

use crate::client::{Client, Exchange};
use crate::connection::Clock;
use crate::conversation::Conversation;
use crate::cpu::ThreadCpu;
use crate::error::LoadError;
use crate::lag::Lag;
use crate::pacer::{Pacer, Tick};
use crate::plan::{Level, Mode};
use crate::record::{Failure, FailureKind, Outcome, Record};
use crate::report::LevelReport;
use crate::run::{Phase, Progress};
use crate::stats::Gaps;

/// A client whose request failed begins no other sooner than this after it began: a dead server
/// is not to be hammered by a closed loop.
const AFTER_FAILURE: Duration = Duration::from_millis(100);
/// Clients that do an open level's warm-up.
const WARMUP_CLIENTS: usize = 16;
const PUBLISH_EVERY: Duration = Duration::from_millis(100);

/// What every level of a run shares.
pub(crate) struct LevelContext {
    pub client: Arc<Client>,
    pub clock: Clock,
    pub max_in_flight: usize,
    pub record_gaps: bool,
    pub stop: watch::Receiver<bool>,
    pub progress: watch::Sender<Progress>,
}

/// The raw results of one phase, before they are summed up.
pub(crate) struct Measured {
    pub records: Vec<Record>,
    pub gaps: Gaps,
    pub lag: Lag,
    pub cancelled: usize,
    pub cpu: Option<ThreadCpu>,
    pub start_ns: u64,
    /// Unix time.
    pub started_us: u64,
    pub wall_s: f64,
}

impl LevelContext {
    /// Warms up, measures, sums up. A stop ends it early with what was measured.
    pub async fn run(&mut self, number: usize, level: &Level) -> Result<LevelReport, LoadError> {
        let mode = level.mode()?;
        if level.warmup > 0 {
            let clients = match mode {
                Mode::Closed { concurrency } => concurrency,
                Mode::Open => WARMUP_CLIENTS,
            };
            let warmup = Mode::Closed {
                concurrency: clients.min(level.warmup),
            };
            self.drive(Phase::Warmup, number, level, warmup, level.warmup)
                .await?;
        }
        let measured = self
            .drive(Phase::Measure, number, level, mode, level.request_limit())
            .await?;
        Ok(LevelReport::sum_up(level, measured, self.record_gaps))
    }

    async fn drive(
        &mut self,
        phase: Phase,
        number: usize,
        level: &Level,
        mode: Mode,
        limit: usize,
    ) -> Result<Measured, LoadError> {
        let start = Instant::now();
        let started_us = unix_us(SystemTime::now());
        let duration = level
            .duration_s
            .filter(|_| phase == Phase::Measure)
            .map(Duration::from_secs_f64);
        let shared = Arc::new(Shared {
            client: Arc::clone(&self.client),
            sends_left: AtomicUsize::new(limit),
            until: duration.map(|duration| start + duration),
            in_flight: AtomicUsize::new(0),
            results: Mutex::new(Results {
                records: Vec::new(),
                gaps: Gaps::new()?,
                lag: Lag::new()?,
                record_gaps: self.record_gaps,
                progress: Progress {
                    phase,
                    level: number,
                    requests: (mode == Mode::Open || duration.is_none()).then_some(limit),
                    ..Progress::default()
                },
            }),
        });
        let send_at_s = match mode {
            Mode::Open => level.send_at_s.clone().unwrap_or_default(),
            Mode::Closed { .. } => Vec::new(),
        };
        let until = duration.unwrap_or(Duration::MAX);
        let arrivals = send_at_s
            .into_iter()
            .map(Duration::from_secs_f64)
            .take_while(move |due| *due < until);
        let cpu_before = ThreadCpu::now();
        let pacer = Pacer::start(start, arrivals.take(limit))?;
        let mut tasks = JoinSet::new();
        if let Mode::Closed { concurrency } = mode {
            let clients = concurrency.min(limit);
            let ramp_s = if phase == Phase::Measure {
                level.ramp_s
            } else {
                0.0
            };
            for client in 0..clients {
                let offset_s = ramp_s * client as f64 / clients as f64;
                let begins = start + Duration::from_secs_f64(offset_s);
                tasks.spawn(closed_loop_client(Arc::clone(&shared), begins));
            }
        }
        let chunks_before = self.client.token_chunks();
        self.attend(&shared, pacer, &mut tasks, chunks_before)
            .await?;
        tasks.shutdown().await;
        let cpu = cpu_before.and_then(|before| ThreadCpu::now().map(|now| now.since(before)));
        let cancelled = shared.in_flight.load(Ordering::Relaxed);
        let mut results = shared.lock();
        self.publish(&shared, &results, start, chunks_before);
        Ok(Measured {
            records: std::mem::take(&mut results.records),
            gaps: std::mem::replace(&mut results.gaps, Gaps::new()?),
            lag: std::mem::replace(&mut results.lag, Lag::new()?),
            cancelled,
            cpu,
            start_ns: self.clock.at_ns(start),
            started_us,
            wall_s: start.elapsed().as_secs_f64(),
        })
    }

    /// The level's own loop: sends what is due, reaps what has ended, probes its own delay.
    async fn attend(
        &mut self,
        shared: &Arc<Shared>,
        mut pacer: Pacer,
        tasks: &mut JoinSet<()>,
        chunks_before: u64,
    ) -> Result<(), LoadError> {
        let start = Instant::now();
        let mut published = start;
        let mut arrivals_left = true;
        while (arrivals_left || !tasks.is_empty()) && !*self.stop.borrow() {
            tokio::select! {
                biased;
                _ = self.stop.changed() => {}
                tick = pacer.next() => match tick {
                    Some(Tick::Arrival(due)) => self.send_arrival(shared, due, tasks),
                    Some(Tick::Probe(due)) => {
                        let mut results = shared.lock();
                        results.lag.wake.record_ns(nanoseconds(due.elapsed()));
                        if published.elapsed() >= PUBLISH_EVERY {
                            published = Instant::now();
                            self.publish(shared, &results, start, chunks_before);
                        }
                    }
                    Some(Tick::ArrivalsEnd) => arrivals_left = false,
                    None => return Err(LoadError::Panicked("the pacer's thread ended".into())),
                },
                Some(ended) = tasks.join_next(), if !tasks.is_empty() => check(ended)?,
            }
            while let Some(ended) = tasks.try_join_next() {
                check(ended)?;
            }
        }
        Ok(())
    }

    fn send_arrival(&self, shared: &Arc<Shared>, due: Instant, tasks: &mut JoinSet<()>) {
        let due_ns = self.clock.at_ns(due);
        // Taken here, in the order of the schedule.
        let conversation = shared.client.next_conversation();
        if shared.in_flight.load(Ordering::Relaxed) >= self.max_in_flight {
            let now_ns = self.clock.now_ns();
            let record = unsent(conversation.prompt, due_ns, now_ns, self.max_in_flight);
            shared.lock().add(Exchange::unsent(record));
            return;
        }
        shared.in_flight.fetch_add(1, Ordering::Relaxed);
        let shared = Arc::clone(shared);
        tasks.spawn(open_loop_client(shared, conversation, due_ns));
    }

    fn publish(&self, shared: &Shared, results: &Results, start: Instant, chunks_before: u64) {
        self.progress.send_replace(Progress {
            elapsed_s: start.elapsed().as_secs_f64(),
            in_flight: shared.in_flight.load(Ordering::Relaxed),
            token_chunks: self.client.token_chunks() - chunks_before,
            ..results.progress.clone()
        });
    }
}

/// One phase's state, shared with its tasks.
struct Shared {
    client: Arc<Client>,
    sends_left: AtomicUsize,
    until: Option<Instant>,
    in_flight: AtomicUsize,
    results: Mutex<Results>,
}

struct Results {
    records: Vec<Record>,
    gaps: Gaps,
    lag: Lag,
    record_gaps: bool,
    progress: Progress,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Results> {
        self.results.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn in_time(&self) -> bool {
        self.until.is_none_or(|until| Instant::now() < until)
    }

    /// Takes the right to send one more request.
    fn begin(&self) -> bool {
        let one_less = |left: usize| left.checked_sub(1);
        let order = Ordering::Relaxed;
        let taken = || self.sends_left.fetch_update(order, order, one_less);
        let begun = self.in_time() && taken().is_ok();
        if begun {
            self.in_flight.fetch_add(1, Ordering::Relaxed);
        }
        begun
    }

    fn finish(&self, exchange: Exchange) {
        self.in_flight.fetch_sub(1, Ordering::Relaxed);
        self.lock().add(exchange);
    }
}

impl Results {
    fn add(&mut self, exchange: Exchange) {
        let Exchange {
            mut record,
            send_lag_ns,
            ..
        } = exchange;
        if let Some(lag_ns) = send_lag_ns {
            self.lag.send.record_ns(lag_ns);
        }
        match &record.outcome {
            Outcome::Completed => {
                self.progress.completed += 1;
                for &gap_us in &record.gaps_us {
                    self.gaps.record_ns(u64::from(gap_us) * 1000);
                }
            }
            Outcome::TimedOut => self.progress.timed_out += 1,
            Outcome::Failed(failure) => {
                self.progress.failed += 1;
                self.progress.last_failure = Some(failure.message.clone());
            }
        }
        if !self.record_gaps {
            record.gaps_us = Vec::new();
        }
        self.records.push(record);
    }
}

/// One conversation after the other; each request waits for the answer before it.
async fn closed_loop_client(shared: Arc<Shared>, begins: Instant) {
    // Even a wait that is over would last until the next of the timer's milliseconds.
    if begins > Instant::now() {
        tokio::time::sleep_until(begins.into()).await;
    }
    let mut conversation = None;
    while shared.begin() {
        let mut current = conversation
            .take()
            .unwrap_or_else(|| shared.client.next_conversation());
        let begun = Instant::now();
        let exchange = shared.client.exchange(&current, None).await;
        let failed = matches!(exchange.record.outcome, Outcome::Failed(_));
        let thinking = shared.client.go_on(&mut current, &exchange);
        shared.finish(exchange);
        if let Some(thinking) = thinking {
            tokio::time::sleep(thinking).await;
            conversation = Some(current);
        } else if failed {
            tokio::time::sleep_until((begun + AFTER_FAILURE).into()).await;
        }
    }
}

/// A conversation that begins when it is due. Its further turns are due when their user has
/// thought, until the level's end.
async fn open_loop_client(shared: Arc<Shared>, mut conversation: Conversation, mut due_ns: u64) {
    loop {
        let exchange = shared.client.exchange(&conversation, Some(due_ns)).await;
        let thinking = shared.client.go_on(&mut conversation, &exchange);
        let ended_ns = exchange.record.end_ns;
        shared.finish(exchange);
        let Some(thinking) = thinking else { return };
        due_ns = ended_ns.saturating_add(nanoseconds(thinking));
        tokio::time::sleep_until(shared.client.instant(due_ns).into()).await;
        if !shared.in_time() {
            return;
        }
        shared.in_flight.fetch_add(1, Ordering::Relaxed);
    }
}

/// The record of a scheduled send that found the generator full.
fn unsent(prompt: u32, due_ns: u64, now_ns: u64, limit: usize) -> Record {
    Record {
        id: None,
        prompt,
        turn: 0,
        origin_ns: due_ns,
        sent_ns: None,
        resent: false,
        first_token_ns: None,
        last_token_ns: None,
        end_ns: now_ns,
        tokens: 0,
        token_source: Default::default(),
        prompt_tokens: None,
        chunks: 0,
        max_gap_ns: 0,
        status: None,
        outcome: Outcome::Failed(Failure::new(
            FailureKind::Overload,
            format!("not sent: {limit} requests were already open (max_in_flight)"),
        )),
        gaps_us: Vec::new(),
    }
}

fn check(ended: Result<(), JoinError>) -> Result<(), LoadError> {
    ended.map_err(|error| LoadError::Panicked(error.to_string()))
}

fn unix_us(time: SystemTime) -> u64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH);
    u64::try_from(since.unwrap_or_default().as_micros()).unwrap_or(u64::MAX)
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
