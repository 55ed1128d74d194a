//! Netfilter rules and IP sets as their tools write them (iptables, ipset, nft), and a packet that goes through them. Whatever
//! the text, following it ends, and the same rules say the same.
#![no_main]

use calitrace::netfilter::{
    Asked, Device, Hook, Ruleset, Sets, Sources, States, compact_nft, compact_nft_with_nat,
};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|texts: (&str, &str, [u8; 4], u16)| {
    let (rules, sets, address, port) = texts;
    let sets = Sets::parse(sets);
    let rulesets = [Ruleset::parse(rules), Ruleset::parse_nft(rules, false)];
    let again = [Ruleset::parse(rules), Ruleset::parse_nft(rules, false)];
    for kept in [compact_nft(rules), compact_nft_with_nat(rules)]
        .into_iter()
        .flatten()
    {
        assert!(
            kept.lines()
                .all(|line| line.starts_with('{') && line.ends_with('}'))
        );
        drop(Ruleset::parse_nft(&kept, true));
        if let Some(sources) = Sources::parse(&kept, "cali40all-hosts-net") {
            for member in sources.addresses() {
                assert_ne!(sources.holds(member), Some(false));
            }
        }
    }
    for proto in [1, 6] {
        let packet = Asked {
            src: address.into(),
            dst: [10, 244, 120, 67].into(),
            proto,
            ports: (proto == 6).then_some((Some(port), 80)),
            icmp: (proto == 1).then_some((8, 0)),
            input: Device::Is("tunl0"),
            output: Device::Is("cali8d02ed71817"),
            states: States::ANY,
            is_from_there: false,
            local: &[],
        };
        let hooks = [Hook::Prerouting, Hook::Forward, Hook::Postrouting];
        for (ruleset, again) in rulesets.iter().zip(&again) {
            let said = ruleset.culprits(&packet, &hooks, &sets);
            assert_eq!(said, again.culprits(&packet, &hooks, &sets));
            assert_eq!(
                ruleset.masquerades(&packet, &sets),
                again.masquerades(&packet, &sets)
            );
            for culprit in said {
                assert!(!culprit.to_string().is_empty());
            }
        }
    }
});
