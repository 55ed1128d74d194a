//! Policies and routes that drop packets of IPv6, which have rules, sets and blocks of their own. Beside each its twin without the
//! fault.

use std::net::IpAddr;

use anyhow::{Context as _, Result, ensure};
use calitrace_tests::{Lab, Need, Options, command, lab::netfilter::Backend};
use serde_json::Value;

use crate::{
    Test,
    support::{Watch, change_nftables, goes, with},
    test,
};

pub(crate) const TESTS: &[Test] = &[
    test("a_policy_that_denies_ipv6", || policy(Backend::Nft)).needs(&[Need::Program("ipset")]),
    test("a_policy_that_denies_ipv6_by_legacy", || policy(Backend::Legacy)).needs(&[Need::Program("ipset")]),
    test("a_policy_that_denies_ipv6_by_nftables", || {
        policy(Backend::Native)
    })
    .needs(&[Need::Program("nft")]),
    test("an_unused_address_of_an_ipv6_block", blackhole),
];

const NODE: &str = "minikube-m02";

/// The traces of three pings from pod 1, each with this verdict.
fn pinged(lab: &Lab, to: IpAddr, verdict: &str) -> Result<Vec<Value>> {
    let from = lab.pod("pod1")?.address_v6.to_string();
    let watch = Watch::start(&with(lab, &["-o", "json"]))?;
    lab.ping("pod1", to, 3, &[])?;
    let packets = watch.stop()?.packets()?;
    let is_one = |packet: &Value| goes(packet, "icmpv6", &from, &to.to_string());
    let traces: Vec<Value> = packets.into_iter().filter(is_one).collect();
    ensure!(traces.len() == 3, "{traces:#?}");
    for trace in &traces {
        ensure!(trace["verdict"] == verdict, "{verdict}: {trace:#}");
    }
    Ok(traces)
}

/// Two policies for pod 2, told apart by the members of their sets alone.
fn policy(backend: Backend) -> Result<()> {
    let lab = Lab::up(&Options {
        netfilter: backend,
        ..Options::default()
    })?;
    let pod2 = lab.pod("pod2")?;
    let to = IpAddr::from(pod2.address_v6);
    pinged(&lab, to, "delivered")?;
    let denied = lab.node("minikube")?.block_v6.to_string();
    match backend {
        Backend::Native => change_nftables(&lab, NODE, &nftables(&pod2.interface, &denied))?,
        backend => {
            let sets = format!(
                "create cali60s:front hash:net family inet6\ncreate cali60s:back hash:net family inet6\n\
                 add cali60s:front {denied}\n"
            );
            command::run_with_input(&mut lab.exec(NODE, ["ipset", "restore"])?, &sets)?;
            let tool = match backend {
                Backend::Legacy => "ip6tables-legacy-restore",
                _ => "ip6tables-nft-restore",
            };
            let mut load = lab.exec(NODE, [tool, "--noflush", "-w", "10"])?;
            command::run_with_input(&mut load, &ip6tables(&pod2.interface))?;
        }
    }
    for trace in pinged(&lab, to, "dropped")? {
        let drop = &trace["drop"];
        let culprits = drop["culprits"].as_array().context("culprits")?;
        ensure!(
            drop["node"] == NODE && drop["policy"] == "default/front" && culprits.len() == 1,
            "{trace:#}"
        );
        ensure!(culprits[0]["direction"] == "ingress", "{trace:#}");
    }
    Ok(())
}

