//! The pending calls: which are unanswered, and what a reply, a return or the time does to them.
//!
//! Pure: no socket, and no clock but the instants that are passed in.

use crate::call::Request;
use crate::retry::Progress;
use rpc_common::connection::{Confirmed, Deadline};
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::{Duration, Instant};
use std::{iter, mem};
use uuid::Uuid;

/// How many requests of ended calls may be unconfirmed. (A quorum queue without a majority confirms
/// nothing.) No more than a session may have unread, because the confirmations may arrive at once.
const MAX_UNCONFIRMED: usize = 1_000;

/// How long a request that was returned or refused waits before it is sent again.
const RESEND_DELAY: Duration = Duration::from_millis(250);

/// A look at the queue that takes longer does not show whether the queue was full when it refused a
/// request. (A durable classic queue refuses requests when its node dies, and the look hangs until
/// the node is back.)
const MAX_LOOK_TIME: Duration = Duration::from_secs(5);

/// A **call** is a request that waits for its reply.
#[derive(Debug)]
pub(crate) struct Call<T> {
    /// The number of the call in the order in which they begin.
    pub(crate) index: u64,
    /// The correlation id; the same each time the request is sent.
    pub(crate) id: Uuid,
    pub(crate) request: Request<T>,
    pub(crate) deadline: Deadline,
    /// How often the request was sent.
    pub(crate) sends: u32,
    pub(crate) first_sent: Option<Instant>,
    /// How many calls were in flight when it began, and how many had been answered.
    ahead: usize,
    answered_before: u64,
    /// Whether a queue has taken the request, or an earlier connection has ended with it.
    pub(crate) may_have_run: bool,
    fate: Fate,
}

/// What the broker did with the request that was sent last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Unknown,
    /// The queue has taken it (`basic.ack`).
    Accepted,
    /// No queue has taken it (`basic.return`, `basic.nack`): it is sent again.
    Lost,
    /// The queue has not taken it (`basic.nack`), and had taken no earlier one: it is full, or its
    /// process has died. A look at the queue decides, if it ends soon after this instant.
    Refused(Instant),
}

impl<T> Call<T> {
    /// Whether each of its requests was returned or refused: nothing ran.
    pub(crate) fn was_never_accepted(&self) -> bool {
        self.fate == Fate::Lost && !self.may_have_run
    }

    pub(crate) fn mark_sent(&mut self, now: Instant) {
        self.sends += 1;
        self.first_sent.get_or_insert(now);
    }
}

/// What the return of a request means for its call.
#[derive(Debug)]
pub(crate) enum Returned<T> {
    /// The call has ended: there is no request queue.
    Ended(Call<T>),
    /// The request will be sent again: there was a queue when it was sent before, and it may come
    /// back.
    WillResend,
}

/// The calls that have begun and not ended.
#[derive(Debug)]
pub(crate) struct PendingCalls<T> {
    /// By index. All calls have the same timeout, so this is also the order of their deadlines.
    calls: BTreeMap<u64, Call<T>>,
    index_of: HashMap<Uuid, u64>,
    /// The calls to send on this connection.
    to_send: VecDeque<u64>,
    begun: u64,
    /// How many requests have a number on this connection: the delivery tag of the broker's
    /// confirmation, from 1.
    numbered: u64,
    /// The calls whose requests the broker has neither taken nor refused, by the number of the
    /// request.
    unconfirmed: BTreeMap<u64, u64>,
    /// How many calls were answered.
    answered: u64,
    /// Whether a queue that does not exist is waited for, also by a call that finds none at first.
    waits_for_queue: bool,
    /// False from a request that was returned or refused until the queue takes one.
    is_accepted: bool,
    /// When to send again what was returned or refused; and, if the queue was missing, what it had
    /// taken before.
    resend_at: Option<Instant>,
    was_queue_missing: bool,
}

impl<T> PendingCalls<T> {
    pub(crate) fn new(waits_for_queue: bool) -> Self {
        PendingCalls {
            calls: BTreeMap::new(),
            index_of: HashMap::new(),
            to_send: VecDeque::new(),
            begun: 0,
            numbered: 0,
            unconfirmed: BTreeMap::new(),
            answered: 0,
            waits_for_queue,
            is_accepted: true,
            resend_at: None,
            was_queue_missing: false,
        }
    }

