//! The server's counts: for the line of its log when it stops, and for its metrics.

use prometheus_client::metrics::{
    counter::Counter, family::Family, gauge::Gauge, histogram::Histogram,
};
use prometheus_client::registry::{Registry, Unit};
use rpc_common::message::ErrorCode;
use rpc_common::sync::lock;
use rpc_common::text::format_duration;
use rpc_server::StartReason;
use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock};
use std::thread::{self, ThreadId};
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
    pub(crate) consumers: Consumers,
    /// Whether the server has a connection on which a worker has consumed.
    has_connection: AtomicBool,
    reconnects: Counter,
    stopping_since: OnceLock<Instant>,
    /// The last instant at which the server's loop was alive.
    alive: Mutex<Instant>,
    /// Number of runs of a program that were stopped at a limit; the metric `programs_killed`.
    pub(crate) runs_stopped: Counter,
    /// Number of processes of a persistent program that were started, by reason.
    program_starts: Family<[(&'static str, &'static str); 1], Counter>,
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
            consumers: Consumers::default(),
            has_connection: AtomicBool::new(false),
            reconnects: Counter::default(),
            stopping_since: OnceLock::new(),
            alive: Mutex::new(Instant::now()),
            runs_stopped: Counter::default(),
            program_starts: Family::default(),
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
            "Whether at least one worker consumes, 1 or 0",
            self.consumers.connected.clone(),
        );
        registry.register(
            "consuming_workers",
            "Workers that consume",
            self.consumers.count.clone(),
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
        registry.register(
            "program_starts",
            "Processes of a persistent program that were started, by reason",
            self.program_starts.clone(),
        );
        registry
    }

    /// A worker consumes on a new connection.
    pub(crate) fn on_connected(&self) {
        self.has_connection.store(true, Ordering::Relaxed);
    }

    /// The server has no connection.
    pub(crate) fn on_disconnected(&self) {
        self.consumers.on_disconnected();
        if self.has_connection.swap(false, Ordering::Relaxed) {
            self.reconnects.inc();
        }
    }

    /// It is time to stop.
    pub(crate) fn on_stopping(&self, now: Instant) {
        let _ = self.stopping_since.set(now); // the first counts
    }

    /// The instant at which it became time to stop.
    pub(crate) fn stopping_since(&self) -> Option<Instant> {
        self.stopping_since.get().copied()
    }

    /// The server's loop is alive.
    pub(crate) fn on_alive(&self, now: Instant) {
        *lock(&self.alive) = now;
    }

    /// Whether the server's loop was alive less than this time ago.
    pub(crate) fn was_alive(&self, limit: Duration, now: Instant) -> bool {
        now.saturating_duration_since(*lock(&self.alive)) < limit
    }

    /// A process of a persistent program is started.
    pub(crate) fn on_program_start(&self, reason: StartReason) {
        let labels = [("reason", reason.as_str())];
        self.program_starts.get_or_create_owned(&labels).inc();
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

/// The workers that consume, by their threads.
///
/// A number would not do: a worker that answers a request when its connection ends reports the end
/// of its consumer later, perhaps when others consume on the next connection.
#[derive(Default)]
pub(crate) struct Consumers {
    threads: Mutex<HashSet<ThreadId>>,
    count: Gauge,
    connected: Gauge,
}

impl Consumers {
    /// The worker of this thread begins to consume.
    pub(crate) fn on_started(&self) {
        let worker = thread::current().id();
        self.update(|threads| {
            threads.insert(worker);
        });
    }

    /// The worker of this thread no longer consumes.
    pub(crate) fn on_ended(&self) {
        let worker = thread::current().id();
        self.update(|threads| {
            threads.remove(&worker);
        });
    }

    /// No worker consumes: the connection has ended.
    fn on_disconnected(&self) {
        self.update(HashSet::clear);
    }

    /// Whether at least one worker consumes.
    pub(crate) fn is_any(&self) -> bool {
        !lock(&self.threads).is_empty()
    }

    fn update(&self, change: impl FnOnce(&mut HashSet<ThreadId>)) {
        let mut threads = lock(&self.threads);
        change(&mut threads);
        // There are 1,024 workers at most.
        self.count
            .set(i64::try_from(threads.len()).unwrap_or(i64::MAX));
        self.connected.set((!threads.is_empty()).into());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_of_an_earlier_connection_does_not_count() {
        let consumers = Consumers::default();
        let numbers = || (consumers.count.get(), consumers.connected.get());
        consumers.on_started();
        thread::scope(|scope| {
            scope.spawn(|| consumers.on_started());
        });
        assert_eq!(numbers(), (2, 1));
        consumers.on_disconnected();
        assert_eq!(numbers(), (0, 0));
        thread::scope(|scope| {
            scope.spawn(|| consumers.on_started()); // on the next connection
        });
        consumers.on_ended(); // on the earlier connection
        assert_eq!(numbers(), (1, 1));
    }

    #[test]
    fn a_connection_that_is_lost_counts_once() {
        let statistics = Statistics::new(true);
        statistics.on_disconnected(); // there was none
        statistics.on_connected();
        statistics.on_disconnected();
        statistics.on_disconnected();
        assert_eq!(statistics.reconnects.get(), 1);
    }

    #[test]
    fn the_loop_is_alive_until_a_limit_after_its_last_report() {
        let statistics = Statistics::new(true);
        let limit = Duration::from_secs(60);
        let now = Instant::now();
        statistics.on_alive(now);
        assert!(statistics.was_alive(limit, now + Duration::from_secs(59)));
        assert!(!statistics.was_alive(limit, now + limit));
    }
}
