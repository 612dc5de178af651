//! The server's counts: for the line of its log when it stops, and for its metrics.

use prometheus_client::metrics::{
    counter::Counter, family::Family, gauge::Gauge, histogram::Histogram,
};
use prometheus_client::registry::{Registry, Unit};
use rpc_common::message::ErrorCode;
use rpc_common::text::format_duration;
use std::time::{Duration, Instant};

/// Bounds of the histogram's buckets in seconds: from fib to a program at its time limit.
const BUCKETS: [f64; 12] = [
    0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 60.0, 300.0, 1500.0,
];

/// Counts what the server does. Each count is an atomic number.
pub(crate) struct Statistics {
    started: Instant,
    requests: Family<[(&'static str, String); 1], Counter>,
    /// The counters of `requests`, by outcome.
    outcomes: Vec<(String, Counter)>,
    /// `None` where nobody reads them: a histogram has a lock.
    durations: Option<Histogram>,
    pub(crate) in_flight: Gauge,
    pub(crate) connected: Gauge,
    pub(crate) reconnects: Counter,
    /// Number of runs of a program that were stopped at a limit; the metric `programs_killed`.
    pub(crate) runs_stopped: Counter,
}

impl Statistics {
    pub(crate) fn new(with_durations: bool) -> Self {
        let requests = Family::default();
        let counter = |outcome: &str| {
            (
                outcome.to_owned(),
                requests.get_or_create_owned(&[("outcome", outcome.into())]),
            )
        };
        let codes = ErrorCode::KNOWN.iter().map(ErrorCode::as_str);
        Statistics {
            started: Instant::now(),
            outcomes: ["ok", "rejected", "requeued"]
                .into_iter()
                .chain(codes)
                .map(counter)
                .collect(),
            requests,
            durations: with_durations.then(|| Histogram::new(BUCKETS)),
            in_flight: Gauge::default(),
            connected: Gauge::default(),
            reconnects: Counter::default(),
            runs_stopped: Counter::default(),
        }
    }

    /// The names of the counts. "Metrics" in rpc-server/README.md describes them.
    pub(crate) fn registry(&self) -> Registry {
        let mut registry = Registry::with_prefix("rpc_server");
        registry.register(
            "requests",
            "Requests by how they ended",
            self.requests.clone(),
        );
        if let Some(durations) = &self.durations {
            let help = "From taking a request to answering it";
            registry.register_with_unit("request_duration", help, Unit::Seconds, durations.clone());
        }
        registry.register(
            "requests_in_flight",
            "Requests that are being answered",
            self.in_flight.clone(),
        );
        registry.register(
            "connected",
            "Whether the server consumes, 1 or 0",
            self.connected.clone(),
        );
        registry.register(
            "reconnects",
            "Connections that were lost",
            self.reconnects.clone(),
        );
        registry.register(
            "programs_killed",
            "Programs that were stopped at a limit",
            self.runs_stopped.clone(),
        );
        registry
    }

    pub(crate) fn on_outcome(&self, outcome: &str, time: Duration) {
        self.in_flight.dec();
        if let Some((_, counter)) = self.outcomes.iter().find(|(counted, _)| counted == outcome) {
            counter.inc();
        }
        if let Some(durations) = &self.durations {
            durations.observe(time.as_secs_f64());
        }
    }

    /// The counts in one line.
    pub(crate) fn summary(&self) -> String {
        let count = |name: &str| {
            self.outcomes
                .iter()
                .find(|(outcome, _)| outcome == name)
                .map_or(0, |(_, count)| count.get())
        };
        let [served, expired, rejected] = ["ok", "expired", "rejected"].map(count);
        let failed = ErrorCode::KNOWN
            .iter()
            .map(|code| count(code.as_str()))
            .sum::<u64>()
            - expired;
        let uptime = format_duration(Duration::from_secs(self.started.elapsed().as_secs()));
        format!("{served} served, {failed} failed, {expired} expired, {rejected} rejected, up for {uptime}")
    }
}
