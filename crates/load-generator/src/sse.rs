//! Server-sent events, parsed as the WHATWG HTML standard says (section 9.2.6), from any split of
//! the bytes: lines end with LF, CRLF or CR; `:` begins a comment; several `data` lines of one
//! event are joined with LF; a blank line ends the event; an event the stream ends inside is lost.

/// Feed it bytes; it calls back with each event's data. Memory is bounded by the event limit.
#[derive(Debug)]
pub struct SseParser {
    /// An unfinished line from earlier bytes.
    line: Vec<u8>,
    data: Vec<u8>,
    has_data: bool,
    /// The last byte ended a line as CR: an LF that follows belongs to it.
    after_cr: bool,
    at_start: bool,
    max_event_bytes: usize,
    unknown_lines: u64,
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("an event grew over {0} bytes")]
pub struct EventTooLong(pub usize);

const BYTE_ORDER_MARK: &[u8] = "\u{feff}".as_bytes();

impl SseParser {
    pub fn new(max_event_bytes: usize) -> SseParser {
        SseParser {
            line: Vec::new(),
            data: Vec::new(),
            has_data: false,
            after_cr: false,
            at_start: true,
            max_event_bytes,
            unknown_lines: 0,
        }
    }

    /// Lines that are no field of the standard: a sign that the stream is something else.
    pub fn unknown_lines(&self) -> u64 {
        self.unknown_lines
    }

    /// Whether bytes of an unfinished event or line are held.
    pub fn is_inside_event(&self) -> bool {
        self.has_data || !self.line.is_empty()
    }

    /// Takes the next bytes; `on_data` gets the data of every event they complete.
    pub fn push<E: From<EventTooLong>>(
        &mut self,
        mut bytes: &[u8],
        mut on_data: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        while let Some(&first) = bytes.first() {
            if std::mem::take(&mut self.after_cr) && first == b'\n' {
                bytes = &bytes[1..];
                continue;
            }
            let Some(end) = bytes
                .iter()
                .position(|&byte| byte == b'\n' || byte == b'\r')
            else {
                self.keep(bytes)?;
                return Ok(());
            };
            self.after_cr = bytes[end] == b'\r';
            if self.line.is_empty() {
                self.end_line(&bytes[..end], &mut on_data)?;
            } else {
                self.keep(&bytes[..end])?;
                let mut line = std::mem::take(&mut self.line);
                self.end_line(&line, &mut on_data)?;
                line.clear();
                self.line = line;
            }
            bytes = &bytes[end + 1..];
        }
        Ok(())
    }

    fn keep(&mut self, part: &[u8]) -> Result<(), EventTooLong> {
        if self.line.len() + self.data.len() + part.len() > self.max_event_bytes {
            return Err(EventTooLong(self.max_event_bytes));
        }
        self.line.extend_from_slice(part);
        Ok(())
    }

    fn end_line<E: From<EventTooLong>>(
        &mut self,
        line: &[u8],
        on_data: &mut impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let line = match std::mem::take(&mut self.at_start) {
            true => line.strip_prefix(BYTE_ORDER_MARK).unwrap_or(line),
            false => line,
        };
        if line.is_empty() {
            if std::mem::take(&mut self.has_data) {
                let outcome = on_data(&self.data);
                self.data.clear();
                return outcome;
            }
            return Ok(());
        }
        let colon = line
            .iter()
            .position(|&byte| byte == b':')
            .unwrap_or(line.len());
        let value = line.get(colon + 1..).unwrap_or_default();
        let value = value.strip_prefix(b" ").unwrap_or(value);
        match &line[..colon] {
            b"data" => {
                if self.data.len() + value.len() + 1 > self.max_event_bytes {
                    return Err(EventTooLong(self.max_event_bytes).into());
                }
                if std::mem::replace(&mut self.has_data, true) {
                    self.data.push(b'\n');
                }
                self.data.extend_from_slice(value);
            }
            b"" | b"event" | b"id" | b"retry" => {}
            _ => self.unknown_lines += 1,
        }
        Ok(())
    }
}
