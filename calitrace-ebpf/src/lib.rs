//! The wire format between calitrace's eBPF programs and its user space: event records, hook numbers, map keys and
//! the names of the globals set at load. Plain data only; both sides assert the layout at compile time.
//!
//! Knows nothing of Calico, of names or of traces.
#![no_std]

pub mod hook;
pub mod record;
pub mod shared;

pub use hook::{Direction, Hook, Place};
pub use record::{Encapsulated, Flags, Full, Kind, Logged, Outer, Plain, Tail, TunnelKind};
