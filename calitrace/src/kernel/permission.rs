//! Permission to load programs: which capabilities are missing.

use std::{fs, io};

use aya::{
    EbpfError,
    maps::MapError,
    programs::{ProgramError, ProgramType, tc::TcError},
    sys::{BpfHelper, SyscallError, is_helper_supported},
};

use crate::error::NoPermission;

/// Bits of a capability set (include/uapi/linux/capability.h).
const DAC_OVERRIDE: u32 = 1;
const DAC_READ_SEARCH: u32 = 2;
const NET_ADMIN: u32 = 12;
const SYS_PTRACE: u32 = 19;
const SYS_ADMIN: u32 = 21;
const SYSLOG: u32 = 34;
const PERFMON: u32 = 38;
const BPF: u32 = 39;

/// Fails if a capability is missing that tracing needs: `CAP_BPF` and `CAP_PERFMON` (or `CAP_SYS_ADMIN` in their
/// place) for the programs, `CAP_NET_ADMIN` to attach them, `CAP_SYS_ADMIN` to enter network namespaces.
pub fn check(operation: &str) -> Result<(), NoPermission> {
    let missing = missing(effective().unwrap_or(u64::MAX));
    if missing.is_empty() {
        Ok(())
    } else {
        Err(refusal(operation, &missing))
    }
}

/// What is not seen for want of a capability that tracing can do without: a sentence for each.
pub fn shortcomings() -> Vec<String> {
    lacking(effective().unwrap_or(u64::MAX))
}

fn lacking(effective: u64) -> Vec<String> {
    let has = |bit: u32| effective >> bit & 1 == 1;
    let mut lines = Vec::new();
    if !has(SYS_PTRACE) {
        lines.push(
            "without CAP_SYS_PTRACE only this network namespace and those named under /run/netns are seen: no nodes in \
             containers (minikube, kind), and of drops inside a pod not which pod it was"
                .to_owned(),
        );
    }
    if !has(DAC_OVERRIDE) && !has(DAC_READ_SEARCH) {
        lines.push(
            "without CAP_DAC_READ_SEARCH the files that name pods may not be readable (/var/run/calico, \
             /var/lib/cni): pods are then shown by their addresses"
                .to_owned(),
        );
    }
    lines
}

/// Whether kernel symbols may be hidden from this process: a remedy, as the end of a sentence.
pub(super) fn symbols_remedy() -> &'static str {
    if effective().unwrap_or(u64::MAX) >> SYSLOG & 1 == 1 {
        "sysctl -w kernel.kptr_restrict=1"
    } else {
        "run calitrace with CAP_SYSLOG or as root"
    }
}

/// Fails with the reason where programs may not read the kernel's memory: the kernel is locked down (`lockdown=` in
/// confidentiality mode, `LOCKDOWN_BPF_READ_KERNEL`), and does not know the helper then.
pub(super) fn may_read_kernel() -> Result<(), String> {
    match is_helper_supported(
        ProgramType::SchedClassifier,
        BpfHelper::BPF_FUNC_probe_read_kernel,
    ) {
        Ok(false) => Err(
            "eBPF programs may not read the kernel's memory (lockdown in confidentiality mode)".to_owned(),
        ),
        // What keeps the question from being answered keeps the programs from loading, and is told there.
        Ok(true) | Err(_) => Ok(()),
    }
}

/// The error for an operation and the capabilities that it lacks; none if the kernel refuses it nevertheless.
fn refusal(operation: &str, missing: &[&str]) -> NoPermission {
    let what = if missing.is_empty() {
        format!(
            "cannot {operation} although all capabilities are there \
             (kernel lockdown, a seccomp filter or a user namespace?)"
        )
    } else {
        format!(
            "to {operation} it takes {} (run it as root: sudo calitrace …)",
            missing.join(", ")
        )
    };
    NoPermission { what }
}

fn missing(effective: u64) -> Vec<&'static str> {
    let has = |bit: u32| effective >> bit & 1 == 1;
    let mut missing = Vec::new();
    if !has(SYS_ADMIN) {
        missing.push("CAP_SYS_ADMIN");
        if !has(BPF) {
            missing.push("CAP_BPF");
        }
        if !has(PERFMON) {
            missing.push("CAP_PERFMON");
        }
    }
    if !has(NET_ADMIN) {
        missing.push("CAP_NET_ADMIN");
    }
    missing
}

