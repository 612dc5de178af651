//! The summary of a batch: how many calls, how they ended, and how long they took.

use crate::client::Error;
use crate::output::{millis, Line};
use hdrhistogram::Histogram;
use rpc_common::message::{ErrorCode, Failure};
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt::{self, Display};
use std::time::{Duration, Instant};

/// A **summary** counts the lines of output as they are made.
pub(crate) struct Summary {
    begun: Instant,
    calls: u64,
    errors: BTreeMap<String, u64>,
    /// In microseconds.
    latencies: Histogram<u64>,
}

/// The longest latency that is told apart, and the precision, in decimal digits.
const LONGEST: Duration = Duration::from_secs(366 * 24 * 60 * 60);
const PRECISION: u8 = 3;

impl Summary {
    pub(crate) fn new() -> Self {
        let longest = u64::try_from(LONGEST.as_micros()).unwrap_or(u64::MAX);
        let latencies = Histogram::new_with_bounds(1, longest, PRECISION);
        Summary {
            begun: Instant::now(),
            calls: 0,
            errors: BTreeMap::new(),
            latencies: latencies.expect("the bounds are in order"),
        }
    }

    /// Counts a line. Latencies are those of answered calls.
    pub(crate) fn count(&mut self, line: &Line) {
        self.calls += 1;
        match (&line.result, line.latency) {
            (Ok(_), Some(latency)) => {
                let micros = u64::try_from(latency.as_micros()).unwrap_or(u64::MAX);
                self.latencies.saturating_record(micros);
            }
            (Ok(_), None) => {}
            (Err(error), _) => {
                let code = match error {
                    // Somebody else's words are neither printed as they are, nor kept in any number.
                    Error::Remote(Failure { code: ErrorCode::Other(_), .. }) => "other",
                    error => error.code(),
                };
                *self.errors.entry(code.to_owned()).or_default() += 1;
            }
        }
    }

    /// What there is to tell by now.
    pub(crate) fn figures(&self) -> Figures<'_> {
        let seconds = millis(self.begun.elapsed()) / 1_000.0;
        #[allow(clippy::cast_precision_loss)] // 2^53 calls would take thousands of years
        let calls = self.calls as f64;
        let millis = |micros| millis(Duration::from_micros(micros));
        let quantile = |q| millis(self.latencies.value_at_quantile(q));
        let latency_ms = (!self.latencies.is_empty()).then(|| Latency {
            min: millis(self.latencies.min()),
            p50: quantile(0.5),
            p90: quantile(0.9),
            p99: quantile(0.99),
            p99_9: quantile(0.999),
            max: millis(self.latencies.max()),
        });
        let errors = &self.errors;
        Figures {
            calls: self.calls,
            errors,
            seconds,
            calls_per_second: (calls / seconds).round(),
            latency_ms,
        }
    }
}

/// The figures of a summary; as JSON, its fields are these.
#[derive(Serialize)]
pub(crate) struct Figures<'a> {
    /// How many calls were asked for and ended, and lines of input that were wrong.
    calls: u64,
    /// How many of them ended with each error code.
    errors: &'a BTreeMap<String, u64>,
    /// From the start to the end of the batch.
    seconds: f64,
    calls_per_second: f64,
    /// Of answered calls, from the first publish to the answer; null if there is none.
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
        write!(
            f,
            "{} call{} in {:.3} s, {:.0} calls/s",
            self.calls,
            if self.calls == 1 { "" } else { "s" },
            self.seconds,
            self.calls_per_second
        )?;
        if let Some(latency) = &self.latency_ms {
            let Latency { min, p50, p90, p99, p99_9, max } = latency;
            write!(
                f,
                "; latency in ms: min {min:.2}, p50 {p50:.2}, p90 {p90:.2}, p99 {p99:.2}, \
                 p99.9 {p99_9:.2}, max {max:.2}"
            )?;
        }
        f.write_str("; errors: ")?;
        if self.errors.is_empty() {
            return f.write_str("none");
        }
        for (place, (code, count)) in self.errors.iter().enumerate() {
            write!(f, "{}{count} {code}", if place == 0 { "" } else { ", " })?;
        }
        Ok(())
    }
}
