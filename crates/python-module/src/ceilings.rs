//! `_core.cpu_ceilings`: what the processor can do at most, on the threads that kernels run on.

use pyo3::exceptions::{PyMemoryError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyDict;
use scalellm_cpu_kernels::ceiling::Ceilings;

use crate::kernels::on_cpu;

/// Add the function of this file to `module`.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(cpu_ceilings, module)?)
}

/// Measure each ceiling for about `seconds`, without the GIL.
#[pyfunction]
fn cpu_ceilings(py: Python<'_>, seconds: f64) -> PyResult<Bound<'_, PyDict>> {
    if !(0.0..=60.0).contains(&seconds) {
        return Err(PyValueError::new_err(format!(
            "seconds: got {seconds}, allowed: 0 to 60"
        )));
    }
    let (measured, level, threads) = on_cpu(py, |cpu| {
        let measured = Ceilings::measure(cpu, seconds);
        (measured, cpu.level.to_string(), cpu.team.threads())
    })?;
    let found = measured.map_err(|error| PyMemoryError::new_err(error.to_string()))?;
    let ceilings = PyDict::new(py);
    ceilings.set_item("level", level)?;
    ceilings.set_item("threads", threads)?;
    ceilings.set_item("int8_ops_s", found.int8_ops_s)?;
    ceilings.set_item("bf16_ops_s", found.bf16_ops_s)?;
    ceilings.set_item("read_bytes_s", found.read_bytes_s)?;
    Ok(ceilings)
}
