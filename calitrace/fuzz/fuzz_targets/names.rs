//! Files of a node, which are not trusted: the first line is a file's name, the rest its text. What they name is safe to
//! print, and the name of a file that names a pod can be made from it again.
#![no_main]

use calitrace::calico::names::{
    self, Named, cni_result, endpoint_file_name, endpoint_status, node_name, pod_log_directory,
    service_ranges,
};
use libfuzzer_sys::fuzz_target;

fn check(named: &Named) {
    let subdomain = |name: &str| {
        !name.is_empty()
            && name.len() <= 253
            && name
                .bytes()
                .all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.'))
    };
    assert!(subdomain(&named.namespace) && subdomain(&named.pod), "{named:?}");
    let interfaces = named.interfaces(&["cali".to_owned(), "azv".to_owned()]);
    for interface in interfaces {
        assert!((1..=15).contains(&interface.len()), "{named:?}");
        assert!(
            interface
                .bytes()
                .all(|byte| byte.is_ascii_graphic() && byte != b'/'),
            "{named:?}"
        );
    }
}

fuzz_target!(|data: &[u8]| {
    let end = data.iter().position(|byte| *byte == b'\n').unwrap_or(data.len());
    let (name, text) = (&data[..end], data.get(end + 1..).unwrap_or_default());
    if let Ok(name) = std::str::from_utf8(name) {
        if let Some(named) = endpoint_file_name(name) {
            check(&named);
            let again = format!("k8s {}%2F{} eth0", named.namespace, named.pod);
            assert_eq!(endpoint_file_name(&again).as_ref(), Some(&named));
            if let Some(told) = endpoint_status(name, text) {
                check(&told);
                assert_eq!(told.full_name(), named.full_name());
            }
        } else {
            assert_eq!(endpoint_status(name, text), None);
        }
        if let Some(named) = pod_log_directory(name) {
            check(&named);
            let again = format!("{}_{}_uid", named.namespace, named.pod);
            assert_eq!(pod_log_directory(&again), Some(named));
        }
    }
    if let Some(named) = cni_result(text) {
        check(&named);
    }
    if let Some(name) = node_name(text) {
        assert!(names::host_label(&name), "{name}");
        assert_eq!(node_name(name.as_bytes()), Some(name));
    }
    for range in service_ranges(text) {
        let argument = format!("- --service-cluster-ip-range={range}");
        assert_eq!(service_ranges(argument.as_bytes()), [range]);
    }
});
