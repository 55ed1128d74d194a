//! Reads what `iptables-save` and `ip6tables-save` write (1.8, both backends).
//!
//! What is not understood becomes a condition that may hold or not. So nothing that this does not know makes a drop look
//! impossible.

use std::{iter::Peekable, mem};

use super::{
    marks,
    packet::States,
    rules::{Base, Chain, End, Match, Rule, Ruleset, Target, Way, What},
    tiers,
    walk::Hook,
};

/// Tables and their priorities (`include/uapi/linux/netfilter_ipv4.h`). The nat table drops nothing, and is not read.
const TABLES: [(&str, i64); 3] = [("raw", -300), ("mangle", -150), ("filter", 0)];

impl Ruleset {
    /// The rules of a text. Lines that are none are passed over.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        let mut rules = Self::default();
        let mut table = None;
        for line in text.lines() {
            if let Some(name) = line.strip_prefix('*') {
                table = Some(rules.tables.entry(name.trim().to_owned()).or_default());
                continue;
            }
            let Some(table) = table.as_mut() else { continue };
            if let Some(chain) = line.strip_prefix(':') {
                let mut words = chain.split_whitespace();
                let name = words.next().unwrap_or_default().to_owned();
                let drops = words.next() == Some("DROP");
                table.insert(
                    name,
                    Chain {
                        drops,
                        ..Chain::default()
                    },
                );
            } else if let Some((chain, rule)) = rule(line) {
                table.entry(chain).or_default().rules.push(rule);
            }
        }
        for hook in Hook::ALL {
            for (name, priority) in TABLES {
                let table = rules.tables.get(name);
                if table.is_some_and(|table| table.contains_key(hook.name())) {
                    rules.bases.push(Base {
                        hook,
                        priority,
                        table: name.to_owned(),
                        chain: hook.name().to_owned(),
                    });
                }
            }
        }
        rules.unset = marks::of_denied(&rules.tables);
        tiers::tell(&mut rules.tables);
        rules
    }
}

/// The words of a line: split at spaces, but not within quotation marks, where a backslash keeps the next character.
fn words(line: &str) -> Vec<String> {
    let mut words = Vec::new();
    let (mut word, mut quoted, mut begun) = (String::new(), false, false);
    let mut characters = line.chars();
    while let Some(character) = characters.next() {
        match character {
            '"' => (quoted, begun) = (!quoted, true),
            '\\' if quoted => word.extend(characters.next()),
            ' ' if !quoted => {
                if mem::take(&mut begun) {
                    words.push(mem::take(&mut word));
                }
            }
            _ => {
                word.push(character);
                begun = true;
            }
        }
    }
    if begun {
        words.push(word);
    }
    words
}

/// `-A CHAIN …`, perhaps with counters before it.
fn rule(line: &str) -> Option<(String, Rule)> {
    let text = match line.strip_prefix('[') {
        Some(counters) => counters.split_once("] ")?.1,
        None => line,
    };
    let mut words = words(text.strip_prefix("-A ")?).into_iter().peekable();
    let chain = words.next()?;
    let mut reader = Reader::default();
    while let Some(word) = words.next() {
        reader.option(&word, &mut words);
    }
    let Reader {
        comments,
        matches,
        target,
        ..
    } = reader;
    let drops = matches!(target, Target::Drop | Target::Reject);
    let rule = Rule {
        comments,
        matches,
        target,
        text: drops.then(|| text.into()),
    };
    Some((chain, rule))
}

type Words = Peekable<std::vec::IntoIter<String>>;

struct Reader {
    comments: Vec<String>,
    matches: Vec<Match>,
    target: Target,
    not: bool,
    /// The condition that is being read is not understood, which has been noted.
    unknown: bool,
}

impl Default for Reader {
    fn default() -> Self {
        Self {
            comments: Vec::new(),
            matches: Vec::new(),
            target: Target::Next,
            not: false,
            unknown: false,
        }
    }
}

impl Reader {
    fn option(&mut self, option: &str, words: &mut Words) {
        let not = mem::take(&mut self.not);
        let mut value = || words.next().unwrap_or_default();
        let what = match option {
            "!" => {
                self.not = true;
                return;
            }
            "-m" => {
                self.unknown = false;
                match value().as_str() {
                    // These say nothing but by their options.
                    "addrtype" | "comment" | "conntrack" | "icmp" | "icmp6" | "mark" | "multiport"
                    | "set" | "state" | "tcp" | "udp" => return,
                    // It holds for what passes, unless turned round.
                    "rpfilter" => {
                        self.matches.push(Match {
                            not: true,
                            what: What::Unreachable,
                        });
                        return;
                    }
                    _ => None,
                }
            }
            "--comment" => {
                self.comments.push(value());
                return;
            }
            "-j" | "-g" => {
                let name = value();
                self.target = target(name, option == "-g", words);
                return;
            }
            "-p" => {
                let name = value();
                let Some(number) = protocol(&name) else {
                    return self.unknown();
                };
                // Every packet has one.
                if number == 0 {
                    return;
                }
                Some(What::Protocol(number))
            }
            "-s" => address(End::Source, &value()),
            "-d" => address(End::Destination, &value()),
            "-i" => Some(What::Device(Way::In, value())),
            "-o" => Some(What::Device(Way::Out, value())),
            "--sport" | "--sports" => ports(End::Source, &value()),
            "--dport" | "--dports" => ports(End::Destination, &value()),
            "--ctstate" | "--state" => states(&value()),
            "--mark" => mark(&value()).map(|(value, mask)| What::Mark { value, mask }),
            "--icmp-type" | "--icmpv6-type" => match value().as_str() {
                "any" | "255" => return,
                text => icmp(text),
            },
            "--match-set" => {
                let name = value();
                set(name, &value())
            }
            // Turns round what the exceptions of the set before it mean.
            "--return-nomatch" => {
                if let Some(last) = self.matches.last_mut() {
                    last.what = What::Unknown;
                }
                return;
            }
            "--src-type" => local(End::Source, &value()),
            "--dst-type" => local(End::Destination, &value()),
            "--invert" => {
                if let Some(last) = self.matches.last_mut() {
                    last.not = !last.not;
                }
                return;
            }
            // How `rpfilter` looks.
            "--validmark" | "--loose" | "--accept-local" => return,
            _ => None,
        };
        match what {
            Some(what) => self.matches.push(Match { not, what }),
            None => self.unknown(),
        }
    }

