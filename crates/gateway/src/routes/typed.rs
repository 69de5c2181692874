//! What operators send, as types. What cannot be read is told as every other error is.

use axum::extract::rejection::{PathRejection, QueryRejection};
use axum::extract::{Path, Query, Request};
use serde::de::DeserializeOwned;

use crate::app::App;
use crate::body;
use crate::error::{ApiError, ApiResult};
use crate::record::RequestRecord;

pub type Asked<T> = Result<Query<T>, QueryRejection>;
pub type Named = Result<Path<String>, PathRejection>;

/// A body that is a JSON object.
///
/// # Errors
/// As [`body::parsed`]; 400 for what is no object, or none with these fields.
pub async fn object<T: DeserializeOwned + Send + 'static>(
    app: &App,
    record: &RequestRecord,
    request: Request,
) -> ApiResult<T> {
    body::parsed(app, record, request, |bytes| {
        // A list would be taken for the fields in their order.
        if bytes.trim_ascii_start().first() != Some(&b'{') {
            return Err(ApiError::body("the request body is not a JSON object"));
        }
        serde_json::from_slice(bytes).map_err(|error| ApiError::body(error.to_string()))
    })
    .await
}

/// # Errors
/// 400 names the parameter.
pub fn query<T>(asked: Asked<T>) -> ApiResult<T> {
    let Query(asked) = asked.map_err(|error| ApiError::body(error.body_text()))?;
    Ok(asked)
}

/// The last part of a path.
///
/// # Errors
/// 404 for one that is not UTF-8, which names nothing.
pub fn name(named: Named) -> ApiResult<String> {
    let Path(name) =
        named.map_err(|error| ApiError::not_found("unknown_url", error.body_text()))?;
    Ok(name)
}
