//! What changes while a node is watched: notices of the kernel, and what another look at the node tells.

use std::time::{Duration, Instant};

use calitrace::{
    calico::facts_changed,
    event::Fact,
    netns,
    route::{Changes, Lookup, Monitor},
};

use crate::{
    addr, discover,
    rig::{self, Lab, POD1, Result},
};

/// In a namespace where nothing happens by itself, as carriers and duplicate address detection make it elsewhere.
pub(crate) fn a_monitor_tells_which_tables_changed() -> Result<()> {
    let name = rig::Named::new()?;
    let handle = netns::resolve(name.as_str(), &netns::list()?)?.handle;
    let mut monitor = Monitor::open(&handle)?;
    assert_eq!(monitor.drain()?, Changes::default());
    let none = Changes::default();
    for (change, expected) in [
        (
            "link add br0 type bridge",
            Changes {
                links: true,
                neighbours: true,
                ..none
            },
        ),
        (
            "addr add 192.0.2.1/24 dev br0",
            Changes {
                addresses: true,
                routes: true,
                ..none
            },
        ),
        (
            "route add blackhole 198.51.100.0/26",
            Changes { routes: true, ..none },
        ),
        (
            "neigh add 192.0.2.2 lladdr 66:00:00:00:00:01 dev br0 nud permanent",
            Changes {
                neighbours: true,
                ..none
            },
        ),
    ] {
        rig::ip(name.as_str(), change)?;
        assert_eq!(monitor.drain()?, expected, "{change}");
    }
    Ok(())
}

pub(crate) fn changes_are_told() -> Result<()> {
    let lab = Lab::up()?;
    let old = discover(&[&lab.node1])?.remove(0);
    let mut monitor = Monitor::open(&old.handle)?;
    lab.add_pod("caliaaaaaaaaaaa", "10.244.120.70")?;
    let changes = rig::wait_for("a notice of the new pod", || {
        Ok(Some(monitor.drain()?).filter(|c| c.links || c.routes))
    })?;
    assert!(changes.links, "{changes:?}");
    let new = old.refresh()?.expect("still a node");
    let added: Vec<_> = facts_changed(Some(&old), &new, 7)
        .into_iter()
        .filter_map(|fact| match fact {
            Fact::Pod(pod) => Some((pod.time, pod.addresses, pod.gone)),
            _ => None,
        })
        .collect();
    assert_eq!(added, [(7, vec![addr("10.244.120.70")], false)]);
    assert!(new.pods.iter().all(|pod| pod.pod_netns.is_some()));

    rig::ip(&lab.node1, "link del caliaaaaaaaaaaa")?;
    let last = new.refresh()?.expect("still a node");
    let gone: Vec<_> = facts_changed(Some(&new), &last, 8)
        .into_iter()
        .filter_map(|fact| match fact {
            Fact::Pod(pod) => Some(("pod", pod.gone)),
            Fact::Interface(interface) => Some(("interface", interface.gone)),
            _ => None,
        })
        .collect();
    assert_eq!(gone, [("pod", true), ("interface", true)]);
    assert!(facts_changed(Some(&last), &last, 9).is_empty());

    // Another tunnel address is another hop address.
    monitor.drain()?;
    rig::ip(&lab.node1, "addr del 10.244.120.64/32 dev vxlan.calico")?;
    rig::ip(&lab.node1, "addr add 10.244.120.99/32 dev vxlan.calico")?;
    assert!(
        rig::wait_for("a notice of the address", || Ok(
            Some(monitor.drain()?).filter(|c| c.addresses)
        ))?
        .addresses
    );
    assert_eq!(
        last.lookup.hop_address(addr(POD1.address), None)?,
        Some(addr("10.244.120.99"))
    );
    assert!(
        last.refresh()?
            .expect("still a node")
            .node
            .addresses
            .contains(&addr("10.244.120.99"))
    );
    let fresh = Lookup::open(&last.handle)?;
    assert_eq!(
        fresh.hop_address(addr(POD1.address), None)?,
        Some(addr("10.244.120.99"))
    );
    Ok(())
}

/// Measured, not judged: the number is printed.
pub(crate) fn a_refresh_with_many_pods_is_quick() -> Result<()> {
    let lab = Lab::up()?;
    lab.add_bare_workloads(110)?;
    let node = discover(&[&lab.node1])?.remove(0);
    assert_eq!(node.pods.len(), 111);
    let times = 10;
    let start = Instant::now();
    let mut node = node;
    for _ in 0..times {
        node = node.refresh()?.expect("still a node");
    }
    rig::say(&format!(
        "a refresh of a node with {} pods takes {:?}",
        node.pods.len(),
        start.elapsed() / times
    ));
    assert!(start.elapsed() > Duration::ZERO);
    Ok(())
}
