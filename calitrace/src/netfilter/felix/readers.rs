//! How much of the rules is understood.

use super::*;

#[test]
fn packets_out_of_the_pools_are_masqueraded() {
    let pod = from("cali44444444444");
    for shown in all() {
        let masquerades = |dst| {
            let packet = pod.dst(dst);
            packet.ask(&shown, true, |asked| shown.rules.masquerades(asked, &shown.sets))
        };
        assert_eq!(masquerades("8.8.8.8"), Some(true), "{}", shown.name);
        assert_eq!(masquerades(ELSEWHERE), Some(false), "{}", shown.name);
        assert_eq!(shown.rules.has_masquerading(), Some(true), "{}", shown.name);
    }
}

/// All conditions are understood but limits, and those for translated connections and for the device that an address is local
/// to: no rule that drops is reached by either.
#[test]
fn conditions_are_understood() {
    for shown in all() {
        let mut unknown: Vec<&str> = Vec::new();
        for chains in shown.rules.tables.values() {
            for (name, chain) in chains {
                let mut matches = chain.rules.iter().flat_map(|rule| &rule.matches);
                let is_unknown = matches.any(|condition| condition.what == rules::What::Unknown);
                if is_unknown && !name.ends_with("-caliccccccccccc") {
                    unknown.push(name);
                }
            }
        }
        unknown.sort_unstable();
        let expected: &[&str] = match (shown.is_native(), shown.has_all_tables()) {
            (true, _) => &["filter-cali-OUTPUT", "mangle-cali-POSTROUTING"],
            // That of the table mangle, and that of nat.
            (false, true) => &["cali-OUTPUT", "cali-POSTROUTING", "cali-POSTROUTING"],
            (false, false) => &["cali-OUTPUT", "cali-POSTROUTING"],
        };
        assert_eq!(unknown, expected, "{}", shown.name);
    }
}
