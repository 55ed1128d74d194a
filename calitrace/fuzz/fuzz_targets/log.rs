//! Event logs. What is read is written again to a log that is read the same, up to the same end.
#![no_main]

use calitrace::event::{Header, Item, LogReader, LogWriter};
use libfuzzer_sys::fuzz_target;

/// The items up to an error or the end, and whether the log was cut off.
fn read(log: &[u8]) -> Option<(Vec<Item>, bool)> {
    let mut reader = LogReader::new(log, "a log").ok()?;
    let items: Vec<Item> = reader.by_ref().map_while(Result::ok).collect();
    Some((items, reader.cut().is_some()))
}

fuzz_target!(|data: &[u8]| {
    let Some((items, _)) = read(data) else { return };
    assert!(
        matches!(items.first(), Some(Item::Header(Header { .. }))),
        "a log begins with its header"
    );
    let ends = items
        .iter()
        .filter(|item| matches!(item, Item::End { .. }))
        .count();
    assert_eq!(
        ends,
        usize::from(matches!(items.last(), Some(Item::End { .. }))),
        "nothing follows the end"
    );
    let mut written = Vec::new();
    let mut writer = LogWriter::new(&mut written);
    for item in &items {
        writer.write(item).expect("memory takes everything");
    }
    let (again, cut) = read(&written).expect("what was written is a log");
    assert_eq!(again, items);
    assert_eq!(cut, ends == 0, "without its end line a log is said to be cut off");
});