    /// Begins a call, whose request is to be sent.
    pub(crate) fn begin(&mut self, id: Uuid, request: Request<T>, deadline: Deadline) {
        let index = self.begun;
        let ahead = self.calls.len();
        let answered_before = self.answered;
        self.begun += 1;
        self.index_of.insert(id, index);
        self.to_send.push_back(index);
        self.calls.insert(
            index,
            Call {
                index,
                id,
                request,
                deadline,
                sends: 0,
                first_sent: None,
                ahead,
                answered_before,
                may_have_run: false,
                fate: Fate::Unknown,
            },
        );
    }

    pub(crate) fn len(&self) -> usize {
        self.calls.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.calls.is_empty()
    }

    /// Whether the request of any pending call was ever sent.
    pub(crate) fn was_any_sent(&self) -> bool {
        self.calls.values().any(|call| call.sends > 0)
    }

    /// There is a new connection, the first or another one: all pending calls are to be sent on it.
    pub(crate) fn send_all_again(&mut self) {
        for call in self.calls.values_mut() {
            call.may_have_run |= call.sends > 0;
        }
        self.numbered = 0;
        self.resend_at = None;
        self.was_queue_missing = false;
        self.is_accepted = true;
        self.unconfirmed.clear();
        self.to_send = self.calls.keys().copied().collect();
    }

    /// The next call to send. Its request gets the next number. None while the broker confirms
    /// nothing.
    pub(crate) fn next_to_send(&mut self) -> Option<&mut Call<T>> {
        if self.unconfirmed.len() > 2 * self.calls.len() + MAX_UNCONFIRMED {
            return None;
        }
        let calls = &self.calls;
        let index =
            iter::from_fn(|| self.to_send.pop_front()).find(|index| calls.contains_key(index))?;
        self.numbered += 1;
        self.unconfirmed.insert(self.numbered, index);
        let call = self.calls.get_mut(&index)?;
        call.fate = Fate::Unknown;
        Some(call)
    }

    /// The request of the call that [`next_to_send`](Self::next_to_send) has returned cannot be
    /// sent: ends the call. Its number is that of the next request.
    pub(crate) fn remove_unsent(&mut self, id: Uuid) -> Option<Call<T>> {
        self.unconfirmed.remove(&self.numbered);
        self.numbered -= 1;
        self.remove(id)
    }

    /// Sends again what is due.
    pub(crate) fn start_resends(&mut self, now: Instant) {
        if self.resend_at.is_none_or(|when| when > now) {
            return;
        }
        self.resend_at = None;
        let was_queue_missing = mem::take(&mut self.was_queue_missing);
        let is_lost = |call: &&mut Call<T>| match call.fate {
            Fate::Unknown | Fate::Refused(_) => false,
            Fate::Accepted => was_queue_missing,
            Fate::Lost => true,
        };
        for call in self.calls.values_mut().filter(|call| is_lost(call)) {
            call.fate = Fate::Unknown;
            self.to_send.push_back(call.index);
        }
    }

    /// Whether the queue takes further calls, as far as is known. If it does not, one call at a
    /// time tries it.
    pub(crate) fn accepts_calls(&self) -> bool {
        let is_tried = || self.calls.values().any(|call| call.fate != Fate::Accepted);
        self.is_accepted || (self.resend_at.is_none() && !is_tried())
    }

    /// Ends the call that a reply belongs to. `None` if it belongs to no pending call.
    pub(crate) fn on_reply(&mut self, correlation_id: Option<&[u8]>) -> Option<Call<T>> {
        let id = Uuid::try_parse_ascii(correlation_id?).ok()?;
        let call = self.remove(id)?;
        self.answered += 1;
        self.is_accepted = true;
        self.waits_for_queue = true;
        Some(call)
    }

    /// The broker returned a request: there is no queue. `None` if it belongs to no pending call.
    pub(crate) fn on_return(
        &mut self,
        correlation_id: Option<&[u8]>,
        now: Instant,
    ) -> Option<Returned<T>> {
        let id = Uuid::try_parse_ascii(correlation_id?).ok()?;
        let call = self.calls.get_mut(self.index_of.get(&id)?)?;
        call.fate = Fate::Lost;
        let is_first = call.sends == 1 && !self.waits_for_queue;
        self.on_missing_queue(now);
        if is_first {
            return self.remove(id).map(Returned::Ended);
        }
        self.is_accepted = false;
        Some(Returned::WillResend)
    }

