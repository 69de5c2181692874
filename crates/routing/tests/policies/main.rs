//! Each policy from outside: what it is told of the replicas, and where it sends a request.

mod least_load;
mod prefix;
mod session;
mod shape;
mod support;
