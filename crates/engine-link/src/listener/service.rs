//! The gRPC service: one reader and one writer per stream, all state in `Core`.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use tokio::task::JoinHandle;
use tonic::{Request, Response, Status, Streaming};

use super::Submission;
use super::core::{Attachment, Core, Next};
use super::validate::{too_many_ids, validate_ids};
use crate::proto::engine_server::Engine;
use crate::proto::{self, FromEngine, ToEngine, control_request, to_engine};

pub(super) struct Service {
    pub(super) core: Arc<Core>,
}

#[tonic::async_trait]
impl Engine for Service {
    async fn describe(
        &self,
        _: Request<proto::DescribeRequest>,
    ) -> Result<Response<proto::DescribeResponse>, Status> {
        Ok(Response::new(self.core.info.clone()))
    }

    type SessionStream = SessionStream;

    async fn session(
        &self,
        request: Request<Streaming<ToEngine>>,
    ) -> Result<Response<SessionStream>, Status> {
        let mut inbound = request.into_inner();
        let first = tokio::time::timeout(self.core.config.hello_timeout, inbound.message())
            .await
            .map_err(|_| Status::deadline_exceeded("no Hello came"))??;
        let Some(ToEngine {
            message: Some(to_engine::Message::Hello(hello)),
        }) = first
        else {
            return Err(Status::invalid_argument(
                "the first message of a stream must be Hello",
            ));
        };
        if !self.core.config.welcome_delay.is_zero() {
            tokio::time::sleep(self.core.config.welcome_delay).await;
        }
        let attachment = self.core.attach(&hello)?;
        let reader = Reader::new(self.core.clone(), attachment.clone());
        let reader = tokio::spawn(reader.run(inbound));
        Ok(Response::new(SessionStream {
            core: self.core.clone(),
            attachment,
            reader,
            over: false,
        }))
    }

    async fn control(
        &self,
        request: Request<proto::ControlRequest>,
    ) -> Result<Response<proto::ControlResponse>, Status> {
        let accepted = |message: &str| proto::ControlResponse {
            accepted: true,
            message: message.to_owned(),
            step_ms: Vec::new(),
        };
        let refused = |message| proto::ControlResponse {
            accepted: false,
            message,
            step_ms: Vec::new(),
        };
        let response = match request.into_inner().action {
            Some(control_request::Action::Drain(_)) => {
                self.core.drain();
                accepted("draining")
            }
            Some(control_request::Action::Stop(_)) => {
                self.core.stop();
                accepted("stopping")
            }
            Some(control_request::Action::Calibrate(calibrate)) => match self
                .core
                .calibrate(calibrate.shapes)
            {
                Err(message) => refused(message),
                Ok(answered) => {
                    match tokio::time::timeout(self.core.config.calibrate_timeout, answered).await {
                        Ok(Ok(step_ms)) => proto::ControlResponse {
                            step_ms,
                            ..accepted("calibrated")
                        },
                        Ok(Err(_)) => refused("the engine closed".to_owned()),
                        Err(_) => refused(format!(
                            "no answer within {:?}",
                            self.core.config.calibrate_timeout
                        )),
                    }
                }
            },
            None => {
                return Err(Status::invalid_argument(
                    "action is missing; allowed are drain, stop, calibrate",
                ));
            }
        };
        Ok(Response::new(response))
    }

    async fn steps(
        &self,
        request: Request<proto::StepsRequest>,
    ) -> Result<Response<proto::StepsResponse>, Status> {
        let steps = self.core.steps_after(request.into_inner().after_us);
        Ok(Response::new(proto::StepsResponse { steps }))
    }
}

/// Takes a stream's messages. Prompts that come in chunks are put together here, so that they vanish with the
/// stream; the gateway sends them again.
pub(super) struct Reader {
    core: Arc<Core>,
    attachment: Attachment,
    assemblies: HashMap<u64, Submission>,
}

impl Reader {
    pub(super) fn new(core: Arc<Core>, attachment: Attachment) -> Self {
        Self {
            core,
            attachment,
            assemblies: HashMap::new(),
        }
    }

