//! Addresses that lead to pods, as the rules of the nat table tell: Calico's floating IPs, and the external and load balancers'
//! addresses of services.

use std::collections::BTreeSet;

use ipnet::IpNet;

/// Chains whose rules are for such addresses, each `-d` one: `felix/rules/nat.go` (Calico v3.32), and
/// `pkg/proxy/iptables/proxier.go` (Kubernetes 1.34), where the clusters' own addresses of services are among them.
const CHAINS: [&str; 2] = ["cali-fip-dnat", "KUBE-SERVICES"];

/// Those that the text has, as `iptables-save` writes it.
#[must_use]
pub fn translated(text: &str) -> BTreeSet<IpNet> {
    let mut is_nat = false;
    let mut found = BTreeSet::new();
    for line in text.lines() {
        if let Some(table) = line.strip_prefix('*') {
            is_nat = table.trim() == "nat";
        }
        let Some(rule) = line.strip_prefix("-A ").filter(|_| is_nat) else {
            continue;
        };
        let mut words = rule.split(' ');
        if !words.next().is_some_and(|chain| CHAINS.contains(&chain)) || words.next() != Some("-d") {
            continue;
        }
        let prefix: Option<IpNet> = words.next().and_then(|word| word.parse().ok());
        found.extend(prefix.filter(|prefix| prefix.prefix_len() == prefix.max_prefix_len()));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_leads_to_pods_is_found() {
        let text = "# Generated\n*nat\n:cali-fip-dnat - [0:0]\n\
                    -A cali-fip-dnat -d 203.0.113.20/32 -j DNAT --to-destination 10.244.1.1\n\
                    -A cali-fip-snat -s 10.244.1.1/32 -d 10.244.1.1/32 -j SNAT --to-source 203.0.113.20\n\
                    -A KUBE-SERVICES -d 198.51.100.7/32 -p tcp -m tcp --dport 80 -j KUBE-EXT-X\n\
                    -A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS\n\
                    -A KUBE-SERVICES ! -d 10.0.0.0/8 -j X\nCOMMIT\n*filter\n\
                    -A KUBE-SERVICES -d 192.0.2.1/32 -j REJECT\nCOMMIT\n";
        let expected: BTreeSet<IpNet> = ["203.0.113.20/32", "198.51.100.7/32"]
            .map(|prefix| prefix.parse().unwrap())
            .into();
        assert_eq!(translated(text), expected);
        assert!(translated("").is_empty());
    }
}
