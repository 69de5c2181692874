//! `EngineListener` and `Submission`: the engine loop's end of the link.

use std::io;
use std::time::Duration;

use pyo3::exceptions::{PyOSError, PyRuntimeError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::sync::MutexExt;
use pyo3::types::{PyBytes, PyDict, PyList, PyMapping, PyTuple};
use scalellm_engine_link::{
    Address, Command, EngineHandle, EngineInfo, Listener, ListenerConfig, StepOutput,
    Submission as LinkSubmission, proto,
};

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<Submission>()?;
    module.add_class::<EngineListener>()
}

/// A validated Submit. Lists are made once, when it is polled.
#[pyclass(frozen, get_all, module = "scalellm._core")]
pub struct Submission {
    key: u64,
    trace_id: String,
    prompt_ids: Py<PyList>,
    resume_ids: Py<PyList>,
    max_tokens: u32,
    min_tokens: u32,
    stop_token_ids: Py<PyList>,
    ignore_eos: bool,
    priority: i32,
    deadline_us: Option<u64>,
    arrival_us: u64,
    received_us: u64,
    choice: u32,
    cache_salt: Py<PyBytes>,
    prompt_logprobs: Option<u32>,
    temperature: f32,
    top_p: f32,
    top_k: u32,
    min_p: f32,
    repetition_penalty: f32,
    presence_penalty: f32,
    frequency_penalty: f32,
    logit_bias: Py<PyList>,
    seed: u64,
    logprobs: Option<u32>,
}

#[pymethods]
impl Submission {
    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        let prompt_tokens = self.prompt_ids.bind(py).len();
        Ok(format!(
            "Submission(key={}, trace_id={:?}, {prompt_tokens} prompt tokens, max_tokens={})",
            self.key, self.trace_id, self.max_tokens
        ))
    }
}

impl Submission {
    fn new(py: Python<'_>, received: LinkSubmission) -> PyResult<Self> {
        let submit = received.submit;
        let sampling = submit.sampling.unwrap_or_default();
        let biases = sampling
            .logit_bias
            .iter()
            .map(|entry| (entry.token_id, entry.bias));
        Ok(Self {
            key: received.key,
            trace_id: submit.trace_id,
            prompt_ids: PyList::new(py, submit.prompt_ids)?.unbind(),
            resume_ids: PyList::new(py, submit.resume_ids)?.unbind(),
            max_tokens: submit.max_tokens,
            min_tokens: submit.min_tokens,
            stop_token_ids: PyList::new(py, submit.stop_token_ids)?.unbind(),
            ignore_eos: submit.ignore_eos,
            priority: submit.priority,
            deadline_us: received.deadline_us,
            arrival_us: submit.arrival_us,
            received_us: received.received_us,
            choice: submit.choice,
            cache_salt: PyBytes::new(py, &submit.cache_salt).unbind(),
            prompt_logprobs: submit.prompt_logprobs,
            temperature: sampling.temperature.unwrap_or(1.0),
            top_p: sampling.top_p.unwrap_or(1.0),
            top_k: sampling.top_k.unwrap_or(0),
            min_p: sampling.min_p.unwrap_or(0.0),
            repetition_penalty: sampling.repetition_penalty.unwrap_or(1.0),
            presence_penalty: sampling.presence_penalty.unwrap_or(0.0),
            frequency_penalty: sampling.frequency_penalty.unwrap_or(0.0),
            logit_bias: PyList::new(py, biases.collect::<Vec<_>>())?.unbind(),
            seed: sampling.seed,
            logprobs: sampling.logprobs,
        })
    }
}

/// Serves the engine protocol on a thread of its own; Python sees whole batches only.
#[pyclass(frozen, module = "scalellm._core")]
pub struct EngineListener {
    #[pyo3(get)]
    address: String,
    handle: EngineHandle,
    listener: std::sync::Mutex<Option<Listener>>,
}

/// `poll` looks for signals at least this often.
const SIGNAL_CHECK: Duration = Duration::from_millis(100);

