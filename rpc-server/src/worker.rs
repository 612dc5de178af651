//! A worker: a thread that answers one request after the other, on the channel that the server
//! gives it.
//!
//! The path of a request: `serve` takes a message from the inbox; `step` decides by the event;
//! `handle_delivery` decodes the request and reports to the observer; `answer` has `run_handler`
//! call the function by `handler::call`, adds the reply and the ack, and writes both.

use crate::callers::Callers;
use crate::cancel::Cancel;
use crate::channel::{Channel, WorkerChannel};
use crate::config::Config;
use crate::consumer_check::ConsumerCheck;
use crate::handler::{self, Caller, Handler};
use crate::observer::{Observer, Outcome};
use crate::redelivery::{Begun, End, InHand, IsolatedPublisher, IsolatedResult, KeptReplies, Sent};
use crate::reply::log_return;
use crate::signals::Stop;
use crossbeam_channel::{select_biased, Receiver, Sender, TryRecvError};
use log::Level;
use rpc_common::connection::{Backoff, Delivery, Driving, Error, ErrorKind, Message, Returned};
use rpc_common::message::{expired_message, unix_time_ms, ErrorCode, Failure, Reply, Request};
use rpc_common::text::{escape, escape_up_to};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Once;
use std::time::{Duration, Instant, SystemTime};

/// Pause before a request is given back that this worker cannot answer at the moment.
const GIVE_BACK_PAUSE: Duration = Duration::from_secs(1);

/// Maximum length of the body of a rejected request in the log, in bytes.
const MAX_LOGGED_BODY: usize = 100;

/// Maximum size in bytes of the reply that a worker holds until the broker has got its
/// acknowledgement.
const MAX_SENT: usize = 1 << 20;

/// The function and its options, and the state that the server and its workers share.
pub(crate) struct Service<'a> {
    pub(crate) config: &'a Config,
    pub(crate) handler: &'a dyn Handler,
    pub(crate) stop: &'a Stop,
    pub(crate) observer: &'a dyn Observer,
    /// The driver of the link while a worker waits: the only worker, or the standby thread.
    pub(crate) driving: Driving,
    /// Completed when a worker has consumed for the first time.
    pub(crate) has_consumed: Once,
    /// Whether the broker blocks the connection: then the broker answers nothing.
    pub(crate) is_blocked: AtomicBool,
    /// For the replies that may end a connection.
    pub(crate) isolated: IsolatedPublisher,
    /// The requests in hand, and replies that may be needed again.
    pub(crate) kept: KeptReplies,
    /// The callers' reply queues.
    pub(crate) callers: Callers,
    /// Whether the requests in hand are given up.
    pub(crate) cancel: Cancel,
}

impl Service<'_> {
    /// Whether it is time to stop.
    pub(crate) fn is_stopping(&self) -> bool {
        self.stop.try_recv() == Err(TryRecvError::Disconnected)
    }
}

/// A report of a worker to the server.
pub(crate) enum WorkerReport {
    /// The worker consumes from the queue.
    Consuming,
    /// The worker's channel ended in this way, and the worker waits for another one. If the
    /// connection has ended, too, the server learns that by itself.
    LostChannel(Error),
}

/// The reason why a worker stops to consume.
enum Served {
    /// It is time to stop.
    Stopping,
    /// The function cannot handle a request at the moment.
    NotReady,
}

/// An event on the channel of a worker.
enum Event {
    Delivery(Delivery),
    /// A reply that the broker could not route to a queue.
    Returned(Returned),
    /// The consumer, the channel or the connection has ended.
    Ended(ErrorKind),
    /// Nothing was delivered until `queue_stats` is due.
    Idle,
}

/// A **worker** takes requests from the queue while it has a channel.
///
/// A worker does not own the connection. So nobody waits for a worker whose function is running
/// when the connection ends; the worker takes a channel of the next connection when the function
/// returns.
pub(crate) struct Worker<'a> {
    service: &'a Service<'a>,
    reports: Sender<WorkerReport>,
    channels: Receiver<WorkerChannel>,
    check: ConsumerCheck,
    /// The latest reply, until the broker has got its acknowledgement.
    sent: Option<Sent>,
}

impl<'a> Worker<'a> {
    pub(crate) fn new(
        service: &'a Service<'a>,
        reports: Sender<WorkerReport>,
        channels: Receiver<WorkerChannel>,
    ) -> Self {
        let now = Instant::now();
        Worker {
            service,
            reports,
            channels,
            check: ConsumerCheck::new(now),
            sent: None,
        }
    }

