//! API keys.

use axum::http::{HeaderMap, header};
use subtle::{Choice, ConstantTimeEq};

use crate::error::{ApiError, ApiResult};

/// Lets a request with one of `keys` pass. The time taken tells nothing of a key's content.
///
/// # Errors
/// 401.
pub fn check(headers: &HeaderMap, keys: &[String]) -> ApiResult<()> {
    if keys.is_empty() {
        return Ok(());
    }
    let Some(value) = headers.get(header::AUTHORIZATION) else {
        return Err(ApiError::unauthorized(
            "an API key is needed, as the header authorization: Bearer KEY",
        ));
    };
    let given = match value.as_bytes().split_at_checked(7) {
        Some((scheme, key)) if scheme.eq_ignore_ascii_case(b"bearer ") => key.trim_ascii(),
        _ => {
            return Err(ApiError::unauthorized(
                "the authorization header is not of the form Bearer KEY",
            ));
        }
    };
    let known = keys.iter().fold(Choice::from(0), |found, key| {
        found | key.as_bytes().ct_eq(given)
    });
    if bool::from(known) {
        Ok(())
    } else {
        Err(ApiError::unauthorized("the API key is not known here"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_known_key_passes() {
        let keys = ["alpha".to_owned(), "beta".to_owned()];
        for (value, passes) in [
            (Some("Bearer beta"), true),
            (Some("bearer  alpha "), true),
            (Some("Bearer alph"), false),
            (Some("Bearer alphabeta"), false),
            (Some("Bearer "), false),
            (Some("Basic alpha"), false),
            (Some("Be"), false),
            (None, false),
        ] {
            let mut headers = HeaderMap::new();
            if let Some(value) = value {
                headers.insert(header::AUTHORIZATION, value.parse().unwrap());
            }
            assert_eq!(check(&headers, &keys).is_ok(), passes, "{value:?}");
            assert!(check(&headers, &[]).is_ok());
        }
    }
}
