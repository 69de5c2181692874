//! Where a request's time goes, on one clock.

use std::num::NonZeroU64;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Monotonic time that also tells Unix time: both are read once, at the start of the process.
#[derive(Debug, Clone, Copy)]
pub struct Clock {
    start: Instant,
    start_unix_us: u64,
}

impl Clock {
    #[must_use]
    pub fn start() -> Clock {
        let unix = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        Clock {
            start: Instant::now(),
            start_unix_us: micros(unix),
        }
    }

    /// Unix microseconds of a moment of this process.
    #[must_use]
    pub fn unix_us(&self, at: Instant) -> u64 {
        self.start_unix_us + micros(at.saturating_duration_since(self.start))
    }

    /// Milliseconds since the start of the process.
    #[must_use]
    pub fn now_ms(&self) -> f64 {
        self.start.elapsed().as_secs_f64() * 1e3
    }
}

#[must_use]
pub fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

/// A part of a request's life. Those of the engine are measured there. No time is in two of them, apart from `First`
/// and `Total`, which are sums, and `Write`, which passes beside what comes after it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// First byte of the head read until the request is ours.
    Accept,
    Auth,
    Body,
    Parse,
    Admission,
    /// The model's checks of the request.
    Safety,
    /// Waiting for one of the threads for text, and for its answer.
    TextQueue,
    Template,
    Tokenise,
    Route,
    /// Sent to a foreign engine until its first event, or its whole answer.
    Upstream,
    /// Submitted until received by the engine's listener; a failed first attempt is in here.
    LinkOut,
    /// Engine: received until first scheduled.
    Queue,
    /// Engine: first scheduled until first token.
    Prefill,
    /// Engine: first token until it is handed to the listener.
    Emit,
    /// Handed to the listener until the request's task has it.
    LinkBack,
    /// The whole wait for the first token, from the request's first byte.
    First,
    /// First token until the last, less what the gateway did meanwhile (`Detokenise`, `Serialise`).
    Decode,
    Detokenise,
    Serialise,
    /// Frames handed to the connection until the socket took them; the last one's is not known.
    Write,
    Total,
}

impl Stage {
    /// In the order in which a request passes them.
    pub const ALL: [Stage; 22] = [
        Stage::Accept,
        Stage::Auth,
        Stage::Body,
        Stage::Parse,
        Stage::Admission,
        Stage::Safety,
        Stage::TextQueue,
        Stage::Template,
        Stage::Tokenise,
        Stage::Route,
        Stage::Upstream,
        Stage::LinkOut,
        Stage::Queue,
        Stage::Prefill,
        Stage::Emit,
        Stage::LinkBack,
        Stage::First,
        Stage::Decode,
        Stage::Detokenise,
        Stage::Serialise,
        Stage::Write,
        Stage::Total,
    ];

    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Stage::Accept => "accept",
            Stage::Auth => "auth",
            Stage::Body => "body",
            Stage::Parse => "parse",
            Stage::Admission => "admission",
            Stage::Safety => "safety",
            Stage::TextQueue => "text_queue",
            Stage::Template => "template",
            Stage::Tokenise => "tokenise",
            Stage::Route => "route",
            Stage::Upstream => "upstream",
            Stage::LinkOut => "link_out",
            Stage::Queue => "queue",
            Stage::Prefill => "prefill",
            Stage::Emit => "emit",
            Stage::LinkBack => "link_back",
            Stage::First => "first",
            Stage::Decode => "decode",
            Stage::Detokenise => "detokenise",
            Stage::Serialise => "serialise",
            Stage::Write => "write",
            Stage::Total => "total",
        }
    }

    /// Whether it passes in the engine, and is measured there.
    #[must_use]
    pub const fn is_engines(self) -> bool {
        matches!(self, Stage::Queue | Stage::Prefill | Stage::Emit)
    }
}

/// Times of the stages a request has passed.
#[derive(Debug, Clone, Copy, Default)]
pub struct StageTimes {
    /// Microseconds and one more, which leaves 0 for what was not passed.
    took: [Option<NonZeroU64>; Stage::ALL.len()],
}

