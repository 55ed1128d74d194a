//! A buffered writer that names itself in its errors.

use std::{
    fmt,
    fs::File,
    io::{self, BufWriter, Write},
    path::Path,
};

/// Enough for a few hundred packet traces between two flushes.
const BUFFER: usize = 256 << 10;

/// Where a sink writes to.
pub struct Output {
    writer: BufWriter<Box<dyn Write + Send>>,
    name: String,
}

impl Output {
    /// Standard output.
    #[must_use]
    pub fn stdout() -> Self {
        Self::new(Box::new(io::stdout()), "standard output".into())
    }

    /// A new file; what was in it is gone.
    pub fn create(path: &Path) -> io::Result<Self> {
        let name = path.display().to_string();
        let file = File::create(path).map_err(|error| named(&error, "create", &name))?;
        Ok(Self::new(Box::new(file), name))
    }

    /// Any writer, called `name` in errors.
    #[must_use]
    pub fn new(writer: Box<dyn Write + Send>, name: String) -> Self {
        Self {
            writer: BufWriter::with_capacity(BUFFER, writer),
            name,
        }
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.writer
            .write(bytes)
            .map_err(|error| named(&error, "write to", &self.name))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.writer
            .flush()
            .map_err(|error| named(&error, "write to", &self.name))
    }
}

/// The same error, told with what was tried; its kind stays.
fn named(error: &io::Error, operation: &str, name: &str) -> io::Error {
    io::Error::new(error.kind(), format!("{operation} {name}: {error}"))
}

impl fmt::Debug for Output {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Output")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}
