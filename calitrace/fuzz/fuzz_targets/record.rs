//! Ring records, one after the other. What is decoded can be encoded again and is then decoded to the same, and an
//! event log keeps it as it is.
#![no_main]

use calitrace::event::{DecodeError, Item, decode};
use calitrace_fuzz::{Numbers, record, record_length};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let mut rest = data;
    while let Some(kind) = rest.first() {
        let Some(length) = record_length(*kind) else {
            assert!(decode(rest, &Numbers).is_err(), "kind {kind} is none");
            return;
        };
        let Some((one, next)) = rest.split_at_checked(length) else {
            assert_eq!(decode(rest, &Numbers), Err(DecodeError::Short));
            return;
        };
        let decoded = decode(one, &Numbers);
        assert_eq!(
            decode(rest, &Numbers),
            decoded,
            "what follows a record is no part of it"
        );
        if let Ok(observation) = decoded {
            assert_eq!(decode(&record(&observation), &Numbers), Ok(observation.clone()));
            let item = Item::Observation(observation);
            let line = serde_json::to_vec(&item).expect("an observation is written");
            assert_eq!(serde_json::from_slice::<Item>(&line).expect("and read"), item);
        }
        rest = next;
    }
});
