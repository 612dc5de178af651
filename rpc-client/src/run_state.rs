//! The state of a run, and its decisions. Pure: the event loop in [`run`](mod@crate::run) moves
//! messages between this state and the broker.
//!
//! [`RunState::step`] takes one [`Event`]. The results are taken by
//! [`publish_next`](RunState::publish_next), [`take_outcomes`](RunState::take_outcomes),
//! [`take_commands`](RunState::take_commands) and [`next_wake`](RunState::next_wake).

use crate::call::{Error, NoAnswerCause, Outcome, Request};
use crate::config::Config;
use crate::diagnosis::Diagnosis;
use crate::pending::{AfterReturn, Call, PendingCalls, SendResult};
use crate::session_end::{ends_run, is_request_refused, too_large_reason, MIN_PAUSE};
use rpc_common::connection::{
    self, Backoff, Confirmation, Deadline, Delivery, Error as ConnectionError, ErrorKind,
    Notification, Phase, QueueStats,
};
use rpc_common::message::{decode_reply, Answer, ErrorCode};
use rpc_common::text::format_duration;
use std::mem;
use std::time::{Duration, Instant};
use uuid::Uuid;

/// Maximum time in which the broker starts the consumer; doubles after each session in which it did
/// not. A declaration that RabbitMQ 4.3 begins while a node is frozen or lost hangs for 30 s; a few
/// seconds later, on a new connection, it takes milliseconds.
const MAX_CONSUMER_START: Duration = Duration::from_secs(10);

/// An event of a run.
#[derive(Debug)]
pub(crate) enum Event {
    /// Requests can be published, to the broker at this address.
    Connected(String),
    /// Replies can be received.
    Consuming,
    /// A message to the reply queue.
    Reply(Delivery),
    /// A request that the broker could not route to a queue.
    Returned(connection::Returned),
    /// Acks or nacks of requests.
    Confirmation(Confirmation),
    /// The broker blocks publishers, or no longer does.
    Notification(Notification),
    /// The answer to [`SessionCommand::QueueStats`].
    QueueStats(Result<QueueStats, ErrorKind>),
    /// The consumer or its channel has ended.
    ChannelEnded(ErrorKind),
    /// The connection has ended after it was opened.
    ConnectionEnded(ErrorKind),
    /// The session has failed.
    Failed(Error),
    /// The instant of [`RunState::next_wake`] has come.
    Timer,
}

/// A command to the session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SessionCommand {
    /// Ask for [`Event::QueueStats`], unless they are still to come.
    QueueStats,
    /// End the connection: the broker has not started the consumer in time.
    GiveUp,
}

/// The state of the session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum SessionState {
    Connecting,
    /// Requests can be published, while the consumer is being started: that saves a round trip,
    /// and replies wait in the reply queue. The consumer must start `by` this instant; while the
    /// broker blocks us there is none: the calls wait until it unblocks us.
    Starting {
        by: Option<Instant>,
    },
    Consuming,
}

/// The state of a run, over all of its sessions.
pub(crate) struct RunState<'a, T> {
    config: &'a Config,
    session: SessionState,
    pending: PendingCalls<T>,
    outcomes: Vec<Outcome<T>>,
    commands: Vec<SessionCommand>,
    diagnosis: Diagnosis,
    backoff: Backoff,
    /// Address of the broker that was connected last; before that, of the one that is tried first.
    address: String,
    was_connected: bool,
    /// Maximum time in which the broker starts the consumer of the next session.
    max_consumer_start: Duration,
    /// Number of replies that belonged to no pending call.
    discarded: u64,
}

impl<'a, T> RunState<'a, T> {
    /// `address` is that of the broker that is tried first.
    pub(crate) fn new(config: &'a Config, address: &str, now: Instant) -> Self {
        RunState {
            config,
            session: SessionState::Connecting,
            pending: PendingCalls::new(config.wait),
            outcomes: Vec::new(),
            commands: Vec::new(),
            diagnosis: Diagnosis::new(now),
            backoff: Backoff::new(now),
            address: address.into(),
            was_connected: false,
            max_consumer_start: MAX_CONSUMER_START,
            discarded: 0,
        }
    }

    /// Whether no call is pending.
    pub(crate) fn is_idle(&self) -> bool {
        self.pending.is_empty()
    }

