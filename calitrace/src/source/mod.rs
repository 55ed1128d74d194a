//! Where items come from: the kernel, or event logs.

pub mod file;
pub mod live;
mod machine;
