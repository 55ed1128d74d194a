//! The event log: JSON lines. A [`Header`], then [`super::Item`]s in order of time (each fact before its first use), then an
//! end line. A file without its end line was cut off; it is read up to where it stops, and that is said.

use serde::{Deserialize, Serialize};

/// Value of the header's `format`.
pub const FORMAT: &str = "calitrace-events";
/// Version of the format. Fields only ever get added within one version.
pub const VERSION: u32 = 1;

/// The first line of a log.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Header {
    /// [`FORMAT`].
    pub format: String,
    /// [`VERSION`].
    pub version: u32,
    /// Version of the program that wrote it.
    pub program: String,
    /// The machine's boot id: clocks of logs with the same one are the same clock.
    pub boot_id: String,
    /// The machine's host name.
    pub host: String,
    /// Kernel release (`uname -r`).
    pub kernel: String,
    /// The hooks, and for a missing one why.
    pub hooks: Vec<HookStatus>,
    /// The filter as it was typed; null without.
    pub filter: Option<String>,
    /// The drain period in nanoseconds: observations may be this much out of order.
    pub drain_period: u64,
}

/// Whether a hook observes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HookStatus {
    /// Name of the hook.
    pub hook: String,
    /// Null when it observes, else why not.
    pub missing: Option<String>,
}
