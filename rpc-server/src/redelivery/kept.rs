//! The requests in hand, and computed replies that may be needed again.
//!
//! A request comes again when the broker has not got its acknowledgement: because the connection
//! ended, or because the function took longer than the broker's `consumer_timeout`. The broker
//! delivers it again, perhaps to another worker; and rpc-client, whose connection may have ended,
//! too, sends it again as a new message, with the same correlation id and another `reply_to`.
//! Computing the reply again would take as long again.

use crate::observer::Outcome;
use rpc_common::message::{Details, Reply, Request, DEADLINE_HEADER};
use rpc_common::properties::Value;
use rpc_common::sync::lock;
use std::collections::hash_map::Entry;
use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasher, BuildHasherDefault, Hash, Hasher, RandomState};
use std::mem;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Maximum number of kept replies; the latest are kept. More than the workers of a server.
const MAX_KEPT: usize = 4_096;

/// Maximum size of all kept replies in bytes.
const MAX_KEPT_BYTES: usize = 64 << 20;

/// Maximum sum of the [weights](End::weight) of the ends after the reply to one request; then the
/// reply may be why.
const MAX_ENDS: u32 = 10;

/// Maximum number of requests whose ends are counted; the latest are.
const MAX_COUNTED: usize = 4_096;

/// Number of deliveries before which a request that another worker has in hand is given back.
/// (Before RabbitMQ 4.3 each return counts against the delivery limit of a quorum queue, which is
/// 20 by default on RabbitMQ 4.)
const MAX_DELIVERIES: i64 = 10;

/// Header in which a quorum queue counts the deliveries of a message.
const DELIVERY_COUNT_HEADER: &str = "x-delivery-count";

/// Interval at which a worker that waits for another one checks whether the wait is of use.
const WAIT_INTERVAL: Duration = Duration::from_millis(100);

/// The requests in hand and the kept replies, of all workers.
#[derive(Default)]
pub(crate) struct KeptReplies {
    /// Seeded at random, so that a caller cannot make a request with the key of another one.
    hasher: RandomState,
    state: Mutex<State>,
    /// Notified when a request is no longer in hand.
    has_ended: Condvar,
}

#[derive(Default)]
struct State {
    in_hand: HashMap<Key, InHandCount, BuildHasherDefault<KeyHasher>>,
    kept: HashMap<Key, Reply, BuildHasherDefault<KeyHasher>>,
    /// The keys of the kept replies, the oldest first. Some may have been taken.
    kept_order: VecDeque<Key>,
    /// Size of the kept replies in bytes.
    kept_bytes: usize,
    /// Sum of the ends after the reply to a request, the latest first.
    ends: VecDeque<(Key, u32)>,
}

/// What ended after a reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// The connection, and with it the work of all workers.
    Connection,
    /// The channel only: perhaps a permission was taken away, and comes back.
    Channel,
}

impl End {
    /// Two connections, or ten channels.
    fn weight(self) -> u32 {
        match self {
            End::Connection => MAX_ENDS / 2,
            End::Channel => 1,
        }
    }
}

/// The workers that have the same request.
#[derive(Default)]
struct InHandCount {
    /// Number of workers that have it in hand.
    holders: u32,
    /// Number of workers that wait for them.
    waiting: u32,
}

/// The identity of a request that comes again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key(u64);

/// The hasher of a [`Key`], which is a hash itself.
#[derive(Default)]
struct KeyHasher(u64);

impl Hasher for KeyHasher {
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = self.0.rotate_left(8) ^ u64::from(*byte);
        }
    }

    fn write_u64(&mut self, key: u64) {
        self.0 = key;
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

/// A request that a worker has in hand, until this is dropped.
pub(crate) struct InHand<'a> {
    replies: &'a KeptReplies,
    key: Key,
    /// Whether the request has a correlation id. Without one no reply is kept: the request cannot be
    /// told from others.
    has_id: bool,
    is_released: bool,
}

