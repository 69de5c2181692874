//! Stop strings in a text that comes in pieces.

/// Finds the first completed stop string and holds back no more than what may become one.
///
/// One Knuth-Morris-Pratt automaton for each string: its state is the length of the longest suffix of the text
/// that begins the string, so each byte costs O(strings) amortised, however the text is split.
///
/// ```text
/// stops "END", "\n\n"     text  ...so it E N | D
/// states (2, 0)                  released ^    held "EN", then a match
/// ```
pub struct StopMatcher {
    stops: Vec<Automaton>,
    /// The longest suffix of the text that begins a stop string.
    held: String,
    include_stop: bool,
    /// Completed strings count; else they are let through.
    armed: bool,
    /// Bytes that begin a stop string.
    first: ByteSet,
}

/// A bit for each byte.
#[derive(Default)]
struct ByteSet([u64; 4]);

impl ByteSet {
    fn insert(&mut self, byte: u8) {
        self.0[usize::from(byte >> 6)] |= 1 << (byte & 63);
    }

    fn has(&self, byte: u8) -> bool {
        self.0[usize::from(byte >> 6)] >> (byte & 63) & 1 == 1
    }
}

struct Automaton {
    stop: String,
    /// Length of the longest proper border of the first i + 1 bytes.
    borders: Vec<usize>,
    matched: usize,
}

impl StopMatcher {
    /// Empty strings are ignored. `include_stop` lets the stop string itself out.
    pub fn new(stops: Vec<String>, include_stop: bool) -> Self {
        let stops: Vec<_> = stops
            .into_iter()
            .filter(|stop| !stop.is_empty())
            .map(Automaton::new)
            .collect();
        let mut first = ByteSet::default();
        for automaton in &stops {
            first.insert(automaton.stop.as_bytes()[0]);
        }
        Self {
            stops,
            held: String::new(),
            include_stop,
            armed: true,
            first,
        }
    }

    /// Whether stop strings that are completed from now on end the text.
    pub fn arm(&mut self, armed: bool) {
        self.armed = armed;
    }

    /// Bytes held back.
    pub fn held_bytes(&self) -> usize {
        self.held.len()
    }

    /// Take the next `text`; what cannot be part of a stop string any more is appended to `out`.
    ///
    /// Returns the stop string that `text` completes: the first to be complete, and of several that end at the
    /// same place the longest. Everything up to it (with it, if included) is out then, and nothing is held.
    pub fn push(&mut self, text: &str, out: &mut String) -> Option<String> {
        if self.stops.is_empty() {
            out.push_str(text);
            return None;
        }
        if self.held.is_empty() && !text.bytes().any(|b| self.first.has(b)) {
            out.push_str(text);
            return None;
        }
        for (index, byte) in text.bytes().enumerate() {
            let mut found: Option<&str> = None;
            for automaton in &mut self.stops {
                let complete = automaton.step(byte) && self.armed;
                if complete && found.is_none_or(|best| automaton.stop.len() > best.len()) {
                    found = Some(&automaton.stop);
                }
            }
            let Some(stop) = found.map(str::to_owned) else {
                continue;
            };
            self.held.push_str(&text[..=index]);
            let kept = if self.include_stop {
                self.held.len()
            } else {
                self.held.len() - stop.len()
            };
            out.push_str(&self.held[..kept]);
            self.held.clear();
            self.stops
                .iter_mut()
                .for_each(|automaton| automaton.matched = 0);
            return Some(stop);
        }
        self.held.push_str(text);
        let keep = self
            .stops
            .iter()
            .map(|automaton| automaton.matched)
            .max()
            .unwrap_or(0);
        out.extend(self.held.drain(..self.held.len() - keep));
        None
    }

    /// The end of the text: what was held back goes to `out`.
    pub fn finish(&mut self, out: &mut String) {
        out.push_str(&self.held);
        self.held.clear();
        self.stops
            .iter_mut()
            .for_each(|automaton| automaton.matched = 0);
    }
}

impl Automaton {
    fn new(stop: String) -> Self {
        let bytes = stop.as_bytes();
        let mut borders = vec![0; bytes.len()];
        let mut border = 0;
        for i in 1..bytes.len() {
            while border > 0 && bytes[i] != bytes[border] {
                border = borders[border - 1];
            }
            if bytes[i] == bytes[border] {
                border += 1;
            }
            borders[i] = border;
        }
        Self {
            stop,
            borders,
            matched: 0,
        }
    }

    /// Whether `byte` completes the string. `matched` stays below the string's length.
    fn step(&mut self, byte: u8) -> bool {
        let bytes = self.stop.as_bytes();
        while self.matched > 0 && bytes[self.matched] != byte {
            self.matched = self.borders[self.matched - 1];
        }
        if bytes[self.matched] == byte {
            self.matched += 1;
        }
        let complete = self.matched == bytes.len();
        if complete {
            self.matched = self.borders[self.matched - 1];
        }
        complete
    }
}
