//! `_core.Tokenizer` and `_core.Detokenizer`: the gateway's text, for Python's own API and for tests.

use std::path::PathBuf;
use std::sync::Arc;

use pyo3::exceptions::{PyFileNotFoundError, PyValueError};
use pyo3::prelude::*;
use scalellm_gateway::text::{self, ChatOptions, OutputText, TextError, TextModel};
use serde_json::{Map, Value};

/// Add the classes and functions of this file to `module`.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<Tokenizer>()?;
    module.add_class::<Detokenizer>()?;
    module.add_function(wrap_pyfunction!(tokenizer_digest, module)?)
}

fn to_python(error: TextError) -> PyErr {
    match error {
        TextError::Missing { .. } | TextError::SlowTokenizer { .. } => {
            PyFileNotFoundError::new_err(error.to_string())
        }
        _ => PyValueError::new_err(error.to_string()),
    }
}

fn json_error(name: &str, error: &serde_json::Error) -> PyErr {
    PyValueError::new_err(format!("{name} is not JSON: {error}"))
}

/// Hex SHA-256 of what decides the token ids in a model folder.
#[pyfunction]
fn tokenizer_digest(py: Python<'_>, folder: PathBuf) -> PyResult<String> {
    py.detach(|| text::tokenizer_digest(&folder))
        .map_err(to_python)
}

#[pyclass(frozen, module = "scalellm._core")]
struct Tokenizer {
    model: Arc<TextModel>,
}

#[pymethods]
impl Tokenizer {
    #[new]
    fn new(py: Python<'_>, folder: PathBuf) -> PyResult<Self> {
        let model = py.detach(|| TextModel::load(&folder)).map_err(to_python)?;
        Ok(Self {
            model: Arc::new(model),
        })
    }

    #[getter]
    fn vocab_size(&self) -> usize {
        self.model.vocab_size()
    }

    #[getter]
    fn eos_token_ids(&self) -> Vec<u32> {
        self.model.eos_token_ids().to_vec()
    }

    #[getter]
    fn has_chat_template(&self) -> bool {
        self.model.has_chat_template()
    }

    #[getter]
    fn digest(&self) -> &str {
        self.model.digest()
    }

    #[pyo3(signature = (text, add_special_tokens=true))]
    fn encode(&self, py: Python<'_>, text: &str, add_special_tokens: bool) -> PyResult<Vec<u32>> {
        py.detach(|| self.model.encode(text, add_special_tokens))
            .map_err(to_python)
    }

    #[pyo3(signature = (ids, skip_special_tokens=true))]
    fn decode(&self, py: Python<'_>, ids: Vec<u32>, skip_special_tokens: bool) -> String {
        py.detach(|| self.model.decode(&ids, skip_special_tokens))
    }

    fn token_text(&self, id: u32) -> (String, Vec<u8>) {
        self.model.token_text(id)
    }

    #[pyo3(signature = (
        messages_json, add_generation_prompt=true, template=None, kwargs_json=None, continue_final_message=false
    ))]
    fn apply_chat_template(
        &self,
        py: Python<'_>,
        messages_json: &str,
        add_generation_prompt: bool,
        template: Option<String>,
        kwargs_json: Option<&str>,
        continue_final_message: bool,
    ) -> PyResult<String> {
        let messages: Value =
            serde_json::from_str(messages_json).map_err(|e| json_error("messages_json", &e))?;
        let mut kwargs: Map<String, Value> = match kwargs_json {
            Some(json) => serde_json::from_str(json).map_err(|e| json_error("kwargs_json", &e))?,
            None => Map::new(),
        };
        let tools = kwargs.remove("tools").filter(|tools| !tools.is_null());
        let options = ChatOptions {
            add_generation_prompt,
            continue_final_message,
            template,
            tools,
            kwargs,
        };
        py.detach(|| self.model.render_chat(&messages, &options))
            .map_err(to_python)
    }
}

#[pyclass(module = "scalellm._core")]
struct Detokenizer {
    output: OutputText,
}

#[pymethods]
impl Detokenizer {
    #[new]
    #[pyo3(signature = (tokenizer, prompt_ids, stop, skip_special_tokens=true, include_stop=false, min_tokens=0))]
    fn new(
        tokenizer: &Tokenizer,
        prompt_ids: Vec<u32>,
        stop: Vec<String>,
        skip_special_tokens: bool,
        include_stop: bool,
        min_tokens: usize,
    ) -> Self {
        let output = OutputText::new(
            &tokenizer.model,
            &prompt_ids,
            stop,
            skip_special_tokens,
            include_stop,
        );
        Self {
            output: output.with_min_tokens(min_tokens),
        }
    }

    fn push(&mut self, ids: Vec<u32>) -> (String, bool) {
        let piece = self.output.push(&ids);
        (piece.text, piece.stopped.is_some())
    }

    fn finish(&mut self) -> String {
        self.output.finish().text
    }
}
