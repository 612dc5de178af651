//! The pending calls: which are unanswered, and what happens to them.
//!
//! The state of a call is what the broker did with its latest request. Events change the state:
//!
//! | event | unsent | unconfirmed | accepted | to resend |
//! | --- | --- | --- | --- | --- |
//! | published | unconfirmed | | | |
//! | ack | | accepted | | |
//! | nack | | to resend; the second one in a row ends the call, if no queue has taken it | | |
//! | return | | to resend; a first request ends its call | to resend | to resend |
//! | the resend is due | | | unsent if the queue was missing | unsent |
//! | a new connection | unsent | unsent | unsent | unsent |
//!
//! A nack may mean that the queue is full, or that its process has died, which nacks what it holds
//! and will deliver. So one nack ends no call. The states remember whether the request before was
//! nacked, too.
//!
//! An empty cell: the state stays. A reply, or the deadline, ends a call of any state.
//!
//! Pure: no socket, and no clock but the instants that are passed in.

use crate::call::Request;
use crate::session_end::CallProgress;
use rpc_common::connection::{Confirmation, Deadline};
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::{Duration, Instant};
use uuid::Uuid;

/// Maximum number of unconfirmed requests of ended calls. (A quorum queue without a majority
/// confirms nothing.) Not more than a session may have unread, because the confirmations may arrive
/// at once.
const MAX_UNCONFIRMED: usize = 1_000;

/// Pause before a request is resent.
const RESEND_DELAY: Duration = Duration::from_millis(250);

/// A **call** is a request that waits for its reply.
#[derive(Debug)]
pub(crate) struct Call<T> {
    /// Number of the call, in the order in which calls begin.
    pub(crate) index: u64,
    /// Correlation id; the same each time the request is sent.
    pub(crate) id: Uuid,
    pub(crate) request: Request<T>,
    pub(crate) deadline: Deadline,
    /// Number of times that the request was published.
    sends: u32,
    /// Instant of the first publish.
    pub(crate) first_sent: Option<Instant>,
    /// Number of calls in flight when this one began.
    ahead: usize,
    /// Number of calls that were answered when this one began.
    answered_before: u64,
    /// Whether a queue has taken the request, or an earlier connection has ended with it.
    may_have_run: bool,
    state: RequestState,
}

/// The **state** of a call: what the broker did with its latest request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum RequestState {
    /// To be published on this connection.
    Unsent { was_nacked: bool },
    /// Published, and neither confirmed nor returned.
    Unconfirmed { was_nacked: bool },
    /// The queue has taken the request.
    Accepted,
    /// No queue has taken the request, which waits for its resend.
    ToResend { was_nacked: bool },
}

/// An event that changes the state of a call.
#[derive(Clone, Copy, Debug)]
enum StateEvent {
    Published,
    Ack,
    Nack,
    Return,
    ResendDue { was_queue_missing: bool },
    NewConnection,
}

impl RequestState {
    const NEW: Self = RequestState::Unsent { was_nacked: false };

    /// The state after an event, see the table of this file.
    fn after(self, event: StateEvent) -> Self {
        match (event, self) {
            (StateEvent::Published, RequestState::Unsent { was_nacked }) => {
                RequestState::Unconfirmed { was_nacked }
            }
            (StateEvent::Ack, RequestState::Unconfirmed { .. }) => RequestState::Accepted,
            (StateEvent::Nack, RequestState::Unconfirmed { .. }) => {
                RequestState::ToResend { was_nacked: true }
            }
            (StateEvent::Return, RequestState::Unconfirmed { .. } | RequestState::Accepted) => {
                RequestState::ToResend { was_nacked: false }
            }
            (StateEvent::ResendDue { .. }, RequestState::ToResend { was_nacked }) => {
                RequestState::Unsent { was_nacked }
            }
            (
                StateEvent::ResendDue {
                    was_queue_missing: true,
                },
                RequestState::Accepted,
            )
            | (StateEvent::NewConnection, _) => RequestState::NEW,
            (_, state) => state,
        }
    }
}

impl<T> Call<T> {
    /// Whether its request was returned, and none was taken: nothing ran.
    pub(crate) fn was_never_accepted(&self) -> bool {
        self.state == RequestState::ToResend { was_nacked: false } && !self.may_have_run
    }

    /// Whether its request was published, and neither confirmed nor returned.
    pub(crate) fn is_unconfirmed(&self) -> bool {
        matches!(self.state, RequestState::Unconfirmed { .. })
    }