#[pymethods]
impl EngineListener {
    #[new]
    fn new(py: Python<'_>, address: &str, info: &Bound<'_, PyMapping>) -> PyResult<Self> {
        let bind: Address = address
            .parse()
            .map_err(|error| PyValueError::new_err(format!("{error}")))?;
        let mut config = ListenerConfig::default();
        let info = engine_info(info, &mut config)?;
        let started = py.detach(|| Listener::start_with(&bind, info, config));
        let (listener, handle) = started.map_err(|error| match error.kind() {
            io::ErrorKind::InvalidInput => PyValueError::new_err(error.to_string()),
            _ => os_error(&error),
        })?;
        Ok(Self {
            address: listener.address().to_string(),
            handle,
            listener: std::sync::Mutex::new(Some(listener)),
        })
    }

    fn poll<'py>(&self, py: Python<'py>, timeout_s: f64) -> PyResult<Bound<'py, PyList>> {
        let timeout = Duration::try_from_secs_f64(timeout_s).map_err(|_| {
            PyValueError::new_err(format!("timeout_s is {timeout_s}; allowed is 0 or more"))
        })?;
        let mut left = timeout;
        loop {
            let part = left.min(SIGNAL_CHECK);
            let commands = py.detach(|| self.handle.poll(part));
            left -= part;
            if !commands.is_empty() || left.is_zero() || self.is_closed(py) {
                let commands: Vec<_> = commands
                    .into_iter()
                    .map(|command| to_python(py, command))
                    .collect::<PyResult<_>>()?;
                return PyList::new(py, commands);
            }
            py.check_signals()?;
        }
    }

    fn emit(&self, outputs: &Bound<'_, PyAny>, load: &Bound<'_, PyTuple>) -> PyResult<()> {
        let mut steps = Vec::with_capacity(outputs.len().unwrap_or(0));
        for output in outputs.try_iter()? {
            steps.push(step_output(&output?)?);
        }
        self.handle.emit(steps, to_load(load)?);
        Ok(())
    }

    fn emit_kv(&self, stored: Vec<(Vec<u8>, Vec<u8>)>, removed: Vec<Vec<u8>>, snapshot: bool) {
        let stored = stored
            .into_iter()
            .map(|(parent, hash)| proto::KvStored { parent, hash })
            .collect();
        self.handle.emit_kv(stored, removed, snapshot);
    }

    fn note_step(
        &self,
        number: u64,
        started_us: u64,
        requests: u32,
        tokens: u32,
        phases: Vec<(String, u64)>,
        expert_use: Option<ExpertUse>,
    ) {
        self.handle.note_step(proto::StepTimes {
            number,
            started_us,
            requests,
            tokens,
            phases: to_phases(phases),
            expert_use: expert_use.map(to_expert_use),
        });
    }

    fn answer_calibrate(&self, ticket: u64, step_ms: Vec<f32>) {
        self.handle.answer_calibrate(ticket, step_ms);
    }

    fn drain(&self) {
        self.handle.drain();
    }

    fn close(&self, py: Python<'_>) -> PyResult<()> {
        let listener = self.lock(py)?.take();
        if let Some(listener) = listener {
            py.detach(|| listener.close());
        }
        Ok(())
    }
}