    /// Whether a further call may begin. Until the consumer is started, one pending call is enough:
    /// more would end with the same error. But while the broker blocks us, calls begin and expire
    /// as usual.
    pub(crate) fn takes_requests(&self) -> bool {
        let is_consuming = self.session == SessionState::Consuming;
        (is_consuming || self.pending.is_empty() || self.diagnosis.is_blocked())
            && self.pending.len() < self.config.in_flight.into()
            && self.pending.accepts_calls()
    }

    /// Begins the call of a request; the request is unsent.
    pub(crate) fn begin(&mut self, id: Uuid, request: Request<T>, now: Instant) {
        if self.pending.is_empty() {
            self.diagnosis.on_begin(now);
        }
        let deadline = Deadline::at(now, self.config.timeout);
        self.pending.begin(id, request, deadline);
    }

    /// The deadline of connecting.
    ///
    /// # Panics
    /// If no call is pending.
    pub(crate) fn connect_deadline(&self) -> Deadline {
        self.pending.connect_deadline()
    }

    /// Whether a request queue without consumers ends the run.
    pub(crate) fn needs_consumers(&self) -> bool {
        self.config.no_wait && !self.pending.was_any_sent()
    }

    /// The deadline that passes first.
    pub(crate) fn first_deadline(&self) -> Option<Deadline> {
        self.pending.first_deadline()
    }

    /// Whether a request is to be published. Not while the broker blocks us: requests that are
    /// published then would be run when their callers have gone.
    pub(crate) fn has_unsent(&self) -> bool {
        self.pending.has_unsent()
            && self.session != SessionState::Connecting
            && !self.diagnosis.is_blocked()
    }

    /// Publishes the next unsent request by `publish`. A request that cannot be published ends its
    /// call. Returns false if there is none.
    pub(crate) fn publish_next<E: ToString>(
        &mut self,
        now: Instant,
        publish: impl FnOnce(&Call<T>) -> Result<(), E>,
    ) -> bool {
        if !self.has_unsent() {
            return false;
        }
        match self.pending.publish_next(now, publish) {
            None => return false,
            Some(SendResult::Sent) => {}
            Some(SendResult::Failed(call, error)) => {
                self.end_too_large(call, &error.to_string(), now);
            }
        }
        true
    }

    /// Takes the outcomes of ended calls, in the order in which the calls ended.
    pub(crate) fn take_outcomes(&mut self) -> Vec<Outcome<T>> {
        mem::take(&mut self.outcomes)
    }

    /// Takes the commands to the session.
    pub(crate) fn take_commands(&mut self) -> Vec<SessionCommand> {
        mem::take(&mut self.commands)
    }

    /// Instant of the next [`Event::Timer`]. `None` while nothing can be late.
    pub(crate) fn next_wake(&self) -> Option<Instant> {
        if !self.calls_can_expire() {
            return None;
        }
        let by = match self.session {
            // Looks and resends wait for the next connection.
            SessionState::Connecting => {
                return self
                    .pending
                    .first_deadline()
                    .map(|deadline| deadline.instant());
            }
            SessionState::Starting { by } => by,
            SessionState::Consuming => None,
        };
        let timers = [self.pending.next_timer()?, self.diagnosis.next_stats()];
        timers.into_iter().chain(by).min()
    }

    /// Takes one event.
    ///
    /// # Errors
    /// The session has ended, with this error: [`on_session_end`](Self::on_session_end) is next.
    pub(crate) fn step(&mut self, event: Event, now: Instant) -> Result<(), Error> {
        match event {
            Event::Connected(address) => self.on_connected(address, now),
            Event::Consuming => {
                self.session = SessionState::Consuming;
                self.max_consumer_start = MAX_CONSUMER_START;
                self.diagnosis.on_consuming(now);
            }
            Event::Reply(delivery) => self.on_reply(delivery, now),
            Event::Returned(request) => self.on_return(&request, now),
            Event::Confirmation(confirmation) if confirmation.is_ack => {
                self.pending.on_ack(confirmation);
            }
            Event::Confirmation(confirmation) => {
                self.on_nack(confirmation, now);
            }
            Event::Notification(notification) => self.on_notification(notification, now),
            Event::QueueStats(stats) => self.on_queue_stats(&stats, now),
            Event::ChannelEnded(ErrorKind::ConsumerCancelled) => {
                let reason = "the reply queue was deleted".into();
                return Err(self.error(ErrorKind::ConnectionLost(reason)));
            }
            Event::ChannelEnded(kind) if self.session == SessionState::Consuming => {
                return Err(self.error(kind));
            }
            // Ignored while starting: the session's thread reports the cause as `Failed`.
            Event::ChannelEnded(_) => {}
            Event::ConnectionEnded(kind) => return Err(self.error(kind)),
            Event::Failed(error) => return Err(error),
            Event::Timer => self.on_timer(now),
        }
        Ok(())
    }

