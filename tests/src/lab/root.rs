//! The root folder of a node, as in a minikube or kind container: the files Felix and the container
//! runtime keep there, and a process of the node's namespace whose `/proc/PID/root` leads to it.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};

use anyhow::{Context, Result};
use serde_json::json;
use sha1::{Digest, Sha1};

use super::plan::{Node, Options, Pod, hex};
use crate::namespace::Namespace;

/// Where busybox is on the machine; a static one, as it runs where no library is.
const BUSYBOX: &str = "/bin/busybox";
/// The name of the network in Calico's CNI configuration.
const NETWORK: &str = "k8s-pod-network";
/// The CNI configuration as the cache keeps it, in base 64:
/// `{"cniVersion":"0.3.1","name":"k8s-pod-network","plugins":[{"type":"calico"}]}`.
const CNI_CONFIGURATION: &str = "eyJjbmlWZXJzaW9uIjoiMC4zLjEiLCJuYW1lIjoiazhzLXBvZC1uZXR3b3JrIiwicGx1Z2lucyI6W3sidHlwZSI6ImNhbGljbyJ9XX0=";

/// Makes the folder of a node, without its pods' files.
pub(super) fn create(root: &Path, node: &Node) -> Result<()> {
    write(&root.join("var/lib/calico/nodename"), &node.name)?;
    make_folder(&endpoint_status_folder(root))?;
    make_folder(&cni_folder(root))?;
    let shell = root.join("bin/busybox");
    make_folder(&root.join("bin"))?;
    fs::copy(BUSYBOX, &shell).with_context(|| format!("cannot copy {BUSYBOX} to {}", shell.display()))?;
    Ok(())
}

/// Writes a pod's files, those that the options ask for.
pub(super) fn add_pod(root: &Path, pod: &Pod, options: &Options) -> Result<()> {
    if options.felix_files {
        write(
            &endpoint_status_file(root, pod),
            &endpoint_status(pod, options.ipv6).to_string(),
        )?;
    }
    if options.cni_files {
        write(&cni_file(root, pod), &cni_result(pod, options.ipv6).to_string())?;
    }
    Ok(())
}

