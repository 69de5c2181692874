//! Who asks: a key of the configuration, a key of the database, or anybody where there are none.

use std::net::IpAddr;
use std::sync::Arc;

use axum::http::{HeaderMap, Version, header};
use scalellm_accounts::Class;
use scalellm_engine_link::listener::PRIORITIES;
use subtle::{Choice, ConstantTimeEq};

use crate::app::App;
use crate::connection::ConnectionState;
use crate::error::{ApiError, ApiResult};
use crate::quota;
use crate::record::RequestRecord;
use crate::served::Served;

/// A class has this many values of the engine's `priority` to itself.
const PRIORITIES_OF_A_CLASS: i32 = *PRIORITIES.end() * 2 / 3;

/// Headers of those who do not ask for themselves.
const FOR_OTHERS: [&str; 7] = [
    "forwarded",
    "x-forwarded-for",
    "x-forwarded-host",
    "x-forwarded-proto",
    "x-real-ip",
    "via",
    "origin",
];

/// Lets a request with a good key pass; one of the database's is noted in `record`.
///
/// # Errors
/// 401; 503 if the database had to be asked and did not answer.
pub async fn check(app: &App, record: &RequestRecord, headers: &HeaderMap) -> ApiResult<()> {
    let live = app.live();
    let keys = &live.config.api_keys;
    let Some(accounts) = &app.accounts else {
        return check_static(headers, keys);
    };
    let Some(given) = bearer(headers)? else {
        if keys.is_empty() {
            return accounts
                .anonymous()
                .map_err(|denied| quota::refuse(app, &denied));
        }
        return Err(no_key());
    };
    if is_among(given, keys) {
        return Ok(());
    }
    let secret = std::str::from_utf8(given).unwrap_or_default();
    match accounts.authenticate(secret).await {
        Ok(key) => {
            record.set_key(key);
            Ok(())
        }
        // Where no key was ever made, one that was sent along does no harm: clients often must send some.
        Err(_) if keys.is_empty() && accounts.anonymous().is_ok() => Ok(()),
        Err(denied) => Err(quota::refuse(app, &denied)),
    }
}

/// Lets a request to `/admin` pass: with an admin key, or, where there is none, from this machine itself.
///
/// # Errors
/// 401, 403.
pub fn check_admin(
    headers: &HeaderMap,
    version: Version,
    keys: &[String],
    connection: Option<&Arc<ConnectionState>>,
) -> ApiResult<()> {
    if !keys.is_empty() {
        return check_static(headers, keys);
    }
    // A proxy on this machine speaks for others, and a browser for the pages it shows. nginx, where nothing else is
    // asked of it, says so only by HTTP/1.0, which no other client of today speaks.
    let for_others =
        version < Version::HTTP_11 || FOR_OTHERS.iter().any(|name| headers.contains_key(*name));
    if connection.is_some_and(|connection| connection.is_local())
        && !for_others
        && is_own_host(headers)
    {
        Ok(())
    } else {
        Err(ApiError::forbidden(
            "admin_only",
            "without admin_keys in the configuration, /admin answers this machine alone",
        ))
    }
}

/// Whether the client called this machine by an address or as localhost: a name of somebody else's that leads here is a
/// web page's way to speak with the browser's user.
fn is_own_host(headers: &HeaderMap) -> bool {
    let Some(host) = headers.get(header::HOST) else {
        return true;
    };
    let host = host.to_str().unwrap_or_default();
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next(),
        None => host.split(':').next(),
    };
    name.is_some_and(|name| name == "localhost" || name.parse::<IpAddr>().is_ok())
}

/// Lets a request with one of `keys` pass, or everybody if there are none.
fn check_static(headers: &HeaderMap, keys: &[String]) -> ApiResult<()> {
    if keys.is_empty() {
        return Ok(());
    }
    let given = bearer(headers)?.ok_or_else(no_key)?;
    if is_among(given, keys) {
        Ok(())
    } else {
        Err(ApiError::unauthorized("the API key is not known here"))
    }
}

fn no_key() -> Box<ApiError> {
    ApiError::unauthorized("an API key is needed, as the header authorization: Bearer KEY")
}

