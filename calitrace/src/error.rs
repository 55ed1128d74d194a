//! The few errors that a caller branches on: each decides the exit code of the command. Everything else is told, not
//! typed.

use std::fmt;

/// The process may not do what watching needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NoPermission {
    /// What was not permitted and what would permit it: `attaching programs needs CAP_BPF and CAP_NET_ADMIN`.
    pub what: String,
}

impl fmt::Display for NoPermission {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "no permission: {}", self.what)
    }
}

impl std::error::Error for NoPermission {}

/// There is nothing here that could be traced.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NothingToTrace {
    /// What was looked for, as the end of a sentence: `no Calico node in any network namespace`.
    pub why: String,
}

impl fmt::Display for NothingToTrace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "nothing to trace: {}", self.why)
    }
}

impl std::error::Error for NothingToTrace {}
