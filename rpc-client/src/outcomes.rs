//! The outcomes of calls, collected until they are delivered.

use crate::call::{Error, Outcome};
use crate::pending::Call;
use rpc_common::message::Answer;
use std::mem;

/// Receives how calls ended, in the order in which they ended.
pub type OnOutcomes<'a, T> = dyn FnMut(Vec<Outcome<T>>) + 'a;

/// The outcomes that are not delivered yet, and who receives them.
pub(crate) struct Outcomes<'a, 'f, T> {
    on_outcomes: &'a mut OnOutcomes<'f, T>,
    undelivered: Vec<Outcome<T>>,
}

impl<'a, 'f, T> Outcomes<'a, 'f, T> {
    pub(crate) fn new(on_outcomes: &'a mut OnOutcomes<'f, T>) -> Self {
        Outcomes { on_outcomes, undelivered: Vec::new() }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.undelivered.is_empty()
    }

    /// Adds how a call ended.
    pub(crate) fn add(&mut self, call: Call<T>, result: Result<Answer, Error>) {
        let latency = call.first_sent.map(|first_sent| first_sent.elapsed());
        self.undelivered.push(Outcome { request: call.request, correlation_id: call.id, latency, result });
    }

    pub(crate) fn deliver(&mut self) {
        if !self.undelivered.is_empty() {
            (self.on_outcomes)(mem::take(&mut self.undelivered));
        }
    }
}
