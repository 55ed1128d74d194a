//! Two outputs in traceroute's grammar: their paths, and both side by side.

use anyhow::Result;
use calitrace_tests::traffic::traceroute::{Traceroute, parse};

/// The address of each line, `*` where there is none.
pub(super) fn path(printed: &str) -> Result<Vec<String>> {
    let hops = parse(printed.split("\n\n").next().unwrap_or_default())?;
    Ok(Traceroute {
        hops,
        raw: printed.to_owned(),
    }
    .path())
}

/// Two texts in columns, each under its title.
pub(super) fn side_by_side(titles: [&str; 2], texts: [&str; 2]) -> Vec<String> {
    let [left, right] = texts.map(|text| text.trim_end().lines().collect::<Vec<_>>());
    let width = left
        .iter()
        .map(|line| line.chars().count())
        .chain([titles[0].chars().count()])
        .max()
        .unwrap_or(0);
    let row = |left: &str, right: &str| format!("{left:<width$}  │  {right}").trim_end().to_owned();
    let mut lines = vec![
        row(titles[0], titles[1]),
        format!("{}┼{}", "─".repeat(width + 2), "─".repeat(width + 2)),
    ];
    lines.extend((0..left.len().max(right.len())).map(|index| {
        row(
            left.get(index).copied().unwrap_or_default(),
            right.get(index).copied().unwrap_or_default(),
        )
    }));
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let lines = side_by_side(["a", "b"], ["one\nthree\n", "two\n"]);
        assert_eq!(
            lines,
            ["a      │  b", "───────┼───────", "one    │  two", "three  │"]
        );
    }

    #[test]
    fn the_path_of_a_block() {
        let block = "traceroute to 10.0.0.3 (10.0.0.3), 3 hops max, 60 byte packets\n \
                     1  10.0.0.1 (10.0.0.1)  0.017 ms  0.007 ms  0.005 ms\n 2  * * *\n";
        assert_eq!(path(block).unwrap(), ["10.0.0.1", "*"]);
    }
}
