//! What the runtime thread and the engine's loop share. One lock, never held across a wait.
//!
//! - `steps`: the loop's calls
//! - `streams`: sessions and the streams that speak for them
//! - `requests`: from a Submit to the loop
//! - `control`: drain, stop, calibrate, close

mod control;
mod requests;
mod steps;
mod streams;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use parking_lot::{Condvar, Mutex};
use tokio::sync::oneshot;
use tonic::Status;

use super::config::ListenerConfig;
use super::session::Session;
use super::{Command, EngineInfo, Submission};
use crate::proto::{self, FromEngine, RequestRef};

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
    /// The last ones, oldest first; at most `kept_steps`.
    steps: Mutex<VecDeque<proto::StepTimes>>,
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
            steps: Mutex::default(),
        })
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

pub(super) fn unix_us() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |age| u64::try_from(age.as_micros()).unwrap_or(u64::MAX))
}
