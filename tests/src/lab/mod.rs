//! The lab: building it, changing it, running things in it, taking it down.

mod devices;
mod felix_nft;
mod ipip;
pub mod netfilter;
pub mod plan;
mod registry;
mod root;
pub mod services;
mod wireguard;
mod wiring;

use std::ffi::OsStr;
use std::fs::{DirBuilder, File};
use std::net::Ipv4Addr;
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;

use anyhow::{Context, Result, anyhow, ensure};
use nix::fcntl::Flock;

use crate::command::{self, Running};
use crate::namespace::Namespace;
use crate::wait::wait_until;
pub use devices::Unsupported;
use netfilter::{Policy, Rules};
pub use plan::{DeviceOrder, Encapsulation, Node, Options, Pod};
pub use registry::{Record, sweep};
pub use services::Proxy;

/// The name of the lab's part that connects the nodes and stands for the world outside.
pub const UNDERLAY: &str = "underlay";

/// Two Calico nodes with two pods each, taken down when dropped.
///
/// Its parts are called `minikube` and `minikube-m02` (the nodes), `pod1` to `pod4` and those added later,
/// and `underlay`. [`Options::cross_subnet`] adds a third node, `minikube-m03`, with `pod5`.
#[derive(Debug)]
pub struct Lab {
    id: String,
    options: Options,
    folder: PathBuf,
    kept: bool,
    holders: Vec<Child>,
    state: Mutex<State>,
    /// Held for its effect on [`sweep`].
    _lock: Flock<File>,
}

/// What can change while the lab is up.
#[derive(Debug)]
struct State {
    nodes: Vec<Node>,
    pods: Vec<(Pod, Policy)>,
    block_time_exceeded: bool,
}

