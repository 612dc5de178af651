//! Calls a function over RabbitMQ RPC, and waits for the answer.
//!
//! [`run()`] makes calls; [`Client`] is a thread that does so, for programs that make one call at a
//! time. Read in this order: `config` has the options; `call` the requests, outcomes and errors;
//! `requests` is where they come from; `run` moves events between the `session`, which is one
//! connection with its reply queue, and the `run_state`, which decides what they mean. The state
//! has the calls that are `pending`, and a `diagnosis` of why there is no answer; `session_end`
//! says when an error ends the run, too. The session has a `request_publisher`, and a
//! `session_thread`, which makes the blocking calls.

mod call;
mod client;
mod config;
mod diagnosis;
mod pending;
mod request_publisher;
mod requests;
mod run;
mod run_state;
mod session;
mod session_end;
mod session_thread;

pub use call::{Error, NoAnswerCause, Outcome, Request};
pub use client::Client;
pub use config::{Config, ReplyTo};
pub use requests::{request_channel, RequestSender, Requests, Stopper};
pub use run::{run, OnOutcomes};
