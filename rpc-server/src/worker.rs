//! A worker: a thread that answers one request after the other, each time on the channel that the server gives it.

use crate::handler::{self, Handler};
use crate::isolated::{log_return, IsolatedPublisher, Published};
use crate::kept::KeptReply;
use amiquip::{ConsumerMessage, ConsumerOptions, Delivery, Publish};
use crossbeam_channel::{never, select_biased, Receiver, Sender};
use rpc_common::connection::{
    delivery, Backoff, ChannelClosed, Connection, Deadline, Error, ErrorKind, OpenChannel, Publisher, Watchdog,
};
use rpc_common::message::{encode_reply, unix_time_ms, ErrorCode, Failure, Reply, Request};
use rpc_common::text::{escape, format_duration};
use std::convert::Infallible;
use std::time::{Duration, Instant, SystemTime};

/// The **stop** signal: a channel on which nothing is sent. It is disconnected when it is time to stop.
pub type Stop = Receiver<Infallible>;

/// Timeout of a worker's synchronous broker calls.
pub(crate) const BROKER_CALL_TIMEOUT: Duration = Duration::from_secs(5);

/// How many deliveries, and returned replies, may be unread in addition to twice the prefetch: a quorum queue delivers the
/// prefetched requests again when it loses and finds the node that we are connected to.
const MAX_UNREAD: usize = 64;

/// A **worker** takes requests from the queue while it has a channel.
///
/// It does not own the connection. So nobody waits for a worker whose function is running when the connection ends; it
/// asks for a channel of the next connection when the function returns.
pub(crate) struct Worker<'a> {
    pub(crate) index: usize,
    pub(crate) queue: &'a str,
    pub(crate) prefetch: u16,
    pub(crate) handler: &'a Handler<'a>,
    pub(crate) stop: &'a Stop,
    /// Called before the first request is handled; calls after the first have no effect.
    pub(crate) on_ready: &'a (dyn Fn() + Sync),
    /// For the replies to redelivered requests.
    pub(crate) isolated: &'a IsolatedPublisher,
    pub(crate) events: Sender<WorkerEvent>,
    pub(crate) channels: Receiver<WorkerChannel>,
    pub(crate) kept: KeptReply,
}

/// What a worker reports to the server.
pub(crate) enum WorkerEvent {
    /// A worker, by its index, needs a channel.
    NeedsChannel {
        worker: usize,
        /// How its last channel ended; `None` if it had none.
        lost: Option<Error>,
    },
    /// A worker consumes from the queue.
    Consuming,
}

/// A channel for a worker, and what ends a wait on it.
pub(crate) struct WorkerChannel {
    broker: String,
    channel: OpenChannel,
    publisher: Publisher,
    watchdog: Watchdog,
}

impl WorkerChannel {
    pub(crate) fn open(connection: &mut Connection, prefetch: u16, deadline: &Deadline) -> Result<Self, Error> {
        let max_unread = match prefetch {
            0 => usize::MAX, // no limit
            prefetch => 2 * usize::from(prefetch) + MAX_UNREAD,
        };
        let (channel, publisher) = connection.open_channel(max_unread, deadline)?;
        let (broker, watchdog) = (connection.broker().to_owned(), connection.watchdog.clone());
        Ok(WorkerChannel { broker, channel, publisher, watchdog })
    }

    /// Runs a synchronous call. A broker that does not answer in time loses the connection.
    fn call<T>(&self, call: impl FnOnce() -> amiquip::Result<T>) -> Result<T, Error> {
        let result = self.watchdog.run_until(&Deadline::after(BROKER_CALL_TIMEOUT), call);
        result.unwrap_or(Err(amiquip::Error::EventLoopDropped)).map_err(|error| self.error(error))
    }

    fn close(self) {
        let deadline = Deadline::after(BROKER_CALL_TIMEOUT);
        let _ = self.watchdog.run_until(&deadline, || self.channel.amqp.close());
        // it may have ended
    }

    /// How the channel ended. The server learns the end of the connection by itself.
    fn error(&self, error: amiquip::Error) -> Error {
        match error {
            amiquip::Error::ServerClosedChannel { .. } => Error::new(&self.broker, error.into()),
            error => Error::new(&self.broker, ErrorKind::ConnectionLost(error.to_string())),
        }
    }
}

