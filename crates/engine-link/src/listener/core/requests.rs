//! From a Submit to the loop, and a request's other messages.

use super::{Attachment, Core, Owner, State, unix_us};
use crate::listener::validate::validate;
use crate::listener::{EngineInfo, Submission};
use crate::proto::{self, FinishReason, FromEngine, Refusal, RefusalCode, RequestRef};

impl Core {
    /// Judges a Submit by its head. `Ok(None)` after a refusal; otherwise the request's submission, whose prompt may
    /// still be incomplete: then it counts as assembling until `accept` or `give_up`.
    pub(in crate::listener) fn receive(
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
    pub(in crate::listener) fn accept(&self, attachment: &Attachment, submission: Submission) {
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
    pub(in crate::listener) fn give_up(
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
    pub(in crate::listener) fn cancel(&self, attachment: &Attachment, request: RequestRef) {
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

    pub(in crate::listener) fn acknowledge(&self, attachment: &Attachment, sequence: u64) {
        if let Some(session) = self.state.lock().current(attachment) {
            session.acknowledge(sequence);
        }
    }

    pub(in crate::listener) fn want_kv_snapshot(&self, attachment: &Attachment) {
        let mut state = self.state.lock();
        if let Some(session) = state.current(attachment) {
            session.kv_snapshot_wanted = session.kv_events;
            state.todo.kv_snapshot = true;
            self.work.notify_one();
        }
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
