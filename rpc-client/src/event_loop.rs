//! The event loop: begins calls, sends their requests, receives replies, and connects again when a connection ends.

use crate::call::{Config, Error, NoAnswerCause, Outcome, Request};
use crate::pending::{Call, PendingCalls, Returned};
use crate::retry::{ends_run, MIN_PAUSE};
use crate::session::{Session, SessionEvent};
use amiquip::{ConnectionBlockedNotification, ConsumerMessage, Delivery, Return};
use crossbeam_channel::{never, select, Receiver, RecvError};
use rpc_common::connection::{
    delivery, start_at, Backoff, Deadline, Endpoint, Error as ConnectionError, ErrorKind, QueueStats,
};
use rpc_common::message::decode_reply;
use rpc_common::text::{escape, format_duration};
use std::convert::Infallible;
use std::mem;
use std::time::{Duration, Instant};
use uuid::Uuid;

/// After how much silence the request queue is looked at, and how often then.
const FIRST_QUEUE_CHECK: Duration = Duration::from_millis(500);
const QUEUE_CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// Receives how calls ended, in the order in which they ended.
pub type OnOutcomes<'a, T> = dyn FnMut(Vec<Outcome<T>>) + 'a;

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
    endpoints: Vec<Endpoint>,
    requests: &Receiver<Request<T>>,
    stop: &Receiver<Infallible>,
    on_outcomes: &mut OnOutcomes<T>,
) -> Result<(), Error> {
    let now = Instant::now();
    let mut event_loop = EventLoop {
        config,
        endpoints,
        requests,
        stop,
        on_outcomes,
        has_more_requests: true,
        is_stopped: false,
        pending: PendingCalls::new(),
        outcomes: Vec::new(),
        backoff: Backoff::new(now),
        broker: String::new(),
        next_queue_check: now + FIRST_QUEUE_CHECK,
        blocked: None,
        cause: NoAnswerCause::Unknown,
        has_warned: false,
        discarded: 0,
    };
    event_loop.make_calls()
}

/// The state of a run, which lasts longer than one session.
struct EventLoop<'a, 'f, T> {
    config: &'a Config,
    /// Starts with the broker that was connected last.
    endpoints: Vec<Endpoint>,
    requests: &'a Receiver<Request<T>>,
    stop: &'a Receiver<Infallible>,
    on_outcomes: &'a mut OnOutcomes<'f, T>,
    has_more_requests: bool,
    is_stopped: bool,
    pending: PendingCalls<T>,
    /// Outcomes that are not delivered yet.
    outcomes: Vec<Outcome<T>>,
    backoff: Backoff,
    /// Host and port of the broker that was connected last; empty before.
    broker: String,
    /// When to look at the request queue, if nothing arrives before.
    next_queue_check: Instant,
    /// Why the broker blocks publishers, while it does. Then nothing is published.
    blocked: Option<String>,
    /// What else is known of why there is no answer.
    cause: NoAnswerCause,
    has_warned: bool,
    /// How many replies belonged to no pending call.
    discarded: u64,
}

impl<T> EventLoop<'_, '_, T> {
    fn make_calls(&mut self) -> Result<(), Error> {
        while self.wait_for_call() {
            let deadline = self.pending.connect_deadline();
            let mut session = Session::start(self.endpoints.clone(), self.config, deadline);
            let result = self.use_session(&mut session);
            if result.is_err() {
                self.take_what_has_arrived(&session);
            }
            session.close();
            self.deliver_outcomes();
            match result {
                Ok(()) => break,
                Err(error) => self.on_session_error(error)?,
            }
        }
        Ok(())
    }

    /// Waits until a call is pending; begins one if none is. False when there are no more.
    fn wait_for_call(&mut self) -> bool {
        if self.pending.is_empty() && self.has_more_requests {
            select! {
                recv(self.requests) -> request => self.on_request(request),
                recv(self.stop) -> _ => self.is_stopped = true,
            }
        }
        !self.pending.is_empty() && !self.is_stopped
    }

