//! Errors of the gateway.
//!
//! ```text
//! GatewayError            the process cannot start or go on
//! |- Config               a bad setting            (ValueError in Python)
//! |- Model                a model's folder is bad  (ValueError in Python)
//! |- Bind                 the port is taken        (OSError in Python)
//! `- Runtime              the operating system refused a thread or a signal handler
//! ApiError                one request's answer: OpenAI's envelope and an HTTP status
//! ```

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;

const UNKNOWN_MODEL: &str = "model_not_found";

#[derive(Debug, thiserror::Error)]
pub enum GatewayError {
    #[error("gateway configuration: {0}")]
    Config(String),
    #[error("model {name:?}: {reason}")]
    Model { name: String, reason: String },
    #[error("cannot listen on {address}: {source}")]
    Bind {
        address: String,
        source: std::io::Error,
    },
    #[error("gateway runtime: {0}")]
    Runtime(#[from] std::io::Error),
}

/// An answer other than success. `message` names the field, what it got and what is allowed.
#[derive(Debug, Clone, PartialEq)]
pub struct ApiError {
    pub status: StatusCode,
    pub kind: &'static str,
    pub message: String,
    pub param: Option<String>,
    pub code: Option<&'static str>,
    pub retry_after_s: Option<u32>,
    /// The connection is of no further use (a body was left unread, or the process is going).
    pub close: bool,
}

/// Boxed, so that the `Result`s on the hot path stay small.
pub type ApiResult<T> = Result<T, Box<ApiError>>;

#[derive(Serialize)]
struct Envelope<'a> {
    error: EnvelopeBody<'a>,
}

#[derive(Serialize)]
struct EnvelopeBody<'a> {
    message: &'a str,
    r#type: &'a str,
    param: Option<&'a str>,
    code: Option<&'a str>,
}

impl ApiError {
    fn new(
        status: StatusCode,
        kind: &'static str,
        code: Option<&'static str>,
        message: impl Into<String>,
    ) -> ApiError {
        ApiError {
            status,
            kind,
            message: message.into(),
            param: None,
            code,
            retry_after_s: None,
            close: false,
        }
    }

    /// 400: a field of the request is wrong.
    #[must_use]
    pub fn field(param: impl Into<String>, message: impl Into<String>) -> Box<ApiError> {
        let error = ApiError::new(
            StatusCode::BAD_REQUEST,
            "invalid_request_error",
            None,
            message,
        );
        Box::new(ApiError {
            param: Some(param.into()),
            ..error
        })
    }

    /// 400: a field that is known and cannot be honoured.
    #[must_use]
    pub fn unsupported(param: &str, message: impl Into<String>) -> Box<ApiError> {
        Box::new(ApiError {
            code: Some("unsupported_field"),
            ..*ApiError::field(param, message)
        })
    }

    /// 400: the body as a whole is wrong.
    #[must_use]
    pub fn body(message: impl Into<String>) -> Box<ApiError> {
        Box::new(ApiError::new(
            StatusCode::BAD_REQUEST,
            "invalid_request_error",
            Some("invalid_body"),
            message,
        ))
    }

    #[must_use]
    pub fn context_length(param: &str, message: String) -> Box<ApiError> {
        Box::new(ApiError {
            code: Some("context_length_exceeded"),
            ..*ApiError::field(param, message)
        })
    }

    /// 400: what is asked or answered is not let through.
    #[must_use]
    pub fn content_filter(message: String) -> Box<ApiError> {
        Box::new(ApiError::new(
            StatusCode::BAD_REQUEST,
            "invalid_request_error",
            Some("content_filter"),
            message,
        ))
    }

    #[must_use]
    pub fn unauthorized(message: &str) -> Box<ApiError> {
        Box::new(ApiError::new(
            StatusCode::UNAUTHORIZED,
            "authentication_error",
            Some("invalid_api_key"),
            message,
        ))
    }

    /// 403: who asks is known, and may not.
    #[must_use]
    pub fn forbidden(code: &'static str, message: impl Into<String>) -> Box<ApiError> {
        Box::new(ApiError::new(
            StatusCode::FORBIDDEN,
            "permission_error",
            Some(code),
            message,
        ))
    }