/// The effective capability set of this thread.
fn effective() -> Option<u64> {
    let status = fs::read_to_string("/proc/thread-self/status").ok()?;
    parse_effective(&status)
}

fn parse_effective(status: &str) -> Option<u64> {
    let digits = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(digits.trim(), 16).ok()
}

/// Turns a refusal by the kernel into [`NoPermission`]; other errors stay what they are.
pub(super) fn explain(error: EbpfError, operation: &str) -> anyhow::Error {
    if io_error(&error).is_some_and(|io| matches!(io.raw_os_error(), Some(libc::EPERM | libc::EACCES))) {
        let missing = missing(effective().unwrap_or(u64::MAX));
        // EACCES is also what the verifier answers to a program it refuses: then its log says why.
        if !missing.is_empty() || !verifier_spoke(&error) {
            return anyhow::Error::new(error).context(refusal(operation, &missing));
        }
    }
    anyhow::Error::new(error).context(format!("cannot {operation}"))
}

fn verifier_spoke(error: &EbpfError) -> bool {
    matches!(error, EbpfError::ProgramError(ProgramError::LoadError { verifier_log, .. })
        if !verifier_log.to_string().trim().is_empty())
}

/// The error of the system call behind an error of aya.
pub(super) fn io_error(error: &EbpfError) -> Option<&io::Error> {
    match error {
        EbpfError::ProgramError(error) => program_io_error(error),
        EbpfError::MapError(error) => map_io_error(error),
        _ => None,
    }
}

/// As [`io_error`].
pub(super) fn program_io_error(error: &ProgramError) -> Option<&io::Error> {
    match error {
        ProgramError::LoadError { io_error, .. }
        | ProgramError::SyscallError(SyscallError { io_error, .. })
        | ProgramError::TcError(TcError::IoError(io_error))
        | ProgramError::IOError(io_error) => Some(io_error),
        ProgramError::MapError(error) => map_io_error(error),
        _ => None,
    }
}

fn map_io_error(error: &MapError) -> Option<&io::Error> {
    match error {
        MapError::CreateError { io_error, .. }
        | MapError::SyscallError(SyscallError { io_error, .. })
        | MapError::IoError(io_error) => Some(io_error),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_capabilities_are_named() {
        assert_eq!(missing(u64::MAX), Vec::<&str>::new());
        assert_eq!(
            missing(0),
            ["CAP_SYS_ADMIN", "CAP_BPF", "CAP_PERFMON", "CAP_NET_ADMIN"]
        );
        assert_eq!(missing(1 << SYS_ADMIN), ["CAP_NET_ADMIN"]);
        assert_eq!(
            missing(1 << BPF | 1 << PERFMON | 1 << NET_ADMIN),
            ["CAP_SYS_ADMIN"]
        );
    }

    #[test]
    fn what_can_be_done_without_costs_a_line_each() {
        assert_eq!(lacking(u64::MAX), Vec::<String>::new());
        let lines = lacking(1 << BPF | 1 << PERFMON | 1 << NET_ADMIN | 1 << SYS_ADMIN);
        assert_eq!(lines.len(), 2);
        assert!(lines[0].contains("CAP_SYS_PTRACE") && lines[1].contains("CAP_DAC_READ_SEARCH"));
        assert_eq!(lacking(1 << SYS_PTRACE | 1 << DAC_OVERRIDE), Vec::<String>::new());
    }

    #[test]
    fn the_effective_set_is_read() {
        assert_eq!(
            parse_effective("Name:\tx\nCapPrm:\t0000000000000001\nCapEff:\t000001ffffffffff\n"),
            Some(0x1ff_ffff_ffff)
        );
        assert_eq!(parse_effective("Name:\tx\n"), None);
    }

    #[test]
    fn the_message_says_what_to_do() {
        assert_eq!(
            refusal("load eBPF programs", &["CAP_BPF", "CAP_NET_ADMIN"]).to_string(),
            "no permission: to load eBPF programs it takes CAP_BPF, CAP_NET_ADMIN \
             (run it as root: sudo calitrace …)"
        );
    }
}
