//! Less than root: what can work, works; what cannot costs one clear line.

use std::{
    fs, io,
    os::unix::{fs::PermissionsExt as _, process::CommandExt as _},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};
use calitrace_tests::{
    Lab, Need, Options, Policy, Test, command, lab::netfilter::Backend, needs::LOCKDOWN, test,
};
use serde_json::Value;

use crate::{
    drops::denied_by_sets,
    support::{Finished, Watch, arrived, binary, goes, path, quiet, with},
};

pub(crate) const TESTS: &[Test] = &[
    test("capabilities_instead_of_root", capabilities_only),
    test("each_missing_capability_is_named", each_missing),
    test(
        "without_iptables_save_policies_have_no_names",
        without_iptables_save,
    ),
    test("without_ipset_it_may_be_one_of_several_policies", without_ipset).needs(&[Need::Program("ipset")]),
    test("without_nft_policies_of_nftables_have_no_names", without_nft).needs(&[Need::Program("nft")]),
    test("nft_alone_shows_all_rules_of_nftables", with_nft_alone).needs(&[Need::Program("nft")]),
    test("a_hook_that_is_refused_is_missing_in_the_log", refused_hook),
    test("hidden_symbols_cost_a_line", hidden_symbols).needs(&[Need::Guest]),
    // The last of all, since it cannot be undone.
    test("a_kernel_locked_down_still_shows_paths", locked_down).needs(&[Need::Lockdown]),
];

/// Bits of a capability set (include/uapi/linux/capability.h).
const NET_ADMIN: u32 = 12;
const SYS_ADMIN: u32 = 21;
const PERFMON: u32 = 38;
const BPF: u32 = 39;
const ALL: [u32; 4] = [NET_ADMIN, SYS_ADMIN, PERFMON, BPF];

/// `calitrace`, copied to where everybody may run it, as a user without privileges but these capabilities. The copy goes
/// with the folder.
fn as_nobody(capabilities: &[u32]) -> Result<(tempfile::TempDir, Command)> {
    let folder = tempfile::tempdir().context("make a folder")?;
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755))
        .context("open the folder to all")?;
    let copy = folder.path().join("calitrace");
    fs::copy(binary()?, &copy).context("copy the binary")?;
    let mut command = Command::new(&copy);
    command.current_dir("/");
    let capabilities = capabilities.to_vec();
    // SAFETY: only system calls between fork and exec; no allocation, no lock.
    unsafe {
        command.pre_exec(move || become_nobody(&capabilities));
    }
    Ok((folder, command))
}

/// Gives up root and keeps these capabilities over the coming exec, as ambient ones.
fn become_nobody(capabilities: &[u32]) -> io::Result<()> {
    const NOBODY: libc::uid_t = 65534;
    /// `_LINUX_CAPABILITY_VERSION_3`.
    const VERSION: u32 = 0x2008_0522;
    let check = |result: libc::c_long| {
        if result == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    };
    let mut set = [[0_u32; 3]; 2];
    for capability in capabilities {
        // Effective, permitted, inheritable.
        for kind in &mut set[*capability as usize / 32] {
            *kind |= 1 << (capability % 32);
        }
    }
    let unlimited = libc::rlimit {
        rlim_cur: libc::RLIM_INFINITY,
        rlim_max: libc::RLIM_INFINITY,
    };
    // SAFETY: each pointer leads to what the call reads, and outlives it.
    unsafe {
        // Before 5.11 programs are locked memory, and a service manager would set that limit. Later kernels do not look
        // at it, so it may be refused there.
        libc::setrlimit(libc::RLIMIT_MEMLOCK, &raw const unlimited);
        check(libc::prctl(libc::PR_SET_KEEPCAPS, 1, 0, 0, 0).into())?;
        check(libc::setgroups(0, std::ptr::null()).into())?;
        check(libc::setgid(NOBODY).into())?;
        check(libc::setuid(NOBODY).into())?;
        let header = [VERSION, 0];
        check(libc::syscall(libc::SYS_capset, &raw const header, &raw const set))?;
        for capability in capabilities {
            check(
                libc::prctl(
                    libc::PR_CAP_AMBIENT,
                    libc::PR_CAP_AMBIENT_RAISE,
                    *capability,
                    0,
                    0,
                )
                .into(),
            )?;
        }
    }
    Ok(())
}

