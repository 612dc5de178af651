//! What is known of the callers' reply queues: whether a caller has gone, and which names of direct
//! reply-to work.
//!
//! The broker is asked by a passive declaration: 404 says that the queue is gone, 405 that the
//! queue is there and exclusive to its caller. RabbitMQ logs each 405 as an error, so the broker is
//! asked once per reply queue and interval, not once per run.
//!
//! A name of direct reply-to (`amq.rabbitmq.reply-to.…`) that a peer has made up closes the whole
//! connection: RabbitMQ 3 at a reply, and also RabbitMQ 4 at a passive declaration. So a name is
//! tried on the isolated connection first.

use rpc_common::sync::lock;
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Prefix of the names of direct reply-to.
const DIRECT_PREFIX: &[u8] = b"amq.rabbitmq.reply-to.";

/// First interval at which the broker is asked for one reply queue; doubles up to
/// [`MAX_INTERVAL`].
const MIN_INTERVAL: Duration = Duration::from_secs(10);

/// Maximum interval at which the broker is asked for one reply queue.
const MAX_INTERVAL: Duration = Duration::from_secs(60);

/// Maximum number of reply queues that are remembered. The one that was used least recently is
/// forgotten.
const MAX_QUEUES: usize = 4_096;

/// Whether a queue's name is one of direct reply-to.
pub(crate) fn is_direct_reply_to(queue: &[u8]) -> bool {
    queue.starts_with(DIRECT_PREFIX)
}

/// Whether a reply queue is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum QueueState {
    /// The queue is there, or the broker does not say.
    Exists,
    /// There is no such queue.
    Gone,
    /// The name ended the connection on which it was used.
    Refused,
}

/// The callers' reply queues.
#[derive(Default)]
pub(crate) struct Callers {
    /// By name.
    queues: Mutex<HashMap<Vec<u8>, ReplyQueue>>,
    /// Whether any caller was found to have gone: until then no request needs a look at `queues`.
    any_gone: AtomicBool,
}

/// What is known of a reply queue.
#[derive(Debug)]
struct ReplyQueue {
    state: QueueState,
    /// Whether a reply went there. Asked of the names of direct reply-to only.
    took_reply: bool,
    used: Instant,
    /// The broker is not asked again before this instant.
    ask_at: Instant,
    interval: Duration,
}

impl Callers {
    /// Whether a reply must be tried on the isolated connection: to a name of direct reply-to that
    /// no reply has gone to yet.
    pub(crate) fn is_untried(&self, queue: &[u8]) -> bool {
        is_direct_reply_to(queue)
            && !lock(&self.queues)
                .get(queue)
                .is_some_and(|known| known.took_reply)
    }

    /// Whether the broker ended a connection because of this name.
    pub(crate) fn is_refused(&self, queue: &[u8]) -> bool {
        is_direct_reply_to(queue)
            && lock(&self.queues)
                .get(queue)
                .is_some_and(|known| known.state == QueueState::Refused)
    }

    /// A reply went to this queue by the isolated connection.
    pub(crate) fn on_reply(&self, queue: &[u8], now: Instant) {
        if is_direct_reply_to(queue) {
            self.update(queue, now, |known| known.took_reply = true);
        }
    }

    /// The isolated connection ended because of this name.
    pub(crate) fn on_refused(&self, queue: &[u8], now: Instant) {
        self.update(queue, now, |known| known.state = QueueState::Refused);
    }

    /// Whether the broker is to be asked before a request of this caller is run.
    pub(crate) fn was_gone(&self, queue: &[u8]) -> bool {
        self.any_gone.load(Ordering::Relaxed)
            && lock(&self.queues)
                .get(queue)
                .is_some_and(|known| known.state != QueueState::Exists)
    }