    /// There is no queue. What it had taken before may be gone with it.
    pub(crate) fn on_missing_queue(&mut self, now: Instant) {
        self.was_queue_missing = true;
        self.resend_at.get_or_insert(now + RESEND_DELAY);
    }

    /// The broker has confirmed requests: these have reached a queue, unless they were returned
    /// before.
    pub(crate) fn on_ack(&mut self, confirmed: Confirmed) {
        for index in self.take_confirmed(confirmed) {
            if let Some(call) = self
                .calls
                .get_mut(&index)
                .filter(|call| call.fate == Fate::Unknown)
            {
                call.fate = Fate::Accepted;
                call.may_have_run = true;
                self.is_accepted = true;
            }
        }
    }

    /// The queue has not taken these requests. Returns whether to look at it, to learn whether it
    /// is full.
    pub(crate) fn on_nack(&mut self, refused: Confirmed, now: Instant) -> bool {
        let mut is_any_refused = false;
        for index in self.take_confirmed(refused) {
            if let Some(call) = self.calls.get_mut(&index) {
                call.fate = if call.may_have_run {
                    Fate::Lost
                } else {
                    Fate::Refused(now)
                };
                is_any_refused |= !call.may_have_run;
                self.is_accepted = false;
                self.resend_at.get_or_insert(now + RESEND_DELAY);
            }
        }
        is_any_refused
    }

    /// The queue was looked at: requests whose calls have not ended as refused are sent again.
    pub(crate) fn resend_refused(&mut self, now: Instant) {
        for call in self
            .calls
            .values_mut()
            .filter(|call| matches!(call.fate, Fate::Refused(_)))
        {
            call.fate = Fate::Lost;
            self.resend_at.get_or_insert(now + RESEND_DELAY);
        }
    }

    fn take_confirmed(&mut self, Confirmed { first, last, .. }: Confirmed) -> Vec<u64> {
        if first == last {
            return self.unconfirmed.remove(&last).into_iter().collect();
        }
        let mut confirmed = self.unconfirmed.split_off(&first);
        let mut later = confirmed.split_off(&last.saturating_add(1));
        self.unconfirmed.append(&mut later);
        confirmed.into_values().collect()
    }

    /// Ends a call whose request was refused a short time ago: the queue is full.
    pub(crate) fn pop_refused(&mut self, now: Instant) -> Option<Call<T>> {
        let is_new =
            |call: &&Call<T>| matches!(call.fate, Fate::Refused(at) if now < at + MAX_LOOK_TIME);
        let id = self.calls.values().find(is_new)?.id;
        self.remove(id)
    }

    /// The broker has refused a request because of its size, but does not say which one: ends the
    /// call whose request is the largest of those that the queue has not taken. It is too large,
    /// whether or not it is the refused one.
    pub(crate) fn pop_too_large(&mut self) -> Option<Call<T>> {
        let may_be_refused = |call: &&Call<T>| call.sends > 0 && call.fate == Fate::Unknown;
        let largest = self
            .calls
            .values()
            .filter(may_be_refused)
            .max_by_key(|call| call.request.body.len());
        let id = largest?.id;
        self.remove(id)
    }

