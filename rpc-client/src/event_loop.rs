//! The event loop: begins calls, sends their requests, receives replies, and connects again when a
//! connection ends.
//!
//! It drives the link of the connection, so its thread is the one that a reply wakes.

use crate::call::{Error, NoAnswerCause, Request};
use crate::config::Config;
use crate::diagnosis::Diagnosis;
use crate::outcomes::{OnOutcomes, Outcomes};
use crate::pending::{PendingCalls, Returned};
use crate::requests::Requests;
use crate::retry::{ends_run, too_large_reason, MIN_PAUSE};
use crate::session::{Connected, Session, SessionEvent};
use rpc_common::connection::{
    self, start_at, Arrived, Backoff, Confirmed, Deadline, Delivery, Endpoint,
    Error as ConnectionError, ErrorKind, Message, Notification, Phase, QueueStats,
};
use rpc_common::message::decode_reply;
use rpc_common::text::format_duration;
use std::time::{Duration, Instant};
use uuid::Uuid;

/// How long the broker may take to start the consumer; after each session that it did not, twice as
/// long. A declaration that RabbitMQ 4.3 begins while a node is frozen or lost hangs for 30 s; a
/// few seconds later, on a new connection, it takes milliseconds.
const MAX_CONSUMER_START: Duration = Duration::from_secs(10);

/// The maximum number of reads before calls expire, of 64 KiB each.
const MAX_READS: u32 = 256;

