/// Why a run could not start or go on. Failures of single requests are data, not errors: see
/// [`crate::record::FailureKind`].
///
/// ```text
/// LoadError
/// ├── Plan      the plan contradicts itself or asks for what is not supported
/// ├── Start     the generator's own threads or runtime could not be made
/// └── Panicked  a task of the generator panicked: a defect, the results are not to be trusted
/// ```
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error("{0}")]
    Plan(String),
    #[error("the load generator could not start: {0}")]
    Start(#[from] std::io::Error),
    #[error("the load generator failed: {0}")]
    Panicked(String),
}
