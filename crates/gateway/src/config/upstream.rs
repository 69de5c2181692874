//! `[[models.upstreams]]`: a server elsewhere that speaks OpenAI's API.

use std::path::PathBuf;
use std::time::Duration;

use hyper::Uri;
use hyper::header::HeaderValue;
use serde::Deserialize;

use crate::error::GatewayError;

/// One foreign engine of a model.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UpstreamConfig {
    /// Where its API is, up to and with `/v1`: `https://host[:port]/v1`. Without a path, `/v1` is added.
    pub url: String,
    /// Its name of the model, where that differs.
    #[serde(default)]
    pub model: Option<String>,
    /// Environment variable with the key that it asks for.
    #[serde(default)]
    pub api_key_env: Option<String>,
    /// File with that key, read at the start and at each reload.
    #[serde(default)]
    pub api_key_file: Option<PathBuf>,
    /// Authorities, in PEM, that are believed besides the public ones.
    #[serde(default)]
    pub ca_file: Option<PathBuf>,
    /// Share of the model's requests.
    #[serde(default = "one")]
    pub weight: u32,
    /// Used only while none of the others can be.
    #[serde(default)]
    pub fallback: bool,
    #[serde(default = "connect_timeout_s")]
    pub connect_timeout_s: f64,
    /// Until the first event of a stream, or the head of any other answer.
    #[serde(default = "first_byte_timeout_s")]
    pub first_byte_timeout_s: f64,
    /// Between two parts of an answer.
    #[serde(default = "idle_timeout_s")]
    pub idle_timeout_s: f64,
    /// What is asked, below `url`, whether it is well; "" asks nothing, and only requests tell.
    #[serde(default = "health_path")]
    pub health_path: String,
    #[serde(default = "health_interval_s")]
    pub health_interval_s: f64,
    /// Idle connections that are kept.
    #[serde(default = "max_idle_connections")]
    pub max_idle_connections: usize,
}

fn one() -> u32 {
    1
}

fn connect_timeout_s() -> f64 {
    5.0
}

fn first_byte_timeout_s() -> f64 {
    600.0
}

fn idle_timeout_s() -> f64 {
    120.0
}

fn health_path() -> String {
    "/models".to_owned()
}

fn health_interval_s() -> f64 {
    5.0
}

fn max_idle_connections() -> usize {
    256
}

pub(super) const MAX_WEIGHT: u32 = 1_000_000;

impl UpstreamConfig {
    /// One at `url` with the defaults.
    #[must_use]
    pub fn at(url: String) -> UpstreamConfig {
        UpstreamConfig {
            url,
            model: None,
            api_key_env: None,
            api_key_file: None,
            ca_file: None,
            weight: one(),
            fallback: false,
            connect_timeout_s: connect_timeout_s(),
            first_byte_timeout_s: first_byte_timeout_s(),
            idle_timeout_s: idle_timeout_s(),
            health_path: health_path(),
            health_interval_s: health_interval_s(),
            max_idle_connections: max_idle_connections(),
        }
    }

    /// Checks what the types do not; `path` is the key's, e.g. `models[0].upstreams[1]`.
    ///
    /// # Errors
    /// `GatewayError::Config` names the key, what it got and what is allowed.
    pub fn validate(&self, path: &str) -> Result<(), GatewayError> {
        let bad =
            |key: &str, what: String| Err(GatewayError::Config(format!("{path}.{key}: {what}")));
        if let Err(reason) = self.base() {
            return bad(
                "url",
                format!(
                    "got {:?} ({reason}), allowed is http:// or https://HOST[:PORT][/PATH]",
                    self.url
                ),
            );
        }
        if self.model.as_deref() == Some("") {
            return bad("model", "got \"\", allowed are 1 or more bytes".to_owned());
        }
        if !(1..=MAX_WEIGHT).contains(&self.weight) {
            return bad(
                "weight",
                format!("got {}, allowed is 1 to {MAX_WEIGHT}", self.weight),
            );
        }
        if !(self.health_path.is_empty() || self.health_path.starts_with('/')) {
            return bad(
                "health_path",
                format!("got {:?}, allowed is \"\" or /PATH", self.health_path),
            );
        }
        for (key, value) in [
            ("connect_timeout_s", self.connect_timeout_s),
            ("first_byte_timeout_s", self.first_byte_timeout_s),
            ("idle_timeout_s", self.idle_timeout_s),
            ("health_interval_s", self.health_interval_s),
        ] {
            if !(value > 0.0 && value <= 1e6) {
                return bad(
                    key,
                    format!("got {value}, allowed is more than 0 to 1e6 seconds"),
                );
            }
        }
        if self.api_key_env.is_some() && self.api_key_file.is_some() {
            return bad(
                "api_key_env",
                "got both it and api_key_file, allowed is one of them".to_owned(),
            );
        }
        Ok(())
    }