    /// Serves until it is time to stop.
    pub(crate) fn run(mut self) {
        let mut backoff = Backoff::new(Instant::now());
        while let Some(channel) = self.wait_for_channel() {
            let result = self.use_channel(&channel);
            channel.close();
            let Err(error) = result else { return };
            // The pause is before the report, because the server answers the report with another
            // channel.
            let pause = backoff.next_pause(Instant::now());
            let _ = self.service.stop.recv_timeout(pause);
            // Fails if the server has stopped.
            let _ = self.reports.send(WorkerReport::LostChannel(error));
        }
    }

    /// `None` when it is time to stop.
    fn wait_for_channel(&self) -> Option<WorkerChannel> {
        select_biased! {
            recv(self.service.stop) -> _ => None,
            recv(self.channels) -> channel => channel.ok(),
        }
    }

    /// Consumes until it is time to stop or the channel ends. While the function is not ready,
    /// consumes nothing.
    fn use_channel(&mut self, channel: &WorkerChannel) -> Result<(), Error> {
        let Config {
            queue, prefetch, ..
        } = self.service.config;
        loop {
            let consumer = channel.consume(queue, *prefetch)?;
            self.service.observer.on_consumer_started();
            self.service
                .has_consumed
                .call_once(|| self.service.observer.on_ready());
            let _ = self.reports.send(WorkerReport::Consuming); // fails if the server has stopped
            self.check.on_consuming(Instant::now());
            let result = self.serve(channel);
            self.service.observer.on_consumer_ended();
            if self.service.is_stopping() {
                channel.drain();
            }
            channel.cancel(consumer);
            self.keep_sent(channel);
            match result? {
                Served::Stopping => return Ok(()),
                Served::NotReady => self.service.handler.wait_until_ready(self.service.stop),
            }
            if let Some(kind) = channel.ended() {
                return Err(channel.error(kind));
            }
            if self.service.is_stopping() {
                return Ok(());
            }
        }
    }

    /// Keeps the latest reply if the channel has ended: perhaps the broker has not got the
    /// acknowledgement.
    fn keep_sent(&mut self, channel: &dyn Channel) {
        let sent = self.sent.take();
        if let (Some(sent), Some(kind)) = (sent, end_of(channel)) {
            let end = if channel.error(kind).ends_connection() {
                End::Connection
            } else {
                End::Channel
            };
            self.service.kept.keep_sent(sent, end);
        }
    }

    fn serve(&mut self, channel: &WorkerChannel) -> Result<Served, Error> {
        let inbox = channel.inbox();
        let is_stopping = || self.service.is_stopping();
        loop {
            inbox.wait(self.service.driving, self.check.next(), &is_stopping);
            if is_stopping() {
                return Ok(Served::Stopping);
            }
            // What was delivered before the end is not begun: the broker delivers it again.
            let event = match inbox.ended() {
                Some(kind) => Event::Ended(kind),
                None => match inbox.take_message() {
                    Some(Message::Delivery(delivery)) => Event::Delivery(delivery),
                    Some(Message::Returned(reply)) => Event::Returned(reply),
                    None if Instant::now() < self.check.next() => continue,
                    None => Event::Idle,
                },
            };
            if !self.step(channel, event)? {
                return Ok(Served::NotReady);
            }
        }
    }

    /// Takes one event. Returns whether the function is ready for the next request. A request that
    /// finds it not ready is not begun, even if it is ready a moment later: `cancel` gives the
    /// request back.
    ///
    /// # Errors
    /// The channel has ended, or is of no use.
    fn step(&mut self, channel: &dyn Channel, event: Event) -> Result<bool, Error> {
        match event {
            Event::Delivery(_) if !self.service.handler.is_ready() => return Ok(false),
            Event::Delivery(delivery) => {
                self.handle_delivery(channel, &delivery)?;
                self.check.on_delivery(Instant::now());
            }
            Event::Returned(reply) => {
                log_return(&reply);
                // With a larger prefetch the reply may be an earlier one. That one is lost, and this
                // one is kept in vain.
                if let Some(sent) = self.sent.take() {
                    self.service.kept.keep_returned(sent);
                }
            }
            Event::Ended(kind) => return Err(channel.error(kind)),
            Event::Idle => {
                let messages = self.ready_messages(channel)?;
                let has_arrived = channel.has_arrived();
                if self
                    .check
                    .on_queue_stats(messages, has_arrived, Instant::now())
                {
                    return Err(channel.error(ErrorKind::ConsumerForgotten));
                }
            }
        }
        Ok(self.service.handler.is_ready())
    }

