//! The loop: admits, gives each request its output when it is due, and misbehaves as told.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use scalellm_engine_link::{
    Address, BlockHash, Command, EngineHandle, Listener, ListenerConfig, StepOutput, Submission,
    proto,
};
use scalellm_routing::block_hashes;

use crate::babbler;
use crate::prefix_cache::PrefixCache;
use crate::sequence::{Sequence, computing};
use crate::settings::{Garbage, Refuse, Settings};

/// A fake engine on a thread of its own. Dropping it breaks its connections, as a kill would.
pub struct FakeEngine {
    address: Address,
    epoch: u64,
    stop: Arc<Stop>,
    thread: Option<thread::JoinHandle<()>>,
}

/// How often the loop looks round when nothing is due.
const IDLE: Duration = Duration::from_millis(20);

impl FakeEngine {
    /// Binds and starts. Errors: the address is taken, or the settings are wrong (`InvalidInput`).
    pub fn start(address: &Address, settings: Settings) -> io::Result<FakeEngine> {
        settings
            .check()
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
        let stop = Arc::new(Stop::default());
        let stopped = stop.clone();
        let epoch = settings.epoch.unwrap_or_else(|| unix_us().max(1));
        let builder = thread::Builder::new().name("scalellm-fake".to_owned());
        if settings.faults.garbage == Some(Garbage::Bytes) {
            let (babbler, address) = babbler::bind(address)?;
            let thread = builder.spawn(move || babbler.run(&stopped.asked))?;
            return Ok(FakeEngine {
                address,
                epoch,
                stop,
                thread: Some(thread),
            });
        }
        let config = ListenerConfig {
            max_waiting: settings.max_waiting,
            welcome_delay: Duration::from_millis(settings.faults.welcome_delay_ms),
            refuse: settings.faults.refuse.map(|refuse| match refuse {
                Refuse::Draining => proto::RefusalCode::Draining,
                Refuse::Full => proto::RefusalCode::Full,
            }),
            ..ListenerConfig::default()
        };
        let (listener, handle) = Listener::start_with(address, settings.info(epoch), config)?;
        let address = listener.address().clone();
        let thread = builder.spawn(move || {
            let mut engine = Loop::new(settings, handle);
            match engine.run(&stopped) {
                End::Stopped => listener.close(),
                End::Died | End::Dropped => listener.abort(),
            }
        })?;
        Ok(FakeEngine {
            address,
            epoch,
            stop,
            thread: Some(thread),
        })
    }

    /// The bound address, with the real port where 0 was asked for.
    pub fn address(&self) -> &Address {
        &self.address
    }

    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// It was told to stop by a gateway, or died of a fault.
    pub fn is_over(&self) -> bool {
        self.thread
            .as_ref()
            .is_none_or(thread::JoinHandle::is_finished)
    }

    /// Sends what was emitted, closes the listener and joins.
    pub fn stop(mut self) {
        self.stop.gently.store(true, Ordering::Relaxed);
        self.join();
    }

    fn join(&mut self) {
        self.stop.asked.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the fake engine's thread panicked");
        }
    }
}

impl Drop for FakeEngine {
    fn drop(&mut self) {
        self.join();
    }
}

