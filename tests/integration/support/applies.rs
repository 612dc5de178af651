//! Which tests apply to the broker that they run on.

use super::broker;
use super::peer::{permits_transient_queues, Peer};
use std::io::{self, Write};
use std::sync::OnceLock;
use std::thread;

/// The version of RabbitMQ at the broker of the tests: major and minor.
pub(crate) fn version() -> (u32, u32) {
    static VERSION: OnceLock<(u32, u32)> = OnceLock::new();
    *VERSION.get_or_init(|| version_at(broker::url()))
}

/// The same of another broker.
pub(crate) fn version_at(url: &str) -> (u32, u32) {
    let version = Peer::connect_to(url).broker_version();
    let mut numbers = version.split('.').map(|number| number.parse().ok());
    let mut number = || numbers.next().flatten().expect("it begins with two numbers");
    (number(), number())
}

/// Says that a part of this test, or with an empty one the whole test, does not apply to the broker, and why.
pub(crate) fn does_not_apply(part: &str, reason: &str) {
    let (major, minor) = version();
    let test = thread::current();
    let test = test.name().unwrap_or_default();
    let part = if part.is_empty() { String::new() } else { format!(" ({part})") };
    let line = format!("does not apply to RabbitMQ {major}.{minor}: {test}{part}: {reason}\n");
    // To the handle: what the macros print is shown of failed tests only.
    let _ = io::stderr().write_all(line.as_bytes());
}

/// The types of queue that the broker permits; says of the others that these parts of the test do not apply.
pub(crate) fn queue_types() -> Vec<&'static str> {
    let permits_transient = permits_transient_queues(broker::url());
    if !permits_transient {
        does_not_apply("a transient queue", "the broker does not permit transient queues");
    }
    let types = ["transient", "classic", "quorum"];
    types.into_iter().filter(|&name| name != "transient" || permits_transient).collect()
}
