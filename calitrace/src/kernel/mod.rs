//! The kernel side seen from user space: loading and attaching the programs, draining the ring, and what the running
//! kernel says about itself (BTF, symbols). All aya and `unsafe` code of the product lives here and in [`crate::netns`].

pub mod hooks;
