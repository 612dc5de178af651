//! The channel of a worker.

use crate::callers::QueueState;
use crate::redelivery::{IsolatedPublisher, IsolatedResult};
use crate::reply::{add_reply, log_return};
use amiquip::{AmqpValue, Consumer, ConsumerOptions, FieldTable};
use rpc_common::connection::{
    ChannelInbox, Connection, Deadline, Endpoint, Error, ErrorKind, Meaning, Message, OpenChannel,
    Phase, Publisher, QueueStats,
};
use rpc_common::message::{Reply, Request};
use std::time::Duration;

/// Timeout of a worker's blocking calls.
pub(crate) const BLOCKING_TIMEOUT: Duration = Duration::from_secs(5);

/// Timeout of the blocking calls whose answer comes after deliveries: RabbitMQ 4 needs seconds of
/// CPU time to send one deeply nested header, and a client that does not wait gets the same header
/// again on the next connection. A dead connection is noticed by its heartbeats, and a stop does
/// not wait for these calls.
const DELIVERY_TIMEOUT: Duration = Duration::from_secs(60);

/// Maximum number of unread deliveries and returned replies, in addition to twice the prefetch: a
/// quorum queue delivers the prefetched requests again when it loses and finds the node that we are
/// connected to.
const MAX_UNREAD: usize = 64;

/// The operations of a worker on its channel. The unit tests of the worker have one without a
/// socket.
pub(crate) trait Channel {
    /// Adds a reply. `flush` writes it.
    fn add_reply(&self, reply: &Reply, request: &Request);

    /// Publishes a reply alone, and waits for the broker. An error replaces one that is refused.
    fn publish_isolated(
        &self,
        isolated: &IsolatedPublisher,
        reply: &mut Reply,
        request: &Request,
    ) -> IsolatedResult;

    /// Adds the acknowledgement of a delivery.
    fn ack(&self, delivery_tag: u64);

    /// Adds the rejection of a delivery, without requeue.
    fn reject(&self, delivery_tag: u64);

    /// Adds that a delivery goes back to the queue.
    fn requeue(&self, delivery_tag: u64);

    /// Writes what was added.
    fn flush(&self) -> Result<(), Error>;

    /// The end of the consumer, the channel or the connection, if one of them has ended.
    fn ended(&self) -> Option<ErrorKind>;

    /// Whether messages or the end have arrived that were not taken.
    fn has_arrived(&self) -> bool;

    /// The numbers of a queue, by a passive declaration.
    fn queue_stats(&self, queue: &str) -> Result<QueueStats, Error>;

    /// Asks the broker for the reply queue of a request.
    fn ask_for_caller(&self, isolated: &IsolatedPublisher, request: &Request) -> QueueState;

    /// An error of the channel's broker.
    fn error(&self, kind: ErrorKind) -> Error;
}

/// An open channel for a worker.
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

    /// The inbox of the channel.
    pub(crate) fn inbox(&self) -> &ChannelInbox {
        &self.open.inbox
    }

    /// Starts to consume. RabbitMQ 4.3 refuses a global prefetch: this one is of the consumer.
    ///
    /// The priority is the default one. A stream has no priorities, and is refused therefore: this
    /// costs no round trip and no permission, and is known before the first delivery. (A
    /// declaration needs a permission. The header `x-stream-offset` of a delivery may have been set
    /// by its publisher.)
    ///
    /// # Errors
    /// [`ErrorKind::StreamQueue`] if the queue is a stream; else the broker's error.
    pub(crate) fn consume(&self, queue: &str, prefetch: u16) -> Result<Consumer<'_>, Error> {
        let deadline = Deadline::after(DELIVERY_TIMEOUT);
        let options = ConsumerOptions {
            arguments: FieldTable::from([("x-priority".to_owned(), AmqpValue::LongInt(0))]),
            ..ConsumerOptions::default()
        };
        let consumer = self
            .open
            .run_blocking(&deadline, Phase::StartingConsumer, |amqp| {
                amqp.qos(0, prefetch, false)?;
                amqp.basic_consume(queue, options)
            });
        consumer.map_err(|error| match error.meaning() {
            Some(Meaning::NoConsumerPriority) => self.error(ErrorKind::StreamQueue(queue.into())),
            _ => error,
        })
    }

    /// Waits until the broker has taken the replies, as long as it takes some of them.
    pub(crate) fn drain(&self) {
        self.open.drain(BLOCKING_TIMEOUT);
    }

    /// Cancels the consumer, and gives the deliveries back that were not begun. (When a channel is
    /// closed the broker requeues them, too, but RabbitMQ 4.3 then counts each as a failed
    /// delivery.)
    pub(crate) fn cancel(&self, consumer: Consumer) {
        // Dropping the consumer cancels it. amiquip passes the broker's cancel-ok to the thread
        // that drops the consumer, and then to the consumer's receiver. Without a receiver, amiquip
        // ends the connection: so the receiver is kept here.
        let events = consumer.receiver().clone();
        let deadline = Deadline::after(BLOCKING_TIMEOUT);
        // Fails if the channel has ended.
        let _ = self
            .open
            .run_blocking(&deadline, Phase::CancellingConsumer, |_| {
                drop(consumer);
                events.iter().for_each(drop);
                Ok(())
            });
        self.publisher.requeue_all();
        let _ = self.publisher.flush(); // fails if the channel has ended
        while let Some(message) = self.open.inbox.take_message() {
            if let Message::Returned(reply) = message {
                log_return(&reply);
            }
        }
    }

    pub(crate) fn close(self) {
        let _ = self.open.close(&Deadline::after(BLOCKING_TIMEOUT)); // fails if it has ended
    }
}

impl Channel for WorkerChannel {
    fn add_reply(&self, reply: &Reply, request: &Request) {
        add_reply(&self.publisher, reply, request);
    }

    fn publish_isolated(
        &self,
        isolated: &IsolatedPublisher,
        reply: &mut Reply,
        request: &Request,
    ) -> IsolatedResult {
        isolated.publish(&self.endpoint, reply, request)
    }

    fn ack(&self, delivery_tag: u64) {
        self.publisher.ack(delivery_tag);
    }

    fn reject(&self, delivery_tag: u64) {
        self.publisher.reject(delivery_tag);
    }

    fn requeue(&self, delivery_tag: u64) {
        self.publisher.requeue(delivery_tag);
    }

    fn flush(&self) -> Result<(), Error> {
        self.publisher.flush().map_err(|kind| self.error(kind))
    }

    fn ended(&self) -> Option<ErrorKind> {
        self.open.inbox.ended()
    }

    fn has_arrived(&self) -> bool {
        self.open.inbox.has_arrived()
    }

    fn queue_stats(&self, queue: &str) -> Result<QueueStats, Error> {
        self.open
            .queue_stats(queue, &Deadline::after(DELIVERY_TIMEOUT))
    }

    fn ask_for_caller(&self, isolated: &IsolatedPublisher, request: &Request) -> QueueState {
        isolated.ask(&self.endpoint, request.reply_to.unwrap_or_default())
    }

    fn error(&self, kind: ErrorKind) -> Error {
        Error::new(&self.endpoint.address, kind)
    }
}
