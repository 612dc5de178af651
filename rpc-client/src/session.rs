//! A session: one connection with its reply queue, from opening it to its end.

use crate::calls::Call;
use amiquip::{
    AmqpProperties, Channel, Connection, ConnectionBlockedNotification, Consumer, ConsumerMessage,
    ConsumerOptions, Delivery, QueueDeclareOptions, Return,
};
use crossbeam_channel::{never, Receiver, RecvError};
use rpc_common::broker::{self, Counts, Error, Link};
use rpc_common::deadline::{Deadline, Phase};
use rpc_common::message::Request;
use rpc_common::outbox::Publisher;
use rpc_common::target::Brokers;
use std::time::{Duration, Instant};
use uuid::Uuid;

/// A **session** owns all that a connection needs to make calls.
pub(crate) struct Session {
    pub(crate) wire: Wire, // first, so that it is closed first: the channel's own close then costs nothing
    /// Apart from the rest, because amiquip's consumer borrows it.
    pub(crate) channel: Channel,
}

/// A **wire** is a session but for its channel.
pub(crate) struct Wire {
    link: Link,
    reply_queue: String,
    /// Set by [`Wire::consume`]; silent before.
    pub(crate) replies: Receiver<ConsumerMessage>,
    /// The requests that found no queue.
    pub(crate) returns: Receiver<Return>,
    /// Whether the broker takes requests, each time that changes.
    pub(crate) notices: Receiver<ConnectionBlockedNotification>,
    consumes: bool,
    /// Used once it consumes. Before, the declaration of the reply queue may still be on amiquip's way, which
    /// no request may overtake.
    publisher: Publisher,
    /// How long the broker took to answer.
    pub(crate) round_trip: Duration,
}

/// What a reply consists of on the wire.
pub(crate) type RawReply = (AmqpProperties, Vec<u8>);

/// Where replies go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ReplyTo {
    /// An exclusive queue of the connection's own, as in the tutorial.
    #[default]
    Queue,
    /// RabbitMQ's [direct reply-to](https://www.rabbitmq.com/docs/direct-reply-to): no queue is made. Its
    /// consumer must be there before the first request, which is one more round trip.
    Direct,
}

/// How many replies and returns may wait: some for each call, which may be sent and answered more than once, and some
/// more that are nobody's.
const MOST_WAITING_PER_CALL: usize = 8;
const MOST_WAITING: usize = 1_000;

/// The name that stands for direct reply-to.
const DIRECT: &str = "amq.rabbitmq.reply-to";

impl Session {
    /// Connects and declares the reply queue.
    pub(crate) fn open(
        brokers: &Brokers,
        reply_to: ReplyTo,
        in_flight: usize,
        deadline: &Deadline,
    ) -> Result<Self, Error> {
        let mut link = broker::open_any(brokers, "rpc-client", deadline)?;
        let channel = link.open_channel(deadline)?;
        let publisher = link.publisher(&channel);
        let most = in_flight.saturating_mul(MOST_WAITING_PER_CALL).saturating_add(MOST_WAITING);
        publisher.limit_waiting(most, most);
        let reply_queue = match reply_to {
            ReplyTo::Queue => format!("rpc.reply.{}", Uuid::new_v4()),
            ReplyTo::Direct => DIRECT.into(),
        };
        let exclusive = QueueDeclareOptions { exclusive: true, ..QueueDeclareOptions::default() };
        let returns = link.within(deadline, Phase::Declare, |_| {
            if reply_to == ReplyTo::Queue {
                // Not waited for: if it fails, so does the consumer that follows.
                channel.queue_declare_nowait(&reply_queue, exclusive)?;
            }
            channel.listen_for_returns()
        })?;
        let notices = link.notices(deadline)?;
        let wire = Wire {
            link,
            reply_queue,
            replies: never(),
            returns,
            notices,
            consumes: false,
            publisher,
            round_trip: Duration::ZERO,
        };
        Ok(Session { wire, channel })
    }
}

impl Wire {
    /// Host and port of the broker, for messages.
    pub(crate) fn broker(&self) -> String {
        self.link.target().to_string()
    }

