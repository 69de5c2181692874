//! The whole body of a request, within its limits.

use std::time::Duration;

use axum::body::Body;
use axum::extract::Request;
use axum::http::{HeaderMap, StatusCode, header};
use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;
use tokio::sync::{Semaphore, SemaphorePermit};

use crate::app::App;
use crate::config::Config;
use crate::error::{ApiError, ApiResult};
use crate::record::RequestRecord;
use crate::stages::Stage;

/// Memory for the bodies of all requests that are being read and parsed.
pub struct BodyMemory {
    blocks: Semaphore,
    total_blocks: usize,
}

/// Memory is handed out in blocks of this, so that an ordinary body takes one.
const BLOCK_BYTES: usize = 64 << 10;

/// How much of a body is read. A large one is read on the threads for text: its milliseconds would hold up the requests
/// that share its thread.
#[derive(Debug, Clone, Copy)]
pub enum Reading {
    /// Every value is made.
    Whole,
    /// Values are passed over, but for a few: tens of microseconds for 220 KB.
    Scan,
}

impl Reading {
    fn in_place_bytes(self) -> usize {
        match self {
            Reading::Whole => 64 << 10,
            Reading::Scan => 256 << 10,
        }
    }
}

/// A declared length is believed up to so many times what has come.
const AHEAD: usize = 4;

impl BodyMemory {
    #[must_use]
    pub fn new(bytes: usize) -> BodyMemory {
        let total_blocks = bytes.div_ceil(BLOCK_BYTES).min(Semaphore::MAX_PERMITS);
        BodyMemory {
            blocks: Semaphore::new(total_blocks),
            total_blocks,
        }
    }

    #[must_use]
    pub fn taken_bytes(&self) -> usize {
        (self.total_blocks - self.blocks.available_permits()) * BLOCK_BYTES
    }

    /// Makes `held` enough for `bytes`; waits for nobody, because what is held meanwhile would be waited for.
    ///
    /// # Errors
    /// 503 with Retry-After when there is no more.
    fn grow<'a>(&'a self, held: &mut Option<SemaphorePermit<'a>>, bytes: usize) -> ApiResult<()> {
        let held_blocks = held.as_ref().map_or(0, SemaphorePermit::num_permits);
        let more = bytes.div_ceil(BLOCK_BYTES).saturating_sub(held_blocks);
        if more == 0 {
            return Ok(());
        }
        let permit = u32::try_from(more)
            .ok()
            .and_then(|more| self.blocks.try_acquire_many(more).ok())
            .ok_or_else(ApiError::body_memory)?;
        match held {
            Some(held) => held.merge(permit),
            None => *held = Some(permit),
        }
        Ok(())
    }
}

/// A request's body, and the memory it takes until it is dropped.
pub struct ReadBody<'a> {
    pub bytes: Bytes,
    _held: Option<SemaphorePermit<'a>>,
}

/// Reads a request's body and makes of it what the endpoint takes.
///
/// # Errors
/// As [`whole`], then as [`parse`].
pub async fn parsed<T>(
    app: &App,
    record: &RequestRecord,
    request: Request,
    take: impl FnOnce(&[u8]) -> ApiResult<T> + Send + 'static,
) -> ApiResult<T>
where
    T: Send + 'static,
{
    let (parts, payload) = request.into_parts();
    let body = whole(app, record, &parts.headers, payload).await?;
    parse(app, record, &body.bytes, Reading::Whole, take).await
}

/// Reads a request's body.
///
/// # Errors
/// 413, 408, 400 if the client breaks off, or 503 while others' bodies fill the memory.
pub async fn whole<'a>(
    app: &'a App,
    record: &RequestRecord,
    headers: &HeaderMap,
    payload: Body,
) -> ApiResult<ReadBody<'a>> {
    let mut held = None;
    let live = app.live();
    let reading = read(headers, payload, &live.config, &app.body_memory, &mut held);
    let bytes = record
        .timed_async(Stage::Body, reading)
        .await
        .inspect_err(|error| {
            if error.status == StatusCode::SERVICE_UNAVAILABLE {
                app.metrics.rejected("body_memory");
            }
        })?;
    record.update(|progress| progress.body_bytes = bytes.len());
    Ok(ReadBody { bytes, _held: held })
}

/// Makes of a body what the endpoint takes, a large one on the threads for text.
///
/// # Errors
/// As `take`; 503 when the threads' queue is full.
pub async fn parse<T>(
    app: &App,
    record: &RequestRecord,
    bytes: &Bytes,
    reading: Reading,
    take: impl FnOnce(&[u8]) -> ApiResult<T> + Send + 'static,
) -> ApiResult<T>
where
    T: Send + 'static,
{
    if bytes.len() <= reading.in_place_bytes() {
        return record.timed(Stage::Parse, || take(bytes));
    }
    let bytes = bytes.clone();
    let parsing = app.text_pool.run(bytes.len(), move |_| take(&bytes));
    record
        .timed_async(Stage::Parse, parsing)
        .await
        .inspect_err(|error| {
            if error.status == StatusCode::SERVICE_UNAVAILABLE {
                app.metrics.rejected("text_queue");
            }
        })?
}

/// Reads the body. A declared length above the limit is refused before a byte is read.
///
/// # Errors
/// 413, 408, 400 if the client breaks off, or 503 while others' bodies fill the memory.
async fn read<'a>(
    headers: &HeaderMap,
    body: Body,
    config: &Config,
    memory: &'a BodyMemory,
    held: &mut Option<SemaphorePermit<'a>>,
) -> ApiResult<Bytes> {
    let declared = headers
        .get(header::CONTENT_LENGTH)
        .and_then(|v| v.to_str().ok())
        .and_then(|v| v.parse::<usize>().ok());
    if declared.is_some_and(|bytes| bytes > config.max_body_bytes) {
        return Err(ApiError::body_too_large(config.max_body_bytes));
    }
    if headers
        .get(header::CONTENT_ENCODING)
        .is_some_and(|v| v != "identity")
    {
        return Err(ApiError::field(
            "content-encoding",
            "content-encoding: only identity is supported",
        ));
    }
    let limit = Duration::from_secs_f64(config.body_timeout_s);
    let declared = declared.unwrap_or(0);
    tokio::time::timeout(
        limit,
        collect(body, config.max_body_bytes, declared, memory, held),
    )
    .await
    .map_err(|_| ApiError::body_timeout(config.body_timeout_s))?
}

async fn collect<'a>(
    mut body: Body,
    limit_bytes: usize,
    declared_bytes: usize,
    memory: &'a BodyMemory,
    held: &mut Option<SemaphorePermit<'a>>,
) -> ApiResult<Bytes> {
    let mut first = Bytes::new();
    let mut whole = BytesMut::new();
    while let Some(frame) = body.frame().await {
        let frame =
            frame.map_err(|e| ApiError::body(format!("the request body broke off: {e}")))?;
        let Ok(data) = frame.into_data() else {
            continue;
        };
        let so_far = first.len() + whole.len() + data.len();
        if so_far > limit_bytes {
            return Err(ApiError::body_too_large(limit_bytes));
        }
        memory.grow(held, so_far)?;
        if first.is_empty() && whole.is_empty() {
            first = data;
        } else {
            if whole.is_empty() {
                whole.reserve(declared_bytes.min(AHEAD * so_far).max(so_far));
                whole.extend_from_slice(&std::mem::take(&mut first));
            }
            whole.extend_from_slice(&data);
        }
    }
    Ok(if whole.is_empty() {
        first
    } else {
        whole.freeze()
    })
}