    /// Makes calls on one session, until every request has its outcome or the session ends.
    fn use_session(&mut self, session: &mut Session) -> Result<(), Error> {
        let no_requests = never();
        while (self.has_more_requests || !self.pending.is_empty()) && !self.is_stopped {
            if let Some(publisher) = &session.publisher {
                publisher.flush();
            }
            if let Some(deadline) = self.pending.first_deadline() {
                session.close_deadline = deadline;
            }
            if self.until_next_timer(session).is_zero() {
                self.on_timer(session)?; // even if the peer never stops sending
            }
            // Outcomes are delivered when nothing else is ready.
            let timeout = if self.outcomes.is_empty() { self.until_next_timer(session) } else { Duration::ZERO };
            // While the broker blocks us, calls begin and expire as they would otherwise.
            let takes_requests = session.is_consuming || self.blocked.is_some();
            let requests = if takes_requests && self.has_room() { self.requests } else { &no_requests };
            select! {
                recv(session.replies) -> message => {
                    self.on_message(session, message)?;
                    self.take_messages(session)?;
                }
                recv(requests) -> request => {
                    self.on_request(request);
                    while self.has_room() {
                        let Ok(request) = self.requests.try_recv() else { break };
                        self.on_request(Ok(request));
                    }
                    self.publish_unsent(session);
                }
                recv(session.returns) -> request => match request {
                    Ok(request) => self.on_return(&request),
                    Err(RecvError) => session.returns = never(), // the replies report how the channel ended
                },
                recv(session.notifications) -> notification => if let Ok(notification) = notification {
                    self.on_notification(notification);
                    self.publish_unsent(session);
                } else {
                    session.notifications = never();
                    session.ask_for_cause();
                },
                recv(session.events) -> event => match event {
                    Ok(event) => self.on_session_event(session, event)?,
                    Err(RecvError) => return Err(self.connection_lost("the session has ended").into()),
                },
                recv(self.stop) -> _ => self.is_stopped = true,
                default(timeout) => self.on_timer(session)?,
            }
        }
        self.deliver_outcomes();
        Ok(())
    }

    fn on_session_event(&mut self, session: &mut Session, event: SessionEvent) -> Result<(), Error> {
        match event {
            SessionEvent::Connected(publisher, returns, notifications) => {
                log::info!("connected to {}", publisher.broker);
                start_at(&mut self.endpoints, &publisher.broker);
                self.broker.clone_from(&publisher.broker);
                self.cause = NoAnswerCause::Waiting("starting a consumer");
                (session.returns, session.notifications) = (returns, notifications);
                session.publisher = Some(publisher);
                self.pending.mark_all_unsent();
                self.publish_unsent(session);
            }
            SessionEvent::Consuming(replies) => {
                (session.replies, session.is_consuming) = (replies, true);
                self.cause = NoAnswerCause::Unknown;
                self.next_queue_check = Instant::now() + FIRST_QUEUE_CHECK;
            }
            SessionEvent::QueueChecked(stats) => self.on_queue_checked(stats),
            SessionEvent::Ended(error) => return Err(error),
        }
        Ok(())
    }

    /// Pauses before the next session, unless the error ends the run.
    fn on_session_error(&mut self, error: Error) -> Result<(), Error> {
        let Error::Connection(cause) = &error else { return Err(self.end_all(error)) };
        self.cause = self.no_answer_cause().after(cause);
        self.blocked = None;
        let pause = self.backoff.next_pause(Instant::now());
        let was_connected = !self.broker.is_empty();
        if ends_run(cause, self.pending.progress(was_connected)) {
            return Err(self.end_all(error));
        }
        log::info!("{error}: connecting again");
        if let Some(deadline) = self.pending.first_deadline() {
            // The other half of the time is left to connect in.
            let pause = pause.min(deadline.remaining() / 2).max(MIN_PAUSE);
            self.is_stopped = self.stop.recv_timeout(pause).is_err_and(|end| end.is_disconnected());
        }
        if self.pending.any_sent() {
            self.expire(); // else the next attempt says why nothing was sent
        }
        self.deliver_outcomes();
        Ok(())
    }

