//! A worker: a thread that answers one request after the other, each time on the channel that the
//! server gives it.

use crate::config::Config;
use crate::handler::{self, Caller, Handler};
use crate::observer::Observer;
use crate::redelivery::{IsolatedPublisher, KeptReplies, Published};
use crate::reply::{log_return, publish_reply};
use crate::signals::Stop;
use amiquip::ConsumerOptions;
use crossbeam_channel::{select_biased, Receiver, Sender, TryRecvError};
use log::Level;
use rpc_common::connection::{
    Backoff, Connection, Deadline, Delivery, Driving, Endpoint, Error, ErrorKind, Message,
    OpenChannel, Phase, Publisher,
};
use rpc_common::message::{unix_time_ms, ErrorCode, Failure, Reply, Request};
use rpc_common::text::{escape, format_duration};
use std::borrow::Cow;
use std::cell::{Cell, RefCell};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Once;
use std::time::{Duration, Instant, SystemTime};

/// Timeout of a worker's synchronous broker calls.
pub(crate) const BROKER_CALL_TIMEOUT: Duration = Duration::from_secs(5);

/// Timeout of the calls whose answer comes after deliveries: RabbitMQ 4 needs seconds of CPU time
/// to send one deeply nested header, and whoever does not wait for it gets it again on the next
/// connection. A dead connection is noticed by its heartbeats, and a stop does not wait for these
/// calls.
const DELIVERY_TIMEOUT: Duration = Duration::from_secs(60);

/// How often an idle worker looks at the queue.
pub(crate) const LOOK_INTERVAL: Duration = Duration::from_secs(5);

/// How often it looks when it has consumed again in vain: twice as rarely each time, down to this.
/// (A queue with a single active consumer gives the others nothing.)
const MAX_LOOK_INTERVAL: Duration = Duration::from_secs(600);

/// After how many failures to run the function in a row a worker pauses.
const MAX_UNAVAILABLE: u32 = 5;

/// How many deliveries, and returned replies, may be unread in addition to twice the prefetch: a
/// quorum queue delivers the prefetched requests again when it loses and finds the node that we are
/// connected to.
const MAX_UNREAD: usize = 64;

/// What is served, and what the server and its workers share.
pub(crate) struct Service<'a> {
    pub(crate) config: &'a Config,
    pub(crate) handler: &'a Handler<'a>,
    pub(crate) stop: &'a Stop,
    pub(crate) observer: &'a dyn Observer,
    /// Who drives the link while a worker waits: the worker, if it is the only one.
    pub(crate) driving: Driving,
    /// Completed when a worker has consumed for the first time.
    pub(crate) ready: Once,
    /// Whether the broker blocks the connection: then it answers nothing on it.
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

/// A **worker** takes requests from the queue while it has a channel.
///
/// It does not own the connection. So nobody waits for a worker whose function is running when the
/// connection ends; it takes a channel of the next connection when the function returns.
pub(crate) struct Worker<'a> {
    pub(crate) service: &'a Service<'a>,
    pub(crate) events: Sender<WorkerEvent>,
    pub(crate) channels: Receiver<WorkerChannel>,
    pub(crate) look_interval: Cell<Duration>,
    /// How many requests in a row the function could not serve, and the pauses after them.
    pub(crate) unavailable: Cell<u32>,
    pub(crate) pauses: RefCell<Backoff>,
}

/// How a request ended, for the observer.
type Outcome = Cow<'static, str>;

/// What a worker reports to the server.
pub(crate) enum WorkerEvent {
    /// It consumes from the queue.
    Consuming,
    /// Its channel ended in this way, and it waits for another one. If the connection has ended,
    /// too, the server learns that by itself.
    LostChannel(Error),
}

/// A channel for a worker.
pub(crate) struct WorkerChannel {
    endpoint: Endpoint,
    open: OpenChannel,
    publisher: Publisher,
}

impl WorkerChannel {
    pub(crate) fn open(
        connection: &mut Connection,
        prefetch: u16,
        deadline: &Deadline,
    ) -> Result<Self, Error> {
        let max_unread = match prefetch {
            0 => usize::MAX, // no limit
            prefetch => 2 * usize::from(prefetch) + MAX_UNREAD,
        };
        let (open, publisher) = connection.open_channel(max_unread, deadline)?;
        Ok(WorkerChannel {
            endpoint: connection.endpoint.clone(),
            open,
            publisher,
        })
    }

    /// Writes what the publisher has buffered.
    fn send(&self) -> Result<(), Error> {
        self.publisher.flush().map_err(|kind| self.error(kind))
    }

    fn close(self) {
        // Fails if the channel has ended.
        let _ = self.open.close(&Deadline::after(BROKER_CALL_TIMEOUT));
    }

    fn error(&self, kind: ErrorKind) -> Error {
        Error::new(&self.endpoint.address, kind)
    }
}