    /// The session has ended. Returns the pause before the next one.
    ///
    /// # Errors
    /// The run has ended with this error, and with it all calls.
    pub(crate) fn on_session_end(&mut self, error: Error, now: Instant) -> Result<Duration, Error> {
        let was_consuming = self.session == SessionState::Consuming;
        self.session = SessionState::Connecting;
        self.commands.clear();
        let Error::Connection(connection_error) = &error else {
            return Err(self.end_all(error, was_consuming, now));
        };
        if let Some(reason) = too_large_reason(connection_error) {
            if let Some(call) = self.pending.pop_too_large() {
                self.end_too_large(call, reason, now);
                return Ok(Duration::ZERO); // there is nothing to wait for, and a call less
            }
        }
        self.diagnosis.on_connection_error(connection_error);
        let pause = self.backoff.next_pause(now);
        if ends_run(
            connection_error,
            self.pending.progress(self.was_connected, now),
        ) {
            return Err(self.end_all(error, was_consuming, now));
        }
        log::info!("{error}: connecting again");
        Ok(match self.pending.first_deadline() {
            // The calls that expire meanwhile do not make it shorter.
            Some(_) if self.pending.was_any_sent() => pause,
            // The other half of the time is left to connect in.
            Some(deadline) => pause.min(deadline.remaining_at(now) / 2).max(MIN_PAUSE),
            None => Duration::ZERO,
        })
    }

    fn on_connected(&mut self, address: String, now: Instant) {
        log::info!("connected to {address}");
        self.address = address;
        self.was_connected = true;
        self.diagnosis.on_waiting(Phase::StartingConsumer);
        self.session = self.starting(now);
        self.pending.on_new_connection();
    }

    fn starting(&self, now: Instant) -> SessionState {
        let by = (!self.diagnosis.is_blocked()).then(|| now + self.max_consumer_start);
        SessionState::Starting { by }
    }

    fn on_reply(&mut self, mut delivery: Delivery, now: Instant) {
        let body = mem::take(&mut delivery.body);
        let properties = delivery.properties().unwrap_or_default();
        let Some(call) = self.pending.on_reply(properties.correlation_id) else {
            self.discarded += 1;
            log::info!("discarded an unexpected reply, {} in all", self.discarded);
            if self.pending.is_foreign(properties.correlation_id) {
                self.diagnosis.on_foreign_reply();
            }
            return;
        };
        self.diagnosis.on_reply(now);
        let time_left = call.deadline.remaining_at(now);
        let result = decode_reply(&properties, body).map_err(|failure| {
            if failure.code == ErrorCode::Expired && time_left.is_zero() {
                // As if the reply came a moment later: the deadline has passed.
                self.no_answer(&call, NoAnswerCause::Expired)
            } else {
                Error::failed(failure, time_left)
            }
        });
        self.end(call, result, now);
    }

    fn on_nack(&mut self, confirmation: Confirmation, now: Instant) {
        let ended = self.pending.on_nack(confirmation, now);
        let Config { queue, .. } = self.config;
        if ended.is_empty() {
            log::info!(
                "queue '{queue}' on {} refused a request: sending again",
                self.address
            );
        }
        for call in ended {
            let error = Error::QueueFull {
                queue: queue.clone(),
                address: self.address.clone(),
            };
            self.end(call, Err(error), now);
        }
    }

    fn on_return(&mut self, request: &connection::Returned, now: Instant) {
        let error = self.no_queue();
        match self.pending.on_return(request.correlation_id(), now) {
            Some(AfterReturn::Ended(call)) => self.end(call, Err(error), now),
            Some(AfterReturn::WillResend) => log::info!("{error} sending again"),
            None => {}
        }
    }

