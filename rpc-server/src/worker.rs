//! A worker: a thread that answers one request after the other, on the channel that the server
//! gives it.
//!
//! The path of a request: `serve` takes a message from the inbox; `step` decides by the event;
//! `handle_delivery` decodes the request and reports to the observer; `answer` has `run_handler`
//! call the function by `handler::call`, adds the reply and the ack, and writes both.

use crate::channel::{Channel, WorkerChannel};
use crate::config::Config;
use crate::consumer_check::ConsumerCheck;
use crate::handler::{self, Caller, Handler};
use crate::observer::{Observer, Outcome};
use crate::redelivery::{InHand, IsolatedPublisher, IsolatedResult, KeptReplies};
use crate::reply::log_return;
use crate::signals::Stop;
use crossbeam_channel::{select_biased, Receiver, Sender, TryRecvError};
use log::Level;
use rpc_common::connection::{Backoff, Delivery, Driving, Error, ErrorKind, Message, Returned};
use rpc_common::message::{unix_time_ms, ErrorCode, Failure, Reply, Request};
use rpc_common::text::{escape, format_duration};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Once;
use std::time::{Duration, Instant, SystemTime};

/// Number of failures to run the function in a row after which a worker pauses.
const MAX_UNAVAILABLE: u32 = 5;

