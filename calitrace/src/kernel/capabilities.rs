//! What this kernel offers for tracing, found out by trying, never by its version: distributions backport, and
//! release names do not always parse.

use std::{fs, io, path::Path};

use aya::{
    maps::MapType,
    programs::{ProgramError, ProgramType, SchedClassifier, TcAttachType},
    sys::{SyscallError, is_map_supported, is_program_supported},
};

use super::{
    btf::Btf,
    functions, offsets,
    permission::{self, program_io_error},
};

/// One thing that a kernel may offer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capability {
    /// Its name.
    pub name: &'static str,
    /// Whether it works here.
    pub works: bool,
    /// What was found: which variant works, or why it does not.
    pub detail: String,
    /// What is not seen without it, as the end of a sentence.
    pub lost: &'static str,
    /// What would bring it.
    pub remedy: &'static str,
}

/// What is known of a capability before it is tried.
struct Probe {
    name: &'static str,
    lost: &'static str,
    remedy: &'static str,
    /// What was found, or why it does not work.
    attempt: fn() -> Result<String, String>,
}

const PROBES: [Probe; 11] = [
    Probe {
        name: "permission",
        lost: "as it says; without CAP_BPF, CAP_PERFMON, CAP_NET_ADMIN and CAP_SYS_ADMIN nothing can be traced",
        remedy: "run it as root, or with these capabilities",
        attempt: permission,
    },
    Probe {
        name: "kernel memory",
        lost: "where and why packets are dropped, and what happens inside the kernel: only TC hooks observe",
        remedy: "boot with lockdown=integrity or without lockdown",
        attempt: || permission::may_read_kernel().map(|()| "programs may read it".to_owned()),
    },
    Probe {
        name: "tc",
        lost: "every packet: nothing can be traced",
        remedy: "a kernel with CONFIG_NET_CLS_BPF or CONFIG_NET_XGRESS, and root",
        attempt: || program(ProgramType::SchedClassifier),
    },
    Probe {
        name: "tcx",
        lost: "nothing; programs are attached by clsact, and are swept at the next start after a kill",
        remedy: "Linux 6.6 or later with CONFIG_NET_XGRESS",
        attempt: tcx,
    },
    Probe {
        name: "ring buffer",
        lost: "every packet: records cannot leave the kernel",
        remedy: "Linux 5.8 or later",
        attempt: || map(MapType::RingBuf),
    },
    Probe {
        name: "btf",
        lost: "where and why packets are dropped, and buffer addresses that survive a clone",
        remedy: "a kernel with CONFIG_DEBUG_INFO_BTF, or --btf with a file for it",
        attempt: btf,
    },
    Probe {
        name: "raw tracepoints",
        lost: "where and why packets are dropped",
        remedy: "a kernel with CONFIG_BPF_EVENTS",
        attempt: || program(ProgramType::RawTracePoint),
    },
    Probe {
        name: "kernel symbols",
        lost: "the function in which a packet was dropped",
        remedy: "sysctl kernel.kptr_restrict=1 or 0, and CONFIG_KALLSYMS",
        attempt: symbols,
    },
    Probe {
        name: "kprobes",
        lost: "what happens inside the kernel between two interfaces (netfilter verdicts, NAT, tunnel functions)",
        remedy: "a kernel with CONFIG_KPROBES and CONFIG_KPROBE_EVENTS",
        attempt: kprobes,
    },
    Probe {
        name: "fentry",
        lost: "nothing where kprobes work: they cost more",
        remedy: "a kernel with CONFIG_DYNAMIC_FTRACE_WITH_DIRECT_CALLS that permits BPF trampolines",
        attempt: || program(ProgramType::Tracing),
    },
    Probe {
        name: "ipip",
        lost: "Calico's IPIP encapsulation (tunl0); VXLAN and no encapsulation are not affected",
        remedy: "the ipip module (CONFIG_NET_IPIP)",
        attempt: ipip,
    },
];

/// Tries everything.
pub fn capabilities() -> Vec<Capability> {
    PROBES
        .iter()
        .map(|probe| {
            let found = (probe.attempt)();
            Capability {
                name: probe.name,
                works: found.is_ok(),
                detail: found.unwrap_or_else(|why| why),
                lost: probe.lost,
                remedy: probe.remedy,
            }
        })
        .collect()
}

fn permission() -> Result<String, String> {
    permission::check("watch").map_err(|error| error.what)?;
    let lines = permission::shortcomings();
    if lines.is_empty() {
        Ok("all capabilities that it takes".to_owned())
    } else {
        Err(lines.join("; "))
    }
}

fn program(kind: ProgramType) -> Result<String, String> {
    match is_program_supported(kind) {
        Ok(true) => Ok("programs of this type load".to_owned()),
        Ok(false) => Err("this kernel has no such programs".to_owned()),
        Err(error) => Err(format!("the kernel refuses such programs: {}", cause(&error))),
    }
}

