//! `Router`: the gateway's routing, for the simulator.

use parking_lot::Mutex;
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};
use scalellm_routing::{BlockHash, Candidate, Request, StepCost, stable_hash};

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<ReplicaLoad>()?;
    module.add_class::<Route>()?;
    module.add_class::<Router>()?;
    module.add_function(wrap_pyfunction!(block_hashes, module)?)
}

#[pyclass(frozen, module = "scalellm._core")]
struct ReplicaLoad(Candidate);

#[pymethods]
impl ReplicaLoad {
    #[new]
    #[pyo3(signature = (index, **fields))]
    fn new(index: usize, fields: Option<&Bound<'_, PyDict>>) -> PyResult<Self> {
        let mut load = Candidate {
            index,
            id: stable_hash(&index.to_le_bytes()),
            tensor_parallel_size: 1,
            ..Candidate::default()
        };
        for (name, value) in fields.into_iter().flatten() {
            match &*name.extract::<String>()? {
                "name" => load.id = stable_hash(value.extract::<String>()?.as_bytes()),
                "running" => load.running = value.extract()?,
                "waiting" => load.waiting = value.extract()?,
                "backlog_tokens" => load.backlog_tokens = value.extract()?,
                "context_tokens" => load.context_tokens = value.extract()?,
                "step_ms" => load.step_ms = value.extract()?,
                "steps" => load.steps = value.extract()?,
                "max_num_seqs" => load.max_num_seqs = value.extract()?,
                "tensor_parallel_size" => load.tensor_parallel_size = value.extract()?,
                "block_size" => load.block_size = value.extract()?,
                "cost" => {
                    let (fixed_ms, token_ms, attended_ms, request_ms) = value.extract()?;
                    load.cost = StepCost {
                        fixed_ms,
                        token_ms,
                        attended_ms,
                        request_ms,
                    };
                }
                "own_requests" => load.own_requests = value.extract()?,
                "own_tokens" => load.own_tokens = value.extract()?,
                other => return Err(unknown(other)),
            }
        }
        Ok(Self(load))
    }

    fn __repr__(&self) -> String {
        format!("{:?}", self.0)
    }
}

#[pyclass(frozen, get_all, module = "scalellm._core")]
struct Route {
    index: usize,
    policy: &'static str,
    reason: &'static str,
    predicted_ms: f64,
    cached_tokens: usize,
}

#[pymethods]
impl Route {
    fn __repr__(&self) -> String {
        format!(
            "Route(index={}, policy={:?}, reason={:?}, predicted_ms={:.3}, cached_tokens={})",
            self.index, self.policy, self.reason, self.predicted_ms, self.cached_tokens
        )
    }
}

#[pyclass(frozen, module = "scalellm._core")]
struct Router(Mutex<scalellm_routing::Router>);

#[pymethods]
impl Router {
    #[new]
    fn new(policy: &str) -> PyResult<Self> {
        let policy = policy
            .parse()
            .map_err(|error| PyValueError::new_err(format!("policy: {error}")))?;
        Ok(Self(Mutex::new(scalellm_routing::Router::new(policy))))
    }

    #[pyo3(signature = (replicas, prompt_tokens, now_ms, **fields))]
    fn pick(
        &self,
        replicas: Vec<PyRef<'_, ReplicaLoad>>,
        prompt_tokens: usize,
        now_ms: f64,
        fields: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<Option<Route>> {
        let mut hashes = Vec::new();
        let mut request = Request {
            prompt_tokens,
            ..Request::default()
        };
        for (name, value) in fields.into_iter().flatten() {
            match &*name.extract::<String>()? {
                "max_tokens" => request.max_tokens = value.extract()?,
                "hashes" if value.is_none() => {}
                "hashes" => hashes = to_hashes(&value)?,
                "block_size" => request.block_size = value.extract()?,
                "session" => {
                    let session: Option<String> = value.extract()?;
                    request.session = session.map(|name| stable_hash(name.as_bytes()));
                }
                "batch" => request.batch = value.extract()?,
                other => return Err(unknown(other)),
            }
        }
        let request = Request {
            hashes: &hashes,
            ..request
        };
        let choice = self.0.lock().pick(&candidates(&replicas), &request, now_ms);
        Ok(choice.map(|choice| Route {
            index: choice.index,
            policy: choice.policy.name(),
            reason: choice.reason.name(),
            predicted_ms: choice.predicted_ms,
            cached_tokens: choice.cached_tokens,
        }))
    }

    fn predict_first_token_ms(
        &self,
        replicas: Vec<PyRef<'_, ReplicaLoad>>,
        prompt_tokens: usize,
        now_ms: f64,
    ) -> Option<f64> {
        self.0
            .lock()
            .predict_first_token_ms(&candidates(&replicas), prompt_tokens, now_ms)
    }

    fn observe_prefill(&self, index: usize, tokens: usize, took_ms: f64, now_ms: f64) {
        self.0
            .lock()
            .observe_prefill(index, tokens, took_ms, now_ms);
    }

    fn observe_output(&self, tokens: usize, now_ms: f64) {
        self.0.lock().observe_output(tokens, now_ms);
    }

    fn store(&self, index: usize, hashes: &Bound<'_, PyAny>) -> PyResult<()> {
        self.0.lock().store(index, to_hashes(hashes)?);
        Ok(())
    }

    fn remove(&self, index: usize, hashes: &Bound<'_, PyAny>) -> PyResult<()> {
        self.0.lock().remove(index, to_hashes(hashes)?);
        Ok(())
    }

    fn forget(&self, index: usize) {
        self.0.lock().forget(index);
    }
}

#[pyfunction]
#[pyo3(signature = (ids, block_size, salt=None))]
fn block_hashes<'py>(
    py: Python<'py>,
    ids: Vec<u32>,
    block_size: usize,
    salt: Option<&[u8]>,
) -> Vec<Bound<'py, PyBytes>> {
    scalellm_routing::block_hashes(&ids, block_size, salt.unwrap_or_default())
        .iter()
        .map(|hash| PyBytes::new(py, hash))
        .collect()
}

fn unknown(name: &str) -> PyErr {
    PyTypeError::new_err(format!("got an unexpected keyword argument {name:?}"))
}

fn candidates(replicas: &[PyRef<'_, ReplicaLoad>]) -> Vec<Candidate> {
    replicas.iter().map(|replica| replica.0).collect()
}

fn to_hashes(hashes: &Bound<'_, PyAny>) -> PyResult<Vec<BlockHash>> {
    hashes
        .try_iter()?
        .map(|hash| {
            let hash = hash?;
            let bytes = hash.cast::<PyBytes>()?.as_bytes();
            bytes.try_into().map_err(|_| {
                PyValueError::new_err(format!("a block's hash has 16 bytes, not {}", bytes.len()))
            })
        })
        .collect()
}
