//! Where an engine listens: a Unix socket on the same host, TCP between hosts.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// `unix:PATH`, `HOST:PORT`, or `file:PATH`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Address {
    Unix(PathBuf),
    /// `host:port`; an IPv6 host stands in brackets.
    Tcp(String),
    /// Where the engine's address is written, by whoever starts it: read anew for each connection, as an engine that
    /// is started again may be elsewhere. While there is no file, there is no engine.
    File(PathBuf),
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("address {given:?} is wrong: {reason}; use unix:PATH, HOST:PORT or file:PATH")]
pub struct AddressError {
    pub given: String,
    pub reason: &'static str,
}

/// `sun_path` holds 108 bytes with its closing zero.
const MAX_UNIX_PATH_BYTES: usize = 107;

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(given: &str) -> Result<Self, AddressError> {
        let wrong = |reason| AddressError {
            given: given.to_owned(),
            reason,
        };
        if let Some(path) = given.strip_prefix("unix:") {
            if path.is_empty() {
                return Err(wrong("the path of the socket is empty"));
            }
            if path.len() > MAX_UNIX_PATH_BYTES {
                return Err(wrong("a Unix socket's path has at most 107 bytes"));
            }
            if path.contains('\0') {
                return Err(wrong("the path contains a zero byte"));
            }
            return Ok(Address::Unix(PathBuf::from(path)));
        }
        if let Some(path) = given.strip_prefix("file:") {
            if path.is_empty() || path.contains('\0') {
                return Err(wrong(
                    "the path of the file is empty or contains a zero byte",
                ));
            }
            return Ok(Address::File(PathBuf::from(path)));
        }
        let Some((host, port)) = given.rsplit_once(':') else {
            return Err(wrong("there is no port"));
        };
        let bracketed = host.starts_with('[') && host.ends_with(']');
        if host.is_empty() || (host.contains(':') && !bracketed) {
            return Err(wrong(
                "the host is empty, or an IPv6 address without brackets",
            ));
        }
        if host.contains(['/', ' ', '@']) {
            return Err(wrong("the host is not a name or an IP address"));
        }
        if port.is_empty()
            || !port.bytes().all(|b| b.is_ascii_digit())
            || port.parse::<u16>().is_err()
        {
            return Err(wrong("the port is not a number from 0 to 65535"));
        }
        Ok(Address::Tcp(given.to_owned()))
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Unix(path) => write!(f, "unix:{}", path.display()),
            Address::Tcp(host_port) => f.write_str(host_port),
            Address::File(path) => write!(f, "file:{}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn good_addresses_survive_a_round_trip() {
        for text in [
            "unix:/tmp/engine.sock",
            "unix:engine.sock",
            "127.0.0.1:7000",
            "[::1]:0",
            "engine-0.engines:65535",
            "file:/run/engine-0.address",
        ] {
            let address: Address = text.parse().expect(text);
            assert_eq!(address.to_string(), text);
        }
    }

    #[test]
    fn bad_addresses_are_refused_with_what_is_allowed() {
        let long = format!("unix:/{}", "x".repeat(107));
        for text in [
            "",
            "unix:",
            "file:",
            "localhost",
            ":80",
            "a:b",
            "a:70000",
            "a:",
            "::1:80",
            "http://a:80",
            "a:+80",
            &long,
        ] {
            let error = text.parse::<Address>().expect_err(text);
            assert!(
                error
                    .to_string()
                    .contains("unix:PATH, HOST:PORT or file:PATH"),
                "{error}"
            );
        }
    }
}