    /// Whether a queue may have taken a request of this call.
    pub(crate) fn may_have_run(&self) -> bool {
        self.may_have_run
    }
}

/// The consequence of a returned request for its call.
#[derive(Debug)]
pub(crate) enum AfterReturn<T> {
    /// The call has ended: there is no request queue.
    Ended(Call<T>),
    /// The request is resent: there was a queue when it was sent before, and it may come back.
    WillResend,
}

/// The result of sending the next request.
pub(crate) enum SendResult<T, E> {
    Sent,
    /// The request cannot be published, and its call has ended.
    Failed(Call<T>, E),
}

/// The calls that have begun and not ended.
#[derive(Debug)]
pub(crate) struct PendingCalls<T> {
    /// By index. All calls have the same timeout, so this is also the order of their deadlines.
    calls: BTreeMap<u64, Call<T>>,
    index_of: HashMap<Uuid, u64>,
    /// Number of calls that have begun.
    begun: u64,
    /// Number of calls that were answered.
    answered: u64,
    /// Whether the queue is expected to exist: by the option, or because a call was answered. Then
    /// a call that finds none waits for it.
    expects_queue: bool,
    connection: OnConnection,
}

/// The state that belongs to one connection. The next connection replaces it whole.
#[derive(Debug)]
struct OnConnection {
    /// Indexes of the unsent calls, in order. Some may have ended.
    to_send: VecDeque<u64>,
    /// Number of requests that were published: the delivery tag of the latest confirmation to come.
    published: u64,
    /// Indexes of the calls whose requests are unconfirmed, by delivery tag.
    unconfirmed: BTreeMap<u64, u64>,
    /// False after a return or a nack whose request is resent, until an ack or a reply.
    is_accepting: bool,
    resend: Option<Resend>,
}

/// The resend of the requests that no queue has taken.
#[derive(Debug)]
struct Resend {
    at: Instant,
    /// Whether the queue was missing: then the accepted requests are lost, too.
    was_queue_missing: bool,
}

impl OnConnection {
    fn new(to_send: VecDeque<u64>) -> Self {
        OnConnection {
            to_send,
            published: 0,
            unconfirmed: BTreeMap::new(),
            is_accepting: true,
            resend: None,
        }
    }

    /// The resend that is due next; a new one if there is none.
    fn schedule_resend(&mut self, now: Instant) -> &mut Resend {
        self.resend.get_or_insert(Resend {
            at: now + RESEND_DELAY,
            was_queue_missing: false,
        })
    }

    /// Takes the calls of these requests from the unconfirmed ones.
    fn take_confirmed(&mut self, confirmation: Confirmation) -> Vec<u64> {
        if confirmation.first == confirmation.last {
            return Vec::from_iter(self.unconfirmed.remove(&confirmation.last));
        }
        let mut indexes = Vec::new();
        while let Some((&tag, &index)) = self.unconfirmed.range(confirmation.first..).next() {
            if tag > confirmation.last {
                break;
            }
            self.unconfirmed.remove(&tag);
            indexes.push(index);
        }
        indexes
    }
}

impl<T> PendingCalls<T> {
    pub(crate) fn new(expects_queue: bool) -> Self {
        PendingCalls {
            calls: BTreeMap::new(),
            index_of: HashMap::new(),
            begun: 0,
            answered: 0,
            expects_queue,
            connection: OnConnection::new(VecDeque::new()),
        }
    }

    /// Begins a call, whose request is unsent.
    pub(crate) fn begin(&mut self, id: Uuid, request: Request<T>, deadline: Deadline) {
        let index = self.begun;
        let call = Call {
            index,
            id,
            request,
            deadline,
            sends: 0,
            first_sent: None,
            ahead: self.calls.len(),
            answered_before: self.answered,
            may_have_run: false,
            state: RequestState::NEW,
        };
        self.begun += 1;
        self.index_of.insert(id, index);
        self.connection.to_send.push_back(index);
        self.calls.insert(index, call);
    }

    pub(crate) fn len(&self) -> usize {
        self.calls.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.calls.is_empty()
    }

    /// Whether the request of a pending call may be unsent.
    pub(crate) fn has_unsent(&self) -> bool {
        !self.connection.to_send.is_empty()
    }

