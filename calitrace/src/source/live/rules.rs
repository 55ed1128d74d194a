//! Has the netfilter rules of nodes read, on a thread of its own: twelve thousand rules take 0.1 s (`iptables-nft-save`
//! 1.8.9), and another 30 ms to parse. In Calico's nftables mode the rules of 400 pods (10,600, with 10,000 members of sets)
//! take 0.4 s (`nft` 1.0.6, 3.4 MB of JSON), 0.12 s to take out of it what is needed, and 0.09 s to parse that; a packet then
//! goes through them in 20 µs, or 1 ms where the device it was to leave by is not known.

use std::{
    collections::{BTreeSet, HashSet},
    mem,
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{Receiver, Sender, channel},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use ipnet::IpNet;
use tokio::sync::mpsc::UnboundedSender;

use super::{control::Message, told::Told};
use crate::{event::Netns, netns::Handle};

/// A node whose rules are wanted.
#[derive(Clone, Debug)]
pub(super) struct Wanted {
    pub(super) handle: Handle,
    pub(super) name: String,
}

/// The reading thread. It ends when this and all that ask it are dropped, after what it is at: nobody has to wait for a tool
/// that hangs.
#[derive(Debug)]
pub(super) struct Reader {
    asker: Asker,
    translated: Arc<Mutex<BTreeSet<IpNet>>>,
}

#[derive(Debug)]
enum Request {
    /// These are the nodes, of which some are new. What comes with them is dropped when those have been read.
    Nodes(Vec<Wanted>, Sender<()>),
    /// Netfilter dropped something: the rules of all nodes are wanted as they are now.
    Again,
}

/// Reading takes no more than this part of the time, however much is dropped, and less where nothing changes: nftables tells
/// that.
const SHARE: u32 = 4;

/// The namespace of no node: what is asked of it is asked of all.
pub(super) const ALL: Netns = 0;

/// Has rules read again.
#[derive(Clone, Debug)]
pub(super) struct Asker {
    requests: Sender<Request>,
    asked: Asked,
}

/// The namespaces in which something was dropped since reading began last.
type Asked = Arc<Mutex<BTreeSet<Netns>>>;

impl Asker {
    /// In this namespace something was dropped; where it is no node's, on any of them.
    pub(super) fn ask(&self, netns: Netns) {
        let first = {
            let mut asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
            let none = asked.is_empty();
            asked.insert(netns);
            none
        };
        if first && self.requests.send(Request::Again).is_err() {
            log::debug!("the thread that reads netfilter rules is gone");
        }
    }
}

impl Reader {
    pub(super) fn start(messages: UnboundedSender<Message>) -> Result<Self> {
        let (requests, taken) = channel();
        let asked = Asked::default();
        let asker = Asker {
            requests,
            asked: Arc::clone(&asked),
        };
        let translated = Arc::default();
        let reader = Self {
            asker,
            translated: Arc::clone(&translated),
        };
        std::thread::Builder::new()
            .name("rules".to_owned())
            .spawn(move || serve(&taken, &asked, &translated, &messages))
            .context("start the thread that reads netfilter rules")?;
        Ok(reader)
    }

    /// By which rules are asked for.
    pub(super) fn asker(&self) -> &Asker {
        &self.asker
    }

    /// The addresses that lead to pods, as the rules were when they were read last.
    pub(super) fn translated(&self) -> BTreeSet<IpNet> {
        self.translated
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Makes these the nodes, and has the rules of new ones read. What comes back is closed when that is done.
    pub(super) fn adopt(&self, nodes: Vec<Wanted>) -> Receiver<()> {
        let (done, waits) = channel();
        if self.asker.requests.send(Request::Nodes(nodes, done)).is_err() {
            log::debug!("the thread that reads netfilter rules is gone");
        }
        waits
    }
}

fn serve(
    requests: &Receiver<Request>,
    asked: &Asked,
    translated: &Mutex<BTreeSet<IpNet>>,
    messages: &UnboundedSender<Message>,
) {
    let mut told = Told::default();
    let mut nodes: Vec<Wanted> = Vec::new();
    let (mut ended, mut rest) = (Instant::now(), Duration::ZERO);
    while let Ok(request) = requests.recv() {
        let is_asked = matches!(request, Request::Again);
        let (wanted, _done): (Vec<Wanted>, _) = match request {
            Request::Nodes(now, done) => {
                let old: HashSet<Netns> = nodes.iter().map(|node| node.handle.inode()).collect();
                nodes = now;
                let new = nodes.iter().filter(|node| !old.contains(&node.handle.inode()));
                let new: Vec<Wanted> = new.cloned().collect();
                for node in &new {
                    told.forget(node.handle.inode());
                }
                (new, Some(done))
            }
            Request::Again => {
                std::thread::sleep(rest.saturating_sub(ended.elapsed()));
                // What is dropped from here on may be by other rules than those that are read now.
                let asked = mem::take(&mut *asked.lock().unwrap_or_else(PoisonError::into_inner));
                let is_one = |node: &&Wanted| asked.contains(&node.handle.inode());
                let anywhere = asked.len() > nodes.iter().filter(is_one).count();
                let wanted = nodes.iter().filter(|node| anywhere || is_one(node));
                (wanted.cloned().collect(), None)
            }
        };
        let begun = Instant::now();
        for node in &wanted {
            for fact in told.read(node) {
                if messages.send(Message::Fact(fact)).is_err() {
                    return;
                }
            }
        }
        *translated.lock().unwrap_or_else(PoisonError::into_inner) = told.translated();
        ended = Instant::now();
        // What is read of a new node has been asked for by no drop.
        rest = if is_asked {
            (ended - begun) * (SHARE - 1)
        } else {
            Duration::ZERO
        };
    }
}
