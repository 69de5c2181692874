//! Errors of the accounts.
//!
//! ```text
//! AccountsError
//! |- Invalid       a value that cannot be: names it, what it got and what is allowed
//! |- Unknown       no key of that id
//! `- Unavailable   the database does not answer, or not in time
//! ```

#[derive(Debug, Clone, thiserror::Error)]
pub enum AccountsError {
    #[error("{0}")]
    Invalid(String),
    #[error("there is no key {0:?}")]
    Unknown(String),
    #[error("the database of keys and usage is unavailable: {0}")]
    Unavailable(String),
}

impl From<sqlx::Error> for AccountsError {
    fn from(error: sqlx::Error) -> AccountsError {
        AccountsError::Unavailable(error.to_string())
    }
}

impl From<sqlx::migrate::MigrateError> for AccountsError {
    fn from(error: sqlx::migrate::MigrateError) -> AccountsError {
        AccountsError::Unavailable(error.to_string())
    }
}

pub type Result<T> = std::result::Result<T, AccountsError>;
