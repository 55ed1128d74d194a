//! Two Calico nodes with a pod each, made with `ip`; taken down again on drop. Only namespaces, devices, routes and files:
//! no packet needs to flow here.

use std::{
    fmt::Write as _,
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use serde_json::Value;

pub(crate) use anyhow::Result;

pub(crate) struct Pod {
    pub(crate) name: &'static str,
    pub(crate) address: &'static str,
    pub(crate) interface: &'static str,
}

/// The pods of the seed.
pub(crate) const POD1: Pod = Pod {
    name: "busybox-f5945bfb5-mw26t",
    address: "10.244.120.67",
    interface: "cali8d02ed71817",
};
pub(crate) const POD2: Pod = Pod {
    name: "busybox-f5945bfb5-mwgr6",
    address: "10.244.205.193",
    interface: "cali79f33e4263e",
};

pub(crate) struct Lab {
    pub(crate) node1: String,
    pub(crate) node2: String,
    pub(crate) pod1: String,
    pub(crate) pod2: String,
    pub(crate) underlay: String,
    pub(crate) root1: PathBuf,
    pub(crate) root2: PathBuf,
    directory: tempfile::TempDir,
}

/// A namespace of its own, empty.
pub(crate) struct Named(String);

impl Named {
    pub(crate) fn new() -> Result<Self> {
        let name = unique();
        run(Command::new("ip").args(["netns", "add", &name]))?;
        Ok(Self(name))
    }

    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

impl Drop for Named {
    fn drop(&mut self) {
        remove(&self.0);
    }
}

/// A process that ends with its owner.
pub(crate) struct Inside(Child);

impl Drop for Inside {
    fn drop(&mut self) {
        // It may have ended already.
        let _: std::io::Result<()> = self.0.kill();
        let _: std::io::Result<std::process::ExitStatus> = self.0.wait();
    }
}

impl Lab {
    /// Node 1's tunnel device is made before its uplink, as in minikube; node 2's after it, as on a machine.
    pub(crate) fn up() -> Result<Self> {
        let prefix = unique();
        let directory = tempfile::tempdir()?;
        let (root1, root2) = (directory.path().join("1"), directory.path().join("2"));
        let name = |suffix: &str| format!("{prefix}-{suffix}");
        let lab = Self {
            node1: name("n1"),
            node2: name("n2"),
            pod1: name("p1"),
            pod2: name("p2"),
            underlay: name("u"),
            root1,
            root2,
            directory,
        };
        for namespace in lab.namespaces() {
            run(Command::new("ip").args(["netns", "add", namespace]))?;
            ip(namespace, "link set lo up")?;
        }
        ip(
            &lab.underlay,
            "link add br0 type bridge\nlink set br0 up\naddr add 192.168.49.1/24 dev br0",
        )?;
        let tunnel = |address: &str| {
            format!(
                "link add vxlan.calico mtu 1450 type vxlan id 4096 dstport 4789 nolearning\n\
                 addr add {address}/32 dev vxlan.calico\nlink set vxlan.calico up\n"
            )
        };
        let uplink = |address: &str, port: &str| {
            format!(
                "link add eth0 type veth peer name {port} netns {}\naddr add {address}/24 dev eth0\nlink set eth0 up\n\
                 route add default via 192.168.49.1 dev eth0\n",
                lab.underlay
            )
        };
        ip(
            &lab.node1,
            &(tunnel("10.244.120.64") + &uplink("192.168.49.2", "port1")),
        )?;
        ip(
            &lab.node2,
            &(uplink("192.168.49.3", "port2") + &tunnel("10.244.205.192")),
        )?;
        for port in ["port1", "port2"] {
            ip(&lab.underlay, &format!("link set {port} master br0 up"))?;
        }
        Self::block(&lab.node1, "10.244.120.64/26", "10.244.205.192", "192.168.49.3")?;
        Self::block(&lab.node2, "10.244.205.192/26", "10.244.120.64", "192.168.49.2")?;
        Self::workload(&lab.node1, &lab.pod1, POD1.interface, POD1.address)?;
        Self::workload(&lab.node2, &lab.pod2, POD2.interface, POD2.address)?;
        Ok(lab)
    }

    fn namespaces(&self) -> [&String; 5] {
        [&self.node1, &self.node2, &self.pod1, &self.pod2, &self.underlay]
    }

    fn block(node: &str, local: &str, peer: &str, peer_node: &str) -> Result<()> {
        let mac = "66:00:00:00:00:01";
        ip(
            node,
            &format!(
                "route add blackhole {local} proto 80\nneigh add {peer} lladdr {mac} dev vxlan.calico nud permanent\n\
                 route add {peer}/26 via {peer} dev vxlan.calico onlink proto 80"
            ),
        )?;
        let fdb = [
            "-n",
            node,
            "fdb",
            "append",
            mac,
            "dev",
            "vxlan.calico",
            "dst",
            peer_node,
            "self",
            "permanent",
        ];
        run(Command::new("bridge").args(fdb)).map(drop)
    }

    fn workload(node: &str, pod: &str, interface: &str, address: &str) -> Result<()> {
        ip(
            node,
            &format!(
                "link add {interface} address ee:ee:ee:ee:ee:ee type veth peer name eth0 netns {pod}\n\
                 link set {interface} up\nroute add {address}/32 dev {interface} scope link"
            ),
        )?;
        ip(
            pod,
            &format!(
                "addr add {address}/32 dev eth0\nlink set eth0 up\nroute add 169.254.1.1 dev eth0 scope link\n\
                 route add default via 169.254.1.1 dev eth0"
            ),
        )
    }

    /// One more pod on node 1, its namespace pod 2's.
    pub(crate) fn add_pod(&self, interface: &str, address: &str) -> Result<()> {
        ip(
            &self.node1,
            &format!(
                "link add {interface} type veth peer name eth1 netns {}\nlink set {interface} up\n\
                 route add {address}/32 dev {interface} scope link",
                self.pod2
            ),
        )
    }

    /// Many workload interfaces on node 1, with their other ends in pod 1's namespace.
    pub(crate) fn add_bare_workloads(&self, count: u32) -> Result<()> {
        let mut batch = String::new();
        for number in 0..count {
            let (third, fourth) = (number / 250, number % 250 + 1);
            writeln!(
                batch,
                "link add calif{number:010} type veth peer name e{number} netns {}",
                self.pod1
            )?;
            writeln!(batch, "link set calif{number:010} up")?;
            writeln!(
                batch,
                "route add 10.245.{third}.{fourth}/32 dev calif{number:010} scope link"
            )?;
        }
        ip(&self.node1, &batch)
    }

    pub(crate) fn file(&self, root: &Path, path: &str, text: &str) -> Result<()> {
        ensure!(
            root.starts_with(self.directory.path()),
            "{} is outside the lab",
            root.display()
        );
        let path = root.join(path);
        fs::create_dir_all(path.parent().context("a file has a directory")?)?;
        fs::write(&path, text).with_context(|| format!("write {}", path.display()))
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for namespace in self.namespaces() {
            remove(namespace);
        }
    }
}

/// A process in the namespace of a node with the node's own root, as a container's has.
pub(crate) fn live_in(namespace: &str, root: &Path) -> Result<Inside> {
    fs::create_dir_all(root)?;
    fs::copy("/bin/busybox", root.join("busybox")).context("copy busybox (package busybox-static)")?;
    let mut command = Command::new("ip");
    command
        .args(["netns", "exec", namespace, "chroot"])
        .arg(root)
        .args(["/busybox", "sleep", "600"]);
    let inside = Inside(command.stdin(Stdio::null()).spawn()?);
    let link = format!("/proc/{}/root", inside.0.id());
    wait_for("the process to change its root", || {
        Ok(fs::read_link(&link).ok().filter(|at| at == root))
    })?;
    Ok(inside)
}

/// Runs `ip -batch` in a namespace.
pub(crate) fn ip(namespace: &str, batch: &str) -> Result<()> {
    let mut child = Command::new("ip")
        .args(["-n", namespace, "-batch", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("run ip")?;
    child
        .stdin
        .take()
        .context("ip has a standard input")?
        .write_all(batch.as_bytes())?;
    let output = child.wait_with_output()?;
    ensure!(
        output.status.success(),
        "ip in {namespace}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}

/// What `ip -j` answers in a namespace.
pub(crate) fn json(namespace: &str, arguments: &[&str]) -> Result<Vec<Value>> {
    let text = run(Command::new("ip").args(["-n", namespace, "-j"]).args(arguments))?;
    serde_json::from_str(&text).with_context(|| format!("read what ip {} printed", arguments.join(" ")))
}

pub(crate) fn sysctl(namespace: &str, setting: &str) -> Result<()> {
    let (name, value) = setting.split_once('=').context("a setting has a value")?;
    let write = format!("echo {value} > /proc/sys/{}", name.replace('.', "/"));
    run(Command::new("ip").args(["netns", "exec", namespace, "sh", "-c", &write])).map(drop)
}

/// `PREFIX via GATEWAY dev DEVICE` of a route that `ip -j` printed.
pub(crate) fn route_line(route: &Value) -> String {
    let text = |key: &str| route[key].as_str().unwrap_or("-").to_owned();
    let prefix = match text("dst") {
        dst if dst == "default" => "0.0.0.0/0".to_owned(),
        dst if dst.contains('/') => dst,
        dst => dst + "/32",
    };
    format!("{prefix} via {} dev {}", text("gateway"), text("dev"))
}

/// Asks until there is an answer, 10 s times `CALITRACE_TIME_SCALE` at most.
pub(crate) fn wait_for<T>(what: &str, mut ask: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let scale = std::env::var("CALITRACE_TIME_SCALE")
        .ok()
        .and_then(|scale| scale.parse().ok())
        .unwrap_or(1);
    let limit = Duration::from_secs(10) * scale;
    let start = Instant::now();
    while start.elapsed() < limit {
        if let Some(answer) = ask()? {
            return Ok(answer);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    bail!("waited {limit:?} in vain for {what}")
}

/// A name that nobody else uses.
fn unique() -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    format!(
        "disc{}-{}",
        std::process::id(),
        COUNT.fetch_add(1, Ordering::Relaxed)
    )
}

fn remove(namespace: &str) {
    if let Err(error) = run(Command::new("ip").args(["netns", "del", namespace])) {
        say(&format!("{error:#}"));
    }
}

pub(crate) fn say(line: &str) {
    // A closed standard error is no reason to fail.
    let _: std::io::Result<()> = writeln!(std::io::stderr(), "{line}");
}

fn run(command: &mut Command) -> Result<String> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("run {command:?}"))?;
    ensure!(
        output.status.success(),
        "{command:?}: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
