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
        doctor::{self, Evidence, Finding, Severity},
    },
    event::{HookStatus, Role},
    kernel::{self, Capability, leftovers},
    netns,
    sink::Output,
};

/// Carries it out. What this process may not look at is an error, after all that it may.
pub(super) fn run(plan: &plan::Doctor) -> Result<()> {
    let mut output = Output::stdout();
    if plan.clean {
        clean(&mut output, &namespaces(plan)?)?;
        return output.flush().context("show what was removed");
    }
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").context("read the kernel's release")?;
    writeln!(output, "Kernel {}", release.trim())?;
    kernel(&mut output, &kernel::capabilities())?;
    hooks(&mut output, tried_hooks())?;
    output.flush()?;
    left(&mut output, &namespaces(plan)?)?;
    output.flush()?;
    let nodes = calico::discover(&plan.nodes.clone().into())?;
    writeln!(output, "\nCalico")?;
    if nodes.is_empty() {
        writeln!(output, "✗ {}", plan.nodes.absent())?;
    }
    for node in &nodes {
        let findings = doctor::check(node, &Evidence::read(node)?);
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

/// What each hook comes to here, or why that cannot be said.
fn tried_hooks() -> Result<Vec<HookStatus>> {
    kernel::Kernel::load(&kernel::Config::default())?.try_hooks()
}

/// Hooks that work on one line, those that do not by the reason.
fn hooks(output: &mut impl Write, tried: Result<Vec<HookStatus>>) -> io::Result<()> {
    writeln!(output, "\nHooks")?;
    let tried = match tried {
        Ok(tried) => tried,
        Err(error) => return writeln!(output, "✗ none can be tried: {error:#}"),
    };
    let working: Vec<&str> = tried
        .iter()
        .filter(|status| status.missing.is_none())
        .map(|status| status.hook.as_str())
        .collect();
    if !working.is_empty() {
        writeln!(output, "✓ {}", working.join(", "))?;
    }
    let mut reasons: Vec<&str> = tried
        .iter()
        .filter_map(|status| status.missing.as_deref())
        .collect();
    reasons.dedup();
    for why in reasons {
        writeln!(output, "✗ {why}")?;
        let mut takes = Vec::new();
        for status in tried
            .iter()
            .filter(|status| status.missing.as_deref() == Some(why))
        {
            let Some(row) = kernel::hooks::by_name(&status.hook).map(kernel::hooks::row) else {
                continue;
            };
            writeln!(output, "  lost without {}: {}", row.name, row.lost)?;
            takes.push(row.attach.takes());
        }
        takes.dedup();
        writeln!(output, "  remedy: see {} above", takes.join(", "))?;
    }
    Ok(())
}

/// A network namespace and what to call it.
type Named = (String, netns::Handle);

/// The namespaces asked for; all without.
fn namespaces(plan: &plan::Doctor) -> Result<Vec<Named>> {
    let all = netns::list()?;
    let wanted = if plan.nodes.netns.is_empty() {
        all
    } else {
        let names = plan.nodes.netns.iter();
        names
            .map(|name| netns::resolve(name, &all))
            .collect::<Result<_>>()?
    };
    let name = |found: &netns::Found| match found.names.as_slice() {
        [] => found.inode().to_string(),
        names => names.join(", "),
    };
    Ok(wanted
        .into_iter()
        .map(|found| (name(&found), found.handle))
        .collect())
}

/// What killed runs left behind.
fn left(output: &mut impl Write, namespaces: &[Named]) -> Result<()> {
    for (name, handle) in namespaces {
        for leftover in leftovers::find(handle)? {
            writeln!(
                output,
                "\n✗ left by a killed run of calitrace in the network namespace {name} {leftover}\n  \
                 remedy: calitrace doctor --clean, or the next calitrace watch of that node"
            )?;
        }
    }
    Ok(())
}

/// Removes what killed runs left behind.
fn clean(output: &mut impl Write, namespaces: &[Named]) -> Result<()> {
    let mut nothing = true;
    for (name, handle) in namespaces {
        let removed =
            leftovers::remove(handle).with_context(|| format!("clean the network namespace {name}"))?;
        for leftover in removed {
            writeln!(output, "✓ removed in the network namespace {name} {leftover}")?;
            nothing = false;
        }
    }
    if nothing {
        writeln!(output, "✓ killed runs of calitrace have left nothing behind")?;
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

    #[test]
    fn hooks_that_do_not_work_are_told_by_the_reason() {
        let status = |hook: &str, missing: Option<&str>| HookStatus {
            hook: hook.to_owned(),
            missing: missing.map(str::to_owned),
        };
        let tried = vec![
            status("workload_ingress", None),
            status("workload_egress", None),
            status("kfree_skb", Some("no kernel type information: none")),
        ];
        let mut text = Vec::new();
        hooks(&mut text, Ok(tried)).unwrap();
        insta::assert_snapshot!(String::from_utf8(text).unwrap(), @r"

        Hooks
        ✓ workload_ingress, workload_egress
        ✗ no kernel type information: none
          lost without kfree_skb: where and why packets are dropped
          remedy: see raw tracepoints above
        ");
        let mut text = Vec::new();
        hooks(&mut text, Err(anyhow::anyhow!("no permission"))).unwrap();
        assert!(String::from_utf8(text).unwrap().contains("no permission"));
    }
}