/// The state of a request that a worker begins.
pub(crate) enum Begun<'a> {
    /// The request is to be run.
    New(InHand<'a>),
    /// The reply to the request was computed before.
    Kept(InHand<'a>, Reply),
    /// Connections ended after the reply to the request, which is to be rejected.
    EndsConnections,
    /// Another worker has the request in hand, and a further one waits for that worker.
    Busy,
    /// The wait for the worker that has the request in hand was ended.
    Interrupted,
}

impl KeptReplies {
    /// Marks a request as in hand.
    ///
    /// A request that may have come before is looked up. If another worker has it in hand, waits
    /// for that worker, until `is_interrupted`; one worker waits at most.
    pub(crate) fn begin(&self, request: &Request, is_interrupted: &dyn Fn() -> bool) -> Begun<'_> {
        let key = self.key(request);
        let has_id = request.correlation_id.is_some();
        let mut state = self.lock();
        if request.is_redelivered && state.ends(key) >= MAX_ENDS {
            return Begun::EndsConnections;
        }
        let mut reply = None;
        if has_id && (request.is_redelivered || is_of_rpc_client(request)) {
            if let Some(in_hand) = state.in_hand.get_mut(&key) {
                let may_give_back = delivery_count(request) < MAX_DELIVERIES;
                if in_hand.waiting > 0 && may_give_back {
                    return Begun::Busy;
                }
                in_hand.waiting += 1;
                log::info!(
                    outcome = Outcome::Requeued.as_str();
                    "request[{}]: another worker has this request in hand, waiting for that worker",
                    request.log_id()
                );
                state = self.wait_for_holders(state, key, is_interrupted);
                if state.in_hand.contains_key(&key) {
                    return Begun::Interrupted;
                }
            }
            // A reply to rpc-client stays: the request that was sent again follows the one that is
            // delivered again.
            reply = if is_of_rpc_client(request) {
                state.kept.get(&key).cloned()
            } else {
                state.take(key)
            };
        }
        state.in_hand.entry(key).or_default().holders += 1;
        let in_hand = InHand {
            replies: self,
            key,
            has_id,
            is_released: false,
        };
        match reply {
            Some(reply) => Begun::Kept(in_hand, reply),
            None => Begun::New(in_hand),
        }
    }

    fn wait_for_holders<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        key: Key,
        is_interrupted: &dyn Fn() -> bool,
    ) -> MutexGuard<'a, State> {
        while state.in_hand.contains_key(&key) {
            drop(state);
            let ends_wait = is_interrupted();
            state = self.lock();
            if ends_wait {
                if let Some(in_hand) = state.in_hand.get_mut(&key) {
                    in_hand.waiting -= 1;
                }
                break;
            }
            state = self
                .has_ended
                .wait_timeout_while(state, WAIT_INTERVAL, |state| {
                    state.in_hand.contains_key(&key)
                })
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        state
    }

    /// Keeps a reply that the broker returned: rpc-client, whose connection has ended, sends the
    /// request again.
    pub(crate) fn keep_returned(&self, sent: Sent) {
        if let Some(reply) = sent.reply {
            self.lock().keep(sent.key, reply);
        }
    }

    /// Keeps a reply that was sent just before this end: perhaps the broker has not got the
    /// acknowledgement. Counts the end.
    pub(crate) fn keep_sent(&self, sent: Sent, end: End) {
        let mut state = self.lock();
        let ends = state.ends(sent.key) + end.weight();
        state.ends.retain(|(counted, _)| *counted != sent.key);
        state.ends.push_front((sent.key, ends));
        state.ends.truncate(MAX_COUNTED);
        if let Some(reply) = sent.reply {
            state.keep(sent.key, reply);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// The key of a request. That of rpc-client has the same one when it is sent again, with
    /// another `reply_to`: its correlation id is a UUID.
    fn key(&self, request: &Request) -> Key {
        let mut hasher = self.hasher.build_hasher();
        let reply_to = request
            .reply_to
            .filter(|_| !(is_of_rpc_client(request) && request.correlation_id.is_some()));
        let Details {
            content_encoding,
            message_id,
            message_type,
            app_id,
            user_id,
        } = request.details;
        let properties = [
            request.correlation_id,
            reply_to,
            Some(request.body),
            request.content_type,
            content_encoding,
            message_id,
            message_type,
            app_id,
            user_id,
        ];
        for (index, property) in properties.into_iter().enumerate() {
            // Few requests have all of them: it is cheaper to hash no `None`.
            if let Some(property) = property {
                hasher.write_usize(index);
                property.hash(&mut hasher);
            }
        }
        for (name, value) in request.headers.entries() {
            let mut prefixes = CHANGING_HEADERS.iter();
            if !prefixes.any(|prefix| name.starts_with(prefix.as_bytes())) {
                (name, format!("{value:?}")).hash(&mut hasher);
            }
        }
        Key(hasher.finish())
    }
}

/// A reply that was sent, and that perhaps nobody has got.
pub(crate) struct Sent {
    key: Key,
    reply: Option<Reply>,
}

impl InHand<'_> {
    /// Keeps the reply to this request for when the request comes again.
    pub(crate) fn keep(self, reply: Reply) {
        if self.has_id {
            self.replies.lock().keep(self.key, reply);
        }
    }

    /// The reply to this request after it was sent. One of more than `max_size` bytes is not held.
    /// If another worker waits for this one, the reply is kept for that worker.
    pub(crate) fn sent(mut self, reply: Reply, max_size: usize) -> Sent {
        let replies = self.replies;
        let mut state = replies.lock();
        let is_awaited = self.release(&mut state);
        if is_awaited && self.has_id {
            state.keep(self.key, reply.clone());
        }
        drop(state);
        if is_awaited {
            replies.has_ended.notify_all();
        }
        Sent {
            key: self.key,
            reply: Some(reply).filter(|reply| self.has_id && size(reply) <= max_size),
        }
    }

    /// The request is no longer in hand. Returns whether a worker waits for that.
    fn release(&mut self, state: &mut State) -> bool {
        if mem::replace(&mut self.is_released, true) {
            return false;
        }
        let Entry::Occupied(mut in_hand) = state.in_hand.entry(self.key) else {
            return false;
        };
        in_hand.get_mut().holders -= 1;
        if in_hand.get().holders > 0 {
            return false;
        }
        in_hand.remove().waiting > 0
    }
}

