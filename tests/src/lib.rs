//! The lab: two Calico nodes in network namespaces of this machine, and the traffic that runs in them.
//!
//! This library builds, changes and removes the lab and tells what is there; it knows nothing of
//! calitrace itself, so that what it says about a packet's way is said by the kernel, by `ip`, by
//! `traceroute` or by a socket, never by the program under test.
//!
//! Everything lives in namespaces of its own: the machine's own interfaces, routes and rules are never
//! touched, and several labs with the same addresses can be up at once.

pub mod command;
pub mod harness;
pub mod interrupt;
pub mod inventory;
pub mod lab;
pub mod namespace;
pub mod needs;
pub mod stand_in;
pub mod traffic;
pub mod wait;

pub use inventory::Inventory;
pub use lab::netfilter::Policy;
pub use lab::{DeviceOrder, Encapsulation, Lab, Node, Options, Pod, Proxy};
pub use namespace::Namespace;
pub use needs::{Need, Readiness, Test, has_kprobes, test};
pub use wait::{is_emulated, patience, unhurried, wait_until};
