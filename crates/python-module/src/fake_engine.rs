//! `run_fake_engine` and `run_fake_endpoint`: a fake engine, or a foreign endpoint, in this process.

use std::time::Duration;

use pyo3::exceptions::{PyOSError, PyValueError};
use pyo3::prelude::*;
use scalellm_engine_link::Address;
use scalellm_fake_engine::{FakeEngine, Settings, Speed, run_endpoint};
use tokio::sync::watch;

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(run_fake_endpoint, module)?)?;
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

/// Serves HTTP on a port of the loopback until a signal comes. Raises OSError if the port is taken, ValueError on
/// times that are none.
#[pyfunction]
fn run_fake_endpoint(py: Python<'_>, port: u16, ttft_ms: f64, tbt_ms: f64) -> PyResult<()> {
    let time = |ms: f64| {
        Duration::try_from_secs_f64(ms / 1e3)
            .map_err(|error| PyValueError::new_err(format!("{ms} ms: {error}")))
    };
    let speed = Speed {
        ttft: time(ttft_ms)?,
        tbt: time(tbt_ms)?,
    };
    let (stop, stopped) = watch::channel(false);
    let server = std::thread::spawn(move || run_endpoint(port, speed, stopped));
    while !server.is_finished() {
        py.detach(|| std::thread::sleep(Duration::from_millis(50)));
        if let Err(signal) = py.check_signals() {
            stop.send_replace(true);
            // What it says once it was told to end does not matter.
            let _ = py.detach(|| server.join());
            return Err(signal);
        }
    }
    let served = server
        .join()
        .unwrap_or_else(|_| Err(std::io::Error::other("it panicked")));
    served.map_err(|error| PyOSError::new_err(error.to_string()))
}