fn bearer(headers: &HeaderMap) -> ApiResult<Option<&[u8]>> {
    let Some(value) = headers.get(header::AUTHORIZATION) else {
        return Ok(None);
    };
    match value.as_bytes().split_at_checked(7) {
        Some((scheme, key)) if scheme.eq_ignore_ascii_case(b"bearer ") => {
            Ok(Some(key.trim_ascii()))
        }
        _ => Err(ApiError::unauthorized(
            "the authorization header is not of the form Bearer KEY",
        )),
    }
}

/// The time taken tells nothing of a key's content.
fn is_among(given: &[u8], keys: &[String]) -> bool {
    let found = keys.iter().fold(Choice::from(0), |found, key| {
        found | key.as_bytes().ct_eq(given)
    });
    bool::from(found)
}

/// Whether the request's key is for this model.
///
/// # Errors
/// 403.
pub fn may_use(record: &RequestRecord, model: &Served) -> ApiResult<()> {
    let Some(key) = record.key().map(|state| state.key()) else {
        return Ok(());
    };
    match &key.models {
        Some(models) if !models.iter().any(|name| model.is_called(name)) => {
            let message = format!(
                "model: the key is not for {:?}, but for {models:?}",
                model.name
            );
            Err(ApiError::forbidden("model_not_allowed", message))
        }
        _ => Ok(()),
    }
}

/// A request's priority among its key's class, which the client cannot leave.
#[must_use]
pub fn engine_priority(record: &RequestRecord, priority: i32) -> i32 {
    match record.key() {
        None => priority,
        Some(state) => within_class(state.key().class, priority),
    }
}

fn within_class(class: Class, priority: i32) -> i32 {
    let most = PRIORITIES_OF_A_CLASS / 2 - 1;
    let class = class as i32 - Class::Standard as i32;
    class * PRIORITIES_OF_A_CLASS + priority.clamp(-most, most)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_priority_of_every_class_is_one_that_engines_take() {
        let asked = [i32::MIN, -1_000_000, -1, 0, 1, 1_000_000, i32::MAX];
        let mut last = i32::MIN;
        for class in Class::ALL {
            for priority in asked {
                let told = within_class(class, priority);
                assert!(PRIORITIES.contains(&told), "{class:?} {priority}: {told}");
                assert!(told >= last, "{class:?} {priority}");
                last = told;
            }
        }
    }

    fn with_key(value: &str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(header::AUTHORIZATION, value.parse().unwrap());
        headers
    }

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
            let headers = value.map(with_key).unwrap_or_default();
            assert_eq!(check_static(&headers, &keys).is_ok(), passes, "{value:?}");
            assert!(check_static(&headers, &[]).is_ok());
        }
    }

    #[test]
    fn admin_is_for_its_key_or_for_this_machine() {
        let keys = ["root".to_owned()];
        let near = ConnectionState::new(true);
        let far = ConnectionState::new(false);
        let plain = HeaderMap::new();
        let check_admin = |headers: &HeaderMap, keys: &[String], connection| {
            super::check_admin(headers, Version::HTTP_11, keys, connection)
        };
        assert!(check_admin(&with_key("Bearer root"), &keys, Some(&far)).is_ok());
        assert!(check_admin(&with_key("Bearer other"), &keys, Some(&near)).is_err());
        assert!(check_admin(&plain, &keys, Some(&near)).is_err());
        assert!(check_admin(&plain, &[], Some(&near)).is_ok());
        assert!(check_admin(&plain, &[], Some(&far)).is_err());
        assert!(check_admin(&plain, &[], None).is_err());
        for (name, value, passes) in [
            ("x-forwarded-for", "10.0.0.1", false),
            ("via", "1.1 proxy", false),
            ("origin", "http://elsewhere", false),
            ("host", "elsewhere:8000", false),
            ("host", "localhost:8000", true),
            ("host", "127.0.0.1:8000", true),
            ("host", "[::1]:8000", true),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(name, value.parse().unwrap());
            let allowed = check_admin(&headers, &[], Some(&near)).is_ok();
            assert_eq!(allowed, passes, "{name}: {value}");
        }
        let of_nginx = super::check_admin(&plain, Version::HTTP_10, &[], Some(&near));
        assert!(of_nginx.is_err());
        let with_key = with_key("Bearer root");
        assert!(super::check_admin(&with_key, Version::HTTP_10, &keys, Some(&near)).is_ok());
    }
}
