//! The policies by name, and what a choice says of itself.

use std::fmt;
use std::str::FromStr;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Policy {
    LeastLoad,
    Prefix,
    Shape,
    Session,
}

impl Policy {
    pub const ALL: [Policy; 4] = [
        Policy::LeastLoad,
        Policy::Prefix,
        Policy::Shape,
        Policy::Session,
    ];

    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Policy::LeastLoad => "least-load",
            Policy::Prefix => "prefix",
            Policy::Shape => "shape",
            Policy::Session => "session",
        }
    }

    /// Whether it asks which replica has what in its cache.
    #[must_use]
    pub fn needs_prefixes(self) -> bool {
        matches!(self, Policy::Prefix | Policy::Session)
    }
}

impl FromStr for Policy {
    type Err = UnknownPolicy;

    fn from_str(name: &str) -> Result<Policy, UnknownPolicy> {
        Policy::ALL
            .into_iter()
            .find(|policy| policy.name() == name)
            .ok_or_else(|| UnknownPolicy(name.to_owned()))
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnknownPolicy(pub String);

impl fmt::Display for UnknownPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<&str> = Policy::ALL.iter().map(|policy| policy.name()).collect();
        write!(f, "got {:?}, allowed are {}", self.0, names.join(", "))
    }
}

impl std::error::Error for UnknownPolicy {}

/// Why a replica was chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Reason {
    /// There was no other.
    Only,
    /// It is predicted to be done first; nothing else was asked.
    Load,
    /// It has the longest beginning of the prompt, and is predicted to be done first.
    Prefix,
    /// No replica has any of the prompt.
    Cold,
    /// Another has more of the prompt, and so much to do that computing it anew is sooner.
    Spread,
    /// The session's own replica.
    Session,
    /// The session's own replica has too much to do, or is not there.
    Moved,
    /// Short work, and few enough requests that a wide replica is the quicker.
    Wide,
    /// Long work, or so many requests that narrow replicas are the better.
    Narrow,
}

impl Reason {
    pub const ALL: [Reason; 9] = [
        Reason::Only,
        Reason::Load,
        Reason::Prefix,
        Reason::Cold,
        Reason::Spread,
        Reason::Session,
        Reason::Moved,
        Reason::Wide,
        Reason::Narrow,
    ];

    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Reason::Only => "only",
            Reason::Load => "load",
            Reason::Prefix => "prefix",
            Reason::Cold => "cold",
            Reason::Spread => "spread",
            Reason::Session => "session",
            Reason::Moved => "moved",
            Reason::Wide => "wide",
            Reason::Narrow => "narrow",
        }
    }
}

/// The chosen replica and why.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Choice {
    /// The candidate's.
    pub index: usize,
    pub policy: Policy,
    pub reason: Reason,
    /// Until the first token.
    pub predicted_ms: f64,
    /// Of the prompt, that the replica is believed to have.
    pub cached_tokens: usize,
}
