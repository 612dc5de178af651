//! A run: makes a call of each request. The **event loop** of the client is `Run::use_session`: it
//! moves events, requests and outcomes between the [`RunState`], which decides, the [`Session`],
//! which is the way to the broker, and the caller.
//!
//! A run drives the link of the connection, so the thread of the run is the one that a reply wakes.

use crate::call::{Error, Outcome};
use crate::config::Config;
use crate::pending::Call;
use crate::requests::Requests;
use crate::run_state::{Event, RunState, SessionCommand};
use crate::session::Session;
use rpc_common::connection::{start_at, Endpoint};
use std::time::Instant;
use uuid::Uuid;

/// Maximum number of reads (64 KiB each) before expired calls are ended.
const MAX_READS: u32 = 256;

/// Receives how calls ended, in the order in which they ended.
pub type OnOutcomes<'a, T> = dyn FnMut(Vec<Outcome<T>>) + 'a;

/// Makes a call of each request, until there are no more and all calls have ended, or until it is
/// stopped. Runs on the calling thread.
///
/// Calls that are unanswered when a connection ends are sent again on the next one, under the same
/// correlation id, until their deadline. When a [`Stopper`](crate::Stopper) ends it, what is
/// unanswered has no outcome.
///
/// ```
/// use rpc_client::{request_channel, run, Config, Request};
/// use rpc_common::command_line::BrokerOptions;
///
/// let broker = BrokerOptions::from_url("amqp://127.0.0.1:1"); // nobody listens there
/// let config = Config { broker, ..Config::default() };
/// let endpoints = config.broker.endpoints()?;
/// let (sender, requests) = request_channel(None);
/// sender.send(Request { context: "the first", body: b"30".into() });
/// drop(sender); // there are no more requests
/// let mut failed = Vec::new();
/// let result = run(&config, endpoints, &requests, &mut |outcomes| {
///     for outcome in outcomes {
///         match outcome.result {
///             Ok(answer) => println!("{:?}", answer.body),
///             Err(_) => failed.push(outcome.request.context),
///         }
///     }
/// });
/// assert!(result.is_err());
/// assert_eq!(failed, ["the first"]);
/// # Ok::<_, rpc_client::Error>(())
/// ```
///
/// # Errors
/// [`Error::Connection`] or [`Error::RefusedAfterSend`] when the broker cannot be reached or
/// refuses us. It is the outcome of all pending calls, too; the other requests stay in the channel.
///
/// # Panics
/// If there is no endpoint.
pub fn run<T>(
    config: &Config,
    endpoints: Vec<Endpoint>,
    requests: &Requests<T>,
    on_outcomes: &mut OnOutcomes<T>,
) -> Result<(), Error> {
    let first = endpoints.first().expect("there is an endpoint");
    let mut run = Run {
        state: RunState::new(config, &first.address, Instant::now()),
        config,
        endpoints,
        requests,
        on_outcomes,
    };
    run.make_calls()
}

struct Run<'a, 'f, T> {
    state: RunState<'a, T>,
    config: &'a Config,
    /// Starts with the broker that was connected last, or with the next one if that was silent.
    endpoints: Vec<Endpoint>,
    requests: &'a Requests<T>,
    on_outcomes: &'a mut OnOutcomes<'f, T>,
}

impl<T> Run<'_, '_, T> {
    fn make_calls(&mut self) -> Result<(), Error> {
        while self.begin_first_call() {
            let mut session = Session::start(
                self.endpoints.clone(),
                self.config,
                self.state.needs_consumers(),
                self.state.connect_deadline(),
                self.requests.waker(),
            );
            let result = self.use_session(&mut session);
            if result.is_err() {
                // The session has failed. Replies that are already in its inbox will not be
                // delivered again, so they are processed before closing. The first error counts.
                let now = Instant::now();
                let _ = session.take_arrived(&mut |event| self.state.step(event, now));
            }
            session.close(self.requests.waker());
            self.deliver_outcomes();
            match result {
                Ok(()) => break,
                Err(error) => self.pause(error)?,
            }
        }
        Ok(())
    }

