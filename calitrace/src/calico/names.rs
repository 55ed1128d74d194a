//! Which pod is behind a workload interface: pure readers of what Felix, the CNI plugin and the kubelet leave on a node's
//! disk. The input is not trusted: what does not look like a Kubernetes name is no name.

use std::net::IpAddr;

use ipnet::IpNet;
use serde::Deserialize;
use sha1::{Digest as _, Sha1};

/// `IFNAMSIZ` without its terminating zero.
const INTERFACE_NAME_BYTES: usize = 15;

/// A pod's name as a file tells it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Named {
    /// The workload interface, where the file tells it.
    pub interface: Option<String>,
    /// Kubernetes namespace.
    pub namespace: String,
    /// Pod.
    pub pod: String,
    /// The pod's addresses, where the file tells them.
    pub addresses: Vec<IpAddr>,
}

impl Named {
    fn new(namespace: &str, pod: &str) -> Option<Self> {
        (kubernetes_name(namespace) && kubernetes_name(pod)).then(|| Self {
            interface: None,
            namespace: namespace.to_owned(),
            pod: pod.to_owned(),
            addresses: Vec::new(),
        })
    }

    /// `namespace/name`.
    pub fn full_name(&self) -> String {
        format!("{}/{}", self.namespace, self.pod)
    }

    /// The names that its workload interface may have: the one that the file tells, else what the SHA-1 rule says for
    /// each prefix.
    pub fn interfaces(&self, prefixes: &[String]) -> Vec<String> {
        match &self.interface {
            Some(interface) => vec![interface.clone()],
            None => prefixes
                .iter()
                .map(|prefix| workload_interface(prefix, &self.namespace, &self.pod))
                .collect(),
        }
    }
}

/// The interface name of a pod: the prefix and the first 11 hexadecimal digits of SHA-1 over `namespace.pod`
/// (libcalico-go/lib/backend/k8s/conversion/workload_endpoint_default.go, `VethNameForWorkload`, Calico 3.34).
pub fn workload_interface(prefix: &str, namespace: &str, pod: &str) -> String {
    let digest = Sha1::digest(format!("{namespace}.{pod}"));
    let digits = digest
        .iter()
        .take(6)
        .flat_map(|byte| [byte >> 4, byte & 0xf])
        .take(11);
    let mut name = prefix.to_owned();
    name.extend(digits.filter_map(|digit| char::from_digit(digit.into(), 16)));
    name
}

/// A file of `/var/run/calico/endpoint-status`. Its name is `k8s NAMESPACE%2FPOD ENDPOINT`, its text
/// `{"ifaceName": …, "ipv4Nets": […], "ipv6Nets": […]}` (libcalico-go/lib/names/workloadendpointstatus.go, felix/statusrep,
/// Calico 3.30 and later).
pub fn endpoint_status(file_name: &str, text: &[u8]) -> Option<Named> {
    #[derive(Deserialize)]
    struct Status {
        #[serde(rename = "ifaceName")]
        interface: String,
        #[serde(rename = "ipv4Nets", default)]
        v4: Option<Vec<String>>,
        #[serde(rename = "ipv6Nets", default)]
        v6: Option<Vec<String>>,
    }
    let mut named = endpoint_file_name(file_name)?;
    let status: Status = serde_json::from_slice(text).ok()?;
    let networks = [status.v4, status.v6].into_iter().flatten().flatten();
    named.addresses = networks.filter_map(|network| host_address(&network)).collect();
    named.interface = Some(interface_name(status.interface)?);
    Some(named)
}

/// What the name of an endpoint-status file alone tells.
pub fn endpoint_file_name(file_name: &str) -> Option<Named> {
    let mut parts = file_name.split(' ');
    let (orchestrator, workload, _endpoint) = (parts.next()?, parts.next()?, parts.next()?);
    if percent_decoded(orchestrator)? != "k8s" || parts.next().is_some() {
        return None;
    }
    let workload = percent_decoded(workload)?;
    let (namespace, pod) = workload.split_once('/')?;
    Named::new(namespace, pod)
}

