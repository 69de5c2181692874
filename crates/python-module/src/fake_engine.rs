//! `run_fake_engine`: a fake engine in this process.

use std::time::Duration;

use pyo3::exceptions::{PyOSError, PyValueError};
use pyo3::prelude::*;
use scalellm_engine_link::Address;
use scalellm_fake_engine::{FakeEngine, Settings};

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(run_fake_engine, module)?)
}

/// Serves until a gateway says Stop, a fault ends it, or a signal comes. Raises OSError if the address is taken,
/// ValueError on a bad address or bad settings.
#[pyfunction]
fn run_fake_engine(py: Python<'_>, address: &str, settings_json: &str) -> PyResult<()> {
    let address: Address = address
        .parse()
        .map_err(|error| PyValueError::new_err(format!("{error}")))?;
    let settings = Settings::from_json(settings_json)
        .map_err(|error| PyValueError::new_err(error.to_string()))?;
    let engine = py
        .detach(|| FakeEngine::start(&address, settings))
        .map_err(|error| PyOSError::new_err(error.to_string()))?;
    while !engine.is_over() {
        py.detach(|| std::thread::sleep(Duration::from_millis(50)));
        if let Err(signal) = py.check_signals() {
            py.detach(|| engine.stop());
            return Err(signal);
        }
    }
    py.detach(|| engine.stop());
    Ok(())
}
