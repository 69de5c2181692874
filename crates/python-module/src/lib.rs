//! `scalellm._core`: glue between Python and the crates, and nothing else.
//!
//! One file per part; each has `register`, which adds its classes and functions to the module.

use pyo3::prelude::*;

mod accounts;
mod ceilings;
mod fake_engine;
mod gateway;
mod kernels;
mod listener;
mod load_generator;
mod matrices;
mod plan;
mod ranks;
mod routing;
mod sampling;
mod text;

/// Of this library alone: what Python and torch allocate stays with theirs.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

#[pymodule]
fn _core(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    accounts::register(module)?;
    ceilings::register(module)?;
    listener::register(module)?;
    fake_engine::register(module)?;
    gateway::register(module)?;
    kernels::register(module)?;
    matrices::register(module)?;
    plan::register(module)?;
    ranks::register(module)?;
    load_generator::register(module)?;
    routing::register(module)?;
    sampling::register(module)?;
    text::register(module)?;
    Ok(())
}