impl Drop for InHand<'_> {
    fn drop(&mut self) {
        if !self.is_released {
            let replies = self.replies;
            let is_awaited = self.release(&mut replies.lock());
            if is_awaited {
                replies.has_ended.notify_all();
            }
        }
    }
}

impl State {
    fn keep(&mut self, key: Key, reply: Reply) {
        if size(&reply) > MAX_KEPT_BYTES {
            return; // it would evict every other reply
        }
        self.take(key);
        self.kept_bytes += size(&reply);
        self.kept.insert(key, reply);
        self.kept_order.push_back(key);
        while self.kept_order.len() > MAX_KEPT || self.kept_bytes > MAX_KEPT_BYTES {
            match self.kept_order.pop_front() {
                Some(oldest) => drop(self.take(oldest)),
                None => break,
            }
        }
    }

    fn take(&mut self, key: Key) -> Option<Reply> {
        let reply = self.kept.remove(&key)?;
        self.kept_bytes -= size(&reply);
        Some(reply)
    }

    fn ends(&self, key: Key) -> u32 {
        let mut counts = self.ends.iter();
        counts
            .find(|(counted, _)| *counted == key)
            .map_or(0, |(_, count)| *count)
    }
}

fn size(reply: &Reply) -> usize {
    reply
        .as_ref()
        .map_or(0, |answer| answer.body.len() + answer.headers.size())
}

/// Whether a request is of rpc-client, which sends it again with the same correlation id.
fn is_of_rpc_client(request: &Request) -> bool {
    request.deadline_ms.is_some()
}

fn delivery_count(request: &Request) -> i64 {
    let mut headers = request.headers.entries();
    let count = headers.find(|(name, _)| *name == DELIVERY_COUNT_HEADER.as_bytes());
    match count {
        Some((_, Value::Integer(count))) => count,
        _ => 0,
    }
}

/// Prefixes of the headers that differ when a request comes again: the deadline by the rounding of
/// its milliseconds; the others are those of RabbitMQ.
const CHANGING_HEADERS: [&str; 6] = [
    DEADLINE_HEADER,
    "x-acquired-count",
    "x-death",
    DELIVERY_COUNT_HEADER,
    "x-first-death-",
    "x-last-death-",
];

#[cfg(test)]
mod tests {
    use super::*;
    use rpc_common::message::Answer;
    use rpc_common::properties::TableBuilder;
    use std::thread;