    /// Whether the request of any pending call was ever sent.
    pub(crate) fn was_any_sent(&self) -> bool {
        self.calls.values().any(|call| call.sends > 0)
    }

    /// There is a new connection, the first or another one: all calls are unsent on it.
    pub(crate) fn on_new_connection(&mut self) {
        for call in self.calls.values_mut() {
            call.may_have_run |= call.sends > 0;
            call.state = call.state.after(StateEvent::NewConnection);
        }
        self.connection = OnConnection::new(self.calls.keys().copied().collect());
    }

    /// Publishes the request of the next unsent call by `publish`. A request that cannot be
    /// published ends its call, which is returned with the error. `None` if no call is unsent, or
    /// while the broker confirms nothing.
    pub(crate) fn publish_next<E>(
        &mut self,
        now: Instant,
        publish: impl FnOnce(&Call<T>) -> Result<(), E>,
    ) -> Option<SendResult<T, E>> {
        if self.connection.unconfirmed.len() > 2 * self.calls.len() + MAX_UNCONFIRMED {
            return None;
        }
        let call = loop {
            let index = self.connection.to_send.pop_front()?;
            if let Some(call) = self.calls.get_mut(&index) {
                break call;
            }
        };
        if let Err(error) = publish(call) {
            let id = call.id;
            return self.remove(id).map(|call| SendResult::Failed(call, error));
        }
        call.sends += 1;
        call.first_sent.get_or_insert(now);
        call.state = call.state.after(StateEvent::Published);
        self.connection.published += 1;
        let tag = self.connection.published;
        self.connection.unconfirmed.insert(tag, call.index);
        Some(SendResult::Sent)
    }

    /// Makes the requests that are to be resent unsent, if their resend is due. Not those whose
    /// deadline is near and that no queue has taken: the broker might not say in time that there is
    /// none, and then nobody knows whether the call has run.
    pub(crate) fn on_timer(&mut self, now: Instant) {
        let Some(resend) = self.connection.resend.take_if(|resend| resend.at <= now) else {
            return;
        };
        let event = StateEvent::ResendDue {
            was_queue_missing: resend.was_queue_missing,
        };
        for call in self.calls.values_mut() {
            let state = call.state.after(event);
            let is_late = call.deadline.remaining_at(now) <= RESEND_DELAY;
            if state != call.state && !(is_late && call.was_never_accepted()) {
                call.state = state;
                self.connection.to_send.push_back(call.index);
            }
        }
    }

    /// Whether the queue takes further calls, as far as is known. If it does not, one call at a
    /// time tries it.
    pub(crate) fn accepts_calls(&self) -> bool {
        let is_tried = || {
            self.calls
                .values()
                .any(|call| call.state != RequestState::Accepted)
        };
        self.connection.is_accepting || (self.connection.resend.is_none() && !is_tried())
    }

    /// Ends the call that a reply belongs to. `None` if it belongs to no pending call.
    pub(crate) fn on_reply(&mut self, correlation_id: Option<&[u8]>) -> Option<Call<T>> {
        let id = Uuid::try_parse_ascii(correlation_id?).ok()?;
        let call = self.remove(id)?;
        self.answered += 1;
        self.expects_queue = true;
        self.connection.is_accepting = true;
        Some(call)
    }

    /// Whether a reply with this correlation id is of another caller, or of a server that does not
    /// copy the id: no call of this run has ended that may have had the id.
    pub(crate) fn is_foreign(&self, correlation_id: Option<&[u8]>) -> bool {
        let is_ours = correlation_id.is_some_and(|id| Uuid::try_parse_ascii(id).is_ok());
        !is_ours || self.begun == self.calls.len() as u64
    }

    /// Number of the calls whose requests are unconfirmed.
    pub(crate) fn unconfirmed_count(&self) -> usize {
        self.calls
            .values()
            .filter(|call| call.is_unconfirmed())
            .count()
    }

    /// The broker returned a request: there is no queue. `None` if it belongs to no pending call.
    pub(crate) fn on_return(
        &mut self,
        correlation_id: Option<&[u8]>,
        now: Instant,
    ) -> Option<AfterReturn<T>> {
        let id = Uuid::try_parse_ascii(correlation_id?).ok()?;
        let call = self.calls.get_mut(self.index_of.get(&id)?)?;
        call.state = call.state.after(StateEvent::Return);
        let is_first = call.sends == 1 && !self.expects_queue;
        self.on_missing_queue(now);
        if is_first {
            return self.remove(id).map(AfterReturn::Ended);
        }
        self.connection.is_accepting = false;
        Some(AfterReturn::WillResend)
    }