    fn unknown(&mut self) {
        if !mem::replace(&mut self.unknown, true) {
            self.matches.push(Match {
                not: false,
                what: What::Unknown,
            });
        }
    }
}

fn target(name: String, goto: bool, words: &mut Words) -> Target {
    let mut options: Vec<String> = words.collect();
    let mut value_of = |option: &str| {
        let place = options.iter().position(|word| word == option)?;
        (place + 1 < options.len()).then(|| options.swap_remove(place + 1))
    };
    match name.as_str() {
        "ACCEPT" => Target::Accept,
        "DROP" => Target::Drop,
        "REJECT" => Target::Reject,
        "RETURN" => Target::Return,
        "MARK" => {
            let set = value_of("--set-xmark").and_then(|text| mark(&text));
            match set {
                Some((value, mask)) => Target::Mark {
                    value: Some(value),
                    mask,
                },
                None => Target::Mark {
                    value: None,
                    mask: u32::MAX,
                },
            }
        }
        // Saves the mark, or brings it back.
        "CONNMARK" => Target::Mark {
            value: None,
            mask: u32::MAX,
        },
        "NFLOG" => Target::Log(value_of("--nflog-prefix").unwrap_or_default()),
        "LOG" | "TRACE" | "CT" | "NOTRACK" | "TCPMSS" | "DSCP" | "TOS" | "TTL" | "HL" | "CHECKSUM"
        | "CLASSIFY" | "CONNSECMARK" | "SECMARK" | "SET" | "AUDIT" | "TEE" | "ULOG" | "RATEEST" => {
            Target::Next
        }
        _ => Target::Chain { name, goto },
    }
}

/// Names as `iptables` writes them (`xtables_chain_protos`), and some of `/etc/protocols`.
pub(super) fn protocol(name: &str) -> Option<u8> {
    Some(match name {
        "all" => 0,
        "icmp" => 1,
        "igmp" => 2,
        "ipencap" | "ipip" | "ipv4" => 4,
        "tcp" => 6,
        "udp" => 17,
        "ipv6" => 41,
        "gre" => 47,
        "esp" | "ipv6-crypt" => 50,
        "ah" | "ipv6-auth" => 51,
        "icmpv6" | "ipv6-icmp" => 58,
        "sctp" => 132,
        "udplite" => 136,
        number => number.parse().ok()?,
    })
}

fn address(end: End, text: &str) -> Option<What> {
    let net = text
        .parse()
        .or_else(|_| text.parse().map(|address: std::net::IpAddr| address.into()));
    net.ok().map(|net| What::Address(end, net))
}

/// `80`, `80,443`, `1024:65535`.
fn ports(end: End, text: &str) -> Option<What> {
    let range = |part: &str| -> Option<(u16, u16)> {
        match part.split_once(':') {
            Some((first, last)) => Some((first.parse().ok()?, last.parse().ok()?)),
            None => part.parse().ok().map(|port| (port, port)),
        }
    };
    let ranges = text.split(',').map(range).collect::<Option<_>>()?;
    Some(What::Ports(end, ranges))
}

fn states(text: &str) -> Option<What> {
    let mut bits = 0;
    for name in text.split(',') {
        bits |= match name {
            "INVALID" => States::INVALID,
            "NEW" => States::NEW,
            "ESTABLISHED" => States::ESTABLISHED,
            "RELATED" => States::RELATED,
            "UNTRACKED" => States::UNTRACKED,
            _ => return None,
        };
    }
    Some(What::State(bits))
}

/// `0x10000/0x10000`; without a mask all bits.
fn mark(text: &str) -> Option<(u32, u32)> {
    let number = |text: &str| match text.strip_prefix("0x") {
        Some(digits) => u32::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    };
    match text.split_once('/') {
        Some((value, mask)) => Some((number(value)?, number(mask)?)),
        None => Some((number(text)?, u32::MAX)),
    }
}

/// `8` or `3/4`.
fn icmp(text: &str) -> Option<What> {
    let (kind, codes) = match text.split_once('/') {
        Some((kind, code)) => {
            let code = code.parse().ok()?;
            (kind, (code, code))
        }
        None => (text, (0, u8::MAX)),
    };
    Some(What::Icmp(kind.parse().ok()?, codes))
}

/// `src`, `dst,dst`.
fn set(name: String, text: &str) -> Option<What> {
    let end = |text| match text {
        "src" => Some(End::Source),
        "dst" => Some(End::Destination),
        _ => None,
    };
    let ends = text.split(',').map(end).collect::<Option<_>>()?;
    Some(What::Set(name, ends))
}

fn local(end: End, text: &str) -> Option<What> {
    (text == "LOCAL").then_some(What::Local(end))
}
