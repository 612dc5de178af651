//! A foreign peer: plain AMQP, bound to no convention of ours, and a queue that a test owns.

use super::{broker, eventually, PATIENCE};
use amiquip::{
    AmqpProperties, AmqpValue, Channel, Consumer, ConsumerMessage, ConsumerOptions, Delivery,
    ExchangeDeclareOptions, ExchangeType, FieldTable, Publish, QueueDeclareOptions,
    QueueDeleteOptions,
};
use rpc_common::broker::{open, Counts, Link};
use rpc_common::deadline::{Deadline, Phase};
use rpc_common::target::Target;
use std::collections::BTreeMap;
use std::ops::Deref;
use std::sync::{Mutex, PoisonError};
use uuid::Uuid;

/// A connection of the test's own.
pub(crate) struct Peer {
    url: String,
    link: Link,
    channel: Channel,
}

impl Peer {
    pub(crate) fn connect() -> Self {
        Peer::connect_to(broker::url())
    }

    pub(crate) fn connect_to(url: &str) -> Self {
        let target = Target::parse(url).expect("the broker's URL is well formed");
        let deadline = Deadline::after(PATIENCE);
        let mut link = open(&target, "test", &deadline).expect("the broker is there");
        let channel = link.open_channel(&deadline).expect("there are channels");
        Peer { url: url.into(), link, channel }
    }

    /// The version of RabbitMQ at the other end.
    pub(crate) fn broker_version(&mut self) -> String {
        let deadline = Deadline::after(PATIENCE);
        let version = self.link.within(&deadline, Phase::Look, |connection| {
            Ok(connection.server_properties().get("version").cloned())
        });
        match version {
            Ok(Some(AmqpValue::LongString(version))) => version,
            other => panic!("no version of the broker: {other:?}"),
        }
    }

    /// Declares a queue as `rpc-server` does by default.
    pub(crate) fn declare_default(&self, queue: &str) {
        self.declare(queue, default_queue_type(&self.url));
    }

    /// Declares a queue as `rpc-server --queue-type` does.
    pub(crate) fn declare(&self, queue: &str, queue_type: &str) {
        self.declare_with(queue, queue_type, &[]);
    }

    /// The same; what is rejected from the queue, or expires there, goes to another one.
    pub(crate) fn declare_with_dead_letters(
        &self,
        queue: &str,
        queue_type: &str,
        dead_letters: &str,
    ) {
        let to = [("x-dead-letter-exchange", ""), ("x-dead-letter-routing-key", dead_letters)];
        self.declare_with(queue, queue_type, &to);
    }

    /// Makes an exchange that sends everything to the queue, and returns its name. It goes with the queue.
    pub(crate) fn fan_out_to(&self, queue: &str) -> String {
        let exchange = format!("{queue}.exchange");
        let options = ExchangeDeclareOptions { auto_delete: true, ..Default::default() };
        let declared = self.channel.exchange_declare(ExchangeType::Fanout, &*exchange, options);
        declared.expect("the exchange can be declared");
        let bound = self.channel.queue_bind(queue, &*exchange, "", FieldTable::new());
        bound.expect("the queue can be bound");
        exchange
    }

    fn declare_with(&self, queue: &str, queue_type: &str, arguments: &[(&str, &str)]) {
        let is_quorum = queue_type == "quorum";
        let queue_type_argument = is_quorum.then_some(("x-queue-type", "quorum"));
        let mut table = FieldTable::new();
        for (name, value) in arguments.iter().chain(&queue_type_argument) {
            table.insert((*name).into(), AmqpValue::LongString((*value).into()));
        }
        let durable = queue_type != "transient";
        let options =
            QueueDeclareOptions { durable, arguments: table, ..QueueDeclareOptions::default() };
        self.channel.queue_declare(queue, options).expect("the queue can be declared");
    }

    pub(crate) fn publish(&self, queue: &str, body: &[u8], properties: AmqpProperties) {
        self.channel
            .basic_publish("", Publish::with_properties(body, queue, properties))
            .expect("the broker takes messages");
    }

    /// Publishes a message that the broker is to return if it reaches no queue; whether it did.
    pub(crate) fn is_returned(&self, queue: &str, body: &[u8]) -> bool {
        let returns = self.channel.listen_for_returns().expect("the channel is open");
        let message = Publish { mandatory: true, ..Publish::new(body, queue) };
        self.channel.basic_publish("", message).expect("the broker takes messages");
        self.channel.qos(0, 0, false).expect("it answers in order");
        returns.try_recv().is_ok()
    }