    /// The number of ready messages in the queue; 0 while the broker blocks us, and would not
    /// answer.
    fn ready_messages(&mut self, channel: &dyn Channel) -> Result<u32, Error> {
        if self.service.is_blocked.load(Ordering::Relaxed) {
            return Ok(0);
        }
        let stats = channel.queue_stats(&self.service.config.queue)?;
        self.sent = None; // the broker, which answers in order, has got its acknowledgement
        Ok(stats.messages)
    }

    /// Handles one request, and tells the observer how it ended.
    fn handle_delivery(&mut self, channel: &dyn Channel, delivery: &Delivery) -> Result<(), Error> {
        let begun = Instant::now();
        let observer = self.service.observer;
        let redelivered = delivery.is_redelivered;
        // Without readable properties there is no reply_to: the request is rejected.
        let properties = delivery.properties().unwrap_or_default();
        let request = Request::decode(&properties, &delivery.body, redelivered);
        observer.on_request();
        log::trace!(
            "request[{}]: {} bytes, redelivered: {redelivered}",
            request.log_id(),
            request.body.len()
        );
        let result = self.answer(channel, delivery.delivery_tag, &request);
        let outcome = result.as_ref().unwrap_or(&Outcome::Requeued);
        let time = begun.elapsed();
        log::debug!(
            "request[{}]: {} after {time:.1?}",
            request.log_id(),
            outcome.as_str()
        );
        observer.on_outcome(outcome, time);
        result.map(drop)
    }

    /// Answers a request: publishes the reply, then acknowledges the request, in this order on one
    /// channel. If we crash in between, the request is in the queue, or the reply is delivered, or
    /// both.
    fn answer(
        &mut self,
        channel: &dyn Channel,
        tag: u64,
        request: &Request,
    ) -> Result<Outcome, Error> {
        let service = self.service;
        if service.config.prefetch == 1 {
            self.sent = None; // the broker delivers when it has got the acknowledgement
        }
        if let Some((level, reason)) = self.reason_to_reject(channel, request) {
            let body = escape_up_to(MAX_LOGGED_BODY, request.body);
            log::log!(
                level,
                outcome = Outcome::Rejected.as_str();
                "rejected a request that cannot be answered, {reason}: '{body}'"
            );
            return reject_and_flush(channel, tag);
        }
        // The wait for another worker is of no use then.
        let is_interrupted = || service.is_stopping() || channel.ended().is_some();
        match service.kept.begin(request, &is_interrupted) {
            Begun::New(_) if request.is_redelivered && service.is_stopping() => {
                give_back(channel, tag)
            }
            Begun::New(in_hand) => match self.run_handler(channel, request) {
                Some(reply) => self.send(channel, tag, request, in_hand, reply),
                None => give_back(channel, tag),
            },
            Begun::Kept(..) if late_ms(request).is_some() => {
                log::info!(
                    outcome = Outcome::Rejected.as_str();
                    "request[{}]: rejected, its deadline has passed",
                    request.log_id()
                );
                reject_and_flush(channel, tag)
            }
            Begun::Kept(in_hand, reply) => {
                log::info!(
                    outcome = Outcome::Answered.as_str();
                    "request[{}]: answered with the kept reply",
                    request.log_id()
                );
                self.send(channel, tag, request, in_hand, reply)
            }
            Begun::EndsConnections => {
                let id = request.log_id();
                log::warn!(
                    outcome = Outcome::Rejected.as_str();
                    "request[{id}]: rejected, the connection ended twice after its reply"
                );
                reject_and_flush(channel, tag)
            }
            Begun::Busy => {
                self.pause(GIVE_BACK_PAUSE);
                give_back(channel, tag)
            }
            Begun::Interrupted => give_back(channel, tag),
        }
    }

    /// The reason why a request cannot be answered. Of one that may be of a caller that has gone,
    /// the broker is asked. With the level at which the reason is logged.
    fn reason_to_reject(
        &self,
        channel: &dyn Channel,
        request: &Request,
    ) -> Option<(Level, &'static str)> {
        let callers = &self.service.callers;
        let Some(reply_to) = request.reply_to else {
            return Some((Level::Warn, "it has no reply_to"));
        };
        if callers.is_refused(reply_to) {
            return Some((Level::Warn, "the broker refuses its reply_to"));
        }
        let may_be_gone = request.is_redelivered || callers.was_gone(reply_to);
        let is_gone = may_be_gone && self.is_gone(channel, request, reply_to);
        is_gone.then_some((Level::Info, "its caller has gone"))
    }

