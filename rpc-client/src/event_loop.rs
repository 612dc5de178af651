//! The event loop: begins calls, sends their requests, receives replies, and connects again when a connection ends.

use crate::call::{Config, Error, NoAnswerCause, Request};
use crate::diagnosis::Diagnosis;
use crate::outcomes::{OnOutcomes, Outcomes};
use crate::pending::{PendingCalls, Returned};
use crate::retry::{ends_run, too_large_reason, MIN_PAUSE};
use crate::session::{Session, SessionEvent};
use amiquip::{Confirm, ConnectionBlockedNotification, ConsumerMessage, Delivery, Return};
use crossbeam_channel::{never, select, Receiver, RecvError};
use rpc_common::connection::{
    delivery, start_at, Backoff, Deadline, Endpoint, Error as ConnectionError, ErrorKind, QueueStats,
};
use rpc_common::message::decode_reply;
use rpc_common::text::format_duration;
use std::convert::Infallible;
use std::iter;
use std::time::{Duration, Instant};
use uuid::Uuid;

/// How long the broker may take to start the consumer; after each session that it did not, twice as long. A declaration that
/// RabbitMQ 4.3 begins while a node is frozen or lost hangs for 30 s; a few seconds later, on a new connection, it takes
/// milliseconds.
const MAX_CONSUMER_START: Duration = Duration::from_secs(10);

/// Makes a call of each request, until `requests` is disconnected and all calls have ended, or `stop` is disconnected. Runs
/// on the calling thread.
///
/// Calls that are unanswered when a connection ends are sent again on the next one, under the same correlation id,
/// until their deadline. When `stop` ends it, what is unanswered has no outcome.
///
/// # Errors
/// [`Error::Connection`] or [`Error::RefusedAfterSend`] when the broker cannot be reached or refuses us. It is the outcome
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
        has_more_requests: true,
        is_stopped: false,
        pending: PendingCalls::new(config.wait),
        outcomes: Outcomes::new(on_outcomes),
        backoff: Backoff::new(now),
        max_consumer_start: MAX_CONSUMER_START,
        broker: String::new(),
        diagnosis: Diagnosis::new(now),
        discarded: 0,
    };
    event_loop.make_calls()
}

/// The state of a run, which lasts longer than one session.
struct EventLoop<'a, 'f, T> {
    config: &'a Config,
    /// Starts with the broker that was connected last, or with the next one if that was silent.
    endpoints: Vec<Endpoint>,
    requests: &'a Receiver<Request<T>>,
    stop: &'a Receiver<Infallible>,
    /// Until `requests` is disconnected.
    has_more_requests: bool,
    is_stopped: bool,
    pending: PendingCalls<T>,
    outcomes: Outcomes<'a, 'f, T>,
    backoff: Backoff,
    /// How long the broker may take to start the consumer of the next session.
    max_consumer_start: Duration,
    /// Host and port of the broker that was connected last; empty before.
    broker: String,
    diagnosis: Diagnosis,
    /// How many replies belonged to no pending call.
    discarded: u64,
}