    /// 429: a budget of the key's is used up.
    #[must_use]
    pub fn over_quota(
        code: &'static str,
        message: impl Into<String>,
        retry_after_s: u32,
    ) -> Box<ApiError> {
        let error = ApiError::new(
            StatusCode::TOO_MANY_REQUESTS,
            if code == "insufficient_quota" {
                "insufficient_quota"
            } else {
                "rate_limit_error"
            },
            Some(code),
            message,
        );
        Box::new(ApiError {
            retry_after_s: Some(retry_after_s),
            ..error
        })
    }

    /// 404: there is no such thing to administer.
    #[must_use]
    pub fn not_found(code: &'static str, message: impl Into<String>) -> Box<ApiError> {
        Box::new(ApiError::new(
            StatusCode::NOT_FOUND,
            "invalid_request_error",
            Some(code),
            message,
        ))
    }

    #[must_use]
    pub fn unknown_model(name: &str, known: &[&str]) -> Box<ApiError> {
        let message = format!("model: got {}, served are {known:?}", shown(name));
        let error = ApiError::new(
            StatusCode::NOT_FOUND,
            "invalid_request_error",
            Some(UNKNOWN_MODEL),
            message,
        );
        Box::new(ApiError {
            param: Some("model".to_owned()),
            ..error
        })
    }

    #[must_use]
    pub fn unknown_route(method: &str, path: &str) -> Box<ApiError> {
        let message = format!(
            "there is no {method} {}; GET / lists the endpoints",
            shown(path)
        );
        Box::new(ApiError::new(
            StatusCode::NOT_FOUND,
            "invalid_request_error",
            Some("unknown_url"),
            message,
        ))
    }

    #[must_use]
    pub fn method_not_allowed(method: &str, path: &str) -> Box<ApiError> {
        let message = format!(
            "{} does not take {method}; the allow header names what it takes",
            shown(path)
        );
        Box::new(ApiError::new(
            StatusCode::METHOD_NOT_ALLOWED,
            "invalid_request_error",
            Some("method_not_allowed"),
            message,
        ))
    }

