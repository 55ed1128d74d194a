//! Traffic of the lab, made by real tools and by sockets, and what those say about it.

pub mod dns;
pub mod http;
pub mod iperf;
pub mod mtr;
pub mod ping;
pub mod tcpdump;
pub mod traceroute;
pub mod udp;