fn capabilities_only() -> Result<()> {
    let lab = Lab::up(&quiet())?;
    let (_folder, mut command) = as_nobody(&ALL)?;
    command.arg("watch").args(with(&lab, &["-o", "json"]));
    let watch = Watch::spawn(command)?;
    let pod2 = lab.pod("pod2")?;
    let ping = lab.ping("pod1", pod2.ip(), 3, &[])?;
    ensure!(ping.received == 3, "{ping:?}");
    // Connections end in frees that are no drops, and that are told from drops by function names.
    let server = lab.http_server("pod2", 8080)?;
    lab.http_get("pod1", (pod2.address, 8080).into(), 1000)?;
    server.stop()?;
    lab.set_policy("pod2", Policy::Deny)?;
    let ping = lab.ping("pod1", pod2.ip(), 1, &[])?;
    ensure!(ping.received == 0, "{ping:?}");
    watch.until("all verdicts", |watch| {
        watch
            .packets()
            .iter()
            .any(|packet| packet["verdict"] == "dropped")
    })?;
    let finished = watch.stop()?;
    ensure!(finished.status.success(), "{finished:?}");
    let packets = finished.packets()?;
    let (from, to) = (lab.pod("pod1")?.address.to_string(), pod2.address.to_string());
    let echoes = packets
        .iter()
        .filter(|packet| goes(packet, "icmp", &from, &to) || goes(packet, "icmp", &to, &from));
    let mut verdicts: Vec<&str> = echoes.filter_map(|packet| packet["verdict"].as_str()).collect();
    verdicts.sort_unstable();
    let mut expected = vec!["delivered"; 6];
    expected.push("dropped");
    ensure!(verdicts == expected, "{verdicts:?}: {packets:#?}");
    for packet in packets.iter().filter(|packet| packet["verdict"] == "dropped") {
        // The node's own name is in files that cannot be read.
        let node = packet["drop"]["node"].as_str().unwrap_or_default();
        ensure!(
            packet["flow"]["proto"] == "icmp" && node.ends_with("minikube-m02"),
            "{packet:#}"
        );
    }
    // What is lost for want of others: a line each.
    let warnings: Vec<&str> = finished
        .stderr
        .lines()
        .filter(|line| line.starts_with("warning: "))
        .collect();
    for capability in ["CAP_SYS_PTRACE", "CAP_DAC_READ_SEARCH"] {
        let lines = warnings.iter().filter(|line| line.contains(capability));
        ensure!(lines.count() == 1, "{warnings:#?}");
    }
    // The third: function names, where the kernel hides its symbols from others than root.
    let lines = warnings.iter().filter(|line| line.contains("CAP_"));
    ensure!(lines.count() <= 3, "{warnings:#?}");
    Ok(())
}

fn each_missing() -> Result<()> {
    let lab = Lab::up(&quiet())?;
    for (missing, name) in [
        (NET_ADMIN, Some("CAP_NET_ADMIN")),
        (SYS_ADMIN, Some("CAP_SYS_ADMIN")),
        // CAP_SYS_ADMIN includes these two, as it did before they came with 5.8.
        (PERFMON, None),
        (BPF, None),
    ] {
        let rest: Vec<u32> = ALL
            .into_iter()
            .filter(|capability| *capability != missing)
            .collect();
        let (_folder, mut command) = as_nobody(&rest)?;
        command.arg("watch").args(with(&lab, &["--duration", "200ms"]));
        let output = command.stdin(Stdio::null()).output().context("run as nobody")?;
        let text = String::from_utf8_lossy(&output.stderr);
        let Some(name) = name else {
            ensure!(output.status.code() == Some(0), "without {missing}: {output:?}");
            continue;
        };
        ensure!(output.status.code() == Some(3), "without {name}: {output:?}");
        let others = ["CAP_NET_ADMIN", "CAP_SYS_ADMIN", "CAP_BPF", "CAP_PERFMON"];
        for other in others {
            ensure!(text.contains(other) == (other == name), "without {name}: {text}");
        }
        ensure!(text.lines().count() == 1, "one line: {text}");
    }
    Ok(())
}

