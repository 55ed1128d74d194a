//! Keys and peers of `wireguard.cali`, as Felix sets them (`felix/wireguard/wireguard.go`): a peer's block and the
//! address of its device are what is allowed through it, and its endpoint is the node.

use anyhow::{Context, Result};

use super::plan::{Node, WIREGUARD};
use crate::command;
use crate::namespace::Namespace;
use crate::wait::wait_until;

const DEVICE: &str = "wireguard.cali";

/// Gives a node's device a key of its own, its port, and the mark of its own packets.
pub(super) fn set_up(node: &Node) -> Result<()> {
    let namespace = Namespace::open(&node.namespace)?;
    let key = command::text(&command::run(namespace.command("wg").arg("genkey"))?);
    let mut set = namespace.command("wg");
    set.args(["set", DEVICE, "private-key", "/proc/self/fd/0"]);
    set.args(["listen-port", &WIREGUARD.port.to_string()]);
    set.args(["fwmark", &format!("{:#x}", WIREGUARD.mark)]);
    command::run_with_input(&mut set, &key)
        .with_context(|| format!("cannot give {DEVICE} of {} a key", node.name))?;
    Ok(())
}

/// Makes `peer` a peer of `node`, or changes what is allowed through it.
pub(super) fn connect(node: &Node, peer: &Node) -> Result<()> {
    let theirs = Namespace::open(&peer.namespace)?;
    let key = command::text(&command::run(theirs.command("wg").args([
        "show",
        DEVICE,
        "public-key",
    ]))?);
    let mut set = Namespace::open(&node.namespace)?.command("wg");
    set.args(["set", DEVICE, "peer", key.trim()]);
    set.args(["endpoint", &format!("{}:{}", peer.address, WIREGUARD.port)]);
    set.args([
        "allowed-ips",
        &format!("{},{}/32", peer.block, peer.tunnel_address),
    ]);
    command::run(&mut set)
        .with_context(|| format!("cannot make {} a WireGuard peer of {}", peer.name, node.name))?;
    Ok(())
}

/// Sends a packet through the tunnel until one is answered: nodes of a cluster have shaken hands long ago, and what is sent
/// while they do may be lost.
pub(super) fn shake_hands(node: &Node, peer: &Node) -> Result<()> {
    let namespace = Namespace::open(&node.namespace)?;
    let to = peer.tunnel_address.to_string();
    wait_until(
        format_args!("an answer of {} to {} over WireGuard", peer.name, node.name),
        || {
            let output = namespace
                .command("ping")
                .args(["-q", "-c", "1", "-W", "1", &to])
                .output()
                .context("run ping")?;
            Ok(output.status.success().then_some(()))
        },
    )
}