/// A file of libcni's cache, `/var/lib/cni/results` (libcni/api.go, `cachedInfo`, kind `cniCacheV1`).
pub fn cni_result(text: &[u8]) -> Option<Named> {
    #[derive(Deserialize)]
    struct Cached {
        kind: String,
        #[serde(rename = "cniArgs", default)]
        arguments: Option<Vec<(String, String)>>,
        #[serde(default)]
        result: Option<Outcome>,
    }
    #[derive(Deserialize)]
    struct Outcome {
        #[serde(default)]
        interfaces: Option<Vec<Device>>,
        #[serde(default)]
        ips: Option<Vec<Ip>>,
    }
    #[derive(Deserialize)]
    struct Device {
        name: String,
        #[serde(default)]
        sandbox: Option<String>,
    }
    #[derive(Deserialize)]
    struct Ip {
        address: String,
    }
    let cached: Cached = serde_json::from_slice(text).ok()?;
    if cached.kind != "cniCacheV1" {
        return None;
    }
    let arguments = cached.arguments?;
    let argument = |key| {
        arguments
            .iter()
            .find(|(name, _)| name == key)
            .map(|(_, value)| value.as_str())
    };
    let mut named = Named::new(argument("K8S_POD_NAMESPACE")?, argument("K8S_POD_NAME")?)?;
    if let Some(result) = cached.result {
        // The host's end is the device outside any sandbox.
        let outside = |device: &Device| device.sandbox.as_deref().is_none_or(str::is_empty);
        let host_end = result.interfaces.unwrap_or_default().into_iter().find(outside);
        named.interface = host_end.and_then(|device| interface_name(device.name));
        named.addresses = result
            .ips
            .unwrap_or_default()
            .iter()
            .filter_map(|ip| host_address(&ip.address))
            .collect();
    }
    Some(named)
}

/// A directory of `/var/log/pods`: `NAMESPACE_POD_UID` (kubelet, `BuildPodLogsDirectory`).
pub fn pod_log_directory(name: &str) -> Option<Named> {
    let mut parts = name.split('_');
    let (namespace, pod, uid) = (parts.next()?, parts.next()?, parts.next()?);
    if uid.is_empty() || parts.next().is_some() {
        return None;
    }
    Named::new(namespace, pod)
}

/// A node's name as its files tell it: one line, a DNS name.
pub fn node_name(text: &[u8]) -> Option<String> {
    let name = std::str::from_utf8(text).ok()?.trim_ascii();
    host_label(name).then(|| name.to_owned())
}

/// The service prefixes in a kube-apiserver manifest (`--service-cluster-ip-range=10.96.0.0/12,fd00::/108`).
pub fn service_ranges(manifest: &[u8]) -> Vec<IpNet> {
    let text = String::from_utf8_lossy(manifest);
    let value = text.lines().find_map(|line| {
        let line = line.trim().trim_start_matches("- ").trim_matches(['"', '\'']);
        line.strip_prefix("--service-cluster-ip-range=")
    });
    value
        .unwrap_or_default()
        .split(',')
        .filter_map(|range| range.trim().parse().ok())
        .collect()
}

/// RFC 1123 subdomains, as Kubernetes demands of pods and namespaces.
fn kubernetes_name(name: &str) -> bool {
    let allowed =
        |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'-' | b'.');
    (1..=253).contains(&name.len()) && name.bytes().all(allowed)
}

/// As above, in either case: hosts are named more freely.
pub fn host_label(name: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_');
    (1..=253).contains(&name.len()) && name.bytes().all(allowed)
}

fn interface_name(name: String) -> Option<String> {
    let allowed = |byte: u8| byte.is_ascii_graphic() && byte != b'/';
    ((1..=INTERFACE_NAME_BYTES).contains(&name.len()) && name.bytes().all(allowed)).then_some(name)
}

/// An address, with or without a prefix length.
fn host_address(text: &str) -> Option<IpAddr> {
    text.split_once('/')
        .map_or(text, |(address, _)| address)
        .parse()
        .ok()
}

