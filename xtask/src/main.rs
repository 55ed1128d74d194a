//! `cargo xtask`: the project's only script.

fn main() {}