/// The way of a packet to a pod through Felix' chains (`felix/rules/{static,dispatch,endpoints,policy}.go`).
fn ip6tables(interface: &str) -> String {
    let policies = ["back", "front"].map(|name| {
        let chain = format!("cali-pi-np/default/{name}");
        format!(
            ":{chain} -\n\
             -A cali-tw-{interface} -m mark --mark 0x0/0x20000 -j {chain}\n\
             -A {chain} -m set --match-set cali60s:{name} src \
             -m comment --comment \"NetworkPolicy default/{name} ingress\" -j MARK --set-xmark 0x40000/0x40000\n\
             -A {chain} -m mark --mark 0x40000/0x40000 -j DROP\n"
        )
    });
    format!(
        "*filter\n:cali-FORWARD -\n:cali-to-wl-dispatch -\n:cali-tw-{interface} -\n:cali-pri-kns.default -\n\
         -A FORWARD -j cali-FORWARD\n\
         -A cali-FORWARD -o cali+ -j cali-to-wl-dispatch\n\
         -A cali-to-wl-dispatch -o {interface} -g cali-tw-{interface}\n\
         -A cali-tw-{interface} -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\n\
         -A cali-tw-{interface} -m conntrack --ctstate INVALID -j DROP\n\
         -A cali-tw-{interface} -j MARK --set-xmark 0x0/0x30000\n\
         {}\
         -A cali-tw-{interface} -j cali-pri-kns.default\n\
         -A cali-tw-{interface} -m mark --mark 0x10000/0x10000 -j RETURN\n\
         -A cali-tw-{interface} -m comment --comment \"Drop if no profiles matched\" -j DROP\n\
         -A cali-pri-kns.default -j MARK --set-xmark 0x10000/0x10000\nCOMMIT\n",
        policies.concat()
    )
}

/// The same in Calico's nftables mode.
fn nftables(interface: &str, denied: &str) -> String {
    let (pod, profile) = (
        format!("filter-cali-tw-{interface}"),
        "filter-cali-pri-kns.default",
    );
    let policies = ["back", "front"].map(|name| {
        let chain = format!("filter-cali-pi-np/default/{name}");
        format!(
            "add set ip6 calico cali60s-{name} {{ type ipv6_addr; flags interval; }}\n\
             add chain ip6 calico {chain}\n\
             add rule ip6 calico {pod} meta mark & 0x20000 == 0 counter jump {chain}\n\
             add rule ip6 calico {chain} ip6 saddr @cali60s-{name} counter meta mark set mark or 0x40000 \
             comment \"cali:1; NetworkPolicy default/{name} ingress\"\n\
             add rule ip6 calico {chain} meta mark & 0x40000 == 0x40000 counter drop comment \"cali:2;\"\n"
        )
    });
    format!(
        "add table ip6 calico\n\
         add chain ip6 calico filter-FORWARD {{ type filter hook forward priority 0; }}\n\
         add chain ip6 calico filter-cali-to-wl-dispatch\nadd chain ip6 calico {pod}\nadd chain ip6 calico {profile}\n\
         add map ip6 calico filter-cali-to-wl-dispatch {{ type ifname : verdict; }}\n\
         add rule ip6 calico filter-FORWARD oifname cali* counter jump filter-cali-to-wl-dispatch\n\
         add rule ip6 calico filter-cali-to-wl-dispatch oifname vmap @filter-cali-to-wl-dispatch\n\
         add element ip6 calico filter-cali-to-wl-dispatch {{ \"{interface}\" : goto {pod} }}\n\
         add rule ip6 calico {pod} ct state related,established counter accept\n\
         add rule ip6 calico {pod} ct state invalid counter drop\n\
         add rule ip6 calico {pod} counter meta mark set mark & 0xfffcffff\n\
         {}\
         add element ip6 calico cali60s-front {{ {denied} }}\n\
         add rule ip6 calico {pod} counter jump {profile}\n\
         add rule ip6 calico {pod} meta mark & 0x10000 == 0x10000 counter return\n\
         add rule ip6 calico {pod} counter drop comment \"cali:3; Drop if no profiles matched\"\n\
         add rule ip6 calico {profile} counter meta mark set mark or 0x10000\n",
        policies.concat()
    )
}

/// As for IPv4: the block is a blackhole but for its pods.
fn blackhole() -> Result<()> {
    let lab = Lab::up(&Options::default())?;
    pinged(&lab, lab.pod("pod2")?.address_v6.into(), "delivered")?;
    let block = lab.node(NODE)?.block_v6;
    let unused = block.hosts().last().context("an address that no pod has")?;
    for trace in pinged(&lab, unused.into(), "dropped")? {
        let drop = &trace["drop"];
        ensure!(
            drop["node"] == NODE
                && drop["route"]["kind"] == "blackhole"
                && drop["route"]["prefix"] == block.to_string(),
            "{trace:#}"
        );
    }
    Ok(())
}
