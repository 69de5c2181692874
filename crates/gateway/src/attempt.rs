//! One choice's way through the engines: routed, submitted, and once tried again elsewhere while that loses nothing.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::task::{Context, Poll, ready};

use futures_util::StreamExt;
use scalellm_engine_link::{RequestStream, StreamError, SubmitError, proto};
use scalellm_routing::Choice;

use crate::app::App;
use crate::error::{ApiError, ApiResult};
use crate::fleet::Model;
use crate::routing::{Placement, RouteWish};

/// A submitted request: its first replica and one more.
const MAX_ATTEMPTS: usize = 2;

/// A choice's outputs. Dropping it cancels the choice in the engine.
pub struct Attempt {
    stream: RequestStream,
    /// Kept until the first output, after which another replica could not start anew.
    submit: Option<proto::Submit>,
    wish: RouteWish,
    /// Kept as long.
    placement: Option<Placement>,
    tried: Vec<usize>,
}

impl Attempt {
    /// Submits to `preferred`, or where the model's policy says.
    ///
    /// # Errors
    /// 503 when no replica takes it.
    pub fn start(
        app: &App,
        model: &Model,
        submit: proto::Submit,
        wish: RouteWish,
        preferred: Option<usize>,
    ) -> ApiResult<Attempt> {
        let mut tried = Vec::new();
        let (stream, placement) = submit_to_any(app, model, &submit, wish, preferred, &mut tried)
            .inspect_err(|_| app.metrics.rejected("no_replica"))?;
        Ok(Attempt {
            stream,
            submit: Some(submit),
            wish,
            placement,
            tried,
        })
    }

    /// Why the policy chose the replica, while it has not answered.
    #[must_use]
    pub fn route(&self) -> Option<Choice> {
        self.placement.as_ref().map(|placement| placement.choice)
    }

    /// The replica that runs it now.
    #[must_use]
    pub fn replica(&self) -> usize {
        self.tried.last().copied().unwrap_or(0)
    }

    /// The next output. After an error, or the output with a finish reason, it must not be polled again.
    pub fn poll_output(
        &mut self,
        app: &App,
        model: &Arc<Model>,
        cx: &mut Context<'_>,
    ) -> Poll<ApiResult<proto::Output>> {
        loop {
            let error = match ready!(self.stream.poll_next_unpin(cx)) {
                Some(Ok(output)) => {
                    self.submit = None;
                    self.placement = None;
                    return Poll::Ready(Ok(output));
                }
                Some(Err(error)) => error,
                None => StreamError::Lost {
                    reason: "it ended the request without a reason".to_owned(),
                },
            };
            let another = may_go_elsewhere(&error) && self.tried.len() < MAX_ATTEMPTS;
            match self.submit.as_mut().filter(|_| another) {
                Some(submit) => {
                    self.placement = None;
                    match submit_to_any(app, model, submit, self.wish, None, &mut self.tried) {
                        Ok((stream, placement)) => {
                            tracing::warn!(trace_id = submit.trace_id, %error, "trying another replica");
                            app.metrics.retried.fetch_add(1, Relaxed);
                            self.stream = stream;
                            self.placement = placement;
                        }
                        Err(_) => return Poll::Ready(Err(answer(model, error))),
                    }
                }
                None => return Poll::Ready(Err(answer(model, error))),
            }
        }
    }
}

fn submit_to_any(
    app: &App,
    model: &Model,
    submit: &proto::Submit,
    wish: RouteWish,
    mut preferred: Option<usize>,
    tried: &mut Vec<usize>,
) -> ApiResult<(RequestStream, Option<Placement>)> {
    while tried.len() < MAX_ATTEMPTS {
        let (index, placement) = match preferred.take() {
            Some(index) => (index, None),
            None => match model.place(submit, wish, tried, app.clock.now_ms()) {
                Some(placement) => (placement.choice.index, Some(placement)),
                None => break,
            },
        };
        let Some(replica) = model.replicas.get(index) else {
            break;
        };
        tried.push(index);
        match replica.submit(submit.clone()) {
            Ok(stream) => return Ok((stream, placement)),
            Err(SubmitError::NotReady | SubmitError::Full) => {}
        }
    }
    Err(model.no_replica())
}

fn may_go_elsewhere(error: &StreamError) -> bool {
    match error {
        StreamError::Lost { .. } => true,
        StreamError::Refused(refusal) => {
            matches!(
                refusal.code(),
                proto::RefusalCode::Draining | proto::RefusalCode::Full
            )
        }
    }
}

fn answer(model: &Model, error: StreamError) -> Box<ApiError> {
    match error {
        StreamError::Lost { reason } => ApiError::engine_lost(&reason),
        StreamError::Refused(refusal) => match refusal.code() {
            proto::RefusalCode::Invalid => {
                ApiError::field(client_field(&refusal.field), refusal.message)
            }
            proto::RefusalCode::Draining => model.no_replica(),
            proto::RefusalCode::Full => ApiError::busy("overloaded", refusal.message, 1),
            proto::RefusalCode::Duplicate | proto::RefusalCode::Unspecified => ApiError::internal(
                format!("the engine refused the request: {}", refusal.message),
            ),
        },
    }
}

/// The client's name of a field of the engine protocol.
fn client_field(field: &str) -> String {
    let field = field.strip_prefix("sampling.").unwrap_or(field);
    if field.starts_with("prompt_ids") || field == "prompt_tokens" {
        "prompt".to_owned()
    } else {
        field.to_owned()
    }
}