/// The function and its options, and the state that the server and its workers share.
pub(crate) struct Service<'a> {
    pub(crate) config: &'a Config,
    pub(crate) handler: &'a Handler<'a>,
    pub(crate) stop: &'a Stop,
    pub(crate) observer: &'a dyn Observer,
    /// The driver of the link while a worker waits: the only worker, or the standby thread.
    pub(crate) driving: Driving,
    /// Completed when a worker has consumed for the first time.
    pub(crate) has_consumed: Once,
    /// Whether the broker blocks the connection: then the broker answers nothing.
    pub(crate) is_blocked: AtomicBool,
    /// For the replies to redelivered requests.
    pub(crate) isolated: IsolatedPublisher,
    /// Computed replies whose acknowledgement came too late.
    pub(crate) kept: KeptReplies,
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
    /// Number of requests in a row that the function could not serve.
    unavailable: u32,
    /// The pauses after them.
    pauses: Backoff,
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
            unavailable: 0,
            pauses: Backoff::new(now),
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

    /// Consumes until it is time to stop or the channel ends.
    fn use_channel(&mut self, channel: &WorkerChannel) -> Result<(), Error> {
        let Config {
            queue, prefetch, ..
        } = self.service.config;
        let consumer = channel.consume(queue, *prefetch)?;
        self.service
            .has_consumed
            .call_once(|| self.service.observer.on_ready());
        let _ = self.reports.send(WorkerReport::Consuming); // fails if the server has stopped
        self.check.on_consuming(Instant::now());
        let result = self.serve(channel);
        channel.cancel(consumer);
        result
    }

    fn serve(&mut self, channel: &WorkerChannel) -> Result<(), Error> {
        let inbox = channel.inbox();
        let is_stopping = || self.service.is_stopping();
        loop {
            inbox.wait(self.service.driving, self.check.next(), &is_stopping);
            if is_stopping() {
                return Ok(());
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
            self.step(channel, event)?;
        }
    }

    /// Takes one event.
    ///
    /// # Errors
    /// The channel has ended, or is of no use.
    fn step(&mut self, channel: &dyn Channel, event: Event) -> Result<(), Error> {
        match event {
            Event::Delivery(delivery) => {
                self.handle_delivery(channel, &delivery)?;
                self.pause_if_unavailable();
                self.check.on_delivery(Instant::now());
            }
            Event::Returned(reply) => log_return(&reply),
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
        Ok(())
    }

    /// Pauses, longer each time, while the function cannot run.
    fn pause_if_unavailable(&mut self) {
        let count = self.unavailable;
        if count >= MAX_UNAVAILABLE {
            let pause = self.pauses.next_pause(Instant::now());
            log::warn!("the function was unavailable {count} times in a row: taking no request for {pause:.1?}");
            let _ = self.service.stop.recv_timeout(pause);
        }
    }

    /// The number of ready messages in the queue; 0 while the broker blocks us, and would not
    /// answer.
    fn ready_messages(&self, channel: &dyn Channel) -> Result<u32, Error> {
        if self.service.is_blocked.load(Ordering::Relaxed) {
            return Ok(0);
        }
        let stats = channel.queue_stats(&self.service.config.queue)?;
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
        if request.reply_to.is_none() {
            let body = escape(request.body);
            log::warn!("rejected a request that cannot be answered, it has no reply_to: '{body}'");
            return reject_and_flush(channel, tag);
        }
        if request.is_redelivered {
            return self.answer_redelivered(channel, tag, request);
        }
        // So that a redelivery to another worker waits for this one.
        let in_hand = self.service.kept.begin(request);
        let reply = self.run_handler(channel, request);
        channel.add_reply(&reply, request);
        ack_and_flush(channel, tag, &in_hand, reply)
    }

    /// Answers a redelivered request. Its reply may be why it was delivered again: so the reply
    /// goes over the isolated connection, and the request is acknowledged when the broker has
    /// accepted the reply.
    fn answer_redelivered(
        &mut self,
        channel: &dyn Channel,
        tag: u64,
        request: &Request,
    ) -> Result<Outcome, Error> {
        // This may wait for another worker.
        let (in_hand, kept) = self.service.kept.begin_redelivered(request);
        if kept.is_none() && self.service.is_stopping() {
            return Ok(Outcome::Requeued); // the request is not begun, and goes back to the queue
        }
        let mut reply = kept.unwrap_or_else(|| self.run_handler(channel, request));
        match channel.publish_isolated(&self.service.isolated, &mut reply, request) {
            IsolatedResult::Accepted => {}
            IsolatedResult::Refused(error) => {
                log::warn!("rejected a request: the broker refuses its replies: {error}");
                return reject_and_flush(channel, tag);
            }
            IsolatedResult::Unknown(error) => {
                log::info!("{error}; answering without a check");
                channel.add_reply(&reply, request);
            }
        }
        ack_and_flush(channel, tag, &in_hand, reply)
    }

    /// Runs the function, unless the caller's deadline has passed.
    fn run_handler(&mut self, channel: &dyn Channel, request: &Request) -> Reply {
        let service = self.service;
        let now_ms = unix_time_ms(SystemTime::now());
        let reply = match request
            .deadline_ms
            .map(|deadline| now_ms.saturating_sub(deadline))
        {
            Some(late_ms) if late_ms > 0 => Err(expired(late_ms)),
            _ => {
                let is_gone = || channel.is_caller_gone(&service.isolated, request);
                handler::call(service.handler, request, &Caller(&is_gone))
            }
        };
        // A program that says so itself has an exit code, and can answer the next request.
        let is_unavailable = |failure: &Failure| {
            failure.code == ErrorCode::Unavailable && failure.exit_code.is_none()
        };
        if reply.as_ref().is_err_and(is_unavailable) {
            self.unavailable += 1;
        } else {
            self.unavailable = 0;
        }
        if let Err(failure) = &reply {
            let code = failure.code.as_str();
            let message = escape(failure.message.as_bytes());
            log::log!(
                level(&failure.code),
                "request[{}]: answered with the error {code}: {message}",
                request.log_id()
            );
        }
        reply
    }
}

/// Acknowledges a request whose reply was added, and writes both. If the channel or the consumer
/// has ended, the broker ignores the acknowledgement and delivers the request again: then the reply
/// is kept.
fn ack_and_flush(
    channel: &dyn Channel,
    tag: u64,
    in_hand: &InHand,
    reply: Reply,
) -> Result<Outcome, Error> {
    channel.ack(tag);
    let outcome = Outcome::of(&reply);
    let flushed = channel.flush();
    if flushed.is_err() || channel.ended().is_some() {
        in_hand.keep(reply);
    }
    flushed.map(|()| outcome)
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

/// The answer to a request whose deadline has passed `late_ms` ago.
fn expired(late_ms: i64) -> Failure {
    let late = format_duration(Duration::from_millis(late_ms.unsigned_abs()));
    let message = format!("expired: {late} after the deadline, by the server's clock");
    Failure::new(ErrorCode::Expired, message)
}

#[cfg(test)]
mod tests {
    use super::*;
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

        fn is_caller_gone(&self, _: &IsolatedPublisher, _: &Request) -> bool {
            false
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

    /// Plays with a worker whose function answers with the body and the number of the run, or is
    /// unavailable. Returns the outcomes.
    fn play(with: impl FnOnce(&mut Worker, &Service, &mut Option<Running>)) -> Vec<Outcome> {
        let outcomes = Outcomes::default();
        let config = Config::default();
        let runs = AtomicU32::new(0);
        let handler = |request: &Request, _: &Caller| match request.body {
            b"unavailable" => Err(Failure::new(ErrorCode::Unavailable, "later")),
            body => {
                let run = runs.fetch_add(1, Ordering::Relaxed) + 1;
                let body = String::from_utf8_lossy(body);
                Ok(format!("{body} in run {run}").into())
            }
        };
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
        };
        let mut worker = Worker::new(&service, unbounded().0, unbounded().1);
        with(&mut worker, &service, &mut Some(running));
        outcomes.0.into_inner().unwrap()
    }

    /// It is time to stop when this is dropped.
    type Running = Sender<std::convert::Infallible>;

    fn delivery(tag: u64, body: &str, is_redelivered: bool) -> Event {
        let properties = Properties {
            reply_to: Some(b"to"),
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
            assert_eq!(worker.unavailable, 0);
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
    fn a_reply_whose_channel_or_consumer_has_ended_is_kept_for_the_redelivery() {
        for (end, expected) in [
            (ErrorKind::ConsumerCancelled, Outcome::Answered),
            (closed(), Outcome::Requeued),
        ] {
            let channel = Script::default();
            let outcomes = play(|worker, _, _| {
                *channel.end.borrow_mut() = Some(end);
                let _ = worker.step(&channel, delivery(7, "30", false));
                channel.done();
                let next = Script::default();
                worker.step(&next, delivery(1, "30", true)).unwrap();
                assert_eq!(next.done(), ["publish isolated 30 in run 1", "ack 1"]);
            });
            assert_eq!(outcomes, [expected, Outcome::Answered]);
        }
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
            assert_eq!(channel.done()[1..], done);
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
        assert!(channel.done().is_empty());
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
    fn failures_to_run_the_function_are_counted_until_it_runs() {
        let channel = Script::default();
        play(|worker, _, running| {
            drop(running.take()); // the pauses end at once
            for count in 1..=6 {
                worker
                    .step(&channel, delivery(count, "unavailable", false))
                    .unwrap();
                assert_eq!(u64::from(worker.unavailable), count);
            }
            worker.step(&channel, delivery(7, "30", false)).unwrap();
            assert_eq!(worker.unavailable, 0);
        });
    }
}
