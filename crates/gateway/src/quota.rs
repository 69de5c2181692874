//! A request's share of its key's budgets: refused with 429, and told in OpenAI's rate-limit headers.

use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Duration;

use axum::http::{HeaderMap, HeaderName, HeaderValue};
use scalellm_accounts::{Denied, KeyState, Quota, Refused};

use crate::app::App;
use crate::error::{ApiError, ApiResult};
use crate::generation::PreparedPrompt;
use crate::record::RequestRecord;
use crate::request::Params;

/// Takes one of the key's requests of this minute, and a place among its concurrent ones.
///
/// # Errors
/// 429 with Retry-After; 503 if the database had to be asked and did not answer.
pub async fn enter(app: &App, record: &RequestRecord) -> ApiResult<()> {
    let (Some(accounts), Some(key)) = (&app.accounts, record.key()) else {
        return Ok(());
    };
    if record.update(|progress| progress.metering.reservation.is_some()) {
        return Ok(()); // it goes another way now
    }
    let reservation = accounts
        .enter(key)
        .await
        .map_err(|denied| refuse(app, &denied))?;
    record.update(|progress| progress.metering.reservation = Some(reservation));
    Ok(())
}

/// Reserves the most tokens that the request can come to.
///
/// # Errors
/// 429 with Retry-After; 503 if the database had to be asked and did not answer.
pub async fn reserve_tokens(
    app: &App,
    record: &RequestRecord,
    prompts: &[PreparedPrompt],
    params: &Params,
) -> ApiResult<()> {
    let most = prompts.iter().map(|prompt| {
        let output = i64::from(prompt.max_tokens.max(1)) * i64::from(params.n);
        i64::try_from(prompt.ids.len()).unwrap_or(i64::MAX / 2) + output
    });
    reserve(app, record, most.sum()).await
}

/// Reserves `tokens`, which is the most that the request can come to.
///
/// # Errors
/// As [`reserve_tokens`].
pub async fn reserve(app: &App, record: &RequestRecord, tokens: i64) -> ApiResult<()> {
    let Some(accounts) = &app.accounts else {
        return Ok(());
    };
    if record.update(|progress| progress.metering.has_tokens) {
        return Ok(());
    }
    // Not held across the wait: the request's end settles it, and this is the request.
    let Some(mut reservation) = record.update(|progress| progress.metering.reservation.take())
    else {
        return Ok(());
    };
    let reserved = accounts
        .reserve_tokens(&mut reservation, tokens)
        .await
        .map_err(|denied| refuse(app, &denied));
    record.update(|progress| {
        progress.metering.reservation = Some(reservation);
        progress.metering.has_tokens = reserved.is_ok();
    });
    reserved
}

/// The answer to a request that is not let in.
#[must_use]
pub fn refuse(app: &App, denied: &Denied) -> Box<ApiError> {
    match denied {
        Denied::NoKey => {
            ApiError::unauthorized("an API key is needed, as the header authorization: Bearer KEY")
        }
        Denied::Key(Refused::Unknown) => ApiError::unauthorized("the API key is not known here"),
        Denied::Key(Refused::Revoked) => ApiError::unauthorized("the API key was revoked"),
        Denied::Key(Refused::Expired) => ApiError::unauthorized("the API key has expired"),
        Denied::Quota {
            quota,
            limit,
            asked,
            left,
            retry_after,
        } => {
            app.metrics.rejected("quota");
            let message = match quota {
                Quota::Concurrency => {
                    format!(
                        "the key's concurrent requests are limited to {limit}, and all of them run"
                    )
                }
                _ => format!(
                    "the key's {} are limited to {limit}; this request needs {asked}, {left} are left",
                    words(*quota)
                ),
            };
            let after = if *quota == Quota::Concurrency {
                Duration::from_secs(1)
            } else {
                *retry_after
            };
            ApiError::over_quota(code(*quota), message, seconds(after))
        }
        Denied::TooMuch {
            quota,
            limit,
            asked,
        } => {
            app.metrics.rejected("quota");
            let message = format!(
                "this request needs {asked} of the key's {}, which are limited to {limit}: prompt and max_tokens together; \
                 a smaller max_tokens may fit",
                words(*quota)
            );
            ApiError::over_quota(code(*quota), message, 60)
        }
        Denied::Unavailable => {
            app.metrics.rejected("accounts_unavailable");
            let message = "keys and quotas cannot be checked now: their database does not answer";
            ApiError::busy("accounts_unavailable", message, 1)
        }
    }
}

fn words(quota: Quota) -> &'static str {
    match quota {
        Quota::Concurrency => "concurrent requests",
        Quota::RequestsPerMinute => "requests per minute",
        Quota::TokensPerMinute => "tokens per minute",
        Quota::TokensPerDay => "tokens per day",
        Quota::TokensPerMonth => "tokens per month",
    }
}

/// OpenAI's codes: the long budgets are what is paid for.
fn code(quota: Quota) -> &'static str {
    match quota {
        Quota::TokensPerDay | Quota::TokensPerMonth => "insufficient_quota",
        _ => "rate_limit_exceeded",
    }
}

fn seconds(time: Duration) -> u32 {
    let whole = time.as_secs() + u64::from(time.subsec_nanos() > 0);
    u32::try_from(whole.max(1)).unwrap_or(u32::MAX)
}

const REQUESTS: [HeaderName; 3] = [
    HeaderName::from_static("x-ratelimit-limit-requests"),
    HeaderName::from_static("x-ratelimit-remaining-requests"),
    HeaderName::from_static("x-ratelimit-reset-requests"),
];
const TOKENS: [HeaderName; 3] = [
    HeaderName::from_static("x-ratelimit-limit-tokens"),
    HeaderName::from_static("x-ratelimit-remaining-tokens"),
    HeaderName::from_static("x-ratelimit-reset-tokens"),
];

/// Adds what is left of the key's requests and tokens; of several limits on tokens, of the shortest window.
pub fn write_headers(key: &Arc<KeyState>, headers: &mut HeaderMap) {
    let tokens = Quota::OF_TOKENS
        .into_iter()
        .find_map(|quota| key.remaining(quota));
    for (names, remaining) in [
        (REQUESTS, key.remaining(Quota::RequestsPerMinute)),
        (TOKENS, tokens),
    ] {
        let Some((limit, left, reset)) = remaining else {
            continue;
        };
        let [limit_name, left_name, reset_name] = names;
        headers.insert(limit_name, HeaderValue::from(limit));
        headers.insert(left_name, HeaderValue::from(left));
        if let Ok(value) = HeaderValue::from_str(&duration(reset)) {
            headers.insert(reset_name, value);
        }
    }
}

/// As OpenAI writes times: `1h2m3s`, `17ms`.
fn duration(time: Duration) -> String {
    let mut text = String::new();
    let seconds = time.as_secs();
    if seconds == 0 {
        return format!("{}ms", time.subsec_millis());
    }
    for (unit, count) in [
        ("h", seconds / 3600),
        ("m", seconds / 60 % 60),
        ("s", seconds % 60),
    ] {
        if count > 0 {
            // Writing to a String cannot fail.
            let _ = write!(text, "{count}{unit}");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_written_as_openai_does() {
        for (ms, text) in [
            (0, "0ms"),
            (17, "17ms"),
            (1000, "1s"),
            (59_999, "59s"),
            (3_723_000, "1h2m3s"),
            (7_200_000, "2h"),
        ] {
            assert_eq!(duration(Duration::from_millis(ms)), text);
        }
    }
}