    #[must_use]
    pub fn body_too_large(limit_bytes: usize) -> Box<ApiError> {
        let message =
            format!("the request body is larger than max_body_bytes, {limit_bytes} bytes");
        let error = ApiError::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            "invalid_request_error",
            Some("body_too_large"),
            message,
        );
        Box::new(ApiError {
            close: true,
            ..error
        })
    }

    /// 503: the bodies that are being read have taken all memory for them.
    #[must_use]
    pub fn body_memory() -> Box<ApiError> {
        let message = "the memory for request bodies (max_body_memory_bytes) is taken";
        Box::new(ApiError {
            close: true,
            ..*ApiError::busy("overloaded", message, 1)
        })
    }

    #[must_use]
    pub fn body_timeout(limit_s: f64) -> Box<ApiError> {
        let message = format!("the request body did not arrive within body_timeout_s, {limit_s} s");
        let error = ApiError::new(
            StatusCode::REQUEST_TIMEOUT,
            "timeout_error",
            Some("body_timeout"),
            message,
        );
        Box::new(ApiError {
            close: true,
            ..error
        })
    }

    /// 503: try again a little later.
    #[must_use]
    pub fn busy(
        code: &'static str,
        message: impl Into<String>,
        retry_after_s: u32,
    ) -> Box<ApiError> {
        let error = ApiError::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "server_error",
            Some(code),
            message,
        );
        Box::new(ApiError {
            retry_after_s: Some(retry_after_s),
            ..error
        })
    }

    #[must_use]
    pub fn draining(retry_after_s: u32) -> Box<ApiError> {
        let error = ApiError::busy(
            "draining",
            "this server is shutting down and takes no new requests",
            retry_after_s,
        );
        Box::new(ApiError {
            close: true,
            ..*error
        })
    }

    /// 502: the engine that ran the request is gone.
    #[must_use]
    pub fn engine_lost(reason: &str) -> Box<ApiError> {
        let message = format!("the engine that ran this request was lost: {reason}");
        Box::new(ApiError::new(
            StatusCode::BAD_GATEWAY,
            "server_error",
            Some("engine_lost"),
            message,
        ))
    }

    /// 502: a foreign engine gave no answer, or a bad one.
    #[must_use]
    pub fn upstream_failed(message: impl Into<String>) -> Box<ApiError> {
        Box::new(ApiError::new(
            StatusCode::BAD_GATEWAY,
            "server_error",
            Some("upstream_failed"),
            message,
        ))
    }

    /// 504: a foreign engine took too long.
    #[must_use]
    pub fn upstream_late(message: impl Into<String>) -> Box<ApiError> {
        Box::new(ApiError::new(
            StatusCode::GATEWAY_TIMEOUT,
            "timeout_error",
            Some("upstream_timeout"),
            message,
        ))
    }

    /// 500: the request was there when replicas died, and is not sent to a further one.
    #[must_use]
    pub fn replica_deaths(deaths: u32, refused_for_s: f64) -> Box<ApiError> {
        let message = format!(
            "this request was present at {deaths} deaths of replicas; its prompt is refused for {refused_for_s} s"
        );
        Box::new(ApiError::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "server_error",
            Some("replica_deaths"),
            message,
        ))
    }

    /// 503: the same prompt again.
    #[must_use]
    pub fn prompt_refused(left: std::time::Duration) -> Box<ApiError> {
        let message = "this prompt was present at deaths of replicas and is refused for a while";
        ApiError::busy("prompt_refused", message, left.as_secs_f64().ceil() as u32)
    }

    #[must_use]
    pub fn deadline(message: impl Into<String>) -> Box<ApiError> {
        Box::new(ApiError::new(
            StatusCode::GATEWAY_TIMEOUT,
            "timeout_error",
            Some("deadline_exceeded"),
            message,
        ))
    }

    #[must_use]
    pub fn internal(message: impl Into<String>) -> Box<ApiError> {
        Box::new(ApiError::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "server_error",
            Some("internal_error"),
            message,
        ))
    }

    /// What the log tells of it.
    #[must_use]
    pub fn note(&self) -> ErrorNote {
        // What is wrong with a request is told by repeating it, and the log has nothing of what is asked.
        let repeats = self.status == StatusCode::BAD_REQUEST || self.code == Some(UNKNOWN_MODEL);
        ErrorNote {
            code: self.code,
            param: self.param.clone(),
            message: (!repeats).then(|| self.message.clone()),
        }
    }

    /// The envelope as JSON, for a body or for an event of a stream that has begun.
    #[must_use]
    pub fn to_json(&self) -> Vec<u8> {
        let body = EnvelopeBody {
            message: &self.message,
            r#type: self.kind,
            param: self.param.as_deref(),
            code: self.code,
        };
        serde_json::to_vec(&Envelope { error: body }).unwrap_or_default()
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let note = self.note();
        let mut response = (
            self.status,
            [(
                header::CONTENT_TYPE,
                HeaderValue::from_static("application/json"),
            )],
            self.to_json(),
        )
            .into_response();
        let headers = response.headers_mut();
        if let Some(seconds) = self.retry_after_s {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if self.close {
            headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        response.extensions_mut().insert(note);
        response
    }
}

impl From<GatewayError> for Box<ApiError> {
    /// An operator's change that cannot be.
    fn from(error: GatewayError) -> Box<ApiError> {
        match error {
            GatewayError::Config(_) | GatewayError::Model { .. } => Box::new(ApiError::new(
                StatusCode::BAD_REQUEST,
                "invalid_request_error",
                Some("invalid_config"),
                error.to_string(),
            )),
            GatewayError::Bind { .. } | GatewayError::Runtime(_) => {
                ApiError::internal(error.to_string())
            }
        }
    }
}

/// Carries what the access log tells of an error there.
#[derive(Debug, Clone)]
pub struct ErrorNote {
    pub code: Option<&'static str>,
    pub param: Option<String>,
    /// Without a word of what is asked or answered.
    pub message: Option<String>,
}

/// A client's string as an error message may repeat it: quoted, at most 64 characters.
#[must_use]
pub fn shown(text: &str) -> String {
    match text.char_indices().nth(64) {
        Some((end, _)) => format!("{:?}... ({} bytes)", &text[..end], text.len()),
        None => format!("{text:?}"),
    }
}
