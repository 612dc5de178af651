//! The summary of a batch: how many calls, how they ended, and how long they took.

use crate::cli::SummaryFormat;
use crate::error::Error;
use crate::output::{millis, Record};
use hdrhistogram::Histogram;
use rpc_client::Error as CallError;
use rpc_common::message::{ErrorCode, Failure};
use rpc_common::stdio;
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt::{self, Display, Write as _};
use std::io::{self, Write};
use std::time::{Duration, Instant};
use terminal_size::{terminal_size_of, Width};

/// Maximum latency of the histogram, in microseconds.
const MAX_LATENCY: u64 = 366 * 24 * 60 * 60 * 1_000_000;

/// Precision of the histogram, in decimal digits.
const PRECISION: u8 = 3;

/// Number of rows of the histogram: one beside each percentile.
const ROWS: i32 = 6;

/// Width of a row without its bar, in columns.
const WIDTH_WITHOUT_BAR: usize = 43;

/// Minimum width of a terminal for the histogram, in columns.
const MIN_WIDTH: u16 = 60;

/// Maximum length of a bar, in columns.
const MAX_BAR: usize = 50;

/// Counts the records of output.
pub(crate) struct Summary {
    format: SummaryFormat,
    begun: Instant,
    calls: u64,
    errors: BTreeMap<String, u64>,
    /// In microseconds. It takes 0.3 MB.
    latencies: Histogram<u64>,
}

impl Summary {
    pub(crate) fn new(format: SummaryFormat) -> Self {
        let latencies = Histogram::new_with_bounds(1, MAX_LATENCY, PRECISION);
        Summary {
            format,
            begun: Instant::now(),
            calls: 0,
            errors: BTreeMap::new(),
            latencies: latencies.expect("the bounds are in order"),
        }
    }

    /// Counts a record, and the latency if it has an answer.
    pub(crate) fn count(&mut self, record: &Record) {
        self.calls += 1;
        match (&record.result, record.latency) {
            (Ok(_), Some(latency)) => {
                let micros = u64::try_from(latency.as_micros()).unwrap_or(u64::MAX);
                self.latencies.saturating_record(micros);
            }
            (Ok(_), None) => {}
            (Err(error), _) => *self.errors.entry(summary_code(error).into()).or_default() += 1,
        }
    }

    /// Prints the figures on standard error.
    pub(crate) fn print(&self) {
        let figures = self.figures();
        let text = match self.format {
            SummaryFormat::Text => match terminal_size_of(io::stderr()) {
                Some((Width(width @ MIN_WIDTH..), _)) => self.histogram(&figures, width.into()),
                _ => format!("rpc-client: {figures}\n"),
            },
            SummaryFormat::Json => {
                serde_json::to_string(&figures).expect("figures are plain JSON") + "\n"
            }
        };
        // If this fails, the exit code is left.
        let _ = stdio::stderr().write_all(text.as_bytes());
    }

    /// The latencies as a histogram, with the percentiles beside it.
    fn histogram(&self, figures: &Figures, width: usize) -> String {
        let Some(latency) = &figures.latency_ms else {
            return format!("rpc-client: {figures}\n");
        };
        let bar_width = width.saturating_sub(WIDTH_WITHOUT_BAR).clamp(1, MAX_BAR);
        let bounds = self.bounds();
        let mut counts = vec![0; bounds.len()];
        for value in self.latencies.iter_recorded() {
            let row = bounds
                .partition_point(|bound| *bound <= value.value_iterated_to())
                .saturating_sub(1);
            counts[row] += value.count_at_value();
        }
        let most = counts.iter().copied().max().unwrap_or(1).max(1);
        let mut text = format!("rpc-client: {}\n", figures.totals());
        for ((from, count), (name, value)) in bounds.into_iter().zip(counts).zip(latency.named()) {
            let bar =
                "▇".repeat(usize::try_from(count * bar_width as u64 / most).unwrap_or(bar_width));
            let from = millis(Duration::from_micros(from));
            let _ = writeln!(
                text,
                "{from:>9.2} ms {bar:<bar_width$} {count:>8}  {name:>5} {value:>9.2} ms"
            );
        }
        text
    }

