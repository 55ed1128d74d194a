//! Paths between two places for people: the lines that traceroute would print, and under each the devices there.

use std::{
    io::{Result, Write},
    net::IpAddr,
};

use super::{Outcome, Passage, Path, Service, text};

/// Of IPv4's and IPv6's header and that of ICMP, in bytes: what `ping -s` does not count.
const PING_HEADERS: [u32; 2] = [20 + 8, 40 + 8];

pub(super) fn write(paths: &[Path], out: &mut dyn Write) -> Result<()> {
    for (at, path) in paths.iter().enumerate() {
        if at > 0 {
            writeln!(out)?;
        }
        write_path(path, out)?;
    }
    Ok(())
}

fn write_path(path: &Path, out: &mut dyn Write) -> Result<()> {
    writeln!(out, "{}", title(path))?;
    write_devices(path, 0, out)?;
    for (hop, line) in path.hops.iter().zip(text::hop_lines(path)) {
        writeln!(out, "{line}")?;
        write_devices(path, hop.ttl, out)?;
    }
    if let Some(ending) = text::ending(path) {
        writeln!(out, "    {ending}")?;
    }
    writeln!(out)?;
    for line in remarks(path) {
        writeln!(out, "  {line}")?;
    }
    Ok(())
}

fn title(path: &Path) -> String {
    let end = |pod: &Option<String>, address| match pod {
        Some(pod) => format!("{pod} ({address})"),
        None => format!("{address}"),
    };
    let service = path.service.as_ref();
    let ends = [
        Some(end(&path.from.pod, path.from.address)),
        service.map(|service| format!("service {}", service.address)),
        Some(end(&path.to.pod, path.to.address)),
    ];
    let ends: Vec<String> = ends.into_iter().flatten().collect();
    let encap = path
        .encap
        .map_or_else(String::new, |kind| format!("   {}", text::encap(kind)));
    format!("{}   mtu {}{encap}", ends.join(" → "), path.mtu)
}

fn write_devices(path: &Path, hop: u8, out: &mut dyn Write) -> Result<()> {
    let here: Vec<String> = path
        .devices
        .iter()
        .filter(|device| device.hop == hop)
        .map(described)
        .collect();
    if here.is_empty() {
        return Ok(());
    }
    writeln!(out, "    {}", here.join(" → "))
}

/// `vxlan.calico (mtu 1450) VXLAN 192.168.49.2 → 192.168.49.3`.
fn described(device: &Passage) -> String {
    let place = device
        .pod
        .as_ref()
        .map_or_else(String::new, |pod| format!(" in {pod}"));
    let wraps = device.encap.map_or_else(String::new, |outer| {
        let address =
            |address: Option<IpAddr>| address.map_or_else(|| "*".to_owned(), |address| address.to_string());
        let (src, dst) = (address(outer.src), address(outer.dst));
        format!(" {} {src} → {dst}", text::encap(outer.kind))
    });
    format!("{}{place} (mtu {}){wraps}", device.device, device.mtu)
}

/// What there is to say about the path as a whole.
fn remarks(path: &Path) -> Vec<String> {
    let mut lines = Vec::new();
    lines.extend(path.service.as_ref().map(service));
    let headers = PING_HEADERS[usize::from(path.to.address.is_ipv6())];
    if !matches!(path.outcome, Outcome::Blackhole | Outcome::Unreachable) && path.mtu < u32::MAX {
        lines.push(format!(
            "largest packet that passes whole: {} bytes (ping -M do -s {}){}",
            path.mtu,
            path.mtu.saturating_sub(headers),
            limit(path)
        ));
    }
    if path.unfragmented < path.mtu {
        lines.push(format!(
            "above {} bytes its outer packets are fragmented between the nodes",
            path.unfragmented
        ));
    }
    lines.push(match path.masquerade {
        Some(masquerade) if masquerade.applies => match masquerade.address {
            Some(address) => format!("masqueraded: its source becomes {address} on the first node"),
            None => "masqueraded: it has another source from the first node on".to_owned(),
        },
        Some(_) => "not masqueraded: it keeps its source".to_owned(),
        None => "masqueraded or not: that is not known here".to_owned(),
    });
    if !path.not_seen.is_empty() {
        lines.push("calitrace would not see:".to_owned());
        lines.extend(path.not_seen.iter().map(|line| format!("  {line}")));
    }
    lines
}

/// Which device sets the limit: the first one.
fn limit(path: &Path) -> String {
    let mut limits = path.devices.iter().filter(|device| !device.fragments);
    let device = limits.find(|device| device.room() == Some(path.mtu));
    match device {
        Some(device) if device.overhead > 0 => format!(
            ", as {} on {} takes {}, {} of them for outer headers",
            device.device, device.node, device.mtu, device.overhead
        ),
        Some(Passage {
            device,
            pod: Some(pod),
            ..
        }) => format!(", as {device} in {pod} takes no more"),
        Some(device) => format!(", as {} on {} takes no more", device.device, device.node),
        None => ", as a route says".to_owned(),
    }
}