    async fn run(mut self, mut inbound: Streaming<ToEngine>) {
        loop {
            match inbound.message().await {
                Ok(Some(ToEngine {
                    message: Some(message),
                })) => self.take(message),
                Ok(Some(ToEngine { message: None })) => {}
                Ok(None) => {
                    self.core.goodbye(&self.attachment);
                    return;
                }
                Err(status) => {
                    tracing::debug!(session = self.attachment.session_id, %status, "stream broke");
                    self.core.detach(&self.attachment);
                    return;
                }
            }
        }
    }

    pub(super) fn take(&mut self, message: to_engine::Message) {
        match message {
            // Only the first message of a stream counts.
            to_engine::Message::Hello(_) => {}
            to_engine::Message::Submit(submit) => self.submit(*submit),
            to_engine::Message::PromptChunk(chunk) => self.chunk(chunk),
            to_engine::Message::Cancel(cancel) => self.cancel(cancel),
            to_engine::Message::Ack(ack) => self.core.acknowledge(&self.attachment, ack.sequence),
            to_engine::Message::KvSnapshot(_) => self.core.want_kv_snapshot(&self.attachment),
        }
    }

    fn submit(&mut self, submit: proto::Submit) {
        let Some(submission) = self.core.receive(&self.attachment, submit) else {
            return;
        };
        let id = submission.submit.request.map_or(0, |request| request.id);
        if let Some(earlier) = self.assemblies.remove(&id) {
            self.core.give_up(&self.attachment, &earlier, None);
        }
        self.advance(id, submission);
    }

    /// Ids for a request that was refused or cancelled in between fall away.
    fn chunk(&mut self, chunk: proto::PromptChunk) {
        let request = chunk.request.unwrap_or_default();
        let Some(mut submission) = self.assemblies.remove(&request.id) else {
            return;
        };
        if submission.submit.request != Some(request) {
            self.assemblies.insert(request.id, submission);
            return;
        }
        let submit = &mut submission.submit;
        let got = submit.prompt_ids.len() + chunk.prompt_ids.len();
        let verdict = if got > submit.prompt_tokens as usize {
            Err(too_many_ids(got, submit.prompt_tokens))
        } else {
            validate_ids("prompt_ids", &chunk.prompt_ids, self.core.info.vocab_size)
        };
        match verdict {
            Ok(()) => {
                submit.prompt_ids.extend(chunk.prompt_ids);
                self.advance(request.id, submission);
            }
            Err(refusal) => self
                .core
                .give_up(&self.attachment, &submission, Some(refusal)),
        }
    }

    fn advance(&mut self, id: u64, submission: Submission) {
        if submission.submit.prompt_ids.len() == submission.submit.prompt_tokens as usize {
            self.core.accept(&self.attachment, submission);
        } else {
            self.assemblies.insert(id, submission);
        }
    }

    fn cancel(&mut self, cancel: proto::Cancel) {
        let request = cancel.request.unwrap_or_default();
        if self
            .assemblies
            .get(&request.id)
            .is_some_and(|waiting| waiting.submit.request == Some(request))
            && let Some(submission) = self.assemblies.remove(&request.id)
        {
            self.core.give_up(&self.attachment, &submission, None);
        }
        self.core.cancel(&self.attachment, request);
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        for submission in self.assemblies.values() {
            self.core.give_up(&self.attachment, submission, None);
        }
    }
}

/// One stream's frames, made when the connection has room. Owns the stream's reader.
pub(super) struct SessionStream {
    core: Arc<Core>,
    attachment: Attachment,
    reader: JoinHandle<()>,
    over: bool,
}

impl futures_util::Stream for SessionStream {
    type Item = Result<FromEngine, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.over {
            return Poll::Ready(None);
        }
        match self.core.next(&self.attachment, cx.waker()) {
            Next::Frame(frame) => Poll::Ready(Some(Ok(*frame))),
            Next::Wait => Poll::Pending,
            Next::Closed => Poll::Ready(None),
            Next::End(status) => {
                self.over = true;
                Poll::Ready(Some(Err(status)))
            }
        }
    }
}

impl Drop for SessionStream {
    fn drop(&mut self) {
        self.reader.abort();
        self.core.detach(&self.attachment);
    }
}
