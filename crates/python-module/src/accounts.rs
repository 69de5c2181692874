//! `accounts_request`: keys and usage straight from their database.

use pyo3::exceptions::{PyOSError, PyValueError};
use pyo3::prelude::*;
use scalellm_accounts::{AccountsError, admin};

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(accounts_request, module)?)
}

/// Does what the JSON `request` asks on the database at `url`, and returns its answer as JSON. Raises ValueError for what
/// cannot be, OSError if the database does not answer.
#[pyfunction]
fn accounts_request(py: Python<'_>, url: &str, request: &str) -> PyResult<String> {
    py.detach(|| admin::answer_once(url, request))
        .map_err(|error| match error {
            AccountsError::Invalid(_) | AccountsError::Unknown(_) => {
                PyValueError::new_err(error.to_string())
            }
            AccountsError::Unavailable(_) => PyOSError::new_err(error.to_string()),
        })
}