/// Removes a pod's files, as Felix and the container runtime do.
pub(super) fn remove_pod(root: &Path, pod: &Pod) -> Result<()> {
    for file in [endpoint_status_file(root, pod), cni_file(root, pod)] {
        match fs::remove_file(&file) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("cannot remove {}", file.display()));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Starts the process that makes the folder the node's root: in the node's network namespace, with the
/// node's host name, and nothing else of its own.
pub(super) fn hold(root: &Path, node: &Node, namespace: &Namespace) -> Result<Child> {
    let folder = CString::new(root.as_os_str().as_bytes()).context("a folder's name holds a zero byte")?;
    let name = CString::new(node.name.as_str()).context("a node's name holds a zero byte")?;
    let mut command = namespace.command("/bin/busybox");
    command.args(["sleep", "1000000"]).env_clear();
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    // SAFETY: system calls only, on strings that were made before the fork and live in the closure.
    unsafe {
        command.pre_exec(move || {
            let renamed = libc::unshare(libc::CLONE_NEWUTS) == 0
                && libc::sethostname(name.as_ptr(), name.as_bytes().len()) == 0;
            let moved = renamed
                && libc::chroot(folder.as_ptr()) == 0
                && libc::chdir(c"/".as_ptr()) == 0
                && libc::setsid() != -1;
            if moved {
                Ok(())
            } else {
                Err(io::Error::last_os_error())
            }
        });
    }
    command
        .spawn()
        .with_context(|| format!("cannot start the process of node {}", node.name))
}

fn endpoint_status_folder(root: &Path) -> PathBuf {
    root.join("var/run/calico/endpoint-status")
}

fn cni_folder(root: &Path) -> PathBuf {
    root.join("var/lib/cni/results")
}

/// Orchestrator, workload and end point, escaped each and separated by blanks
/// (`libcalico-go/lib/names/workloadendpointstatus.go`).
fn endpoint_status_file(root: &Path, pod: &Pod) -> PathBuf {
    endpoint_status_folder(root).join(format!("k8s {}%2F{} eth0", pod.kube_namespace, pod.name))
}

/// What Felix says of an end point it has programmed (`libcalico-go/lib/epstatusfile`).
fn endpoint_status(pod: &Pod, ipv6: bool) -> serde_json::Value {
    let mut status = json!({
        "ifaceName": pod.interface,
        "mac": pod.mac,
        "ipv4Nets": [format!("{}/32", pod.address)],
    });
    if ipv6 {
        status["ipv6Nets"] = json!([format!("{}/128", pod.address_v6)]);
    }
    status
}

fn cni_file(root: &Path, pod: &Pod) -> PathBuf {
    cni_folder(root).join(format!("{NETWORK}-{}-eth0", container_id(pod)))
}

/// libcni's cache of an ADD result (`libcni/api.go`, kind `cniCacheV1`).
fn cni_result(pod: &Pod, ipv6: bool) -> serde_json::Value {
    let sandbox = format!("/var/run/netns/{}", pod.namespace);
    let mut addresses = vec![json!({"interface": 1, "address": format!("{}/32", pod.address)})];
    if ipv6 {
        addresses.push(json!({"interface": 1, "address": format!("{}/128", pod.address_v6)}));
    }
    json!({
        "kind": "cniCacheV1",
        "containerId": container_id(pod),
        "config": CNI_CONFIGURATION,
        "ifName": "eth0",
        "networkName": NETWORK,
        "netns": sandbox,
        "cniArgs": [
            ["IgnoreUnknown", "1"],
            ["K8S_POD_NAMESPACE", pod.kube_namespace],
            ["K8S_POD_NAME", pod.name],
            ["K8S_POD_INFRA_CONTAINER_ID", container_id(pod)],
        ],
        "result": {
            "cniVersion": "1.0.0",
            "dns": {},
            "interfaces": [
                {"name": pod.interface},
                {"name": "eth0", "mac": pod.mac, "sandbox": sandbox},
            ],
            "ips": addresses,
        },
    })
}

/// 64 hexadecimal digits, as container runtimes name a sandbox.
fn container_id(pod: &Pod) -> String {
    let digest = hex(&Sha1::digest(format!("sandbox {}", pod.full_name())));
    format!("{digest}{digest}")[..64].to_owned()
}

fn make_folder(folder: &Path) -> Result<()> {
    fs::create_dir_all(folder).with_context(|| format!("cannot make folder {}", folder.display()))
}

fn write(file: &Path, text: &str) -> Result<()> {
    if let Some(folder) = file.parent() {
        make_folder(folder)?;
    }
    fs::write(file, text).with_context(|| format!("cannot write {}", file.display()))
}

#[cfg(test)]
mod tests {
    use super::super::plan;
    use super::*;

    #[test]
    fn files_come_and_go_with_the_pod() {
        let nodes = plan::nodes("7", &Options::default());
        let pod = &plan::pods("7", &nodes).unwrap()[0];
        let folder = tempfile::tempdir().unwrap();
        add_pod(folder.path(), pod, &Options::default()).unwrap();

        let status = folder
            .path()
            .join("var/run/calico/endpoint-status/k8s default%2Fbusybox-f5945bfb5-mw26t eth0");
        let status: serde_json::Value = serde_json::from_slice(&fs::read(status).unwrap()).unwrap();
        assert_eq!(status["ifaceName"], "cali8d02ed71817");
        assert_eq!(status["ipv4Nets"][0], "10.244.120.67/32");

        let count = || fs::read_dir(cni_folder(folder.path())).unwrap().count();
        assert_eq!(count(), 1);
        remove_pod(folder.path(), pod).unwrap();
        assert_eq!(count(), 0);
    }

    #[test]
    fn files_that_are_not_asked_for_are_not_written() {
        let nodes = plan::nodes("7", &Options::default());
        let pod = &plan::pods("7", &nodes).unwrap()[0];
        let folder = tempfile::tempdir().unwrap();
        let options = Options {
            felix_files: false,
            cni_files: false,
            ..Options::default()
        };
        add_pod(folder.path(), pod, &options).unwrap();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
