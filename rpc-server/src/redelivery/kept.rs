//! Computed replies, kept for when their requests are delivered again.
//!
//! The broker waits for an acknowledgement no longer than its `consumer_timeout`. Then it closes
//! the channel or cancels the consumer, and delivers the request again, perhaps to another worker;
//! computing the reply again would take as long again.

use rpc_common::message::{Reply, Request};
use rpc_common::sync::lock;
use std::collections::VecDeque;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// Maximum number of kept replies; the latest are kept.
const MAX_KEPT: usize = 64;

/// Maximum size of all kept replies in bytes.
const MAX_KEPT_BYTES: usize = 64 << 20;

/// The latest replies whose channel or consumer had ended when they were sent, of all workers; and
/// the requests in hand.
#[derive(Default)]
pub(crate) struct KeptReplies {
    state: Mutex<Kept>,
    /// Notified when a request is no longer in hand.
    has_ended: Condvar,
}

#[derive(Default)]
struct Kept {
    replies: VecDeque<(u64, Reply)>,
    in_hand: Vec<u64>,
}

/// A request that a worker has in hand, until this is dropped.
pub(crate) struct InHand<'a> {
    kept: &'a KeptReplies,
    key: u64,
}

impl KeptReplies {
    /// Marks a request as in hand.
    pub(crate) fn begin(&self, request: &Request) -> InHand<'_> {
        self.mark(self.lock(), key(request))
    }

    /// Marks a redelivered request as in hand. If another worker has it in hand, waits for that
    /// worker. Returns the kept reply, if there is one.
    pub(crate) fn begin_redelivered(&self, request: &Request) -> (InHand<'_>, Option<Reply>) {
        let key = key(request);
        let mut state = self.lock();
        while state.in_hand.contains(&key) {
            state = self
                .has_ended
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        let index = state.replies.iter().position(|(kept, _)| *kept == key);
        let kept = index.and_then(|index| state.replies.remove(index));
        (self.mark(state, key), kept.map(|(_, reply)| reply))
    }

    fn mark(&self, mut state: MutexGuard<Kept>, key: u64) -> InHand<'_> {
        state.in_hand.push(key);
        InHand { kept: self, key }
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        lock(&self.state)
    }
}

impl InHand<'_> {
    /// Keeps the reply to this request.
    pub(crate) fn keep(&self, reply: Reply) {
        let size = |reply: &Reply| reply.as_ref().map_or(0, |answer| answer.body.len());
        if size(&reply) > MAX_KEPT_BYTES {
            return; // it would evict every other reply
        }
        let mut state = self.kept.lock();
        state.replies.push_front((self.key, reply));
        let all = |state: &Kept| {
            state
                .replies
                .iter()
                .map(|(_, reply)| size(reply))
                .sum::<usize>()
        };
        while state.replies.len() > MAX_KEPT || all(&state) > MAX_KEPT_BYTES {
            state.replies.pop_back();
        }
    }
}

impl Drop for InHand<'_> {
    fn drop(&mut self) {
        let mut state = self.kept.lock();
        let index = state.in_hand.iter().position(|key| *key == self.key);
        index.map(|index| state.in_hand.swap_remove(index));
        self.kept.has_ended.notify_all();
    }
}

/// Prefixes of the headers that RabbitMQ adds, or changes, when a message is redelivered.
const BROKER_HEADERS: [&str; 5] = [
    "x-acquired-count",
    "x-death",
    "x-delivery-count",
    "x-first-death-",
    "x-last-death-",
];

/// The identity of a request when it is redelivered.
fn key(request: &Request) -> u64 {
    let mut hasher = DefaultHasher::new();
    (
        request.correlation_id,
        request.reply_to,
        request.body,
        request.content_type,
        request.details,
    )
        .hash(&mut hasher);
    for (name, value) in request.headers.entries() {
        if !BROKER_HEADERS
            .iter()
            .any(|prefix| name.starts_with(prefix.as_bytes()))
        {
            (name, format!("{value:?}")).hash(&mut hasher);
        }
    }
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use rpc_common::message::Answer;
    use rpc_common::properties::TableBuilder;
    use std::thread;

    fn request(body: &[u8]) -> Request<'_> {
        Request {
            body,
            reply_to: Some(b"to"),
            ..Request::default()
        }
    }

    fn answer(text: &str) -> Answer {
        text.to_owned().into()
    }

    fn keep(kept: &KeptReplies, body: &[u8], reply: &str) {
        kept.begin(&request(body)).keep(Ok(answer(reply)));
    }

    fn take(kept: &KeptReplies, body: &[u8]) -> Option<Reply> {
        kept.begin_redelivered(&request(body)).1
    }

    #[test]
    fn a_reply_is_kept_for_its_request_only_and_once() {
        let kept = KeptReplies::default();
        assert_eq!(take(&kept, b"30"), None);
        keep(&kept, b"30", "832040");
        keep(&kept, b"20", "6765");
        assert_eq!(take(&kept, b"31"), None);
        drop(kept.begin(&request(b"30"))); // this is another request
        assert_eq!(take(&kept, b"30"), Some(Ok(answer("832040"))));
        assert_eq!(take(&kept, b"30"), None);
        (0..MAX_KEPT).for_each(|_| keep(&kept, b"30", "832040"));
        assert_eq!(take(&kept, b"20"), None, "it was the oldest");
    }

    #[test]
    fn a_reply_that_is_too_large_to_be_kept_takes_no_place_of_others() {
        let kept = KeptReplies::default();
        keep(&kept, b"30", "832040");
        let large = Answer::new(vec![0; MAX_KEPT_BYTES + 1]);
        kept.begin(&request(b"large")).keep(Ok(large));
        assert_eq!(take(&kept, b"large"), None);
        assert_eq!(take(&kept, b"30"), Some(Ok(answer("832040"))));
    }

    #[test]
    fn a_reply_is_kept_for_the_same_headers_but_those_of_the_broker() {
        let kept = KeptReplies::default();
        let headers = |name: &str| TableBuilder::default().with_long(name, 1);
        let german = headers("x-lang");
        let counted = headers("x-delivery-count");
        let with = |headers| Request {
            headers,
            ..request(b"30")
        };
        kept.begin(&request(b"30")).keep(Ok(answer("832040")));
        assert_eq!(kept.begin_redelivered(&with(german.table())).1, None);
        assert_eq!(
            kept.begin_redelivered(&with(counted.table())).1,
            Some(Ok(answer("832040")))
        );
    }

    #[test]
    fn a_redelivered_request_waits_for_the_worker_that_has_it_in_hand() {
        let kept = KeptReplies::default();
        let in_hand = kept.begin(&request(b"30"));
        thread::scope(|scope| {
            let redelivered = scope.spawn(|| take(&kept, b"30"));
            in_hand.keep(Ok(answer("832040")));
            drop(in_hand);
            assert_eq!(redelivered.join().unwrap(), Some(Ok(answer("832040"))));
        });
        assert!(kept.lock().in_hand.is_empty());
    }
}
