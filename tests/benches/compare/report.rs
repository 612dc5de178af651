//! The results as Markdown: for the terminal, for `results.md`, and for the README.

use crate::metrics::{Metric, Results};
use crate::own_metrics::OwnMetrics;
use crate::peers::Peer;
use crate::statistics::Spread;
use anyhow::{Context, Result};

const BEGIN: &str = "<!-- benchmarks: begin -->\n";
const END: &str = "<!-- benchmarks: end -->\n";

/// Everything that a report shows.
pub(crate) struct Report<'a> {
    pub(crate) machine: &'a str,
    pub(crate) rounds: u8,
    pub(crate) seconds: f64,
    pub(crate) results: &'a Results,
    pub(crate) own_metrics: &'a OwnMetrics,
}

impl Report<'_> {
    /// Both tables.
    pub(crate) fn tables(&self) -> String {
        format!("{}\n{}", self.peer_table(range), self.own_table())
    }

    /// The text of `results.md`.
    pub(crate) fn page(&self) -> String {
        format!(
            "# Benchmark results\n\n\
             Written by `make bench` at {machine}\n\n\
             Each of {rounds} rounds measures every peer once, in another order, for {seconds} s after a warm-up. A \
             cell is the median of the rounds, with minimum and maximum in parentheses. The last column is how \
             many times better ours is than C in the same round: above 1 ours is better. Each call is fib(30), \
             which takes no time, so the calls themselves are measured. All servers are called by the C \
             client, and all clients call the C server with prefetch 64. The servers print no line per \
             request.\n\n\
             ![The table as a bar chart](results.svg)\n\n\
             {peers}\n\
             Metrics of ours only (median, and minimum and maximum if every round measured it; instructions in \
             user space by valgrind's callgrind, one call at a time):\n\n\
             {own}",
            machine = self.machine,
            rounds = self.rounds,
            seconds = self.seconds,
            peers = self.peer_table(range),
            own = self.own_table(),
        )
    }

    /// The README with the part between the markers replaced. That part has the medians only; the
    /// plot has the ranges.
    pub(crate) fn fill_in(&self, readme: &str) -> Result<String> {
        let missing = "README.md has no benchmark markers";
        let (before, rest) = readme.split_once(BEGIN).context(missing)?;
        let (_, after) = rest.split_once(END).context(missing)?;
        Ok(format!(
            "{before}{BEGIN}\n\
             ![The table as a bar chart](tests/benches/results.svg)\n\n\
             {table}\n\
             Medians of {rounds} rounds. The last column is how many times better ours is than C in the same round, \
             with minimum and maximum. [All results](tests/benches/results.md), measured at {machine}\n\n\
             {END}{after}",
            table = self.peer_table(|spread| number(spread.median)),
            rounds = self.rounds,
            machine = self.machine,
        ))
    }

    /// The table of all peers; `format` makes the text of a cell.
    fn peer_table(&self, format: fn(Spread) -> String) -> String {
        let mut header = vec![String::new()];
        header.extend(Peer::ALL.map(|peer| peer.name().to_owned()));
        header.push("ours vs C".to_owned());
        let rows = Metric::ALL.map(|metric| {
            let of_peer = |peer| self.results.spread(metric, peer).map(format);
            let mut row = vec![Some(format!("{} ({})", metric.title(), metric.unit()))];
            row.extend(Peer::ALL.map(of_peer));
            row.push(self.results.ratio(metric).map(range));
            row.into_iter()
                .map(|cell| cell.unwrap_or("–".into()))
                .collect()
        });
        table(&header, &rows)
    }

    fn own_table(&self) -> String {
        table(
            &["", "ours", ""].map(String::from),
            &self.own_metrics.rows(),
        )
    }
}

/// A Markdown table whose columns are aligned in the source, too.
fn table(header: &[String], rows: &[Vec<String>]) -> String {
    let length = |text: &String| text.chars().count();
    let widths: Vec<usize> = (0..header.len())
        .map(|column| {
            let longest = rows
                .iter()
                .map(|row| length(&row[column]))
                .max()
                .unwrap_or_default();
            longest.max(length(&header[column])).max(3)
        })
        .collect();
    let line = |cells: &[String]| -> String {
        let cells = cells
            .iter()
            .zip(&widths)
            .map(|(cell, width)| format!(" {cell:width$} |"));
        format!("|{}\n", cells.collect::<String>())
    };
    let rule: String = widths
        .iter()
        .map(|width| format!(" {} |", "-".repeat(*width)))
        .collect();
    let rows: String = rows.iter().map(|row| line(row)).collect();
    format!("{}|{rule}\n{rows}", line(header))
}

/// The median, with minimum and maximum in parentheses if they differ.
pub(crate) fn range(spread: Spread) -> String {
    let Spread { median, min, max } = spread;
    if min.to_bits() == max.to_bits() {
        return number(median);
    }
    format!("{} ({}–{})", number(median), number(min), number(max))
}

/// A number with at least three digits, and with commas between thousands.
pub(crate) fn number(number: f64) -> String {
    let decimals = match number.abs() {
        size if size < 10.0 => 2,
        size if size < 100.0 => 1,
        _ => 0,
    };
    let text = format!("{number:.decimals$}");
    let whole = text.split('.').next().map_or(0, str::len);
    let mut grouped = String::new();
    for (place, char) in text.chars().enumerate() {
        if place > 0 && place < whole && (whole - place) % 3 == 0 {
            grouped.push(',');
        }
        grouped.push(char);
    }
    grouped
}