    /// A request of a tutorial peer.
    fn request(id: &str) -> Request<'_> {
        Request {
            body: b"30",
            reply_to: Some(b"to"),
            correlation_id: Some(id.as_bytes()),
            ..Request::default()
        }
    }

    fn redelivered(id: &str) -> Request<'_> {
        Request {
            is_redelivered: true,
            ..request(id)
        }
    }

    /// A request of rpc-client.
    fn of_client<'a>(id: &'a str, reply_to: &'a str) -> Request<'a> {
        Request {
            reply_to: Some(reply_to.as_bytes()),
            deadline_ms: Some(1),
            ..request(id)
        }
    }

    fn answer(text: &str) -> Answer {
        text.to_owned().into()
    }

    fn begin<'a>(replies: &'a KeptReplies, request: &Request) -> Begun<'a> {
        replies.begin(request, &|| false)
    }

    /// Begins a request that is to be run, and keeps its reply.
    fn keep(replies: &KeptReplies, request: &Request, text: &str) {
        match begin(replies, request) {
            Begun::New(in_hand) => in_hand.keep(Ok(answer(text))),
            _ => panic!("the request is not new"),
        }
    }

    fn kept(replies: &KeptReplies, request: &Request) -> Option<Reply> {
        match begin(replies, request) {
            Begun::Kept(_, reply) => Some(reply),
            Begun::New(_) => None,
            _ => panic!("the request is neither new nor kept"),
        }
    }

    #[test]
    fn a_reply_is_kept_for_the_redelivery_of_its_request_only() {
        let replies = KeptReplies::default();
        assert_eq!(kept(&replies, &redelivered("a")), None);
        keep(&replies, &request("a"), "1");
        keep(&replies, &request("b"), "2");
        assert_eq!(kept(&replies, &redelivered("c")), None);
        assert_eq!(kept(&replies, &request("a")), None, "another request");
        assert_eq!(kept(&replies, &redelivered("a")), Some(Ok(answer("1"))));
        assert_eq!(kept(&replies, &redelivered("a")), None, "it is taken");
    }

    #[test]
    fn a_request_that_rpc_client_sends_again_gets_the_kept_reply_at_another_reply_queue() {
        let replies = KeptReplies::default();
        keep(&replies, &of_client("a", "first"), "1");
        let redelivery = Request {
            is_redelivered: true,
            ..of_client("a", "first")
        };
        assert_eq!(kept(&replies, &redelivery), Some(Ok(answer("1"))));
        let later = Request {
            deadline_ms: Some(2), // by the rounding of the milliseconds
            ..of_client("a", "second")
        };
        assert_eq!(kept(&replies, &later), Some(Ok(answer("1"))));
        assert_eq!(kept(&replies, &of_client("b", "second")), None);
    }

    /// The correlation id of rpc-client is a UUID, which nobody can guess; and the broker checks
    /// the user id. A tutorial peer may use one id for all calls: then its reply queue tells it
    /// from others, and only the broker says that its request was delivered before.
    #[test]
    fn nobody_gets_the_reply_of_another_caller_user_or_request() {
        let replies = KeptReplies::default();
        keep(&replies, &of_client("a", "to"), "1");
        keep(&replies, &request("1"), "2");
        let mut others = [of_client("a", "to"); 4];
        others[0].correlation_id = Some(b"b");
        others[1].body = b"31";
        others[2].details.user_id = Some(b"mallory");
        let german = TableBuilder::default().with_text("lang", "de");
        others[3].headers = german.table();
        for other in &others {
            assert_eq!(kept(&replies, other), None, "{other:?}");
        }
        let elsewhere = Request {
            reply_to: Some(b"elsewhere"),
            ..redelivered("1")
        };
        assert_eq!(kept(&replies, &elsewhere), None);
        let without_id = |reply_to| Request {
            correlation_id: None,
            is_redelivered: true,
            ..of_client("", reply_to)
        };
        keep(&replies, &without_id("to"), "3");
        assert_eq!(kept(&replies, &without_id("to")), None);
        assert_ne!(
            replies.key(&request("1")),
            KeptReplies::default().key(&request("1")),
            "a caller could make a request with the key of another one"
        );
    }

    #[test]
    fn headers_that_the_broker_changes_are_not_part_of_a_request() {
        let replies = KeptReplies::default();
        keep(&replies, &request("a"), "1");
        let counted = TableBuilder::default().with("x-delivery-count", Value::Integer(1));
        let request = Request {
            headers: counted.table(),
            ..redelivered("a")
        };
        assert_eq!(kept(&replies, &request), Some(Ok(answer("1"))));
    }

    #[test]
    fn the_number_and_the_size_of_kept_replies_are_limited() {
        let replies = KeptReplies::default();
        keep(&replies, &request("first"), "1");
        for number in 0..MAX_KEPT {
            keep(&replies, &request(&number.to_string()), "2");
        }
        assert_eq!(kept(&replies, &redelivered("first")), None, "the oldest");
        assert_eq!(kept(&replies, &redelivered("0")), Some(Ok(answer("2"))));
        let large = |size| Ok(Answer::new(vec![0; size]));
        match begin(&replies, &request("large")) {
            Begun::New(in_hand) => in_hand.keep(large(MAX_KEPT_BYTES + 1)),
            _ => panic!("the request is new"),
        }
        assert_eq!(kept(&replies, &redelivered("1")), Some(Ok(answer("2"))));
        match begin(&replies, &request("large")) {
            Begun::New(in_hand) => in_hand.keep(large(MAX_KEPT_BYTES)),
            _ => panic!("the request is new"),
        }
        assert_eq!(kept(&replies, &redelivered("2")), None, "no room is left");
    }

    #[test]
    fn one_worker_waits_for_the_worker_that_has_the_request_and_the_others_give_it_back() {
        let replies = KeptReplies::default();
        let Begun::New(in_hand) = begin(&replies, &request("a")) else {
            panic!("the request is new")
        };
        thread::scope(|scope| {
            let waiting = scope.spawn(|| kept(&replies, &redelivered("a")));
            while !replies
                .lock()
                .in_hand
                .values()
                .any(|count| count.waiting > 0)
            {
                thread::yield_now();
            }
            assert!(matches!(begin(&replies, &redelivered("a")), Begun::Busy));
            let counted = TableBuilder::default().with("x-delivery-count", Value::Integer(10));
            let often = Request {
                headers: counted.table(),
                ..redelivered("a")
            };
            let interrupted = replies.begin(&often, &|| true);
            assert!(matches!(interrupted, Begun::Interrupted));
            in_hand.keep(Ok(answer("1")));
            assert_eq!(waiting.join().unwrap(), Some(Ok(answer("1"))));
        });
        assert!(replies.lock().in_hand.is_empty());
    }

    #[test]
    fn a_worker_that_waits_gets_the_reply_that_was_sent_to_an_earlier_reply_queue() {
        let replies = KeptReplies::default();
        let Begun::New(in_hand) = begin(&replies, &of_client("a", "first")) else {
            panic!("the request is new")
        };
        thread::scope(|scope| {
            let waiting = scope.spawn(|| kept(&replies, &of_client("a", "second")));
            while !replies
                .lock()
                .in_hand
                .values()
                .any(|count| count.waiting > 0)
            {
                thread::yield_now();
            }
            in_hand.sent(Ok(answer("1")), 100);
            assert_eq!(waiting.join().unwrap(), Some(Ok(answer("1"))));
        });
    }

    #[test]
    fn a_reply_that_is_returned_is_kept() {
        let replies = KeptReplies::default();
        let Begun::New(in_hand) = begin(&replies, &of_client("a", "first")) else {
            panic!("the request is new")
        };
        let sent = in_hand.sent(Ok(answer("1")), 100);
        replies.keep_returned(sent);
        assert_eq!(
            kept(&replies, &of_client("a", "second")),
            Some(Ok(answer("1")))
        );
    }

    #[test]
    fn a_request_is_rejected_when_connections_ended_after_its_reply() {
        let replies = KeptReplies::default();
        for _ in 0..2 {
            let (Begun::New(in_hand) | Begun::Kept(in_hand, _)) =
                begin(&replies, &redelivered("a"))
            else {
                panic!("the request may be answered")
            };
            replies.keep_sent(in_hand.sent(Ok(answer("1")), 100), End::Connection);
        }
        let begun = begin(&replies, &redelivered("a"));
        assert!(matches!(begun, Begun::EndsConnections));
        for _ in 0..9 {
            let (Begun::New(in_hand) | Begun::Kept(in_hand, _)) =
                begin(&replies, &redelivered("b"))
            else {
                panic!("the request may be answered")
            };
            replies.keep_sent(in_hand.sent(Ok(answer("1")), 100), End::Channel);
        }
        assert_eq!(kept(&replies, &redelivered("b")), Some(Ok(answer("1"))));
        assert_eq!(kept(&replies, &request("a")), None, "another request");
    }
}
