//! Which test program belongs to which layer.

use std::fmt;

use anyhow::{Result, bail};
use clap::ValueEnum;

use crate::cargo::Executable;

/// A layer of the tests, from cheap to dear.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Layer {
    /// Unit tests, properties, scenario files, examples in the documentation
    Unit,
    /// A few seconds of each fuzz target
    Fuzz,
    /// The binary's help, errors and exit codes
    Cli,
    /// The programs and netlink against the running kernel (root)
    Kernel,
    /// Two Calico nodes in network namespaces (root)
    Lab,
    /// calitrace against real traffic in the lab (root)
    #[value(name = "e2e")]
    EndToEnd,
    /// What differs between kernels, in guests with stock Debian kernels
    Vm,
}

impl Layer {
    pub(crate) const ALL: [Self; 7] = [
        Self::Unit,
        Self::Fuzz,
        Self::Cli,
        Self::Kernel,
        Self::Lab,
        Self::EndToEnd,
        Self::Vm,
    ];

    pub(crate) fn needs_root(self) -> bool {
        matches!(self, Self::Kernel | Self::Lab | Self::EndToEnd)
    }

    /// All but the guests: those need kernels from Debian's archive, which a CI machine may not reach.
    pub(crate) fn required_in_ci(self) -> bool {
        self != Self::Vm
    }

    /// The layer of a test program. None for one that this list does not know.
    fn of(program: &Executable) -> Option<Self> {
        match (program.kind.as_str(), program.target.as_str()) {
            ("lib" | "bin", _) | ("test", "scenarios") => Some(Self::Unit),
            ("test", "cli") => Some(Self::Cli),
            ("test", "kernel" | "discovery" | "functions") => Some(Self::Kernel),
            ("test", "lab") => Some(Self::Lab),
            ("test", "e2e") => Some(Self::EndToEnd),
            _ => None,
        }
    }
}

impl fmt::Display for Layer {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.pad(match self {
            Self::Unit => "unit",
            Self::Fuzz => "fuzz",
            Self::Cli => "cli",
            Self::Kernel => "kernel",
            Self::Lab => "lab",
            Self::EndToEnd => "e2e",
            Self::Vm => "vm",
        })
    }
}

/// The test programs with their layers. A program without one is an error, lest it be left out silently.
pub(crate) fn plan(built: &[Executable]) -> Result<Vec<(Layer, &Executable)>> {
    let mut plan = Vec::new();
    for program in built.iter().filter(|built| built.is_test) {
        match Layer::of(program) {
            Some(layer) => plan.push((layer, program)),
            None => bail!(
                "test program `{}` belongs to no layer: name it in xtask/src/test/layer.rs",
                program.target
            ),
        }
    }
    Ok(plan)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn program(kind: &str, target: &str, is_test: bool) -> Executable {
        Executable {
            target: target.to_owned(),
            kind: kind.to_owned(),
            package_folder: "/x".into(),
            is_test,
            file: "/x/program".into(),
        }
    }

    #[test]
    fn each_test_program_gets_its_layer_and_others_none() {
        let built = [
            program("bin", "calitrace", false),
            program("test", "lab", true),
            program("lib", "calitrace", true),
        ];
        let plan = plan(&built).unwrap();
        let layers: Vec<Layer> = plan.iter().map(|(layer, _)| *layer).collect();
        assert_eq!(layers, [Layer::Lab, Layer::Unit]);
    }

    #[test]
    fn an_unknown_test_program_is_an_error() {
        let error = plan(&[program("test", "stray", true)]).unwrap_err().to_string();
        assert!(error.contains("`stray`"), "{error}");
    }
}
