//! The known cause of a missing answer, and the time to ask the broker for more. Pure.

use crate::call::NoAnswerCause;
use rpc_common::connection::{
    Error as ConnectionError, ErrorKind, Notification, Phase, QueueStats, NOT_FOUND,
};
use std::time::{Duration, Instant};

/// Silence before the first `queue_stats`.
const FIRST_STATS: Duration = Duration::from_millis(500);

/// First interval of further `queue_stats`; each one doubles it.
const MIN_STATS_INTERVAL: Duration = Duration::from_secs(1);

/// Longest interval of `queue_stats`: a long job costs the broker little.
const MAX_STATS_INTERVAL: Duration = Duration::from_secs(30);

/// The known cause of why pending calls have no answer.
pub(crate) struct Diagnosis {
    /// Instant of the next `queue_stats`, if nothing arrives before.
    next_stats: Instant,
    stats_interval: Duration,
    /// The broker's reason to block publishers, while it blocks them. Then nothing is published,
    /// and the broker answers nothing.
    blocked: Option<String>,
    cause: NoAnswerCause,
    /// Number of `queue_stats` in a row that found no consumers.
    stats_without_consumers: u32,
}

impl Diagnosis {
    pub(crate) fn new(now: Instant) -> Self {
        Diagnosis {
            next_stats: now + FIRST_STATS,
            stats_interval: MIN_STATS_INTERVAL,
            blocked: None,
            cause: NoAnswerCause::Unknown,
            stats_without_consumers: 0,
        }
    }

    /// Instant of the next `queue_stats`.
    pub(crate) fn next_stats(&self) -> Instant {
        self.next_stats
    }

    /// A call has begun after none was pending.
    pub(crate) fn on_begin(&mut self, now: Instant) {
        self.start_silence(now);
    }

    fn start_silence(&mut self, now: Instant) {
        self.next_stats = now + FIRST_STATS;
        self.stats_interval = MIN_STATS_INTERVAL;
    }

    /// The broker must end this phase next. That a connection was lost stays known until something
    /// arrives on the next one: a broker may end one connection after the other.
    pub(crate) fn on_waiting(&mut self, phase: Phase) {
        if !matches!(self.cause, NoAnswerCause::Disconnected(_)) {
            self.cause = NoAnswerCause::Waiting(phase);
        }
    }

    /// The consumer was started.
    pub(crate) fn on_consuming(&mut self, now: Instant) {
        if matches!(self.cause, NoAnswerCause::Waiting(_)) {
            self.cause = NoAnswerCause::Unknown;
        }
        self.start_silence(now);
    }

    /// The reply to a call has arrived: any earlier cause is stale.
    pub(crate) fn on_reply(&mut self, now: Instant) {
        self.cause = NoAnswerCause::Unknown;
        self.start_silence(now);
    }

    /// A reply has arrived that belongs to no call of this run.
    pub(crate) fn on_foreign_reply(&mut self) {
        self.cause = NoAnswerCause::ReplyDiscarded;
    }

    pub(crate) fn on_connection_error(&mut self, error: &ConnectionError) {
        self.cause = self.cause().after(error);
        self.blocked = None;
    }

    /// Returns the broker's reason to block publishers, if it blocks them.
    pub(crate) fn on_notification(&mut self, notification: Notification) -> Option<&str> {
        self.blocked = match notification {
            Notification::Blocked(reason) => Some(reason),
            Notification::Unblocked => None,
        };
        self.blocked.as_deref()
    }

    /// Whether to ask for `queue_stats` at this instant, if the session `can_ask`. Schedules the
    /// next one.
    pub(crate) fn take_stats_due(&mut self, now: Instant, can_ask: bool) -> bool {
        if now < self.next_stats {
            return false;
        }
        self.next_stats = now + self.stats_interval;
        self.stats_interval = MAX_STATS_INTERVAL.min(2 * self.stats_interval);
        if self.is_blocked() || !can_ask {
            return false;
        }
        if self.cause == NoAnswerCause::Unknown {
            self.on_waiting(Phase::QueueStats); // until the broker has answered
        }
        true
    }

    /// Returns whether to warn that nobody consumes from the queue: after the second `queue_stats`
    /// in a row that found no consumers. (The first one may have found a quorum queue that elects
    /// its leader.)
    pub(crate) fn on_queue_stats(&mut self, stats: &Result<QueueStats, ErrorKind>) -> bool {
        self.cause = match stats {
            // The server has taken the request, and its reply cannot be matched.
            Ok(QueueStats { messages: 0, .. }) if self.cause == NoAnswerCause::ReplyDiscarded => {
                NoAnswerCause::ReplyDiscarded
            }
            Ok(stats) => NoAnswerCause::Queue(*stats),
            Err(ErrorKind::ChannelClosed(reason)) if reason.code == NOT_FOUND => {
                NoAnswerCause::QueueMissing
            }
            Err(_) => NoAnswerCause::Unknown,
        };
        if matches!(stats, Ok(QueueStats { consumers: 0, .. })) {
            self.stats_without_consumers += 1;
        } else {
            self.stats_without_consumers = 0;
        }
        self.stats_without_consumers == 2
    }

    pub(crate) fn is_blocked(&self) -> bool {
        self.blocked.is_some()
    }

    /// The cause, as far as it is known now.
    pub(crate) fn cause(&self) -> NoAnswerCause {
        let blocked = self.blocked.clone().map(NoAnswerCause::Blocked);
        blocked.unwrap_or_else(|| self.cause.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rpc_common::connection::Reason;

    #[test]
    fn queue_stats_are_due_after_silence_but_not_while_the_broker_blocks_publishers() {
        let now = Instant::now();
        let mut diagnosis = Diagnosis::new(now);
        assert!(!diagnosis.take_stats_due(now, true));
        assert!(diagnosis.take_stats_due(now + FIRST_STATS, true));
        assert!(
            !diagnosis.take_stats_due(now + FIRST_STATS, true),
            "once in a while"
        );
        assert_eq!(diagnosis.cause(), NoAnswerCause::Waiting(Phase::QueueStats));
        diagnosis.on_notification(Notification::Blocked("low on memory".into()));
        assert!(!diagnosis.take_stats_due(now + 10 * MIN_STATS_INTERVAL, true));
        assert_eq!(
            diagnosis.cause(),
            NoAnswerCause::Blocked("low on memory".into())
        );
    }

    /// Else the event loop would never sleep.
    #[test]
    fn the_next_queue_stats_are_later_also_where_the_session_cannot_ask() {
        let now = Instant::now();
        let mut diagnosis = Diagnosis::new(now);
        assert!(!diagnosis.take_stats_due(now + FIRST_STATS, false));
        assert_eq!(diagnosis.next_stats, now + FIRST_STATS + MIN_STATS_INTERVAL);
    }

    #[test]
    fn the_second_queue_stats_in_a_row_without_consumers_are_a_warning() {
        let mut diagnosis = Diagnosis::new(Instant::now());
        let stats = |consumers| {
            Ok(QueueStats {
                messages: 1,
                consumers,
            })
        };
        let warned = [0, 1, 0, 0, 0].map(|consumers| diagnosis.on_queue_stats(&stats(consumers)));
        assert_eq!(warned, [false, false, false, true, false]);
    }

    #[test]
    fn a_missing_queue_is_told_from_one_without_stats() {
        let mut diagnosis = Diagnosis::new(Instant::now());
        let mut cause_after = |kind| {
            diagnosis.on_queue_stats(&Err(kind));
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