    fn remove(&mut self, id: Uuid) -> Option<Call<T>> {
        let index = self.index_of.remove(&id)?;
        let call = self.calls.remove(&index);
        // While the broker blocks us nothing is sent, and the calls that expire must not stay here.
        while self
            .to_send
            .front()
            .is_some_and(|index| !self.calls.contains_key(index))
        {
            self.to_send.pop_front();
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
    /// When no call is pending.
    pub(crate) fn connect_deadline(&self) -> Deadline {
        let first = self.calls.values().next();
        let last = self.calls.values().next_back();
        let call = if self.was_any_sent() { last } else { first };
        call.expect("a call is pending").deadline
    }

    /// When a call expires or a request is to be sent again, whichever comes first.
    pub(crate) fn next_timer(&self) -> Option<Instant> {
        let deadline = self.first_deadline().map(|deadline| deadline.instant());
        deadline.into_iter().chain(self.resend_at).min()
    }

    /// How far the calls have come when a session ends.
    pub(crate) fn progress(&self, was_connected: bool) -> Progress {
        match self.first_deadline() {
            None => Progress::NoCalls,
            Some(_) if self.was_any_sent() => Progress::Sent,
            Some(deadline) => Progress::NothingSent {
                was_connected,
                time_left: deadline.remaining(),
            },
        }
    }

    /// Ends the oldest call.
    pub(crate) fn pop(&mut self) -> Option<Call<T>> {
        let id = self.calls.values().next()?.id;
        self.remove(id)
    }

    /// How many calls this one has waited for, if any was answered meanwhile.
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

    fn begin(calls: &mut PendingCalls<()>, id: Uuid, sends: u32) -> Instant {
        let request = Request {
            context: (),
            body: b"30".to_vec(),
        };
        let deadline = Deadline::after(Duration::from_secs(9));
        calls.begin(id, request, deadline);
        calls.next_to_send().unwrap().sends = sends;
        deadline.instant()
    }

    fn resend(calls: &mut PendingCalls<()>, now: Instant) -> Option<Uuid> {
        calls.start_resends(now);
        calls.next_to_send().map(|call| call.id)
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
        assert!(matches!(returned, Some(Returned::Ended(call)) if call.id == ID));
        assert!(calls.is_empty());
    }

    #[test]
    fn the_return_of_a_resent_request_is_tried_again_after_a_while() {
        let mut calls = PendingCalls::new(false);
        begin(&mut calls, ID, 2);
        let now = Instant::now();
        let returned = calls.on_return(Some(text(ID).as_bytes()), now);
        assert!(matches!(returned, Some(Returned::WillResend)));
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
    fn one(number: u64) -> Confirmed {
        Confirmed {
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
            Some(Returned::WillResend)
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
            calls.next_to_send().is_none(),
            "the other one is not confirmed yet"
        );
    }

    #[test]
    fn a_refused_request_ends_its_call_unless_it_may_have_run() {
        let mut calls = PendingCalls::new(false);
        let now = Instant::now();
        begin(&mut calls, OTHER, 1);
        calls.send_all_again();
        calls.next_to_send().unwrap().mark_sent(now);
        begin(&mut calls, ID, 1);
        assert!(!calls.on_nack(one(1), now));
        assert!(calls.pop_refused(now).is_none());
        assert!(calls.on_nack(one(2), now));
        assert!(!calls.accepts_calls());
        let slow_look = now + 2 * RESEND_DELAY;
        assert_eq!(
            resend(&mut calls, slow_look),
            Some(OTHER),
            "the first one waits for the look at the queue"
        );
        assert_eq!(calls.pop_refused(now).map(|call| call.id), Some(ID));
        assert!(calls.pop_refused(now).is_none());
    }

    #[test]
    fn a_request_whose_queue_was_looked_at_late_is_sent_again_and_may_be_refused_then() {
        let mut calls = PendingCalls::new(false);
        begin(&mut calls, ID, 1);
        let refused = Instant::now();
        assert!(calls.on_nack(one(1), refused));
        let late = refused + MAX_LOOK_TIME;
        assert!(calls.pop_refused(late).is_none());
        calls.resend_refused(late);
        let resent = late + RESEND_DELAY;
        calls.start_resends(resent);
        calls.next_to_send().unwrap().mark_sent(resent);
        assert!(calls.on_nack(one(2), resent));
        assert_eq!(calls.pop_refused(resent).map(|call| call.id), Some(ID));
    }

    #[test]
    fn a_request_that_a_queue_refuses_which_is_not_full_is_sent_again() {
        let mut calls = PendingCalls::new(false);
        let now = Instant::now();
        begin(&mut calls, ID, 1);
        assert!(calls.on_nack(one(1), now));
        assert!(resend(&mut calls, now + RESEND_DELAY).is_none());
        calls.resend_refused(now);
        assert_eq!(resend(&mut calls, now + RESEND_DELAY), Some(ID));
    }

    #[test]
    fn the_largest_request_that_was_sent_and_not_taken_is_the_one_that_is_too_large() {
        let mut calls = PendingCalls::new(false);
        for (number, size) in [(1, 40), (2, 10), (3, 30), (4, 20), (5, 50)] {
            let request = Request {
                context: (),
                body: vec![0; size],
            };
            calls.begin(
                Uuid::from_u128(number),
                request,
                Deadline::after(Duration::from_secs(9)),
            );
        }
        assert!(calls.pop_too_large().is_none(), "none is sent");
        for _ in 1..5 {
            calls.next_to_send().unwrap().mark_sent(Instant::now());
        }
        calls.on_ack(one(1)); // so the queue has taken the one of 40 bytes
        let mut sizes = iter::from_fn(|| calls.pop_too_large().map(|call| call.request.body.len()));
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
            sent += usize::from(calls.next_to_send().is_some());
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
        calls.pop_refused(now).unwrap();
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
        assert!(calls.to_send.is_empty());
    }

    #[test]
    fn a_confirmation_of_several_requests_ends_with_its_number() {
        let mut calls = PendingCalls::new(false);
        for number in 1..=3 {
            begin(&mut calls, Uuid::from_u128(number), 1);
        }
        calls.on_ack(Confirmed {
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
    fn a_request_that_cannot_be_sent_leaves_its_number_to_the_next_one() {
        let mut calls = PendingCalls::new(false);
        begin(&mut calls, OTHER, 1);
        begin(&mut calls, ID, 1);
        assert_eq!(calls.remove_unsent(ID).map(|call| call.id), Some(ID));
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

    /// Something that happens to the calls; a number picks one of those that have begun.
    #[derive(Clone, Debug)]
    enum Event {
        Begin,
        Reply(usize),
        Return(usize),
        /// The connection breaks, and all that is unanswered is sent again on a new one.
        Loss,
        /// Milliseconds go by.
        Wait(u64),
    }

    fn event() -> impl Strategy<Value = Event> {
        prop_oneof![
            Just(Event::Begin),
            (0usize..6).prop_map(Event::Reply),
            (0usize..6).prop_map(Event::Return),
            Just(Event::Loss),
            (0u64..4_000).prop_map(Event::Wait),
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
        fn every_call_ends_once(events in proptest::collection::vec(event(), 0..60)) {
            let mut calls = PendingCalls::new(false);
            let mut model: Vec<Expected> = Vec::new();
            let mut was_answered = false;
            let mut now = Instant::now();
            let last = [Event::Wait(10_000)];
            for event in events.iter().chain(&last) {
                match *event {
                    Event::Begin => {
                        let id = Uuid::from_u128(model.len() as u128);
                        let deadline = begin(&mut calls, id, 1);
                        model.push(Expected { id, deadline, sends: 1, has_ended: false });
                    }
                    Event::Reply(nth) => if let Some(call) = model.get_mut(nth) {
                        let ended = calls.on_reply(Some(text(call.id).as_bytes()));
                        prop_assert_eq!(ended.map(|ended| ended.id), (!call.has_ended).then_some(call.id));
                        was_answered |= !call.has_ended;
                        call.has_ended = true;
                    }
                    Event::Return(nth) => if let Some(call) = model.get_mut(nth) {
                        match calls.on_return(Some(text(call.id).as_bytes()), now) {
                            None => prop_assert!(call.has_ended),
                            Some(Returned::WillResend) => {
                                prop_assert!(!call.has_ended && (call.sends > 1 || was_answered));
                            }
                            Some(Returned::Ended(ended)) => {
                                prop_assert!(!call.has_ended && call.sends == 1 && !was_answered);
                                prop_assert_eq!(ended.id, call.id);
                                call.has_ended = true;
                            }
                        }
                    }
                    Event::Loss => {
                        calls.send_all_again();
                        while let Some(call) = calls.next_to_send() {
                            call.mark_sent(now);
                        }
                        for call in model.iter_mut().filter(|call| !call.has_ended) {
                            call.sends += 1;
                        }
                    }
                    Event::Wait(millis) => {
                        now += Duration::from_millis(millis);
                        while let Some(ended) = calls.expire(now) {
                            let call = model.iter_mut().find(|call| call.id == ended.id).unwrap();
                            prop_assert!(!call.has_ended && call.deadline <= now);
                            call.has_ended = true;
                        }
                        calls.start_resends(now);
                        while let Some(again) = calls.next_to_send() {
                            again.mark_sent(now);
                            let call = model.iter_mut().find(|call| call.id == again.id).unwrap();
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
