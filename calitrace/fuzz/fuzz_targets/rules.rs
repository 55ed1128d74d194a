//! Netfilter rules and IP sets as their tools write them, and a packet that goes through them. Whatever the text, following it
//! ends, and the same rules say the same.
#![no_main]

use calitrace::netfilter::{Asked, Device, Hook, Ruleset, Sets, States};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|texts: (&str, &str, [u8; 4], u16)| {
    let (rules, sets, address, port) = texts;
    let (ruleset, sets) = (Ruleset::parse(rules), Sets::parse(sets));
    for proto in [1, 6] {
        let packet = Asked {
            src: address.into(),
            dst: [10, 244, 120, 67].into(),
            proto,
            ports: (proto == 6).then_some((port, 80)),
            icmp: (proto == 1).then_some((8, 0)),
            input: Device::Is("tunl0"),
            output: Device::Is("cali8d02ed71817"),
            states: States::ANY,
            local: &[],
        };
        let hooks = [Hook::Prerouting, Hook::Forward, Hook::Postrouting];
        let said = ruleset.culprits(&packet, &hooks, &sets);
        assert_eq!(said, Ruleset::parse(rules).culprits(&packet, &hooks, &sets));
        for culprit in said {
            assert!(!culprit.to_string().is_empty());
        }
    }
});
