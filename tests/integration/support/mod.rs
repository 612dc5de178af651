//! What the tests stand on: a broker, the programs, and a foreign peer that speaks plain AMQP.

pub(crate) mod applies;
pub(crate) mod broker;
pub(crate) mod certificates;
pub(crate) mod peer;
pub(crate) mod programs;
pub(crate) mod proxy;
pub(crate) mod raw;
pub(crate) mod scripted;

use std::thread;
use std::time::{Duration, Instant};

/// How long anything may take that is expected to happen. Reached only when it does not.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Looks again and again until there is something to see, and fails after [`PATIENCE`].
#[track_caller]
pub(crate) fn eventually<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(seen) = look() {
            return seen;
        }
        assert!(start.elapsed() < PATIENCE, "waited {PATIENCE:?} in vain: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}
