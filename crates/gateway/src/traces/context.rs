//! W3C trace context (<https://www.w3.org/TR/trace-context/>): `traceparent: 00-TRACE-SPAN-FLAGS`.

use axum::http::{HeaderMap, HeaderValue};

pub const TRACEPARENT: &str = "traceparent";
const SAMPLED: u8 = 1;

/// A `traceparent` that came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Parent {
    /// Never 0.
    pub trace: u128,
    /// Never 0.
    pub span: u64,
    pub is_sampled: bool,
}

impl Parent {
    /// That of a request; `None` if it has none, or one that is none by the standard.
    #[must_use]
    pub fn of_headers(headers: &HeaderMap) -> Option<Parent> {
        Parent::parse(headers.get(TRACEPARENT)?.to_str().ok()?)
    }

    fn parse(text: &str) -> Option<Parent> {
        let mut fields = text.split('-');
        let version = hex(fields.next()?, 2)?;
        let (trace, span) = (hex(fields.next()?, 32)?, hex(fields.next()?, 16)?);
        let flags = hex(fields.next()?, 2)?;
        // A later version may say more, behind what it has in common with this one.
        let is_known = version == 0 && fields.next().is_none() || (1..0xff).contains(&version);
        let parent = Parent {
            trace,
            span: u64::try_from(span).ok()?,
            is_sampled: u8::try_from(flags).ok()? & SAMPLED != 0,
        };
        (is_known && trace != 0 && span != 0).then_some(parent)
    }
}

/// Lower-case hexadecimal digits, `digits` of them.
fn hex(text: &str, digits: usize) -> Option<u128> {
    let is_hex = |b: u8| matches!(b, b'0'..=b'9' | b'a'..=b'f');
    (text.len() == digits && text.bytes().all(is_hex))
        .then(|| u128::from_str_radix(text, 16).ok())
        .flatten()
}

/// Of a request that is traced: the span that covers all of its life here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TraceContext {
    pub trace: u128,
    pub span: u64,
    /// The client's span.
    pub parent: Option<u64>,
}

impl TraceContext {
    /// A request is traced if its client traces it, and, of those whose client says nothing, the share `ratio`. One
    /// without a trace begins one, that has the request's id if that has the form.
    #[must_use]
    pub fn begin(parent: Option<Parent>, request_id: &str, ratio: f64) -> Option<TraceContext> {
        let context = match parent {
            Some(parent) => TraceContext {
                trace: parent.trace,
                span: new_span(),
                parent: Some(parent.span),
            },
            None => TraceContext {
                trace: hex(request_id, 32)
                    .filter(|id| *id != 0)
                    .unwrap_or_else(|| rand::random::<u128>().max(1)),
                span: new_span(),
                parent: None,
            },
        };
        let is_chosen = match parent {
            Some(parent) => parent.is_sampled,
            // By the trace's own random half, so that all who see it choose alike.
            None => ((context.trace as u64) as f64) < ratio * 2_f64.powi(64),
        };
        is_chosen.then_some(context)
    }

    /// What those are sent who work for this request.
    #[must_use]
    pub fn traceparent(&self) -> String {
        format!("00-{:032x}-{:016x}-{SAMPLED:02x}", self.trace, self.span)
    }

    #[must_use]
    pub fn header(&self) -> Option<HeaderValue> {
        HeaderValue::try_from(self.traceparent()).ok()
    }
}

/// 0 is no span.
#[must_use]
pub fn new_span() -> u64 {
    rand::random::<u64>().max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";

    #[test]
    fn a_parent_is_read_by_the_standard() {
        let good = format!("00-{TRACE}-b7ad6b7169203331-01");
        let parent = Parent::parse(&good).unwrap();
        assert_eq!(format!("{:032x}", parent.trace), TRACE);
        assert_eq!(
            (parent.span, parent.is_sampled),
            (0xb7ad_6b71_6920_3331, true)
        );
        let unsampled = Parent::parse(&good.replace("-01", "-00")).unwrap();
        assert!(!unsampled.is_sampled);
        assert!(Parent::parse(&format!("cc-{TRACE}-b7ad6b7169203331-03-more")).is_some());
        for bad in [
            format!("ff-{TRACE}-b7ad6b7169203331-01"),
            format!("00-{TRACE}-b7ad6b7169203331-01-more"),
            format!("00-{TRACE}-b7ad6b7169203331"),
            format!("00-{TRACE}-0000000000000000-01"),
            format!("00-{}-b7ad6b7169203331-01", "0".repeat(32)),
            format!("00-{}-b7ad6b7169203331-01", TRACE.to_uppercase()),
            format!("00-{TRACE}-+7ad6b7169203331-01"),
            String::new(),
        ] {
            assert_eq!(Parent::parse(&bad), None, "{bad}");
        }
    }

    #[test]
    fn a_client_decides_and_otherwise_the_share() {
        let parent = |is_sampled| {
            Some(Parent {
                trace: 7,
                span: 8,
                is_sampled,
            })
        };
        let ours = TraceContext::begin(parent(true), "r", 0.0).unwrap();
        assert_eq!((ours.trace, ours.parent), (7, Some(8)));
        assert_ne!(ours.span, 8);
        assert_eq!(TraceContext::begin(parent(false), "r", 1.0), None);
        let fresh = TraceContext::begin(None, TRACE, 1.0).unwrap();
        assert_eq!(format!("{:032x}", fresh.trace), TRACE);
        assert!(fresh.traceparent().starts_with(&format!("00-{TRACE}-")));
        assert!(Parent::parse(&fresh.traceparent()).unwrap().is_sampled);
        let chosen = (0..2000)
            .filter(|_| TraceContext::begin(None, "r", 0.25).is_some())
            .count();
        assert!((300..700).contains(&chosen), "{chosen} of 2000");
        assert!((0..100).all(|_| TraceContext::begin(None, "r", 0.0).is_none()));
    }
}
