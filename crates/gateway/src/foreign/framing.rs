//! Where an HTTP/1.1 answer's body ends, and what of its bytes is data (RFC 9112, sections 6 and 7).
//!
//! ```text
//!  5;a=b\r\nhello\r\n0\r\nx: y\r\n\r\n
//!  Size Skip  Data  DataEnd  Size   Trailer            End
//! ```

use bytes::{BufMut, BytesMut};

/// Of a chunk's size with its extensions, and of all trailers.
const MAX_LINE_BYTES: usize = 16 << 10;
const MAX_SIZE_DIGITS: usize = 15;

/// What of a body is still to come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Framing {
    Length(u64),
    Chunked(Chunk),
    UntilClose,
    End,
}

/// The part of a chunked body that comes next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Chunk {
    Size {
        value: u64,
        digits: usize,
    },
    /// What follows a size, to the end of its line.
    Skip {
        value: u64,
        bytes: usize,
    },
    Data(u64),
    /// The line's end after data, of which so many bytes have come.
    DataEnd(usize),
    /// A trailer's line, of which so many bytes have come, and so many of all.
    Trailer {
        line: usize,
        bytes: usize,
    },
}

/// What came is no chunked body.
#[derive(Debug, PartialEq, Eq)]
pub struct BadChunk;

impl Framing {
    pub const CHUNKED: Framing = Framing::Chunked(Chunk::Size {
        value: 0,
        digits: 0,
    });

    #[must_use]
    pub fn of_length(bytes: u64) -> Framing {
        match bytes {
            0 => Framing::End,
            _ => Framing::Length(bytes),
        }
    }

    /// Takes the body's next bytes and adds what of them is data to `out`; returns how many bytes belong to the body.
    ///
    /// # Errors
    /// A chunk that is none.
    pub fn take(&mut self, bytes: &[u8], out: &mut BytesMut) -> Result<usize, BadChunk> {
        let mut rest = bytes;
        while !rest.is_empty() {
            match self {
                Framing::End => break,
                Framing::UntilClose => {
                    out.put_slice(rest);
                    rest = &[];
                }
                Framing::Length(left) => {
                    let (data, behind) = split(rest, *left);
                    out.put_slice(data);
                    *self = Framing::of_length(*left - data.len() as u64);
                    rest = behind;
                }
                Framing::Chunked(Chunk::Data(left)) => {
                    let (data, behind) = split(rest, *left);
                    out.put_slice(data);
                    let left = *left - data.len() as u64;
                    *self = Framing::Chunked(match left {
                        0 => Chunk::DataEnd(0),
                        _ => Chunk::Data(left),
                    });
                    rest = behind;
                }
                Framing::Chunked(chunk) => {
                    *self = chunk.next(rest[0])?;
                    rest = &rest[1..];
                }
            }
        }
        Ok(bytes.len() - rest.len())
    }
}

impl Chunk {
    /// After one more byte, which is no data.
    fn next(self, byte: u8) -> Result<Framing, BadChunk> {
        let next = match (self, byte) {
            (Chunk::Size { value, digits }, _) if byte.is_ascii_hexdigit() => {
                let digit = char::from(byte).to_digit(16).ok_or(BadChunk)?;
                if digits == MAX_SIZE_DIGITS {
                    return Err(BadChunk);
                }
                Chunk::Size {
                    value: (value << 4) | u64::from(digit),
                    digits: digits + 1,
                }
            }
            (Chunk::Size { value, digits }, b';' | b' ' | b'\t' | b'\r') if digits > 0 => {
                Chunk::Skip {
                    value,
                    bytes: usize::from(byte != b'\r'),
                }
            }
            (Chunk::Skip { value: 0, .. }, b'\n') => Chunk::Trailer { line: 0, bytes: 0 },
            (Chunk::Skip { value, .. }, b'\n') => Chunk::Data(value),
            (Chunk::Skip { value, bytes }, _) if bytes < MAX_LINE_BYTES => Chunk::Skip {
                value,
                bytes: bytes + 1,
            },
            (Chunk::DataEnd(0), b'\r') => Chunk::DataEnd(1),
            (Chunk::DataEnd(1), b'\n') => Chunk::Size {
                value: 0,
                digits: 0,
            },
            (Chunk::Trailer { line: 0, bytes }, b'\r') => Chunk::Trailer { line: 0, bytes },
            (Chunk::Trailer { line: 0, .. }, b'\n') => return Ok(Framing::End),
            (Chunk::Trailer { bytes, .. }, b'\n') => Chunk::Trailer { line: 0, bytes },
            (Chunk::Trailer { line, bytes }, _) if bytes < MAX_LINE_BYTES => Chunk::Trailer {
                line: line + 1,
                bytes: bytes + 1,
            },
            _ => return Err(BadChunk),
        };
        Ok(Framing::Chunked(next))
    }
}

