//! The outcomes of calls, collected until they are delivered; and the errors that end calls before
//! their deadline.

use crate::call::{Error, Outcome};
use crate::pending::{Call, PendingCalls};
use rpc_common::message::Answer;
use std::mem;
use std::time::Instant;
use uuid::Uuid;

/// Receives how calls ended, in the order in which they ended.
pub type OnOutcomes<'a, T> = dyn FnMut(Vec<Outcome<T>>) + 'a;

/// The outcomes that are not delivered yet, and who receives them.
pub(crate) struct Outcomes<'a, 'f, T> {
    on_outcomes: &'a mut OnOutcomes<'f, T>,
    undelivered: Vec<Outcome<T>>,
}

impl<'a, 'f, T> Outcomes<'a, 'f, T> {
    pub(crate) fn new(on_outcomes: &'a mut OnOutcomes<'f, T>) -> Self {
        Outcomes {
            on_outcomes,
            undelivered: Vec::new(),
        }
    }

    /// Adds how a call ended.
    pub(crate) fn add(&mut self, call: Call<T>, result: Result<Answer, Error>) {
        let latency = call.first_sent.map(|first_sent| first_sent.elapsed());
        self.undelivered.push(Outcome {
            request: call.request,
            correlation_id: call.id,
            latency,
            result,
        });
    }

    pub(crate) fn deliver(&mut self) {
        if !self.undelivered.is_empty() {
            (self.on_outcomes)(mem::take(&mut self.undelivered));
        }
    }

    /// Ends all pending calls with this error, and delivers how they ended.
    pub(crate) fn end_all(&mut self, pending: &mut PendingCalls<T>, error: Error) -> Error {
        while let Some(call) = pending.pop() {
            let error = match &error {
                Error::Connection(error) if call.may_have_run => {
                    Error::RefusedAfterSend(error.clone())
                }
                error => error.clone(),
            };
            self.add(call, Err(error));
        }
        self.deliver();
        error
    }

    /// Ends the calls whose request was refused a short time ago: the queue is full.
    pub(crate) fn end_refused(
        &mut self,
        pending: &mut PendingCalls<T>,
        now: Instant,
        queue: &str,
        address: &str,
    ) {
        while let Some(call) = pending.pop_refused(now) {
            let queue = queue.to_owned();
            let address = address.to_owned();
            self.add(call, Err(Error::QueueFull { queue, address }));
        }
    }

    /// Ends the call whose request cannot be encoded for the broker.
    pub(crate) fn end_unsent(
        &mut self,
        pending: &mut PendingCalls<T>,
        id: Uuid,
        address: &str,
        reason: &str,
    ) {
        if let Some(call) = pending.remove_unsent(id) {
            self.add_too_large(call, address, reason);
        }
    }

    /// Ends the call whose request is too large for the broker. False if there is none.
    pub(crate) fn end_too_large(
        &mut self,
        pending: &mut PendingCalls<T>,
        address: &str,
        reason: &str,
    ) -> bool {
        let Some(call) = pending.pop_too_large() else {
            return false;
        };
        self.add_too_large(call, address, reason);
        self.deliver();
        true
    }

    fn add_too_large(&mut self, call: Call<T>, address: &str, reason: &str) {
        let size = call.request.body.len();
        let address = address.to_owned();
        let reason = reason.to_owned();
        self.add(
            call,
            Err(Error::TooLarge {
                size,
                address,
                reason,
            }),
        );
    }
}
