//! The calls in hand: which are unanswered, and what a reply, a return or the time does to them.
//!
//! Pure state: no socket, and no clock but the instants that are passed in.

use crate::client::Request;
use rpc_common::deadline::Deadline;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::{Duration, Instant};
use uuid::Uuid;

/// How long a returned request waits before it is sent again.
const RESEND: Duration = Duration::from_millis(250);

/// A **call** is a request and the wait for its answer.
#[derive(Debug)]
pub(crate) struct Call {
    /// Its place in the order in which the calls of a run begin.
    pub(crate) index: u64,
    /// The correlation id. It stays the same however often the request is sent.
    pub(crate) id: Uuid,
    pub(crate) request: Request,
    pub(crate) deadline: Deadline,
    /// How often the request was sent.
    pub(crate) sends: u32,
    /// When it was sent first.
    pub(crate) first_sent: Option<Instant>,
}

impl Call {
    /// Takes note that the request is sent.
    pub(crate) fn sent(&mut self, now: Instant) {
        self.sends += 1;
        self.first_sent.get_or_insert(now);
    }
}

/// What becomes of a call whose request was returned.
#[derive(Debug)]
pub(crate) enum Returned {
    /// It has ended: nobody serves.
    Ended(Call),
    /// Its request was sent before, when it had a queue, which may come back: it is sent again.
    SentAgain,
}

/// The calls that have begun and not ended.
#[derive(Debug, Default)]
pub(crate) struct Calls {
    /// By index; as all calls have the same limit, this is the order of their deadlines too.
    unanswered: BTreeMap<u64, Call>,
    index_of: HashMap<Uuid, u64>,
    /// Returned requests that are to be sent again, and when.
    resends: VecDeque<(Instant, u64)>,
    begun: u64,
}

impl Calls {
    /// Begins a call and returns it, to be sent.
    pub(crate) fn begin(&mut self, id: Uuid, request: Request, deadline: Deadline) -> &mut Call {
        let index = self.begun;
        self.begun += 1;
        self.index_of.insert(id, index);
        let call = Call { index, id, request, deadline, sends: 0, first_sent: None };
        self.unanswered.entry(index).or_insert(call)
    }

    /// How many calls are in hand.
    pub(crate) fn len(&self) -> usize {
        self.unanswered.len()
    }

    /// Whether no call is in hand.
    pub(crate) fn is_empty(&self) -> bool {
        self.unanswered.is_empty()
    }

    /// Whether a request of any call in hand has been sent.
    pub(crate) fn any_sent(&self) -> bool {
        self.unanswered.values().any(|call| call.sends > 0)
    }

    /// All that has to be sent, or sent again, on a new connection.
    pub(crate) fn outgoing(&mut self) -> impl Iterator<Item = &mut Call> {
        self.resends.clear();
        self.unanswered.values_mut()
    }

    /// A returned request that is to be sent again by now, if there is one.
    pub(crate) fn resend_due(&mut self, now: Instant) -> Option<&mut Call> {
        while self.resends.front().is_some_and(|(when, _)| *when <= now) {
            let (_, index) = self.resends.pop_front()?;
            if self.unanswered.contains_key(&index) {
                return self.unanswered.get_mut(&index);
            }
        }
        None
    }

    /// The call that a reply ends. None if it is of a call that is not in hand: an unknown one, or
    /// one that has ended.
    pub(crate) fn on_reply(&mut self, correlation_id: Option<&str>) -> Option<Call> {
        let id = Uuid::try_parse(correlation_id?).ok()?;
        let index = self.index_of.remove(&id)?;
        self.unanswered.remove(&index)
    }

    /// What a returned request does: there is no queue to carry it. None if it is of a call that is not
    /// in hand.
    pub(crate) fn on_return(
        &mut self,
        correlation_id: Option<&str>,
        now: Instant,
    ) -> Option<Returned> {
        let id = Uuid::try_parse(correlation_id?).ok()?;
        let call = self.unanswered.get(self.index_of.get(&id)?)?;
        if call.sends > 1 {
            self.resends.push_back((now + RESEND, call.index));
            return Some(Returned::SentAgain);
        }
        self.on_reply(correlation_id).map(Returned::Ended)
    }

    /// The deadline that passes next.
    pub(crate) fn next_deadline(&self) -> Option<Deadline> {
        self.unanswered.first_key_value().map(|(_, call)| call.deadline)
    }

    /// The deadline that passes last.
    pub(crate) fn last_deadline(&self) -> Option<Deadline> {
        self.unanswered.last_key_value().map(|(_, call)| call.deadline)
    }

    /// When the time alone will do something next: a call expires, or a request is sent again.
    pub(crate) fn next_event(&self) -> Option<Instant> {
        let deadline = self.next_deadline().map(|deadline| deadline.instant());
        let resend = self.resends.front().map(|(when, _)| *when);
        deadline.into_iter().chain(resend).min()
    }

