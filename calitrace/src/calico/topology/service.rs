//! What the nat table makes of an address: pure, from the rules as `iptables-save` writes them. Kube-proxy's chains lead from
//! a service's address over `KUBE-SVC-…` to one `KUBE-SEP-…` for each pod behind it
//! (`pkg/proxy/iptables/proxier.go`, Kubernetes 1.34); Calico's floating IPs have one rule (`felix/rules/nat.go`).

use std::net::IpAddr;

use serde::Serialize;

/// A service's address that stands for a pod's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Service {
    /// The address that the packet is sent to.
    pub address: IpAddr,
    /// The ports that lead to this pod.
    pub ports: Vec<ServicePort>,
}

/// A port of a service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ServicePort {
    /// Protocol, as the rules name it; null for any.
    pub proto: Option<String>,
    /// The port; null for any.
    pub port: Option<u16>,
    /// The pod's port; null where it is the same.
    pub target: Option<u16>,
}

/// How deep chains may call each other; kube-proxy's do twice.
const DEPTH: usize = 8;

/// Where packets to an address are sent instead: the pods' addresses, each with the ports that lead there.
pub(super) fn translations(rules: &str, address: IpAddr) -> Vec<(IpAddr, Service)> {
    let lines: Vec<Vec<&str>> = nat(rules).map(|line| line.split_whitespace().collect()).collect();
    let mut found: Vec<(IpAddr, Service)> = Vec::new();
    for line in lines.iter().filter(|line| is_for(line, address)) {
        let port = after(line, "--dport").and_then(|port| port.parse().ok());
        let proto = after(line, "-p").map(str::to_owned);
        for (to, target) in targets(&lines, line, DEPTH) {
            let port = ServicePort {
                proto: proto.clone(),
                port,
                target,
            };
            let known = found.iter_mut().find(|(known, _)| *known == to);
            match known {
                Some((_, service)) if service.ports.contains(&port) => {}
                Some((_, service)) => service.ports.push(port),
                None => found.push((
                    to,
                    Service {
                        address,
                        ports: vec![port],
                    },
                )),
            }
        }
    }
    found
}

/// Whether a rule rejects what is sent to the address: that is what kube-proxy makes of a service without end points.
pub(super) fn is_rejected(rules: &str, address: IpAddr) -> bool {
    rules.lines().any(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        is_for(&words, address) && after(&words, "-j") == Some("REJECT")
    })
}

fn nat(rules: &str) -> impl Iterator<Item = &str> {
    let mut inside = false;
    rules.lines().filter(move |line| {
        if let Some(table) = line.strip_prefix('*') {
            inside = table == "nat";
        }
        inside
    })
}

/// A rule for this destination alone.
fn is_for(line: &[&str], address: IpAddr) -> bool {
    let at = line.iter().position(|word| *word == "-d");
    let Some(at) = at.filter(|at| *at == 0 || line[at - 1] != "!") else {
        return false;
    };
    let text = line.get(at + 1).and_then(|text| text.split('/').next());
    text.and_then(|text| text.parse().ok()) == Some(address)
}

/// Where a rule sends a packet, itself or by the chains that it jumps to.
fn targets(lines: &[Vec<&str>], line: &[&str], depth: usize) -> Vec<(IpAddr, Option<u16>)> {
    match after(line, "-j").or_else(|| after(line, "-g")) {
        Some("DNAT") => after(line, "--to-destination")
            .and_then(destination)
            .into_iter()
            .collect(),
        Some(chain) if depth > 0 => lines
            .iter()
            .filter(|inner| after(inner, "-A") == Some(chain))
            .flat_map(|inner| targets(lines, inner, depth - 1))
            .collect(),
        _ => Vec::new(),
    }
}

/// `10.244.205.193:8080`, `[fd00::1]:8080`, or an address alone.
fn destination(text: &str) -> Option<(IpAddr, Option<u16>)> {
    if let Ok(address) = text.parse() {
        return Some((address, None));
    }
    let socket: std::net::SocketAddr = text.parse().ok()?;
    Some((socket.ip(), Some(socket.port())))
}