impl Lab {
    /// Builds a lab of this process's own, in about a second or two. What ended processes left behind is
    /// swept first.
    pub fn up(options: &Options) -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        Self::build(&format!("{}n{count}", std::process::id()), options, false)
    }

    /// Builds a lab that stays until [`remove`](Self::remove) takes it down; `id` is part of its names.
    pub fn up_to_stay(id: &str, options: &Options) -> Result<Self> {
        Self::build(id, options, true)
    }

    /// Whether this machine's kernel can carry a lab with this encapsulation. Needs root.
    pub fn supports(encapsulation: Encapsulation) -> Result<bool> {
        devices::support(encapsulation)
    }

    /// Takes down the lab with this id, whoever built it. Returns whether there was one.
    pub fn remove(id: &str) -> Result<bool> {
        if Record::read(id)?.is_none() {
            return Ok(false);
        }
        let lock = registry::lock(id)?.with_context(|| format!("lab {id} is in use by another process"))?;
        registry::remove(id)?;
        drop(lock);
        Ok(true)
    }

    /// Takes this lab down, kept or not, and tells what went wrong.
    pub fn down(mut self) -> Result<()> {
        self.kept = true;
        self.tear_down()
    }

    /// Its id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// How it was built.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// The nodes as they are now.
    pub fn nodes(&self) -> Vec<Node> {
        self.state().nodes.clone()
    }

    /// The node with this name.
    pub fn node(&self, name: &str) -> Result<Node> {
        Ok(self.state().nodes[self.node_index(name)?].clone())
    }

    /// All pods there are now.
    pub fn pods(&self) -> Vec<Pod> {
        self.state().pods.iter().map(|(pod, _)| pod.clone()).collect()
    }

    /// The pod the lab calls so.
    pub fn pod(&self, id: &str) -> Result<Pod> {
        let state = self.state();
        let found = state.pods.iter().find(|(pod, _)| pod.id == id);
        Ok(found
            .with_context(|| format!("lab {} has no pod {id}", self.id))?
            .0
            .clone())
    }

    /// The namespace of a part of the lab.
    pub fn namespace(&self, part: &str) -> Result<Namespace> {
        Namespace::open(&plan::namespace_name(&self.id, part))
    }

    /// The names under `/run/netns` of all of its namespaces.
    pub fn namespaces(&self) -> Result<Vec<String>> {
        Namespace::named(&plan::namespace_prefix(&self.id))
    }

    /// The root folder of a node, which `/proc/PID/root` of the node's process leads to.
    pub fn root(&self, node: &str) -> PathBuf {
        self.folder.join(node)
    }

    /// A command, the program first, that will run in a part of the lab.
    pub fn exec<S: AsRef<OsStr>>(&self, part: &str, words: impl IntoIterator<Item = S>) -> Result<Command> {
        let mut words = words.into_iter();
        let program = words.next().context("no command to run was given")?;
        let mut command = self.namespace(part)?.command(program);
        command.args(words);
        Ok(command)
    }

    /// Starts a command in a part of the lab; it is killed when dropped.
    pub fn spawn<S: AsRef<OsStr>>(&self, part: &str, words: impl IntoIterator<Item = S>) -> Result<Running> {
        Running::start(&mut self.exec(part, words)?)
    }

    /// Sets what the ingress policies of a pod say.
    pub fn set_policy(&self, pod: &str, policy: Policy) -> Result<()> {
        let mut state = self.state();
        let (found, current) = state
            .pods
            .iter_mut()
            .find(|(candidate, _)| candidate.id == pod)
            .with_context(|| format!("lab {} has no pod {pod}", self.id))?;
        *current = policy;
        let node = found.node.clone();
        self.load_rules(&state, self.node_index(&node)?)
    }

    /// Makes all nodes drop ICMP time exceeded, their own and the others', so that nothing of the lab can
    /// learn a hop from it; or lifts that.
    pub fn block_time_exceeded(&self, block: bool) -> Result<()> {
        let mut state = self.state();
        state.block_time_exceeded = block;
        (0..state.nodes.len()).try_for_each(|index| self.load_rules(&state, index))
    }

    /// Gives a node's tunnel device another address and its peers the way to it.
    pub fn set_tunnel_address(&self, node: &str, address: Ipv4Addr) -> Result<()> {
        let encapsulation = self.options.encapsulation;
        let device = encapsulation
            .device()
            .context("a lab without encapsulation has no tunnel device")?;
        let index = self.node_index(node)?;
        let mut state = self.state();
        let old = state.nodes[index].tunnel_address;
        if old == address {
            return Ok(());
        }
        state.nodes[index].tunnel_address = address;
        self.namespace(node)?
            .ip(&wiring::change_tunnel_address(device, old, address))?;
        let node = &state.nodes[index];
        for other in state.nodes.iter().filter(|other| other.name != node.name) {
            let mut batch = wiring::to_peer(other, node, &self.options);
            if batch.contains("vxlan.calico") {
                batch += &wiring::forget_gateway(device, old);
            }
            self.namespace(&other.name)?.ip(&batch)?;
            if encapsulation == Encapsulation::Wireguard {
                wireguard::connect(other, node)?;
            }
        }
        Ok(())
    }

    /// Takes a node's default routes away.
    pub fn delete_default_route(&self, node: &str) -> Result<()> {
        let routes = wiring::default_route(&self.node(node)?, self.options.ipv6);
        self.namespace(node)?
            .ip(&routes.replace("route add", "route del"))
    }

    /// Gives a node its default routes back.
    pub fn restore_default_route(&self, node: &str) -> Result<()> {
        self.namespace(node)?
            .ip(&wiring::default_route(&self.node(node)?, self.options.ipv6))
    }

    /// Turns segmentation offload, receive merging and checksum offload of all pod, workload, tunnel and
    /// uplink devices on or off. Off, every packet a capture shows is one that a wire would carry.
    pub fn offloads(&self, on: bool) -> Result<()> {
        let pods = self.pods();
        let mut devices: Vec<(String, &str)> = pods.iter().map(|pod| (pod.id.clone(), "eth0")).collect();
        for pod in &pods {
            devices.push((pod.node.clone(), &pod.interface));
        }
        for node in self.nodes() {
            devices.push((node.name.clone(), "eth0"));
            devices.extend(
                self.options
                    .encapsulation
                    .device()
                    .map(|device| (node.name.clone(), device)),
            );
        }
        let value = if on { "on" } else { "off" };
        for (part, device) in devices {
            for feature in ["tx", "tso", "gso", "gro"] {
                // A device that lacks a feature refuses to turn it on or off; that it ends up off is what
                // counts, and `ethtool -k` says so below.
                let _ = command::output(&mut self.exec(&part, ["ethtool", "-K", device, feature, value])?)?;
            }
            let mut list = self.exec(&part, ["ethtool", "-k", device])?;
            let features = command::text(&command::run(&mut list)?);
            let left = ["tcp-segmentation-offload: on", "generic-segmentation-offload: on"];
            ensure!(
                on || !left.iter().any(|feature| features.contains(feature)),
                "{device} of {part} kept an offload:\n{features}"
            );
        }
        Ok(())
    }

    /// Adds a pod to a node, as the CNI plugin and Felix do it.
    pub fn add_pod(&self, id: &str, node: &str, name: &str, address: Ipv4Addr) -> Result<Pod> {
        self.add_pod_with(id, node, name, address, plan::interface_name("default", name))
    }

    /// The same, with a workload interface of this name, as of an orchestrator that names them in its own way.
    pub fn add_pod_with(
        &self,
        id: &str,
        node: &str,
        name: &str,
        address: Ipv4Addr,
        interface: String,
    ) -> Result<Pod> {
        let index = self.node_index(node)?;
        let mut state = self.state();
        ensure!(
            !state
                .pods
                .iter()
                .any(|(pod, _)| pod.id == id || pod.address == address || pod.name == name),
            "lab {} has a pod {id}, {name} or {address}",
            self.id
        );
        let mut pod = plan::pod(&self.id, id, "default", name, &state.nodes[index], address)?;
        pod.interface = interface;
        Namespace::create(std::slice::from_ref(&pod.namespace))?;
        self.wire_pod(&pod)?;
        state.pods.push((pod.clone(), Policy::Allow));
        self.load_rules(&state, index)?;
        Ok(pod)
    }

    /// Deletes a pod: its processes, its interface, its routes, its namespace and its files.
    pub fn delete_pod(&self, id: &str) -> Result<()> {
        let pod = self.pod(id)?;
        let mut state = self.state();
        state.pods.retain(|(other, _)| other.id != id);
        registry::end_processes(&Namespace::open(&pod.namespace)?)?;
        self.namespace(&pod.node)?
            .ip(&format!("link del {}\n", pod.interface))?;
        self.load_rules(&state, self.node_index(&pod.node)?)?;
        root::remove_pod(&self.root(&pod.node), &pod)?;
        Namespace::remove(&pod.namespace)
    }

    fn build(id: &str, options: &Options, kept: bool) -> Result<Self> {
        // What is left of others is not this lab's failure; it is tried again by the next one.
        let _ = sweep();
        let lock = registry::lock(id)?.with_context(|| format!("lab {id} is being built or in use"))?;
        ensure!(Record::read(id)?.is_none(), "lab {id} is up already");
        let nodes = plan::nodes(id, options);
        let pods = plan::pods(id, &nodes)?;
        let folder = std::env::temp_dir().join(format!("calitrace-lab-{id}"));
        let record = Record {
            id: id.to_owned(),
            folder: folder.clone(),
            kept,
            options: options.clone(),
            underlay: plan::namespace_name(id, UNDERLAY),
            nodes: nodes.clone(),
            pods: pods.clone(),
        };
        let state = State {
            nodes,
            pods: pods.into_iter().map(|pod| (pod, Policy::Allow)).collect(),
            block_time_exceeded: false,
        };
        // From here on a failure takes down what is there, by the value's drop.
        let mut lab = Self {
            id: id.to_owned(),
            options: options.clone(),
            folder,
            kept: false,
            holders: Vec::new(),
            state: Mutex::new(state),
            _lock: lock,
        };
        record.write()?;
        lab.build_parts()
            .with_context(|| format!("cannot build lab {id}"))?;
        lab.kept = kept;
        Ok(lab)
    }

    fn build_parts(&mut self) -> Result<()> {
        let nodes = self.nodes();
        // The folder's name is known to everyone; it must be new and nobody else's.
        DirBuilder::new()
            .mode(0o755)
            .create(&self.folder)
            .with_context(|| format!("cannot make folder {}", self.folder.display()))?;
        let mut names = vec![plan::namespace_name(&self.id, UNDERLAY)];
        names.extend(nodes.iter().map(|node| node.namespace.clone()));
        names.extend(self.pods().into_iter().map(|pod| pod.namespace));
        let without_fallback = ipip::WithoutFallback::hold(&self.options)?;
        Namespace::create(&names)?;
        drop(without_fallback);

        let underlay = self.namespace(UNDERLAY)?;
        let settings = wiring::namespace_settings(self.options.ipv6);
        underlay.sysctls(settings.into_iter().chain(wiring::router_settings()))?;
        let lab = &*self;
        let holders = thread::scope(|scope| {
            let builders: Vec<_> = (0..nodes.len())
                .map(|index| scope.spawn(move || lab.build_node(index)))
                .collect();
            let join = |builder: thread::ScopedJoinHandle<'_, Result<Child>>| {
                builder
                    .join()
                    .unwrap_or_else(|_| Err(anyhow!("the builder of a node panicked")))
            };
            builders.into_iter().map(join).collect::<Vec<_>>()
        });
        // All are kept before any error is looked at, so that all are ended.
        let mut failed = None;
        for holder in holders {
            match holder {
                Ok(holder) => self.holders.push(holder),
                Err(error) => failed = Some(error),
            }
        }
        if let Some(error) = failed {
            return Err(error);
        }
        underlay.ip(&wiring::underlay(&nodes, self.options.ipv6))?;
        if self.options.encapsulation == Encapsulation::Wireguard {
            for (node, peer) in plan::pairs(&nodes) {
                wireguard::connect(node, peer)?;
            }
        }
        names
            .iter()
            .try_for_each(|name| wait_for_links(&Namespace::open(name)?))?;
        if self.options.encapsulation == Encapsulation::Wireguard {
            for (node, peer) in plan::pairs(&nodes) {
                wireguard::shake_hands(node, peer)?;
            }
        }
        Ok(())
    }

    fn build_node(&self, index: usize) -> Result<Child> {
        let nodes = self.nodes();
        let node = &nodes[index];
        let peers = || nodes.iter().filter(|peer| peer.name != node.name);
        let options = &self.options;
        let namespace = Namespace::open(&node.namespace)?;
        let settings = wiring::namespace_settings(options.ipv6);
        namespace.sysctls(settings.into_iter().chain(wiring::router_settings()))?;
        let make_tunl0 = options.encapsulation == Encapsulation::Ipip && ipip::must_be_made(&namespace)?;
        let underlay = plan::namespace_name(&self.id, UNDERLAY);
        if options.encapsulation == Encapsulation::Wireguard && !Self::supports(options.encapsulation)? {
            return Err(Unsupported("wireguard").into());
        }
        namespace.ip(&wiring::node(node, options, make_tunl0, &underlay))?;
        namespace.ip(&wiring::blocks(node, peers(), options))?;
        match options.encapsulation {
            Encapsulation::Vxlan => {
                let entries: String = peers().map(wiring::forwarding_entry).collect();
                let mut bridge = namespace.command("bridge");
                command::run_with_input(bridge.args(["-batch", "-"]), &entries)?;
            }
            Encapsulation::Wireguard => wireguard::set_up(node)?,
            Encapsulation::Ipip | Encapsulation::None => {}
        }
        if options.proxy == Proxy::Ipvs {
            namespace.ip(&services::ipvs_device())?;
            // Made with the first virtual server's module, for every namespace there is.
            command::output(namespace.command("ipvsadm").arg("--list"))?;
            namespace.sysctls([("net/ipv4/vs/conntrack".to_owned(), "1")])?;
        }
        let root = self.root(&node.name);
        root::create(&root, node)?;
        for pod in self.pods().iter().filter(|pod| pod.node == node.name) {
            self.wire_pod(pod)?;
        }
        self.load_rules(&self.state(), index)?;
        root::hold(&root, node, &namespace)
    }

    /// Connects a pod's namespace to its node and writes the pod's files.
    fn wire_pod(&self, pod: &Pod) -> Result<()> {
        let own = Namespace::open(&pod.namespace)?;
        own.sysctls(wiring::namespace_settings(self.options.ipv6))?;
        let node = self.namespace(&pod.node)?;
        node.ip(&wiring::workload(pod, &self.options))?;
        node.sysctls(wiring::workload_settings(&pod.interface))?;
        own.ip(&wiring::pod(pod, self.options.ipv6))?;
        wait_for_links(&own)?;
        root::add_pod(&self.root(&pod.node), pod, &self.options)
    }

    fn load_rules(&self, state: &State, index: usize) -> Result<()> {
        let node = &state.nodes[index];
        let local = |pod: &Pod| pod.node == node.name;
        let rules = Rules {
            peers: state.nodes.iter().filter(|peer| peer.name != node.name).collect(),
            encapsulation: self.options.encapsulation,
            pods: state
                .pods
                .iter()
                .filter(|(pod, _)| local(pod))
                .map(|(pod, policy)| (pod, *policy))
                .collect(),
            backend: state.pods.iter().map(|(pod, _)| pod).find(|pod| pod.id == "pod2"),
            proxy: self.options.kube_proxy(),
            flow_logs: self.options.flow_logs,
            block_time_exceeded: state.block_time_exceeded,
        };
        let namespace = Namespace::open(&node.namespace)?;
        netfilter::load(&namespace, self.options.netfilter, &rules)?;
        services::load(&namespace, rules.proxy, rules.backend)
            .with_context(|| format!("cannot load the service in namespace {}", namespace.name()))
    }

    fn node_index(&self, name: &str) -> Result<usize> {
        // Names never change: no need to ask the state, which the caller may hold.
        ["minikube", "minikube-m02", plan::THIRD_NODE]
            .iter()
            .position(|node| *node == name)
            .filter(|index| *index < 2 || self.options.cross_subnet)
            .with_context(|| format!("lab {} has no node {name}", self.id))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tear_down(&mut self) -> Result<()> {
        for mut holder in self.holders.drain(..) {
            holder.kill().context("cannot end a node's process")?;
            holder.wait().context("cannot wait for a node's process")?;
        }
        registry::remove(&self.id).with_context(|| format!("cannot remove lab {}", self.id))
    }
}

/// Waits until every device of a namespace that is up can send: one whose peer has just come up still drops
/// what it is given.
fn wait_for_links(namespace: &Namespace) -> Result<()> {
    wait_until(format!("the links of {} to be up", namespace.name()), || {
        let list = command::run(namespace.command("ip").args(["-j", "link", "show", "up"]))?;
        let links: Vec<serde_json::Value> =
            serde_json::from_slice(&list.stdout).context("ip -j link show printed something else")?;
        for link in links {
            // A device that is not up is in the list as an empty object.
            let (Some(name), Some(state)) = (link["ifname"].as_str(), link["operstate"].as_str()) else {
                continue;
            };
            ensure!(matches!(state, "UP" | "UNKNOWN"), "{name} is {state}");
        }
        Ok(Some(()))
    })
}

impl Drop for Lab {
    #[expect(clippy::print_stderr, reason = "a drop has nobody else to tell")]
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        if let Err(error) = self.tear_down() {
            eprintln!("warning: {error:#}");
        }
    }
}