    /// Counts a call's request as sent, which it is by [`Wire::flush`] at the latest.
    pub(crate) fn publish(
        &mut self,
        channel: &Channel,
        queue: &str,
        call: &mut Call,
    ) -> Result<(), Error> {
        let id = call.id.to_string();
        let request = Request {
            body: &call.request.body,
            reply_to: Some(&self.reply_queue),
            correlation_id: Some(&id),
            expiration: Some(call.deadline.remaining()),
        };
        let request = request.encode(queue);
        if self.consumes {
            self.publisher.publish(request);
        } else {
            let published = channel.basic_publish("", request);
            published.map_err(|error| self.link.explain(error))?;
        }
        call.sent(Instant::now());
        Ok(())
    }

    /// Sends the requests that have not been sent yet.
    pub(crate) fn flush(&mut self) {
        let _ = self.publisher.send(); // of the end of the channel the replies tell
    }

    /// The replies that have come and were not taken yet.
    pub(crate) fn replies_at_hand(&self) -> impl Iterator<Item = RawReply> + '_ {
        self.replies.try_iter().filter_map(|got| match got {
            ConsumerMessage::Delivery(delivery) => Some(self.take(delivery)),
            _ => None,
        })
    }

    /// Starts to receive replies, unless it has. Called after the first requests are published, because
    /// replies wait in their queue, and this is a round trip that the server can work in. A broker that
    /// takes no requests does not answer it either, and says why.
    ///
    /// The consumer cancels itself when it is dropped, and waits for that: hang up first.
    pub(crate) fn consume<'a>(
        &mut self,
        channel: &'a Channel,
        deadline: &Deadline,
        on_notice: impl FnMut(ConnectionBlockedNotification) + Send,
    ) -> Result<Option<Consumer<'a>>, Error> {
        if self.consumes {
            return Ok(None);
        }
        let options =
            ConsumerOptions { no_ack: true, exclusive: true, ..ConsumerOptions::default() };
        let consume = |_: &mut Connection| channel.basic_consume(&self.reply_queue, options);
        let (link, notices) = (&mut self.link, &self.notices);
        let begun = Instant::now();
        let consumer =
            link.within_listening(deadline, Phase::Consume, notices, on_notice, consume)?;
        self.replies = consumer.receiver().clone();
        self.round_trip = begun.elapsed();
        self.consumes = true;
        Ok(Some(consumer))
    }

    /// Whether replies go to RabbitMQ's direct reply-to, which has to be consumed first.
    pub(crate) fn is_direct(&self) -> bool {
        self.reply_queue == DIRECT
    }

    /// Ends the connection.
    pub(crate) fn hang_up(&mut self) {
        let _ = self.link.close(); // why it ends is known
    }

    /// The end is near, and the broker may be out of reach: closing does not wait for it beyond this deadline.
    pub(crate) fn close_by(&mut self, deadline: &Deadline) {
        self.link.close_by(deadline);
    }

    /// Whether it was the consumer that was refused. The requests came between the reply queue and its
    /// consumer: they ran, unless that queue is not there, or the default exchange was refused.
    pub(crate) fn is_unheard(&mut self, error: &Error, deadline: &Deadline) -> bool {
        match error {
            Error::Refused { reason, .. } if reason.contains("exchange") => false,
            Error::Refused { .. } => self.link.look(&self.reply_queue, deadline).is_ok(),
            _ => false,
        }
    }

    /// The request queue as it is; none if it cannot be seen.
    pub(crate) fn look(
        &mut self,
        queue: &str,
        deadline: &Deadline,
    ) -> Result<Option<Counts>, Error> {
        let begun = Instant::now();
        let looked = self.link.look(queue, deadline);
        self.round_trip = begun.elapsed() / 2; // of its three the last is a mere goodbye
        match looked {
            Ok(counts) => Ok(Some(counts)),
            Err(Error::ChannelClosed { .. } | Error::Refused { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn take(&self, delivery: Delivery) -> RawReply {
        let _ = self.publisher.take_delivery(delivery.delivery_tag()); // a changed id is of no call
        (delivery.properties, delivery.body)
    }

    /// A returned request was taken.
    pub(crate) fn take_return(&self) {
        self.publisher.take_return();
    }

    /// What the reply queue's consumer got: a reply, or the end of the session.
    pub(crate) fn reply(
        &mut self,
        got: Result<ConsumerMessage, RecvError>,
    ) -> Result<RawReply, Error> {
        match broker::delivery(got) {
            Ok(Some(delivery)) => Ok(self.take(delivery)),
            Ok(None) => Err(self.link.lost("the reply queue was deleted")),
            Err(error) => Err(self.link.explain(error)),
        }
    }
}