    fn on_notification(&mut self, notification: Notification, now: Instant) {
        match self.diagnosis.on_notification(notification) {
            Some(reason) => log::warn!("{} blocks publishers: {reason}; waiting", self.address),
            None => log::info!("{} no longer blocks publishers", self.address),
        }
        if let SessionState::Starting { .. } = self.session {
            self.session = self.starting(now);
        }
    }

    fn on_queue_stats(&mut self, stats: &Result<QueueStats, ErrorKind>, now: Instant) {
        if self.diagnosis.on_queue_stats(stats) {
            let queue = &self.config.queue;
            let limit = format_duration(self.config.timeout);
            log::warn!("no server is consuming '{queue}'; waiting up to {limit}");
        }
        if self.diagnosis.cause() == NoAnswerCause::QueueMissing {
            self.pending.on_missing_queue(now);
        }
    }

    /// Ends expired calls, gives up a late consumer, makes requests to resend unsent, and asks for
    /// `queue_stats`.
    fn on_timer(&mut self, now: Instant) {
        let has_expired = self.calls_can_expire() && self.expire(now);
        if let SessionState::Starting { by: Some(by) } = self.session {
            if by <= now {
                self.max_consumer_start *= 2;
            }
            if by <= now || (has_expired && self.pending.is_empty()) {
                self.session = SessionState::Starting { by: None };
                self.commands.push(SessionCommand::GiveUp);
            }
        }
        if self.session == SessionState::Connecting {
            return; // the next connection publishes all requests again
        }
        self.pending.on_timer(now);
        let can_ask = self.session == SessionState::Consuming && !self.pending.is_empty();
        if self.diagnosis.take_stats_due(now, can_ask) {
            self.commands.push(SessionCommand::QueueStats);
        }
    }

    /// Whether calls expire by the timer: when we are connected, or a request was sent before.
    /// Before anything is sent, only connecting times out. Its error ends the run.
    fn calls_can_expire(&self) -> bool {
        self.session != SessionState::Connecting || self.pending.was_any_sent()
    }

    /// Ends the calls whose deadline has passed. Returns whether there were any.
    fn expire(&mut self, now: Instant) -> bool {
        let before = self.pending.len();
        while let Some(call) = self.pending.expire(now) {
            let error = if self.config.wait && call.was_never_accepted() {
                self.no_queue()
            } else {
                self.no_answer(&call, self.diagnosis.cause())
            };
            self.end(call, Err(error), now);
        }
        self.pending.len() < before
    }

    fn no_answer(&self, call: &Call<T>, cause: NoAnswerCause) -> Error {
        Error::NoAnswer {
            queue: self.config.queue.clone(),
            address: self.address.clone(),
            limit: call.deadline.limit(),
            cause,
            ahead: self.pending.calls_ahead(call),
        }
    }

    fn end(&mut self, call: Call<T>, result: Result<Answer, Error>, now: Instant) {
        let latency = call
            .first_sent
            .map(|sent| now.saturating_duration_since(sent));
        self.outcomes.push(Outcome {
            request: call.request,
            correlation_id: call.id,
            latency,
            result,
        });
    }

    fn end_too_large(&mut self, call: Call<T>, reason: &str, now: Instant) {
        let error = Error::TooLarge {
            size: call.request.body.len(),
            address: self.address.clone(),
            reason: reason.into(),
        };
        self.end(call, Err(error), now);
    }

    /// Ends all pending calls with this error.
    fn end_all(&mut self, error: Error, was_consuming: bool, now: Instant) -> Error {
        let unknown = match &error {
            // The broker refused one of the requests, and does not say which one.
            Error::Connection(error) if is_request_refused(error) => {
                self.pending.unconfirmed_count() > 1
            }
            // If the consumer was not started, the broker has ignored the requests.
            _ => was_consuming,
        };
        while let Some(call) = self.pending.pop() {
            let may_have_run = call.may_have_run() || (unknown && call.is_unconfirmed());
            let error = match &error {
                Error::Connection(error) if may_have_run => Error::RefusedAfterSend(error.clone()),
                error => error.clone(),
            };
            self.end(call, Err(error), now);
        }
        error
    }

    fn no_queue(&self) -> Error {
        Error::NoQueue {
            queue: self.config.queue.clone(),
            address: self.address.clone(),
        }
    }