    /// The queue does not exist. The requests that a queue had accepted may be gone with it.
    pub(crate) fn on_missing_queue(&mut self, now: Instant) {
        self.connection.schedule_resend(now).was_queue_missing = true;
    }

    /// A queue has taken these requests, unless they were returned before.
    pub(crate) fn on_ack(&mut self, confirmation: Confirmation) {
        for index in self.connection.take_confirmed(confirmation) {
            let Some(call) = self.calls.get_mut(&index) else {
                continue;
            };
            if let RequestState::Unconfirmed { .. } = call.state {
                call.state = call.state.after(StateEvent::Ack);
                call.may_have_run = true;
                self.connection.is_accepting = true;
            }
        }
    }

    /// The queue has not taken these requests. Returns the calls that end: those of which the
    /// request before was nacked, too, and none was taken.
    pub(crate) fn on_nack(&mut self, confirmation: Confirmation, now: Instant) -> Vec<Call<T>> {
        let mut ended = Vec::new();
        for index in self.connection.take_confirmed(confirmation) {
            let Some(call) = self.calls.get_mut(&index) else {
                continue;
            };
            let is_second = call.state == RequestState::Unconfirmed { was_nacked: true };
            call.state = call.state.after(StateEvent::Nack);
            self.connection.is_accepting = false;
            if is_second && !call.may_have_run {
                let id = call.id;
                ended.extend(self.remove(id));
            }
            self.connection.schedule_resend(now);
        }
        ended
    }

    /// The broker has refused a request because of its size, but does not say which one: ends the
    /// call of the largest unconfirmed request. It is too large, whether or not it is the refused
    /// one.
    pub(crate) fn pop_too_large(&mut self) -> Option<Call<T>> {
        let unconfirmed = self.calls.values().filter(|call| call.is_unconfirmed());
        let id = unconfirmed.max_by_key(|call| call.request.body.len())?.id;
        self.remove(id)
    }

    fn remove(&mut self, id: Uuid) -> Option<Call<T>> {
        let index = self.index_of.remove(&id)?;
        let call = self.calls.remove(&index);
        // While the broker blocks us nothing is sent, and the calls that expire must not stay here.
        let to_send = &mut self.connection.to_send;
        while to_send
            .front()
            .is_some_and(|index| !self.calls.contains_key(index))
        {
            to_send.pop_front();
        }
        call
    }

    /// The deadline that passes first.
    pub(crate) fn first_deadline(&self) -> Option<Deadline> {
        self.calls.first_key_value().map(|(_, call)| call.deadline)
    }

    /// The deadline of connecting. Before anything is sent, it is the first of the calls: a broker
    /// that is not reached by then ends the run. After that it is the last: the calls that expire
    /// earlier are reported while we connect.
    ///
    /// # Panics
    /// If no call is pending.
    pub(crate) fn connect_deadline(&self) -> Deadline {
        let mut calls = self.calls.values();
        let call = if self.was_any_sent() {
            calls.next_back()
        } else {
            calls.next()
        };
        call.expect("a call is pending").deadline
    }

    /// Instant of the next deadline or resend, whichever comes first.
    pub(crate) fn next_timer(&self) -> Option<Instant> {
        let deadline = self.first_deadline().map(|deadline| deadline.instant());
        let resend = self.connection.resend.as_ref().map(|resend| resend.at);
        deadline.into_iter().chain(resend).min()
    }

    /// The progress of the calls when a session ends.
    pub(crate) fn progress(&self, was_connected: bool, now: Instant) -> CallProgress {
        match self.first_deadline() {
            None => CallProgress::NoCalls,
            Some(_) if self.was_any_sent() => CallProgress::Sent,
            Some(deadline) => CallProgress::NothingSent {
                was_connected,
                time_left: deadline.remaining_at(now),
            },
        }
    }

    /// Ends the oldest call.
    pub(crate) fn pop(&mut self) -> Option<Call<T>> {
        let id = self.calls.values().next()?.id;
        self.remove(id)
    }

    /// Number of calls that this one has waited for, if any was answered meanwhile.
    pub(crate) fn calls_ahead(&self, call: &Call<T>) -> usize {
        if self.answered > call.answered_before {
            call.ahead
        } else {
            0
        }
    }

