//! What the runtime thread and the engine's loop share. One lock, never held across a wait.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use parking_lot::{Condvar, Mutex, MutexGuard};
use tokio::sync::oneshot;
use tonic::Status;

use super::config::ListenerConfig;
use super::session::Session;
use super::validate::validate;
use super::{Command, EngineInfo, StepOutput, Submission};
use crate::proto::{self, FinishReason, FromEngine, Refusal, RefusalCode, RequestRef};

pub(super) struct Core {
    pub(super) info: EngineInfo,
    pub(super) config: ListenerConfig,
    state: Mutex<State>,
    /// Something is to be polled.
    work: Condvar,
    start: Instant,
    /// When the loop last came round, in microseconds since `start`.
    last_step_us: AtomicU64,
    /// The loop waits for work: it is alive, however long that takes.
    loop_waits: AtomicBool,
}

#[derive(Default)]
struct State {
    sessions: HashMap<String, Session>,
    /// Requests accepted and not finished, by key.
    requests: HashMap<u64, Owner>,
    /// Requests whose prompt is still coming in chunks.
    assembling: usize,
    next_key: u64,
    next_stream: u64,
    load: proto::Load,
    draining: bool,
    closing: bool,
    kv_sequence: u64,
    calibration: Option<(u64, oneshot::Sender<Vec<f32>>)>,
    next_ticket: u64,
    todo: Todo,
}

/// For the next poll. Bounded: pending by the accepted requests, cancels by those that were polled before.
#[derive(Default)]
struct Todo {
    pending: BTreeMap<u64, Box<Submission>>,
    pending_tokens: u64,
    cancels: Vec<u64>,
    kv_snapshot: bool,
    calibrate: Option<(u64, Vec<proto::CalibrationShape>)>,
    drain: bool,
    stop: bool,
}

struct Owner {
    session_id: String,
    request: RequestRef,
    received_us: u64,
}

/// A stream's right to speak for a session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Attachment {
    pub(super) session_id: String,
    stream: u64,
}

/// What a stream is to send next.
pub(super) enum Next {
    Frame(Box<FromEngine>),
    Wait,
    End(Status),
    /// The listener closes and everything is sent.
    Closed,
}

impl Core {
    pub(super) fn new(info: EngineInfo, config: ListenerConfig) -> Arc<Self> {
        Arc::new(Self {
            info,
            config,
            state: Mutex::new(State {
                next_key: 1,
                next_stream: 1,
                next_ticket: 1,
                ..State::default()
            }),
            work: Condvar::new(),
            start: Instant::now(),
            last_step_us: AtomicU64::new(0),
            loop_waits: AtomicBool::new(false),
        })
    }

    // ------------------------------------------------------------ the engine's loop

    pub(super) fn poll(&self, timeout: Duration) -> Vec<Command> {
        let deadline = Instant::now().checked_add(timeout);
        self.loop_waits.store(true, Ordering::Relaxed);
        let todo = {
            let mut state = self.state.lock();
            while state.todo.is_empty() && !state.closing {
                let timed_out = match deadline {
                    Some(deadline) => self.work.wait_until(&mut state, deadline).timed_out(),
                    None => {
                        self.work.wait(&mut state);
                        false
                    }
                };
                if timed_out {
                    break;
                }
            }
            std::mem::take(&mut state.todo)
        };
        self.came_round();
        self.loop_waits.store(false, Ordering::Relaxed);
        todo.into_commands()
    }