    /// Sends a request as a caller that takes its reply by direct reply-to, and returns what gets that.
    pub(crate) fn call_directly(&self, queue: &str) -> Consumer<'_> {
        const DIRECT: &str = "amq.rabbitmq.reply-to";
        let options = ConsumerOptions { no_ack: true, ..ConsumerOptions::default() };
        let replies = self.channel.basic_consume(DIRECT, options).expect("it is always there");
        self.publish(queue, b"30", AmqpProperties::default().with_reply_to(DIRECT.into()));
        replies
    }

    /// How many messages wait in the queue; None if it does not exist.
    pub(crate) fn depth(&mut self, queue: &str) -> Option<u32> {
        self.counts(queue).map(|counts| counts.messages)
    }

    /// How many consumers the queue has; None if it does not exist.
    pub(crate) fn consumers(&mut self, queue: &str) -> Option<u32> {
        self.counts(queue).map(|counts| counts.consumers)
    }

    /// Waits until so many messages wait in the queue.
    #[track_caller]
    pub(crate) fn await_depth(&mut self, queue: &str, messages: u32) {
        eventually(&format!("{messages} messages"), || {
            (self.depth(queue) == Some(messages)).then_some(())
        });
    }

    /// Waits until the queue has so many consumers.
    #[track_caller]
    pub(crate) fn await_consumers(&mut self, queue: &str, consumers: u32) {
        eventually(&format!("{consumers} consumers"), || {
            (self.consumers(queue) == Some(consumers)).then_some(())
        });
    }

    fn counts(&mut self, queue: &str) -> Option<Counts> {
        self.link.look(queue, &Deadline::after(PATIENCE)).ok()
    }

    /// Waits for a message, and acknowledges it.
    #[track_caller]
    pub(crate) fn take(&self, queue: &str) -> Delivery {
        eventually("a message", || self.channel.basic_get(queue, true).expect("the queue exists"))
            .delivery
    }

    /// Answers a request that was taken.
    pub(crate) fn answer(&self, request: &Delivery, body: &[u8]) {
        let reply_to = request.properties.reply_to().as_deref().expect("ours set it");
        let id = request.properties.correlation_id().clone().expect("ours set it");
        self.publish(reply_to, body, AmqpProperties::default().with_correlation_id(id));
    }

    /// Answers whatever comes to the queue, for as long as the connection lasts.
    pub(crate) fn serve(&self, queue: &str, answer: impl Fn(&[u8]) -> &'static str) {
        let options = ConsumerOptions { no_ack: true, ..ConsumerOptions::default() };
        let consumer = self.channel.basic_consume(queue, options).expect("the queue exists");
        for got in consumer.receiver() {
            let ConsumerMessage::Delivery(request) = got else { return };
            self.answer(&request, answer(&request.body).as_bytes());
        }
    }

    /// Whether there is no message in the queue that is ready to be taken.
    pub(crate) fn finds_nothing(&self, queue: &str) -> bool {
        self.channel.basic_get(queue, true).expect("the queue exists").is_none()
    }

    pub(crate) fn delete(&self, queue: &str) {
        let _ = self.channel.queue_delete(queue, QueueDeleteOptions::default());
    }
}

/// The type of queue that `rpc-server` declares by default at this broker.
pub(crate) fn default_queue_type(url: &str) -> &'static str {
    if permits_transient_queues(url) {
        "transient"
    } else {
        "quorum"
    }
}

/// Whether a broker permits transient queues; from RabbitMQ 4.3 on it may be configured not to. Then it closes the
/// connection that declares one.
pub(crate) fn permits_transient_queues(url: &str) -> bool {
    static KNOWN: Mutex<BTreeMap<String, bool>> = Mutex::new(BTreeMap::new());
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    *known.entry(url.into()).or_insert_with(|| {
        let (peer, queue) = (Peer::connect_to(url), format!("test.permitted.{}", Uuid::new_v4()));
        let declared = peer.channel.queue_declare(&*queue, QueueDeclareOptions::default());
        let permitted = declared.is_ok();
        peer.delete(&queue);
        permitted
    })
}

/// A queue name that no other test has; what is there under it is deleted in the end.
pub(crate) struct Queue(String);

impl Queue {
    /// A name for the queue of one test.
    pub(crate) fn named(test: &str) -> Self {
        Queue(format!("test.{test}.{}", std::process::id()))
    }

    /// The name for the queue of one test, declared as `rpc-server` does by default.
    pub(crate) fn declared(test: &str) -> Self {
        let queue = Queue::named(test);
        Peer::connect().declare_default(&queue);
        queue
    }
}

impl Deref for Queue {
    type Target = str;

    fn deref(&self) -> &str {
        &self.0
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        // A second panic would hide the first.
        if !std::thread::panicking() {
            Peer::connect().delete(&self.0);
        }
    }
}
