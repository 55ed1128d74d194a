//! The kernel side seen from user space: loading and attaching the programs, draining the ring, and what the running
//! kernel says about itself (BTF, symbols). All aya and `unsafe` code of the product lives here and in [`crate::netns`].

mod attach;
pub mod btf;
mod capabilities;
mod check;
mod clsact;
mod counters;
mod functions;
pub mod hooks;
mod instance;
mod interrupted;
pub mod leftovers;
mod load;
mod logs;
#[cfg(test)]
mod measure;
mod names;
mod offsets;
mod owner;
mod permission;
mod ring;
mod symbols;
mod sys;
mod trial;

pub use attach::Attached;
pub use capabilities::{Capability, capabilities};
pub use check::{AttachmentCheck, Checked};
pub use counters::Count;
pub use functions::{Means, has_kprobes};
pub use load::{Config, Kernel, Probes};
pub use names::Names;
pub use permission::{check as check_permission, shortcomings};
pub use ring::{Batch, Drain, Dropped, Ring};