    /// Ends a call whose deadline has passed.
    pub(crate) fn expire(&mut self, now: Instant) -> Option<Call<T>> {
        let deadline = self.first_deadline()?;
        if deadline.instant() > now {
            return None;
        }
        self.pop()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ID: Uuid = Uuid::from_u128(1);
    const OTHER: Uuid = Uuid::from_u128(2);

    /// Begins a call, and publishes its request this many times.
    fn begin(calls: &mut PendingCalls<()>, id: Uuid, sends: u32) -> Instant {
        let deadline = Deadline::after(Duration::from_secs(9));
        calls.begin(id, request(2), deadline);
        assert_eq!(publish(calls), Some(id));
        calls.calls.values_mut().next_back().unwrap().sends = sends;
        deadline.instant()
    }

    fn request(size: usize) -> Request<()> {
        Request {
            context: (),
            body: vec![0; size],
        }
    }

    /// Publishes the next unsent request. Returns its call.
    fn publish(calls: &mut PendingCalls<()>) -> Option<Uuid> {
        let mut id = None;
        let published = calls.publish_next(Instant::now(), |call| {
            id = Some(call.id);
            Ok::<_, ()>(())
        });
        published.and(id)
    }

    fn resend(calls: &mut PendingCalls<()>, now: Instant) -> Option<Uuid> {
        calls.on_timer(now);
        publish(calls)
    }

    fn text(id: Uuid) -> String {
        id.to_string()
    }

    #[test]
    fn a_reply_ends_its_call_and_a_second_one_is_unknown() {
        let mut calls = PendingCalls::new(false);
        begin(&mut calls, ID, 1);
        begin(&mut calls, OTHER, 1);
        assert_eq!(calls.on_reply(Some(text(ID).as_bytes())).unwrap().index, 0);
        assert!(calls.on_reply(Some(text(ID).as_bytes())).is_none());
        assert_eq!(calls.len(), 1);
    }

    #[test]
    fn unknown_ids_end_nothing() {
        let mut calls = PendingCalls::new(false);
        begin(&mut calls, ID, 1);
        for id in [
            None,
            Some(&b""[..]),
            Some(b"1"),
            Some(b"\xff"),
            Some(text(OTHER).as_bytes()),
        ] {
            assert!(calls.on_reply(id).is_none(), "{id:?}");
            assert!(calls.on_return(id, Instant::now()).is_none(), "{id:?}");
        }
        assert_eq!(calls.len(), 1);
    }

    #[test]
    fn the_return_of_a_first_request_ends_its_call() {
        let mut calls = PendingCalls::new(false);
        begin(&mut calls, ID, 1);
        let returned = calls.on_return(Some(text(ID).as_bytes()), Instant::now());
        assert!(matches!(returned, Some(AfterReturn::Ended(call)) if call.id == ID));
        assert!(calls.is_empty());
    }

    #[test]
    fn the_return_of_a_resent_request_is_tried_again_after_a_while() {
        let mut calls = PendingCalls::new(false);
        begin(&mut calls, ID, 2);
        let now = Instant::now();
        let returned = calls.on_return(Some(text(ID).as_bytes()), now);
        assert!(matches!(returned, Some(AfterReturn::WillResend)));
        assert_eq!(calls.next_timer(), Some(now + RESEND_DELAY));
        assert!(resend(&mut calls, now).is_none());
        assert_eq!(resend(&mut calls, now + RESEND_DELAY), Some(ID));
        assert!(
            resend(&mut calls, now + RESEND_DELAY).is_none(),
            "once for each return"
        );
        assert!(calls.on_return(Some(text(ID).as_bytes()), now).is_some());
        calls.on_reply(Some(text(ID).as_bytes())).unwrap();
        assert!(
            resend(&mut calls, now + RESEND_DELAY).is_none(),
            "an answered call is not sent again"
        );
    }

    /// The broker's confirmation of one request, by its number on the connection.
    fn one(number: u64) -> Confirmation {
        Confirmation {
            first: number,
            last: number,
            is_ack: true,
        }
    }

    #[test]
    fn after_an_answer_a_return_means_that_the_queue_is_away_and_no_call_begins_until_it_is_back() {
        let mut calls = PendingCalls::new(false);
        let now = Instant::now();
        begin(&mut calls, OTHER, 1);
        calls.on_reply(Some(text(OTHER).as_bytes())).unwrap();
        begin(&mut calls, ID, 1);
        assert!(calls.accepts_calls());
        assert!(matches!(
            calls.on_return(Some(text(ID).as_bytes()), now),
            Some(AfterReturn::WillResend)
        ));
        calls.on_ack(one(2)); // the broker confirms what it returned
        assert!(!calls.accepts_calls());
        assert_eq!(resend(&mut calls, now + RESEND_DELAY), Some(ID));
        assert!(!calls.accepts_calls(), "one call tries the queue");
        calls.on_ack(one(3));
        assert!(calls.accepts_calls());
    }

    #[test]
    fn what_a_queue_had_taken_is_sent_again_after_it_was_missing() {
        let mut calls = PendingCalls::new(false);
        let now = Instant::now();
        for id in [ID, OTHER] {
            begin(&mut calls, id, 1);
        }
        calls.on_ack(one(1));
        calls.on_missing_queue(now);
        assert_eq!(resend(&mut calls, now + RESEND_DELAY), Some(ID));
        assert!(
            publish(&mut calls).is_none(),
            "the other one is not confirmed yet"
        );
    }

    #[test]
    fn a_first_nack_is_sent_again_and_the_second_in_a_row_ends_the_call_unless_it_may_have_run() {
        let mut calls = PendingCalls::new(false);
        let now = Instant::now();
        begin(&mut calls, OTHER, 1);
        calls.on_new_connection(); // so it may have run
        publish(&mut calls).unwrap();
        begin(&mut calls, ID, 1);
        let both = |first| Confirmation {
            first,
            last: first + 1,
            is_ack: false,
        };
        assert!(calls.on_nack(both(1), now).is_empty());
        assert!(!calls.accepts_calls());
        let later = now + RESEND_DELAY;
        assert_eq!(resend(&mut calls, later), Some(OTHER));
        assert_eq!(publish(&mut calls), Some(ID));
        let ended = calls.on_nack(both(3), later);
        assert_eq!(ended.iter().map(|call| call.id).collect::<Vec<_>>(), [ID]);
        assert_eq!(resend(&mut calls, later + RESEND_DELAY), Some(OTHER));
    }

    #[test]
    fn nacks_with_a_return_in_between_are_not_in_a_row() {
        let mut calls = PendingCalls::new(true);
        let mut now = Instant::now();
        begin(&mut calls, ID, 1);
        for tag in [1, 3] {
            assert!(calls.on_nack(one(tag), now).is_empty());
            now += RESEND_DELAY;
            assert_eq!(resend(&mut calls, now), Some(ID));
            assert!(calls.on_return(Some(text(ID).as_bytes()), now).is_some());
            calls.on_ack(one(tag + 1));
            now += RESEND_DELAY;
            assert_eq!(resend(&mut calls, now), Some(ID));
        }
    }

    #[test]
    fn what_no_queue_has_taken_is_not_sent_again_in_its_last_moment() {
        let mut calls = PendingCalls::new(true);
        let deadline = begin(&mut calls, ID, 1);
        let late = deadline.checked_sub(RESEND_DELAY + Duration::from_millis(1));
        assert!(calls
            .on_return(Some(text(ID).as_bytes()), late.unwrap())
            .is_some());
        assert!(resend(&mut calls, late.unwrap() + RESEND_DELAY).is_none());
        assert!(calls.expire(deadline).unwrap().was_never_accepted());
    }

    #[test]
    fn the_largest_request_that_was_sent_and_not_taken_is_the_one_that_is_too_large() {
        let mut calls = PendingCalls::new(false);
        for (number, size) in [(1, 40), (2, 10), (3, 30), (4, 20), (5, 50)] {
            let deadline = Deadline::after(Duration::from_secs(9));
            calls.begin(Uuid::from_u128(number), request(size), deadline);
        }
        assert!(calls.pop_too_large().is_none(), "none is sent");
        for _ in 1..5 {
            publish(&mut calls).unwrap();
        }
        calls.on_ack(one(1)); // so the queue has taken the one of 40 bytes
        let mut sizes =
            std::iter::from_fn(|| calls.pop_too_large().map(|call| call.request.body.len()));
        assert_eq!(sizes.by_ref().take(3).collect::<Vec<_>>(), [30, 20, 10]);
        assert!(sizes.next().is_none());
    }

    #[test]
    fn a_queue_that_confirms_nothing_gets_no_requests_without_end() {
        let mut calls = PendingCalls::new(false);
        let mut sent = 0;
        for number in 0..10_000 {
            assert!(calls.accepts_calls(), "calls begin and expire as usual");
            let request = Request {
                context: (),
                body: Vec::new(),
            };
            calls.begin(
                Uuid::from_u128(number),
                request,
                Deadline::after(Duration::ZERO),
            );
            sent += usize::from(publish(&mut calls).is_some());
            calls.expire(Instant::now()).unwrap();
        }
        assert!(
            (MAX_UNCONFIRMED..MAX_UNCONFIRMED + 10).contains(&sent),
            "{sent}"
        );
    }

    #[test]
    fn one_call_at_a_time_tries_a_queue_that_refuses_requests() {
        let mut calls = PendingCalls::new(false);
        let now = Instant::now();
        begin(&mut calls, ID, 1);
        calls.on_nack(one(1), now);
        calls.pop().unwrap();
        assert!(!calls.accepts_calls(), "not before the delay has passed");
        assert!(resend(&mut calls, now + RESEND_DELAY).is_none());
        assert!(calls.accepts_calls());
        begin(&mut calls, OTHER, 1);
        assert!(!calls.accepts_calls());
    }

    #[test]
    fn calls_that_end_before_they_are_sent_leave_nothing_behind() {
        let mut calls = PendingCalls::new(false);
        for number in 0..100 {
            let request = Request {
                context: (),
                body: Vec::new(),
            };
            calls.begin(
                Uuid::from_u128(number),
                request,
                Deadline::after(Duration::ZERO),
            );
            assert!(calls.expire(Instant::now()).is_some());
        }
        assert!(calls.connection.to_send.is_empty());
    }

    #[test]
    fn a_confirmation_of_several_requests_ends_with_its_number() {
        let mut calls = PendingCalls::new(false);
        for number in 1..=3 {
            begin(&mut calls, Uuid::from_u128(number), 1);
        }
        calls.on_ack(Confirmation {
            first: 1,
            last: 2,
            is_ack: true,
        });
        let has_run = calls
            .calls
            .values()
            .map(|call| call.may_have_run)
            .collect::<Vec<_>>();
        assert_eq!(has_run, [true, true, false]);
    }

    #[test]
    fn a_request_that_cannot_be_published_ends_its_call_and_leaves_its_number_to_the_next_one() {
        let mut calls = PendingCalls::new(false);
        begin(&mut calls, OTHER, 1);
        calls.begin(ID, request(2), Deadline::after(Duration::from_secs(9)));
        let failed = calls.publish_next(Instant::now(), |_| Err("too large"));
        assert!(matches!(failed, Some(SendResult::Failed(call, "too large")) if call.id == ID));
        let third = Uuid::from_u128(3);
        begin(&mut calls, third, 1);
        calls.on_ack(one(2));
        let has_run = calls
            .calls
            .values()
            .map(|call| (call.id, call.may_have_run))
            .collect::<Vec<_>>();
        assert_eq!(has_run, [(OTHER, false), (third, true)]);
    }

    #[test]
    fn calls_expire_in_their_order_and_not_before_their_time() {
        let mut calls = PendingCalls::new(false);
        let begun = Instant::now();
        let first = begin(&mut calls, ID, 1);
        let second = begin(&mut calls, OTHER, 1);
        assert_eq!(calls.next_timer(), Some(first));
        assert!(calls.expire(begun).is_none());
        assert_eq!(calls.expire(second).unwrap().id, ID);
        assert_eq!(calls.expire(second).unwrap().id, OTHER);
        assert!(calls.expire(second).is_none());
        assert!(calls.is_empty());
        assert!(
            calls.on_reply(Some(text(ID).as_bytes())).is_none(),
            "an expired call has ended"
        );
    }

    #[test]
    fn events_change_the_state_as_the_table_of_this_file_says() {
        use RequestState::{Accepted, ToResend, Unconfirmed, Unsent};
        let resend = |was_queue_missing| StateEvent::ResendDue { was_queue_missing };
        for was_nacked in [false, true] {
            let [unsent, unconfirmed, to_resend] = [
                Unsent { was_nacked },
                Unconfirmed { was_nacked },
                ToResend { was_nacked },
            ];
            let returned = ToResend { was_nacked: false };
            let nacked = ToResend { was_nacked: true };
            let before = [unsent, unconfirmed, Accepted, to_resend];
            for (event, after) in [
                (
                    StateEvent::Published,
                    [unconfirmed, unconfirmed, Accepted, to_resend],
                ),
                (StateEvent::Ack, [unsent, Accepted, Accepted, to_resend]),
                (StateEvent::Nack, [unsent, nacked, Accepted, to_resend]),
                (StateEvent::Return, [unsent, returned, returned, to_resend]),
                (resend(false), [unsent, unconfirmed, Accepted, unsent]),
                (
                    resend(true),
                    [unsent, unconfirmed, RequestState::NEW, unsent],
                ),
                (StateEvent::NewConnection, [RequestState::NEW; 4]),
            ] {
                assert_eq!(before.map(|state| state.after(event)), after, "{event:?}");
            }
        }
    }

    /// Something that happens to the calls; a number picks one of those that have begun.
    #[derive(Clone, Debug)]
    enum Step {
        Begin,
        Reply(usize),
        Return(usize),
        /// The connection breaks, and all that is unanswered is sent again on a new one.
        Loss,
        /// Milliseconds go by.
        Wait(u64),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            Just(Step::Begin),
            (0usize..6).prop_map(Step::Reply),
            (0usize..6).prop_map(Step::Return),
            Just(Step::Loss),
            (0u64..4_000).prop_map(Step::Wait),
        ]
    }