/// The system's error in words, without the wrapping.
fn cause(error: &ProgramError) -> String {
    program_io_error(error).map_or_else(|| error.to_string(), io::Error::to_string)
}

fn map(kind: MapType) -> Result<String, String> {
    match is_map_supported(kind) {
        Ok(true) => Ok("maps of this type can be made".to_owned()),
        Ok(false) => Err("this kernel has no such maps".to_owned()),
        Err(SyscallError { io_error, .. }) => Err(format!("the kernel refuses such maps: {io_error}")),
    }
}

/// Asks which TCX programs the loopback device has: a kernel without TCX does not know the question.
fn tcx() -> Result<String, String> {
    match SchedClassifier::query_tcx("lo", TcAttachType::Ingress) {
        Ok(_) => Ok("programs attach in a defined order and go with the process".to_owned()),
        Err(error) => Err(format!("the kernel does not know it: {}", cause(&error))),
    }
}

fn btf() -> Result<String, String> {
    let path = Path::new("/sys/kernel/btf/vmlinux");
    let data = fs::read(path).map_err(|error| format!("{}: {error}", path.display()))?;
    let btf = Btf::parse(data).map_err(|error| format!("{}: {error}", path.display()))?;
    let found = offsets::read(&btf);
    if !offsets::suffice(&found) {
        return Err(format!(
            "{}: it lacks members of sk_buff, net_device or net",
            path.display()
        ));
    }
    let reasons = btf
        .enum_values("skb_drop_reason")
        .map_or(0, |values| values.len());
    Ok(match reasons {
        0 => "without drop reasons (Linux before 5.17)".to_owned(),
        count => format!("{} types, {count} drop reasons", btf.len()),
    })
}

fn symbols() -> Result<String, String> {
    let text = read_symbols()?;
    // Hidden addresses are all zero.
    let visible = text
        .lines()
        .filter(|line| !line.starts_with("0000000000000000 "))
        .count();
    if visible > 0 {
        Ok(format!("{visible} symbols"))
    } else {
        Err("the addresses are hidden".to_owned())
    }
}

fn kprobes() -> Result<String, String> {
    if functions::has_kprobes() {
        Ok("functions can be probed by perf events".to_owned())
    } else {
        Err("the kernel is built without kprobe events".to_owned())
    }
}

fn ipip() -> Result<String, String> {
    if read_symbols()?
        .lines()
        .any(|line| line.split_ascii_whitespace().nth(2) == Some("ipip_tunnel_xmit"))
    {
        return Ok("in the kernel".to_owned());
    }
    let release =
        nix::sys::utsname::uname().map_err(|error| format!("read the kernel's release: {error}"))?;
    let folder = Path::new("/lib/modules").join(release.release());
    let listed = fs::read_to_string(folder.join("modules.dep"));
    if listed.is_ok_and(|list| lists_module(&list, "ipip")) {
        Ok("as a module".to_owned())
    } else {
        Err("neither in the kernel nor among its modules".to_owned())
    }
}

/// Whether a `modules.dep` has a module: lines of the form `kernel/net/ipv4/ipip.ko.xz: kernel/…`.
fn lists_module(list: &str, name: &str) -> bool {
    list.lines()
        .filter_map(|line| line.split(':').next())
        .any(|path| path.rsplit('/').next().and_then(|file| file.split('.').next()) == Some(name))
}

fn read_symbols() -> Result<String, String> {
    let path = Path::new("/proc/kallsyms");
    fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_is_found_by_its_file_name() {
        let list =
            "kernel/net/ipv4/ip_tunnel.ko.xz:\nkernel/net/ipv4/ipip.ko.xz: kernel/net/ipv4/tunnel4.ko.xz\n";
        assert!(lists_module(list, "ipip"));
        assert!(lists_module(list, "ip_tunnel"));
        assert!(!lists_module(list, "tunnel4"), "named as a dependency only");
    }

    #[test]
    fn every_capability_says_what_is_lost_and_what_brings_it() {
        for found in capabilities() {
            assert!(
                !found.detail.is_empty() && !found.lost.is_empty() && !found.remedy.is_empty(),
                "{found:?}"
            );
        }
    }

    #[test]
    fn what_is_found_agrees_with_the_system() {
        let found = capabilities();
        let works = |name: &str| found.iter().find(|found| found.name == name).unwrap().works;
        let btf = fs::metadata("/sys/kernel/btf/vmlinux").is_ok_and(|file| file.len() > 0);
        assert_eq!(works("btf"), btf);
        // The symbols of the two functions are there exactly when the features are built in or loaded.
        let symbols = read_symbols().unwrap();
        let has = |name: &str| {
            symbols
                .lines()
                .any(|line| line.split_ascii_whitespace().nth(2) == Some(name))
        };
        assert_eq!(works("kprobes"), has("register_kprobe"));
        if !works("ipip") {
            assert!(!has("ipip_tunnel_xmit"));
        }
    }
}
