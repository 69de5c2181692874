//! An attempt without an answer for the client: what it is told then, and whether another upstream may do better.

use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use axum::http::{StatusCode, header};
use axum::response::Response;

use super::exchange::Failure;
use super::head::Head;
use super::stream::{error, late};
use super::upstream::Upstream;
use crate::error::{ApiError, ApiResult, ErrorNote};
use crate::record::RequestRecord;

pub struct Failed {
    /// The upstream's own, as it came, or an error of ours.
    pub answer: Box<ApiResult<Response>>,
    /// Another upstream may do better.
    pub elsewhere: bool,
}

impl Failed {
    /// The request is to blame, or time is up.
    #[must_use]
    pub fn for_good(error: Box<ApiError>) -> Failed {
        Failed {
            answer: Box::new(Err(error)),
            elsewhere: false,
        }
    }

    /// It goes to the client, whatever others may say: the request is to blame.
    #[must_use]
    pub fn is_for_client(&self) -> bool {
        !self.elsewhere && self.answer.is_ok()
    }

    /// No answer came, or none of use.
    #[must_use]
    pub fn lost(record: &RequestRecord, upstream: &Upstream, failure: &Failure) -> Failed {
        if let Failure::Late(setting @ ("deadline_ms" | "request_timeout_s")) = failure {
            return Failed::for_good(late(setting));
        }
        let reason = failure.to_string();
        tracing::warn!(
            request_id = &*record.id,
            upstream = &*upstream.name,
            reason,
            "no answer"
        );
        upstream.counts.failures.fetch_add(1, Relaxed);
        upstream.lost(failure);
        Failed {
            answer: Box::new(Err(error(upstream, failure))),
            // Whoever has computed for that long already is not asked to begin anew.
            elsewhere: !matches!(
                failure,
                Failure::Late("first_byte_timeout_s") | Failure::TooLong(_)
            ),
        }
    }

    /// An answer that is not a success: what is the client's doing goes back as it `came`, what is not becomes ours.
    #[must_use]
    pub fn refused(upstream: &Upstream, head: &Head, mut came: Response) -> Failed {
        let status = head.status;
        let told = format!("the upstream {} answered {status}", upstream.told_as);
        let retry_after_s = head
            .headers
            .get(header::RETRY_AFTER)
            .and_then(|value| value.to_str().ok()?.parse().ok());
        let answer = match status {
            StatusCode::UNAUTHORIZED => Err(ApiError::upstream_failed(format!(
                "{told}: it does not take the gateway's key"
            ))),
            StatusCode::SERVICE_UNAVAILABLE => Err(ApiError::busy(
                "upstream_busy",
                told.clone(),
                retry_after_s.unwrap_or(1),
            )),
            StatusCode::GATEWAY_TIMEOUT => Err(ApiError::upstream_late(told.clone())),
            _ if status.is_client_error() => {
                came.extensions_mut().insert(ErrorNote {
                    code: None,
                    param: None,
                    message: Some(told.clone()),
                });
                Ok(came)
            }
            _ => Err(ApiError::upstream_failed(told.clone())),
        };
        let unwell = !status.is_client_error() || status == StatusCode::UNAUTHORIZED;
        if unwell {
            upstream.counts.failures.fetch_add(1, Relaxed);
            // Who has too much to do for now is not broken.
            if status != StatusCode::SERVICE_UNAVAILABLE || retry_after_s.is_none() {
                upstream.failed(&told);
            }
        }
        let may_do_better = [StatusCode::TOO_MANY_REQUESTS, StatusCode::NOT_FOUND];
        let elsewhere = unwell || may_do_better.contains(&status);
        if elsewhere {
            let retry_after = retry_after_s.map(|s| Duration::from_secs(u64::from(s)));
            upstream.health.refused(retry_after);
        }
        Failed {
            answer: Box::new(answer),
            elsewhere,
        }
    }
}
