//! Which hooks belong on which interfaces, and in which order they are attached.

use rustc_hash::FxHashMap;

use crate::{
    calico::NodeView,
    event::{Hook, Netns, Place, Role},
    kernel::hooks::{Attach, TABLE},
};

/// A hook on an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Site {
    /// The node.
    pub(super) netns: Netns,
    /// Interface index there.
    pub(super) ifindex: u32,
    /// The hook.
    pub(super) hook: Hook,
}

/// What to detach and what to attach so that the sites are the wanted ones.
#[derive(Debug, Default)]
pub(super) struct Changes {
    /// No longer wanted: the interface is gone, or has another role.
    pub(super) detach: Vec<Site>,
    /// Not there yet, with the interface's name, the most useful first.
    pub(super) attach: Vec<(Site, String)>,
}

/// Compares the sites of `views` with those that exist. `first` names interfaces that come before all others.
pub(super) fn changes(views: &[NodeView], existing: &FxHashMap<Site, String>, first: &[String]) -> Changes {
    let wanted: FxHashMap<Site, String> = views.iter().flat_map(sites).collect();
    let detach = existing
        .iter()
        .filter(|(site, name)| wanted.get(site) != Some(name))
        .map(|(site, _)| *site);
    let mut attach: Vec<(Site, String)> = wanted
        .iter()
        .filter(|(site, name)| existing.get(site) != Some(name))
        .map(|(site, name)| (*site, name.clone()))
        .collect();
    // A TCX attach takes 12 to 20 ms: what every packet passes, and what the filter names, comes first.
    attach.sort_by_key(|(site, name)| {
        (
            !first.contains(name),
            site.hook.place() == Place::Workload,
            site.netns,
            site.ifindex,
            site.hook,
        )
    });
    Changes {
        detach: detach.collect(),
        attach,
    }
}

fn sites(view: &NodeView) -> impl Iterator<Item = (Site, String)> {
    let netns = view.netns();
    view.interfaces.iter().flat_map(move |interface| {
        let place = match interface.role {
            Role::Workload => Some(Place::Workload),
            Role::Tunnel => Some(Place::Tunnel),
            Role::Uplink => Some(Place::Uplink),
            Role::Other => None,
        };
        TABLE
            .iter()
            .filter(move |row| row.attach == Attach::Tc && Some(row.hook.place()) == place)
            .map(move |row| {
                (
                    Site {
                        netns,
                        ifindex: interface.ifindex,
                        hook: row.hook,
                    },
                    interface.name.clone(),
                )
            })
    })
}
