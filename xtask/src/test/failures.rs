//! What failed tests said, read from what test programs print at their end, to be said again below all layers: a run of
//! half an hour is judged by its last screen.

use std::collections::VecDeque;

/// Lines of one failure that are repeated: the first tell what was wrong, the last often which packet.
const HEAD: usize = 12;
const TAIL: usize = 6;
/// Characters of a line that are repeated.
const WIDTH: usize = 400;

/// One failed test.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Failure {
    name: String,
    head: Vec<String>,
    tail: VecDeque<String>,
    left_out: usize,
    /// Past the text: within the stack that it was made in.
    is_stack: bool,
}

impl Failure {
    fn new(name: String) -> Self {
        Self {
            name,
            head: Vec::new(),
            tail: VecDeque::new(),
            left_out: 0,
            is_stack: false,
        }
    }

    fn line(&mut self, line: &str) {
        // As anyhow writes it (RUST_BACKTRACE=1).
        self.is_stack |= line.trim() == "Stack backtrace:";
        if self.is_stack {
            return;
        }
        let line: String = line.trim_end().chars().take(WIDTH).collect();
        if self.head.len() < HEAD {
            self.head.push(line);
            return;
        }
        self.tail.push_back(line);
        if self.tail.len() > TAIL {
            self.tail.pop_front();
            self.left_out += 1;
        }
    }
}

/// The failures read so far.
#[derive(Clone, Debug, Default)]
pub(crate) struct Failures {
    all: Vec<Failure>,
    /// Within the part of the output that lists them.
    listing: bool,
    /// Within the text of one.
    open: bool,
}

impl Failures {
    /// Takes a line of a test program, without its end. Others than those of failures are passed over.
    pub(crate) fn line(&mut self, line: &str) {
        if line.starts_with("test result: ") {
            (self.listing, self.open) = (false, false);
        } else if line.trim_end() == "failures:" {
            // The second time, the names alone follow.
            (self.listing, self.open) = (true, false);
        } else if let Some(name) = header(line).filter(|_| self.listing) {
            self.all.push(Failure::new(name.to_owned()));
            self.open = true;
        } else if let Some(failure) = self.all.last_mut().filter(|_| self.open) {
            failure.line(line);
        }
    }

    /// Takes a failure that no test program told of, with what is known of it.
    pub(crate) fn add(&mut self, name: &str, text: &str) {
        let mut failure = Failure::new(name.to_owned());
        for line in text.lines() {
            failure.line(line);
        }
        self.all.push(failure);
        self.open = false;
    }

    /// Takes those of another run; `place` goes before their names.
    pub(crate) fn append(&mut self, place: &str, other: Self) {
        self.all.extend(other.all.into_iter().map(|failure| Failure {
            name: format!("{place}{}", failure.name),
            ..failure
        }));
    }

    /// What to say of them: the name of each, and below it the beginning and the end of its text.
    pub(crate) fn lines(&self) -> Vec<String> {
        let mut lines = Vec::new();
        for failure in &self.all {
            lines.push(format!("failed: {}", failure.name));
            let gap = (failure.left_out > 0).then(|| format!("({} lines left out)", failure.left_out));
            let text = failure.head.iter().chain(&gap).chain(&failure.tail);
            lines.extend(
                text.filter(|line| !line.is_empty())
                    .map(|line| format!("    {line}")),
            );
        }
        lines
    }
}

/// The name in `---- name ----` (libtest-mimic) or `---- name stdout ----` (libtest).
fn header(line: &str) -> Option<&str> {
    let name = line.trim_end().strip_prefix("---- ")?.strip_suffix(" ----")?;
    Some(name.strip_suffix(" stdout").unwrap_or(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Failures {
        let mut failures = Failures::default();
        for line in text.lines() {
            failures.line(line);
        }
        failures
    }

    const TWO: &str = "test a ... FAILED\ntest b ... ok\n\nfailures:\n\n---- a ----\n20, but 21 traces\n\nStack backtrace:\n   0: main\n\n---- c stdout ----\n\
        thread 'c' panicked\n\nfailures:\n    a\n    c\n\ntest result: FAILED. 1 passed; 2 failed; 0 ignored\nmore noise\n";

    #[test]
    fn texts_of_both_harnesses_are_kept() {
        assert_eq!(
            read(TWO).lines(),
            [
                "failed: a",
                "    20, but 21 traces",
                "failed: c",
                "    thread 'c' panicked"
            ]
        );
    }

    #[test]
    fn what_passed_tests_print_is_not() {
        let text =
            "failures are made here\n---- not one ----\ntest a ... ok\ntest result: ok. 1 passed; 0 failed\n";
        assert!(read(text).lines().is_empty());
    }

    #[test]
    fn a_long_text_keeps_its_ends() {
        let body: Vec<String> = (0..100).map(|line| format!("line {line}")).collect();
        let text = format!(
            "failures:\n---- a ----\n{}\ntest result: FAILED. 0 passed",
            body.join("\n")
        );
        let lines = read(&text).lines();
        assert_eq!(lines.len(), 1 + HEAD + 1 + TAIL);
        assert_eq!(lines[HEAD + 1], "    (82 lines left out)");
        assert_eq!(lines.last().unwrap(), "    line 99");
    }

    #[test]
    fn those_of_a_guest_name_its_kernel() {
        let mut all = Failures::default();
        all.append("kernel 6.1: ", read(TWO));
        all.add("fuzz::record", "exit status: 77");
        let names: Vec<String> = all
            .lines()
            .into_iter()
            .filter(|line| line.starts_with("failed"))
            .collect();
        assert_eq!(
            names,
            [
                "failed: kernel 6.1: a",
                "failed: kernel 6.1: c",
                "failed: fuzz::record"
            ]
        );
    }
}