    /// Where the histogram's rows begin, in microseconds, from the least latency on: each is the
    /// same multiple of the one before.
    #[allow(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss
    )] // up to a year
    fn bounds(&self) -> Vec<u64> {
        let min = self.latencies.min().max(1);
        let max = self.latencies.max();
        let factor = root_of_rows(max as f64 / min as f64);
        (0..ROWS)
            .map(|row| (min as f64 * factor.powi(row)) as u64)
            .collect()
    }

    fn figures(&self) -> Figures<'_> {
        let seconds = millis(self.begun.elapsed()) / 1_000.0;
        #[allow(clippy::cast_precision_loss)] // 2^53 calls would take thousands of years
        let calls = self.calls as f64;
        let millis = |micros| millis(Duration::from_micros(micros));
        let quantile = |q| millis(self.latencies.value_at_quantile(q));
        Figures {
            calls: self.calls,
            errors: &self.errors,
            seconds,
            calls_per_second: (calls / seconds).round(),
            latency_ms: (!self.latencies.is_empty()).then(|| Latency {
                min: millis(self.latencies.min()),
                p50: quantile(0.5),
                p90: quantile(0.9),
                p99: quantile(0.99),
                p99_9: quantile(0.999),
                max: millis(self.latencies.max()),
            }),
        }
    }
}

/// The ROWS-th root of `x`, `x >= 1`, by bisection: `powf` would load libm, 0.5 MB in every call.
fn root_of_rows(x: f64) -> f64 {
    let mut low = 1.0;
    let mut high = x;
    for _ in 0..64 {
        let middle = f64::midpoint(low, high);
        if middle.powi(ROWS) < x {
            low = middle;
        } else {
            high = middle;
        }
    }
    high
}

/// A server may use any number of codes of its own: they count as one, so that the summary stays
/// small.
fn summary_code(error: &Error) -> &str {
    match error {
        Error::Call(CallError::Failed(Failure {
            code: ErrorCode::Other(_),
            ..
        })) => "other",
        error => error.code(),
    }
}

/// The figures of a summary, and its fields in JSON.
#[derive(Serialize)]
struct Figures<'a> {
    /// The calls that ended, and the bad lines of input.
    calls: u64,
    /// Number of calls that ended with each error code.
    errors: &'a BTreeMap<String, u64>,
    /// From the start to the end of the batch.
    seconds: f64,
    calls_per_second: f64,
    /// Of answered calls, from the first publish to the answer; null without any.
    latency_ms: Option<Latency>,
}

#[derive(Serialize)]
struct Latency {
    min: f64,
    p50: f64,
    p90: f64,
    p99: f64,
    #[serde(rename = "p99.9")]
    p99_9: f64,
    max: f64,
}

impl Latency {
    fn named(&self) -> [(&'static str, f64); ROWS as usize] {
        let Latency {
            min,
            p50,
            p90,
            p99,
            p99_9,
            max,
        } = *self;
        [
            ("min", min),
            ("p50", p50),
            ("p90", p90),
            ("p99", p99),
            ("p99.9", p99_9),
            ("max", max),
        ]
    }
}

impl Figures<'_> {
    /// All but the latencies.
    fn totals(&self) -> String {
        let Figures {
            calls,
            errors,
            seconds,
            calls_per_second,
            ..
        } = self;
        let s = if *calls == 1 { "" } else { "s" };
        let errors: Vec<_> = errors
            .iter()
            .map(|(code, count)| format!("{count} {code}"))
            .collect();
        let errors = if errors.is_empty() {
            "none".into()
        } else {
            errors.join(", ")
        };
        format!(
            "{calls} call{s} in {seconds:.3} s, {calls_per_second:.0} calls/s; errors: {errors}"
        )
    }
}

impl Display for Figures<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.totals())?;
        let Some(latency) = &self.latency_ms else {
            return Ok(());
        };
        let latencies = latency
            .named()
            .map(|(name, value)| format!("{name} {value:.2}"));
        write!(f, "; latency in ms: {}", latencies.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_root_of_the_rows_is_found() {
        for root in [1.0, 1.001, 2.0, 30.0] {
            assert!(
                (root_of_rows(f64::powi(root, ROWS)) / root - 1.0).abs() < 1e-9,
                "{root}"
            );
        }
    }
}