impl<T> EventLoop<'_, '_, T> {
    fn make_calls(&mut self) -> Result<(), Error> {
        while self.wait_for_call() {
            let deadline = self.pending.connect_deadline();
            let needs_consumers = self.config.no_wait && !self.pending.was_any_sent();
            let mut session = Session::start(self.endpoints.clone(), self.config, needs_consumers, deadline);
            let result = self.use_session(&mut session);
            if result.is_err() {
                self.take_what_has_arrived(&session);
            }
            session.close();
            self.outcomes.deliver();
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
                recv(self.requests) -> request => self.on_request_or_end(request),
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
                self.on_idle(session)?; // a timer is due, even if the peer never stops sending
            }
            // `on_idle` runs when a timer is due; or at once when nothing else is ready and there are outcomes to deliver.
            let timeout = if self.outcomes.is_empty() { self.until_next_timer(session) } else { Duration::ZERO };
            // Until the consumer is started, one pending call is enough: more would end with the same error. But while the
            // broker blocks us, calls begin and expire as usual.
            let takes_requests = session.is_consuming || self.pending.is_empty() || self.diagnosis.is_blocked();
            let requests = if takes_requests && self.has_room() { self.requests } else { &no_requests };
            select! {
                recv(session.replies) -> message => {
                    self.on_message(session, message)?;
                    self.take_messages(session)?;
                }
                recv(requests) -> request => {
                    self.on_request_or_end(request);
                    while self.has_room() {
                        let Ok(request) = self.requests.try_recv() else { break };
                        self.on_request(request);
                    }
                    self.publish_requests(session);
                }
                recv(session.confirms) -> confirm => match confirm {
                    Ok(confirm) => {
                        self.on_confirm(session, confirm);
                        self.publish_requests(session);
                    }
                    Err(RecvError) => session.confirms = never(),
                },
                recv(session.returns) -> request => match request {
                    Ok(request) => self.on_return(&request),
                    Err(RecvError) => session.returns = never(), // the replies report how the channel ended
                },
                recv(session.notifications) -> notification => if let Ok(notification) = notification {
                    self.on_notification(notification);
                    session.consumer_deadline = self.consumer_deadline(session);
                    self.publish_requests(session);
                } else {
                    session.notifications = never();
                    session.ask_for_cause();
                },
                recv(session.events) -> event => match event {
                    Ok(event) => self.on_session_event(session, event)?,
                    Err(RecvError) => return Err(self.connection_lost("the session has ended").into()),
                },
                recv(self.stop) -> _ => self.is_stopped = true,
                default(timeout) => self.on_idle(session)?,
            }
        }
        self.outcomes.deliver();
        Ok(())
    }

    fn on_session_event(&mut self, session: &mut Session, event: SessionEvent) -> Result<(), Error> {
        match event {
            SessionEvent::Connected { publisher, returns, confirms, notifications } => {
                log::info!("connected to {}", publisher.broker);
                start_at(&mut self.endpoints, &publisher.broker);
                self.broker.clone_from(&publisher.broker);
                self.diagnosis.on_waiting("starting a consumer");
                (session.returns, session.confirms, session.notifications) = (returns, confirms, notifications);
                session.publisher = Some(publisher);
                session.consumer_deadline = self.consumer_deadline(session);
                self.pending.send_all_again();
                self.publish_requests(session);
            }
            SessionEvent::Consuming(replies) => {
                (session.replies, session.is_consuming, session.consumer_deadline) = (replies, true, None);
                self.max_consumer_start = MAX_CONSUMER_START;
                self.diagnosis.on_reply(Instant::now());
            }
            SessionEvent::QueueChecked(stats) => {
                session.is_checking = false;
                self.on_queue_checked(&stats);
            }
            SessionEvent::Ended(error) => return Err(error),
        }
        Ok(())
    }

    /// Pauses before the next session, unless the error ends the run.
    fn on_session_error(&mut self, error: Error) -> Result<(), Error> {
        let Error::Connection(connection_error) = &error else {
            return Err(self.outcomes.end_all(&mut self.pending, error));
        };
        let end_call = |reason: &str| self.outcomes.end_too_large(&mut self.pending, &self.broker, reason);
        if too_large_reason(connection_error).is_some_and(end_call) {
            return Ok(()); // without a pause: there is nothing to wait for, and a call less
        }
        self.diagnosis.on_connection_error(connection_error);
        let pause = self.backoff.next_pause(Instant::now());
        let was_connected = !self.broker.is_empty();
        if ends_run(connection_error, self.pending.progress(was_connected)) {
            return Err(self.outcomes.end_all(&mut self.pending, error));
        }
        if connection_error.is_silence() {
            self.endpoints.rotate_left(1);
        }
        log::info!("{error}: connecting again");
        if let Some(deadline) = self.pending.first_deadline() {
            // The other half of the time is left to connect in.
            let pause = pause.min(deadline.remaining() / 2).max(MIN_PAUSE);
            self.is_stopped = self.stop.recv_timeout(pause).is_err_and(|end| end.is_disconnected());
        }
        if self.calls_can_expire(None) {
            self.expire();
        }
        self.outcomes.deliver();
        Ok(())
    }

    /// Begins the call of a request, or learns that there are no more.
    fn on_request_or_end(&mut self, request: Result<Request<T>, RecvError>) {
        match request {
            Ok(request) => self.on_request(request),
            Err(RecvError) => self.has_more_requests = false,
        }
    }

    /// Begins the call of a request; it is not sent yet.
    fn on_request(&mut self, request: Request<T>) {
        if self.pending.is_empty() {
            self.diagnosis.on_begin(Instant::now());
        }
        self.pending.begin(Uuid::new_v4(), request, Deadline::after(self.config.timeout));
    }

    /// Buffers the requests that are to be sent; the loop flushes them. Not while the broker blocks us: it would run them when
    /// their callers have gone.
    fn publish_requests(&mut self, session: &Session) {
        let (Some(publisher), false) = (&session.publisher, self.diagnosis.is_blocked()) else { return };
        while let Some(call) = self.pending.next_to_send() {
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
            // amiquip's I/O thread has ended.
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
        session.returns.try_iter().for_each(|request| self.on_return(&request)); // before their confirmations
        for confirm in session.confirms.try_iter() {
            if let Confirm::Ack(confirmed) = confirm {
                self.pending.on_ack(confirmed);
            }
        }
        session.notifications.try_iter().for_each(|notification| self.on_notification(notification));
    }

    /// Ends expired calls, gives up a late consumer, delivers outcomes, sends returned requests again, and looks at the request queue.
    fn on_idle(&mut self, session: &mut Session) -> Result<(), ConnectionError> {
        self.take_messages(session)?; // an answer that has arrived does not expire
        let all_expired = self.calls_can_expire(Some(session)) && self.expire() && self.pending.is_empty();
        self.give_up_late_consumer(session, all_expired);
        self.outcomes.deliver();
        let now = Instant::now();
        self.pending.start_resends(now);
        self.publish_requests(session);
        let can_check = session.is_consuming && !self.pending.is_empty();
        if self.diagnosis.start_check(now, can_check) {
            session.check_queue();
        }
        Ok(())
    }

    /// When the consumer must have started. While the broker blocks us there is no such time: the calls wait until it unblocks us.
    fn consumer_deadline(&self, session: &Session) -> Option<Instant> {
        let is_awaited = session.publisher.is_some() && !session.is_consuming && !self.diagnosis.is_blocked();
        is_awaited.then(|| Instant::now() + self.max_consumer_start)
    }

    /// Ends the session thread's wait for a consumer that has not started by its deadline, or before all calls expired.
    fn give_up_late_consumer(&mut self, session: &mut Session, all_expired: bool) {
        let Some(deadline) = session.consumer_deadline else { return };
        let is_late = deadline <= Instant::now();
        // An event that waits to be taken may say that it has started.
        if (!is_late && !all_expired) || !session.events.is_empty() {
            return;
        }
        if is_late {
            self.max_consumer_start *= 2;
        }
        session.consumer_deadline = None;
        session.shut_down();
    }

    fn on_queue_checked(&mut self, stats: &Result<QueueStats, ErrorKind>) {
        if self.diagnosis.on_queue_checked(stats) {
            let (queue, limit) = (&self.config.queue, format_duration(self.config.timeout));
            log::warn!("no server is consuming '{queue}'; waiting up to {limit}");
        }
        let now = Instant::now();
        if self.diagnosis.cause() == NoAnswerCause::QueueMissing {
            self.pending.on_missing_queue(now);
        }
        if stats.as_ref().is_ok_and(|stats| stats.messages > 0) {
            // It is full. An empty one that refuses requests has lost its process.
            self.outcomes.end_refused(&mut self.pending, now, &self.config.queue, &self.broker);
        }
        self.pending.resend_refused(now);
    }

    /// Takes a confirmation and those that have arrived by now. A request that is confirmed although there is no queue was
    /// returned before: so the returns are taken first.
    fn on_confirm(&mut self, session: &mut Session, confirm: Confirm) {
        let others = session.confirms.len();
        session.returns.try_iter().for_each(|request| self.on_return(&request));
        let mut is_any_refused = false;
        for confirm in iter::once(confirm).chain(session.confirms.try_iter().take(others)) {
            match confirm {
                Confirm::Ack(confirmed) => self.pending.on_ack(confirmed),
                Confirm::Nack(refused) => is_any_refused |= self.pending.on_nack(refused, Instant::now()),
            }
        }
        if is_any_refused {
            session.check_queue(); // is it full?
        }
    }

    fn on_reply(&mut self, delivery: Delivery) {
        self.diagnosis.on_reply(Instant::now());
        let Some(call) = self.pending.on_reply(delivery.properties.correlation_id().as_deref()) else {
            self.discarded += 1;
            log::info!("discarded an unexpected reply, {} in all", self.discarded);
            return;
        };
        let time_left = call.deadline.remaining();
        let result = decode_reply(&delivery.properties, delivery.body);
        self.outcomes.add(call, result.map_err(|failure| Error::failed(failure, time_left)));
    }

    fn on_return(&mut self, request: &Return) {
        let id = request.properties.correlation_id().as_deref();
        let error = Error::NoQueue { queue: self.config.queue.clone(), broker: self.broker.clone() };
        match self.pending.on_return(id, Instant::now()) {
            Some(Returned::Ended(call)) => self.outcomes.add(call, Err(error)),
            Some(Returned::WillResend) => log::info!("{error} sending again"),
            None => {}
        }
    }

    fn on_notification(&mut self, notification: ConnectionBlockedNotification) {
        match self.diagnosis.on_notification(notification) {
            Some(reason) => log::warn!("{} blocks publishers: {reason}; waiting", self.broker),
            None => log::info!("{} no longer blocks publishers", self.broker),
        }
    }

    /// Ends the calls whose deadline has passed. Returns whether there were any.
    fn expire(&mut self) -> bool {
        let (now, before) = (Instant::now(), self.pending.len());
        while let Some(call) = self.pending.expire(now) {
            let (queue, broker) = (self.config.queue.clone(), self.broker.clone());
            let (limit, cause) = (call.deadline.limit(), self.diagnosis.cause());
            let ahead = self.pending.calls_ahead(&call);
            let error = if self.config.wait && call.was_never_accepted() {
                Error::NoQueue { queue, broker }
            } else {
                Error::NoAnswer { queue, broker, limit, cause, ahead }
            };
            self.outcomes.add(call, Err(error));
        }
        self.pending.len() < before
    }

    fn connection_lost(&self, reason: &str) -> ConnectionError {
        ConnectionError::new(&self.broker, ErrorKind::ConnectionLost(reason.into()))
    }

    fn has_room(&self) -> bool {
        self.has_more_requests && self.pending.len() < self.config.in_flight.into() && self.pending.accepts_calls()
    }

    /// Whether calls expire by the timer: when we are connected, or a request was sent before. Else nothing was sent yet: then
    /// connecting has their deadline, and its error, which ends the run, says why.
    fn calls_can_expire(&self, session: Option<&Session>) -> bool {
        session.is_some_and(|session| session.publisher.is_some()) || self.pending.was_any_sent()
    }

    fn until_next_timer(&self, session: &Session) -> Duration {
        if !self.calls_can_expire(Some(session)) {
            return Duration::MAX;
        }
        let Some(next_timer) = self.pending.next_timer() else { return Duration::MAX };
        let timers = [next_timer, self.diagnosis.next_check].into_iter().chain(session.consumer_deadline);
        timers.min().map_or(Duration::MAX, |timer| timer.saturating_duration_since(Instant::now()))
    }
}