impl StageTimes {
    /// Sets a stage's time; a second time for the same stage is added.
    pub fn add(&mut self, stage: Stage, took: Duration) {
        self.put(stage, self.get_us(stage).unwrap_or(0) + micros(took));
    }

    pub fn set(&mut self, stage: Stage, took: Duration) {
        self.put(stage, micros(took));
    }

    fn put(&mut self, stage: Stage, us: u64) {
        self.took[stage as usize] = Some(NonZeroU64::MIN.saturating_add(us));
    }

    #[must_use]
    pub fn get_us(&self, stage: Stage) -> Option<u64> {
        self.took[stage as usize].map(|took| took.get() - 1)
    }

    /// What the gateway itself has worked on the output.
    #[must_use]
    pub fn own_output_work(&self) -> Duration {
        [Stage::Detokenise, Stage::Serialise]
            .into_iter()
            .filter_map(|stage| self.get_us(stage))
            .map(Duration::from_micros)
            .sum()
    }

    pub fn passed(&self) -> impl Iterator<Item = (Stage, u64)> + '_ {
        Stage::ALL
            .into_iter()
            .filter_map(|stage| Some((stage, self.get_us(stage)?)))
    }

    /// The value of a `Server-Timing` header: `parse;dur=0.031, ...`, in milliseconds.
    #[must_use]
    pub fn server_timing(&self) -> String {
        let mut text = String::with_capacity(512);
        for (stage, us) in self.passed() {
            if !text.is_empty() {
                text.push_str(", ");
            }
            text.push_str(stage.name());
            text.push_str(";dur=");
            push_milliseconds(&mut text, us);
        }
        text
    }

    /// The same as JSON: `{"parse": 0.031, ...}`, in milliseconds.
    #[must_use]
    pub fn to_json(self) -> serde_json::Value {
        self.passed()
            .map(|(stage, us)| {
                (
                    stage.name().to_owned(),
                    serde_json::Value::from(us as f64 / 1e3),
                )
            })
            .collect()
    }
}

/// Adds microseconds as milliseconds, `0.031`. Each answer has a dozen of these, which `write!` takes 2 us for.
fn push_milliseconds(text: &mut String, us: u64) {
    // The most digits that a u64 has, and the point.
    let mut digits = [b'0'; 21];
    let (mut at, mut left) = (digits.len(), us);
    loop {
        if at == digits.len() - 3 {
            at -= 1;
            digits[at] = b'.';
        }
        at -= 1;
        digits[at] = b'0' + (left % 10) as u8;
        left /= 10;
        if left == 0 && at < digits.len() - 4 {
            break;
        }
    }
    text.extend(digits[at..].iter().map(|digit| char::from(*digit)));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_three_places_behind_the_point() {
        for (us, told) in [
            (0, "0.000"),
            (7, "0.007"),
            (1_000, "1.000"),
            (12_345_678, "12345.678"),
            (u64::MAX, "18446744073709551.615"),
        ] {
            let mut text = String::new();
            push_milliseconds(&mut text, us);
            assert_eq!(text, told);
        }
    }

    #[test]
    fn server_timing_lists_what_was_passed_in_order() {
        let mut times = StageTimes::default();
        times.add(Stage::Route, Duration::from_micros(40));
        times.add(Stage::Parse, Duration::from_micros(1500));
        times.add(Stage::Route, Duration::from_micros(2));
        assert_eq!(times.server_timing(), "parse;dur=1.500, route;dur=0.042");
        assert_eq!(
            times.to_json().to_string(),
            r#"{"parse":1.5,"route":0.042}"#
        );
    }

    #[test]
    fn every_stage_has_its_own_slot() {
        for (slot, stage) in Stage::ALL.into_iter().enumerate() {
            assert_eq!(stage as usize, slot);
        }
    }

    #[test]
    fn the_clock_tells_unix_time() {
        let clock = Clock::start();
        let now = micros(SystemTime::now().duration_since(UNIX_EPOCH).unwrap());
        assert!(clock.unix_us(Instant::now()).abs_diff(now) < 1_000_000);
    }
}
