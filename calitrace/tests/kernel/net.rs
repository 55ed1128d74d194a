//! Two network namespaces joined by a veth pair, and calitrace's hooks on both ends of it.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    os::fd::{FromRawFd as _, OwnedFd},
    path::Path,
    process::Command,
    sync::{
        atomic::{AtomicU32, Ordering},
        mpsc::{self, Receiver, RecvTimeoutError},
    },
    time::{Duration, Instant},
};

use calitrace::{
    event::{DropNames, Hook, Observation, decode},
    kernel::{Attached, Batch, Config, Drain, Kernel, Names},
    netns::Handle,
};

/// Address of the left end; the right one's last byte is one more.
pub(crate) const LEFT: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 1);
pub(crate) const RIGHT: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 2);
pub(crate) const LEFT6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x99, 0, 0, 0, 0, 0, 1);
pub(crate) const RIGHT6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x99, 0, 0, 0, 0, 0, 2);

/// How long to wait for what must come.
pub(crate) fn patience() -> Duration {
    let scale = std::env::var("CALITRACE_TIME_SCALE")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(1.0);
    Duration::from_secs(10).mul_f64(scale)
}

pub(crate) fn run(command: &str) {
    let mut words = command.split_whitespace();
    let output = Command::new(words.next().unwrap()).args(words).output().unwrap();
    assert!(
        output.status.success(),
        "{command}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// One end of the pair.
pub(crate) struct End {
    pub(crate) name: String,
    pub(crate) ns: Handle,
    pub(crate) ifindex: u32,
}

impl End {
    /// A UDP socket in this namespace.
    pub(crate) fn udp(&self, address: impl Into<IpAddr>, port: u16) -> UdpSocket {
        let address = SocketAddr::new(address.into(), port);
        self.ns.run(|| Ok(UdpSocket::bind(address)?)).unwrap()
    }

    /// A raw socket in this namespace that sends packets of an IP protocol; `send_to` takes what follows the header.
    pub(crate) fn raw(&self, family: i32, protocol: i32) -> UdpSocket {
        let fd = self.ns.run(|| {
            // SAFETY: no pointers; the descriptor is owned from here on.
            let fd = unsafe { libc::socket(family, libc::SOCK_RAW | libc::SOCK_CLOEXEC, protocol) };
            assert!(fd >= 0, "{}", std::io::Error::last_os_error());
            // SAFETY: just opened.
            Ok(unsafe { OwnedFd::from_raw_fd(fd) })
        });
        UdpSocket::from(fd.unwrap())
    }

    pub(crate) fn exec(&self, command: &str) {
        run(&format!("ip netns exec {} {command}", self.name));
    }
}

/// Two namespaces, joined.
pub(crate) struct Net {
    pub(crate) left: End,
    pub(crate) right: End,
}

/// Device name at both ends.
pub(crate) const DEVICE: &str = "link0";

impl Net {
    pub(crate) fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let id = format!(
            "ctk{}-{}",
            std::process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        );
        let (left, right) = (format!("{id}l"), format!("{id}r"));
        for name in [&left, &right] {
            run(&format!("ip netns add {name}"));
            run(&format!("ip -n {name} link set lo up"));
        }
        run(&format!(
            "ip -n {left} link add {DEVICE} type veth peer name {DEVICE} netns {right}"
        ));
        for (name, v4, v6) in [(&left, LEFT, LEFT6), (&right, RIGHT, RIGHT6)] {
            run(&format!("ip -n {name} addr add {v4}/24 dev {DEVICE}"));
            run(&format!("ip -n {name} addr add {v6}/64 dev {DEVICE} nodad"));
            run(&format!("ip -n {name} link set {DEVICE} up"));
        }
        let end = |name: String| {
            let ns = Handle::open(&Path::new("/run/netns").join(&name)).unwrap();
            let ifindex = ns.run(|| Ok(nix::net::if_::if_nametoindex(DEVICE)?)).unwrap();
            End { name, ns, ifindex }
        };
        Self {
            left: end(left),
            right: end(right),
        }
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        for end in [&self.left, &self.right] {
            // Also on the way out of a failed test: a second panic would hide the first.
            match Command::new("ip").args(["netns", "del", &end.name]).status() {
                Ok(status) if status.success() => {}
                other => println!("cannot remove the namespace {}: {other:?}", end.name),
            }
        }
    }
}

/// calitrace's kernel side, and what it has seen.
pub(crate) struct Watch {
    pub(crate) kernel: Kernel,
    drain: Option<Drain>,
    batches: Receiver<Batch>,
    names: Names,
    seen: Vec<Observation>,
}

impl Watch {
    /// Loads the programs.
    pub(crate) fn new(config: &Config) -> Self {
        let mut kernel = Kernel::load(config).unwrap();
        let (sender, batches) = mpsc::sync_channel(1024);
        let drain = Drain::start(kernel.take_ring().unwrap(), Duration::from_millis(5), sender).unwrap();
        let names = kernel.names();
        Self {
            kernel,
            drain: Some(drain),
            batches,
            names,
            seen: Vec::new(),
        }
    }

    pub(crate) fn attach(&mut self, end: &End, hook: Hook) {
        assert_eq!(
            self.kernel.attach_tc(&end.ns, DEVICE, end.ifindex, hook).unwrap(),
            Attached::Yes
        );
    }

    /// The usual set-up: what leaves the left end and what arrives at the right one, as workload hooks, so that all
    /// of it is recorded.
    pub(crate) fn left_to_right(net: &Net) -> Self {
        let mut watch = Self::new(&Config::default());
        watch.attach(&net.left, Hook::WorkloadEgress);
        watch.attach(&net.right, Hook::WorkloadIngress);
        watch
    }

    /// Waits until as many observations as `count` satisfy `wanted`, and returns them.
    pub(crate) fn wait(&mut self, count: usize, wanted: impl Fn(&Observation) -> bool) -> Vec<Observation> {
        let deadline = Instant::now() + patience();
        loop {
            let found: Vec<_> = self.seen.iter().filter(|seen| wanted(seen)).cloned().collect();
            if found.len() >= count {
                assert_eq!(found.len(), count, "{found:#?}");
                return found;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(
                !left.is_zero(),
                "{} of {count}: {found:#?}\nof\n{:#?}",
                found.len(),
                self.seen
            );
            match self.batches.recv_timeout(left) {
                Ok(batch) => self.take(&batch),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => panic!("the drain has ended"),
            }
        }
    }

    /// Waits for one observation at each of the two hooks: first the left, then the right one.
    pub(crate) fn pair(&mut self, wanted: impl Fn(&Observation) -> bool) -> (Observation, Observation) {
        let mut both = self.wait(2, wanted);
        both.sort_by_key(|seen| seen.time);
        let right = both.pop().unwrap();
        (both.pop().unwrap(), right)
    }

    /// Starts anew with what comes from here on.
    pub(crate) fn forget(&mut self) {
        self.seen.clear();
    }

    /// Detaches, drains to the end and returns everything seen.
    pub(crate) fn finish(&mut self) -> Vec<Observation> {
        self.kernel.detach_all().unwrap();
        let drain = self.drain.take().unwrap();
        let stopping = std::thread::spawn(move || drain.stop());
        while let Ok(batch) = self.batches.recv() {
            self.take(&batch);
        }
        stopping.join().unwrap().unwrap();
        std::mem::take(&mut self.seen)
    }

    fn take(&mut self, batch: &Batch) {
        let names: &dyn DropNames = &self.names;
        self.seen
            .extend(batch.iter().map(|record| decode(record, names).unwrap()));
    }
}
