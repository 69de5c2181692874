//! The gateway over real sockets, in front of fake engines.

// So that the lints for tests hold for what its files share too.
#![cfg(test)]

mod accounts;
mod answers;
mod breaker;
mod endpoints;
mod errors;
mod faults;
mod foreign;
mod foreign_beside;
mod foreign_faults;
mod foreign_health;
mod foreign_prefixes;
mod hedges;
mod http2;
mod lifecycle;
mod logs;
mod operations;
mod process;
mod profile;
mod reload;
mod replays;
mod routing;
mod safety;
mod safety_classifier;
mod safety_relayed;
mod streams;
mod support;
mod traces;
mod transport;
mod turns;
mod upstream;
mod waits;
mod ways_in;
