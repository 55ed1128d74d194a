//! Kernel symbols: from an address to the function it lies in.

use std::{
    fs::File,
    io::{BufRead as _, BufReader, Read},
    path::Path,
};

use anyhow::{Context as _, Result, bail};

use super::permission;

/// The functions of the running kernel, by address.
#[derive(Debug)]
pub(super) struct Symbols {
    /// Start addresses, ascending, and where the name lies in `names`.
    entries: Vec<(u64, u32)>,
    /// Names, each ended by a newline.
    names: String,
}

impl Symbols {
    /// Reads `/proc/kallsyms`. Fails where the kernel hides the addresses (`kernel.kptr_restrict`).
    pub(super) fn load() -> Result<Self> {
        let path = Path::new("/proc/kallsyms");
        let file = File::open(path).with_context(|| format!("open {}", path.display()))?;
        Self::read(file).with_context(|| format!("read {}", path.display()))
    }

    /// Reads lines of the form `ffffffff81000000 T _text` (and `\t[module]`).
    fn read(from: impl Read) -> Result<Self> {
        let mut found = Self {
            entries: Vec::new(),
            names: String::new(),
        };
        let mut reader = BufReader::with_capacity(1 << 16, from);
        let mut line = String::new();
        while reader.read_line(&mut line)? > 0 {
            found.add(&line);
            line.clear();
        }
        if found.entries.is_empty() {
            bail!(
                "it shows no addresses (kernel.kptr_restrict; remedy: {})",
                permission::symbols_remedy()
            );
        }
        found.entries.sort_unstable();
        Ok(found)
    }

    fn add(&mut self, line: &str) {
        let mut words = line.split_ascii_whitespace();
        let (Some(address), Some(kind), Some(name)) = (words.next(), words.next(), words.next()) else {
            return;
        };
        let Ok(address) = u64::from_str_radix(address, 16) else {
            return;
        };
        let Ok(at) = u32::try_from(self.names.len()) else {
            return;
        };
        if address == 0 || !matches!(kind, "t" | "T" | "w" | "W") {
            return;
        }
        self.names.push_str(name);
        self.names.push('\n');
        self.entries.push((address, at));
    }

    /// The function that `address` lies in, or follows.
    pub(super) fn function(&self, address: u64) -> Option<&str> {
        let after = self.entries.partition_point(|&(start, _)| start <= address);
        let (start, _) = *self.entries.get(after.checked_sub(1)?)?;
        // Several names may share an address; the first in the file is as good as any, and always the same.
        let first = self.entries.partition_point(|&(other, _)| other < start);
        let name = &self.names[self.entries[first].1 as usize..];
        name.split('\n').next()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINES: &str = "ffffffff81000100 T second\nffffffff81000000 T first\nffffffff81000000 t alias\n\
                         ffffffff81000200 D data\nffffffffc0000000 t in_module\t[ipip]\nnonsense\n";

    #[test]
    fn an_address_belongs_to_the_function_before_it() {
        let symbols = Symbols::read(LINES.as_bytes()).unwrap();
        assert_eq!(symbols.function(0xffff_ffff_8100_0000), Some("first"));
        assert_eq!(symbols.function(0xffff_ffff_8100_00ff), Some("first"));
        assert_eq!(symbols.function(0xffff_ffff_8100_0300), Some("second"));
        assert_eq!(symbols.function(0xffff_ffff_c000_0010), Some("in_module"));
        assert_eq!(symbols.function(0x10), None);
    }

    #[test]
    fn hidden_addresses_are_an_error() {
        let error = Symbols::read("0000000000000000 T first\n".as_bytes()).unwrap_err();
        assert!(error.to_string().contains("kptr_restrict"), "{error}");
    }
}
