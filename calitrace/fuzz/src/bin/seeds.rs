//! Writes seed inputs made of the scenarios: `seeds SCENARIOS FOLDER` fills `FOLDER/log`, `FOLDER/views` and `FOLDER/record`.

use std::{
    env, fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};
use calitrace::event::{FORMAT, Header, Item, VERSION};
use calitrace_fuzz::record;
// Instrumented as all of this workspace, it needs what the instrumentation calls.
use libfuzzer_sys as _;

fn main() -> Result<()> {
    let arguments: Vec<PathBuf> = env::args_os().skip(1).map(PathBuf::from).collect();
    let [scenarios, folder] = arguments.as_slice() else {
        bail!("expected two folders: that of the scenarios, and one to write to");
    };
    for target in ["log", "views", "record"] {
        let path = folder.join(target);
        fs::create_dir_all(&path).with_context(|| format!("make {}", path.display()))?;
    }
    for entry in fs::read_dir(scenarios).with_context(|| format!("list {}", scenarios.display()))? {
        let file = entry.context("list the scenarios")?.path();
        let Some(name) = file
            .file_stem()
            .filter(|_| file.extension().is_some_and(|ending| ending == "jsonl"))
        else {
            continue;
        };
        let mut items = vec![header()];
        read(&file, &mut items)?;
        let mut log = Vec::new();
        let mut records = Vec::new();
        for item in &items {
            serde_json::to_writer(&mut log, item).context("write a line")?;
            log.push(b'\n');
            if let Item::Observation(observation) = item {
                records.extend(record(observation));
            }
        }
        for (target, seed) in [("log", &log), ("views", &log), ("record", &records)] {
            let path = folder.join(target).join(name);
            fs::write(&path, seed).with_context(|| format!("write {}", path.display()))?;
        }
    }
    Ok(())
}

/// Scenarios have none.
fn header() -> Item {
    Item::Header(Header {
        format: FORMAT.into(),
        version: VERSION,
        program: "0.1.0".into(),
        boot_id: "b".into(),
        host: "h".into(),
        kernel: "6.18.0".into(),
        hooks: Vec::new(),
        filter: None,
        drain_period: 10_000_000,
    })
}

/// The items of a scenario. A line `{"include":"FILE"}` stands for the lines of another file of the folder.
fn read(file: &Path, items: &mut Vec<Item>) -> Result<()> {
    let text = fs::read_to_string(file).with_context(|| format!("read {}", file.display()))?;
    for line in text.lines().filter(|line| !line.is_empty()) {
        let value: serde_json::Value =
            serde_json::from_str(line).with_context(|| format!("read {}", file.display()))?;
        match value.get("include").and_then(|name| name.as_str()) {
            Some(name) => read(&file.with_file_name(name), items)?,
            None => {
                items.push(serde_json::from_value(value).with_context(|| format!("read {}", file.display()))?)
            }
        }
    }
    Ok(())
}
