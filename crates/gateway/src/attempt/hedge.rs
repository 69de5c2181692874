//! A second try at another replica beside the first one, while that has said nothing for long. Whichever says something
//! first goes on, and the other is cancelled (Dean and Barroso, The Tail at Scale, 2013). Off unless asked for: it
//! pays with work that others wait for.

use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use scalellm_engine_link::proto::{self, FinishReason};
use scalellm_engine_link::{LostCause, StreamError};
use tokio::time::{Sleep, sleep};

use super::sending::Sent;
use super::{Attempt, given_up};
use crate::app::App;
use crate::fleet::Model;
use crate::replay::{Cause, Place};

pub enum Hedge {
    /// The first try has until then.
    Due(Pin<Box<Sleep>>),
    Running(Sent),
}

/// What came of a second try.
pub enum Second {
    /// It is time to send it.
    Due,
    /// It said something first.
    Won(Box<proto::Output>),
    /// Its replica refused it, or ended it; if it lost it, why.
    Failed(Place, Option<Cause>),
}

impl Hedge {
    #[must_use]
    pub fn after(wait: Duration) -> Box<Hedge> {
        Box::new(Hedge::Due(Box::pin(sleep(wait))))
    }

    pub fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Second> {
        let second = match self {
            Hedge::Due(timer) => {
                ready!(timer.as_mut().poll(cx));
                return Poll::Ready(Second::Due);
            }
            Hedge::Running(second) => second,
        };
        let said = ready!(second.stream.poll_next_unpin(cx));
        let failed = |cause| Second::Failed(second.place, cause);
        Poll::Ready(match said {
            Some(Ok(output)) => match output.finish_reason() {
                FinishReason::Cancelled => failed(Some(given_up(output.error).cause)),
                FinishReason::Error => failed(None),
                _ => Second::Won(Box::new(output)),
            },
            Some(Err(StreamError::Lost { cause, .. })) => failed(Some(Cause::Lost(cause))),
            Some(Err(StreamError::Refused(_))) => failed(None),
            None => failed(Some(Cause::Lost(LostCause::Nonsense))),
        })
    }
}

impl Attempt {
    /// What the second try says before the first has said anything: it takes the first one's place then.
    pub(super) fn poll_hedge(
        &mut self,
        app: &App,
        model: &Model,
        cx: &mut Context<'_>,
    ) -> Poll<proto::Output> {
        while let Some(hedge) = &mut self.hedge {
            match ready!(hedge.poll(cx)) {
                Second::Due => {
                    self.hedge = self.second(app, model).map(|second| {
                        app.metrics.faults.hedged();
                        Box::new(Hedge::Running(second))
                    });
                }
                Second::Won(output) => {
                    app.metrics.faults.hedge_won();
                    self.take_second();
                    return Poll::Ready(*output);
                }
                Second::Failed(place, lost) => {
                    self.hedge = None;
                    self.failures.note(place, Instant::now());
                    if let Some(cause) = lost {
                        self.blame(app, model, place, cause);
                    }
                }
            }
        }
        Poll::Pending
    }

    /// Has the second try, if one is under way, take the place of the first. Dropping that cancels it.
    pub(super) fn take_second(&mut self) -> bool {
        match self.hedge.take().map(|hedge| *hedge) {
            Some(Hedge::Running(second)) => {
                self.take_up(second);
                true
            }
            Some(Hedge::Due(_)) | None => false,
        }
    }

    /// Sends it to a second replica, if there is one that is well and the budget allows.
    fn second(&mut self, app: &App, model: &Model) -> Option<Sent> {
        let mut avoid = self.failures.avoid(model, Instant::now());
        avoid.push(self.place.replica);
        avoid.extend((0..model.replicas.len()).filter(|replica| !model.faults.is_closed(*replica)));
        let may = model.has_usable(&avoid) && model.faults.may_hedge(app.clock.now_ms());
        if may {
            self.send(app, model, None, avoid)
        } else {
            None
        }
    }
}
