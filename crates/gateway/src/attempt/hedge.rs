//! A second try at another replica beside the first one, while that has said nothing for long. Whichever says something
//! first goes on, and the other is cancelled (Dean and Barroso, The Tail at Scale, 2013). Off unless asked for: it
//! pays with work that others wait for.

use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use scalellm_engine_link::StreamError;
use scalellm_engine_link::proto::{self, FinishReason};
use tokio::time::{Sleep, sleep};

use super::Attempt;
use super::sending::Sent;
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
    /// Its replica refused it, or gave it up; if the replica was lost, so.
    Failed(Place, Option<StreamError>),
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
        Poll::Ready(match said {
            Some(Ok(output)) if !gives_up(&output) => Second::Won(Box::new(output)),
            Some(Err(error @ StreamError::Lost { .. })) => {
                Second::Failed(second.place, Some(error))
            }
            _ => Second::Failed(second.place, None),
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
                    if let Some(hedge) = self.hedge.take()
                        && let Hedge::Running(second) = *hedge
                    {
                        self.take_up(second);
                    }
                    return Poll::Ready(*output);
                }
                Second::Failed(place, lost) => {
                    self.hedge = None;
                    self.failures.note(place, Instant::now());
                    if let Some(StreamError::Lost { cause, .. }) = lost {
                        self.blame(app, model, place, Cause::Lost(cause));
                    }
                }
            }
        }
        Poll::Pending
    }

    /// Sends it to a second replica, if there is one and the budget allows.
    fn second(&mut self, app: &App, model: &Model) -> Option<Sent> {
        let mut avoid = self.failures.avoid(model, Instant::now());
        avoid.push(self.place.replica);
        let may = model.has_usable(&avoid) && model.faults.may_hedge(app.clock.now_ms());
        if may {
            self.send(app, model, None, avoid)
        } else {
            None
        }
    }
}

fn gives_up(output: &proto::Output) -> bool {
    matches!(
        output.finish_reason(),
        FinishReason::Cancelled | FinishReason::Error
    )
}
