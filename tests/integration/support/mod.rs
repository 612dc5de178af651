//! What the tests use: a broker, the programs, a proxy, and peers that speak plain AMQP.

pub(crate) mod broker;
pub(crate) mod broker_features;
pub(crate) mod certificates;
pub(crate) mod peer;
pub(crate) mod programs;
pub(crate) mod proxy;
pub(crate) mod raw_peer;
pub(crate) mod scripted_broker;

use std::thread;
use std::time::{Duration, Instant};

/// The limit of every wait for something that is expected to happen. Only a failing test reaches
/// it.
pub(crate) const TEST_TIMEOUT: Duration = Duration::from_secs(60);

/// Calls `poll` until it returns a value, and fails after [`TEST_TIMEOUT`].
#[track_caller]
pub(crate) fn eventually<T>(what: &str, mut poll: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(value) = poll() {
            return value;
        }
        assert!(
            start.elapsed() < TEST_TIMEOUT,
            "timed out after {TEST_TIMEOUT:?}: {what}"
        );
        thread::sleep(Duration::from_millis(5));
    }
}
