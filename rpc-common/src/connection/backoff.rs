//! The pauses before connecting again. Pure but for the random part of the pauses.

use backon::{BackoffBuilder, ExponentialBuilder};
use std::time::{Duration, Instant};

/// First pause; up to as much again is added at random.
const FIRST_PAUSE: Duration = Duration::from_millis(100);

/// Longest pause; up to as much again is added at random.
const LONGEST_PAUSE: Duration = Duration::from_millis(2_500);

/// Time without an error after which the pauses start again with the first.
const STABLE_AFTER: Duration = Duration::from_secs(1);

/// The **pauses** between attempts: exponential, with jitter, without end.
pub struct Backoff {
    pauses: Pauses,
    /// End of the latest pause.
    paused_until: Instant,
}

type Pauses = <ExponentialBuilder as BackoffBuilder>::Backoff;

impl Backoff {
    /// Starts with the shortest pause.
    pub fn new(now: Instant) -> Self {
        Backoff {
            pauses: new_pauses(),
            paused_until: now,
        }
    }

    /// The pause before the next attempt.
    pub fn next_pause(&mut self, now: Instant) -> Duration {
        if now.saturating_duration_since(self.paused_until) >= STABLE_AFTER {
            self.pauses = new_pauses();
        }
        let pause = self.pauses.next().unwrap_or(LONGEST_PAUSE); // there is always a next one
        self.paused_until = now + pause;
        pause
    }
}

/// The pauses from the shortest to the longest, which is repeated without end.
pub fn pauses() -> impl Iterator<Item = Duration> {
    new_pauses()
}

fn new_pauses() -> Pauses {
    ExponentialBuilder::new()
        .with_min_delay(FIRST_PAUSE)
        .with_max_delay(LONGEST_PAUSE)
        .with_jitter()
        .without_max_times()
        .build()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_while_nothing_works_and_start_again_when_something_did() {
        let start = Instant::now();
        let mut backoff = Backoff::new(start);
        let mut now = start;
        let pauses = [(); 8].map(|()| {
            let pause = backoff.next_pause(now);
            now += pause; // and the attempt fails at once
            pause
        });
        assert!(pauses[0] >= FIRST_PAUSE && pauses[0] <= 2 * FIRST_PAUSE);
        assert!(
            pauses[7] >= LONGEST_PAUSE && pauses[7] <= 2 * LONGEST_PAUSE,
            "{pauses:?}"
        );
        assert!(backoff.next_pause(now + STABLE_AFTER) <= 2 * FIRST_PAUSE);
    }
}
