//! What `calitrace read` makes of an event log: packet traces in every form. The same log shows the same, each line of
//! JSON is one, and no packet trace is told twice.
#![no_main]

use std::{
    collections::HashSet,
    io::{self, Write},
    sync::{Arc, Mutex, PoisonError},
};

use calitrace::{
    event::{Item, LogReader},
    filter::Filter,
    pipeline::Pipeline,
    sink::{Format, Output},
};
use libfuzzer_sys::fuzz_target;

/// Memory that outlives the sink which writes to it.
#[derive(Clone, Default)]
struct Memory(Arc<Mutex<Vec<u8>>>);

impl Memory {
    fn text(&self) -> String {
        let bytes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8(bytes.clone()).expect("views are text")
    }
}

impl Write for Memory {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn views(items: &[Item]) -> [String; 3] {
    let memories: [Memory; 3] = Default::default();
    let sinks = [Format::Text { sizes: true }, Format::Json, Format::Traceroute]
        .into_iter()
        .zip(&memories)
        .map(|(format, memory)| format.sink(Output::new(Box::new(memory.clone()), "memory".into()), None))
        .collect();
    let mut pipeline = Pipeline::new(Filter::default(), None, sinks);
    for item in items {
        let _ = pipeline.push(item).expect("memory takes everything");
    }
    pipeline.finish().expect("memory takes everything");
    memories.map(|memory| memory.text())
}

fuzz_target!(|data: &[u8]| {
    let Ok(reader) = LogReader::new(data, "a log") else {
        return;
    };
    let items: Vec<Item> = reader.map_while(Result::ok).collect();
    let shown = views(&items);
    assert_eq!(views(&items), shown);
    let mut told = HashSet::new();
    for line in shown[1].lines() {
        let object: serde_json::Value = serde_json::from_str(line).expect("a line of JSON");
        if object["type"] == "packet" {
            assert!(object["verdict"].is_string(), "{line}");
            told.insert(object["id"].to_string());
        }
    }
    let observations = items
        .iter()
        .filter(|item| matches!(item, Item::Observation(_)))
        .count();
    assert!(told.len() <= observations, "a trace was seen");
});
