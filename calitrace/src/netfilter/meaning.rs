//! Names for rules that drop: what Calico meant by them. Felix says it in comments and in the names of chains.
//!
//! Felix' words are those of `felix/rules/{policy,endpoints,dispatch,static}.go` from before and after v3.32, where policies
//! got their kind into the comment. In nftables the names of its chains begin with the table that they would be in with
//! iptables (`felix/nftables/table_layer.go`), and all comments of a rule are one, cut off at 128 bytes
//! (`felix/nftables/renderer.go`).

use super::{
    culprit::{Cause, Culprit, Direction, Limited, PolicyName},
    packet::States,
    rules::{Chain, Target, What},
};

/// The base chain `chain` drops what comes to its end.
pub(super) fn of_policy(table: &str, chain: &str) -> Culprit {
    Culprit {
        cause: Cause::BaseChain,
        table: table.to_owned(),
        chain: chain.to_owned(),
        rejects: false,
    }
}

/// The rule at `index` of `chain`.
pub(super) fn of_rule(table: &str, name: &str, chain: &Chain, index: usize) -> Culprit {
    let rule = &chain.rules[index];
    Culprit {
        cause: cause(name, chain, index),
        table: table.to_owned(),
        chain: name.to_owned(),
        rejects: rule.target == Target::Reject,
    }
}

/// Beginnings of the names of Calico's chains (`felix/rules/rule_defs.go`).
const LAYERS: [&str; 4] = ["raw-", "mangle-", "nat-", "filter-"];
const POLICY: [(&str, Direction); 2] = [("cali-pi-", Direction::Ingress), ("cali-po-", Direction::Egress)];
const PROFILE: [(&str, Direction); 2] = [
    ("cali-pri-", Direction::Ingress),
    ("cali-pro-", Direction::Egress),
];
const GROUP: [&str; 2] = ["cali-gi-", "cali-go-"];
const ENDPOINT: [(&str, Direction); 6] = [
    ("cali-tw-", Direction::Ingress),
    ("cali-fw-", Direction::Egress),
    ("cali-th-", Direction::Egress),
    ("cali-fh-", Direction::Ingress),
    // What is forwarded by a host endpoint's interface.
    ("cali-thfw-", Direction::Egress),
    ("cali-fhfw-", Direction::Ingress),
];

/// Whether a chain is that of a policy.
pub(super) fn is_policy(chain: &str) -> bool {
    beginning(without_layer(chain), &POLICY).is_some()
}

/// Whether a chain is that of a policy or a profile.
pub(super) fn is_of_policy(chain: &str) -> bool {
    let name = without_layer(chain);
    beginning(name, &POLICY).is_some() || beginning(name, &PROFILE).is_some()
}

/// Whether a chain is that of an endpoint, which asks policies.
pub(super) fn is_of_endpoint(chain: &str) -> bool {
    beginning(without_layer(chain), &ENDPOINT).is_some()
}

/// Whether a chain is that of policies which are always asked together.
pub(super) fn is_of_group(chain: &str) -> bool {
    let name = without_layer(chain);
    GROUP.iter().any(|group| name.starts_with(group))
}

/// Whether a chain is Felix'.
pub(super) fn is_felix(chain: &str) -> bool {
    without_layer(chain).starts_with("cali-")
}

fn without_layer(name: &str) -> &str {
    let mut layers = LAYERS.iter();
    layers.find_map(|layer| name.strip_prefix(layer)).unwrap_or(name)
}

fn cause(name: &str, chain: &Chain, index: usize) -> Cause {
    let rule = &chain.rules[index];
    let foreign = || Cause::Foreign {
        rule: rule.text.as_deref().unwrap_or_default().to_owned(),
    };
    let name = without_layer(name);
    if !name.starts_with("cali-") {
        return foreign();
    }
    if let Some((rest, way)) = beginning(name, &POLICY) {
        return policy(rest, way, chain, index);
    }
    if let Some((rest, way)) = beginning(name, &PROFILE) {
        let mut comments = chain.rules.iter().flat_map(|rule| &rule.comments);
        let said = comments.find_map(|comment| titled(comment, "Profile "));
        return Cause::Profile {
            profile: said.unwrap_or(rest).to_owned(),
            direction: Some(way),
        };
    }
    let direction = beginning(name, &ENDPOINT).map(|(_, way)| way);
    // `DROP` or `REJECT` stand first, by the action that is configured.
    let says = |end: &str| rule.comments.iter().any(|comment| comment.ends_with(end));
    let asks = |what: &What| {
        let mut matches = rule.matches.iter();
        matches.any(|condition| !condition.not && condition.what == *what)
    };
    // Of a tier with a long name the rest may be cut off.
    let mut comments = rule.comments.iter();
    let ends_tier = comments.any(|comment| comment.starts_with("End of tier "));
    if ends_tier || says("if no policies passed packet") {
        return Cause::EndOfTier {
            tier: tier(chain, index),
            direction,
        };
    }
    if says("if no profiles matched") {
        return Cause::NoProfile { direction };
    }
    if asks(&What::State(States::INVALID)) {
        return Cause::Invalid;
    }
    if asks(&What::Unreachable) {
        return Cause::ReversePath;
    }
    if says("Unknown interface") || says("Unknown endpoint") {
        return Cause::UnknownInterface;
    }
    if says("Endpoint admin disabled") {
        return Cause::AdminDown;
    }
    let limits = [
        ("packet rate limit", Limited::Packets),
        ("connection limit", Limited::Connections),
    ];
    if let Some((_, of)) = limits.into_iter().find(|(end, _)| says(end)) {
        return Cause::Limit { of, direction };
    }
    if says("encapped packets originating in workloads") {
        return Cause::EncapsulatedByPod;
    }
    if says("packets from non-allowed hosts") || says("packets from non-Calico hosts") {
        return Cause::UnknownTunnelPeer;
    }
    match name {
        "cali-wl-to-host" => Cause::EndpointToHost,
        "cali-cidr-block" => Cause::ServiceLoop,
        _ => foreign(),
    }
}

