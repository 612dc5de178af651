//! What the broker of the tests supports: some tests, or parts of them, do not apply to every
//! RabbitMQ.

use super::broker;
use super::peer::{permits_transient_queues, Peer};
use std::io::{self, Write};
use std::sync::OnceLock;
use std::thread;

/// The RabbitMQ version of the tests' broker: major and minor.
pub(crate) fn broker_version() -> (u32, u32) {
    static VERSION: OnceLock<(u32, u32)> = OnceLock::new();
    *VERSION.get_or_init(|| broker_version_at(broker::url()))
}

/// The RabbitMQ version of another broker: major and minor.
pub(crate) fn broker_version_at(url: &str) -> (u32, u32) {
    let version = Peer::connect_to(url).broker_version();
    let mut numbers = version.split('.').map(|number| number.parse().ok());
    let mut number = || {
        numbers
            .next()
            .flatten()
            .expect("it begins with two numbers")
    };
    (number(), number())
}

/// Reports that the current test, or the named part of it, does not apply to this broker. An empty
/// `part` means the whole test. `tests/test-brokers.sh` collects these lines.
pub(crate) fn report_not_applicable(part: &str, reason: &str) {
    let (major, minor) = broker_version();
    let test = thread::current();
    let test = test.name().unwrap_or_default();
    let part = if part.is_empty() {
        String::new()
    } else {
        format!(" ({part})")
    };
    let line = format!("does not apply to RabbitMQ {major}.{minor}: {test}{part}: {reason}\n");
    // Not eprintln!: the test runner shows its output for failed tests only.
    let _ = io::stderr().write_all(line.as_bytes());
}

/// The queue types that the broker permits. Reports the others as not applicable.
pub(crate) fn permitted_queue_types() -> Vec<&'static str> {
    let permits_transient = permits_transient_queues(broker::url());
    if !permits_transient {
        report_not_applicable(
            "a transient queue",
            "the broker does not permit transient queues",
        );
    }
    let types = ["transient", "classic", "quorum"];
    types
        .into_iter()
        .filter(|&name| name != "transient" || permits_transient)
        .collect()
}