    /// Begins the call of the next request, unless calls are pending: waits for a request. False
    /// when there are no more.
    fn begin_first_call(&mut self) -> bool {
        while self.state.is_idle() && self.requests.has_more() && !self.requests.is_stopped() {
            match self.requests.try_take() {
                Some(request) => self.state.begin(Uuid::new_v4(), request, Instant::now()),
                None => self.requests.wait(None, true),
            }
        }
        !self.state.is_idle() && !self.requests.is_stopped()
    }

    /// Makes calls on one session, until every request has its outcome or the session ends. Until
    /// the session is connected, this only waits for its events.
    fn use_session(&mut self, session: &mut Session) -> Result<(), Error> {
        while !self.has_ended() {
            self.begin_calls();
            self.publish(session);
            self.deliver_outcomes();
            if let Some(deadline) = self.state.first_deadline() {
                session.set_close_deadline(deadline);
            }
            let wake = self.state.next_wake();
            session.wait(wake, self.requests, self.takes_requests());
            self.take_events(session, wake)?;
            for command in self.state.take_commands() {
                match command {
                    SessionCommand::QueueStats => session.request_queue_stats(),
                    SessionCommand::GiveUp => session.give_up(),
                }
            }
        }
        self.deliver_outcomes();
        Ok(())
    }

    /// Begins the calls of the requests that have arrived.
    fn begin_calls(&mut self) {
        while self.takes_requests() {
            let Some(request) = self.requests.try_take() else {
                return;
            };
            self.state.begin(Uuid::new_v4(), request, Instant::now());
        }
    }

    fn takes_requests(&self) -> bool {
        self.requests.has_more() && self.state.takes_requests()
    }

    /// Publishes the unsent requests, as long as the broker takes them at once.
    ///
    /// `RunState` and its `PendingCalls` choose the call; `RequestPublisher::add` makes the message
    /// of it, and `Publisher::add_message` its frames, in a buffer. `flush` writes the buffer to
    /// the socket.
    fn publish(&mut self, session: &Session) {
        let Some(publisher) = session.publisher() else {
            return;
        };
        while publisher.is_writable() && self.state.has_unsent() {
            let add = |call: &Call<T>| publisher.add(call);
            if !self.state.publish_next(Instant::now(), add) {
                break;
            }
        }
        publisher.flush();
    }

    /// Takes what has arrived, and the timer if it `wake`s by now.
    fn take_events(&mut self, session: &mut Session, wake: Option<Instant>) -> Result<(), Error> {
        let mut now = Instant::now();
        let is_timer_due = wake.is_some_and(|wake| wake <= now);
        if is_timer_due {
            session.receive(MAX_READS); // an answer that has arrived does not expire
            now = Instant::now();
        }
        session.take_events(&mut |event| {
            if let Event::Connected(address) = &event {
                start_at(&mut self.endpoints, address);
            }
            self.state.step(event, now)
        })?;
        if is_timer_due {
            self.state.step(Event::Timer, now)?;
        }
        Ok(())
    }

    fn deliver_outcomes(&mut self) {
        let outcomes = self.state.take_outcomes();
        if !outcomes.is_empty() {
            (self.on_outcomes)(outcomes);
        }
    }

    /// Pauses before the next session, unless the error ends the run.
    fn pause(&mut self, error: Error) -> Result<(), Error> {
        if matches!(&error, Error::Connection(error) if error.is_silence()) {
            self.endpoints.rotate_left(1);
        }
        let next = self.state.on_session_end(error, Instant::now());
        self.deliver_outcomes();
        let until = Instant::now() + next?;
        while Instant::now() < until && !self.has_ended() {
            let wake = self.state.next_wake().into_iter().chain([until]).min();
            self.requests.wait(wake, false);
            self.state.step(Event::Timer, Instant::now())?; // calls expire meanwhile
            self.deliver_outcomes();
        }
        Ok(())
    }

    /// Whether all calls have ended, and there are no more; or whether it is stopped.
    fn has_ended(&self) -> bool {
        (self.state.is_idle() && !self.requests.has_more()) || self.requests.is_stopped()
    }
}
