//! The ranks of other hosts: a TCP connection to each, over which letters and parts go in turn.
//!
//! ```text
//! rank 0   letter | my part to all, theirs into their slots | ...     one round after the other, so
//! rank 1   letter | my part to all, theirs into their slots | ...     nothing says what it is
//! ```
//!
//! A rank with links has the slots to itself. Parts go out and come in at once: a connection's
//! buffers may hold less than a part.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use super::RankLost;

/// How long a rank asks again and again before it sleeps: a round between hosts takes some tens of
/// microseconds.
const SPIN: Duration = Duration::from_micros(100);
/// After this a sleeper looks around.
const NAP_MS: i32 = 100;

/// One rank's connections.
pub struct Links {
    /// By rank; none to itself.
    streams: Vec<Option<TcpStream>>,
}

/// Bytes on their way to and from one rank.
struct Transfer<'a> {
    stream: &'a TcpStream,
    out: &'a [u8],
    into: &'a mut [u8],
}

impl Transfer<'_> {
    /// Move what can be moved at once; whether there was anything.
    fn go_on(&mut self) -> Result<bool, RankLost> {
        let mut moved = false;
        if !self.out.is_empty() {
            let sent = done((&mut &*self.stream).write(self.out))?;
            self.out = &self.out[sent..];
            moved |= sent > 0;
        }
        if !self.into.is_empty() {
            let got = done((&mut &*self.stream).read(self.into))?;
            self.into = &mut std::mem::take(&mut self.into)[got..];
            moved |= got > 0;
        }
        Ok(moved)
    }

    fn is_over(&self) -> bool {
        self.out.is_empty() && self.into.is_empty()
    }
}

/// Bytes that a call has moved; 0 if it would have to wait.
fn done(moved: io::Result<usize>) -> Result<usize, RankLost> {
    match moved {
        Ok(0) => Err(RankLost),
        Ok(count) => Ok(count),
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
            Ok(0)
        }
        Err(_) => Err(RankLost),
    }
}

impl Links {
    /// `streams` by rank, none for this one.
    ///
    /// # Errors
    /// If a connection cannot be set up.
    pub fn new(streams: Vec<Option<TcpStream>>) -> io::Result<Self> {
        for stream in streams.iter().flatten() {
            stream.set_nonblocking(true)?;
            stream.set_nodelay(true)?;
        }
        Ok(Self { streams })
    }

