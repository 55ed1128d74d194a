//! What is special about `tunl0`: when it appears in a namespace.

use std::ffi::CString;
use std::fs;
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result};

use super::devices::Unsupported;
use super::plan::{DeviceOrder, Encapsulation, Options};
use crate::namespace::Namespace;

const FALLBACK_TUNNELS: &str = "/proc/sys/net/core/fb_tunnels_only_for_init_net";

/// Whether `tunl0` has to be made in this namespace. Where the ipip module was loaded before, the kernel
/// put one into it at its birth (`ip_tunnel_init_net` in `net/ipv4/ip_tunnel.c`), which can neither be
/// removed nor added again.
///
/// Fails with [`Unsupported`] where the kernel has no such devices.
pub(super) fn must_be_made(namespace: &Namespace) -> Result<bool> {
    let exists = namespace.within(|| {
        let name = CString::from(c"tunl0");
        // SAFETY: the name is a string with its end and outlives the call.
        Ok(unsafe { libc::if_nametoindex(name.as_ptr()) } != 0)
    })?;
    if exists {
        return Ok(false);
    }
    let trial = "link add trial type ipip remote 192.0.2.1 local 192.0.2.2\nlink del trial\n";
    match namespace.ip(trial) {
        Ok(()) => Ok(true),
        Err(error) => Err(error.context(Unsupported("ipip"))),
    }
}

/// Namespaces made while this lives have no `tunl0` of the kernel's: one made later can come after the
/// uplink. The setting is the machine's; it is put back at drop.
pub(super) struct WithoutFallback {
    before: String,
    _one_at_a_time: MutexGuard<'static, ()>,
}

impl WithoutFallback {
    /// Only for the kind of lab that needs it.
    pub(super) fn hold(options: &Options) -> Result<Option<Self>> {
        static TURN: Mutex<()> = Mutex::new(());
        if (options.encapsulation, options.order) != (Encapsulation::Ipip, DeviceOrder::UplinkFirst) {
            return Ok(None);
        }
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let before = fs::read_to_string(FALLBACK_TUNNELS)
            .with_context(|| format!("cannot read {FALLBACK_TUNNELS}"))?;
        fs::write(FALLBACK_TUNNELS, "1").with_context(|| format!("cannot write {FALLBACK_TUNNELS}"))?;
        Ok(Some(Self {
            before,
            _one_at_a_time: turn,
        }))
    }
}

impl Drop for WithoutFallback {
    fn drop(&mut self) {
        // It could be written a moment ago; a drop has nobody to tell.
        let _ = fs::write(FALLBACK_TUNNELS, self.before.trim());
    }
}