impl EngineListener {
    fn lock(&self, py: Python<'_>) -> PyResult<std::sync::MutexGuard<'_, Option<Listener>>> {
        self.listener
            .lock_py_attached(py)
            .map_err(|error| PyRuntimeError::new_err(error.to_string()))
    }

    fn is_closed(&self, py: Python<'_>) -> bool {
        self.lock(py).is_ok_and(|listener| listener.is_none())
    }
}

fn os_error(error: &io::Error) -> PyErr {
    // With the number Python makes the fitting subclass of OSError.
    match error.kind() {
        io::ErrorKind::AddrInUse => {
            PyOSError::new_err((libc_errno::ADDRESS_IN_USE, error.to_string()))
        }
        io::ErrorKind::PermissionDenied => {
            PyOSError::new_err((libc_errno::NOT_PERMITTED, error.to_string()))
        }
        io::ErrorKind::NotFound => PyOSError::new_err((libc_errno::NO_ENTRY, error.to_string())),
        _ => PyOSError::new_err(error.to_string()),
    }
}

/// Linux's error numbers for what binding meets.
mod libc_errno {
    pub const NO_ENTRY: i32 = 2;
    pub const NOT_PERMITTED: i32 = 13;
    pub const ADDRESS_IN_USE: i32 = 98;
}

fn to_python<'py>(py: Python<'py>, command: Command) -> PyResult<Bound<'py, PyAny>> {
    let none = py.None().into_bound(py);
    let (name, argument) = match command {
        Command::Submit(received) => (
            "submit",
            Bound::new(py, Submission::new(py, *received)?)?.into_any(),
        ),
        Command::Cancel(key) => ("cancel", key.into_pyobject(py)?.into_any()),
        Command::Drain => ("drain", none),
        Command::Stop => ("stop", none),
        Command::KvSnapshot => ("kv_snapshot", none),
        Command::Calibrate { ticket, shapes } => {
            let shapes: Vec<(u32, u32, u32)> = shapes
                .iter()
                .map(|shape| {
                    (
                        shape.decode_seqs,
                        shape.context_tokens,
                        shape.prefill_tokens,
                    )
                })
                .collect();
            ("calibrate", (ticket, shapes).into_pyobject(py)?.into_any())
        }
    };
    Ok((name, argument).into_pyobject(py)?.into_any())
}

type PyLogprobs = (u32, f32, u32, Vec<u32>, Vec<f32>);

fn to_logprobs(
    (token_id, logprob, rank, top_ids, top_logprobs): PyLogprobs,
) -> proto::TokenLogprobs {
    proto::TokenLogprobs {
        token_id,
        logprob,
        rank,
        top_ids,
        top_logprobs,
    }
}

fn to_phases(phases: Vec<(String, u64)>) -> Vec<proto::PhaseTime> {
    phases
        .into_iter()
        .map(|(name, us)| proto::PhaseTime { name, us })
        .collect()
}

/// Item by item: most items of most outputs are None, which costs a pointer comparison.
fn step_output(output: &Bound<'_, PyAny>) -> PyResult<StepOutput> {
    let tuple = output.cast::<PyTuple>()?;
    if tuple.len() != 9 {
        return Err(PyValueError::new_err(format!(
            "an output has 9 items, not {}",
            tuple.len()
        )));
    }
    let item = |index: usize| tuple.get_borrowed_item(index);
    let given = |index: usize| item(index).map(|value| (!value.is_none()).then_some(value));
    let mut output = proto::Output {
        token_ids: item(1)?.extract()?,
        cached_tokens: item(3)?.extract()?,
        ..proto::Output::default()
    };
    if let Some(reason) = given(2)? {
        output.finish_reason = finish_reason(reason.extract()?)? as i32;
    }
    if let Some(logprobs) = given(4)? {
        output.logprobs = logprobs
            .extract::<Vec<PyLogprobs>>()?
            .into_iter()
            .map(to_logprobs)
            .collect();
    }
    if let Some(logprobs) = given(5)? {
        let entries = logprobs.extract::<Vec<Option<PyLogprobs>>>()?;
        output.prompt_logprobs = entries
            .into_iter()
            .map(|entry| entry.map(to_logprobs).unwrap_or_default())
            .collect();
    }
    if let Some(times) = given(6)? {
        let (
            queued_us,
            first_scheduled_us,
            first_token_us,
            finished_us,
            preemptions,
            steps,
            prefill,
            decode,
        ) = times.extract()?;
        output.times = Some(proto::StageTimes {
            queued_us,
            first_scheduled_us,
            first_token_us,
            finished_us,
            preemptions,
            steps,
            prefill: to_phases(prefill),
            decode: to_phases(decode),
            ..proto::StageTimes::default()
        });
    }
    if let Some(id) = given(7)? {
        output.stop_token_id = id.extract()?;
    }
    if let Some(error) = given(8)? {
        output.error = error.extract()?;
    }
    Ok(StepOutput {
        key: item(0)?.extract()?,
        output,
    })
}