/// `10.96.0.10 stands for this pod: udp 53, tcp 80 → 8080`.
fn service(service: &Service) -> String {
    let ports = service.ports.iter().map(|port| {
        let proto = port.proto.as_deref().unwrap_or("any protocol");
        let number = port.port.map_or_else(String::new, |number| format!(" {number}"));
        match port.target {
            Some(target) if Some(target) != port.port => format!("{proto}{number} → {target}"),
            _ => format!("{proto}{number}"),
        }
    });
    let ports: Vec<String> = ports.collect();
    format!(
        "{} stands for this pod: {}. Traceroute prints it in every line, as the routers' answers are translated, too",
        service.address,
        ports.join(", ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        calico::topology::{Certainty, End, Masquerade, Outer, ServicePort, Step},
        event::EncapKind,
    };

    fn step(ttl: u8, address: Option<&str>, node: &str, pod: Option<&str>, certainty: Certainty) -> Step {
        Step {
            ttl,
            address: address.map(|address| address.parse().unwrap()),
            node: Some(node.to_owned()),
            pod: pod.map(str::to_owned),
            certainty,
        }
    }

    fn device(hop: u8, name: &str, mtu: u32) -> Passage {
        Passage {
            hop,
            node: "minikube".to_owned(),
            pod: (hop == 0).then(|| "default/web-0".to_owned()),
            device: name.to_owned(),
            mtu,
            overhead: 0,
            fragments: false,
            encap: None,
        }
    }

    /// From one node alone, with IPIP and an uplink that is too small, to a pod behind a service.
    fn path() -> Path {
        let to: IpAddr = "10.244.205.193".parse().unwrap();
        let outer = Outer {
            kind: EncapKind::Ipip,
            src: "192.168.49.2".parse().ok(),
            dst: "192.168.49.3".parse().ok(),
        };
        Path {
            from: End {
                address: "10.244.120.67".parse().unwrap(),
                pod: Some("default/web-0".to_owned()),
                node: Some("minikube".to_owned()),
            },
            to: End {
                address: to,
                pod: None,
                node: Some("192.168.49.3".to_owned()),
            },
            mtu: 1380,
            unfragmented: 1380,
            encap: Some(EncapKind::Ipip),
            hops: vec![
                step(1, Some("10.244.120.64"), "minikube", None, Certainty::Known),
                step(2, None, "192.168.49.3", None, Certainty::Inferred),
                step(3, Some("10.96.0.10"), "192.168.49.3", None, Certainty::Inferred),
            ],
            devices: vec![
                device(0, "eth0", 1480),
                device(1, "cali8d02ed71817", 1480),
                Passage {
                    encap: Some(outer),
                    ..device(1, "tunl0", 1480)
                },
                Passage {
                    overhead: 20,
                    ..device(1, "eth0", 1400)
                },
            ],
            outcome: Outcome::Left,
            service: Some(Service {
                address: "10.96.0.10".parse().unwrap(),
                ports: vec![
                    ServicePort {
                        proto: Some("tcp".to_owned()),
                        port: Some(80),
                        target: Some(8080),
                    },
                    ServicePort {
                        proto: Some("udp".to_owned()),
                        port: Some(53),
                        target: Some(53),
                    },
                ],
            }),
            masquerade: Some(Masquerade {
                applies: false,
                address: None,
            }),
            not_seen: vec!["Routers between the nodes.".to_owned()],
        }
    }

    fn told(path: Path) -> String {
        let mut text = Vec::new();
        write(&[path], &mut text).unwrap();
        String::from_utf8(text).unwrap()
    }

    #[test]
    fn a_path_is_told_line_by_line() {
        insta::assert_snapshot!(told(path()), @r"
        default/web-0 (10.244.120.67) → service 10.96.0.10 → 10.244.205.193   mtu 1380   IPIP
            eth0 in default/web-0 (mtu 1480)
         1  10.244.120.64  minikube
            cali8d02ed71817 (mtu 1480) → tunl0 (mtu 1480) IPIP 192.168.49.2 → 192.168.49.3 → eth0 (mtu 1400)
         2  *              192.168.49.3  (inferred)
         3  10.96.0.10     192.168.49.3  (inferred)

          10.96.0.10 stands for this pod: tcp 80 → 8080, udp 53. Traceroute prints it in every line, as the routers' answers are translated, too
          largest packet that passes whole: 1380 bytes (ping -M do -s 1352), as eth0 on minikube takes 1400, 20 of them for outer headers
          not masqueraded: it keeps its source
          calitrace would not see:
            Routers between the nodes.
        ");
    }

    #[test]
    fn what_is_not_known_and_what_is_cut_is_said() {
        let mut path = path();
        path.masquerade = None;
        path.mtu = 1450;
        let text = told(path.clone());
        for line in [
            "  masqueraded or not: that is not known here",
            "  above 1380 bytes its outer packets are fragmented between the nodes",
            "1450 bytes (ping -M do -s 1422), as a route says",
        ] {
            assert!(text.contains(line), "{line:?} is missing in:\n{text}");
        }
        path.outcome = Outcome::Blackhole;
        let text = told(path);
        assert!(
            text.contains("    ends in a blackhole") && !text.contains("largest"),
            "{text}"
        );
    }
}