    /// Whether the caller has gone. Asks the broker by `ask`, unless it was asked a short time ago.
    pub(crate) fn is_gone(
        &self,
        queue: &[u8],
        now: Instant,
        ask: impl FnOnce() -> QueueState,
    ) -> bool {
        let known = lock(&self.queues)
            .get(queue)
            .map(|known| (known.state, known.ask_at));
        if let Some((state, ask_at)) = known {
            if state == QueueState::Refused || now < ask_at {
                return state != QueueState::Exists;
            }
        }
        // Until the answer comes, others use the state that is known.
        self.update(queue, now, |known| {
            known.ask_at = now + known.interval;
            known.interval = (2 * known.interval).min(MAX_INTERVAL);
        });
        let state = ask();
        self.update(queue, now, |known| known.state = state);
        let is_gone = state != QueueState::Exists;
        if is_gone {
            self.any_gone.store(true, Ordering::Relaxed);
        }
        is_gone
    }

    fn update(&self, queue: &[u8], now: Instant, change: impl FnOnce(&mut ReplyQueue)) {
        let mut queues = lock(&self.queues);
        if queues.len() >= MAX_QUEUES && !queues.contains_key(queue) {
            let oldest = queues.iter().min_by_key(|(_, known)| known.used);
            if let Some(oldest) = oldest.map(|(name, _)| name.clone()) {
                queues.remove(&oldest);
            }
        }
        let known = queues.entry(queue.into()).or_insert(ReplyQueue {
            state: QueueState::Exists,
            took_reply: false,
            used: now,
            ask_at: now,
            interval: MIN_INTERVAL,
        });
        known.used = now;
        change(known);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DIRECT: &[u8] = b"amq.rabbitmq.reply-to.x";

    #[test]
    fn the_broker_is_asked_once_per_reply_queue_and_interval_which_doubles() {
        let callers = Callers::default();
        let start = Instant::now();
        let mut asked = Vec::new();
        for second in 0..200 {
            let now = start + Duration::from_secs(second);
            for _ in 0..3 {
                let is_gone = callers.is_gone(b"replies", now, || {
                    asked.push(second);
                    QueueState::Exists
                });
                assert!(!is_gone);
            }
        }
        assert_eq!(asked, [0, 10, 30, 70, 130, 190]);
    }

    #[test]
    fn a_reply_queue_that_is_gone_is_asked_for_again_before_a_request_is_run() {
        let callers = Callers::default();
        let now = Instant::now();
        assert!(!callers.was_gone(b"replies"));
        assert!(callers.is_gone(b"replies", now, || QueueState::Gone));
        assert!(callers.was_gone(b"replies") && !callers.was_gone(b"others"));
        let ask = || panic!("the broker was asked a moment ago");
        assert!(callers.is_gone(b"replies", now + Duration::from_secs(9), ask));
        let later = now + Duration::from_secs(10);
        assert!(!callers.is_gone(b"replies", later, || QueueState::Exists));
        assert!(!callers.was_gone(b"replies"));
    }

    #[test]
    fn a_name_of_direct_reply_to_is_tried_until_a_reply_has_gone_there() {
        let callers = Callers::default();
        let now = Instant::now();
        assert!(callers.is_untried(DIRECT) && !callers.is_untried(b"rpc.reply.x"));
        callers.on_reply(DIRECT, now);
        assert!(!callers.is_untried(DIRECT) && !callers.is_refused(DIRECT));
    }

    #[test]
    fn a_name_that_ended_a_connection_is_not_used_and_not_asked_for_again() {
        let callers = Callers::default();
        let now = Instant::now();
        assert!(callers.is_gone(DIRECT, now, || QueueState::Refused));
        assert!(callers.is_refused(DIRECT));
        let later = now + Duration::from_secs(600);
        let ask = || panic!("the name would end another connection");
        assert!(callers.is_gone(DIRECT, later, ask));
    }

    #[test]
    fn the_number_of_reply_queues_that_are_remembered_is_limited() {
        let callers = Callers::default();
        let start = Instant::now();
        for number in 0..=MAX_QUEUES as u64 {
            let queue = [DIRECT, &number.to_be_bytes()].concat();
            callers.on_reply(&queue, start + Duration::from_millis(number));
        }
        assert_eq!(lock(&callers.queues).len(), MAX_QUEUES);
        assert!(callers.is_untried(&[DIRECT, &0_u64.to_be_bytes()].concat()));
    }
}
