//! JSON bodies to checked requests. Every message names the field, what it got and what is allowed.

pub mod chat;
pub mod completions;
pub mod fields;
mod messages;
mod params;
pub mod text;
mod unsupported;

pub use params::Params;

/// How a prompt came.
#[derive(Debug, Clone, PartialEq)]
pub enum Prompt {
    Text(String),
    Ids(Vec<u32>),
}