fn beginning<'a>(name: &'a str, of: &[(&str, Direction)]) -> Option<(&'a str, Direction)> {
    of.iter()
        .find_map(|(beginning, way)| Some((name.strip_prefix(beginning)?, *way)))
}

/// What stands between `title` and the direction.
fn titled<'a>(comment: &'a str, title: &str) -> Option<&'a str> {
    let rest = comment.strip_prefix(title)?;
    rest.strip_suffix(" ingress")
        .or_else(|| rest.strip_suffix(" egress"))
}

/// The first rule of a policy's chain names it: `NetworkPolicy default/deny ingress`, before v3.32
/// `Policy default/knp.default.deny ingress`, after annotations if there are some. The name of the chain says it, too, but a
/// long one is a digest.
fn policy(rest: &str, way: Direction, chain: &Chain, index: usize) -> Cause {
    let mut comments = chain.rules.iter().flat_map(|rule| &rule.comments);
    let said = comments.find_map(|comment| {
        let title = comment
            .strip_suffix(" ingress")
            .or_else(|| comment.strip_suffix(" egress"))?;
        let (before, name) = title.rsplit_once(' ')?;
        let kind = before.rsplit(' ').next()?;
        if kind == "Policy" {
            return Some(before_kinds(name));
        }
        kind.ends_with("NetworkPolicy").then(|| PolicyName {
            kind: Some(kind.to_owned()),
            name: name.to_owned(),
        })
    });
    Cause::Policy {
        policy: said.unwrap_or_else(|| of_id(rest)),
        tier: chain.tier.clone(),
        direction: Some(way),
        rule: logged(chain, index),
    }
}

/// What the name of a policy's chain says: from v3.32 on a short word for its kind, and its name
/// (`KindShortName`, `felix/types`); from v3.29 to v3.31 its tier, and its name. It is asked where there is no comment to
/// tell: nftables' are cut off, and annotations stand before the title.
pub(super) fn of_id(id: &str) -> PolicyName {
    let named = id.split_once('/').and_then(|(word, name)| {
        let kind = match word {
            "np" => "NetworkPolicy",
            "gnp" => "GlobalNetworkPolicy",
            "knp" => "KubernetesNetworkPolicy",
            "kcnp" => "KubernetesClusterNetworkPolicy",
            "snp" => "StagedNetworkPolicy",
            "sgnp" => "StagedGlobalNetworkPolicy",
            "sknp" => "StagedKubernetesNetworkPolicy",
            _ => return None,
        };
        Some(PolicyName {
            kind: Some(kind.to_owned()),
            name: name.to_owned(),
        })
    });
    named.unwrap_or_else(|| match id.split_once('/') {
        // With one `/` it may be a namespace that stands before it, as up to v3.28.
        Some((_tier, name)) if name.contains('/') => before_kinds(name),
        _ => before_kinds(id),
    })
}

/// Names of policies before v3.32: those of Kubernetes have `knp.default.` before them, the others their tier.
pub(super) fn before_kinds(name: &str) -> PolicyName {
    let (namespace, own) = match name.split_once('/') {
        Some((namespace, own)) => (Some(namespace), own),
        None => (None, name),
    };
    let (kind, own) = match own.strip_prefix("knp.default.") {
        Some(own) => (Some("KubernetesNetworkPolicy".to_owned()), own),
        None => (None, own.strip_prefix("default.").unwrap_or(own)),
    };
    let name = namespace.map_or_else(|| own.to_owned(), |namespace| format!("{namespace}/{own}"));
    PolicyName { kind, name }
}

/// The index that the rule before has in the prefix of its log, `DPI0|…`: deny, policy, ingress, number
/// (`felix/rules/nflogprefix.go`). There is one where flow logs are on.
fn logged(chain: &Chain, index: usize) -> Option<u32> {
    let before = chain.rules.get(index.checked_sub(1)?)?;
    let Target::Log(prefix) = &before.target else {
        return None;
    };
    let (head, _) = prefix.split_once('|')?;
    head.strip_prefix('D')?.get(2..)?.parse().ok()
}

/// The tier that begins where this is said.
pub(super) fn begun_tier(comment: &str) -> Option<&str> {
    comment.strip_prefix("Start of tier ")
}

/// The tier that ends at a rule, by its own comment (`End of tier default. Drop if …`) or that of the tier's beginning.
fn tier(chain: &Chain, index: usize) -> String {
    let own = chain.rules[index].comments.iter().find_map(|comment| {
        let rest = comment.strip_prefix("End of tier ")?;
        rest.split_once(". ").map(|(tier, _)| tier)
    });
    let begun = || {
        let before = chain.rules[..index].iter().rev();
        before
            .flat_map(|rule| &rule.comments)
            .find_map(|comment| begun_tier(comment))
    };
    // Before there were tiers, in one without a name.
    own.or_else(begun).unwrap_or("default").to_owned()
}
