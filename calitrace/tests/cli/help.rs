//! Help, and arguments that make no sense.

use crate::{Run, run};

/// Help without the spaces that clap leaves at line ends.
fn help(run: &Run) -> String {
    let lines: Vec<&str> = run.stdout.lines().map(str::trim_end).collect();
    lines.join("\n")
}

#[test]
fn short_help() {
    insta::assert_snapshot!(help(&run(&["-h"])), @r#"
    Traces the real packets of Calico pods, hop by hop

    Usage: calitrace [OPTIONS] <COMMAND>

    Commands:
      watch     Trace live traffic
      read      Trace what event logs hold
      topology  Show the Calico nodes of this machine
      doctor    Show what works on this machine, what does not and why

    Options:
      -v, --verbose...  Says more on standard error; twice for the kernel side's own logs
      -h, --help        Print help (see more with '--help')
      -V, --version     Print version

    Exit codes: 0 done, 1 error, 2 usage, 3 no permission, 4 nothing to trace.
    "#);
}

#[test]
fn help_of_watch() {
    let run = run(&["watch", "--help"]);
    assert_eq!((run.code, run.stderr.as_str()), (0, ""));
    insta::assert_snapshot!(help(&run), @r#"
    Trace live traffic

    Attaches to the Calico nodes in all network namespaces of this machine and prints the traces of the
    packets that pods send and receive, until interrupted. Needs root, or CAP_BPF, CAP_NET_ADMIN,
    CAP_PERFMON and CAP_SYS_ADMIN.

    Usage: calitrace watch [OPTIONS]

    Options:
      -v, --verbose...
              Says more on standard error; twice for the kernel side's own logs

      -h, --help
              Print help (see a summary with '-h')

    Which packets:
          --pod <NS/NAME>
              Packets from or to this pod; repeat for more pods

          --from <END>
              Packets from this pod, address or prefix

          --to <END>
              Packets to this pod, address or prefix; a service address, too

          --proto <PROTOCOL>
              tcp, udp, icmp, icmpv6, sctp or a protocol number

          --port <PORT>
              Packets from or to this port

          --interface <NAME>
              Packets that passed this interface of a node

          --dropped
              Only packets that were dropped, rejected, or lost between nodes

    Output:
      -o, --output <FORM>
              Form of the output: text, json or traceroute

              text: a block for each flow; on a terminal the latest ones, redrawn in place. json: a line
              for each packet, as calitrace-1.schema.json in the sources says. traceroute: blocks in the
              form that traceroute prints.

              [default: text]

          --sizes
              With the packet's bytes and the MTU at each interface (text)

              Before and after encapsulation. Always shown of a packet that is too large; json has them
              of every packet.

      -w, --write <FILE>
              Write all that is observed to a file; may be repeated

              The ending tells the format: .jsonl is an event log for `calitrace read`. The filter does
              not restrict it.

      -c, --count <COUNT>
              Stop after so many packets that match the filter

          --max-open <COUNT>
              Packet traces that may be open at once

              One takes about 1 KiB and is open for up to two seconds. Where more packets are under way,
              the oldest traces are closed before their time, with the verdict unknown, and counted
              (`evicted` in the ledger).

              [default: 200000]

          --duration <TIME>
              Stop after this time (10s, 2m, 1h)

    Where:
          --netns <NETNS>
              Only the network namespace with this name, inode number or path; may be repeated

          --node <NAME>
              Only the node with this name; may be repeated

          --service-cidr <PREFIX>
              Prefix of service addresses; may be repeated [default: the cluster's]

          --interface-prefix <PREFIX>
              What names of workload interfaces begin with; may be repeated

              [default: cali]

          --no-wait
              End with exit code 4 where there is no Calico node, instead of waiting for one

    Kernel:
          --hooks <WHICH>
              What to observe: all, or tc

              all: also functions of the kernel, which show what happens between two interfaces
              (forwarding, tunnels, ICMP errors, netfilter's verdicts, translations, clones); as many as
              this kernel lets be probed. tc: interfaces and drops only, which costs the packets less.

              [default: all]

          --vxlan-port <PORT>
              UDP port by which VXLAN is recognised

              [default: 4789]

          --btf <FILE>
              Type information (BTF) of the running kernel [default: /sys/kernel/btf/vmlinux]

              Without it drops are not seen; all else works.

          --tc <WAY>
              How programs are attached to interfaces: auto or clsact

              auto: by TCX where the kernel has it (Linux 6.6), else by filters on a clsact qdisc.
              clsact: always by these, on a kernel whose TCX misbehaves.

              [default: auto]

          --ring-size <SIZE>
              Size of the ring buffer, a power of two from 4KiB to 1GiB

              [default: 16MiB]

    Examples:
      calitrace watch                                   every flow of every pod of this machine
      calitrace watch --pod default/web-0 --dropped     what fails on its way from or to a pod
      calitrace watch --to 10.96.0.10 --proto udp       queries to a service, wherever they end up
      calitrace watch -o json -c 100 > packets.jsonl    a hundred packet traces for a script
      calitrace watch -w capture.jsonl --duration 1m    a minute for `calitrace read`

    Exit codes: 0 done, 1 error, 2 usage, 3 no permission, 4 nothing to trace.
    "#);
}

#[test]
fn short_help_of_read() {
    insta::assert_snapshot!(help(&run(&["read", "-h"])), @r#"
    Trace what event logs hold

    Usage: calitrace read [OPTIONS] <FILE>...

    Arguments:
      <FILE>...  Event logs

    Options:
      -v, --verbose...  Says more on standard error; twice for the kernel side's own logs
      -h, --help        Print help (see more with '--help')

    Which packets:
          --pod <NS/NAME>     Packets from or to this pod; repeat for more pods
          --from <END>        Packets from this pod, address or prefix
          --to <END>          Packets to this pod, address or prefix; a service address, too
          --proto <PROTOCOL>  tcp, udp, icmp, icmpv6, sctp or a protocol number
          --port <PORT>       Packets from or to this port
          --interface <NAME>  Packets that passed this interface of a node
          --dropped           Only packets that were dropped, rejected, or lost between nodes

    Output:
      -o, --output <FORM>     Form of the output: text, json or traceroute [default: text]
          --sizes             With the packet's bytes and the MTU at each interface (text)
      -w, --write <FILE>      Write all that is observed to a file; may be repeated
      -c, --count <COUNT>     Stop after so many packets that match the filter
          --max-open <COUNT>  Packet traces that may be open at once [default: 200000]

    Examples:
      calitrace read capture.jsonl
      calitrace read node-1.jsonl node-2.jsonl -o traceroute
      calitrace read capture.jsonl --dropped -o json

    Exit codes: 0 done, 1 error, 2 usage.
    "#);
}

#[test]
fn help_of_topology() {
    let run = run(&["topology", "--help"]);
    assert_eq!((run.code, run.stderr.as_str()), (0, ""));
    insta::assert_snapshot!(help(&run), @r#"
    Show the Calico nodes of this machine

    Shows devices, addresses, routes, blocks and pods of each node, and the path and MTU to expect
    between them. With --from and --to the path between these two: what traceroute would print, the
    devices and outer headers on the way, the largest packet that passes whole, and what calitrace would
    not see. It is what the tables say: no packet is sent.

    Usage: calitrace topology [OPTIONS]

    Options:
      -o, --output <FORM>
              Form of the output: text or json

              [default: text]

      -v, --verbose...
              Says more on standard error; twice for the kernel side's own logs

      -h, --help
              Print help (see a summary with '-h')

    Which path:
          --from <END>
              Show the path from this pod, by name or address

          --to <END>
              Show the path to this pod, service address or other address

    Where:
          --netns <NETNS>
              Only the network namespace with this name, inode number or path; may be repeated

          --node <NAME>
              Only the node with this name; may be repeated

          --service-cidr <PREFIX>
              Prefix of service addresses; may be repeated [default: the cluster's]

          --interface-prefix <PREFIX>
              What names of workload interfaces begin with; may be repeated

              [default: cali]

    Examples:
      calitrace topology                                              all nodes, and a few paths
      calitrace topology --from default/web-0 --to shop/cart-0        the path between two pods
      calitrace topology --from default/web-0 --to 10.96.0.10         to each pod behind a service
      calitrace topology --from default/web-0 --to 1.1.1.1 -o json    out of the cluster, for a script

    Exit codes: 0 done, 1 error, 2 usage, 3 no permission, 4 no Calico node.
    "#);
}

#[test]
fn every_verb_explains_itself() {
    for verb in ["watch", "read", "topology", "doctor"] {
        for flag in ["-h", "--help"] {
            let run = run(&[verb, flag]);
            assert_eq!((run.code, run.stderr.as_str()), (0, ""), "{verb} {flag}");
            assert!(
                run.stdout.contains(&format!("Usage: calitrace {verb}")),
                "{}",
                run.stdout
            );
        }
    }
    assert_eq!(
        run(&["--version"]).stdout,
        format!("calitrace {}\n", env!("CARGO_PKG_VERSION"))
    );
}

#[test]
fn what_makes_no_sense_is_a_usage_error() {
    let cases: [&[&str]; 22] = [
        &[],
        &["trace"],
        &["read"],
        &["watch", "--nonsense"],
        &["watch", "-o", "xml"],
        &["watch", "-c", "0"],
        &["watch", "--max-open", "0"],
        &["read", "--max-open", "many", "capture.jsonl"],
        &["watch", "--duration", "10"],
        &["watch", "--duration", "0s"],
        &["watch", "--ring-size", "3MiB"],
        &["watch", "--pod", "web-0"],
        &["watch", "--from", "10.0.0.0/40"],
        &["watch", "--proto", "quic"],
        &["watch", "--port", "0"],
        &["watch", "--vxlan-port", "70000"],
        &["watch", "--service-cidr", "10.96.0.0"],
        &["topology", "-o", "traceroute"],
        &["topology", "--from", "default/web-0"],
        &["topology", "--to", "default/web-0"],
        &["topology", "--from", "10.244.0.0/16", "--to", "10.96.0.10"],
        &["topology", "--from", "default/web-0", "--to", "web-1"],
    ];
    for args in cases {
        let run = run(args);
        assert_eq!(
            (run.code, run.stdout.as_str()),
            (2, ""),
            "{args:?}: {}",
            run.stderr
        );
        assert!(!run.stderr.is_empty(), "{args:?}");
    }
}

#[test]
fn an_unknown_ending_is_told_the_known_ones() {
    let run = run(&["watch", "-w", "capture.csv"]);
    assert_eq!(run.code, 2);
    insta::assert_snapshot!(run.stderr, @r#"
    error: invalid value 'capture.csv' for '--write <FILE>': the ending tells the format, and the known ones are: .jsonl

    For more information, try '--help'.
    "#);
}
