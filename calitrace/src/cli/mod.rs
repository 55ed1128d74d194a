//! The command line: what was typed becomes a [`plan::Plan`], and a plan is carried out.

mod args;
mod doctor;
pub mod exit;
pub mod plan;
mod read;
mod topology;
mod watch;

use std::{
    ffi::OsString,
    io::{self, IsTerminal as _, Write as _},
};

use anyhow::{Context as _, Result};

use crate::{
    pipeline::Pipeline,
    sink::{Output, Sink, Terminal},
};

/// Does what a command line says, the program's name first. [`exit::report`] tells of an error.
pub fn run(args: impl IntoIterator<Item = OsString>) -> Result<()> {
    let plan = match args::parse(args)? {
        args::Parsed::Plan(plan) => plan,
        args::Parsed::Text(text) => {
            return io::stdout()
                .write_all(text.as_bytes())
                .context("write to standard output");
        }
    };
    init_log(plan.verbose);
    match plan.command {
        plan::Command::Read(plan) => read::run(&plan),
        plan::Command::Watch(plan) => watch::run(&plan),
        plan::Command::Topology(plan) => topology::run(&plan),
        plan::Command::Doctor(plan) => doctor::run(&plan),
    }
}

/// Logs go to standard error, in plain sentences: `warning: …`.
fn init_log(verbose: u8) {
    let level = match verbose {
        0 => log::LevelFilter::Warn,
        1 => log::LevelFilter::Info,
        _ => log::LevelFilter::Debug,
    };
    env_logger::Builder::new()
        .filter_level(level)
        .format(|out, record| {
            let level = match record.level() {
                log::Level::Warn => "warning",
                log::Level::Error => "error",
                log::Level::Info => "info",
                log::Level::Debug | log::Level::Trace => "debug",
            };
            writeln!(out, "{level}: {}", record.args())
        })
        .init();
}

/// Opens what a view writes to. What is live is redrawn on a terminal.
fn open(view: &plan::View, live: bool) -> Result<Pipeline> {
    let mut sinks: Vec<Box<dyn Sink>> = vec![view.format.sink(Output::stdout(), terminal(live))];
    for file in &view.files {
        sinks.push(file.format.sink(Output::create(&file.path)?));
    }
    let pipeline = Pipeline::new(view.filter.clone(), view.count.map(Into::into), sinks);
    Ok(pipeline.with_max_open(view.max_open))
}

/// The terminal that standard output is, if it is one.
fn terminal(redraw: bool) -> Option<Terminal> {
    io::stdout().is_terminal().then(|| Terminal {
        colours: colours_wanted(),
        redraw,
        size: || terminal_size::terminal_size().map(|(columns, rows)| (columns.0, rows.0)),
    })
}

/// Whether colours are wanted at all: <https://no-color.org>.
fn colours_wanted() -> bool {
    std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}
