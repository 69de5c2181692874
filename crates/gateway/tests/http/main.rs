//! The gateway over real sockets, in front of fake engines.

mod answers;
mod endpoints;
mod errors;
mod faults;
mod lifecycle;
mod streams;
mod support;
mod transport;
