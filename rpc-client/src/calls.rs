//! The calls in hand: which are unanswered, and what a reply, a return or the time does to them.
//!
//! Pure state: no socket and no clock.

use rpc_common::deadline::Deadline;
use std::collections::{BTreeMap, HashMap};
use std::time::Instant;
use uuid::Uuid;

/// A **call** is a request and the wait for its answer.
#[derive(Debug)]
pub(crate) struct Call {
    /// The calls of a run are counted from 0, in the order in which they begin.
    pub(crate) index: u64,
    /// The correlation id. It stays the same however often the request is sent.
    pub(crate) id: Uuid,
    pub(crate) body: Vec<u8>,
    pub(crate) deadline: Deadline,
    /// How often the request was sent.
    pub(crate) sends: u32,
}

/// The calls that have begun and not ended.
#[derive(Debug, Default)]
pub(crate) struct Calls {
    /// By index; as all calls have the same limit, this is the order of their deadlines too.
    unanswered: BTreeMap<u64, Call>,
    index_of: HashMap<Uuid, u64>,
    begun: u64,
}

impl Calls {
    /// Begins a call and returns it, to be sent.
    pub(crate) fn begin(&mut self, id: Uuid, body: Vec<u8>, deadline: Deadline) -> &mut Call {
        let index = self.begun;
        self.begun += 1;
        self.index_of.insert(id, index);
        self.unanswered.entry(index).or_insert(Call { index, id, body, deadline, sends: 0 })
    }

    /// How many calls are in hand.
    pub(crate) fn len(&self) -> usize {
        self.unanswered.len()
    }

    /// Whether no call is in hand.
    pub(crate) fn is_empty(&self) -> bool {
        self.unanswered.is_empty()
    }

    /// What has to be sent, or sent again, on a new connection.
    pub(crate) fn unanswered(&mut self) -> impl Iterator<Item = &mut Call> {
        self.unanswered.values_mut()
    }

    /// Whether a request of any call in hand has been sent.
    pub(crate) fn any_sent(&self) -> bool {
        self.unanswered.values().any(|call| call.sends > 0)
    }

    /// The call that a reply ends. None if it is of a call that is not in hand: an unknown one, or
    /// one that has ended.
    pub(crate) fn on_reply(&mut self, correlation_id: Option<&str>) -> Option<Call> {
        let id = Uuid::try_parse(correlation_id?).ok()?;
        let index = self.index_of.remove(&id)?;
        self.unanswered.remove(&index)
    }

    /// The call that a returned request ends: there is no queue to carry it. A call that was sent
    /// twice goes on, for its first request may have been served.
    pub(crate) fn on_return(&mut self, correlation_id: Option<&str>) -> Option<Call> {
        let id = Uuid::try_parse(correlation_id?).ok()?;
        let call = self.unanswered.get(self.index_of.get(&id)?)?;
        if call.sends > 1 {
            return None;
        }
        self.on_reply(correlation_id)
    }

    /// When the next call runs out of time.
    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        self.unanswered.first_key_value().map(|(_, call)| call.deadline.instant())
    }

    /// When the last call in hand runs out of time.
    pub(crate) fn last_deadline(&self) -> Option<Deadline> {
        self.unanswered.last_key_value().map(|(_, call)| call.deadline)
    }

    /// A call that has run out of time by now, if there is one.
    pub(crate) fn expire(&mut self, now: Instant) -> Option<Call> {
        let first = self.unanswered.first_entry()?;
        if first.get().deadline.instant() > now {
            return None;
        }
        self.index_of.remove(&first.get().id);
        Some(first.remove())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    const ID: Uuid = Uuid::from_u128(1);
    const OTHER: Uuid = Uuid::from_u128(2);

    fn begin(calls: &mut Calls, id: Uuid) -> &mut Call {
        let call = calls.begin(id, b"30".to_vec(), Deadline::after(Duration::from_secs(9)));
        call.sends = 1;
        call
    }

    #[test]
    fn a_reply_ends_its_call_and_a_second_one_is_unknown() {
        let mut calls = Calls::default();
        begin(&mut calls, ID);
        begin(&mut calls, OTHER);
        assert_eq!(calls.on_reply(Some(&ID.to_string())).unwrap().index, 0);
        assert!(calls.on_reply(Some(&ID.to_string())).is_none());
        assert_eq!(calls.len(), 1);
    }

    #[test]
    fn unknown_ids_end_nothing() {
        let mut calls = Calls::default();
        begin(&mut calls, ID);
        for id in [None, Some(""), Some("1"), Some(OTHER.to_string().as_str())] {
            assert!(calls.on_reply(id).is_none(), "{id:?}");
            assert!(calls.on_return(id).is_none(), "{id:?}");
        }
        assert_eq!(calls.len(), 1);
    }

    #[test]
    fn only_the_return_of_the_first_request_ends_a_call() {
        let mut calls = Calls::default();
        begin(&mut calls, ID);
        begin(&mut calls, OTHER).sends = 2;
        assert_eq!(calls.on_return(Some(&ID.to_string())).unwrap().id, ID);
        assert!(calls.on_return(Some(&OTHER.to_string())).is_none());
        assert_eq!(calls.len(), 1);
    }

    #[test]
    fn calls_expire_in_their_order_and_not_before_their_time() {
        let mut calls = Calls::default();
        let begun = Instant::now();
        let first = begin(&mut calls, ID).deadline.instant();
        let second = begin(&mut calls, OTHER).deadline.instant();
        assert_eq!(calls.next_deadline(), Some(first));
        assert!(calls.expire(begun).is_none());
        assert_eq!(calls.expire(second).unwrap().id, ID);
        assert_eq!(calls.expire(second).unwrap().id, OTHER);
        assert!(calls.expire(second).is_none());
        assert!(calls.is_empty());
        assert!(calls.on_reply(Some(&ID.to_string())).is_none(), "an expired call has ended");
    }
}
