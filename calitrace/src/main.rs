//! The `calitrace` command.

fn main() {}