    fn is_gone(&self, channel: &dyn Channel, request: &Request, reply_to: &[u8]) -> bool {
        let ask = || channel.ask_for_caller(&self.service.isolated, request);
        self.service.callers.is_gone(reply_to, Instant::now(), ask)
    }

    /// Sends a reply, unless the channel has ended: then the reply is kept for when the request
    /// comes again.
    ///
    /// The reply to a redelivered request may be why it was delivered again: so the reply goes over
    /// the isolated connection, and the request is acknowledged when the broker has accepted the
    /// reply. A reply to an untried name of direct reply-to goes there, too, and only there.
    fn send(
        &mut self,
        channel: &dyn Channel,
        tag: u64,
        request: &Request,
        in_hand: InHand,
        mut reply: Reply,
    ) -> Result<Outcome, Error> {
        if let Some(kind) = end_of(channel) {
            in_hand.keep(reply);
            return Err(channel.error(kind));
        }
        let service = self.service;
        let reply_to = request.reply_to.unwrap_or_default();
        let is_untried = service.callers.is_untried(reply_to);
        if !request.is_redelivered && !is_untried {
            channel.add_reply(&reply, request);
            return self.ack_and_flush(channel, tag, in_hand, reply);
        }
        match channel.publish_isolated(&service.isolated, &mut reply, request) {
            IsolatedResult::Accepted => service.callers.on_reply(reply_to, Instant::now()),
            IsolatedResult::Refused(error) => {
                log::warn!(
                    outcome = Outcome::Rejected.as_str();
                    "rejected a request: the broker refuses its replies: {error}"
                );
                if is_untried && error.ends_connection() {
                    service.callers.on_refused(reply_to, Instant::now());
                }
                return reject_and_flush(channel, tag);
            }
            IsolatedResult::Unknown(error) if is_untried => {
                log::info!("{error}; trying the reply again");
                // The isolated connection may work again soon. Without a correlation id no reply is
                // kept, and the function would run each time.
                let end = match request.correlation_id {
                    Some(_) => End::Channel,
                    None => End::Connection,
                };
                service.kept.keep_sent(in_hand.sent(reply, usize::MAX), end);
                self.pause(GIVE_BACK_PAUSE);
                return give_back(channel, tag);
            }
            IsolatedResult::Unknown(error) => {
                log::info!("{error}; answering without a check");
                channel.add_reply(&reply, request);
            }
        }
        self.ack_and_flush(channel, tag, in_hand, reply)
    }

    /// Acknowledges a request whose reply was added, and writes both. If the channel or the
    /// consumer has ended, the broker ignores the acknowledgement and delivers the request again:
    /// then the reply is kept.
    fn ack_and_flush(
        &mut self,
        channel: &dyn Channel,
        tag: u64,
        in_hand: InHand,
        reply: Reply,
    ) -> Result<Outcome, Error> {
        channel.ack(tag);
        let outcome = Outcome::of(&reply);
        let flushed = channel.flush();
        match channel.ended() {
            None if flushed.is_ok() => self.sent = Some(in_hand.sent(reply, MAX_SENT)),
            // Of a consumer that was cancelled the acknowledgement may be ignored.
            Some(ErrorKind::ConsumerCancelled) | None => in_hand.keep(reply),
            Some(kind) => {
                in_hand.keep(reply);
                return Err(channel.error(kind));
            }
        }
        flushed.map(|()| outcome)
    }

    fn pause(&self, pause: Duration) {
        let _ = self.service.stop.recv_timeout(pause); // a stop ends the pause
    }

    /// Runs the function, unless the caller's deadline has passed. `None` if the function gives the
    /// request back.
    fn run_handler(&mut self, channel: &dyn Channel, request: &Request) -> Option<Reply> {
        let service = self.service;
        let reply = if let Some(late_ms) = late_ms(request) {
            Err(expired(late_ms))
        } else if let Err(failure) = request.check_body() {
            Err(failure)
        } else {
            let reply_to = request.reply_to.unwrap_or_default();
            let is_gone = || self.is_gone(channel, request, reply_to);
            let caller = Caller::new(&is_gone, &service.cancel);
            let reply = handler::call(service.handler, request, &caller);
            if caller.is_given_back() {
                let id = request.log_id();
                log::info!(
                    outcome = Outcome::Requeued.as_str();
                    "request[{id}]: given back to the queue, the server stops"
                );
                return None;
            }
            reply
        };
        if let Err(failure) = &reply {
            let code = failure.code.as_str();
            let message = escape(failure.message.as_bytes());
            log::log!(
                level(&failure.code),
                outcome = code;
                "request[{}]: answered with the error {code}: {message}",
                request.log_id()
            );
        }
        Some(reply)
    }
}

