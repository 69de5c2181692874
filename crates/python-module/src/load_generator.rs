use std::time::Duration;

use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use scalellm_load_generator::{LoadError, Plan, Run};

/// How often Python hears of the run, and may stop it.
const PROGRESS_EVERY: Duration = Duration::from_millis(200);

/// The load runs on threads of its own; this one waits without the GIL, so that drawing progress
/// never delays a send.
#[pyfunction]
#[pyo3(signature = (plan_json, on_progress=None))]
fn run_load(py: Python<'_>, plan_json: &str, on_progress: Option<Py<PyAny>>) -> PyResult<String> {
    let mut run = Plan::from_json(plan_json)
        .and_then(Run::start)
        .map_err(to_python)?;
    let mut raised = None;
    loop {
        if let Some(report) = py.detach(|| run.wait(PROGRESS_EVERY)) {
            return match raised {
                Some(error) => Err(error),
                None => json(serde_json::to_string(&report.map_err(to_python)?)),
            };
        }
        if raised.is_none() {
            match report_progress(py, &run, on_progress.as_ref()) {
                Ok(true) => {}
                Ok(false) => run.stop(),
                Err(error) => {
                    raised = Some(error);
                    run.stop();
                }
            }
        }
    }
}

/// Whether to go on.
fn report_progress(py: Python<'_>, run: &Run, on_progress: Option<&Py<PyAny>>) -> PyResult<bool> {
    py.check_signals()?;
    let Some(on_progress) = on_progress else {
        return Ok(true);
    };
    let progress = json(serde_json::to_string(&run.progress()))?;
    on_progress.call1(py, (progress,))?.extract(py)
}

fn json(written: serde_json::Result<String>) -> PyResult<String> {
    written.map_err(|error| PyRuntimeError::new_err(error.to_string()))
}

fn to_python(error: LoadError) -> PyErr {
    match error {
        LoadError::Plan(message) => PyValueError::new_err(message),
        LoadError::Start(error) => error.into(),
        LoadError::Panicked(message) => PyRuntimeError::new_err(message),
    }
}

pub(crate) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(run_load, module)?)
}
