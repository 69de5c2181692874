//! `run_gateway`: the HTTP front in this process.

use std::path::PathBuf;

use pyo3::exceptions::{PyOSError, PyValueError};
use pyo3::prelude::*;
use scalellm_gateway::{Config, GatewayError, serve};

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(run_gateway, module)?)
}

/// Serves until SIGTERM or SIGINT has drained it. Raises OSError if the port is taken, ValueError on a bad
/// configuration. `path` is the file that SIGHUP and `/admin/v1/reload` read again.
#[pyfunction]
#[pyo3(signature = (config_toml, path=None))]
fn run_gateway(py: Python<'_>, config_toml: &str, path: Option<PathBuf>) -> PyResult<()> {
    py.detach(|| serve(Config::read(config_toml)?, path))
        .map_err(|error| match error {
            GatewayError::Bind { .. } | GatewayError::Runtime(_) => {
                PyOSError::new_err(error.to_string())
            }
            GatewayError::Config(_) | GatewayError::Model { .. } => {
                PyValueError::new_err(error.to_string())
            }
        })
}