    /// Ends all pending calls with this error.
    fn end_all(&mut self, error: Error) -> Error {
        while let Some(call) = self.pending.pop() {
            self.end(call, Err(error.clone()));
        }
        self.deliver_outcomes();
        error
    }

    /// Begins the call of a request; it is not sent yet.
    fn on_request(&mut self, request: Result<Request<T>, RecvError>) {
        let Ok(request) = request else {
            self.has_more_requests = false;
            return;
        };
        if self.pending.is_empty() {
            self.next_queue_check = Instant::now() + FIRST_QUEUE_CHECK;
        }
        self.pending.begin(Uuid::new_v4(), request, Deadline::after(self.config.timeout));
    }

    /// Buffers the unsent requests, unless the broker blocks us: it would run them when their callers have gone.
    fn publish_unsent(&mut self, session: &Session) {
        let (Some(publisher), None) = (&session.publisher, &self.blocked) else { return };
        while let Some(call) = self.pending.next_unsent() {
            publisher.publish(&self.config.queue, call);
        }
    }

    /// Takes a message of the consumer.
    fn on_message(
        &mut self,
        session: &mut Session,
        message: Result<ConsumerMessage, RecvError>,
    ) -> Result<(), ConnectionError> {
        match delivery(message) {
            Ok(Some(delivery)) => self.on_reply(delivery),
            Ok(None) => return Err(self.connection_lost("the reply queue was deleted")),
            Err(amiquip::Error::EventLoopDropped) => {
                session.replies = never();
                session.ask_for_cause();
            }
            Err(error) => return Err(ConnectionError::new(&self.broker, error.into())),
        }
        Ok(())
    }

    /// Takes the messages of the consumer that have arrived by now.
    fn take_messages(&mut self, session: &mut Session) -> Result<(), ConnectionError> {
        for _ in 0..session.replies.len() {
            match session.replies.try_recv() {
                Ok(message) => self.on_message(session, Ok(message))?,
                Err(_) => break,
            }
        }
        Ok(())
    }

    /// Takes the replies of a session that has ended: they do not arrive again.
    fn take_what_has_arrived(&mut self, session: &Session) {
        for message in session.replies.try_iter() {
            if let ConsumerMessage::Delivery(delivery) = message {
                self.on_reply(delivery);
            }
        }
        session.notifications.try_iter().for_each(|notification| self.on_notification(notification));
    }

    /// Ends expired calls, delivers outcomes, sends returned requests again, and looks at the request queue.
    fn on_timer(&mut self, session: &mut Session) -> Result<(), ConnectionError> {
        self.take_messages(session)?; // an answer that has arrived does not expire
        let has_expired = self.has_deadlines(session) && self.expire();
        if has_expired && self.pending.is_empty() && !session.is_consuming && self.blocked.is_none() {
            session.shut_down(); // the broker has not answered; one that blocks us is waited for by the next calls
        }
        self.deliver_outcomes();
        let now = Instant::now();
        self.pending.start_resends(now);
        self.publish_unsent(session);
        if now >= self.next_queue_check {
            self.next_queue_check = now + QUEUE_CHECK_INTERVAL;
            // A broker that blocks us does not answer.
            if session.is_consuming && !self.pending.is_empty() && self.blocked.is_none() {
                session.check_queue();
                if self.cause == NoAnswerCause::Unknown {
                    // Until the broker has answered.
                    self.cause = NoAnswerCause::Waiting("looking at the queue");
                }
            }
        }
        Ok(())
    }