/// As a profile of a container does: raw tracepoints are refused, and whatever else `bpf` is asked for is not.
fn refuse_raw_tracepoints() -> io::Result<()> {
    /// `BPF_RAW_TRACEPOINT_OPEN` (include/uapi/linux/bpf.h).
    const RAW_TRACEPOINT_OPEN: u32 = 17;
    /// Offsets in `seccomp_data` (include/uapi/linux/seccomp.h) of the call's number and of its first argument's lower half.
    const NUMBER: u32 = 0;
    const FIRST: u32 = 16;
    #[expect(clippy::cast_possible_truncation, reason = "the kernel's constants fit")]
    let step = |code: u32, jt, jf, k| libc::sock_filter {
        code: code as u16,
        jt,
        jf,
        k,
    };
    let (load, equal, end) = (
        libc::BPF_LD | libc::BPF_W | libc::BPF_ABS,
        libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K,
        libc::BPF_RET | libc::BPF_K,
    );
    let number = u32::try_from(libc::SYS_bpf).map_err(io::Error::other)?;
    let mut steps = [
        step(load, 0, 0, NUMBER),
        step(equal, 0, 3, number),
        step(load, 0, 0, FIRST),
        step(equal, 0, 1, RAW_TRACEPOINT_OPEN),
        step(end, 0, 0, libc::SECCOMP_RET_ERRNO | libc::EPERM.cast_unsigned()),
        step(end, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog {
        len: 6,
        filter: steps.as_mut_ptr(),
    };
    // SAFETY: the program and its steps outlive the call, which reads them.
    match unsafe {
        libc::prctl(
            libc::PR_SET_SECCOMP,
            libc::SECCOMP_MODE_FILTER,
            &raw const program,
        )
    } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The header of an event log is true: a hook that was refused while it was attached does not observe.
fn refused_hook() -> Result<()> {
    let lab = Lab::up(&quiet())?;
    let folder = tempfile::tempdir().context("make a folder")?;
    let log = folder.path().join("log.jsonl");
    let file = log.to_str().context("a path in UTF-8")?;
    let mut command = Command::new(binary()?);
    command
        .arg("watch")
        .args(with(&lab, &["-o", "json", "--hooks", "tc", "-w", file]));
    // SAFETY: only a system call between fork and exec; no allocation, no lock.
    unsafe {
        command.pre_exec(refuse_raw_tracepoints);
    }
    let watch = Watch::spawn(command)?;
    let ping = lab.ping("pod1", lab.pod("pod2")?.ip(), 1, &[])?;
    ensure!(ping.received == 1, "{ping:?}");
    let finished = watch.stop()?;
    ensure!(finished.status.success(), "{finished:?}");
    ensure!(
        lines_with(&finished, "kfree_skb is not observed") == 1,
        "{}",
        finished.stderr
    );
    let text = fs::read_to_string(&log).context("read the log")?;
    let header: Value = serde_json::from_str(text.lines().next().context("a header")?)?;
    let missing = |hook: &str| -> Result<Value> {
        let hooks = header["hooks"].as_array().context("hooks")?;
        let status = hooks.iter().find(|status| status["hook"] == hook);
        Ok(status.with_context(|| format!("{hook}: {header:#}"))?["missing"].clone())
    };
    ensure!(missing("kfree_skb")?.is_string(), "{header:#}");
    ensure!(missing("workload_ingress")?.is_null(), "{header:#}");
    // What it says to observe through is what it attached: those at interfaces, and no other.
    let attached = text
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter(|line| line["fact"] == "attachment" && line["state"] == "attached")
        .count();
    ensure!(attached > 0, "{text}");
    ensure!(
        finished.stderr.contains(&format!(" through {attached} hooks\n")),
        "{attached} attached, and: {}",
        finished.stderr
    );
    Ok(())
}

/// Three pings that arrive and one that a policy drops; what calitrace says of them.
fn three_delivered_and_one_denied(lab: &Lab) -> Result<(Finished, Vec<Value>)> {
    let pod2 = lab.pod("pod2")?;
    let watch = Watch::start(&with(lab, &["-o", "json", "--proto", "icmp"]))?;
    let ping = lab.ping("pod1", pod2.ip(), 3, &[])?;
    ensure!(ping.received == 3, "{ping:?}");
    lab.set_policy("pod2", Policy::Deny)?;
    let ping = lab.ping("pod1", pod2.ip(), 1, &[])?;
    ensure!(ping.received == 0, "{ping:?}");
    let finished = watch.stop()?;
    ensure!(finished.status.success(), "{finished:?}");
    let (from, to) = (lab.pod("pod1")?.address.to_string(), pod2.address.to_string());
    let mut packets = finished.packets()?;
    packets.retain(|packet| goes(packet, "icmp", &from, &to));
    ensure!(packets.len() == 4, "{packets:#?}");
    for packet in &packets[..3] {
        ensure!(arrived(packet), "{packet:#}");
        let expected = ["10.244.120.64", "10.244.205.192", "10.244.205.193"];
        ensure!(path(packet) == expected, "{packet:#}");
    }
    Ok((finished, packets))
}

/// A path on which these programs are, and no others.
fn path_of(programs: &[&str]) -> Result<tempfile::TempDir> {
    let folder = tempfile::tempdir().context("make a folder")?;
    for program in programs {
        let found = command::run(Command::new("sh").args(["-c", &format!("command -v {program}")]))?;
        let found = command::text(&found).trim().to_owned();
        std::os::unix::fs::symlink(&found, folder.path().join(program))
            .with_context(|| format!("link {found}"))?;
    }
    Ok(folder)
}

/// What is said, and the drop of a ping to pod 2, where calitrace finds these programs only.
fn denied_with(lab: &Lab, programs: &[&str]) -> Result<(Finished, Value)> {
    let path = path_of(programs)?;
    let mut command = Command::new(binary()?);
    command.arg("watch").args(with(lab, &["-o", "json", "--dropped"]));
    command.env("PATH", path.path());
    let watch = Watch::spawn(command)?;
    let pod2 = lab.pod("pod2")?;
    lab.ping("pod1", pod2.ip(), 1, &[])?;
    let finished = watch.stop()?;
    let packets = finished.packets()?;
    let to = pod2.address.to_string();
    let denied = packets.iter().find(|packet| packet["flow"]["dst"] == to.as_str());
    let drop = denied.context("the drop")?["drop"].clone();
    ensure!(drop["node"] == "minikube-m02", "{drop:#}");
    Ok((finished, drop))
}

/// Nothing shows the rules: a line says so, and the drop is told of without a name.
fn without_iptables_save() -> Result<()> {
    let lab = Lab::up(&quiet())?;
    lab.set_policy("pod2", Policy::Deny)?;
    let (finished, drop) = denied_with(&lab, &[])?;
    ensure!(lines_with(&finished, "iptables-save") == 1, "{}", finished.stderr);
    ensure!(drop["policy"].is_null(), "{drop:#}");
    ensure!(drop["culprits"] == Value::from(Vec::<Value>::new()), "{drop:#}");
    Ok(())
}

/// Calico is in its nftables mode, and nothing shows its rules.
fn without_nft() -> Result<()> {
    let lab = Lab::up(&Options {
        netfilter: Backend::Native,
        ..quiet()
    })?;
    lab.set_policy("pod2", Policy::Deny)?;
    let (finished, drop) = denied_with(&lab, &["iptables-nft-save", "ip6tables-nft-save"])?;
    ensure!(
        lines_with(&finished, "nft is not on the path") == 1,
        "{}",
        finished.stderr
    );
    ensure!(drop["policy"].is_null(), "{drop:#}");
    ensure!(drop["culprits"] == Value::from(Vec::<Value>::new()), "{drop:#}");
    Ok(())
}

/// Only `nft` is there: it shows what iptables wrote, too, though not all that such a rule asks for.
fn with_nft_alone() -> Result<()> {
    for (netfilter, is_sure) in [(Backend::Native, true), (Backend::Nft, false)] {
        let lab = Lab::up(&Options { netfilter, ..quiet() })?;
        lab.set_policy("pod2", Policy::Deny)?;
        let (finished, drop) = denied_with(&lab, &["nft"])?;
        ensure!(lines_with(&finished, "path") == 0, "{}", finished.stderr);
        let names = drop["culprits"].as_array().into_iter().flatten();
        let names: Vec<&str> = names.filter_map(|culprit| culprit["name"].as_str()).collect();
        ensure!(names == ["default/deny-all"], "{netfilter:?}: {drop:#}");
        ensure!(drop["policy"].is_string() == is_sure, "{netfilter:?}: {drop:#}");
    }
    Ok(())
}

/// Nothing shows whom the sets have: a line says so, and the policy is one of those that it may be.
fn without_ipset() -> Result<()> {
    let lab = Lab::up(&Options {
        netfilter: Backend::Nft,
        ..quiet()
    })?;
    denied_by_sets(&lab)?;
    let tools = ["iptables-nft-save", "ip6tables-nft-save"];
    let (finished, drop) = denied_with(&lab, &tools)?;
    ensure!(lines_with(&finished, "ipset") == 1, "{}", finished.stderr);
    ensure!(drop["policy"].is_null(), "{drop:#}");
    let names = drop["culprits"].as_array().into_iter().flatten();
    let names: Vec<&str> = names.filter_map(|culprit| culprit["name"].as_str()).collect();
    ensure!(names == ["default/back", "default/front"], "{drop:#}");
    Ok(())
}

fn lines_with(finished: &Finished, word: &str) -> usize {
    let lines = finished.stderr.lines();
    lines
        .filter(|line| line.starts_with("warning: ") && line.contains(word))
        .count()
}

/// Without the kernel's symbols a drop has no function's name, but all else.
fn hidden_symbols() -> Result<()> {
    const SETTING: &str = "/proc/sys/kernel/kptr_restrict";
    let before = fs::read(SETTING).context("read the setting")?;
    fs::write(SETTING, "2").context("hide the kernel's symbols")?;
    let lab = Lab::up(&quiet())?;
    let (finished, packets) = three_delivered_and_one_denied(&lab)?;
    fs::write(SETTING, before).context("show the kernel's symbols again")?;
    let denied = &packets[3];
    ensure!(
        denied["verdict"] == "dropped" && denied["drop"]["node"] == "minikube-m02",
        "{denied:#}"
    );
    ensure!(denied["drop"]["location"].is_null(), "{denied:#}");
    ensure!(lines_with(&finished, "kptr_restrict") == 1, "{}", finished.stderr);
    Ok(())
}

/// In confidentiality mode programs may not read the kernel's memory: TC programs alone observe, and what they cannot see
/// is not made up.
fn locked_down() -> Result<()> {
    let lab = Lab::up(&quiet())?;
    fs::write(LOCKDOWN, "confidentiality").context("lock the kernel down")?;
    let (finished, packets) = three_delivered_and_one_denied(&lab)?;
    let denied = &packets[3];
    ensure!(denied["drop"].is_null(), "{denied:#}");
    ensure!(
        denied["verdict"] != "delivered" && denied["verdict"] != "dropped",
        "{denied:#}"
    );
    ensure!(lines_with(&finished, "lockdown") == 1, "{}", finished.stderr);
    Ok(())
}