fn finish_reason(name: &str) -> PyResult<proto::FinishReason> {
    Ok(match name {
        "eos" => proto::FinishReason::Eos,
        "stop_token" => proto::FinishReason::StopToken,
        "length" => proto::FinishReason::Length,
        "cancelled" => proto::FinishReason::Cancelled,
        "deadline" => proto::FinishReason::Deadline,
        "error" => proto::FinishReason::Error,
        _ => {
            return Err(PyValueError::new_err(format!(
                "finish reason {name:?}; allowed are eos, stop_token, length, cancelled, deadline, error"
            )));
        }
    })
}

fn to_load(load: &Bound<'_, PyTuple>) -> PyResult<proto::Load> {
    let (
        running,
        waiting,
        backlog_tokens,
        kv_blocks_used,
        kv_blocks_total,
        step_ms,
        overhead_ms,
        steps,
        preemptions,
        (prefix_hit_tokens, prefix_query_tokens),
        (draft_tokens, accepted_draft_tokens),
        ((fixed_ms, token_ms, attended_ms, request_ms), expert_use),
    ) = load.extract()?;
    let expert_use: Option<ExpertUse> = expert_use;
    Ok(proto::Load {
        running,
        waiting,
        backlog_tokens,
        kv_blocks_used,
        kv_blocks_total,
        step_ms,
        overhead_ms,
        steps,
        preemptions,
        prefix_hit_tokens,
        prefix_query_tokens,
        draft_tokens,
        accepted_draft_tokens,
        step_cost: Some(proto::StepCost {
            fixed_ms,
            token_ms,
            attended_ms,
            request_ms,
        }),
        expert_use: expert_use.map(to_expert_use),
        ..proto::Load::default()
    })
}

/// (layers, read, busiest, choices, ranks) of the proto's.
type ExpertUse = (u64, u64, u64, Vec<u64>, u32);

fn to_expert_use((layers, read, busiest, choices, ranks): ExpertUse) -> proto::ExpertUse {
    proto::ExpertUse {
        layers,
        read,
        busiest,
        choices,
        ranks,
    }
}

/// DescribeResponse's fields by name; also `max_waiting`, the listener's bound on requests that wait.
fn engine_info(
    mapping: &Bound<'_, PyMapping>,
    config: &mut ListenerConfig,
) -> PyResult<EngineInfo> {
    let fields = PyDict::new(mapping.py());
    fields.update(mapping)?;
    let mut info = EngineInfo::default();
    for (name, value) in fields.iter() {
        let name: String = name.extract()?;
        let set = match name.as_str() {
            "model" => value.extract().map(|v| info.model = v),
            "model_path" => value.extract().map(|v| info.model_path = v),
            "tokenizer_digest" => value.extract().map(|v| info.tokenizer_digest = v),
            "weights_digest" => value.extract().map(|v| info.weights_digest = v),
            "numerics_digest" => value.extract().map(|v| info.numerics_digest = v),
            "epoch" => value.extract().map(|v| info.epoch = v),
            "vocab_size" => value.extract().map(|v| info.vocab_size = v),
            "max_model_len" => value.extract().map(|v| info.max_model_len = v),
            "max_num_seqs" => value.extract().map(|v| info.max_num_seqs = v),
            "block_size" => value.extract().map(|v| info.block_size = v),
            "num_blocks" => value.extract().map(|v| info.num_blocks = v),
            "tensor_parallel_size" => value.extract().map(|v| info.tensor_parallel_size = v),
            "dtype" => value.extract().map(|v| info.dtype = v),
            "quantization" => value.extract().map(|v| info.quantization = v),
            "kv_cache_dtype" => value.extract().map(|v| info.kv_cache_dtype = v),
            "device" => value.extract().map(|v| info.device = v),
            "eos_token_ids" => value.extract().map(|v| info.eos_token_ids = v),
            "version" => value.extract().map(|v| info.version = v),
            "max_waiting" => value.extract().map(|v| config.max_waiting = v),
            _ => return Err(PyValueError::new_err(format!("info has no field {name:?}"))),
        };
        set.map_err(|error| PyTypeError::new_err(format!("info[{name:?}]: {error}")))?;
    }
    Ok(info)
}