/// Makes a call of each request, until there are no more and all calls have ended, or until it is
/// stopped. Runs on the calling thread.
///
/// Calls that are unanswered when a connection ends are sent again on the next one, under the same
/// correlation id, until their deadline. When a [`Stopper`](crate::Stopper) ends it, what is
/// unanswered has no outcome.
///
/// # Errors
/// [`Error::Connection`] or [`Error::RefusedAfterSend`] when the broker cannot be reached or
/// refuses us. It is the outcome of all pending calls, too; the other requests stay in the channel.
pub fn run<T>(
    config: &Config,
    endpoints: Vec<Endpoint>,
    requests: &Requests<T>,
    on_outcomes: &mut OnOutcomes<T>,
) -> Result<(), Error> {
    let now = Instant::now();
    let mut event_loop = EventLoop {
        config,
        endpoints,
        requests,
        pending: PendingCalls::new(config.wait),
        outcomes: Outcomes::new(on_outcomes),
        backoff: Backoff::new(now),
        max_consumer_start: MAX_CONSUMER_START,
        address: String::new(),
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
    requests: &'a Requests<T>,
    pending: PendingCalls<T>,
    outcomes: Outcomes<'a, 'f, T>,
    backoff: Backoff,
    /// How long the broker may take to start the consumer of the next session.
    max_consumer_start: Duration,
    /// Host and port of the broker that was connected last; empty before.
    address: String,
    diagnosis: Diagnosis,
    /// How many replies belonged to no pending call.
    discarded: u64,
}

impl<T> EventLoop<'_, '_, T> {
    fn make_calls(&mut self) -> Result<(), Error> {
        while self.wait_for_call() {
            let deadline = self.pending.connect_deadline();
            let needs_consumers = self.config.no_wait && !self.pending.was_any_sent();
            let mut session = Session::start(
                self.endpoints.clone(),
                self.config,
                needs_consumers,
                deadline,
                self.requests.waker(),
            );
            let result = self.use_session(&mut session);
            if result.is_err() {
                self.take_arrived(&mut session); // it does not arrive again
            }
            session.close(self.requests.waker());
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
        while self.pending.is_empty() && self.requests.has_more() && !self.requests.is_stopped() {
            match self.requests.try_take() {
                Some(request) => self.begin(request),
                None => self.requests.wait(None, true),
            }
        }
        !self.pending.is_empty() && !self.requests.is_stopped()
    }

    /// Makes calls on one session, until every request has its outcome or the session ends.
    fn use_session(&mut self, session: &mut Session) -> Result<(), Error> {
        while (self.requests.has_more() || !self.pending.is_empty()) && !self.requests.is_stopped()
        {
            self.begin_calls(session);
            self.publish_requests(session);
            self.outcomes.deliver();
            if let Some(deadline) = self.pending.first_deadline() {
                session.close_deadline = deadline;
            }
            let next_timer = self.next_timer(session);
            session.wait(next_timer, self.requests, self.takes_requests(session));
            let is_timer_due = next_timer.is_some_and(|timer| timer <= Instant::now());
            if is_timer_due {
                session.receive(MAX_READS); // an answer that has arrived does not expire
            }
            // A look at the queue decides with the confirmations that came before.
            self.take_arrived(session);
            while let Some(event) = session.take_event() {
                self.on_session_event(session, event)?;
            }
            let end = self.take_arrived(session);
            end.map_or(Ok(()), |kind| {
                Err(ConnectionError::new(&self.address, kind))
            })?;
            if is_timer_due {
                self.on_timer(session);
            }
        }
        self.outcomes.deliver();
        Ok(())
    }

    /// Begins the calls of the requests that have arrived.
    fn begin_calls(&mut self, session: &Session) {
        if !self.takes_requests(session) {
            return;
        }
        while self.has_room() {
            let Some(request) = self.requests.try_take() else {
                return;
            };
            self.begin(request);
        }
    }

    /// Until the consumer is started, one pending call is enough: more would end with the same
    /// error. But while the broker blocks us, calls begin and expire as usual.
    fn takes_requests(&self, session: &Session) -> bool {
        let can_begin =
            session.is_consuming || self.pending.is_empty() || self.diagnosis.is_blocked();
        can_begin && self.has_room()
    }

    fn on_session_event(
        &mut self,
        session: &mut Session,
        event: SessionEvent,
    ) -> Result<(), Error> {
        match event {
            SessionEvent::Linked(_) => {}
            SessionEvent::Connected(connected) => {
                let address = &connected.publisher.address;
                log::info!("connected to {address}");
                start_at(&mut self.endpoints, address);
                self.address.clone_from(address);
                self.diagnosis.on_waiting(Phase::StartingConsumer);
                session.connected = Some(*connected);
                session.consumer_deadline = self.consumer_deadline(session);
                self.pending.send_all_again();
            }
            SessionEvent::Consuming => {
                session.is_consuming = true;
                session.consumer_deadline = None;
                self.max_consumer_start = MAX_CONSUMER_START;
                self.diagnosis.on_reply(Instant::now());
            }
            SessionEvent::QueueChecked(stats) => {
                session.is_checking = false;
                self.on_queue_checked(&stats);
            }
            SessionEvent::Failed(error) => return Err(error),
            SessionEvent::ThreadEnded => {
                return Err(self.connection_lost("the session has ended").into())
            }
        }
        Ok(())
    }

    /// Pauses before the next session, unless the error ends the run.
    fn on_session_error(&mut self, error: Error) -> Result<(), Error> {
        let Error::Connection(connection_error) = &error else {
            return Err(self.outcomes.end_all(&mut self.pending, error));
        };
        let end_call = |reason: &str| {
            self.outcomes
                .end_too_large(&mut self.pending, &self.address, reason)
        };
        if too_large_reason(connection_error).is_some_and(end_call) {
            return Ok(()); // without a pause: there is nothing to wait for, and a call less
        }
        self.diagnosis.on_connection_error(connection_error);
        let pause = self.backoff.next_pause(Instant::now());
        let was_connected = !self.address.is_empty();
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
            let until = Instant::now() + pause;
            while Instant::now() < until && !self.requests.is_stopped() {
                self.requests.wait(Some(until), false);
            }
        }
        if self.calls_can_expire(None) {
            self.expire();
        }
        self.outcomes.deliver();
        Ok(())
    }

    /// Begins the call of a request; it is not sent yet.
    fn begin(&mut self, request: Request<T>) {
        if self.pending.is_empty() {
            self.diagnosis.on_begin(Instant::now());
        }
        self.pending.begin(
            Uuid::new_v4(),
            request,
            Deadline::after(self.config.timeout),
        );
    }

    /// Publishes the requests that are to be sent. Not while the broker blocks us or does not read:
    /// it would run them when their callers have gone.
    fn publish_requests(&mut self, session: &Session) {
        let (Some(Connected { publisher, .. }), false) =
            (&session.connected, self.diagnosis.is_blocked())
        else {
            return;
        };
        while publisher.is_writable() {
            let Some(call) = self.pending.next_to_send() else {
                break;
            };
            let id = call.id;
            if let Err(error) = publisher.publish(&self.config.queue, call) {
                self.outcomes
                    .end_unsent(&mut self.pending, id, &self.address, &error.to_string());
            }
        }
        publisher.flush();
    }

    /// Takes what has arrived: replies and returned requests, then confirmations (a request that is
    /// confirmed although there is no queue was returned before), then notifications. Returns how
    /// the consumer, its channel or the connection ended.
    fn take_arrived(&mut self, session: &mut Session) -> Option<ErrorKind> {
        let connected = session.connected.as_ref()?;
        let Arrived {
            messages,
            confirmed,
            end,
        } = connected.inbox.take();
        let notifications = connected.notifications.try_iter().collect::<Vec<_>>();
        for message in messages {
            match message {
                Message::Delivery(delivery) => self.on_reply(delivery),
                Message::Returned(request) => self.on_return(&request),
            }
        }
        self.on_confirmed(session, &confirmed);
        for notification in notifications {
            self.on_notification(notification);
            session.consumer_deadline = self.consumer_deadline(session);
        }
        match end {
            Some(ErrorKind::ConsumerCancelled) => Some(ErrorKind::ConnectionLost(
                "the reply queue was deleted".into(),
            )),
            // Until it consumes, the session's thread learns why the broker has closed the channel,
            // and what that means.
            end => end
                .filter(|_| session.is_consuming)
                .or_else(|| session.ended()),
        }
    }

    /// Ends expired calls, gives up a late consumer, sends returned requests again, and looks at
    /// the request queue.
    fn on_timer(&mut self, session: &mut Session) {
        let all_expired =
            self.calls_can_expire(Some(session)) && self.expire() && self.pending.is_empty();
        self.give_up_late_consumer(session, all_expired);
        let now = Instant::now();
        self.pending.start_resends(now);
        let can_check = session.is_consuming && !self.pending.is_empty();
        if self.diagnosis.start_check(now, can_check) {
            session.check_queue();
        }
    }

    /// When the consumer must have started. While the broker blocks us there is no such time: the
    /// calls wait until it unblocks us.
    fn consumer_deadline(&self, session: &Session) -> Option<Instant> {
        let is_awaited =
            session.connected.is_some() && !session.is_consuming && !self.diagnosis.is_blocked();
        is_awaited.then(|| Instant::now() + self.max_consumer_start)
    }

    /// Ends the session thread's wait for a consumer that has not started by its deadline, or
    /// before all calls expired.
    fn give_up_late_consumer(&mut self, session: &mut Session, all_expired: bool) {
        let Some(deadline) = session.consumer_deadline else {
            return;
        };
        let is_late = deadline <= Instant::now();
        // An event that waits to be taken may say that it has started.
        if (!is_late && !all_expired) || session.has_event() {
            return;
        }
        if is_late {
            self.max_consumer_start *= 2;
        }
        session.consumer_deadline = None;
        session.give_up();
    }

    fn on_queue_checked(&mut self, stats: &Result<QueueStats, ErrorKind>) {
        if self.diagnosis.on_queue_checked(stats) {
            let queue = &self.config.queue;
            let limit = format_duration(self.config.timeout);
            log::warn!("no server is consuming '{queue}'; waiting up to {limit}");
        }
        let now = Instant::now();
        if self.diagnosis.cause() == NoAnswerCause::QueueMissing {
            self.pending.on_missing_queue(now);
        }
        if stats.as_ref().is_ok_and(|stats| stats.messages > 0) {
            // It is full. An empty one that refuses requests has lost its process.
            self.outcomes
                .end_refused(&mut self.pending, now, &self.config.queue, &self.address);
        }
        self.pending.resend_refused(now);
    }

    fn on_confirmed(&mut self, session: &mut Session, confirmed: &[Confirmed]) {
        let mut is_any_refused = false;
        for confirmed in confirmed {
            if confirmed.is_ack {
                self.pending.on_ack(*confirmed);
            } else {
                is_any_refused |= self.pending.on_nack(*confirmed, Instant::now());
            }
        }
        if is_any_refused {
            session.check_queue(); // is it full?
        }
    }

    fn on_reply(&mut self, mut delivery: Delivery) {
        self.diagnosis.on_reply(Instant::now());
        let body = std::mem::take(&mut delivery.body);
        let properties = delivery.properties().unwrap_or_default();
        let Some(call) = self.pending.on_reply(properties.correlation_id) else {
            self.discarded += 1;
            log::info!("discarded an unexpected reply, {} in all", self.discarded);
            return;
        };
        let time_left = call.deadline.remaining();
        let result = decode_reply(&properties, body);
        self.outcomes.add(
            call,
            result.map_err(|failure| Error::failed(failure, time_left)),
        );
    }

    fn on_return(&mut self, request: &connection::Returned) {
        let error = Error::NoQueue {
            queue: self.config.queue.clone(),
            address: self.address.clone(),
        };
        match self
            .pending
            .on_return(request.correlation_id(), Instant::now())
        {
            Some(Returned::Ended(call)) => self.outcomes.add(call, Err(error)),
            Some(Returned::WillResend) => log::info!("{error} sending again"),
            None => {}
        }
    }

    fn on_notification(&mut self, notification: Notification) {
        match self.diagnosis.on_notification(notification) {
            Some(reason) => log::warn!("{} blocks publishers: {reason}; waiting", self.address),
            None => log::info!("{} no longer blocks publishers", self.address),
        }
    }

    /// Ends the calls whose deadline has passed. Returns whether there were any.
    fn expire(&mut self) -> bool {
        let now = Instant::now();
        let before = self.pending.len();
        while let Some(call) = self.pending.expire(now) {
            let queue = self.config.queue.clone();
            let address = self.address.clone();
            let limit = call.deadline.limit();
            let cause = self.diagnosis.cause();
            let ahead = self.pending.calls_ahead(&call);
            let error = if self.config.wait && call.was_never_accepted() {
                Error::NoQueue { queue, address }
            } else {
                Error::NoAnswer {
                    queue,
                    address,
                    limit,
                    cause,
                    ahead,
                }
            };
            self.outcomes.add(call, Err(error));
        }
        self.pending.len() < before
    }

    fn connection_lost(&self, reason: &str) -> ConnectionError {
        ConnectionError::new(&self.address, ErrorKind::ConnectionLost(reason.into()))
    }

    fn has_room(&self) -> bool {
        self.requests.has_more()
            && self.pending.len() < self.config.in_flight.into()
            && self.pending.accepts_calls()
    }

    /// Whether calls expire by the timer: when we are connected, or a request was sent before. Else
    /// nothing was sent yet: then connecting has their deadline, and its error, which ends the run,
    /// says why.
    fn calls_can_expire(&self, session: Option<&Session>) -> bool {
        session.is_some_and(|session| session.connected.is_some()) || self.pending.was_any_sent()
    }

    fn next_timer(&self, session: &Session) -> Option<Instant> {
        if !self.calls_can_expire(Some(session)) {
            return None;
        }
        let timers = [self.pending.next_timer()?, self.diagnosis.next_check]
            .into_iter()
            .chain(session.consumer_deadline);
        timers.min()
    }
}