impl Worker<'_> {
    /// Serves until it is time to stop.
    pub(crate) fn run(mut self) {
        let (mut lost, mut backoff) = (None, Backoff::new(Instant::now()));
        while let Some(channel) = self.wait_for_channel(lost.take()) {
            let result = self.use_channel(&channel);
            channel.close();
            match result {
                Ok(()) => return,
                Err(error) => lost = Some(error),
            }
            let pause = backoff.next_pause(Instant::now());
            if self.stop.recv_timeout(pause).is_err_and(|end| end.is_disconnected()) {
                return;
            }
        }
    }

    /// `None` when it is time to stop.
    fn wait_for_channel(&self, lost: Option<Error>) -> Option<WorkerChannel> {
        self.events.send(WorkerEvent::NeedsChannel { worker: self.index, lost }).ok()?;
        select_biased! {
            recv(self.stop) -> _ => None,
            recv(self.channels) -> channel => channel.ok(),
        }
    }

    /// Consumes until it is time to stop or the channel ends.
    fn use_channel(&mut self, channel: &WorkerChannel) -> Result<(), Error> {
        let open = &channel.channel;
        let consumer = channel.call(|| {
            open.amqp.qos(0, self.prefetch, false)?; // per consumer: RabbitMQ 4.3 refuses a global one
            open.consume(self.queue, ConsumerOptions::default())
        })?;
        (self.on_ready)();
        let _ = self.events.send(WorkerEvent::Consuming); // fails if the server has stopped
        let deliveries = consumer.receiver().clone();
        let result = self.serve(channel, &deliveries);
        // Cancels. What was delivered but not begun goes back to the queue with the channel. amiquip confirms the cancel
        // to the caller and then to `deliveries`, and ends the connection if nobody receives that.
        let _ = channel.call(|| {
            drop(consumer);
            deliveries.iter().for_each(drop);
            Ok(())
        });
        open.returns.try_iter().for_each(|reply| log_return(&reply));
        result
    }

    fn serve(&mut self, channel: &WorkerChannel, deliveries: &Receiver<ConsumerMessage>) -> Result<(), Error> {
        let (mut returns, no_returns) = (&channel.channel.returns, never());
        loop {
            select_biased! {
                recv(self.stop) -> _ => return Ok(()),
                recv(returns) -> reply => match reply {
                    Ok(reply) => log_return(&reply),
                    Err(_) => returns = &no_returns, // the deliveries report how the channel ended
                },
                recv(deliveries) -> message => match delivery(message) {
                    Ok(Some(delivery)) => self.handle_delivery(channel, &delivery)?,
                    Ok(None) => {
                        return Err(Error::new(&channel.broker, ErrorKind::ConsumerCancelled));
                    }
                    Err(error) => return Err(channel.error(error)),
                },
            }
        }
    }

    /// Answers one request: publishes the reply, then acknowledges the request, in this order on one channel. If we crash in
    /// between, the request is in the queue, or the reply is delivered, or both.
    fn handle_delivery(&mut self, channel: &WorkerChannel, delivery: &Delivery) -> Result<(), Error> {
        let tag = delivery.delivery_tag();
        let changes = channel.channel.take_changes(tag);
        let request = Request::decode(&delivery.properties, &delivery.body);
        if request.reply_to.is_none() || changes.reply_to {
            let reason = if changes.reply_to { "its reply_to is not UTF-8" } else { "it has no reply_to" };
            log::warn!("rejected a request that cannot be answered, {reason}: '{}'", escape(request.body));
            return self.reject(channel, tag);
        }
        let mut reply = self.reply(&request);
        // The id as it was sent: amiquip's is changed if it was not UTF-8.
        let id = changes.correlation_id.as_deref();
        let mut is_published = false;
        if delivery.redelivered {
            match self.publish_isolated(&mut reply, &request, id) {
                Published::Accepted => is_published = true,
                Published::Refused(error) => {
                    log::warn!("rejected a request: the broker refuses its replies: {error}");
                    return self.reject(channel, tag);
                }
                Published::Unknown(error) => log::info!("{error}; answering without a check"),
            }
        }
        if !is_published {
            channel.publisher.publish(encode(&reply, &request), id);
        }
        channel.publisher.ack(tag);
        let sent = self.send(channel);
        if matches!(&sent, Err(Error { kind: ErrorKind::ChannelClosed(_), .. })) {
            self.kept.keep(&request, reply);
        }
        sent
    }

    /// The reply that was computed before, or that the function computes now.
    fn reply(&mut self, request: &Request) -> Reply {
        let reply = match (self.kept.take(request), request.deadline_ms) {
            (Some(reply), _) => reply,
            (None, Some(deadline)) if deadline < unix_time_ms(SystemTime::now()) => {
                Err(expired(unix_time_ms(SystemTime::now()) - deadline))
            }
            (None, _) => handler::call(self.handler, request),
        };
        if let Err(failure) = &reply {
            log::warn!("answered with an error: {}", escape(failure.message.as_bytes()));
        }
        reply
    }

    /// Publishes the reply to a redelivered request where the broker can close nothing because of another message. If it
    /// refuses the reply, an error replaces it.
    fn publish_isolated(&self, reply: &mut Reply, request: &Request, id: Option<&[u8]>) -> Published {
        let error = match self.isolated.publish(encode(reply, request), id) {
            Published::Refused(error) => error,
            published => return published,
        };
        log::warn!("the broker refused a reply, answering with an error: {error}");
        *reply = Err(refused());
        self.isolated.publish(encode(reply, request), id)
    }

    /// Removes a request from the queue without an answer.
    fn reject(&self, channel: &WorkerChannel, tag: u64) -> Result<(), Error> {
        channel.publisher.reject(tag);
        self.send(channel)
    }

    /// Sends what the publisher has buffered.
    fn send(&self, channel: &WorkerChannel) -> Result<(), Error> {
        match channel.publisher.send() {
            Ok(()) => Ok(()),
            // Any synchronous call on the channel returns the cause.
            Err(ChannelClosed) => channel.call(|| channel.channel.amqp.qos(0, self.prefetch, false)),
        }
    }
}

fn encode<'a>(reply: &'a Reply, request: &Request) -> Publish<'a> {
    encode_reply(reply, request.reply_to.unwrap_or_default(), request.correlation_id)
}

/// The answer to a request whose deadline has passed `late_ms` ago.
fn expired(late_ms: i64) -> Failure {
    let late = format_duration(Duration::from_millis(late_ms.unsigned_abs()));
    let message = format!("expired: {late} after the deadline, by the server's clock");
    Failure { code: ErrorCode::Expired, message }
}

/// The answer in place of one that the broker refused.
fn refused() -> Failure {
    let message = "internal error: the broker refused the answer, perhaps because of its size".into();
    Failure { code: ErrorCode::Internal, message }
}