/// The end of the channel or the connection. A consumer that was cancelled can still answer.
fn end_of(channel: &dyn Channel) -> Option<ErrorKind> {
    channel
        .ended()
        .filter(|kind| *kind != ErrorKind::ConsumerCancelled)
}

/// Gives a request back to the queue.
fn give_back(channel: &dyn Channel, tag: u64) -> Result<Outcome, Error> {
    channel.requeue(tag);
    channel.flush().map(|()| Outcome::Requeued)
}

/// Rejects a request: it leaves the queue, for a dead-letter exchange if there is one.
fn reject_and_flush(channel: &dyn Channel, tag: u64) -> Result<Outcome, Error> {
    channel.reject(tag);
    channel.flush().map(|()| Outcome::Rejected)
}

/// The level at which a failure is logged: INFO if it is the caller's, who knows of it.
fn level(code: &ErrorCode) -> Level {
    use ErrorCode::{Expired, InvalidArgument, OutOfRange, PermissionDenied, TooLarge};
    match code {
        Expired | InvalidArgument | OutOfRange | PermissionDenied | TooLarge => Level::Info,
        // `Failed`, `Internal`, `TimeLimit`, `Unavailable`, and the codes of a function of your
        // own.
        _ => Level::Warn,
    }
}

/// Milliseconds since the deadline of a request. `None` if it has not passed.
fn late_ms(request: &Request) -> Option<i64> {
    let now_ms = unix_time_ms(SystemTime::now());
    let late_ms = now_ms.saturating_sub(request.deadline_ms?);
    Some(late_ms).filter(|late_ms| *late_ms > 0)
}

