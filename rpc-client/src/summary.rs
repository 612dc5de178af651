//! The summary of a batch: how many calls, how they ended, and how long they took.

use crate::cli::SummaryFormat;
use crate::error::Error;
use crate::output::{millis, Line};
use hdrhistogram::Histogram;
use rpc_client::Error as CallError;
use rpc_common::exit::print_message;
use rpc_common::message::{ErrorCode, Failure};
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt::{self, Display};
use std::io::{self, Write};
use std::time::{Duration, Instant};

/// The latencies that the histogram distinguishes, in microseconds, and its precision in decimal digits.
const MAX_LATENCY: u64 = 366 * 24 * 60 * 60 * 1_000_000;
const PRECISION: u8 = 3;

/// Counts the lines of output.
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

    /// Counts a line, and the latency if it has an answer.
    pub(crate) fn count(&mut self, line: &Line) {
        self.calls += 1;
        match (&line.result, line.latency) {
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
        match self.format {
            SummaryFormat::Text => print_message("rpc-client", &figures),
            SummaryFormat::Json => {
                let json = serde_json::to_string(&figures).expect("figures are plain JSON");
                let _ = writeln!(io::stderr(), "{json}"); // if it cannot be written, the exit code is left
            }
        }
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

/// A server may use any number of codes of its own: they count as one, so that the summary stays small.
fn summary_code(error: &Error) -> &str {
    match error {
        Error::Call(CallError::Failed(Failure { code: ErrorCode::Other(_), .. })) => "other",
        error => error.code(),
    }
}

/// The figures of a summary, and its fields in JSON.
#[derive(Serialize)]
struct Figures<'a> {
    /// The calls that ended, and the bad lines of input.
    calls: u64,
    /// How many of them ended with each error code.
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

impl Display for Figures<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Figures { calls, errors, seconds, calls_per_second, latency_ms } = self;
        let s = if *calls == 1 { "" } else { "s" };
        write!(f, "{calls} call{s} in {seconds:.3} s, {calls_per_second:.0} calls/s")?;
        if let Some(Latency { min, p50, p90, p99, p99_9, max }) = latency_ms {
            write!(f, "; latency in ms: min {min:.2}, p50 {p50:.2}, p90 {p90:.2}")?;
            write!(f, ", p99 {p99:.2}, p99.9 {p99_9:.2}, max {max:.2}")?;
        }
        let errors: Vec<_> = errors.iter().map(|(code, count)| format!("{count} {code}")).collect();
        let errors = if errors.is_empty() { "none".into() } else { errors.join(", ") };
        write!(f, "; errors: {errors}")
    }
}
