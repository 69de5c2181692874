//! The whole body of a request, within its limits.

use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderMap, header};
use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;

use crate::config::Config;
use crate::error::{ApiError, ApiResult};

/// Reads the body. A declared length above the limit is refused before a byte is read.
///
/// # Errors
/// 413, 408, or 400 if the client breaks off.
pub async fn read(headers: &HeaderMap, body: Body, config: &Config) -> ApiResult<Bytes> {
    let declared = headers
        .get(header::CONTENT_LENGTH)
        .and_then(|v| v.to_str().ok())
        .and_then(|v| v.parse().ok());
    if declared.is_some_and(|bytes: u64| bytes > config.max_body_bytes as u64) {
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
    tokio::time::timeout(limit, collect(body, config.max_body_bytes))
        .await
        .map_err(|_| ApiError::body_timeout(config.body_timeout_s))?
}

async fn collect(mut body: Body, limit_bytes: usize) -> ApiResult<Bytes> {
    let mut first = Bytes::new();
    let mut whole = BytesMut::new();
    while let Some(frame) = body.frame().await {
        let frame =
            frame.map_err(|e| ApiError::body(format!("the request body broke off: {e}")))?;
        let Ok(data) = frame.into_data() else {
            continue;
        };
        if first.len() + whole.len() + data.len() > limit_bytes {
            return Err(ApiError::body_too_large(limit_bytes));
        }
        if first.is_empty() && whole.is_empty() {
            first = data;
        } else {
            if whole.is_empty() {
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