/// Undoes Go's `url.PathEscape`.
fn percent_decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, tail)) = rest.split_first() {
        rest = tail;
        if byte == b'%' {
            let (digits, tail) = rest.split_at_checked(2)?;
            bytes.push(u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?);
            rest = tail;
        } else {
            bytes.push(byte);
        }
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATUS: &[u8] = br#"{"ifaceName":"cali8d02ed71817","mac":"6e:1c:2f:00:00:01","ipv4Nets":["10.244.120.67/32"],"ipv6Nets":[]}"#;
    const CNI: &[u8] = br#"{"kind":"cniCacheV1","containerId":"1f","config":"e30=","ifName":"eth0","networkName":"k8s-pod-network",
        "cniArgs":[["IgnoreUnknown","1"],["K8S_POD_NAMESPACE","default"],["K8S_POD_NAME","busybox-f5945bfb5-mwgr6"],
        ["K8S_POD_INFRA_CONTAINER_ID","1f"]],"capabilityArgs":{},"result":{"cniVersion":"0.3.1","dns":{},
        "interfaces":[{"name":"cali79f33e4263e"},{"name":"eth0","sandbox":"/var/run/netns/cni-1"}],
        "ips":[{"interface":1,"version":"4","address":"10.244.205.193/32"}]}}"#;

    fn cali() -> Vec<String> {
        vec!["cali".to_owned()]
    }

    #[test]
    fn golden_interface_names() {
        assert_eq!(
            workload_interface("cali", "default", "busybox-f5945bfb5-mw26t"),
            "cali8d02ed71817"
        );
        assert_eq!(
            workload_interface("cali", "default", "busybox-f5945bfb5-mwgr6"),
            "cali79f33e4263e"
        );
        // Calico's own unit test.
        assert_eq!(
            workload_interface("cali", "namespace", "podname"),
            "cali82111e10a96"
        );
        assert_eq!(
            workload_interface("azv", "namespace", "podname"),
            "azv82111e10a96"
        );
    }

    #[test]
    fn felix_endpoint_status() {
        let named = endpoint_status("k8s default%2Fbusybox-f5945bfb5-mw26t eth0", STATUS).unwrap();
        assert_eq!(named.full_name(), "default/busybox-f5945bfb5-mw26t");
        assert_eq!(named.interface.as_deref(), Some("cali8d02ed71817"));
        assert_eq!(named.addresses, ["10.244.120.67".parse::<IpAddr>().unwrap()]);
        assert_eq!(named.interfaces(&cali()), ["cali8d02ed71817"]);
    }

    #[test]
    fn cni_cache() {
        let named = cni_result(CNI).unwrap();
        assert_eq!(named.full_name(), "default/busybox-f5945bfb5-mwgr6");
        assert_eq!(named.interface.as_deref(), Some("cali79f33e4263e"));
        assert_eq!(named.addresses, ["10.244.205.193".parse::<IpAddr>().unwrap()]);
    }

    #[test]
    fn cni_cache_without_interfaces_falls_back_on_the_rule() {
        let text = String::from_utf8_lossy(CNI).replace("interfaces", "others");
        let named = cni_result(text.as_bytes()).unwrap();
        assert_eq!(named.interface, None);
        assert_eq!(named.interfaces(&cali()), ["cali79f33e4263e"]);
    }

    #[test]
    fn kubelet_log_directory() {
        let named = pod_log_directory("kube-system_coredns-7c65d6cfc9-x2x2x_6f1e").unwrap();
        assert_eq!(named.full_name(), "kube-system/coredns-7c65d6cfc9-x2x2x");
    }

    #[test]
    fn hostile_input_is_no_name() {
        for name in [
            "",
            "k8s",
            "k8s a%2Fb",
            "k8s a%2Fb eth0 more",
            "k8s a%2 eth0",
            "k8s a%2F%1b[31mred eth0",
            "k8s ..%2F..%2Fetc%2Fpasswd eth0",
            "k8s a%2F%ff eth0",
            "openstack a%2Fb eth0",
            "k8s %2F eth0",
        ] {
            assert_eq!(endpoint_status(name, STATUS), None, "{name}");
        }
        let good = "k8s default%2Fpod eth0";
        let deep = "[".repeat(100_000);
        for text in [
            "",
            "null",
            "[]",
            "{}",
            r#"{"ifaceName":7}"#,
            r#"{"ifaceName":"../../x"}"#,
            r#"{"ifaceName":"far-too-long-for-an-interface"}"#,
            "{\"ifaceName\":\"cali\\u001b\"}",
            &deep,
        ] {
            assert_eq!(endpoint_status(good, text.as_bytes()), None, "{text:.40}");
            assert_eq!(cni_result(text.as_bytes()), None, "{text:.40}");
        }
        let text = String::from_utf8_lossy(CNI).replace("\"default\"", "\"de\\nfault\"");
        assert_eq!(cni_result(text.as_bytes()), None);
        for name in ["a_b", "a_b_", "_b_c", "a_B_c", "a_b_c_d", "a_\u{1b}_c"] {
            assert_eq!(pod_log_directory(name), None, "{name}");
        }
    }

    #[test]
    fn node_names() {
        assert_eq!(node_name(b"minikube-m02\n").as_deref(), Some("minikube-m02"));
        for text in [
            &b""[..],
            b"\n",
            b"two words",
            b"a\x1b[2Jb",
            b"\xff\xfe",
            &[b'a'; 300],
        ] {
            assert_eq!(node_name(text), None);
        }
    }

    #[test]
    fn service_ranges_of_a_manifest() {
        let manifest = b"spec:\n  containers:\n  - command:\n    - kube-apiserver\n    - --service-cluster-ip-range=10.96.0.0/12,fd00:10:96::/112\n";
        let ranges: Vec<_> = service_ranges(manifest).iter().map(ToString::to_string).collect();
        assert_eq!(ranges, ["10.96.0.0/12", "fd00:10:96::/112"]);
        assert!(service_ranges(b"--service-cluster-ip-range=nonsense").is_empty());
        assert!(service_ranges(b"\xff\x00").is_empty());
    }
}
