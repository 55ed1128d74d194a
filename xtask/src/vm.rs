//! `cargo xtask vm`: the tests of the kernel, the lab and the whole program in guests with stock Debian kernels. What those
//! take and this machine's kernel may lack (ipip, `WireGuard`, kprobes, clsact without TCX) is there.
//!
//! Guests run the programs of this machine with its libraries: nothing is built for them.

mod apt;
mod console;
mod cpio;
mod guest;
mod kernels;
mod modules;
mod programs;
mod subset;
mod table;
mod tools;
mod tree;

use std::ffi::{OsStr, OsString};
use std::fs;
use std::iter;
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use calitrace_tests::interrupt::Interrupts;

use crate::cargo::Executable;
use crate::step::say;
use crate::test::{self, Layer, Report};
use crate::{setup, workspace};
use console::{Console, Verdict};
use guest::{Accelerator, Guest};
pub(crate) use kernels::Kernel;
use kernels::{MATRIX, Store};
use programs::Run;
use table::Outcome;
use tree::Tree;

/// The layers whose tests depend on the kernel, in the order they run in: the last of the end-to-end tests locks the
/// kernel down, which cannot be undone.
const LAYERS: [Layer; 3] = [Layer::Kernel, Layer::Lab, Layer::EndToEnd];
/// For all tests on one kernel, emulated. They take half an hour on two cores that do nothing else.
const LIMIT: Duration = Duration::from_hours(2);
/// For the subset on one kernel. It takes four minutes on two cores.
const SUBSET_LIMIT: Duration = Duration::from_mins(15);

/// Which kernels and which tests.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// A series of Debian's kernels, such as 6.1, or 7 for the newest 7.x; all of 5.10, 6.1, 6.12, 6.18 and 7 if none is
    /// named
    #[arg(long = "kernel", value_name = "SERIES", conflicts_with = "image")]
    kernels: Vec<String>,
    /// A kernel of yours: its bzImage
    #[arg(long, value_name = "FILE", requires = "modules")]
    image: Option<PathBuf>,
    /// Its folder lib/modules/RELEASE
    #[arg(long, value_name = "FOLDER", requires = "image")]
    modules: Option<PathBuf>,
    /// Run these layers only: kernel, lab, e2e
    #[arg(long = "layer", value_enum, value_name = "LAYER")]
    layers: Vec<Layer>,
    /// Run only tests whose name contains one of these
    #[arg(last = true, value_name = "TEXT")]
    filters: Vec<String>,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    if let Some(layer) = options.layers.iter().find(|layer| !LAYERS.contains(layer)) {
        bail!("layer {layer} does not run in guests; kernel, lab and e2e do");
    }
    setup::for_build()?;
    set_up()?;
    let built = test::build()?;
    let mut runs = Vec::new();
    let plan = test::plan(&built)?;
    let asked = |layer: &Layer| options.layers.is_empty() || options.layers.contains(layer);
    for layer in LAYERS.into_iter().filter(asked) {
        for (_, program) in plan.iter().filter(|(of, _)| *of == layer) {
            if options.filters.is_empty() {
                runs.push(Run::all(program));
            } else {
                runs.extend(Run::some(program, &options.filters)?);
            }
        }
    }
    if runs.is_empty() {
        bail!("no test is named like {}", options.filters.join(", "));
    }
    let kernels = match (&options.image, &options.modules) {
        (Some(image), Some(modules)) => vec![kernels::given(image, modules)?],
        _ => of_series(&options.kernels)?,
    };
    let outcomes = matrix(&kernels, &runs, &test::product(&built)?, LIMIT)?;
    say("");
    for line in table::lines(&outcomes) {
        say(&line);
    }
    let bad = outcomes
        .iter()
        .filter(|outcome| outcome.verdict != Verdict::Passed);
    match bad.count() {
        0 => Ok(()),
        bad => bail!("{bad} of {} kernels failed; see above", outcomes.len()),
    }
}

fn set_up() -> Result<()> {
    if !cfg!(target_arch = "x86_64") {
        bail!("guests have the processor of this machine, and only those of x86-64 are known");
    }
    setup::for_tests()?;
    setup::for_guests()
}

/// The kernels that `cargo xtask test` runs tests on, with all else that guests take.
pub(crate) fn prepare() -> Result<Vec<Kernel>> {
    set_up()?;
    of_series(&subset::KERNELS.map(str::to_owned))
}

/// The part of the tests that differs between kernels, or those whose names contain `only`.
pub(crate) fn subset(
    kernels: &[Kernel],
    programs: &[&Executable],
    product: &OsStr,
    only: Option<&str>,
) -> Result<Report> {
    let runs = subset::runs(programs, only)?;
    if runs.is_empty() {
        return Ok(Report::default());
    }
    let outcomes = matrix(kernels, &runs, product, SUBSET_LIMIT)?;
    for line in table::lines(&outcomes) {
        say(&line);
    }
    let mut sum = Report::default();
    for outcome in outcomes {
        let kernel = format!("kernel {}", outcome.series);
        sum.totals += outcome.totals;
        sum.failures.append(&format!("{kernel}: "), outcome.failures);
        // A guest that did not end well has failed, whatever its tests said.
        if outcome.verdict != Verdict::Passed && outcome.totals.failed == 0 {
            sum.fail(&kernel, &outcome.verdict.to_string());
        }
    }
    Ok(sum)
}

