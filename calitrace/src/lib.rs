//! calitrace: an eBPF packet tracer for Calico.
//!
//! Data flows one way, and each room knows only the rooms to its left:
//!
//! ```text
//! kernel → source → correlate (pure) → sink
//!            ↑ facts from calico (names, tunnels, blocks) and route (links, addresses, hop addresses)
//! ```

pub mod calico;
pub mod cli;
pub mod correlate;
pub mod error;
pub mod event;
pub mod filter;
mod iptables;
pub mod kernel;
pub mod netfilter;
mod netlink;
pub mod netns;
mod nftables;
pub mod pipeline;
pub mod route;
pub mod sink;
pub mod source;
pub mod view;