    fn on_queue_checked(&mut self, stats: Option<QueueStats>) {
        self.cause = stats.map_or(NoAnswerCause::Unknown, NoAnswerCause::Queue);
        if stats.is_some_and(|stats| stats.consumers == 0) && !self.has_warned {
            let (queue, limit) = (&self.config.queue, format_duration(self.config.timeout));
            log::warn!("no server is consuming '{queue}'; waiting up to {limit}");
            self.has_warned = true;
        }
    }

    fn on_reply(&mut self, delivery: Delivery) {
        self.next_queue_check = Instant::now() + FIRST_QUEUE_CHECK;
        let Some(call) = self.pending.on_reply(delivery.properties.correlation_id().as_deref()) else {
            self.discarded += 1;
            log::info!("discarded an unexpected reply, {} in all", self.discarded);
            return;
        };
        let time_left = call.deadline.remaining();
        let result = decode_reply(&delivery.properties, delivery.body);
        self.end(call, result.map_err(|failure| Error::failed(failure, time_left)));
    }

    fn on_return(&mut self, request: &Return) {
        let id = request.properties.correlation_id().as_deref();
        let error = Error::NoQueue { queue: self.config.queue.clone(), broker: self.broker.clone() };
        match self.pending.on_return(id, Instant::now()) {
            Some(Returned::Ended(call)) => self.end(call, Err(error)),
            Some(Returned::WillResend) => log::info!("{error} sending again"),
            None => {}
        }
    }

    fn on_notification(&mut self, notification: ConnectionBlockedNotification) {
        self.blocked = match notification {
            ConnectionBlockedNotification::Blocked(reason) => {
                let reason = escape(reason.as_bytes()).to_string();
                log::warn!("{} blocks publishers: {reason}; waiting", self.broker);
                Some(reason)
            }
            ConnectionBlockedNotification::Unblocked => {
                log::info!("{} no longer blocks publishers", self.broker);
                None
            }
        };
    }

    /// Ends the calls whose deadline has passed. Returns whether there were any.
    fn expire(&mut self) -> bool {
        let (now, before) = (Instant::now(), self.pending.len());
        while let Some(call) = self.pending.expire(now) {
            let (queue, broker) = (self.config.queue.clone(), self.broker.clone());
            let (limit, cause) = (call.deadline.to_string(), self.no_answer_cause());
            self.end(call, Err(Error::NoAnswer { queue, broker, limit, cause }));
        }
        self.pending.len() < before
    }

    fn end(&mut self, call: Call<T>, result: Result<Vec<u8>, Error>) {
        let latency = call.first_sent.map(|first_sent| first_sent.elapsed());
        let (context, correlation_id) = (call.request.context, call.id);
        self.outcomes.push(Outcome { context, correlation_id, latency, result });
    }

    fn deliver_outcomes(&mut self) {
        if !self.outcomes.is_empty() {
            (self.on_outcomes)(mem::take(&mut self.outcomes));
        }
    }

    /// What is known of why there is no answer.
    fn no_answer_cause(&self) -> NoAnswerCause {
        self.blocked.clone().map_or_else(|| self.cause.clone(), NoAnswerCause::Blocked)
    }

    fn connection_lost(&self, reason: &str) -> ConnectionError {
        ConnectionError::new(&self.broker, ErrorKind::ConnectionLost(reason.into()))
    }

    fn has_room(&self) -> bool {
        self.has_more_requests && self.pending.len() < self.config.in_flight.into()
    }

    /// Whether calls expire. Not while we connect and nothing was sent: connecting ends with the first deadline, and its
    /// error says more.
    fn has_deadlines(&self, session: &Session) -> bool {
        session.publisher.is_some() || self.pending.any_sent()
    }

    fn until_next_timer(&self, session: &Session) -> Duration {
        if !self.has_deadlines(session) {
            return Duration::MAX;
        }
        let next_timer = self.pending.next_timer().map(|timer| timer.min(self.next_queue_check));
        next_timer.map_or(Duration::MAX, |timer| timer.saturating_duration_since(Instant::now()))
    }
}
