use proptest::prelude::*;
use scalellm_load_generator::sse::{EventTooLong, SseParser};

/// A plain reading of the standard, over the whole text at once.
fn reference(bytes: &[u8]) -> Vec<Vec<u8>> {
    let mut text = String::from_utf8(bytes.to_vec()).expect("UTF-8");
    if text.starts_with('\u{feff}') {
        text.remove(0);
    }
    let text = text.replace("\r\n", "\n").replace('\r', "\n");
    let (mut events, mut data) = (Vec::new(), Vec::new());
    let mut lines: Vec<&str> = text.split('\n').collect();
    lines.pop();
    for line in lines {
        let (field, value) = line.split_once(':').unwrap_or((line, ""));
        if line.is_empty() && !data.is_empty() {
            events.push(std::mem::take(&mut data).join("\n").into_bytes());
        } else if field == "data" {
            data.push(value.strip_prefix(' ').unwrap_or(value).to_owned());
        }
    }
    events
}

fn parse<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> Vec<Vec<u8>> {
    let mut parser = SseParser::new(1 << 20);
    let mut events = Vec::new();
    for piece in pieces {
        let outcome = parser.push(piece, |data| -> Result<(), EventTooLong> {
            events.push(data.to_vec());
            Ok(())
        });
        outcome.expect("short events");
    }
    events
}

fn line() -> impl Strategy<Value = String> {
    prop_oneof![
        4 => "data: ?[a-zé:\u{1f600} ]{0,6}",
        1 => Just("data".to_owned()),
        1 => ":[a-z ]{0,4}",
        1 => "(event|id|retry|foo|dat): ?[a-z]{0,3}",
        3 => Just(String::new()),
    ]
}

fn stream() -> impl Strategy<Value = Vec<u8>> {
    let end = prop_oneof![Just("\n"), Just("\r\n"), Just("\r")];
    let lines = prop::collection::vec((line(), end), 0..12);
    (any::<bool>(), lines, "[a-z]{0,3}").prop_map(|(mark, lines, rest)| {
        let mut text = String::from(if mark { "\u{feff}" } else { "" });
        lines
            .iter()
            .for_each(|(line, end)| text.extend([line.as_str(), *end]));
        (text + &rest).into_bytes()
    })
}

proptest! {
    #[test]
    fn every_split_in_two_reads_like_the_whole(bytes in stream()) {
        let expected = reference(&bytes);
        for at in 0..=bytes.len() {
            prop_assert_eq!(&parse([&bytes[..at], &bytes[at..]]), &expected, "split at {}", at);
        }
    }

    #[test]
    fn pieces_of_any_size_read_like_the_whole(bytes in stream(), size in 1_usize..7) {
        prop_assert_eq!(parse(bytes.chunks(size)), reference(&bytes));
    }

    #[test]
    fn any_bytes_are_taken_and_splits_never_matter(
        bytes in prop::collection::vec(prop_oneof![any::<u8>(), Just(b'\n'), Just(b':')], 0..80),
        size in 1_usize..9,
    ) {
        prop_assert_eq!(parse(bytes.chunks(size)), parse([&bytes[..]]));
    }
}

#[test]
fn an_event_over_the_limit_is_refused_in_one_line_or_many() {
    let push =
        |bytes: &[u8]| SseParser::new(64).push(bytes, |_| -> Result<(), EventTooLong> { Ok(()) });
    let long = format!("data: {}\n\n", "x".repeat(100));
    assert_eq!(push(long.as_bytes()), Err(EventTooLong(64)));
    assert_eq!(
        push(&long.as_bytes()[..90]),
        Err(EventTooLong(64)),
        "also without its end"
    );
    assert_eq!(
        push("data: 0123456789\n".repeat(10).as_bytes()),
        Err(EventTooLong(64))
    );
    assert_eq!(
        push("data: 0123456789\n\n".repeat(10).as_bytes()),
        Ok(()),
        "many short ones are fine"
    );
}
