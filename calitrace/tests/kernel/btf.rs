//! What calitrace reads of the kernel's types, beside what `bpftool` says of them: two readers of one description.

use std::{
    collections::HashMap,
    path::Path,
    process::{Command, Stdio},
};

use calitrace::kernel::btf::Btf;

const VMLINUX: &str = "/sys/kernel/btf/vmlinux";

/// Members that the programs read, by structure and path (`calitrace_ebpf::shared::Offsets`).
const MEMBERS: [(&str, &[&str]); 14] = [
    ("sk_buff", &["head"]),
    ("sk_buff", &["dev"]),
    ("sk_buff", &["len"]),
    ("sk_buff", &["data_len"]),
    ("sk_buff", &["data"]),
    ("sk_buff", &["protocol"]),
    ("sk_buff", &["network_header"]),
    ("sk_buff", &["mac_header"]),
    ("sk_buff", &["end"]),
    ("skb_shared_info", &["gso_size"]),
    ("skb_shared_info", &["gso_segs"]),
    ("net_device", &["ifindex"]),
    ("net_device", &["nd_net"]),
    ("net", &["ns", "inum"]),
];

/// `bpftool btf dump file … format raw`, if there is a bpftool that works.
fn bpftool() -> Option<String> {
    ["bpftool", "/usr/sbin/bpftool", "/sbin/bpftool"]
        .iter()
        .find_map(|program| {
            let mut command = Command::new(program);
            command.args(["btf", "dump", "file", VMLINUX, "format", "raw"]);
            let output = command.stdin(Stdio::null()).output().ok()?;
            let text = String::from_utf8(output.stdout).ok()?;
            (output.status.success() && !text.is_empty()).then_some(text)
        })
}

/// A type as bpftool prints it: `[12] STRUCT 'sk_buff' size=232 vlen=30`, and below it members or values.
#[derive(Debug, Default)]
struct Type<'a> {
    kind: &'a str,
    name: &'a str,
    /// The type that another name, a qualifier or a pointer refers to.
    target: Option<u32>,
    /// Name, type and offset in bits of members; name and value of an enum's constants.
    parts: Vec<(&'a str, u32, u32)>,
}

/// The number behind `what` in a line.
fn number(line: &str, what: &str) -> Option<u32> {
    let rest = line.split(what).nth(1)?;
    rest.split(' ').next()?.parse().ok()
}

/// What stands between the first two quotation marks.
fn quoted(line: &str) -> &str {
    line.split('\'').nth(1).unwrap_or_default()
}

fn types(dump: &str) -> HashMap<u32, Type<'_>> {
    let mut types: HashMap<u32, Type<'_>> = HashMap::new();
    let mut last = 0;
    for line in dump.lines() {
        if let Some(part) = line.strip_prefix('\t') {
            let id = number(part, " type_id=").or_else(|| number(part, " val="));
            let kind = types.get_mut(&last).expect("a type above its parts");
            if matches!(kind.kind, "STRUCT" | "UNION" | "ENUM")
                && let Some(id) = id
            {
                kind.parts.push((
                    quoted(part),
                    id,
                    number(part, " bits_offset=").unwrap_or_default(),
                ));
            }
            continue;
        }
        let (id, rest) = line[1..].split_once("] ").expect("a number in brackets");
        last = id.parse().expect("a type's number");
        types.insert(
            last,
            Type {
                kind: rest.split(' ').next().unwrap_or_default(),
                name: quoted(rest),
                target: number(rest, " type_id="),
                parts: Vec::new(),
            },
        );
    }
    types
}

/// Bits from the start of a structure to the member at `path`, through anonymous members and other names of types.
fn bit_offset(types: &HashMap<u32, Type<'_>>, mut id: u32, path: &[&str]) -> Option<u32> {
    while !matches!(types.get(&id)?.kind, "STRUCT" | "UNION") {
        id = types.get(&id)?.target?;
    }
    let (first, rest) = path.split_first()?;
    types.get(&id)?.parts.iter().find_map(|(name, inner, bits)| {
        if name == first {
            let deeper = if rest.is_empty() {
                0
            } else {
                bit_offset(types, *inner, rest)?
            };
            return Some(bits + deeper);
        }
        // Anonymous members only: a pointer leads elsewhere.
        let structure = types
            .get(inner)
            .is_some_and(|inner| matches!(inner.kind, "STRUCT" | "UNION"));
        (*name == "(anon)" && structure)
            .then(|| bit_offset(types, *inner, path).map(|deeper| bits + deeper))?
    })
}

pub(crate) fn members_and_drop_reasons_are_where_bpftool_says() {
    if !Path::new(VMLINUX).exists() {
        println!("skipped: the kernel does not describe its types ({VMLINUX} is not there)");
        return;
    }
    let Some(dump) = bpftool() else {
        println!("skipped: no bpftool that works, which `cargo xtask setup` installs");
        return;
    };
    let theirs = types(&dump);
    let ours =
        Btf::parse(std::fs::read(VMLINUX).expect("the kernel's types can be read")).expect("it is BTF");
    assert_eq!(ours.len(), theirs.len(), "types");
    let first = |kind: &str, name: &str| {
        let mut ids: Vec<u32> = theirs
            .iter()
            .filter(|(_, one)| one.kind == kind && one.name == name)
            .map(|(id, _)| *id)
            .collect();
        ids.sort_unstable();
        ids.first().copied()
    };
    for (structure, path) in MEMBERS {
        let id = first("STRUCT", structure).expect("every kernel has these structures");
        let bits = bit_offset(&theirs, id, path);
        let member = path.join(".");
        assert!(bits.is_some(), "bpftool has no {structure}.{member}");
        let found = ours.offset(structure, path).map(|bytes| bytes * 8);
        assert_eq!(found, bits, "{structure}.{member}");
    }

    // Since 5.17.
    let theirs = first("ENUM", "skb_drop_reason").map(|id| {
        let constants = theirs[&id].parts.iter();
        constants
            .map(|(name, value, _)| (*value, *name))
            .collect::<Vec<_>>()
    });
    let ours = ours.enum_values("skb_drop_reason");
    assert_eq!(ours, theirs);
    if let Some(reasons) = ours {
        let known = |name: &str| reasons.iter().any(|(_, known)| *known == name);
        assert!(known("SKB_DROP_REASON_NOT_SPECIFIED"), "{reasons:?}");
    }
}
