//! What an operation runs on.

use std::io;

use crate::level::Level;
use crate::scratch::Scratch;
use crate::team::Team;

/// A set of threads, the instructions they may use, and their memory for intermediate results.
pub struct Cpu {
    pub team: Team,
    pub level: Level,
    pub scratch: Scratch,
}

impl Cpu {
    /// `threads` of the best level this processor has; all but the caller's get `nice` added.
    ///
    /// # Errors
    /// If a thread cannot be started.
    pub fn new(threads: usize, nice: i32) -> io::Result<Self> {
        Self::at_level(Level::detect(), threads, nice)
    }

    /// As `new`, at a level at or below what this processor has.
    ///
    /// # Errors
    /// If the processor lacks the level, or a thread cannot be started.
    pub fn at_level(level: Level, threads: usize, nice: i32) -> io::Result<Self> {
        if level > Level::detect() {
            return Err(io::Error::other(format!("this processor has no {level}")));
        }
        Ok(Self {
            team: Team::new(threads, nice)?,
            level,
            scratch: Scratch::default(),
        })
    }
}