fn split(bytes: &[u8], at: u64) -> (&[u8], &[u8]) {
    bytes.split_at(usize::try_from(at).unwrap_or(usize::MAX).min(bytes.len()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The data, and what is left of `bytes` behind the body, which comes in parts of `part` bytes.
    fn read(
        mut framing: Framing,
        bytes: &[u8],
        part: usize,
    ) -> Result<(String, String, Framing), BadChunk> {
        let (mut out, mut taken) = (BytesMut::new(), 0);
        for part in bytes.chunks(part) {
            let took = framing.take(part, &mut out)?;
            taken += took;
            if took < part.len() {
                break;
            }
        }
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
        Ok((text(&out), text(&bytes[taken..]), framing))
    }

    #[test]
    fn a_body_ends_where_its_head_says() {
        let end = |framing| read(framing, b"hello", 2).unwrap();
        let text = |text: &str| text.to_owned();
        assert_eq!(
            end(Framing::of_length(3)),
            (text("hel"), text("lo"), Framing::End)
        );
        assert_eq!(
            end(Framing::of_length(9)),
            (text("hello"), text(""), Framing::Length(4))
        );
        assert_eq!(
            end(Framing::of_length(0)),
            (text(""), text("hello"), Framing::End)
        );
        assert_eq!(
            end(Framing::UntilClose),
            (text("hello"), text(""), Framing::UntilClose)
        );
    }

    #[test]
    fn chunks_may_have_extensions_and_trailers() {
        let body = b"5;a=b\r\nhello\r\n00A \r\n, world!\r\n\r\n0\r\nx: y\r\nz: 1\r\n\r\nmore";
        for part in 1..body.len() {
            let (data, behind, framing) = read(Framing::CHUNKED, body, part).unwrap();
            assert_eq!(data, "hello, world!\r\n");
            assert_eq!((behind.as_str(), framing), ("more", Framing::End));
        }
    }

    #[test]
    fn what_is_no_chunk_is_refused() {
        let long = format!("5;{}\r\n", "x".repeat(MAX_LINE_BYTES));
        let trailers = format!("0\r\n{}", "a: b\r\n".repeat(MAX_LINE_BYTES / 4));
        for bad in [
            "\r\n",
            "x\r\n",
            "-1\r\n",
            " 5\r\n",
            "5\n",
            "5\r\nhello0\r\n",
            "5\r\nhello\n",
            "1000000000000000\r\n",
            &long,
            &trailers,
        ] {
            let read = read(Framing::CHUNKED, bad.as_bytes(), 7);
            assert_eq!(read, Err(BadChunk), "{bad:.20}");
        }
    }

    proptest! {
        #[test]
        fn data_comes_out_however_it_is_cut(
            parts in prop::collection::vec("\\PC{1,40}", 0..8),
            part in 1..64_usize,
        ) {
            let mut body: String = parts
                .iter()
                .map(|data| format!("{:X}\r\n{data}\r\n", data.len()))
                .collect();
            body.push_str("0\r\n\r\n");
            let (data, behind, framing) = read(Framing::CHUNKED, body.as_bytes(), part).unwrap();
            prop_assert_eq!((data, behind), (parts.concat(), String::new()));
            prop_assert_eq!(framing, Framing::End);
        }
    }
}
