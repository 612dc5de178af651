//! Why there is no answer, as far as is known, and when to look at the request queue to learn more.
//! Pure.

use crate::call::NoAnswerCause;
use rpc_common::connection::{
    Error as ConnectionError, ErrorKind, Notification, Phase, QueueStats, NOT_FOUND,
};
use std::time::{Duration, Instant};

/// After how much silence the request queue is looked at, and how often then.
const FIRST_CHECK: Duration = Duration::from_millis(500);
const CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// What is known of why pending calls have no answer.
pub(crate) struct Diagnosis {
    /// When to look at the request queue, if nothing arrives before.
    pub(crate) next_check: Instant,
    /// Why the broker blocks publishers, while it does. Then nothing is published, and the broker
    /// answers nothing.
    blocked: Option<String>,
    cause: NoAnswerCause,
    /// How many looks at the queue in a row have found no consumers.
    looks_without_consumers: u32,
}

impl Diagnosis {
    pub(crate) fn new(now: Instant) -> Self {
        let blocked = None;
        let cause = NoAnswerCause::Unknown;
        Diagnosis {
            next_check: now + FIRST_CHECK,
            blocked,
            cause,
            looks_without_consumers: 0,
        }
    }

    /// A call has begun after none was pending.
    pub(crate) fn on_begin(&mut self, now: Instant) {
        self.next_check = now + FIRST_CHECK;
    }

    /// The broker is to do this next.
    pub(crate) fn on_waiting(&mut self, phase: Phase) {
        self.cause = NoAnswerCause::Waiting(phase);
    }

    /// A reply has arrived, or the consumer was started: what was known before is old.
    pub(crate) fn on_reply(&mut self, now: Instant) {
        self.cause = NoAnswerCause::Unknown;
        self.next_check = now + FIRST_CHECK;
    }

    pub(crate) fn on_connection_error(&mut self, error: &ConnectionError) {
        self.cause = self.cause().after(error);
        self.blocked = None;
    }

    /// Returns why the broker blocks publishers, if it does.
    pub(crate) fn on_notification(&mut self, notification: Notification) -> Option<&str> {
        self.blocked = match notification {
            Notification::Blocked(reason) => Some(reason),
            Notification::Unblocked => None,
        };
        self.blocked.as_deref()
    }

    /// Whether to look at the queue now, if that is possible.
    pub(crate) fn start_check(&mut self, now: Instant, can_check: bool) -> bool {
        if now < self.next_check {
            return false;
        }
        self.next_check = now + CHECK_INTERVAL;
        if self.is_blocked() || !can_check {
            return false;
        }
        if self.cause == NoAnswerCause::Unknown {
            self.on_waiting(Phase::QueueStats); // until the broker has answered
        }
        true
    }

    /// The queue was looked at. Returns whether to warn that nobody consumes from it: when the
    /// second look in a row has found no consumer. (The first one may have found a quorum queue
    /// that elects its leader.)
    pub(crate) fn on_queue_checked(&mut self, stats: &Result<QueueStats, ErrorKind>) -> bool {
        self.cause = match stats {
            Ok(stats) => NoAnswerCause::Queue(*stats),
            Err(ErrorKind::ChannelClosed(reason)) if reason.code == NOT_FOUND => {
                NoAnswerCause::QueueMissing
            }
            Err(_) => NoAnswerCause::Unknown,
        };
        let has_no_consumers = matches!(stats, Ok(QueueStats { consumers: 0, .. }));
        self.looks_without_consumers = if has_no_consumers {
            self.looks_without_consumers + 1
        } else {
            0
        };
        self.looks_without_consumers == 2
    }

    pub(crate) fn is_blocked(&self) -> bool {
        self.blocked.is_some()
    }

    /// What is known now.
    pub(crate) fn cause(&self) -> NoAnswerCause {
        self.blocked
            .clone()
            .map_or_else(|| self.cause.clone(), NoAnswerCause::Blocked)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rpc_common::connection::Reason;

    #[test]
    fn the_queue_is_looked_at_after_silence_but_not_while_the_broker_blocks_publishers() {
        let now = Instant::now();
        let mut diagnosis = Diagnosis::new(now);
        assert!(!diagnosis.start_check(now, true));
        assert!(diagnosis.start_check(now + FIRST_CHECK, true));
        assert!(
            !diagnosis.start_check(now + FIRST_CHECK, true),
            "once in a while"
        );
        assert_eq!(diagnosis.cause(), NoAnswerCause::Waiting(Phase::QueueStats));
        diagnosis.on_notification(Notification::Blocked("low on memory".into()));
        assert!(!diagnosis.start_check(now + 10 * CHECK_INTERVAL, true));
        assert_eq!(
            diagnosis.cause(),
            NoAnswerCause::Blocked("low on memory".into())
        );
    }

    /// Else the event loop would never sleep.
    #[test]
    fn the_time_of_the_next_look_is_later_also_where_the_queue_cannot_be_looked_at() {
        let now = Instant::now();
        let mut diagnosis = Diagnosis::new(now);
        assert!(!diagnosis.start_check(now + FIRST_CHECK, false));
        assert_eq!(diagnosis.next_check, now + FIRST_CHECK + CHECK_INTERVAL);
    }

    #[test]
    fn the_second_look_in_a_row_that_finds_no_consumer_is_a_warning() {
        let mut diagnosis = Diagnosis::new(Instant::now());
        let look = |consumers| {
            Ok(QueueStats {
                messages: 1,
                consumers,
            })
        };
        let warned = [0, 1, 0, 0, 0].map(|consumers| diagnosis.on_queue_checked(&look(consumers)));
        assert_eq!(warned, [false, false, false, true, false]);
    }

    #[test]
    fn a_missing_queue_is_told_from_one_that_cannot_be_looked_at() {
        let mut diagnosis = Diagnosis::new(Instant::now());
        let mut cause_after = |kind| {
            diagnosis.on_queue_checked(&Err(kind));
            diagnosis.cause()
        };
        let missing = Reason {
            code: NOT_FOUND,
            text: "no queue".into(),
        };
        assert_eq!(
            cause_after(ErrorKind::ChannelClosed(missing)),
            NoAnswerCause::QueueMissing
        );
        assert_eq!(
            cause_after(ErrorKind::TooManyChannels),
            NoAnswerCause::Unknown
        );
    }
}
