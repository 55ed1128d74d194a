//! Running `calitrace` the way a user does, and reading what it prints.

use std::{
    ffi::OsStr,
    io::{BufRead as _, BufReader, Read as _},
    path::PathBuf,
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Arc, Mutex, mpsc},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use calitrace_tests::{
    Encapsulation, Lab, Need, Options, command, is_emulated, lab::netfilter::Backend, patience,
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;

/// What a test with real `tunl0` needs.
pub(crate) const IPIP: &[Need] = &[Need::Encapsulation(Encapsulation::Ipip)];
/// What a test with real `wireguard.cali` needs.
pub(crate) const WIREGUARD: &[Need] = &[Need::Encapsulation(Encapsulation::Wireguard), Need::Program("wg")];

/// What `watch` says on standard error once every hook is attached.
const READY: &str = "observing ";

/// The binary under test: `CALITRACE_BIN`, else the one built beside this test.
pub(crate) fn binary() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("CALITRACE_BIN") {
        return Ok(path.into());
    }
    let test = std::env::current_exe().context("find the path of this test")?;
    let path = test
        .parent()
        .and_then(|deps| deps.parent())
        .context("this test lies in no target folder")?
        .join("calitrace");
    ensure!(
        path.exists(),
        "{} is not there; `cargo build -p calitrace` makes it",
        path.display()
    );
    Ok(path)
}

