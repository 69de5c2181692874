//! The head of an upstream's answer.

use std::mem::MaybeUninit;

use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use httparse::{ParserConfig, Response, Status};

use super::framing::Framing;

const MAX_HEADERS: usize = 100;

/// What of an answer's headers anybody asks for.
const READ: [HeaderName; 4] = [
    header::CONTENT_TYPE,
    header::CONTENT_ENCODING,
    header::CACHE_CONTROL,
    header::RETRY_AFTER,
];

#[derive(Debug)]
pub struct Head {
    pub status: StatusCode,
    /// Those of [`READ`].
    pub headers: HeaderMap,
    pub framing: Framing,
    /// The connection may be used again after the body.
    pub keep_alive: bool,
}

impl Head {
    /// Reads a head and tells how long it was; `None` if there is more to come.
    ///
    /// # Errors
    /// What came is no HTTP, or does not say where its body ends.
    pub fn parse(bytes: &[u8]) -> Result<Option<(Head, usize)>, String> {
        let mut fields = [const { MaybeUninit::uninit() }; MAX_HEADERS];
        let mut response = Response::new(&mut []);
        let parsing = ParserConfig::default();
        let parsed = parsing.parse_response_with_uninit_headers(&mut response, bytes, &mut fields);
        let length = match parsed {
            Ok(Status::Complete(length)) => length,
            Ok(Status::Partial) => return Ok(None),
            Err(error) => return Err(format!("it is no HTTP: {error}")),
        };
        let (mut headers, mut connection) = (HeaderMap::new(), None);
        let (mut body_bytes, mut chunked) = (None, false);
        for field in &*response.headers {
            let is = |name: &HeaderName| field.name.eq_ignore_ascii_case(name.as_str());
            let value = field.value.trim_ascii();
            if is(&header::CONTENT_LENGTH) {
                let bytes = number(value).ok_or("its content-length is no number")?;
                if body_bytes.is_some_and(|before| before != bytes) {
                    return Err("it has two different lengths".to_owned());
                }
                body_bytes = Some(bytes);
            } else if is(&header::TRANSFER_ENCODING) {
                if chunked || !value.eq_ignore_ascii_case(b"chunked") {
                    return Err("it comes in a coding other than chunked".to_owned());
                }
                chunked = true;
            } else if is(&header::CONNECTION) {
                connection = Some(value);
            } else if let Some(name) = READ.iter().find(|name| is(name)) {
                let value = HeaderValue::from_bytes(value).map_err(|error| error.to_string())?;
                headers.entry(name).or_insert(value);
            }
        }
        let status = StatusCode::from_u16(response.code.unwrap_or(0))
            .map_err(|error| format!("it is no HTTP: {error}"))?;
        let says = |option: &[u8]| {
            let mut options = connection.unwrap_or_default().split(|byte| *byte == b',');
            options.any(|given| given.trim_ascii().eq_ignore_ascii_case(option))
        };
        let is_http11 = response.version == Some(1);
        let framing = match body_bytes {
            _ if status.is_informational()
                || matches!(status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED) =>
            {
                Framing::End
            }
            _ if chunked && is_http11 => Framing::CHUNKED,
            _ if chunked => return Err("it is chunked, which HTTP/1.0 does not know".to_owned()),
            Some(bytes) => Framing::of_length(bytes),
            None => Framing::UntilClose,
        };
        let keep_alive = match is_http11 {
            true => !says(b"close"),
            false => says(b"keep-alive"),
        };
        let head = Head {
            status,
            headers,
            framing,
            // Whoever sends both a length and chunks may mean either.
            keep_alive: keep_alive && !(chunked && body_bytes.is_some()),
        };
        Ok(Some((head, length)))
    }
}

/// Digits alone: Rust's own would take a sign.
fn number(value: &[u8]) -> Option<u64> {
    let digits = value.iter().all(u8::is_ascii_digit) && value.len() <= 18;
    let text = std::str::from_utf8(value).ok().filter(|_| digits)?;
    text.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(lines: &[&str]) -> Result<Option<(Head, usize)>, String> {
        Head::parse(format!("{}\r\n\r\n", lines.join("\r\n")).as_bytes())
    }

    fn head(lines: &[&str]) -> Head {
        parse(lines).unwrap().unwrap().0
    }

    #[test]
    fn a_head_tells_where_its_body_ends() {
        let ok = "HTTP/1.1 200 OK";
        for (lines, framing, keep_alive) in [
            (vec![ok, "Content-Length:  7 "], Framing::Length(7), true),
            (vec![ok, "content-length: 0"], Framing::End, true),
            (
                vec![ok, "transfer-encoding: Chunked"],
                Framing::CHUNKED,
                true,
            ),
            (
                vec![ok, "transfer-encoding: chunked", "content-length: 3"],
                Framing::CHUNKED,
                false,
            ),
            (vec![ok], Framing::UntilClose, true),
            (
                vec![ok, "connection: x, Close", "content-length: 7"],
                Framing::Length(7),
                false,
            ),
            (
                vec!["HTTP/1.0 200 OK", "content-length: 7"],
                Framing::Length(7),
                false,
            ),
            (
                vec![
                    "HTTP/1.0 200 OK",
                    "connection: Keep-Alive",
                    "content-length: 7",
                ],
                Framing::Length(7),
                true,
            ),
            (
                vec!["HTTP/1.1 204 No Content", "content-length: 7"],
                Framing::End,
                true,
            ),
            (vec!["HTTP/1.1 100 Continue"], Framing::End, true),
        ] {
            let head = head(&lines);
            assert_eq!(
                (head.framing, head.keep_alive),
                (framing, keep_alive),
                "{lines:?}"
            );
        }
    }

    #[test]
    fn only_what_is_asked_for_is_kept() {
        let head = head(&[
            "HTTP/1.1 429 Too Many",
            "Retry-After: 3",
            "set-cookie: a",
            "content-type: text/plain",
            "content-type: text/html",
        ]);
        assert_eq!(head.status, StatusCode::TOO_MANY_REQUESTS);
        assert_eq!(head.headers.len(), 2);
        assert_eq!(head.headers[header::RETRY_AFTER], "3");
        assert_eq!(head.headers[header::CONTENT_TYPE], "text/plain");
    }

    #[test]
    fn what_is_no_head_or_could_be_read_in_two_ways_is_refused() {
        let ok = "HTTP/1.1 200 OK";
        for (lines, says) in [
            (vec!["HELLO"], "no HTTP"),
            (vec!["HTTP/1.1 99 x"], "no HTTP"),
            (vec![ok, "content-length: +7"], "no number"),
            (vec![ok, "content-length: "], "no number"),
            (
                vec![ok, "content-length: 7", "content-length: 8"],
                "two different",
            ),
            (vec![ok, "transfer-encoding: gzip, chunked"], "a coding"),
            (
                vec![
                    ok,
                    "transfer-encoding: chunked",
                    "transfer-encoding: chunked",
                ],
                "a coding",
            ),
            (
                vec!["HTTP/1.0 200 OK", "transfer-encoding: chunked"],
                "HTTP/1.0",
            ),
        ] {
            let error = parse(&lines).unwrap_err();
            assert!(error.contains(says), "{lines:?}: {error}");
        }
        assert!(
            Head::parse(b"HTTP/1.1 200 OK\r\nx: y\r\n")
                .unwrap()
                .is_none()
        );
    }
}
