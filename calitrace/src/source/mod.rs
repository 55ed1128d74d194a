//! Where items come from: the kernel, or event logs.

pub mod file;
mod machine;
pub mod live;