    /// Any call, which thereby ends.
    pub(crate) fn pop(&mut self) -> Option<Call> {
        let (_, call) = self.unanswered.pop_first()?;
        self.index_of.remove(&call.id);
        Some(call)
    }

    /// A call that has run out of time by now, if there is one.
    pub(crate) fn expire(&mut self, now: Instant) -> Option<Call> {
        let (_, first) = self.unanswered.first_key_value()?;
        if first.deadline.instant() > now {
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

    fn begin(calls: &mut Calls, id: Uuid, sends: u32) -> Instant {
        let request = Request { tag: 0, body: b"30".to_vec() };
        let call = calls.begin(id, request, Deadline::after(Duration::from_secs(9)));
        call.sends = sends;
        call.deadline.instant()
    }

    fn text(id: Uuid) -> String {
        id.to_string()
    }

    #[test]
    fn a_reply_ends_its_call_and_a_second_one_is_unknown() {
        let mut calls = Calls::default();
        begin(&mut calls, ID, 1);
        begin(&mut calls, OTHER, 1);
        assert_eq!(calls.on_reply(Some(&text(ID))).unwrap().index, 0);
        assert!(calls.on_reply(Some(&text(ID))).is_none());
        assert_eq!(calls.len(), 1);
    }

    #[test]
    fn unknown_ids_end_nothing() {
        let mut calls = Calls::default();
        begin(&mut calls, ID, 1);
        for id in [None, Some(""), Some("1"), Some(text(OTHER).as_str())] {
            assert!(calls.on_reply(id).is_none(), "{id:?}");
            assert!(calls.on_return(id, Instant::now()).is_none(), "{id:?}");
        }
        assert_eq!(calls.len(), 1);
    }

    #[test]
    fn the_return_of_a_first_request_ends_its_call() {
        let mut calls = Calls::default();
        begin(&mut calls, ID, 1);
        let returned = calls.on_return(Some(&text(ID)), Instant::now());
        assert!(matches!(returned, Some(Returned::Ended(call)) if call.id == ID));
        assert!(calls.is_empty());
    }

    #[test]
    fn the_return_of_a_resent_request_is_tried_again_after_a_while() {
        let mut calls = Calls::default();
        begin(&mut calls, ID, 2);
        let now = Instant::now();
        let returned = calls.on_return(Some(&text(ID)), now);
        assert!(matches!(returned, Some(Returned::SentAgain)));
        assert_eq!(calls.next_event(), Some(now + RESEND));
        assert!(calls.resend_due(now).is_none());
        assert_eq!(calls.resend_due(now + RESEND).unwrap().id, ID);
        assert!(calls.resend_due(now + RESEND).is_none(), "once for each return");
        assert!(calls.on_return(Some(&text(ID)), now).is_some());
        calls.on_reply(Some(&text(ID))).unwrap();
        assert!(calls.resend_due(now + RESEND).is_none(), "an answered call is not sent again");
    }

    #[test]
    fn calls_expire_in_their_order_and_not_before_their_time() {
        let mut calls = Calls::default();
        let begun = Instant::now();
        let first = begin(&mut calls, ID, 1);
        let second = begin(&mut calls, OTHER, 1);
        assert_eq!(calls.next_event(), Some(first));
        assert!(calls.expire(begun).is_none());
        assert_eq!(calls.expire(second).unwrap().id, ID);
        assert_eq!(calls.expire(second).unwrap().id, OTHER);
        assert!(calls.expire(second).is_none());
        assert!(calls.is_empty());
        assert!(calls.on_reply(Some(&text(ID))).is_none(), "an expired call has ended");
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
        /// Whatever happens, in whatever order: a call ends once, by its first reply, by the return of
        /// a request that was sent once, or at its deadline; and it is not sent again after that.
        #[test]
        fn every_call_ends_once(events in proptest::collection::vec(event(), 0..60)) {
            let mut calls = Calls::default();
            let mut model: Vec<Expected> = Vec::new();
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
                        let ended = calls.on_reply(Some(&text(call.id)));
                        prop_assert_eq!(ended.map(|ended| ended.id), (!call.has_ended).then_some(call.id));
                        call.has_ended = true;
                    }
                    Event::Return(nth) => if let Some(call) = model.get_mut(nth) {
                        match calls.on_return(Some(&text(call.id)), now) {
                            None => prop_assert!(call.has_ended),
                            Some(Returned::SentAgain) => prop_assert!(!call.has_ended && call.sends > 1),
                            Some(Returned::Ended(ended)) => {
                                prop_assert!(!call.has_ended && call.sends == 1 && ended.id == call.id);
                                call.has_ended = true;
                            }
                        }
                    }
                    Event::Loss => {
                        for call in calls.outgoing() {
                            call.sent(now);
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
                        while let Some(again) = calls.resend_due(now) {
                            again.sent(now);
                            let call = model.iter_mut().find(|call| call.id == again.id).unwrap();
                            prop_assert!(!call.has_ended && call.sends > 1);
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
