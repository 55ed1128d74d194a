//! `calitrace read`: event logs through the pipeline.

use std::{fs, os::unix::fs::MetadataExt as _, path::Path};

use anyhow::{Result, bail};

use super::plan;
use crate::source::file::Files;

/// Carries it out.
pub(super) fn run(plan: &plan::Read) -> Result<()> {
    for file in &plan.view.files {
        if let Some(read) = plan.files.iter().find(|read| same_file(read, &file.path)) {
            bail!(
                "{} would be overwritten while it is read; write to another file",
                read.display()
            );
        }
    }
    let mut files = Files::open(&plan.files)?;
    let mut pipeline = super::open(&plan.view, false)?;
    for item in &mut files {
        if pipeline.push(&item?)?.is_break() {
            break;
        }
    }
    pipeline.finish()?;
    for warning in files.cuts() {
        log::warn!("{warning}");
    }
    Ok(())
}

fn same_file(one: &Path, other: &Path) -> bool {
    let identity = |path| fs::metadata(path).ok().map(|data| (data.dev(), data.ino()));
    identity(one).is_some_and(|one| identity(other) == Some(one))
}