/// Serves until a Stop comes, a fault ends it, or `keep_going` (asked every 50 ms) says no.
pub fn run(
    address: &Address,
    settings: Settings,
    mut keep_going: impl FnMut() -> bool,
) -> io::Result<()> {
    let engine = FakeEngine::start(address, settings)?;
    while !engine.is_over() && keep_going() {
        thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

#[derive(Default)]
struct Stop {
    asked: AtomicBool,
    gently: AtomicBool,
}

enum End {
    Stopped,
    Died,
    Dropped,
}

struct Loop {
    settings: Settings,
    handle: EngineHandle,
    running: HashMap<u64, Sequence>,
    /// The running ones by time.
    due: BTreeSet<(Instant, u64)>,
    waiting: VecDeque<Submission>,
    prefixes: PrefixCache,
    /// When the prompts that were taken in will have been computed.
    prompts_until: Instant,
    steps: u64,
    outputs: u64,
    /// Requests that ended with an error.
    errors: u64,
    /// When the last step ended, or when it first had something to do after that.
    step_began_us: u64,
}

impl Loop {
    fn new(settings: Settings, handle: EngineHandle) -> Self {
        let prefixes = PrefixCache::new(settings.num_blocks as usize);
        Self {
            settings,
            handle,
            running: HashMap::new(),
            due: BTreeSet::new(),
            waiting: VecDeque::new(),
            prefixes,
            prompts_until: Instant::now(),
            steps: 0,
            outputs: 0,
            errors: 0,
            step_began_us: 0,
        }
    }

    fn run(&mut self, stop: &Stop) -> End {
        while !stop.asked.load(Ordering::Acquire) {
            let until_due = self.due.first().map_or(IDLE, |(due, _)| {
                due.saturating_duration_since(Instant::now())
            });
            for command in self.handle.poll(until_due.min(IDLE)) {
                match command {
                    Command::Submit(submission) => self.waiting.push_back(*submission),
                    Command::Cancel(key) => self.cancel(key),
                    Command::Calibrate { ticket, shapes } => {
                        let step_ms = self.settings.tbt_ms as f32;
                        self.handle
                            .answer_calibrate(ticket, vec![step_ms; shapes.len()]);
                    }
                    Command::KvSnapshot => {
                        self.tell_changes();
                        let all = self.prefixes.snapshot();
                        self.handle.emit_kv(all, Vec::new(), true);
                    }
                    Command::Drain => {}
                    Command::Stop => return End::Stopped,
                }
            }
            self.admit();
            if self.is_poisoned() {
                return End::Died;
            }
            if self.step() {
                if self
                    .settings
                    .faults
                    .die_after_outputs
                    .is_some_and(|after| self.outputs >= after)
                {
                    return End::Died;
                }
                if self.settings.faults.hang_after_steps == Some(self.steps) {
                    self.hang(stop);
                }
            }
        }
        if stop.gently.load(Ordering::Relaxed) {
            End::Stopped
        } else {
            End::Dropped
        }
    }

    fn admit(&mut self) {
        while self.running.len() < self.settings.max_num_seqs as usize {
            let Some(submission) = self.waiting.pop_front() else {
                break;
            };
            let key = submission.key;
            let (now, now_us) = (Instant::now(), unix_us());
            if self.running.is_empty() {
                self.step_began_us = now_us;
            }
            let sequence = self.begin(submission, now, now_us);
            self.due.insert((sequence.due, key));
            self.running.insert(key, sequence);
        }
    }

    /// Puts a prompt behind those that are being computed.
    fn begin(&mut self, submission: Submission, now: Instant, now_us: u64) -> Sequence {
        let submit = &submission.submit;
        let hashes = self.hashes(&submit.prompt_ids, &submit.cache_salt);
        let most = submit.prompt_tokens.saturating_sub(1);
        let cached_tokens = if self.settings.prefix_cache {
            let blocks = u32::try_from(self.prefixes.leading(&hashes)).unwrap_or(u32::MAX);
            blocks.saturating_mul(self.settings.block_size)
        } else {
            self.settings.cached_tokens
        }
        .min(most);
        let begin = self.prompts_until.max(now);
        self.prompts_until = begin + self.settings.prefill(submit.prompt_tokens - cached_tokens);
        let waits_us = u64::try_from((begin - now).as_micros()).unwrap_or(u64::MAX);
        Sequence::new(
            submission,
            self.prompts_until + self.settings.ttft(),
            now_us,
            now_us.saturating_add(waits_us),
            hashes,
            cached_tokens,
        )
    }

    fn hashes(&self, ids: &[u32], salt: &[u8]) -> Vec<BlockHash> {
        if self.settings.prefix_cache {
            block_hashes(ids, self.settings.block_size as usize, salt)
        } else {
            Vec::new()
        }
    }

    fn tell_changes(&mut self) {
        if let Some((stored, removed)) = self.prefixes.take_changes() {
            self.handle.emit_kv(stored, removed, false);
        }
    }

    /// Whether the next step computes a prompt that it dies of.
    fn is_poisoned(&self) -> bool {
        let Some(poison) = self.settings.faults.poison_id else {
            return false;
        };
        let now = Instant::now();
        self.running.values().any(|sequence| {
            sequence.due <= now
                && sequence.is_first()
                && sequence.submission.submit.prompt_ids.contains(&poison)
        })
    }

    fn cancel(&mut self, key: u64) {
        self.waiting.retain(|submission| submission.key != key);
        if let Some(sequence) = self.running.remove(&key) {
            self.due.remove(&(sequence.due, key));
        }
    }

    /// Gives all that is due; false if nothing is.
    fn step(&mut self) -> bool {
        let now = Instant::now();
        let now_us = unix_us();
        let limit = self
            .settings
            .faults
            .die_after_outputs
            .map_or(u64::MAX, |after| after - self.outputs);
        let ready: Vec<u64> = self
            .due
            .iter()
            .take_while(|(due, _)| *due <= now)
            .map(|&(_, key)| key)
            .take(usize::try_from(limit).unwrap_or(usize::MAX))
            .collect();
        let mut outputs = Vec::with_capacity(ready.len());
        for key in ready {
            let Some(mut sequence) = self.running.remove(&key) else {
                continue;
            };
            self.due.remove(&(sequence.due, key));
            if sequence.is_first() {
                self.prefixes.store(&sequence.hashes);
            }
            let output = sequence.step(&self.settings, now_us);
            if output.finish_reason == proto::FinishReason::Error as i32 {
                self.note_error();
            }
            if output.finish_reason == proto::FinishReason::Unspecified as i32 {
                // From the time it was due, so that lateness does not add up.
                sequence.due += self.settings.tbt(self.running.len());
                self.due.insert((sequence.due, key));
                self.running.insert(key, sequence);
            } else if self.settings.prefix_cache {
                let ids = sequence.all_ids(&self.settings);
                let salt = &sequence.submission.submit.cache_salt;
                self.prefixes.store(&self.hashes(&ids, salt));
            }
            outputs.push(StepOutput { key, output });
        }
        let any = !outputs.is_empty();
        if any {
            self.steps += 1;
            self.outputs += outputs.len() as u64;
            self.note_step(outputs.len(), now_us);
        }
        let load = self.load();
        self.handle.emit(outputs, load);
        self.tell_changes();
        any
    }

    /// The faults' errors end with the last of so many requests.
    fn note_error(&mut self) {
        self.errors += 1;
        let faults = &mut self.settings.faults;
        if faults.error_requests == Some(self.errors) {
            faults.error_after = None;
        }
    }

    fn note_step(&mut self, requests: usize, now_us: u64) {
        let requests = u32::try_from(requests).unwrap_or(u32::MAX);
        self.handle.note_step(proto::StepTimes {
            number: self.steps,
            started_us: self.step_began_us,
            requests,
            tokens: requests.saturating_mul(self.settings.tokens_per_step),
            phases: computing(self.step_began_us, now_us),
            expert_use: self.settings.load.expert_use(1),
        });
        self.step_began_us = now_us;
    }

    /// The faults' hang: neither poll nor emit.
    fn hang(&self, stop: &Stop) {
        let end = self
            .settings
            .faults
            .hang_ms
            .map(|ms| Instant::now() + Duration::from_millis(ms));
        while !stop.asked.load(Ordering::Acquire) && end.is_none_or(|end| Instant::now() < end) {
            thread::sleep(Duration::from_millis(5));
        }
    }

    fn load(&self) -> proto::Load {
        let numbers = &self.settings.load;
        let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        let blocks = |sequence: &Sequence| sequence.num_tokens().div_ceil(self.settings.block_size);
        let first = self
            .running
            .values()
            .filter(|sequence| sequence.is_first())
            .map(Sequence::uncached_tokens);
        let waiting = self.waiting.iter().map(|s| s.submit.prompt_tokens);
        let backlog = first.chain(waiting).map(u64::from);
        proto::Load {
            running: numbers.running.unwrap_or_else(|| count(self.running.len())),
            waiting: numbers.waiting.unwrap_or_else(|| count(self.waiting.len())),
            backlog_tokens: numbers.backlog_tokens.unwrap_or_else(|| backlog.sum()),
            kv_blocks_used: numbers
                .kv_blocks_used
                .unwrap_or_else(|| self.running.values().map(blocks).sum()),
            kv_blocks_total: self.settings.num_blocks,
            step_ms: numbers.step_ms.unwrap_or(self.settings.tbt_ms as f32),
            steps: self.steps,
            step_cost: self.settings.step_cost(),
            expert_use: numbers.expert_use(self.steps),
            ..proto::Load::default()
        }
    }
}

fn unix_us() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |age| u64::try_from(age.as_micros()).unwrap_or(u64::MAX))
}