impl Worker<'_> {
    /// Serves until it is time to stop.
    pub(crate) fn run(self) {
        let mut backoff = Backoff::new(Instant::now());
        while let Some(channel) = self.wait_for_channel() {
            let result = self.use_channel(&channel);
            channel.close();
            let Err(error) = result else { return };
            // The pause is before the report, because the server answers the report with another
            // channel.
            let _ = self
                .service
                .stop
                .recv_timeout(backoff.next_pause(Instant::now()));
            // Fails if the server has stopped.
            let _ = self.events.send(WorkerEvent::LostChannel(error));
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
    fn use_channel(&self, channel: &WorkerChannel) -> Result<(), Error> {
        let service = self.service;
        let open = &channel.open;
        let consumer = open.run_blocking(
            &Deadline::after(DELIVERY_TIMEOUT),
            Phase::StartingConsumer,
            |amqp| {
                // Per consumer: RabbitMQ 4.3 refuses a global one.
                amqp.qos(0, service.config.prefetch, false)?;
                amqp.basic_consume(&service.config.queue, ConsumerOptions::default())
            },
        )?;
        service.ready.call_once(|| service.observer.on_ready());
        let _ = self.events.send(WorkerEvent::Consuming); // fails if the server has stopped
        let result = self.serve(channel);
        // Dropping the consumer cancels it. amiquip passes the broker's cancel-ok to the thread
        // that drops it, and then to the consumer's receiver. If there is none any more, amiquip
        // ends the connection: so it is received here.
        let events = consumer.receiver().clone();
        let _ = open.run_blocking(
            &Deadline::after(BROKER_CALL_TIMEOUT),
            Phase::CancellingConsumer,
            |_| {
                drop(consumer);
                events.iter().for_each(drop);
                Ok(())
            },
        );
        // What was delivered but not begun. When a channel is closed the broker requeues it, too,
        // but RabbitMQ 4.3 then counts it as a failed delivery.
        channel.publisher.requeue_all();
        let _ = channel.publisher.flush(); // fails if the channel has ended
        while let Some(message) = open.inbox.take_message() {
            if let Message::Returned(reply) = message {
                log_return(&reply);
            }
        }
        result
    }

    fn serve(&self, channel: &WorkerChannel) -> Result<(), Error> {
        let inbox = &channel.open.inbox;
        let is_stopping = || self.service.is_stopping();
        let mut saw_requests_before = false; // at the latest look, and nothing was delivered since
        let mut look_at = Instant::now() + self.look_interval.get();
        loop {
            inbox.wait(self.service.driving, look_at, &is_stopping);
            if is_stopping() {
                return Ok(());
            }
            // What was delivered before the end is not begun: the broker delivers it again.
            if let Some(kind) = inbox.ended() {
                return Err(channel.error(kind));
            }
            match inbox.take_message() {
                Some(Message::Delivery(delivery)) => {
                    saw_requests_before = false;
                    self.look_interval.set(LOOK_INTERVAL);
                    self.handle_delivery(channel, &delivery)?;
                    self.pause_if_unavailable();
                }
                Some(Message::Returned(reply)) => {
                    log_return(&reply);
                    continue;
                }
                None if Instant::now() < look_at => continue,
                None => {
                    let sees_requests = self.sees_requests(channel)?;
                    if saw_requests_before && sees_requests && !inbox.has_arrived() {
                        self.look_interval
                            .set((2 * self.look_interval.get()).min(MAX_LOOK_INTERVAL));
                        return Err(channel.error(ErrorKind::ConsumerForgotten));
                    }
                    saw_requests_before = sees_requests;
                }
            }
            look_at = Instant::now() + self.look_interval.get();
        }
    }

    /// Pauses, longer each time, while the function cannot run.
    fn pause_if_unavailable(&self) {
        let count = self.unavailable.get();
        if count >= MAX_UNAVAILABLE {
            let pause = self.pauses.borrow_mut().next_pause(Instant::now());
            log::warn!("the function was unavailable {count} times in a row: taking no request for {pause:.1?}");
            let _ = self.service.stop.recv_timeout(pause);
        }
    }

    /// Whether requests wait in the queue. If nothing is delivered meanwhile, the queue does not
    /// know its consumer: that happens where a quorum queue is deleted and declared again under
    /// load.
    fn sees_requests(&self, channel: &WorkerChannel) -> Result<bool, Error> {
        if self.service.is_blocked.load(Ordering::Relaxed) {
            return Ok(false); // the broker would not answer
        }
        let queue = &self.service.config.queue;
        let deadline = Deadline::after(DELIVERY_TIMEOUT);
        let look = |amqp: &amiquip::Channel| {
            amqp.queue_declare_passive(queue)
                .map(|queue| queue.declared_message_count())
        };
        let messages = channel
            .open
            .run_blocking(&deadline, Phase::QueueStats, look)?;
        Ok(messages > Some(0))
    }

    /// Handles one request, and tells the observer how it ended.
    fn handle_delivery(&self, channel: &WorkerChannel, delivery: &Delivery) -> Result<(), Error> {
        let begun = Instant::now();
        let observer = self.service.observer;
        let redelivered = delivery.is_redelivered;
        // Without readable properties there is no reply_to: it is rejected.
        let properties = delivery.properties().unwrap_or_default();
        let request = Request::decode(&properties, &delivery.body, redelivered);
        observer.on_request();
        log::trace!(
            "request[{}]: {} bytes, redelivered: {redelivered}",
            request.log_id(),
            request.body.len()
        );
        let result = self.answer(channel, delivery, &request);
        let outcome = result.as_deref().unwrap_or("requeued");
        let time = begun.elapsed();
        log::debug!("request[{}]: {outcome} after {time:.1?}", request.log_id());
        observer.on_outcome(outcome, time);
        result.map(drop)
    }

    /// Answers a request: publishes the reply, then acknowledges the request, in this order on one
    /// channel. If we crash in between, the request is in the queue, or the reply is delivered, or
    /// both. The reply to a redelivered request goes over the isolated connection instead, and the
    /// request is acknowledged when the broker has accepted it.
    fn answer(
        &self,
        channel: &WorkerChannel,
        delivery: &Delivery,
        request: &Request,
    ) -> Result<Outcome, Error> {
        let tag = delivery.delivery_tag;
        if request.reply_to.is_none() {
            log::warn!(
                "rejected a request that cannot be answered, it has no reply_to: '{}'",
                escape(request.body)
            );
            channel.publisher.reject(tag);
            return channel.send().map(|()| "rejected".into());
        }
        let (in_hand, kept) = self.service.kept.begin(request, delivery.is_redelivered);
        if kept.is_none() && delivery.is_redelivered && self.service.is_stopping() {
            // It may have waited for another worker: it is not begun, and goes back to the queue.
            return Ok("requeued".into());
        }
        let mut reply = kept.unwrap_or_else(|| self.run_handler(request, &channel.endpoint));
        let mut is_published = false;
        if delivery.is_redelivered {
            match self
                .service
                .isolated
                .publish(&channel.endpoint, &mut reply, request)
            {
                Published::Accepted => is_published = true,
                Published::Refused(error) => {
                    log::warn!("rejected a request: the broker refuses its replies: {error}");
                    channel.publisher.reject(tag);
                    return channel.send().map(|()| "rejected".into());
                }
                Published::Unknown(error) => log::info!("{error}; answering without a check"),
            }
        }
        if !is_published {
            publish_reply(&channel.publisher, &reply, request);
        }
        channel.publisher.ack(tag);
        let outcome = reply.as_ref().map_or_else(
            |failure| failure.code.as_str().to_owned().into(),
            |_| "ok".into(),
        );
        let sent = channel.send();
        // If the channel or the consumer has ended, the broker ignores the acknowledgement, and
        // delivers the request again.
        if sent.is_err() || channel.open.inbox.ended().is_some() {
            in_hand.keep(reply);
        }
        sent.map(|()| outcome)
    }

    /// Runs the function, unless the caller's deadline has passed.
    fn run_handler(&self, request: &Request, endpoint: &Endpoint) -> Reply {
        let late_ms = request.deadline_ms.map_or(0, |deadline| {
            unix_time_ms(SystemTime::now()).saturating_sub(deadline)
        });
        let reply = if late_ms > 0 {
            Err(expired(late_ms))
        } else {
            let is_gone = || {
                self.service
                    .isolated
                    .is_queue_gone(endpoint, request.reply_to.unwrap_or_default())
            };
            handler::call(self.service.handler, request, &Caller(&is_gone))
        };
        // A program that says so itself has an exit code, and can answer the next request.
        let is_unavailable = |failure: &Failure| {
            failure.code == ErrorCode::Unavailable && failure.exit_code.is_none()
        };
        let count = if reply.as_ref().is_err_and(is_unavailable) {
            self.unavailable.get() + 1
        } else {
            0
        };
        self.unavailable.set(count);
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

/// The level at which a failure is logged: INFO if it is the caller's, who knows of it.
fn level(code: &ErrorCode) -> Level {
    use ErrorCode::{Expired, InvalidArgument, OutOfRange, PermissionDenied, TooLarge};
    match code {
        Expired | InvalidArgument | OutOfRange | PermissionDenied | TooLarge => Level::Info,
        _ => Level::Warn,
    }
}

/// The answer to a request whose deadline has passed `late_ms` ago.
fn expired(late_ms: i64) -> Failure {
    let late = format_duration(Duration::from_millis(late_ms.unsigned_abs()));
    let message = format!("expired: {late} after the deadline, by the server's clock");
    Failure::new(ErrorCode::Expired, message)
}