    fn error(&self, kind: ErrorKind) -> Error {
        ConnectionError::new(&self.address, kind).into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rpc_common::connection::{Reason, ACCESS_REFUSED};
    use rpc_common::properties::{Properties, TableBuilder};
    use std::collections::BTreeMap;
    use std::convert::Infallible;

    /// A **script** plays events to the state of a run, at instants of its own. Calls have names.
    struct Script<'a> {
        state: RunState<'a, &'static str>,
        now: Instant,
        ids: BTreeMap<&'static str, Uuid>,
    }

    impl<'a> Script<'a> {
        fn new(config: &'a Config) -> Self {
            let now = Instant::now();
            Script {
                state: RunState::new(config, "rabbit:5672", now),
                now,
                ids: BTreeMap::new(),
            }
        }

        /// A script whose session consumes, with these calls published.
        fn consuming(config: &'a Config, calls: &[&'static str]) -> Self {
            let mut script = Script::new(config);
            for name in calls {
                script.begin(name);
            }
            script.connect();
            assert_eq!(script.published(), calls);
            script
        }

        fn begin(&mut self, name: &'static str) {
            let id = Uuid::from_u128(self.ids.len() as u128);
            let body = name.into();
            let context = name;
            self.ids.insert(name, id);
            self.state.begin(id, Request { context, body }, self.now);
        }

        fn step(&mut self, event: Event) {
            self.state
                .step(event, self.now)
                .expect("the session goes on");
        }

        fn connect(&mut self) {
            self.step(Event::Connected("rabbit:5672".into()));
            self.step(Event::Consuming);
        }

        /// Ends the session. Returns the pause before the next one, or how the run ended.
        fn end(&mut self, kind: ErrorKind) -> Result<Duration, Error> {
            let end = self.state.step(Event::ConnectionEnded(kind), self.now);
            self.state.on_session_end(end.unwrap_err(), self.now)
        }

        fn later(&mut self, duration: Duration) {
            self.now += duration;
            if self.state.next_wake().is_some_and(|wake| wake <= self.now) {
                self.step(Event::Timer);
            }
        }

        fn properties(&self, name: &str) -> Vec<u8> {
            let id = self.ids[name].to_string();
            let correlation_id = Some(id.as_bytes());
            let properties = Properties {
                correlation_id,
                ..Properties::default()
            };
            properties.encode()
        }

        fn reply(&mut self, name: &str) {
            self.step(Event::Reply(Delivery {
                delivery_tag: 1,
                is_redelivered: false,
                encoded_properties: self.properties(name),
                body: format!("{name}!").into(),
            }));
        }

        fn return_request(&mut self, name: &str) {
            self.step(Event::Returned(connection::Returned {
                routing_key: b"rpc_queue".into(),
                encoded_properties: self.properties(name),
            }));
        }

        fn confirm(&mut self, first: u64, last: u64, is_ack: bool) {
            self.step(Event::Confirmation(Confirmation {
                first,
                last,
                is_ack,
            }));
        }

        fn queue_stats(&mut self, messages: u32) {
            let consumers = 1;
            self.step(Event::QueueStats(Ok(QueueStats {
                messages,
                consumers,
            })));
        }

