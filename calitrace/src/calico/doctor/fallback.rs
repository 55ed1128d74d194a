//! `net.core.fb_tunnels_only_for_init_net`: which network namespaces the kernel gives a `tunl0` of their own when they are made,
//! or when the ipip module is loaded (`net_has_fallback_tunnels`, `include/linux/netdevice.h`; `ip_tunnel_init_net`,
//! `net/ipv4/ip_tunnel.c`; Linux 5.10 to 6.18). Reads, and judges nothing.
//!
//! With 0 pods have one, too, which is nobody's; and it is the first of a node's devices where the node is a container, so
//! that traceroute shows its address as the first hop. Neither is a fault.

use std::path::Path;

use anyhow::{Context as _, Result};

use super::evidence::read;
use crate::netns::{self, Handle};

/// The setting, below `net`.
pub(super) const SETTING: &str = "core/fb_tunnels_only_for_init_net";

/// The setting, and whether it gives a node's namespace a `tunl0`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FallbackTunnels {
    /// 0: all namespaces have them; 1: the initial one; 2: none.
    pub setting: u32,
    /// The node is in the initial namespace: it is no container.
    pub initial: bool,
}

impl FallbackTunnels {
    /// The initial namespace alone has the setting (`net_core_table`, `net/core/sysctl_net_core.c`). None if it is not to be
    /// seen from here.
    pub(super) fn read(node: &Handle) -> Result<Option<Self>> {
        if let Some(setting) = setting(node)? {
            return Ok(Some(Self {
                setting,
                initial: true,
            }));
        }
        for other in netns::list()? {
            if let Some(setting) = setting(&other.handle)? {
                return Ok(Some(Self {
                    setting,
                    initial: false,
                }));
            }
        }
        Ok(None)
    }

    /// Whether the kernel makes one.
    pub(super) fn gives(self) -> bool {
        self.setting == 0 || self.setting == 1 && self.initial
    }
}

fn setting(namespace: &Handle) -> Result<Option<u32>> {
    let path = Path::new("/proc/sys/net").join(SETTING);
    let text = namespace.run(|| read(&path))?;
    let number = |text: String| {
        let number = text.trim().parse();
        number.with_context(|| format!("read {}: {text:?} is no number", path.display()))
    };
    text.map(number).transpose()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whom_the_kernel_gives_one() {
        let gives = |setting, initial| FallbackTunnels { setting, initial }.gives();
        assert!(gives(0, true) && gives(0, false));
        assert!(gives(1, true) && !gives(1, false));
        assert!(!gives(2, true) && !gives(2, false));
    }
}
