//! The gateway over real sockets, in front of fake engines.

// Marked so that the lints for tests hold for its helper functions too.
#[cfg(test)]
mod accounts;
mod answers;
// Marked so that the lints for tests hold for its helper functions too.
#[cfg(test)]
mod endpoints;
mod errors;
mod faults;
// Marked so that the lints for tests hold for its helper functions too.
#[cfg(test)]
mod foreign;
// Marked so that the lints for tests hold for its helper functions too.
#[cfg(test)]
mod lifecycle;
#[cfg(test)]
mod profile;
#[cfg(test)]
mod replays;
// Marked so that the lints for tests hold for its helper functions too.
#[cfg(test)]
mod operations;
// Marked so that the lints for tests hold for its helper functions too.
#[cfg(test)]
mod routing;
// Marked so that the lints for tests hold for its helper functions too.
#[cfg(test)]
mod safety;
// Marked so that the lints for tests hold for its helper functions too.
#[cfg(test)]
mod safety_relayed;
mod streams;
// Marked so that the lints for tests hold for its helper functions too.
#[cfg(test)]
mod support;
#[cfg(test)]
mod traces;
mod transport;
// Marked so that the lints for tests hold for its helper functions too.
#[cfg(test)]
mod upstream;