/// The answer to a request whose deadline has passed `late_ms` ago.
fn expired(late_ms: i64) -> Failure {
    let late = Duration::from_millis(late_ms.unsigned_abs());
    Failure::new(ErrorCode::Expired, expired_message(late))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::callers::QueueState;
    use crossbeam_channel::{bounded, unbounded};
    use rpc_common::connection::{QueueStats, Reason};
    use rpc_common::properties::Properties;
    use std::cell::{Cell, RefCell};
    use std::sync::atomic::AtomicU32;
    use std::sync::Mutex;

    /// A **script** plays events to a worker, and records what the worker does on its channel.
    #[derive(Default)]
    struct Script {
        done: RefCell<Vec<String>>,
        end: RefCell<Option<ErrorKind>>,
        ready_messages: Cell<u32>,
        /// What the broker does with the next reply on the isolated connection.
        isolated: RefCell<Option<IsolatedResult>>,
    }

    impl Script {
        fn record(&self, done: String) {
            self.done.borrow_mut().push(done);
        }

        fn done(&self) -> Vec<String> {
            self.done.take()
        }
    }

    fn shown(reply: &Reply) -> String {
        match reply {
            Ok(answer) => String::from_utf8(answer.body.clone()).unwrap(),
            Err(failure) => failure.code.as_str().into(),
        }
    }

    impl Channel for Script {
        fn add_reply(&self, reply: &Reply, _: &Request) {
            self.record(format!("publish {}", shown(reply)));
        }

        fn publish_isolated(
            &self,
            _: &IsolatedPublisher,
            reply: &mut Reply,
            _: &Request,
        ) -> IsolatedResult {
            self.record(format!("publish isolated {}", shown(reply)));
            self.isolated.take().unwrap_or(IsolatedResult::Accepted)
        }

        fn ack(&self, tag: u64) {
            self.record(format!("ack {tag}"));
        }

        fn reject(&self, tag: u64) {
            self.record(format!("reject {tag}"));
        }

        fn flush(&self) -> Result<(), Error> {
            match &*self.end.borrow() {
                Some(kind) if *kind != ErrorKind::ConsumerCancelled => {
                    Err(self.error(kind.clone()))
                }
                _ => Ok(()),
            }
        }

        fn ended(&self) -> Option<ErrorKind> {
            self.end.borrow().clone()
        }

        fn has_arrived(&self) -> bool {
            false
        }

        fn queue_stats(&self, _: &str) -> Result<QueueStats, Error> {
            self.record("queue_stats".into());
            let messages = self.ready_messages.get();
            Ok(QueueStats {
                messages,
                consumers: 1,
            })
        }

        fn requeue(&self, tag: u64) {
            self.record(format!("requeue {tag}"));
        }

        fn ask_for_caller(&self, _: &IsolatedPublisher, request: &Request) -> QueueState {
            self.record("ask for the caller".into());
            match request.reply_to {
                Some(b"gone") => QueueState::Gone,
                _ => QueueState::Exists,
            }
        }

        fn error(&self, kind: ErrorKind) -> Error {
            Error::new("rabbit:5672", kind)
        }
    }

    /// The outcomes, as an observer gets them.
    #[derive(Default)]
    struct Outcomes(Mutex<Vec<Outcome>>);

    impl Observer for Outcomes {
        fn on_ready(&self) {}

        fn on_outcome(&self, outcome: &Outcome, _: Duration) {
            self.0.lock().unwrap().push(outcome.clone());
        }
    }

    /// A function that answers with the body and the number of the run, until it is unavailable.
    #[derive(Default)]
    struct Runs {
        count: AtomicU32,
        is_unavailable: AtomicBool,
    }

    impl Handler for Runs {
        fn handle(&self, request: &Request, caller: &Caller) -> Reply {
            match request.body {
                b"unavailable" => {
                    self.is_unavailable.store(true, Ordering::Relaxed);
                    Err(Failure::new(ErrorCode::Unavailable, "later"))
                }
                b"slow" => {
                    assert!(!caller.sleep(Duration::from_secs(60)));
                    caller.give_back();
                    Ok("too late".to_owned().into())
                }
                body => {
                    let run = self.count.fetch_add(1, Ordering::Relaxed) + 1;
                    let body = String::from_utf8_lossy(body);
                    Ok(format!("{body} in run {run}").into())
                }
            }
        }

        fn is_ready(&self) -> bool {
            !self.is_unavailable.load(Ordering::Relaxed)
        }
    }

    /// Plays with a worker of the function [`Runs`]. Returns the outcomes.
    fn play(with: impl FnOnce(&mut Worker, &Service, &mut Option<Running>)) -> Vec<Outcome> {
        let outcomes = Outcomes::default();
        let config = Config::default();
        let handler = Runs::default();
        let (running, stop) = bounded(0);
        let service = Service {
            config: &config,
            handler: &handler,
            stop: &stop,
            observer: &outcomes,
            driving: Driving::Standby,
            has_consumed: Once::new(),
            is_blocked: AtomicBool::new(false),
            isolated: IsolatedPublisher::default(),
            kept: KeptReplies::default(),
            callers: Callers::default(),
            cancel: Cancel::new().unwrap(),
        };
        let mut worker = Worker::new(&service, unbounded().0, unbounded().1);
        with(&mut worker, &service, &mut Some(running));
        outcomes.0.into_inner().unwrap()
    }

    /// It is time to stop when this is dropped.
    type Running = Sender<std::convert::Infallible>;

    fn delivery(tag: u64, body: &str, is_redelivered: bool) -> Event {
        delivery_to(b"to", tag, body, is_redelivered)
    }

    fn delivery_to(reply_to: &[u8], tag: u64, body: &str, is_redelivered: bool) -> Event {
        let properties = Properties {
            reply_to: Some(reply_to),
            correlation_id: Some(b"id"),
            ..Properties::default()
        };
        Event::Delivery(Delivery {
            delivery_tag: tag,
            is_redelivered,
            encoded_properties: properties.encode(),
            body: body.into(),
        })
    }

    fn closed() -> ErrorKind {
        ErrorKind::ChannelClosed(Reason {
            code: 406,
            text: "timeout".into(),
        })
    }

    #[test]
    fn a_reply_is_published_before_its_request_is_acknowledged() {
        let channel = Script::default();
        let outcomes = play(|worker, _, _| {
            worker.step(&channel, delivery(7, "30", false)).unwrap();
        });
        assert_eq!(channel.done(), ["publish 30 in run 1", "ack 7"]);
        assert_eq!(outcomes, [Outcome::Answered]);
    }

    #[test]
    fn a_request_that_cannot_be_answered_is_rejected_and_not_run() {
        let channel = Script::default();
        let outcomes = play(|worker, _, _| {
            let request = Delivery {
                delivery_tag: 7,
                is_redelivered: false,
                encoded_properties: Properties::default().encode(),
                body: b"unavailable".into(),
            };
            worker.step(&channel, Event::Delivery(request)).unwrap();
        });
        assert_eq!(channel.done(), ["reject 7"]);
        assert_eq!(outcomes, [Outcome::Rejected]);
    }

    #[test]
    fn a_request_past_its_deadline_is_answered_and_not_run() {
        let channel = Script::default();
        let headers = rpc_common::properties::TableBuilder::default();
        let headers = headers.with_long_long("x-deadline-ms", 1);
        let properties = Properties {
            reply_to: Some(b"to"),
            headers: Some(headers.table()),
            ..Properties::default()
        };
        let outcomes = play(|worker, _, _| {
            let request = Delivery {
                delivery_tag: 7,
                is_redelivered: false,
                encoded_properties: properties.encode(),
                body: b"30".into(),
            };
            worker.step(&channel, Event::Delivery(request)).unwrap();
        });
        assert_eq!(channel.done(), ["publish expired", "ack 7"]);
        assert_eq!(outcomes, [Outcome::Failed(ErrorCode::Expired)]);
    }

    #[test]
    fn a_reply_whose_channel_has_ended_is_kept_for_the_redelivery_and_not_sent() {
        let channel = Script::default();
        let outcomes = play(|worker, _, _| {
            *channel.end.borrow_mut() = Some(closed());
            worker.step(&channel, delivery(7, "30", false)).unwrap_err();
            assert!(channel.done().is_empty(), "nobody would get it");
            let next = Script::default();
            worker.step(&next, delivery(1, "30", true)).unwrap();
            let isolated = [
                "ask for the caller",
                "publish isolated 30 in run 1",
                "ack 1",
            ];
            assert_eq!(next.done(), isolated);
        });
        assert_eq!(outcomes, [Outcome::Requeued, Outcome::Answered]);
    }

    /// The queue was deleted, and nobody delivers the request again; or the request took longer
    /// than the consumer timeout, and is delivered again.
    #[test]
    fn a_reply_whose_consumer_was_cancelled_is_sent_and_kept() {
        let channel = Script::default();
        let outcomes = play(|worker, _, _| {
            *channel.end.borrow_mut() = Some(ErrorKind::ConsumerCancelled);
            worker.step(&channel, delivery(7, "30", false)).unwrap();
            assert_eq!(channel.done(), ["publish 30 in run 1", "ack 7"]);
            let next = Script::default();
            worker.step(&next, delivery(1, "30", true)).unwrap();
            assert_eq!(next.done()[1], "publish isolated 30 in run 1");
        });
        assert_eq!(outcomes, [Outcome::Answered, Outcome::Answered]);
    }

    #[test]
    fn a_reply_that_was_sent_just_before_the_connection_ended_is_kept() {
        let channel = Script::default();
        play(|worker, _, _| {
            worker.step(&channel, delivery(7, "30", false)).unwrap();
            *channel.end.borrow_mut() = Some(closed());
            worker.keep_sent(&channel);
            let next = Script::default();
            worker.step(&next, delivery(1, "30", true)).unwrap();
            assert_eq!(next.done()[1], "publish isolated 30 in run 1");
        });
    }

    #[test]
    fn a_request_after_whose_reply_two_connections_ended_is_rejected_and_not_run() {
        let channel = Script::default();
        let outcomes = play(|worker, _, _| {
            for end in [false, true] {
                let channel = Script::default();
                *channel.isolated.borrow_mut() =
                    end.then(|| IsolatedResult::Unknown(Error::new("rabbit:5672", closed())));
                worker.step(&channel, delivery(7, "30", end)).unwrap();
                *channel.end.borrow_mut() = Some(ErrorKind::Silent);
                worker.keep_sent(&channel);
            }
            worker.step(&channel, delivery(1, "30", true)).unwrap();
        });
        assert_eq!(channel.done(), ["reject 1"]);
        let expected = [Outcome::Answered, Outcome::Answered, Outcome::Rejected];
        assert_eq!(outcomes, expected);
    }

    #[test]
    fn a_redelivered_request_is_rejected_if_the_broker_refuses_its_replies() {
        let error = || Error::new("rabbit:5672", closed());
        for (published, done, outcome) in [
            (
                IsolatedResult::Refused(error()),
                vec!["reject 7"],
                Outcome::Rejected,
            ),
            (
                IsolatedResult::Unknown(error()),
                vec!["publish 30 in run 1", "ack 7"],
                Outcome::Answered,
            ),
        ] {
            let channel = Script::default();
            let outcomes = play(|worker, _, _| {
                *channel.isolated.borrow_mut() = Some(published);
                worker.step(&channel, delivery(7, "30", true)).unwrap();
            });
            assert_eq!(channel.done()[2..], done);
            assert_eq!(outcomes, [outcome]);
        }
    }

    #[test]
    fn a_redelivered_request_is_not_begun_when_it_is_time_to_stop() {
        let channel = Script::default();
        let outcomes = play(|worker, _, running| {
            drop(running.take());
            worker.step(&channel, delivery(7, "30", true)).unwrap();
        });
        assert_eq!(channel.done(), ["ask for the caller", "requeue 7"]);
        assert_eq!(outcomes, [Outcome::Requeued]);
    }

    #[test]
    fn a_redelivered_request_of_a_caller_that_has_gone_is_rejected_and_so_are_its_others() {
        let channel = Script::default();
        let outcomes = play(|worker, _, _| {
            let to = |tag, is_redelivered| delivery_to(b"gone", tag, "30", is_redelivered);
            worker.step(&channel, to(1, false)).unwrap();
            assert_eq!(channel.done(), ["publish 30 in run 1", "ack 1"]);
            worker.step(&channel, to(2, true)).unwrap();
            assert_eq!(channel.done(), ["ask for the caller", "reject 2"]);
            worker.step(&channel, to(3, false)).unwrap();
            assert_eq!(channel.done(), ["reject 3"]);
        });
        let rejected = Outcome::Rejected;
        assert_eq!(outcomes, [Outcome::Answered, rejected.clone(), rejected]);
    }

    #[test]
    fn a_name_of_direct_reply_to_is_tried_on_the_isolated_connection_and_only_there() {
        let direct = b"amq.rabbitmq.reply-to.x";
        let channel = Script::default();
        let play_twice = |result: Option<IsolatedResult>| {
            play(|worker, _, _| {
                *channel.isolated.borrow_mut() = result;
                for tag in [1, 2] {
                    let request = delivery_to(direct, tag, "30", false);
                    worker.step(&channel, request).unwrap();
                }
            });
            channel.done()
        };
        let works = [
            "publish isolated 30 in run 1",
            "ack 1",
            "publish 30 in run 2",
            "ack 2",
        ];
        assert_eq!(play_twice(None), works);
        let lost = ErrorKind::ConnectionClosed(Reason {
            code: 541,
            text: "INTERNAL_ERROR".into(),
        });
        let refused = IsolatedResult::Refused(Error::new("rabbit:5672", lost));
        let refused = play_twice(Some(refused));
        assert_eq!(
            refused,
            ["publish isolated 30 in run 1", "reject 1", "reject 2"]
        );
        let unknown = IsolatedResult::Unknown(Error::new("rabbit:5672", closed()));
        let unknown = play_twice(Some(unknown));
        assert_eq!(unknown[..2], ["publish isolated 30 in run 1", "requeue 1"]);
    }

    #[test]
    fn a_request_that_the_function_gives_back_is_not_answered() {
        let channel = Script::default();
        let outcomes = play(|worker, service, _| {
            service.cancel.cancel();
            worker.step(&channel, delivery(7, "slow", false)).unwrap();
        });
        assert_eq!(channel.done(), ["requeue 7"]);
        assert_eq!(outcomes, [Outcome::Requeued]);
    }

    #[test]
    fn the_end_of_the_channel_and_a_forgotten_consumer_end_the_use_of_it() {
        let channel = Script::default();
        play(|worker, service, _| {
            let ended = worker.step(&channel, Event::Ended(closed())).unwrap_err();
            assert_eq!(ended, Error::new("rabbit:5672", closed()));
            channel.ready_messages.set(1);
            worker.step(&channel, Event::Idle).unwrap();
            let forgotten = worker.step(&channel, Event::Idle).unwrap_err();
            assert_eq!(forgotten.kind, ErrorKind::ConsumerForgotten);
            assert_eq!(channel.done(), ["queue_stats", "queue_stats"]);
            service.is_blocked.store(true, Ordering::Relaxed);
            worker.step(&channel, Event::Idle).unwrap();
            assert!(channel.done().is_empty(), "the broker would not answer");
        });
    }

    #[test]
    fn after_the_function_was_unavailable_nothing_is_begun() {
        let channel = Script::default();
        let outcomes = play(|worker, service, _| {
            worker
                .step(&channel, delivery(1, "unavailable", false))
                .unwrap();
            assert_eq!(channel.done(), ["publish unavailable", "ack 1"]);
            assert!(!service.handler.is_ready());
            let is_ready = worker.step(&channel, delivery(2, "30", false)).unwrap();
            assert!(
                channel.done().is_empty() && !is_ready,
                "`cancel` gives it back"
            );
        });
        assert_eq!(outcomes, [Outcome::Failed(ErrorCode::Unavailable)]);
    }
}