/// A finished run.
#[derive(Debug)]
pub(crate) struct Finished {
    pub(crate) status: ExitStatus,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Finished {
    /// Standard output as JSON lines.
    pub(crate) fn lines(&self) -> Result<Vec<Value>> {
        self.stdout
            .lines()
            .map(|line| serde_json::from_str(line).with_context(|| format!("not JSON: {line}")))
            .collect()
    }

    /// The packet traces among the JSON lines.
    pub(crate) fn packets(&self) -> Result<Vec<Value>> {
        Ok(self
            .lines()?
            .into_iter()
            .filter(|line| line["type"] == "packet")
            .collect())
    }
}

/// Runs `calitrace` to its end.
pub(crate) fn run<S: AsRef<OsStr>>(arguments: &[S]) -> Result<Finished> {
    let output = Command::new(binary()?)
        .args(arguments)
        .env("RUST_BACKTRACE", "0")
        .stdin(Stdio::null())
        .output()
        .context("run calitrace")?;
    Ok(Finished {
        status: output.status,
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    })
}

/// A lab where nothing is sent but by the test: IPv6 hosts announce themselves and their groups at any time.
pub(crate) fn quiet() -> Options {
    Options {
        ipv6: false,
        ..Options::default()
    }
}

/// `--netns` for the nodes of a lab: all of them, or those with these names. Other labs may be up at the same time.
pub(crate) fn only(lab: &Lab, nodes: &[&str]) -> Vec<String> {
    lab.nodes()
        .into_iter()
        .filter(|node| nodes.is_empty() || nodes.contains(&node.name.as_str()))
        .flat_map(|node| ["--netns".to_owned(), node.namespace])
        .collect()
}

/// The arguments `fixed`, then those that confine a run to both nodes of `lab`.
pub(crate) fn with(lab: &Lab, fixed: &[&str]) -> Vec<String> {
    fixed
        .iter()
        .map(|&word| word.to_owned())
        .chain(only(lab, &[]))
        .collect()
}

/// Changes a node's rules, as `iptables-restore --noflush` reads them: in legacy tables where the lab's are, else of nftables.
pub(crate) fn change_rules(lab: &Lab, node: &str, text: &str) -> Result<()> {
    let tool = match lab.options().netfilter {
        Backend::Legacy => "iptables-legacy-restore",
        _ => "iptables-nft-restore",
    };
    let mut load = lab.exec(node, [tool, "--noflush", "-w", "10"])?;
    command::run_with_input(&mut load, text).map(drop)
}

/// Changes what `nft` has on a node, all at once.
pub(crate) fn change_nftables(lab: &Lab, node: &str, text: &str) -> Result<()> {
    let mut load = lab.exec(node, ["nft", "-f", "-"])?;
    command::run_with_input(&mut load, text).map(drop)
}

/// The addresses of a packet trace's hops, `*` where one is not known.
pub(crate) fn path(packet: &Value) -> Vec<String> {
    let hops = packet["hops"].as_array().map(Vec::as_slice).unwrap_or_default();
    hops.iter()
        .map(|hop| hop["address"].as_str().unwrap_or("*").to_owned())
        .collect()
}

/// A packet trace's observations at interfaces; functions of the kernel have no direction.
pub(crate) fn at_interfaces(packet: &Value) -> impl Iterator<Item = &Value> {
    let seen = packet["observations"].as_array().into_iter().flatten();
    seen.filter(|seen| seen["direction"].is_string())
}

/// Whether a packet trace goes from one address to another, with this protocol.
pub(crate) fn goes(packet: &Value, proto: &str, from: &str, to: &str) -> bool {
    let flow = &packet["flow"];
    flow["proto"] == proto && flow["src"] == from && flow["dst"] == to
}

/// Whether a packet got to its receiver. On a loaded machine TCP sends segments again that were only late, and segments
/// overtake each other; the receiver's TCP drops what is old by then: it was there all the same. In an emulated machine,
/// where kernels may lack reasons and connections may be closed before the last segment comes, any drop of TCP's own will do.
pub(crate) fn arrived(packet: &Value) -> bool {
    // `include/net/dropreason-core.h`.
    let too_late = [
        "TCP_OLD_DATA",
        "TCP_OLD_ACK",
        "TCP_OLD_SEQUENCE",
        "TCP_OFOMERGE",
        "TCP_TOO_OLD_ACK",
        "TCP_RFC7323_PAWS",
        "TCP_RFC7323_PAWS_ACK",
    ]
    .iter()
    .any(|reason| packet["drop"]["reason"] == *reason);
    packet["verdict"] == "delivered" || ((too_late || is_emulated()) && was_received(packet))
}

/// Whether a packet got to its receiver, if only for TCP to drop it there: a segment sent twice, or to what was closed.
pub(crate) fn was_received(packet: &Value) -> bool {
    // `TCP_OLD_SEQUENCE`, or, where there are no reasons, by one of TCP's functions; these are not always shown either.
    let says = |field: &str, prefix: &str| {
        packet["drop"][field]
            .as_str()
            .is_some_and(|text| text.starts_with(prefix))
    };
    let by_tcp = says("location", "tcp_") || says("reason", "TCP_");
    packet["verdict"] == "delivered" || (packet["flow"]["proto"] == "tcp" && by_tcp)
}

/// A `calitrace watch` at work. Killed if dropped before [`Watch::stop`].
#[derive(Debug)]
pub(crate) struct Watch {
    child: Child,
    stdout: Arc<Mutex<String>>,
    stderr: Arc<Mutex<String>>,
    readers: Vec<std::thread::JoinHandle<()>>,
}

impl Watch {
    /// Starts `calitrace watch` with these arguments and waits until it observes.
    pub(crate) fn start<S: AsRef<OsStr>>(arguments: &[S]) -> Result<Self> {
        let mut command = Command::new(binary()?);
        command.arg("watch").args(arguments);
        Self::spawn(command)
    }