        /// Publishes all unsent requests. Returns their calls.
        fn published(&mut self) -> Vec<&'static str> {
            let mut names = Vec::new();
            while self.state.publish_next(self.now, |call| {
                assert_eq!(self.ids[call.request.context], call.id, "the id stays");
                names.push(call.request.context);
                Ok::<_, Infallible>(())
            }) {}
            names
        }

        /// The calls that have ended, with the answer or the error.
        fn outcomes(&mut self) -> Vec<String> {
            let outcomes = self.state.take_outcomes().into_iter().map(|outcome| {
                let name = outcome.request.context;
                match outcome.result {
                    Ok(answer) => format!("{name}: {}", String::from_utf8(answer.body).unwrap()),
                    Err(error) => format!("{name}: {error}"),
                }
            });
            outcomes.collect()
        }
    }

    fn lost() -> ErrorKind {
        ErrorKind::ConnectionLost("reset".into())
    }

    fn closed_as_too_large() -> ErrorKind {
        let text = "PRECONDITION_FAILED - message size 9 is larger than configured max size 8";
        ErrorKind::ChannelClosed(Reason {
            code: 406,
            text: text.into(),
        })
    }

    #[test]
    fn a_call_is_published_when_connected_and_ends_with_its_reply() {
        let config = Config::default();
        let mut script = Script::new(&config);
        script.begin("a");
        assert!(script.published().is_empty() && script.state.next_wake().is_none());
        script.connect();
        assert_eq!(script.published(), ["a"]);
        script.confirm(1, 1, true);
        script.reply("a");
        script.reply("a"); // is discarded
        assert_eq!(script.outcomes(), ["a: a!"]);
        assert!(script.state.is_idle());
    }

    #[test]
    fn until_the_consumer_is_started_one_call_is_enough() {
        let config = Config {
            in_flight: 2,
            ..Config::default()
        };
        let mut script = Script::new(&config);
        assert!(script.state.takes_requests());
        script.begin("a");
        assert!(!script.state.takes_requests());
        script.connect();
        assert!(script.state.takes_requests());
        script.begin("b");
        assert!(!script.state.takes_requests(), "two are in flight");
    }

    #[test]
    fn the_return_of_a_first_request_ends_its_call_and_that_of_a_later_one_is_resent() {
        let config = Config::default();
        let mut script = Script::consuming(&config, &["a", "b"]);
        script.return_request("a");
        let no_queue = "no queue 'rpc_queue' on rabbit:5672: is rpc-server running?";
        assert_eq!(script.outcomes(), [format!("a: {no_queue}")]);
        script.reply("b");
        script.begin("c");
        assert_eq!(script.published(), ["c"]);
        script.return_request("c");
        assert!(!script.state.takes_requests() && script.published().is_empty());
        script.later(Duration::from_millis(250));
        assert_eq!(script.published(), ["c"]);
        assert_eq!(script.outcomes(), ["b: b!"]);
    }

    #[test]
    fn a_second_nack_in_a_row_ends_the_call_and_the_first_one_does_not() {
        let config = Config::default();
        let mut script = Script::consuming(&config, &["a", "b"]);
        script.confirm(1, 1, true);
        script.confirm(2, 2, false);
        assert!(script.outcomes().is_empty() && script.state.take_commands().is_empty());
        script.later(Duration::from_millis(250));
        assert_eq!(script.published(), ["b"]);
        script.confirm(3, 3, false);
        let full = "b: queue 'rpc_queue' on rabbit:5672 is full: nothing ran";
        assert_eq!(script.outcomes(), [full]);
    }

    #[test]
    fn a_reply_without_the_id_of_the_call_is_the_cause_of_a_missing_answer() {
        let config = Config::default();
        for name in ["a", "other"] {
            let mut script = Script::consuming(&config, &["a"]);
            script.ids.insert("other", Uuid::from_u128(99));
            script.reply("other");
            script.queue_stats(0);
            if name == "a" {
                script.reply("a");
                assert_eq!(script.outcomes(), ["a: a!"]);
                continue;
            }
            script.later(Duration::from_secs(30));
            let cause = "a reply without this call's id was discarded: does the server copy correlation_id?";
            let no_answer = "a: no answer from 'rpc_queue' on rabbit:5672 within 30s";
            assert_eq!(script.outcomes(), [format!("{no_answer}: {cause}")]);
        }
    }

    #[test]
    fn that_a_server_got_the_request_too_late_is_a_timeout_after_the_deadline() {
        let config = Config::default();
        for (seconds, expected) in [
            (29, "a: expired: late: the server's clock is at least 1s ahead of this machine's"),
            (30, "a: no answer from 'rpc_queue' on rabbit:5672 within 30s: a server got it after the deadline, and did not run it"),
        ] {
            let mut script = Script::consuming(&config, &["a"]);
            script.now += Duration::from_secs(seconds);
            let id = script.ids["a"].to_string();
            let headers = TableBuilder::default().with_text("x-error-code", "expired");
            let properties = Properties {
                correlation_id: Some(id.as_bytes()),
                message_type: Some(b"error"),
                headers: Some(headers.table()),
                ..Properties::default()
            };
            script.step(Event::Reply(Delivery {
                delivery_tag: 1,
                is_redelivered: false,
                encoded_properties: properties.encode(),
                body: b"expired: late".to_vec(),
            }));
            assert_eq!(script.outcomes(), [expected]);
        }
    }

    #[test]
    fn that_connections_are_lost_stays_known_until_something_arrives() {
        let config = Config::default();
        let mut script = Script::consuming(&config, &["a"]);
        script.end(lost()).unwrap();
        script.connect();
        script.later(Duration::from_secs(30));
        let cause = "rabbit:5672 was disconnected: reset";
        let no_answer = "a: no answer from 'rpc_queue' on rabbit:5672 within 30s";
        assert_eq!(script.outcomes(), [format!("{no_answer}: {cause}")]);
    }

    #[test]
    fn calls_that_expire_do_not_shorten_the_pause_after_a_lost_connection() {
        let config = Config::default();
        let mut script = Script::consuming(&config, &["a", "b"]);
        script.later(Duration::from_millis(29_999));
        assert!(script.end(lost()).unwrap() >= Duration::from_millis(100));
    }

    #[test]
    fn of_several_unconfirmed_requests_nobody_knows_which_one_was_refused() {
        let config = Config::default();
        let text = "ACCESS_REFUSED - access to exchange '' in vhost '/' refused".to_owned();
        for (calls, may_have_run) in [(&["a"][..], false), (&["a", "b"], true)] {
            let mut script = Script::consuming(&config, calls);
            let reason = Reason {
                code: ACCESS_REFUSED,
                text: text.clone(),
            };
            script.end(ErrorKind::Refused(reason)).unwrap_err();
            for outcome in script.state.take_outcomes() {
                let is_after_send = matches!(outcome.result, Err(Error::RefusedAfterSend(_)));
                assert_eq!(is_after_send, may_have_run);
            }
        }
    }

    #[test]
    fn what_is_unanswered_when_a_connection_ends_is_published_on_the_next_one() {
        let config = Config::default();
        let mut script = Script::consuming(&config, &["a", "b", "c"]);
        script.confirm(1, 3, true);
        script.reply("b");
        let pause = script.end(lost()).unwrap();
        assert!(!pause.is_zero() && script.published().is_empty());
        script.connect();
        assert_eq!(script.published(), ["a", "c"]);
        script.confirm(1, 2, false);
        for first in [3, 5] {
            script.later(Duration::from_millis(250));
            assert_eq!(script.published(), ["a", "c"]);
            script.confirm(first, first + 1, false); // they may have run
        }
        script.reply("c");
        script.reply("a");
        assert_eq!(script.outcomes(), ["b: b!", "c: c!", "a: a!"]);
    }

    #[test]
    fn a_call_expires_at_its_deadline_with_what_is_known_also_between_two_sessions() {
        let config = Config::default();
        let mut script = Script::consuming(&config, &["a"]);
        script.queue_stats(0);
        script.later(Duration::from_secs(29));
        script.begin("b");
        assert_eq!(script.published(), ["b"]);
        script.later(Duration::from_secs(1));
        let no_answer = "no answer from 'rpc_queue' on rabbit:5672 within 30s";
        let unknown = "a server took it but has not answered";
        assert_eq!(script.outcomes(), [format!("a: {no_answer}: {unknown}")]);
        script.end(lost()).unwrap();
        script.later(Duration::from_secs(29));
        let lost = "rabbit:5672 was disconnected: reset";
        assert_eq!(script.outcomes(), [format!("b: {no_answer}: {lost}")]);
    }

    #[test]
    fn nothing_is_published_and_no_consumer_is_late_while_the_broker_blocks_us() {
        let config = Config::default();
        let mut script = Script::new(&config);
        script.begin("a");
        script.step(Event::Connected("rabbit:5672".into()));
        let reason = "low on memory".to_owned();
        script.step(Event::Notification(Notification::Blocked(reason)));
        script.later(Duration::from_secs(25));
        assert!(script.published().is_empty());
        assert!(script.state.take_commands().is_empty());
        assert!(
            script.state.takes_requests(),
            "calls begin and expire as usual"
        );
        script.step(Event::Notification(Notification::Unblocked));
        assert_eq!(script.published(), ["a"]);
    }

    #[test]
    fn a_consumer_that_starts_late_is_given_up_and_the_next_one_has_twice_the_time() {
        let timeout = Duration::from_secs(3_600);
        let config = Config {
            timeout,
            ..Config::default()
        };
        let mut script = Script::new(&config);
        script.begin("a");
        for seconds in [10, 20, 40] {
            script.step(Event::Connected("rabbit:5672".into()));
            script.later(Duration::from_secs(seconds - 1));
            assert!(script.state.take_commands().is_empty());
            script.later(Duration::from_secs(1));
            assert_eq!(script.state.take_commands(), [SessionCommand::GiveUp]);
            script.end(ErrorKind::Silent).unwrap();
        }
        script.connect();
        script.end(lost()).unwrap();
        script.step(Event::Connected("rabbit:5672".into()));
        script.later(Duration::from_secs(10));
        assert_eq!(script.state.take_commands(), [SessionCommand::GiveUp]);
    }

    #[test]
    fn the_largest_request_ends_alone_when_the_broker_says_that_one_is_too_large() {
        let config = Config::default();
        let mut script = Script::consuming(&config, &["a", "large", "bb"]);
        let closed = Event::ChannelEnded(closed_as_too_large());
        let end = script.state.step(closed, script.now).unwrap_err();
        let pause = script.state.on_session_end(end, script.now);
        assert_eq!(pause, Ok(Duration::ZERO));
        assert!(script.outcomes()[0].starts_with("large: the request of 5 bytes is too large"));
        script.connect();
        assert_eq!(script.published(), ["a", "bb"]);
    }

    #[test]
    fn a_request_that_cannot_be_published_ends_its_call() {
        let config = Config::default();
        let mut script = Script::new(&config);
        script.begin("a");
        script.connect();
        assert!(script.state.publish_next(script.now, |_| Err("no room")));
        let expected = "a: the request of 1 bytes is too large for rabbit:5672: no room";
        assert_eq!(script.outcomes(), [expected]);
    }

    #[test]
    fn the_first_error_ends_a_run_that_was_never_connected_and_all_of_its_calls() {
        let config = Config::default();
        let mut script = Script::new(&config);
        script.begin("a");
        script.begin("b");
        let error = ConnectionError::new("rabbit:5672", lost()).into();
        let end = script.state.step(Event::Failed(error), script.now);
        assert!(script
            .state
            .on_session_end(end.unwrap_err(), script.now)
            .is_err());
        let expected =
            ["a", "b"].map(|name| format!("{name}: rabbit:5672 was disconnected: reset"));
        assert_eq!(script.outcomes(), expected);
    }

    #[test]
    fn a_refusal_ends_the_run_and_tells_what_may_have_run() {
        let config = Config::default();
        let mut script = Script::consuming(&config, &["a"]);
        script.confirm(1, 1, true);
        let text = "ACCESS_REFUSED".to_owned();
        let refused = ErrorKind::Refused(Reason {
            code: ACCESS_REFUSED,
            text,
        });
        assert!(matches!(script.end(refused), Err(Error::Connection(_))));
        let outcomes = script.state.take_outcomes();
        assert!(matches!(
            outcomes[0].result,
            Err(Error::RefusedAfterSend(_))
        ));
    }

    #[test]
    fn a_request_that_no_queue_took_stays_so_between_two_sessions() {
        let config = Config {
            wait: true,
            ..Config::default()
        };
        let mut script = Script::consuming(&config, &["a"]);
        script.return_request("a");
        script.end(lost()).unwrap();
        script.later(Duration::from_secs(1));
        script.step(Event::Timer);
        script.later(Duration::from_secs(29));
        let no_queue = "no queue 'rpc_queue' on rabbit:5672: is rpc-server running?";
        assert_eq!(script.outcomes(), [format!("a: {no_queue}")]);
    }

    #[test]
    fn queue_stats_are_asked_for_after_silence_and_resend_what_a_missing_queue_had_taken() {
        let config = Config::default();
        let mut script = Script::consuming(&config, &["a"]);
        script.confirm(1, 1, true);
        script.later(Duration::from_millis(500));
        assert_eq!(script.state.take_commands(), [SessionCommand::QueueStats]);
        let text = "NOT_FOUND - no queue 'rpc_queue'".to_owned();
        let missing = ErrorKind::ChannelClosed(Reason { code: 404, text });
        script.step(Event::QueueStats(Err(missing)));
        script.later(Duration::from_millis(250));
        assert_eq!(script.published(), ["a"]);
    }
}
