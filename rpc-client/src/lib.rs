//! Calls a function over RabbitMQ RPC, and waits for the answer.
//!
//! [`run`] is the loop that makes calls; [`Client`] is a thread that runs it, for programs that
//! make one call at a time. Read in this order: `call` has the options, requests, outcomes and
//! errors; `requests` is where they come from; `event_loop` makes calls; `pending` keeps those that
//! are unanswered; `session` is one connection with its reply queue; `outcomes` collects how calls
//! ended; `diagnosis` is what is known of why there is no answer; `retry` decides when an error
//! ends a run.

mod call;
mod client;
mod config;
mod diagnosis;
mod event_loop;
mod outcomes;
mod pending;
mod requests;
mod retry;
mod session;

pub use call::{Error, NoAnswerCause, Outcome, Request};
pub use client::Client;
pub use config::{Config, ReplyTo};
pub use event_loop::run;
pub use outcomes::OnOutcomes;
pub use requests::{requests, RequestSender, Requests, Stopper};
