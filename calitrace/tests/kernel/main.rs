//! The kernel side against the running kernel: real packets between two network namespaces made for each test, and
//! the records that they leave. Needs root.
#![expect(clippy::print_stdout, reason = "a test tells what it measured")]

mod attaching;
mod bench;
mod btf;
mod clsact;
mod net;
mod parsing;
mod transports;

use std::process::ExitCode;

use calitrace_tests::{Need, Test, harness, test};

/// A test by its path. It panics where it fails.
macro_rules! test {
    ($module:ident::$name:ident) => {
        test(concat!(stringify!($module), "::", stringify!($name)), || {
            $module::$name();
            Ok(())
        })
    };
}

const TESTS: &[Test] = &[
    test!(attaching::nothing_is_left_after_detaching),
    test!(attaching::counts_survive_detaching_and_slots_are_used_again),
    test!(attaching::a_slot_that_another_hook_got_is_forgotten),
    test!(attaching::traffic_out_of_scope_is_counted_only),
    test!(attaching::a_full_ring_refuses_and_counts),
    test!(attaching::an_interface_that_is_gone_is_no_error),
    test!(attaching::another_program_in_front_is_noticed).needs(&[Need::Tcx]),
    test!(attaching::without_btf_only_tc_observes_and_namespaces_are_told_apart),
    test!(attaching::programs_load_with_their_log_messages_too),
    test!(attaching::programs_load_while_children_end),
    test!(attaching::a_ring_of_no_legal_size_is_refused),
    test!(attaching::nothing_is_left_after_a_kill).needs(&[Need::Tcx]),
    test!(bench::a_flood_is_recorded_to_the_last_datagram),
    test!(btf::members_and_drop_reasons_are_where_bpftool_says),
    test!(clsact::a_qdisc_of_ours_goes_with_the_last_filter),
    test!(clsact::filters_of_others_before_and_after_ours_run_and_stay),
    test!(clsact::egress_is_not_observed_on_an_ingress_qdisc),
    test!(clsact::what_a_killed_run_left_is_found_and_swept_and_nothing_else),
    test!(clsact::a_filter_that_somebody_took_away_is_missed),
    test!(parsing::vxlan_gives_inner_and_outer_header),
    test!(parsing::ipip_gives_inner_and_outer_header),
    test!(parsing::an_error_about_a_tunnelled_packet_tells_of_the_packet_inside),
    test!(parsing::a_pods_own_tunnel_is_its_payload),
    test!(parsing::ip_options_and_extension_headers_are_stepped_over),
    test!(parsing::later_fragments_have_no_transport),
    test!(parsing::later_fragments_have_no_node_port),
    test!(transports::udp_has_the_same_key_at_both_ends),
    test!(transports::payloads_that_differ_have_other_digests),
    test!(transports::udp_over_ipv6),
    test!(transports::tcp_sequence_numbers_follow_the_bytes),
    test!(transports::echo_has_identifier_and_sequence_number),
    test!(transports::an_icmp_error_quotes_the_packet_and_the_drop_has_its_reason),
    test!(transports::sctp_has_ports_and_the_digest_of_its_chunks),
    test!(transports::other_protocols_have_addresses_number_and_digest),
];

fn main() -> ExitCode {
    if let Some(target) = attaching::Target::told() {
        attaching::attach_and_wait_to_be_killed(&target);
        return ExitCode::SUCCESS;
    }
    harness::run(TESTS.iter().copied())
}
