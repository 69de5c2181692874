//! Gateway's client and engine's listener against each other, over real sockets.

mod connection;
mod control;
mod kv_events;
mod listener;
mod proxy;
mod raw;
mod requests;
mod support;
mod validation;