    /// As [`Self::start`], with a whole command line.
    pub(crate) fn spawn(mut command: Command) -> Result<Self> {
        let mut child = command
            .env("RUST_BACKTRACE", "0")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("start calitrace watch")?;
        let stdout = Arc::new(Mutex::new(String::new()));
        let stderr = Arc::new(Mutex::new(String::new()));
        let (ready_sender, ready) = mpsc::channel();
        let mut out = child.stdout.take().context("standard output")?;
        let err = child.stderr.take().context("standard error")?;
        let readers = vec![
            std::thread::spawn({
                let stdout = Arc::clone(&stdout);
                move || {
                    let mut buffer = [0; 65536];
                    let mut rest = Vec::new();
                    while let Ok(count @ 1..) = out.read(&mut buffer) {
                        rest.extend_from_slice(&buffer[..count]);
                        let whole = rest
                            .iter()
                            .rposition(|&byte| byte == b'\n')
                            .map_or(0, |end| end + 1);
                        let text: Vec<u8> = rest.drain(..whole).collect();
                        stdout
                            .lock()
                            .expect("no panic holds it")
                            .push_str(&String::from_utf8_lossy(&text));
                    }
                    stdout
                        .lock()
                        .expect("no panic holds it")
                        .push_str(&String::from_utf8_lossy(&rest));
                }
            }),
            std::thread::spawn({
                let stderr = Arc::clone(&stderr);
                move || {
                    for line in BufReader::new(err).lines().map_while(Result::ok) {
                        if line.starts_with(READY) && ready_sender.send(()).is_err() {
                            // The test was not waiting any more.
                        }
                        let mut text = stderr.lock().expect("no panic holds it");
                        text.push_str(&line);
                        text.push('\n');
                    }
                }
            }),
        ];
        let mut watch = Self {
            child,
            stdout,
            stderr,
            readers,
        };
        if ready.recv_timeout(patience()).is_err() {
            let status = watch.child.try_wait().context("ask for calitrace's status")?;
            bail!(
                "calitrace did not begin to observe (status {status:?}): {}",
                watch.stderr()
            );
        }
        Ok(watch)
    }

    /// Its process id.
    pub(crate) fn pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.child.id()).unwrap_or(i32::MAX))
    }

    /// What it has printed on standard output so far, whole lines.
    pub(crate) fn stdout(&self) -> String {
        self.stdout.lock().expect("no panic holds it").clone()
    }

    /// What it has printed on standard error so far.
    pub(crate) fn stderr(&self) -> String {
        self.stderr.lock().expect("no panic holds it").clone()
    }

    /// Packet traces printed so far (with `-o json`).
    pub(crate) fn packets(&self) -> Vec<Value> {
        self.stdout()
            .lines()
            .filter_map(|line| serde_json::from_str::<Value>(line).ok())
            .filter(|line| line["type"] == "packet")
            .collect()
    }

    /// Waits until what it printed satisfies `enough`.
    pub(crate) fn until(&self, what: &str, enough: impl Fn(&Self) -> bool) -> Result<()> {
        let start = Instant::now();
        while !enough(self) {
            if start.elapsed() > patience() {
                bail!(
                    "waited {:?} for {what}; standard output:\n{}\nstandard error:\n{}",
                    start.elapsed(),
                    self.stdout(),
                    self.stderr()
                );
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Sends a signal and waits for the end.
    pub(crate) fn signal(mut self, signal: Signal) -> Result<Finished> {
        kill(self.pid(), signal).with_context(|| format!("send {signal} to calitrace"))?;
        self.wait()
    }

    /// SIGINT, as Ctrl-C sends it.
    pub(crate) fn stop(self) -> Result<Finished> {
        self.signal(Signal::SIGINT)
    }

    /// Waits for the end.
    pub(crate) fn wait(&mut self) -> Result<Finished> {
        let start = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().context("wait for calitrace")? {
                break status;
            }
            if start.elapsed() > patience() {
                self.child.kill().context("kill calitrace")?;
                bail!("calitrace did not end within {:?}: {}", patience(), self.stderr());
            }
            std::thread::sleep(Duration::from_millis(10));
        };
        for reader in self.readers.drain(..) {
            if reader.join().is_err() {
                bail!("a reader of calitrace's output panicked");
            }
        }
        Ok(Finished {
            status,
            stdout: self.stdout(),
            stderr: self.stderr(),
        })
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) && self.child.kill().is_ok() {
            let _: std::io::Result<ExitStatus> = self.child.wait();
        }
    }
}
