//! Archives in the form the kernel unpacks as its first root: cpio's "newc" (Documentation/driver-api/early-userspace/
//! buffer-format.rst in the kernel's source). Knows bytes only; all files belong to root.

use std::io::{self, Write};

/// The kind bits of a mode (`stat.h`).
const FOLDER: u32 = 0o040_000;
const FILE: u32 = 0o100_000;
const LINK: u32 = 0o120_000;
const DEVICE: u32 = 0o020_000;
/// Headers with their names, and contents, are padded to this.
const ALIGNMENT: usize = 4;

/// Writes entries one after the other. Folders must come before what lies in them.
pub(super) struct Writer<W> {
    output: W,
    entries: u32,
}

impl<W: Write> Writer<W> {
    pub(super) fn new(output: W) -> Self {
        Self { output, entries: 0 }
    }

    /// A folder; `name` has no leading slash, as all names here.
    pub(super) fn folder(&mut self, name: &str) -> io::Result<()> {
        self.entry(name, FOLDER | 0o755, (0, 0), &[])
    }

    pub(super) fn file(&mut self, name: &str, mode: u32, content: &[u8]) -> io::Result<()> {
        self.entry(name, FILE | mode, (0, 0), content)
    }

    pub(super) fn link(&mut self, name: &str, target: &str) -> io::Result<()> {
        self.entry(name, LINK | 0o777, (0, 0), target.as_bytes())
    }

    /// A character device.
    pub(super) fn device(&mut self, name: &str, major: u32, minor: u32) -> io::Result<()> {
        self.entry(name, DEVICE | 0o600, (major, minor), &[])
    }

    /// Writes the entry that ends an archive, and gives the output back.
    pub(super) fn finish(mut self) -> io::Result<W> {
        self.entries = 0;
        self.entry("TRAILER!!!", 0, (0, 0), &[])?;
        self.output.flush()?;
        Ok(self.output)
    }

    fn entry(&mut self, name: &str, mode: u32, device: (u32, u32), content: &[u8]) -> io::Result<()> {
        let too_large = |_| io::Error::new(io::ErrorKind::FileTooLarge, format!("{name} is over 4 GiB"));
        let size = u32::try_from(content.len()).map_err(too_large)?;
        let name_size = u32::try_from(name.len() + 1).map_err(too_large)?;
        // Entries of one number and several links would be hard links: each gets its own.
        self.entries += 1;
        let (number, owner, group, links, time, checksum) = (self.entries, 0, 0, 1, 0, 0);
        let fields = [
            number, mode, owner, group, links, time, size, 0, 0, device.0, device.1, name_size, checksum,
        ];
        let mut header = b"070701".to_vec();
        for field in fields {
            write!(header, "{field:08x}")?;
        }
        header.extend_from_slice(name.as_bytes());
        header.push(0);
        self.padded(&header)?;
        self.padded(content)
    }

    fn padded(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.output.write_all(bytes)?;
        self.output
            .write_all(&[0; ALIGNMENT][..bytes.len().next_multiple_of(ALIGNMENT) - bytes.len()])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_its_header_its_name_and_its_content_padded() {
        let mut writer = Writer::new(Vec::new());
        writer.file("init", 0o755, b"hello").unwrap();
        let header = "070701\
            00000001000081ed00000000000000000000000100000000\
            00000005000000000000000000000000000000000000000500000000";
        let mut expected = header.as_bytes().to_vec();
        assert_eq!(expected.len(), 110, "the length that every header has");
        expected.extend_from_slice(b"init\0\0hello\0\0\0");
        assert_eq!(writer.output, expected);
    }

    #[test]
    fn every_kind_keeps_the_alignment_and_the_trailer_comes_last() {
        let mut writer = Writer::new(Vec::new());
        writer.folder("dev").unwrap();
        writer.device("dev/console", 5, 1).unwrap();
        writer.link("bin", "usr/bin").unwrap();
        let archive = writer.finish().unwrap();
        assert_eq!(archive.len() % ALIGNMENT, 0);
        let text = String::from_utf8_lossy(&archive);
        assert_eq!(text.matches("070701").count(), 4);
        assert!(text.contains("00002180"), "mode of a character device: {text}");
        assert!(
            text.contains("bin\0\0\0usr/bin\0"),
            "a link's content is its target: {text}"
        );
        assert!(text.trim_end_matches('\0').ends_with("TRAILER!!!"));
    }
}
