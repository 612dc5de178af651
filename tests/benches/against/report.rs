//! What came out, as Markdown: for people at the prompt, on a page of its own, and in the README.

use crate::beyond::Beyond;
use crate::figures::{Figure, Results};
use crate::peers::Peer;
use crate::statistics::Spread;
use anyhow::{Context, Result};

const BEGIN: &str = "<!-- benchmarks: begin -->\n";
const END: &str = "<!-- benchmarks: end -->\n";

/// Everything that there is to say.
pub(crate) struct Report<'a> {
    pub(crate) machine: &'a str,
    pub(crate) rounds: u8,
    pub(crate) seconds: f64,
    pub(crate) results: &'a Results,
    pub(crate) beyond: &'a Beyond,
}

impl Report<'_> {
    /// Both tables.
    pub(crate) fn tables(&self) -> String {
        format!("{}\n{}", self.against_peers(range), self.beyond_peers())
    }

    /// The page that a run in full writes.
    pub(crate) fn page(&self) -> String {
        format!(
            "# Measured\n\n\
             Written by `make bench`, on {machine}\n\n\
             In each of {rounds} rounds everybody is measured once, in another order each time, {seconds} s a \
             measurement after a warm-up. A cell is the median of the rounds, with the least and the most \
             behind it; the last column is how many times better ours are than C in the same round: above 1 \
             is better for us in every row. Each call is fib(30), so that it is the calls that are \
             measured. All servers bear the load of the C client, all clients call the C server with \
             prefetch 64, without a line printed for each request.\n\n\
             ![The table as bars](results.svg)\n\n\
             {against}\n\
             Beyond what the peers have (median, least and most, where it was measured in each round; \
             instructions in user space by valgrind's callgrind, calls one after the other):\n\n\
             {beyond}",
            machine = self.machine,
            rounds = self.rounds,
            seconds = self.seconds,
            against = self.against_peers(range),
            beyond = self.beyond_peers(),
        )
    }

    /// The README with what is between the marks replaced. It has the medians only; the plot shows the rest.
    pub(crate) fn fill_in(&self, readme: &str) -> Result<String> {
        let marks = "README.md has no marks of the benchmarks";
        let (before, rest) = readme.split_once(BEGIN).context(marks)?;
        let (_, after) = rest.split_once(END).context(marks)?;
        Ok(format!(
            "{before}{BEGIN}\n\
             ![The table as bars](tests/benches/results.svg)\n\n\
             {table}\n\
             Medians of {rounds} rounds; the last column is how many times better ours are than C in the same \
             round, with the least and the most. [All of it](tests/benches/results.md). Measured on {machine}\n\n\
             {END}{after}",
            table = self.against_peers(|spread| number(spread.median)),
            rounds = self.rounds,
            machine = self.machine,
        ))
    }

    /// The table, in its cells what `say` makes of them.
    fn against_peers(&self, say: fn(Spread) -> String) -> String {
        let mut header = vec![String::new()];
        header.extend(Peer::ALL.map(|peer| peer.name().to_owned()));
        header.push("ours to C".to_owned());
        let rows = Figure::ALL.map(|figure| {
            let of_peer = |peer| self.results.spread(figure, peer).map(say);
            let mut row = vec![Some(format!("{} ({})", figure.title(), figure.unit()))];
            row.extend(Peer::ALL.map(of_peer));
            row.push(self.results.ratio(figure).map(range));
            row.into_iter().map(|cell| cell.unwrap_or("–".into())).collect()
        });
        table(&header, &rows)
    }

    fn beyond_peers(&self) -> String {
        table(&["", "ours", ""].map(String::from), &self.beyond.rows())
    }
}

/// A table whose columns are aligned as text, too.
fn table(header: &[String], rows: &[Vec<String>]) -> String {
    let length = |text: &String| text.chars().count();
    let widths: Vec<usize> = (0..header.len())
        .map(|column| {
            let longest = rows.iter().map(|row| length(&row[column])).max().unwrap_or_default();
            longest.max(length(&header[column])).max(3)
        })
        .collect();
    let line = |cells: &[String]| -> String {
        let cells = cells.iter().zip(&widths).map(|(cell, width)| format!(" {cell:width$} |"));
        format!("|{}\n", cells.collect::<String>())
    };
    let rule: String = widths.iter().map(|width| format!(" {} |", "-".repeat(*width))).collect();
    let rows: String = rows.iter().map(|row| line(row)).collect();
    format!("{}|{rule}\n{rows}", line(header))
}

/// The median, with the least and the most behind it where there is more than one round.
pub(crate) fn range(spread: Spread) -> String {
    let Spread { median, least, most } = spread;
    if least.to_bits() == most.to_bits() {
        return number(median);
    }
    format!("{} ({}–{})", number(median), number(least), number(most))
}

/// A number with three digits or more, and with commas between thousands.
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