    /// Whoever waits for this rank, or in this one for another, is told that it has ended.
    pub fn shut(&self) {
        for stream in self.streams.iter().flatten() {
            // One that is closed already is what is wanted.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    pub(super) fn send(&self, to: usize, bytes: &[u8]) -> Result<(), RankLost> {
        let stream = self.streams[to].as_ref().ok_or(RankLost)?;
        let into = &mut [];
        finish(&mut [Transfer {
            stream,
            out: bytes,
            into,
        }])
    }

    /// Rank 0's next letter, of so many bytes at most.
    pub(super) fn receive_letter(&self, most_bytes: usize) -> Result<Vec<u8>, RankLost> {
        let mut length = [0; 8];
        self.receive(0, &mut length)?;
        let length = usize::try_from(u64::from_le_bytes(length)).unwrap_or(usize::MAX);
        if length > most_bytes {
            return Err(RankLost);
        }
        let mut letter = vec![0; length];
        self.receive(0, &mut letter)?;
        Ok(letter)
    }

    fn receive(&self, from: usize, into: &mut [u8]) -> Result<(), RankLost> {
        let stream = self.streams[from].as_ref().ok_or(RankLost)?;
        let out = &[];
        finish(&mut [Transfer { stream, out, into }])
    }

    /// Give `mine` to every other rank, and take as many bytes from each into `theirs`, by rank.
    pub(super) fn swap(&self, mine: &[u8], theirs: Vec<&mut [u8]>) -> Result<(), RankLost> {
        let mut transfers: Vec<_> = self
            .streams
            .iter()
            .zip(theirs)
            .filter_map(|(stream, into)| {
                let stream = stream.as_ref()?;
                Some(Transfer {
                    stream,
                    out: mine,
                    into,
                })
            })
            .collect();
        finish(&mut transfers)
    }
}

fn finish(transfers: &mut [Transfer]) -> Result<(), RankLost> {
    let mut idle = Instant::now();
    loop {
        let mut moved = false;
        for transfer in &mut *transfers {
            moved |= transfer.go_on()?;
        }
        if transfers.iter().all(Transfer::is_over) {
            return Ok(());
        }
        if moved {
            idle = Instant::now();
        } else if idle.elapsed() > SPIN {
            sleep(transfers);
        } else {
            std::hint::spin_loop();
        }
    }
}

/// Until one of them can go on, or for a moment.
fn sleep(transfers: &[Transfer]) {
    let waits = transfers.iter().filter(|transfer| !transfer.is_over());
    let mut polled: Vec<_> = waits
        .map(|transfer| libc::pollfd {
            fd: transfer.stream.as_raw_fd(),
            events: if transfer.out.is_empty() {
                0
            } else {
                libc::POLLOUT
            } | if transfer.into.is_empty() {
                0
            } else {
                libc::POLLIN
            },
            revents: 0,
        })
        .collect();
    // SAFETY: that many entries; the caller looks at the connections again whatever comes back.
    unsafe { libc::poll(polled.as_mut_ptr(), polled.len() as libc::nfds_t, NAP_MS) };
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::os::fd::AsFd;
    use std::sync::Arc;
    use std::thread;

    use super::*;
    use crate::ranks::tests::shared;
    use crate::ranks::{Ranks, Region, Sizes};

    /// Connections between all of `count` ranks.
    fn mesh(count: usize) -> Vec<Links> {
        let mut streams: Vec<Vec<Option<TcpStream>>> = (0..count)
            .map(|_| (0..count).map(|_| None).collect())
            .collect();
        let pairs = (0..count).flat_map(|high| (0..high).map(move |low| (low, high)));
        for (low, high) in pairs {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            streams[high][low] = Some(TcpStream::connect(listener.local_addr().unwrap()).unwrap());
            streams[low][high] = Some(listener.accept().unwrap().0);
        }
        streams
            .into_iter()
            .map(|row| Links::new(row).unwrap())
            .collect()
    }

    fn on_hosts<T: Send>(sizes: Sizes, body: impl Fn(&mut Ranks) -> T + Sync) -> Vec<T> {
        let body = &body;
        thread::scope(|scope| {
            let handles: Vec<_> = (0..)
                .zip(mesh(sizes.ranks))
                .map(|(rank, links)| {
                    scope.spawn(move || {
                        let file = shared(sizes);
                        let region = Arc::new(Region::map(file.as_fd(), sizes).unwrap());
                        body(&mut Ranks::linked(region, rank, Arc::new(links)))
                    })
                })
                .collect();
            handles
                .into_iter()
                .map(|handle| handle.join().unwrap())
                .collect()
        })
    }

    const LARGE: usize = 4 << 20; // more than a connection's buffers hold

    #[test]
    fn every_round_gives_everybody_every_part() {
        let sizes = |ranks| Sizes {
            ranks,
            letter_bytes: 100,
            slot_bytes: LARGE,
        };
        for count in [2, 3] {
            on_hosts(sizes(count), |ranks| {
                for (round, numbers) in (0_u32..).zip([2, LARGE / 4, 1, 77]) {
                    let mine = ranks.mine::<u32>(1, numbers);
                    // SAFETY: the only slice of it.
                    unsafe { mine.part(0, 0, numbers) }.fill(100 * round + ranks.rank() as u32);
                    ranks.meet().unwrap();
                    for (rank, part) in (0..).zip(ranks.parts::<u32>(1, numbers)) {
                        assert!(part.row(0).iter().all(|&found| found == 100 * round + rank));
                    }
                }
            });
        }
    }

    #[test]
    fn letters_and_parts_share_a_connection() {
        let sizes = Sizes {
            ranks: 3,
            letter_bytes: 100,
            slot_bytes: 64,
        };
        on_hosts(sizes, |ranks| {
            for round in 0..50_u8 {
                let letter = vec![round; usize::from(round)];
                if ranks.rank() == 0 {
                    ranks.send(&letter).unwrap();
                } else {
                    assert_eq!(ranks.receive().unwrap(), letter);
                }
                let mine = ranks.mine::<u8>(1, 3);
                // SAFETY: the only slice of it.
                unsafe { mine.part(0, 0, 3) }.fill(round);
                ranks.meet().unwrap();
                assert!(
                    ranks
                        .parts::<u8>(1, 3)
                        .iter()
                        .all(|part| part.row(0) == [round; 3])
                );
            }
        });
    }

    #[test]
    fn whoever_waits_for_a_rank_that_is_gone_is_told() {
        let sizes = Sizes {
            ranks: 3,
            letter_bytes: 100,
            slot_bytes: 64,
        };
        let found = on_hosts(sizes, |ranks| match ranks.rank() {
            0 => {
                let mine = ranks.mine::<u8>(1, 3);
                // SAFETY: the only slice of it.
                unsafe { mine.part(0, 0, 3) }.fill(1);
                ranks.meet()
            }
            1 => ranks.receive().map(drop),
            _ => Ok(()), // its connections end with it
        });
        assert_eq!(found, [Err(RankLost), Err(RankLost), Ok(())]);
    }
}