    /// What a call ought to be.
    struct Expected {
        id: Uuid,
        deadline: Instant,
        sends: u32,
        has_ended: bool,
    }

    proptest! {
        /// Whatever happens, in whatever order: a call ends once, by its first reply, by the return
        /// of a request that was sent once in a run without an answer, or at its deadline; and it
        /// is not sent again after that.
        #[test]
        fn every_call_ends_once(steps in proptest::collection::vec(step(), 0..60)) {
            let mut calls = PendingCalls::new(false);
            let mut model: Vec<Expected> = Vec::new();
            let mut was_answered = false;
            let mut now = Instant::now();
            let last = [Step::Wait(10_000)];
            for step in steps.iter().chain(&last) {
                match *step {
                    Step::Begin => {
                        let id = Uuid::from_u128(model.len() as u128);
                        let deadline = begin(&mut calls, id, 1);
                        model.push(Expected { id, deadline, sends: 1, has_ended: false });
                    }
                    Step::Reply(nth) => if let Some(call) = model.get_mut(nth) {
                        let ended = calls.on_reply(Some(text(call.id).as_bytes()));
                        prop_assert_eq!(ended.map(|ended| ended.id), (!call.has_ended).then_some(call.id));
                        was_answered |= !call.has_ended;
                        call.has_ended = true;
                    }
                    Step::Return(nth) => if let Some(call) = model.get_mut(nth) {
                        match calls.on_return(Some(text(call.id).as_bytes()), now) {
                            None => prop_assert!(call.has_ended),
                            Some(AfterReturn::WillResend) => {
                                prop_assert!(!call.has_ended && (call.sends > 1 || was_answered));
                            }
                            Some(AfterReturn::Ended(ended)) => {
                                prop_assert!(!call.has_ended && call.sends == 1 && !was_answered);
                                prop_assert_eq!(ended.id, call.id);
                                call.has_ended = true;
                            }
                        }
                    }
                    Step::Loss => {
                        calls.on_new_connection();
                        while publish(&mut calls).is_some() {}
                        for call in model.iter_mut().filter(|call| !call.has_ended) {
                            call.sends += 1;
                        }
                    }
                    Step::Wait(millis) => {
                        now += Duration::from_millis(millis);
                        while let Some(ended) = calls.expire(now) {
                            let call = model.iter_mut().find(|call| call.id == ended.id).unwrap();
                            prop_assert!(!call.has_ended && call.deadline <= now);
                            call.has_ended = true;
                        }
                        calls.on_timer(now);
                        while let Some(id) = publish(&mut calls) {
                            let call = model.iter_mut().find(|call| call.id == id).unwrap();
                            prop_assert!(!call.has_ended && (call.sends > 1 || was_answered));
                            call.sends += 1;
                        }
                        let late = |call: &Expected| !call.has_ended && call.deadline <= now;
                        prop_assert!(!model.iter().any(late));
                    }
                }
                prop_assert_eq!(calls.len(), model.iter().filter(|call| !call.has_ended).count());
            }
        }
    }
}
