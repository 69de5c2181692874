//! Bytes in token strings, and bytes to text.

/// The byte of a `<0xNN>` token.
pub(super) fn fallback_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() == 2 {
        u8::from_str_radix(digits, 16).ok()
    } else {
        None
    }
}

/// The bytes of a byte-level token: a character for each byte, printable ones standing for themselves
/// (GPT-2's table); a token with any other character stands for its own UTF-8.
pub(super) fn byte_level(token: &str) -> Vec<u8> {
    let bytes: Option<Vec<u8>> = token.chars().map(byte_of).collect();
    bytes.unwrap_or_else(|| token.as_bytes().to_vec())
}

fn byte_of(c: char) -> Option<u8> {
    let code = u32::from(c);
    match code {
        0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => u8::try_from(code).ok(),
        // The other 68 bytes follow in order from 256.
        0x100..=0x120 => u8::try_from(code - 0x100).ok(),
        0x121..=0x142 => u8::try_from(code - 0x121 + 0x7f).ok(),
        0x143 => Some(0xad),
        _ => None,
    }
}

/// The character that stands for a byte in a byte-level token.
pub(super) fn byte_level_char(byte: u8) -> char {
    let code = u32::from(byte);
    let code = match code {
        0x00..=0x20 => code + 0x100,
        0x7f..=0xa0 => code - 0x7f + 0x121,
        0xad => 0x143,
        _ => code,
    };
    // None of them is a surrogate.
    char::from_u32(code).unwrap_or_default()
}

/// Bytes to text as `String::from_utf8_lossy` would, in pieces.
#[derive(Clone, Default)]
pub(super) struct Utf8 {
    /// The beginning of a character, at most 3 bytes.
    held: Vec<u8>,
}

impl Utf8 {
    /// Whether no character is unfinished.
    pub(super) fn is_empty(&self) -> bool {
        self.held.is_empty()
    }

    pub(super) fn push(&mut self, bytes: &[u8], mut next: impl FnMut(&str)) {
        let joined;
        let mut rest = if self.held.is_empty() {
            bytes
        } else {
            self.held.extend_from_slice(bytes);
            joined = std::mem::take(&mut self.held);
            joined.as_slice()
        };
        loop {
            match std::str::from_utf8(rest) {
                Ok(text) => return next(text),
                Err(error) => {
                    let (valid, after) = rest.split_at(error.valid_up_to());
                    if let Ok(text) = std::str::from_utf8(valid) {
                        next(text);
                    }
                    let Some(bad) = error.error_len() else {
                        self.held.extend_from_slice(after);
                        return;
                    };
                    next("\u{fffd}");
                    rest = &after[bad..];
                }
            }
        }
    }

    pub(super) fn finish(&mut self, mut next: impl FnMut(&str)) {
        if !self.is_empty() {
            next("\u{fffd}");
            self.held.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_has_its_own_character() {
        for byte in 0..=u8::MAX {
            assert_eq!(byte_of(byte_level_char(byte)), Some(byte));
        }
    }
}