    /// Where the API is.
    ///
    /// # Errors
    /// What is wrong with `url`.
    pub fn base(&self) -> Result<Base, String> {
        let uri: Uri = self.url.parse().map_err(|error| format!("{error}"))?;
        let tls = match uri.scheme_str() {
            Some("http") => false,
            Some("https") => true,
            _ => return Err("the scheme is not http or https".to_owned()),
        };
        let authority = uri.authority().ok_or("there is no host")?;
        if authority.as_str().contains('@') {
            return Err("a user does not belong there; use api_key_env or api_key_file".to_owned());
        }
        if uri.query().is_some() {
            return Err("a query does not belong there".to_owned());
        }
        let host = authority.host().trim_matches(['[', ']']).to_owned();
        if host.is_empty() {
            return Err("there is no host".to_owned());
        }
        let path = uri.path().trim_end_matches('/');
        Ok(Base {
            tls,
            host,
            port: authority.port_u16().unwrap_or(if tls { 443 } else { 80 }),
            authority: authority.as_str().to_owned(),
            path: if path.is_empty() { "/v1" } else { path }.to_owned(),
        })
    }

    /// The value of the authorization header, with the key from its environment variable or file.
    ///
    /// # Errors
    /// `GatewayError::Config` names where there is none.
    pub fn authorization(&self, path: &str) -> Result<Option<HeaderValue>, GatewayError> {
        let (at, key) = match (&self.api_key_env, &self.api_key_file) {
            (Some(name), _) => {
                let key = std::env::var(name).map_err(|error| {
                    GatewayError::Config(format!("{path}.api_key_env: {name}: {error}"))
                })?;
                ("api_key_env", key)
            }
            (None, Some(file)) => {
                let key = std::fs::read_to_string(file).map_err(|error| {
                    GatewayError::Config(format!(
                        "{path}.api_key_file: {}: {error}",
                        file.display()
                    ))
                })?;
                ("api_key_file", key)
            }
            (None, None) => return Ok(None),
        };
        let key = key.trim();
        let mut value = HeaderValue::from_str(&format!("Bearer {key}"))
            .ok()
            .filter(|_| !key.is_empty() && key.bytes().all(|byte| byte.is_ascii_graphic()))
            .ok_or_else(|| {
                let what = "what is there is no key: allowed is visible ASCII, not empty";
                GatewayError::Config(format!("{path}.{at}: {what}"))
            })?;
        value.set_sensitive(true);
        Ok(Some(value))
    }

    #[must_use]
    pub fn timeouts(&self) -> Timeouts {
        Timeouts {
            connect: Duration::from_secs_f64(self.connect_timeout_s),
            first_byte: Duration::from_secs_f64(self.first_byte_timeout_s),
            idle: Duration::from_secs_f64(self.idle_timeout_s),
        }
    }
}

/// A parsed `url`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Base {
    pub tls: bool,
    /// Without brackets.
    pub host: String,
    pub port: u16,
    /// As the host header says it.
    pub authority: String,
    /// Without a slash at its end.
    pub path: String,
}

/// How long each wait for an upstream may take.
#[derive(Debug, Clone, Copy)]
pub struct Timeouts {
    pub connect: Duration,
    pub first_byte: Duration,
    pub idle: Duration,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn upstream(text: &str) -> UpstreamConfig {
        toml::from_str(text).unwrap()
    }

    #[test]
    fn a_url_says_where_the_api_is() {
        for (url, tls, host, port, path) in [
            ("http://vllm:8000", false, "vllm", 8000, "/v1"),
            ("http://vllm:8000/", false, "vllm", 8000, "/v1"),
            (
                "https://api.example.com/openai/v1/",
                true,
                "api.example.com",
                443,
                "/openai/v1",
            ),
            ("http://[::1]/v1", false, "::1", 80, "/v1"),
        ] {
            let base = upstream(&format!("url = '{url}'")).base().unwrap();
            assert_eq!(
                (base.tls, base.host.as_str(), base.port, base.path.as_str()),
                (tls, host, port, path)
            );
        }
    }

    #[test]
    fn each_bad_key_is_named_with_its_path() {
        for (text, says) in [
            (
                "url = 'ftp://x'",
                "m.url: got \"ftp://x\" (the scheme is not http or https)",
            ),
            ("url = 'host:80'", "m.url: got"),
            ("url = 'http://key@host'", "m.url: got"),
            ("url = 'http://h?x=1'", "m.url: got"),
            (
                "url = 'http://h'\nweight = 0",
                "m.weight: got 0, allowed is 1 to 1000000",
            ),
            ("url = 'http://h'\nmodel = ''", "m.model"),
            ("url = 'http://h'\nhealth_path = 'x'", "m.health_path"),
            (
                "url = 'http://h'\nidle_timeout_s = 0.0",
                "m.idle_timeout_s: got 0",
            ),
            (
                "url = 'http://h'\nconnect_timeout_s = nan",
                "m.connect_timeout_s: got NaN",
            ),
            (
                "url = 'http://h'\napi_key_env = 'A'\napi_key_file = 'b'",
                "m.api_key_env: got both",
            ),
        ] {
            let message = upstream(text).validate("m").unwrap_err().to_string();
            assert!(message.contains(says), "{message}");
        }
    }

    #[test]
    fn a_key_that_is_not_there_ends_the_start() {
        let absent = upstream("url = 'http://h'\napi_key_env = 'SCALELLM_TEST_NO_SUCH_KEY'");
        let message = absent.authorization("m").unwrap_err().to_string();
        assert!(
            message.contains("m.api_key_env: SCALELLM_TEST_NO_SUCH_KEY"),
            "{message}"
        );
        let file = upstream("url = 'http://h'\napi_key_file = '/no/such/file'");
        assert!(file.authorization("m").is_err());
        assert_eq!(
            upstream("url = 'http://h'").authorization("m").unwrap(),
            None
        );
    }
}