/// Kernels of the series named, all of which there must be; of the whole matrix, those that the archive has.
fn of_series(named: &[String]) -> Result<Vec<Kernel>> {
    let mut store = Store::open()?;
    let mut kernels = Vec::new();
    let whole = MATRIX.map(str::to_owned);
    for series in if named.is_empty() { &whole[..] } else { named } {
        match store.newest(series)? {
            Some(kernel) => {
                say(&format!("kernel {series}: {}", kernel.release));
                for package in store.packages(series) {
                    say(&format!("kernel {series}: package {package}"));
                }
                kernels.push(kernel);
            }
            None if named.is_empty() => say(&format!("kernel {series}: left out")),
            None => {
                bail!("Debian's archive has no kernel {series} (suites: see xtask/src/vm/apt/sources.rs)")
            }
        }
    }
    Ok(kernels)
}

/// Runs all of `runs` on each kernel, as many guests at once as this machine has the processors for.
fn matrix(kernels: &[Kernel], runs: &[Run<'_>], product: &OsStr, limit: Duration) -> Result<Vec<Outcome>> {
    let scratch = workspace::root().join("target/vm/guest");
    fs::create_dir_all(&scratch).with_context(|| format!("make the folder {}", scratch.display()))?;
    let interrupts = Interrupts::hold()?;
    let first = kernels.first().context("no kernel to run tests on")?;
    let accelerator = Accelerator::choose(first, &scratch, &interrupts)?;

    let mut tree = Tree::new();
    tools::add(&mut tree)?;
    programs::add(&mut tree, runs, Path::new(product), &scratch)?;
    tree.made(Path::new("/init"), 0o755, include_str!("vm/init.sh"));
    let scale = OsString::from(accelerator.time_scale().to_string());
    let variables: [(&str, &OsStr); 8] = [
        ("PATH", OsStr::new("/usr/sbin:/usr/bin:/sbin:/bin")),
        ("HOME", OsStr::new("/root")),
        ("TERM", OsStr::new("dumb")),
        ("CI", OsStr::new("true")),
        // Tests that need what a guest cannot have are skipped there, though not in CI itself.
        ("CALITRACE_GUEST", OsStr::new("1")),
        ("CALITRACE_TIME_SCALE", &scale),
        ("CALITRACE_BIN", product),
        ("RUST_BACKTRACE", OsStr::new("0")),
    ];
    tree.made(
        Path::new("/guest/environment"),
        0o644,
        programs::environment(&variables),
    );
    tree.made(Path::new("/guest/tests"), 0o644, programs::script(runs));

    let mut guests = Vec::new();
    for kernel in kernels {
        let mut tree = tree.clone();
        let folder = scratch.join(&kernel.release);
        modules::add(&mut tree, kernel, &folder.join("modules"))?;
        let root = folder.join("root.cpio");
        tree.write(&root)?;
        guests.push(Guest {
            kernel,
            root,
            accelerator,
            limit,
            messages: Stdio::inherit,
        });
    }
    at_once(accelerator.guests_at_once(), &guests, &interrupts)
}

/// Runs the guests, `count` at a time; the outcomes are in their order.
fn at_once(count: usize, guests: &[Guest<'_>], interrupts: &Interrupts) -> Result<Vec<Outcome>> {
    let next = AtomicUsize::new(0);
    let work = || {
        iter::repeat_with(|| next.fetch_add(1, Ordering::Relaxed))
            .map_while(|place| Some((place, guests.get(place)?)))
            .map(|(place, guest)| Ok((place, one(guest, interrupts)?)))
            .collect::<Result<Vec<_>>>()
    };
    let mut outcomes = thread::scope(|scope| {
        let workers: Vec<_> = (0..count).map(|_| scope.spawn(work)).collect();
        let mut outcomes = Vec::new();
        for worker in workers {
            outcomes.extend(worker.join().unwrap_or_else(|panic| resume_unwind(panic))?);
        }
        anyhow::Ok(outcomes)
    })?;
    outcomes.sort_unstable_by_key(|(place, _)| *place);
    Ok(outcomes.into_iter().map(|(_, outcome)| outcome).collect())
}

/// One guest, with its console on this one. Booted again if the kernel panics before its first process.
fn one(guest: &Guest<'_>, interrupts: &Interrupts) -> Result<Outcome> {
    let kernel = guest.kernel;
    let start = Instant::now();
    for last in [false, true] {
        say(&format!(
            "\nkernel {}: {} boots ({:?})",
            kernel.series, kernel.release, guest.accelerator
        ));
        let mut console = Console::default();
        let ended = guest.run(interrupts, &mut |line| {
            console.line(line);
            let seconds = start.elapsed().as_secs();
            say(&format!("[{} {seconds:>4} s] {line}", kernel.series));
        })?;
        if console.panicked_early() && !last {
            continue;
        }
        let verdict = console.verdict(ended);
        let took = start.elapsed();
        say(&format!(
            "kernel {}: {verdict}: {}, {:.0} s",
            kernel.series,
            console.totals,
            took.as_secs_f64()
        ));
        return Ok(Outcome {
            series: kernel.series.clone(),
            release: console.release.unwrap_or_else(|| kernel.release.clone()),
            version: kernel.version.clone(),
            totals: console.totals,
            took,
            verdict,
            failed: console.failed,
            failures: console.failures,
        });
    }
    bail!("kernel {} was booted no more than twice", kernel.release)
}
