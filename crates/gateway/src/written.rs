//! When a response's frames reach the socket, seen from its body.
//!
//! ```text
//!  body gives a frame ---> hyper buffers, asks for more ---> nothing yet: flush ---> socket takes it
//!       handed                                                                       connection.last_write()
//! ```
//!
//! The next poll of the body tells; so of the last frame nothing is known.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::connection::ConnectionState;
use crate::http2::Taking;

/// A stream's first frame on its way out.
#[derive(Debug, Clone, Copy)]
pub struct FirstFrame {
    pub handed: Instant,
    pub written: Option<Instant>,
}

#[derive(Debug, Default)]
pub struct Written {
    connection: Option<Arc<ConnectionState>>,
    stream: Option<Arc<Taking>>,
    /// The earliest frame that the socket has not been seen to take.
    handed: Option<Instant>,
    pub first: Option<FirstFrame>,
    /// Of all frames whose end was seen.
    pub took: Duration,
}

impl Written {
    #[must_use]
    pub fn new(connection: Option<Arc<ConnectionState>>) -> Written {
        Written {
            connection,
            stream: Taking::here(),
            ..Written::default()
        }
    }

    /// The body is asked for more: looks whether what it gave before is out.
    pub fn look(&mut self) {
        if let Some(stream) = &self.stream {
            stream.asked();
        }
        let (Some(handed), Some(connection)) = (self.handed, &self.connection) else {
            return;
        };
        let wrote = connection.last_write();
        if wrote < handed {
            return;
        }
        self.took += wrote - handed;
        self.handed = None;
        if let Some(first) = &mut self.first {
            first.written.get_or_insert(wrote);
        }
    }

    /// The body has given a frame.
    pub fn gave(&mut self) {
        if let Some(stream) = &self.stream {
            stream.gave();
        }
        let now = *self.handed.get_or_insert_with(Instant::now);
        self.first.get_or_insert(FirstFrame {
            handed: now,
            written: None,
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_is_written_once_the_socket_took_bytes_after_it() {
        let connection = ConnectionState::new(true);
        let mut written = Written::new(Some(Arc::clone(&connection)));
        written.gave();
        written.look();
        assert!(written.first.unwrap().written.is_none());
        std::thread::sleep(Duration::from_millis(2));
        connection.wrote();
        written.look();
        let first = written.first.unwrap();
        assert_eq!(first.written.unwrap() - first.handed, written.took);
        assert!(written.took >= Duration::from_millis(1));
        let took = written.took;
        written.look();
        assert_eq!(written.took, took);
    }
}