fn after<'a>(line: &[&'a str], word: &str) -> Option<&'a str> {
    let at = line.iter().position(|known| *known == word)?;
    line.get(at + 1).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As kube-proxy writes it: a service with two ports and two pods behind one of them, and one without.
    const RULES: &str = "\
*filter
:KUBE-SERVICES - [0:0]
-A KUBE-SERVICES -d 10.96.0.20/32 -p tcp -m comment --comment \"default/empty has no endpoints\" -m tcp --dport 80 -j REJECT --reject-with icmp-port-unreachable
COMMIT
*nat
:KUBE-SERVICES - [0:0]
-A KUBE-SERVICES -d 10.96.0.10/32 -p udp -m comment --comment \"kube-system/kube-dns:dns cluster IP\" -m udp --dport 53 -j KUBE-SVC-TCOU7JCQXEZGVUNU
-A KUBE-SERVICES -d 10.96.0.10/32 -p tcp -m tcp --dport 9153 -j KUBE-SVC-JD5MR3NA4I4DYORP
-A KUBE-SVC-TCOU7JCQXEZGVUNU ! -s 10.244.0.0/16 -d 10.96.0.10/32 -p udp -m udp --dport 53 -j KUBE-MARK-MASQ
-A KUBE-SVC-TCOU7JCQXEZGVUNU -m statistic --mode random --probability 0.50000000000 -j KUBE-SEP-IT2ZTR26TO4XFPTO
-A KUBE-SVC-TCOU7JCQXEZGVUNU -j KUBE-SEP-YIL6JZP7A3QYXJU2
-A KUBE-SVC-JD5MR3NA4I4DYORP -j KUBE-SEP-N4G2XR5TDX7PQE7P
-A KUBE-SEP-IT2ZTR26TO4XFPTO -s 10.244.0.2/32 -j KUBE-MARK-MASQ
-A KUBE-SEP-IT2ZTR26TO4XFPTO -p udp -m udp -j DNAT --to-destination 10.244.0.2:53
-A KUBE-SEP-YIL6JZP7A3QYXJU2 -p udp -m udp -j DNAT --to-destination 10.244.0.3:53
-A KUBE-SEP-N4G2XR5TDX7PQE7P -p tcp -m tcp -j DNAT --to-destination 10.244.0.2:9153
-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000
-A cali-fip-dnat -d 203.0.113.9/32 -j DNAT --to-destination 10.244.0.7
-A OTHER ! -d 203.0.113.10/32 -j DNAT --to-destination 10.244.0.8
COMMIT
";

    fn told(address: &str) -> Vec<String> {
        let found = translations(RULES, address.parse().unwrap());
        let port = |port: &ServicePort| format!("{:?}/{:?}→{:?}", port.proto, port.port, port.target);
        let line = |(to, service): &(IpAddr, Service)| {
            let ports: Vec<String> = service.ports.iter().map(port).collect();
            format!("{to} {}", ports.join(" "))
        };
        found.iter().map(line).collect()
    }

    #[test]
    fn a_service_leads_to_each_pod_behind_it() {
        assert_eq!(
            told("10.96.0.10"),
            [
                "10.244.0.2 Some(\"udp\")/Some(53)→Some(53) Some(\"tcp\")/Some(9153)→Some(9153)",
                "10.244.0.3 Some(\"udp\")/Some(53)→Some(53)",
            ]
        );
        assert_eq!(told("203.0.113.9"), ["10.244.0.7 None/None→None"]);
    }

    #[test]
    fn what_the_table_does_not_name_leads_nowhere() {
        for address in ["10.96.0.20", "10.96.0.1", "203.0.113.10", "10.244.0.2"] {
            assert_eq!(told(address), [""; 0], "{address}");
        }
        assert!(is_rejected(RULES, "10.96.0.20".parse().unwrap()));
        assert!(!is_rejected(RULES, "10.96.0.10".parse().unwrap()));
    }
}
