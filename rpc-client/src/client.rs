//! Two ways to make calls: a loop on the calling thread, and a client that any thread can use.

use crate::call::{Config, Error, Outcome, Request};
use crate::event_loop::{EventLoop, OnOutcomes};
use crossbeam_channel::{bounded, unbounded, Receiver, Sender};
use rpc_common::connection::Endpoint;
use std::convert::Infallible;
use std::thread::{self, JoinHandle};

/// Makes a call of each request, until `requests` or `stop` is disconnected. Runs on the calling thread.
///
/// Calls that are unanswered when a connection ends are sent again on the next one, under the same correlation id,
/// until their deadline. When `stop` ends it, what is unanswered has no outcome.
///
/// # Errors
/// [`Error::Connection`] or [`Error::ConsumeRefused`] when the broker cannot be reached or refuses us. It is the outcome
/// of all pending calls, too; the other requests stay in the channel.
pub fn run<T>(
    config: &Config,
    requests: &Receiver<Request<T>>,
    stop: &Receiver<Infallible>,
    on_outcomes: &mut OnOutcomes<T>,
) -> Result<(), Error> {
    EventLoop::new(config, config.broker.endpoints()?, requests, stop, on_outcomes).run()
}

/// A **client** makes calls, from any thread. It connects with the first call and stays connected until it is dropped.
pub struct Client {
    /// `None` once the client is dropped.
    requests: Option<Sender<Request<ResultSender>>>,
    thread: Option<JoinHandle<()>>,
}

type CallResult = Result<Vec<u8>, Error>;

/// Sends the result of a call to the thread that waits for it.
type ResultSender = Sender<CallResult>;

impl Client {
    /// A client that is not connected yet.
    ///
    /// # Errors
    /// [`Error::Connection`] when the configuration is wrong.
    pub fn new(config: Config) -> Result<Self, Error> {
        let endpoints = config.broker.endpoints()?;
        let (requests, received) = unbounded();
        let thread = thread::spawn(move || make_calls(&config, &endpoints, &received));
        Ok(Client { requests: Some(requests), thread: Some(thread) })
    }

    /// Calls the function with `body`, and waits for the body of the reply.
    ///
    /// # Errors
    /// Any [`Error`].
    ///
    /// # Panics
    /// If the client's thread has panicked.
    pub fn call(&self, body: &[u8]) -> CallResult {
        let (context, result) = bounded(1);
        let requests = self.requests.as_ref().expect("it is there until the client is dropped");
        requests.send(Request { context, body: body.to_vec() }).expect("the thread is running");
        result.recv().expect("every call has an outcome")
    }
}

impl Drop for Client {
    /// Closes the connection.
    fn drop(&mut self) {
        self.requests = None;
        self.thread.take().map(JoinHandle::join);
    }
}

/// Makes calls until the client is dropped. A run that ends with an error has given it to its calls; the next call
/// starts a new one.
fn make_calls(config: &Config, endpoints: &[Endpoint], requests: &Receiver<Request<ResultSender>>) {
    let (_running, stop) = bounded(0);
    let on_outcomes = &mut |outcomes: Vec<Outcome<ResultSender>>| {
        for outcome in outcomes {
            let _ = outcome.context.send(outcome.result); // the caller waits for it
        }
    };
    while let Err(error) = EventLoop::new(config, endpoints.to_vec(), requests, &stop, on_outcomes).run() {
        log::info!("{error}");
    }
}
