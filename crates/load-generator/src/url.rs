use crate::error::LoadError;
use crate::plan::Endpoint;

/// Where to connect, whether by TLS, and the path requests go to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Target {
    /// `host:port`, as name resolution wants it.
    pub socket: String,
    /// The host's name or address alone, that a certificate must bear; absent for plain http.
    pub tls_name: Option<String>,
    /// The `Host` header: the URL's authority as written.
    pub authority: String,
    pub path: String,
}

impl Target {
    /// Reads a base URL: `http[s]://HOST[:PORT][/PREFIX][/v1]`.
    pub fn parse(url: &str, endpoint: Endpoint) -> Result<Target, LoadError> {
        let bad = |why: &str| LoadError::Plan(format!("url {url:?}: {why}"));
        let uri: hyper::Uri = url
            .parse()
            .map_err(|error| bad(&format!("not a URL ({error})")))?;
        let is_tls = match uri.scheme_str() {
            Some("http") => false,
            Some("https") => true,
            _ => return Err(bad("must begin with http:// or https://")),
        };
        let authority = uri.authority().ok_or_else(|| bad("names no host"))?;
        if authority.host().is_empty() {
            return Err(bad("names no host"));
        }
        let socket = format!(
            "{}:{}",
            authority.host(),
            authority
                .port_u16()
                .unwrap_or(if is_tls { 443 } else { 80 })
        );
        let name = authority.host().trim_matches(['[', ']']);
        let prefix = uri.path().trim_end_matches('/');
        let prefix = prefix.strip_suffix("/v1").unwrap_or(prefix);
        let tail = match endpoint {
            Endpoint::Chat => "chat/completions",
            Endpoint::Completions => "completions",
        };
        Ok(Target {
            socket,
            tls_name: is_tls.then(|| name.to_owned()),
            authority: authority.as_str().to_owned(),
            path: format!("{prefix}/v1/{tail}"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(url: &str) -> String {
        Target::parse(url, Endpoint::Chat).expect(url).path
    }

    #[test]
    fn base_urls_with_and_without_version_and_prefix_reach_the_same_route() {
        for url in [
            "http://h:1",
            "http://h:1/",
            "http://h:1/v1",
            "http://h:1/v1/",
        ] {
            assert_eq!(path(url), "/v1/chat/completions");
        }
        assert_eq!(path("http://h/openai/v1"), "/openai/v1/chat/completions");
    }

    #[test]
    fn default_port_and_ipv6_hosts_resolve() {
        let target = |url| Target::parse(url, Endpoint::Completions).expect(url);
        assert_eq!(target("http://example").socket, "example:80");
        assert_eq!(target("http://[::1]:8000").socket, "[::1]:8000");
        assert_eq!(target("http://h:1").path, "/v1/completions");
        assert_eq!(target("http://h").tls_name, None);
        assert_eq!(target("https://h/x").socket, "h:443");
        assert_eq!(target("https://[::1]:1").tls_name.as_deref(), Some("::1"));
    }

    #[test]
    fn other_schemes_and_hostless_urls_are_refused_with_the_reason() {
        for (url, why) in [
            ("ftp://h", "https://"),
            ("h:8000", "http://"),
            ("/v1", "http://"),
            ("", "not a URL"),
        ] {
            let message = Target::parse(url, Endpoint::Chat)
                .expect_err(url)
                .to_string();
            assert!(message.contains(why), "{url}: {message}");
        }
    }
}
