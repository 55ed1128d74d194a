//! `calitrace doctor`: what works on this machine, what does not and why, and what would mend it. One line for each
//! thing, `✓` or `✗` first.

use std::{
    fs,
    io::{self, Write},
};

use anyhow::{Context as _, Result};

use super::plan;
use crate::{
    calico::{
        self, NodeView,
        doctor::{self, Finding, Severity, Sysctls},
    },
    event::Role,
    kernel::{self, Capability},
    sink::Output,
};

/// Carries it out. What this process may not look at is an error, after all that it may.
pub(super) fn run(plan: &plan::Doctor) -> Result<()> {
    let mut output = Output::stdout();
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").context("read the kernel's release")?;
    writeln!(output, "Kernel {}", release.trim())?;
    kernel(&mut output, &kernel::capabilities())?;
    output.flush()?;
    let nodes = calico::discover(&plan.nodes.clone().into())?;
    writeln!(output, "\nCalico")?;
    if nodes.is_empty() {
        writeln!(output, "✗ {}", plan.nodes.absent())?;
    }
    for node in &nodes {
        let findings = doctor::check(node, &Sysctls::read(node)?);
        describe(&mut output, node, &findings)?;
    }
    output.flush().context("show what works")
}

fn kernel(output: &mut impl Write, capabilities: &[Capability]) -> io::Result<()> {
    let width = capabilities
        .iter()
        .map(|capability| capability.name.chars().count())
        .max()
        .unwrap_or_default();
    for Capability {
        name,
        works,
        detail,
        lost,
        remedy,
    } in capabilities
    {
        if *works {
            writeln!(output, "✓ {name:width$}  {detail}")?;
        } else {
            writeln!(output, "✗ {name:width$}  {detail}")?;
            writeln!(output, "  {:width$}  lost without it: {lost}", "")?;
            writeln!(output, "  {:width$}  remedy: {remedy}", "")?;
        }
    }
    Ok(())
}

fn describe(output: &mut impl Write, view: &NodeView, findings: &[Finding]) -> io::Result<()> {
    let with = |role| -> Vec<&str> {
        let interfaces = view.interfaces.iter().filter(|interface| interface.role == role);
        interfaces.map(|interface| interface.name.as_str()).collect()
    };
    let names = |role| with(role).join(", ");
    let or_none = |text: String| if text.is_empty() { "none".to_owned() } else { text };
    let mark = if findings
        .iter()
        .any(|finding| finding.severity == Severity::Problem)
    {
        '✗'
    } else {
        '✓'
    };
    writeln!(
        output,
        "{mark} node {}: workload interfaces: {}, tunnels: {}, uplinks: {}",
        view.node.name,
        with(Role::Workload).len(),
        or_none(names(Role::Tunnel)),
        or_none(names(Role::Uplink)),
    )?;
    for Finding {
        node,
        severity,
        what,
        remedy,
    } in findings
    {
        let mark = match severity {
            Severity::Problem => '✗',
            Severity::Note => '!',
        };
        writeln!(output, "  {mark} node {node}: {what}")?;
        writeln!(output, "    remedy: {remedy}")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_told_with_its_consequence_and_remedy() {
        let capabilities = [
            Capability {
                name: "BTF",
                works: true,
                detail: "135000 types".into(),
                lost: "drops",
                remedy: "none",
            },
            Capability {
                name: "kprobes",
                works: false,
                detail: "the kernel has no register_kprobe".into(),
                lost: "encapsulation on the tunnel itself",
                remedy: "a kernel with CONFIG_KPROBES",
            },
        ];
        let mut text = Vec::new();
        kernel(&mut text, &capabilities).unwrap();
        insta::assert_snapshot!(String::from_utf8(text).unwrap(), @r"
        ✓ BTF      135000 types
        ✗ kprobes  the kernel has no register_kprobe
                   lost without it: encapsulation on the tunnel itself
                   remedy: a kernel with CONFIG_KPROBES
        ");
    }
}
