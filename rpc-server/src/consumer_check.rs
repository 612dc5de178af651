//! Whether the broker has forgotten an idle consumer: the queue has ready messages, and delivers
//! none to it. That happens where a quorum queue is deleted and declared again under load. Pure.

use std::time::{Duration, Instant};

/// Interval of `queue_stats` while a worker is idle.
const INTERVAL: Duration = Duration::from_secs(5);

/// Maximum interval; doubles after each re-consume that did not help. (A queue with a single active
/// consumer delivers nothing to the others.)
const MAX_INTERVAL: Duration = Duration::from_secs(600);

/// The check of one worker, over all of its channels.
pub(crate) struct ConsumerCheck {
    interval: Duration,
    next: Instant,
    /// Whether the latest `queue_stats` found ready messages, and nothing was delivered since.
    saw_messages: bool,
}

impl ConsumerCheck {
    pub(crate) fn new(now: Instant) -> Self {
        ConsumerCheck {
            interval: INTERVAL,
            next: now + INTERVAL,
            saw_messages: false,
        }
    }

    /// Instant of the next `queue_stats`.
    pub(crate) fn next(&self) -> Instant {
        self.next
    }

    /// The worker consumes on another channel.
    pub(crate) fn on_consuming(&mut self, now: Instant) {
        self.saw_messages = false;
        self.next = now + self.interval;
    }

    /// A request was delivered, and is answered.
    pub(crate) fn on_delivery(&mut self, now: Instant) {
        self.saw_messages = false;
        self.interval = INTERVAL;
        self.next = now + self.interval;
    }

    /// The queue has this many ready messages; `has_arrived`: something was delivered meanwhile.
    /// Returns whether the consumer is forgotten.
    pub(crate) fn on_queue_stats(
        &mut self,
        messages: u32,
        has_arrived: bool,
        now: Instant,
    ) -> bool {
        let is_forgotten = self.saw_messages && messages > 0 && !has_arrived;
        if is_forgotten {
            self.interval = (2 * self.interval).min(MAX_INTERVAL);
        }
        self.saw_messages = messages > 0;
        self.next = now + self.interval;
        is_forgotten
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_consumer_is_forgotten_if_messages_are_ready_twice_and_nothing_is_delivered() {
        let now = Instant::now();
        let mut check = ConsumerCheck::new(now);
        assert!(!check.on_queue_stats(1, false, now));
        assert!(!check.on_queue_stats(0, false, now));
        assert!(!check.on_queue_stats(1, false, now));
        assert!(
            !check.on_queue_stats(1, true, now),
            "something was delivered"
        );
        check.on_delivery(now);
        assert!(!check.on_queue_stats(1, false, now));
        assert!(check.on_queue_stats(1, false, now));
    }

    #[test]
    fn the_interval_doubles_while_to_consume_again_does_not_help() {
        let now = Instant::now();
        let mut check = ConsumerCheck::new(now);
        let mut intervals = Vec::new();
        for _ in 0..9 {
            check.on_queue_stats(1, false, now);
            assert!(check.on_queue_stats(1, false, now));
            check.on_consuming(now);
            intervals.push((check.next() - now).as_secs());
        }
        assert_eq!(intervals, [10, 20, 40, 80, 160, 320, 600, 600, 600]);
        check.on_delivery(now);
        assert_eq!(check.next() - now, INTERVAL);
    }
}
