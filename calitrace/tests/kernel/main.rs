//! The kernel side against the running kernel: real packets between two network namespaces made for each test, and
//! the records that they leave. Needs root; without it each test says so and does nothing.
#![expect(clippy::print_stdout, reason = "a test that cannot run says so")]

mod attaching;
mod bench;
mod btf;
mod clsact;
mod net;
mod parsing;
mod transports;
