//! Keys, quotas and usage against a real database: SQLite, or the PostgreSQL that SCALELLM_TEST_POSTGRES names.

mod keys;
mod quotas;
// Marked so that the lints for tests hold for its helper functions too.
#[cfg(test)]
mod support;
#[cfg(test)]
mod usage;