    fn came_round(&self) {
        let now = u64::try_from(self.start.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.last_step_us.store(now, Ordering::Relaxed);
    }

    fn step_age_ms(&self) -> u32 {
        if self.loop_waits.load(Ordering::Relaxed) {
            return 0;
        }
        let last = Duration::from_micros(self.last_step_us.load(Ordering::Relaxed));
        u32::try_from(self.start.elapsed().saturating_sub(last).as_millis()).unwrap_or(u32::MAX)
    }

    pub(super) fn emit(&self, outputs: Vec<StepOutput>, load: proto::Load) {
        self.came_round();
        let mut state = self.state.lock();
        state.load = load;
        // Few sessions: a list is found through faster than a map is built.
        let mut frames: Vec<(String, FromEngine, Vec<RequestRef>)> = Vec::new();
        for StepOutput { key, mut output } in outputs {
            // Cancelled requests fall away here.
            let Some(owner) = state.requests.get(&key) else {
                continue;
            };
            output.request = Some(owner.request);
            if let Some(times) = &mut output.times {
                times.received_us = owner.received_us;
            }
            let index = match frames.iter().position(|(id, _, _)| *id == owner.session_id) {
                Some(index) => index,
                None => {
                    frames.push((owner.session_id.clone(), FromEngine::default(), Vec::new()));
                    frames.len() - 1
                }
            };
            let (session_id, frame, ends) = &mut frames[index];
            if output.finish_reason != FinishReason::Unspecified as i32 {
                ends.push(owner.request);
                let request = owner.request;
                state.requests.remove(&key);
                if let Some(session) = state.sessions.get_mut(session_id.as_str()) {
                    session.requests.remove(&request.id);
                }
            }
            frame.outputs.push(output);
        }
        for (session_id, frame, ends) in frames {
            self.push_frame(&mut state, &session_id, frame, ends);
        }
    }

    /// Numbers, keeps and announces a frame; drops a session that does not take its frames.
    fn push_frame(
        &self,
        state: &mut State,
        session_id: &str,
        frame: FromEngine,
        ends: Vec<RequestRef>,
    ) {
        let Some(session) = state.sessions.get_mut(session_id) else {
            return;
        };
        session.push(frame, ends);
        session.wake();
        if session.retained_bytes() > self.config.max_retained_bytes {
            tracing::warn!(
                session = session_id,
                "dropped: it does not take or acknowledge its frames"
            );
            self.remove_session(state, session_id);
        }
    }

    pub(super) fn emit_kv(
        &self,
        stored: Vec<proto::KvStored>,
        removed: Vec<Vec<u8>>,
        snapshot: bool,
    ) {
        let mut state = self.state.lock();
        // A snapshot is the state after the last event: it has that event's number.
        if !snapshot {
            state.kv_sequence += 1;
        }
        let events = proto::KvEvents {
            epoch: self.info.epoch,
            sequence: state.kv_sequence,
            snapshot,
            stored,
            removed,
        };
        let asked = state
            .sessions
            .values()
            .any(|session| session.kv_snapshot_wanted);
        let receivers: Vec<String> = state
            .sessions
            .iter()
            .filter(|(_, session)| {
                session.kv_events && (!snapshot || !asked || session.kv_snapshot_wanted)
            })
            .map(|(id, _)| id.clone())
            .collect();
        for session_id in receivers {
            if snapshot && let Some(session) = state.sessions.get_mut(&session_id) {
                session.kv_snapshot_wanted = false;
            }
            let frame = FromEngine {
                kv_events: Some(events.clone()),
                ..FromEngine::default()
            };
            self.push_frame(&mut state, &session_id, frame, Vec::new());
        }
    }

    pub(super) fn answer_calibrate(&self, ticket: u64, step_ms: Vec<f32>) {
        let mut state = self.state.lock();
        if let Some((_, answer)) = state.calibration.take_if(|(waiting, _)| *waiting == ticket) {
            // The caller may have left; then nobody wants the answer.
            let _ = answer.send(step_ms);
        }
    }

    // ------------------------------------------------------------ streams

    /// A stream begins with Hello: takes up or makes the session.
    pub(super) fn attach(&self, hello: &proto::Hello) -> Result<Attachment, Status> {
        let length = hello.session_id.chars().count();
        if !(1..=64).contains(&length) || hello.session_id.chars().any(char::is_control) {
            return Err(Status::invalid_argument(format!(
                "session_id has {length} characters; allowed are 1 to 64, no control characters"
            )));
        }
        let mut state = self.state.lock();
        if state.closing {
            return Err(Status::unavailable("the engine is closing"));
        }
        let reattached = match (
            hello.last_sequence,
            state.sessions.get_mut(&hello.session_id),
        ) {
            (Some(last), Some(session)) => session.rewind(last),
            _ => false,
        };
        if !reattached {
            self.remove_session(&mut state, &hello.session_id);
            if state.sessions.len() >= self.config.max_sessions {
                return Err(Status::resource_exhausted(format!(
                    "the engine has {} sessions",
                    state.sessions.len()
                )));
            }
            state
                .sessions
                .insert(hello.session_id.clone(), Session::new(hello.kv_events));
        }
        let stream = state.next_stream;
        state.next_stream += 1;
        if let Some(session) = state.sessions.get_mut(&hello.session_id) {
            session.wake();
            session.stream = Some(stream);
            session.detached = None;
            session.kv_events = hello.kv_events;
            session.welcome = Some(proto::Welcome {
                epoch: self.info.epoch,
                reattached,
                kv_hash_key: Vec::new(),
            });
        }
        Ok(Attachment {
            session_id: hello.session_id.clone(),
            stream,
        })
    }

    /// The stream broke: the session waits for another one.
    pub(super) fn detach(&self, attachment: &Attachment) {
        let mut state = self.state.lock();
        if let Some(session) = state.current(attachment) {
            session.stream = None;
            session.detached = Some(Instant::now());
            session.wake();
        }
    }

    /// The gateway ended its side: it wants nothing any more.
    pub(super) fn goodbye(&self, attachment: &Attachment) {
        let mut state = self.state.lock();
        if state.current(attachment).is_some() {
            self.remove_session(&mut state, &attachment.session_id);
        }
    }

    /// What the stream is to send next; with `Next::Wait` the waker is kept.
    pub(super) fn next(&self, attachment: &Attachment, waker: &std::task::Waker) -> Next {
        let mut state = self.state.lock();
        let closing = state.closing;
        let load = self.load(&state);
        let Some(session) = state.current(attachment) else {
            return Next::End(Status::aborted(
                "the session is over, or goes on on another stream",
            ));
        };
        let frame = if let Some(welcome) = session.welcome.take() {
            Some(FromEngine {
                welcome: Some(welcome),
                ..FromEngine::default()
            })
        } else if let Some(frame) = session.next_frame() {
            Some(frame)
        } else if closing {
            return Next::Closed;
        } else {
            session.load_due.then(FromEngine::default)
        };
        match frame {
            Some(mut frame) => {
                session.load_due = false;
                frame.load = Some(load);
                Next::Frame(Box::new(frame))
            }
            None => {
                session.waker = Some(waker.clone());
                Next::Wait
            }
        }
    }

    fn load(&self, state: &State) -> proto::Load {
        let pending = u32::try_from(state.todo.pending.len()).unwrap_or(u32::MAX);
        proto::Load {
            waiting: state.load.waiting.saturating_add(pending),
            backlog_tokens: state
                .load
                .backlog_tokens
                .saturating_add(state.todo.pending_tokens),
            step_age_ms: self.step_age_ms(),
            draining: state.draining,
            epoch: self.info.epoch,
            ..state.load
        }
    }

    /// Every session is due a frame, whatever else happens.
    pub(super) fn load_is_due(&self) {
        for session in self.state.lock().sessions.values_mut() {
            session.load_due = true;
            session.wake();
        }
    }

    /// Removes the sessions that did not reattach in time.
    pub(super) fn reap(&self) {
        let mut state = self.state.lock();
        let limit = self.config.reattach_within;
        let late: Vec<String> = state
            .sessions
            .iter()
            .filter(|(_, session)| {
                session
                    .detached
                    .is_some_and(|since| since.elapsed() >= limit)
            })
            .map(|(id, _)| id.clone())
            .collect();
        for session_id in late {
            tracing::info!(
                session = session_id,
                "did not reattach, its requests are cancelled"
            );
            self.remove_session(&mut state, &session_id);
        }
    }

    fn remove_session(&self, state: &mut State, session_id: &str) {
        let Some(mut session) = state.sessions.remove(session_id) else {
            return;
        };
        session.wake();
        for (_, key) in session.requests.into_values() {
            self.forget(state, key);
        }
    }

    /// Takes a request from the loop: out of its queue, or by a Cancel.
    fn forget(&self, state: &mut State, key: u64) {
        state.requests.remove(&key);
        match state.todo.pending.remove(&key) {
            Some(submission) => {
                state.todo.pending_tokens -= u64::from(submission.submit.prompt_tokens)
            }
            None => {
                state.todo.cancels.push(key);
                self.work.notify_one();
            }
        }
    }

    // ------------------------------------------------------------ messages of a stream

    /// Judges a Submit by its head. `Ok(None)` after a refusal; otherwise the request's submission, whose prompt may
    /// still be incomplete: then it counts as assembling until `accept` or `give_up`.
    pub(super) fn receive(
        &self,
        attachment: &Attachment,
        mut submit: proto::Submit,
    ) -> Option<Submission> {
        let received_us = unix_us();
        let request = submit.request.unwrap_or_default();
        let mut state = self.state.lock();
        let session = state.current(attachment)?;
        // First of all: a request that runs is never refused for another reason when it is sent again.
        let verdict = if session.knows(request) {
            Err(refusal(
                RefusalCode::Duplicate,
                "request",
                format!("request {} runs already", request.id),
            ))
        } else {
            validate(&submit, &self.info).and_then(|()| self.room(&state))
        };
        if let Err(refusal) = verdict {
            self.refuse(
                &mut state,
                &attachment.session_id,
                Refusal {
                    request: Some(request),
                    ..refusal
                },
            );
            return None;
        }
        // A later attempt fences an earlier one.
        let earlier = state
            .current(attachment)
            .and_then(|session| session.requests.remove(&request.id));
        if let Some((_, key)) = earlier {
            self.forget(&mut state, key);
        }
        normalise(&mut submit, &self.info);
        let key = state.next_key;
        state.next_key += 1;
        state.assembling += 1;
        let deadline_us = submit
            .deadline_ms
            .map(|ms| received_us + u64::from(ms) * 1_000);
        Some(Submission {
            key,
            submit,
            received_us,
            deadline_us,
        })
    }

    fn room(&self, state: &State) -> Result<(), Refusal> {
        if state.draining || state.closing {
            return Err(refusal(
                RefusalCode::Draining,
                "",
                "the engine is draining".to_owned(),
            ));
        }
        if let Some(code) = self.config.refuse {
            return Err(refusal(
                code,
                "",
                "the engine was told to refuse".to_owned(),
            ));
        }
        let limit = self.info.max_num_seqs as usize + self.config.max_waiting;
        if state.requests.len() + state.assembling >= limit {
            let message = format!("the engine has {limit} requests; allowed is {limit}");
            return Err(refusal(RefusalCode::Full, "", message));
        }
        Ok(())
    }

    /// The prompt is complete.
    pub(super) fn accept(&self, attachment: &Attachment, submission: Submission) {
        let mut state = self.state.lock();
        state.assembling -= 1;
        let Some(request) = submission.submit.request else {
            return;
        };
        if state.draining {
            // The loop may have exited for want of work by the time this would reach it.
            let refusal = refusal(
                RefusalCode::Draining,
                "",
                "the engine is draining".to_owned(),
            );
            self.refuse(
                &mut state,
                &attachment.session_id,
                Refusal {
                    request: Some(request),
                    ..refusal
                },
            );
            return;
        }
        let Some(session) = state.current(attachment) else {
            return;
        };
        let key = submission.key;
        session.requests.insert(request.id, (request.attempt, key));
        let owner = Owner {
            session_id: attachment.session_id.clone(),
            request,
            received_us: submission.received_us,
        };
        state.requests.insert(key, owner);
        state.todo.pending_tokens += u64::from(submission.submit.prompt_tokens);
        state.todo.pending.insert(key, Box::new(submission));
        drop(state);
        self.work.notify_one();
    }

    /// An incomplete prompt is dropped; with a refusal or without.
    pub(super) fn give_up(
        &self,
        attachment: &Attachment,
        submission: &Submission,
        refusal: Option<Refusal>,
    ) {
        let mut state = self.state.lock();
        state.assembling -= 1;
        if let Some(refusal) = refusal {
            let refusal = Refusal {
                request: submission.submit.request,
                ..refusal
            };
            if state.current(attachment).is_some() {
                self.refuse(&mut state, &attachment.session_id, refusal);
            }
        }
    }

    fn refuse(&self, state: &mut State, session_id: &str, refusal: Refusal) {
        // The end of a running request is not this one's: only what was never known may be sent again.
        let frame = FromEngine {
            refusals: vec![refusal],
            ..FromEngine::default()
        };
        self.push_frame(state, session_id, frame, Vec::new());
    }

    /// Ends a request, known or not: the gateway keeps it until it hears of its end.
    pub(super) fn cancel(&self, attachment: &Attachment, request: RequestRef) {
        let mut state = self.state.lock();
        let Some(session) = state.current(attachment) else {
            return;
        };
        let running = session
            .requests
            .get(&request.id)
            .filter(|(attempt, _)| *attempt == request.attempt);
        let key = running.map(|&(_, key)| key);
        if key.is_some() {
            session.requests.remove(&request.id);
        }
        if let Some(key) = key {
            self.forget(&mut state, key);
        }
        let output = proto::Output {
            request: Some(request),
            finish_reason: FinishReason::Cancelled as i32,
            ..proto::Output::default()
        };
        let frame = FromEngine {
            outputs: vec![output],
            ..FromEngine::default()
        };
        self.push_frame(&mut state, &attachment.session_id, frame, vec![request]);
    }

    pub(super) fn acknowledge(&self, attachment: &Attachment, sequence: u64) {
        if let Some(session) = self.state.lock().current(attachment) {
            session.acknowledge(sequence);
        }
    }

    pub(super) fn want_kv_snapshot(&self, attachment: &Attachment) {
        let mut state = self.state.lock();
        if let Some(session) = state.current(attachment) {
            session.kv_snapshot_wanted = session.kv_events;
            state.todo.kv_snapshot = true;
            self.work.notify_one();
        }
    }

    // ------------------------------------------------------------ control

    pub(super) fn drain(&self) {
        let mut state = self.state.lock();
        if !std::mem::replace(&mut state.draining, true) {
            state.todo.drain = true;
        }
        for session in state.sessions.values_mut() {
            session.load_due = true;
            session.wake();
        }
        self.work.notify_one();
    }

    pub(super) fn is_draining(&self) -> bool {
        self.state.lock().draining
    }

    pub(super) fn stop(&self) {
        self.drain();
        self.state.lock().todo.stop = true;
        self.work.notify_one();
    }

    /// Hands the shapes to the loop. `Err` says why not.
    pub(super) fn calibrate(
        &self,
        shapes: Vec<proto::CalibrationShape>,
    ) -> Result<oneshot::Receiver<Vec<f32>>, String> {
        check_shapes(&shapes, &self.info)?;
        let mut state = self.state.lock();
        if !state.requests.is_empty() || state.assembling > 0 {
            return Err(format!(
                "the engine has {} requests; it must be idle",
                state.requests.len()
            ));
        }
        // One whose caller has left makes room for the next.
        if state
            .calibration
            .as_ref()
            .is_some_and(|(_, answer)| !answer.is_closed())
        {
            return Err("another calibration is running".to_owned());
        }
        let (answer, answered) = oneshot::channel();
        let ticket = state.next_ticket;
        state.next_ticket += 1;
        state.calibration = Some((ticket, answer));
        state.todo.calibrate = Some((ticket, shapes));
        self.work.notify_one();
        Ok(answered)
    }

    /// Streams end once they have sent everything; polls return at once.
    pub(super) fn close(&self) {
        let mut state: MutexGuard<'_, State> = self.state.lock();
        state.closing = true;
        state.calibration = None;
        for session in state.sessions.values_mut() {
            session.wake();
        }
        self.work.notify_all();
    }
}

impl State {
    /// The session, if the stream is still its stream.
    fn current(&mut self, attachment: &Attachment) -> Option<&mut Session> {
        let session = self.sessions.get_mut(&attachment.session_id)?;
        (session.stream == Some(attachment.stream)).then_some(session)
    }
}

impl Todo {
    fn is_empty(&self) -> bool {
        self.pending.is_empty()
            && self.cancels.is_empty()
            && self.calibrate.is_none()
            && !(self.kv_snapshot || self.drain || self.stop)
    }

