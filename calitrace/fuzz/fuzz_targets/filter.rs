//! The conditions of a filter as they are typed. What is accepted is printed so that it is accepted and means the same.
#![no_main]

use calitrace::filter::{End, PodName, Protocol};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if let Ok(end) = text.parse::<End>() {
        assert_eq!(end.to_string().parse(), Ok(end));
    }
    if let Ok(pod) = text.parse::<PodName>() {
        assert_eq!(pod.to_string(), text);
        assert_eq!(text.parse(), Ok(End::Pod(pod)));
    }
    if let Ok(protocol) = text.parse::<Protocol>() {
        let name = calitrace::event::protocol_name(protocol.0);
        assert_eq!(name.parse(), Ok(protocol));
    }
});
