//! Tiers that pass on what their policies do not take, and staged policies, of which Felix writes nothing.

use super::*;

fn with_tiers() -> impl Iterator<Item = Shown> {
    let all = all().into_iter();
    all.filter(|shown| shown.release >= Release::V3_31)
}

#[test]
fn a_tier_that_passes_drops_nothing_at_its_end() {
    let base = to("calieeeeeeeeeee");
    require_of(
        with_tiers(),
        &[
            (base.tcp(9100), Nobody),
            (
                base.tcp(9101),
                Policy("GlobalNetworkPolicy", "platform.base", Ingress, 1),
            ),
            // The next tier decides.
            (
                base.tcp(2222),
                Policy("NetworkPolicy", "default/second", Ingress, 0),
            ),
            (base, EndOfTier("default", Ingress)),
            // No policies of it are for what leaves the pod.
            (from("calieeeeeeeeeee"), Nobody),
            // There is none, and no profile.
            (to("caliggggggggggg").tcp(9100), Nobody),
            (to("caliggggggggggg"), NoProfile(Ingress)),
        ],
    );
}

#[test]
fn staged_policies_drop_nothing() {
    let draft = to("caliddddddddddd");
    require_of(
        with_tiers(),
        &[
            // Beside one that is not staged.
            (draft.tcp(1111), Nobody),
            (draft, EndOfTier("default", Ingress)),
            // Alone in their tier, as others are in that before it: the profiles decide.
            (to("califffffffffff"), Nobody),
            (
                to("califffffffffff").tcp(9101),
                Policy("GlobalNetworkPolicy", "platform.base", Ingress, 1),
            ),
        ],
    );
}

/// What such a tier logs stands before rules of the next one, or before the end of all, which may drop.
#[test]
fn what_a_tier_passes_on_is_not_dropped_by_it() {
    for shown in with_tiers().filter(|shown| shown.flow_logs) {
        for (tier, endpoints) in [("trial", 1), ("platform", 3), ("default", 1)] {
            let prefix = format!("PPI|{tier}");
            let logged = Logged::parse(&prefix).unwrap();
            assert_eq!(
                (logged.action, &logged.by),
                (Action::Pass, &logged::By::EndOfTier(tier.to_owned()))
            );
            let loggers = shown.rules.loggers(&prefix);
            assert_eq!(loggers.len(), endpoints, "{prefix} in {}", shown.name);
            let culprits: Vec<Culprit> = loggers.iter().map(|logger| logger.next.clone()).collect();
            assert_eq!(
                logged.culprit(&culprits, &loggers),
                None,
                "{prefix} in {}",
                shown.name
            );
        }
    }
}