    /// Cancels first: they make room. Drain and Stop last: what came before them counts as before.
    fn into_commands(self) -> Vec<Command> {
        let mut commands = Vec::with_capacity(self.cancels.len() + self.pending.len() + 4);
        commands.extend(self.cancels.into_iter().map(Command::Cancel));
        commands.extend(self.pending.into_values().map(Command::Submit));
        if self.kv_snapshot {
            commands.push(Command::KvSnapshot);
        }
        commands.extend(
            self.calibrate
                .map(|(ticket, shapes)| Command::Calibrate { ticket, shapes }),
        );
        if self.drain {
            commands.push(Command::Drain);
        }
        if self.stop {
            commands.push(Command::Stop);
        }
        commands
    }
}

/// A top_k of the whole vocabulary or more is none.
fn normalise(submit: &mut proto::Submit, info: &EngineInfo) {
    if let Some(sampling) = &mut submit.sampling
        && sampling.top_k.is_some_and(|top_k| top_k >= info.vocab_size)
    {
        sampling.top_k = Some(0);
    }
}

fn refusal(code: RefusalCode, field: &str, message: String) -> Refusal {
    Refusal {
        request: None,
        code: code as i32,
        field: field.to_owned(),
        message,
    }
}

const MAX_CALIBRATION_SHAPES: usize = 64;

fn check_shapes(shapes: &[proto::CalibrationShape], info: &EngineInfo) -> Result<(), String> {
    if shapes.is_empty() || shapes.len() > MAX_CALIBRATION_SHAPES {
        return Err(format!(
            "{} shapes; allowed are 1 to {MAX_CALIBRATION_SHAPES}",
            shapes.len()
        ));
    }
    for (at, shape) in shapes.iter().enumerate() {
        let limits = [
            ("decode_seqs", shape.decode_seqs, info.max_num_seqs),
            ("context_tokens", shape.context_tokens, info.max_model_len),
            ("prefill_tokens", shape.prefill_tokens, info.max_model_len),
        ];
        for (field, got, limit) in limits {
            if got > limit {
                return Err(format!(
                    "shapes[{at}].{field} is {got}; allowed is 0 to {limit}"
                ));
            }
        }
    }
    Ok(())
}

pub(super) fn unix_us() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |age| u64::try_from(age.as_micros()).unwrap_or(u64::MAX))
}
