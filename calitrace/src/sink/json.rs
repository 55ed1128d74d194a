//! `-o json`: a line for each packet trace and each ledger. Its form is a promise, kept by
//! `calitrace/schema/calitrace-1.schema.json`.

use std::{
    io::{self, Write},
    sync::Arc,
};

use serde::Serialize;

use super::Sink;
use crate::{correlate::PacketTrace, event::Ledger};

/// The sink.
#[derive(Debug)]
pub(super) struct Json<W> {
    output: W,
}

#[derive(Serialize)]
struct LedgerLine<'a> {
    #[serde(rename = "type")]
    kind: &'static str,
    version: u32,
    #[serde(flatten)]
    ledger: &'a Ledger,
}

impl<W: Write> Json<W> {
    pub(super) fn new(output: W) -> Self {
        Self { output }
    }

    fn line(&mut self, value: &impl Serialize) -> io::Result<()> {
        serde_json::to_writer(&mut self.output, value)?;
        self.output.write_all(b"\n")
    }
}

impl<W: Write + Send> Sink for Json<W> {
    fn trace(&mut self, trace: &Arc<PacketTrace>) -> io::Result<()> {
        self.line(&**trace)
    }

    fn tick(&mut self, _now: u64) -> io::Result<()> {
        self.output.flush()
    }

    fn ledger(&mut self, ledger: &Ledger) -> io::Result<()> {
        self.line(&LedgerLine {
            kind: "ledger",
            version: 1,
            ledger,
        })
    }

    fn finish(&mut self) -> io::Result<()> {
        self.output.flush()
    }
}

#[cfg(test)]
mod tests {
    use boon::{Compiler, SchemaIndex, Schemas};
    use serde_json::Value;

    use super::*;
    use crate::{
        correlate::{Endpoint, NatKind, NatStep},
        event::{LedgerRow, Transport},
        view::sample,
    };

    const SCHEMA: &str = include_str!("../../schema/calitrace-1.schema.json");

    fn schema() -> (Schemas, SchemaIndex) {
        let (mut schemas, mut compiler) = (Schemas::new(), Compiler::new());
        compiler
            .add_resource("urn:calitrace:schema:1", serde_json::from_str(SCHEMA).unwrap())
            .unwrap();
        let index = compiler.compile("urn:calitrace:schema:1", &mut schemas).unwrap();
        (schemas, index)
    }

    /// Every kind of line, with every part filled in somewhere.
    fn lines() -> Vec<Value> {
        let mut bytes = Vec::new();
        let mut sink = Json::new(&mut bytes);
        let transport = Transport::Udp {
            src_port: 40_000,
            dst_port: 53,
            payload: 20,
        };
        let mut translated = sample::delivered(0, transport);
        let address = translated.flow.flow.dst;
        let end = |port| Endpoint { address, port };
        let (kind, node) = (NatKind::Dnat, Some("minikube".into()));
        translated.nat.push(NatStep {
            kind,
            node,
            from: end(Some(53)),
            to: end(None),
        });
        let mut v6 = sample::ping(0, 1);
        (v6.flow.flow.src, v6.flow.flow.proto) = ("fd00:10:244::1".parse().unwrap(), 58);
        for trace in [
            sample::ping(0, 1),
            sample::probe(0, 1, 9),
            sample::denied(0),
            translated,
            v6,
            sample::logged(sample::ping(0, 1), "API0|np/default/allow-frontend"),
        ] {
            sink.trace(&Arc::new(trace)).unwrap();
        }
        sink.ledger(&Ledger {
            time: 1,
            exact: true,
            rows: vec![LedgerRow::default()],
            evicted: 0,
        })
        .unwrap();
        sink.finish().unwrap();
        bytes
            .split(|byte| *byte == b'\n')
            .filter_map(|line| serde_json::from_slice(line).ok())
            .collect()
    }

    /// Where a value has objects, as paths to their fields.
    fn fields(value: &Value, path: &str, found: &mut Vec<String>) {
        match value {
            Value::Object(map) => {
                for (name, value) in map {
                    found.push(format!("{path}/{name}"));
                    fields(value, &format!("{path}/{name}"), found);
                }
            }
            Value::Array(values) => {
                for (index, value) in values.iter().enumerate() {
                    fields(value, &format!("{path}/{index}"), found);
                }
            }
            _ => {}
        }
    }

    #[test]
    fn every_line_is_as_the_schema_says() {
        let (schemas, index) = schema();
        let lines = lines();
        assert_eq!(lines.len(), 7);
        for line in &lines {
            if let Err(error) = schemas.validate(line, index) {
                panic!("{line:#}\n{error:#}");
            }
        }
    }

    #[test]
    fn the_schema_misses_every_field_that_is_absent_or_of_another_type() {
        let (schemas, index) = schema();
        for line in lines() {
            let mut paths = Vec::new();
            fields(&line, "", &mut paths);
            for path in paths {
                let (parent, name) = path.rsplit_once('/').unwrap();
                let mut broken = line.clone();
                broken
                    .pointer_mut(parent)
                    .unwrap()
                    .as_object_mut()
                    .unwrap()
                    .remove(name);
                assert!(
                    schemas.validate(&broken, index).is_err(),
                    "{path} is not required"
                );
                let mut broken = line.clone();
                *broken.pointer_mut(&path).unwrap() = serde_json::json!({});
                assert!(
                    schemas.validate(&broken, index).is_err(),
                    "{path} may be anything"
                );
            }
        }
    }

    #[test]
    fn a_packet_line() {
        insta::assert_snapshot!(lines()[2].to_string(), @"{\"answer\":null,\"bypass\":null,\"certainty\":\"content\",\"drop\":{\"before\":\"tunl0\",\"culprits\":[],\"interface\":\"cali8d02ed71817\",\"location\":\"nft_do_chain\",\"mtu\":null,\"netfilter\":\"FORWARD\",\"node\":\"minikube\",\"policy\":null,\"reason\":\"NETFILTER_DROP\",\"route\":null},\"dup_ack\":null,\"flow\":{\"dst\":\"10.244.205.193\",\"dst_pod\":\"default/busybox-f5945bfb5-mwgr6\",\"dst_port\":null,\"icmp_id\":42,\"proto\":\"icmp\",\"src\":\"10.244.120.67\",\"src_pod\":\"default/busybox-f5945bfb5-mw26t\",\"src_port\":null},\"hops\":[{\"address\":\"10.244.120.64\",\"arrived_ns\":4000,\"certainty\":\"observed\",\"clock_bound_ns\":0,\"left_ns\":5000,\"node\":\"minikube\",\"pod\":null,\"reason\":null,\"rtt_ns\":null,\"ttl\":1}],\"id\":\"00000000000000000000000000000001\",\"length\":84,\"lost\":null,\"nat\":[],\"observations\":[{\"detail\":null,\"direction\":\"ingress\",\"elapsed_ns\":0,\"encap\":null,\"hook\":\"workload_ingress\",\"interface\":\"cali8d02ed71817\",\"joined\":null,\"length\":84,\"logged\":null,\"mtu\":1500,\"netns\":1,\"node\":\"minikube\",\"segments\":null,\"ttl\":64}],\"retransmit\":null,\"segment\":null,\"start\":\"2022-11-09T13:20:00.000000000Z\",\"ttl\":64,\"type\":\"packet\",\"verdict\":\"dropped\",\"version\":1}");
    }
}
