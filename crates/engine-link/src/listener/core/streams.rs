//! Sessions, and the streams that speak for them.

use std::time::Instant;

use tonic::Status;

use super::{Attachment, Core, Next, State};
use crate::listener::session::Session;
use crate::proto::{self, FromEngine};

impl Core {
    /// A stream begins with Hello: takes up or makes the session.
    pub(in crate::listener) fn attach(&self, hello: &proto::Hello) -> Result<Attachment, Status> {
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
            });
        }
        Ok(Attachment {
            session_id: hello.session_id.clone(),
            stream,
        })
    }

    /// The stream broke: the session waits for another one.
    pub(in crate::listener) fn detach(&self, attachment: &Attachment) {
        let mut state = self.state.lock();
        if let Some(session) = state.current(attachment) {
            session.stream = None;
            session.detached = Some(Instant::now());
            session.wake();
        }
    }

    /// The gateway ended its side: it wants nothing any more.
    pub(in crate::listener) fn goodbye(&self, attachment: &Attachment) {
        let mut state = self.state.lock();
        if state.current(attachment).is_some() {
            self.remove_session(&mut state, &attachment.session_id);
        }
    }

    /// What the stream is to send next; with `Next::Wait` the waker is kept.
    pub(in crate::listener) fn next(
        &self,
        attachment: &Attachment,
        waker: &std::task::Waker,
    ) -> Next {
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
            ..state.load.clone()
        }
    }

    /// Every session is due a frame, whatever else happens.
    pub(in crate::listener) fn load_is_due(&self) {
        for session in self.state.lock().sessions.values_mut() {
            session.load_due = true;
            session.wake();
        }
    }

    /// Removes the sessions that did not reattach in time.
    pub(in crate::listener) fn reap(&self) {
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
}
