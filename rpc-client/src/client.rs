//! Calls from a program: a client that any thread can use.

use crate::call::{Error, Outcome, Request};
use crate::config::Config;
use crate::requests::{request_channel, RequestSender, Requests};
use crate::run::run;
use crossbeam_channel::{bounded, Sender};
use rpc_common::connection::{Endpoint, Error as ConnectionError, ErrorKind};
use std::thread::{self, JoinHandle};

/// A **client** makes calls, from any thread. It connects with the first call and stays connected
/// until it is dropped.
///
/// ```no_run
/// use rpc_client::{Client, Config};
///
/// let client = Client::new(Config::default())?;
/// assert_eq!(client.call(b"30")?, b"832040");
/// # Ok::<_, rpc_client::Error>(())
/// ```
///
/// Without a broker, the call says so:
///
/// ```
/// use rpc_client::{Client, Config, Error};
/// use rpc_common::command_line::BrokerOptions;
///
/// let client = Client::new(Config {
///     broker: BrokerOptions::from_url("amqp://127.0.0.1:1"),
///     ..Config::default()
/// })?;
/// assert!(matches!(client.call(b"30"), Err(Error::Connection(_))));
/// # Ok::<_, Error>(())
/// ```
pub struct Client {
    /// `None` once the client is dropped.
    requests: Option<RequestSender<ResultSender>>,
    thread: Option<JoinHandle<()>>,
}

type CallResult = Result<Vec<u8>, Error>;

/// Sends the result of a call to the thread that waits for it.
type ResultSender = Sender<CallResult>;

impl Client {
    /// A client that is not connected yet.
    ///
    /// # Errors
    /// [`Error::Connection`] when the configuration is wrong, or the system refuses a thread.
    pub fn new(config: Config) -> Result<Self, Error> {
        let endpoints = config.broker.endpoints()?;
        let (requests, received) = request_channel(None);
        let thread = thread::Builder::new()
            .spawn(move || make_calls(&config, &endpoints, &received))
            .map_err(|error| ConnectionError::configuration(ErrorKind::no_thread(&error)))?;
        Ok(Client {
            requests: Some(requests),
            thread: Some(thread),
        })
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
        let requests = self
            .requests
            .as_ref()
            .expect("it is there until the client is dropped");
        assert!(
            requests.send(Request {
                context,
                body: body.to_vec()
            }),
            "the thread is running"
        );
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

/// Makes calls until the client is dropped. A run that ends with an error has given it to its
/// calls; the next call starts a new one.
fn make_calls(config: &Config, endpoints: &[Endpoint], requests: &Requests<ResultSender>) {
    let on_outcomes = &mut |outcomes: Vec<Outcome<ResultSender>>| {
        for outcome in outcomes {
            let result = outcome.result.map(|answer| answer.body);
            let _ = outcome.request.context.send(result); // the caller waits for it
        }
    };
    while let Err(error) = run(config, endpoints.to_vec(), requests, on_outcomes) {
        log::info!("{error}");
    }
}
