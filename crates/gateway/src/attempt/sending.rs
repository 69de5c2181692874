//! To which replica a choice goes, and with what.

use std::sync::Arc;
use std::time::Instant;

use scalellm_engine_link::RequestStream;
use scalellm_engine_link::listener::MAX_DEADLINE_MS;
use scalellm_engine_link::proto;

use super::{Attempt, Run};
use crate::app::App;
use crate::fleet::Model;
use crate::replay::{Place, continues_exactly};
use crate::routing::Placement;

/// A choice that was sent to a replica.
pub struct Sent {
    pub stream: RequestStream,
    pub place: Place,
    /// The engine there, as it described itself.
    pub engine: Option<Arc<proto::DescribeResponse>>,
    pub placement: Option<Placement>,
}

impl Attempt {
    /// Submits to a replica that takes it, and continues what was received; false if there is none.
    pub(super) fn submit_to_any(
        &mut self,
        app: &App,
        model: &Model,
        preferred: Option<usize>,
    ) -> bool {
        let avoid = self.failures.avoid(model, Instant::now());
        let Some(sent) = self.send(app, model, preferred, avoid) else {
            return false;
        };
        if let Some(pause) = &self.pause {
            self.replays += 1;
            app.metrics.faults.replayed(pause.loss.cause.name());
        }
        self.take_up(sent);
        true
    }

    /// It is now at the replica that it was sent to.
    pub(super) fn take_up(&mut self, sent: Sent) {
        self.place = sent.place;
        self.engine = sent.engine;
        self.answered = false;
        self.placement = sent.placement;
        self.run = Run::Running(sent.stream);
    }

    /// To a replica that takes it and continues what was received, none of `avoid`.
    pub(super) fn send(
        &mut self,
        app: &App,
        model: &Model,
        mut preferred: Option<usize>,
        mut avoid: Vec<usize>,
    ) -> Option<Sent> {
        let begun = !self.submit.resume_ids.is_empty();
        let first = self.engine.clone().filter(|_| begun);
        let differs = |info: Option<&Arc<proto::DescribeResponse>>| {
            first
                .as_ref()
                .is_some_and(|first| !info.is_some_and(|info| continues_exactly(first, info)))
        };
        for (index, replica) in model.replicas.iter().enumerate() {
            if differs(replica.info().as_ref()) {
                avoid.push(index);
            }
        }
        loop {
            // Asked first: while many wait for a replica, each copy of a prompt would be for nothing.
            if preferred.is_none() && !model.has_usable(&avoid) {
                return None;
            }
            let message = self.message();
            let (index, placement) = match preferred.take() {
                Some(index) => (index, None),
                None => {
                    let now_ms = app.clock.now_ms();
                    let placement = model.place(&message, self.wish, &avoid, now_ms)?;
                    (placement.choice.index, Some(placement))
                }
            };
            avoid.push(index);
            let Some(replica) = model.replicas.get(index) else {
                continue;
            };
            let Ok(stream) = replica.submit(message) else {
                continue;
            };
            // Asked after the submission: had another engine come in between, it would be told here.
            let info = replica.info();
            if differs(info.as_ref()) {
                continue;
            }
            model.faults.sent(index);
            self.tries += 1;
            return Some(Sent {
                stream,
                place: Place {
                    replica: index,
                    epoch: info.as_ref().map_or(0, |info| info.epoch),
                },
                engine: info,
                placement,
            });
        }
    }

    /// What the next replica is sent.
    fn message(&self) -> proto::Submit {
        let left = |at: Instant| {
            // The gateway keeps the exact deadline; what the protocol cannot say, the engine need not know.
            u32::try_from(at.saturating_duration_since(Instant::now()).as_millis())
                .unwrap_or(u32::MAX)
                .clamp(1, MAX_DEADLINE_MS)
        };
        let mut message = self.submit.clone();
        message.request = Some(proto::RequestRef {
            id: 0,
            attempt: self.tries,
        });
        message.prompt_ids = self.prompt.to_vec();
        message.deadline_ms = self.deadline.map(left);
        message
    }
}
