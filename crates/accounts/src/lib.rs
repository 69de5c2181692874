//! API keys, quotas that several gateways share, and metered usage, in SQLite or PostgreSQL.
//!
//! ```text
//! secret        a key as clients hold it, and its hash
//! key, store    what a key allows; keys in the database
//! keyring       the keys in use, cached with a verdict that ages
//! ledger        one gateway's slice of a budget: pure arithmetic
//! window, lease budgets in the database, shared by leases
//! reservation   what one request holds of its key's budgets
//! clerk         the task that asks the database, so that requests do not
//! usage         what requests used, written in batches by one task
//! usage_table   the rows that it writes
//! report, admin sums and changes for operators
//! accounts      all of it behind one face
//! ```

mod accounts;
pub mod admin;
mod clerk;
mod database;
mod error;
mod key;
mod keyring;
mod lease;
mod ledger;
pub mod report;
mod reservation;
mod secret;
#[cfg(test)]
mod sharing;
pub mod store;
mod usage;
mod usage_table;
mod window;

pub use accounts::{Accounts, Counts, Denied, Settings, WhenDown};
pub use database::Database;
pub use error::{AccountsError, Result};
pub use key::{Class, Key, Limits, NewKey, Quota};
pub use keyring::{KeyState, Refused, VERDICT_HOLDS};
pub use ledger::slice;
pub use reservation::Reservation;
pub use usage::{Live, Meters, RUNNING, Usage};
