//! A peer that uses plain AMQP without the conventions of rpc-common, and queues that tests own.

use super::broker_features::broker_version_at;
use super::{broker, eventually, TEST_TIMEOUT};
use amiquip::{
    AmqpProperties, AmqpValue, Auth, Channel, Confirm, Connection, ConnectionOptions,
    ConnectionTuning, Consumer, ConsumerMessage, ConsumerOptions, Delivery, ExchangeDeclareOptions,
    ExchangeType, FieldTable, Publish, QueueDeclareOptions, QueueDeleteOptions,
};
use mio::net::TcpStream;
use percent_encoding::percent_decode_str;
use std::collections::BTreeMap;
use std::ops::Deref;
use std::sync::{Mutex, PoisonError};
use url::Url;
use uuid::Uuid;

/// A connection with one channel, for what a test does at the other end.
pub(crate) struct Peer {
    url: String,
    connection: Connection,
    channel: Channel,
}

impl Peer {
    /// Connects to the broker of the tests.
    pub(crate) fn connect() -> Self {
        Peer::connect_to(broker::url())
    }

    pub(crate) fn connect_to(url: &str) -> Self {
        let mut connection = open(url);
        let channel = connection
            .open_channel(None)
            .expect("the broker opens a channel");
        Peer {
            url: url.into(),
            connection,
            channel,
        }
    }

    /// The RabbitMQ version of the broker.
    pub(crate) fn broker_version(&self) -> String {
        match self.connection.server_properties().get("version") {
            Some(AmqpValue::LongString(version)) => version.clone(),
            other => panic!("no version of the broker: {other:?}"),
        }
    }

    /// Declares a queue as `rpc-server` does by default.
    pub(crate) fn declare_default(&self, queue: &str) {
        self.declare(queue, default_queue_type(&self.url));
    }

    /// Declares a queue as `rpc-server --queue-type` does; or a `stream`.
    pub(crate) fn declare(&self, queue: &str, queue_type: &str) {
        self.declare_with(queue, queue_type, &[]);
    }

    /// Declares a queue whose rejected and expired messages go to the queue `dead_letters`.
    pub(crate) fn declare_with_dead_letters(
        &self,
        queue: &str,
        queue_type: &str,
        dead_letters: &str,
    ) {
        let arguments = [
            ("x-dead-letter-exchange", ""),
            ("x-dead-letter-routing-key", dead_letters),
        ];
        self.declare_with(
            queue,
            queue_type,
            &arguments.map(|(name, value)| (name, long_string(value))),
        );
    }

    /// Declares a queue that refuses further messages while this many are ready.
    pub(crate) fn declare_with_max_length(&self, queue: &str, queue_type: &str, max_length: i64) {
        let max_length = ("x-max-length", AmqpValue::LongLongInt(max_length));
        self.declare_with(
            queue,
            queue_type,
            &[max_length, ("x-overflow", long_string("reject-publish"))],
        );
    }

    /// Declares a stream with a maximum age and a maximum size.
    pub(crate) fn declare_stream_with_limits(&self, queue: &str) {
        let arguments = [
            ("x-max-age", long_string("1h")),
            ("x-max-length-bytes", AmqpValue::LongLongInt(1_000_000)),
        ];
        self.declare_with(queue, "stream", &arguments);
    }

    fn declare_with(&self, queue: &str, queue_type: &str, arguments: &[(&str, AmqpValue)]) {
        let typed = ["quorum", "stream"].contains(&queue_type);
        let typed = typed.then(|| ("x-queue-type", long_string(queue_type)));
        let mut table = FieldTable::new();
        for (name, value) in arguments.iter().chain(&typed) {
            table.insert((*name).into(), value.clone());
        }
        let durable = queue_type != "transient";
        let options = QueueDeclareOptions {
            durable,
            arguments: table,
            ..QueueDeclareOptions::default()
        };
        self.channel
            .queue_declare(queue, options)
            .expect("the queue can be declared");
    }

    /// Declares a fanout exchange that is bound to the queue, and returns its name. The broker
    /// deletes it with the queue.
    pub(crate) fn declare_fanout_exchange(&self, queue: &str) -> String {
        let exchange = format!("{queue}.exchange");
        let options = ExchangeDeclareOptions {
            auto_delete: true,
            ..Default::default()
        };
        let declared = self
            .channel
            .exchange_declare(ExchangeType::Fanout, &*exchange, options);
        declared.expect("the exchange can be declared");
        let bound = self
            .channel
            .queue_bind(queue, &*exchange, "", FieldTable::new());
        bound.expect("the queue can be bound");
        exchange
    }

    /// Declares a queue that is exclusive to this peer's connection. Returns its name.
    pub(crate) fn declare_exclusive(&self) -> String {
        let options = QueueDeclareOptions {
            exclusive: true,
            ..QueueDeclareOptions::default()
        };
        let queue = self.channel.queue_declare("", options);
        queue.expect("the queue can be declared").name().to_owned()
    }

    pub(crate) fn delete_queue(&self, queue: &str) {
        let _ = self
            .channel
            .queue_delete(queue, QueueDeleteOptions::default());
    }

    pub(crate) fn publish(&self, queue: &str, body: &[u8], properties: AmqpProperties) {
        self.channel
            .basic_publish("", Publish::with_properties(body, queue, properties))
            .expect("the connection is open");
    }

    /// Publishes a persistent message, and waits until the queue has it on disk.
    pub(crate) fn publish_persistent(&self, queue: &str, body: &[u8]) {
        let confirms = self.channel.listen_for_publisher_confirms();
        let confirms = confirms.expect("the channel is open");
        let confirms_selected = self.channel.enable_publisher_confirms();
        confirms_selected.expect("the connection is open");
        let persistent = AmqpProperties::default().with_delivery_mode(2);
        self.publish(queue, body, persistent);
        let confirm = confirms.recv_timeout(TEST_TIMEOUT);
        assert!(matches!(confirm, Ok(Confirm::Ack(_))), "{confirm:?}");
    }

    /// Publishes a mandatory message, and returns whether the broker returned it.
    pub(crate) fn publish_mandatory(&self, queue: &str, body: &[u8]) -> bool {
        let returns = self
            .channel
            .listen_for_returns()
            .expect("the channel is open");
        let message = Publish {
            mandatory: true,
            ..Publish::new(body, queue)
        };
        self.channel
            .basic_publish("", message)
            .expect("the connection is open");
        self.channel
            .qos(0, 0, false)
            .expect("the broker answers in order, so after a return");
        returns.try_recv().is_ok()
    }

    /// Sends a request whose reply comes by direct reply-to, and returns the consumer of the reply.
    pub(crate) fn call_with_direct_reply_to(&self, queue: &str) -> Consumer<'_> {
        const DIRECT: &str = "amq.rabbitmq.reply-to";
        let options = ConsumerOptions {
            no_ack: true,
            ..ConsumerOptions::default()
        };
        let replies = self
            .channel
            .basic_consume(DIRECT, options)
            .expect("it always exists");
        self.publish(
            queue,
            b"30",
            AmqpProperties::default().with_reply_to(DIRECT.into()),
        );
        replies
    }

    /// How many messages are ready in the queue; None if the queue does not exist.
    pub(crate) fn message_count(&mut self, queue: &str) -> Option<u32> {
        self.declare_passively(queue).map(|(messages, _)| messages)
    }

    /// How many consumers the queue has; None if the queue does not exist.
    pub(crate) fn consumer_count(&mut self, queue: &str) -> Option<u32> {
        self.declare_passively(queue)
            .map(|(_, consumers)| consumers)
    }

    /// Waits until exactly `messages` messages are ready in the queue.
    #[track_caller]
    pub(crate) fn wait_for_messages(&mut self, queue: &str, messages: u32) {
        eventually(&format!("{messages} messages"), || {
            (self.message_count(queue) == Some(messages)).then_some(())
        });
    }

    /// Waits until the queue has exactly `consumers` consumers.
    #[track_caller]
    pub(crate) fn wait_for_consumers(&mut self, queue: &str, consumers: u32) {
        eventually(&format!("{consumers} consumers"), || {
            (self.consumer_count(queue) == Some(consumers)).then_some(())
        });
    }

    /// The numbers of messages and consumers, on a channel of its own, which the broker closes if
    /// there is no such queue.
    fn declare_passively(&mut self, queue: &str) -> Option<(u32, u32)> {
        let channel = self
            .connection
            .open_channel(None)
            .expect("the broker opens a channel");
        let queue = channel.queue_declare_passive(queue).ok()?;
        Some((
            queue.declared_message_count()?,
            queue.declared_consumer_count()?,
        ))
    }

    /// Waits for a message in the queue, and acknowledges it.
    #[track_caller]
    pub(crate) fn take(&self, queue: &str) -> Delivery {
        eventually("a message", || self.try_take(queue))
    }

    /// Takes a message from the queue and acknowledges it; None if no message is ready.
    pub(crate) fn try_take(&self, queue: &str) -> Option<Delivery> {
        let message = self
            .channel
            .basic_get(queue, true)
            .expect("the queue exists");
        message.map(|message| message.delivery)
    }

    /// Publishes the reply to a request of rpc-client.
    pub(crate) fn reply(&self, request: &Delivery, body: &[u8]) {
        let reply_to = request
            .properties
            .reply_to()
            .as_deref()
            .expect("rpc-client sets it");
        let id = request
            .properties
            .correlation_id()
            .clone()
            .expect("rpc-client sets it");
        self.publish(
            reply_to,
            body,
            AmqpProperties::default().with_correlation_id(id),
        );
    }

    /// Replies to every request in the queue, until the connection ends.
    pub(crate) fn serve(&self, queue: &str, answer: impl Fn(&[u8]) -> &'static str) {
        let options = ConsumerOptions {
            no_ack: true,
            ..ConsumerOptions::default()
        };
        let consumer = self
            .channel
            .basic_consume(queue, options)
            .expect("the queue exists");
        for message in consumer.receiver() {
            let ConsumerMessage::Delivery(request) = message else {
                return;
            };
            self.reply(&request, answer(&request.body).as_bytes());
        }
    }
}

/// Opens a connection as amiquip does, but with `TCP_NODELAY`, without which a call takes 44 ms.
fn open(url: &str) -> Connection {
    let url = Url::parse(url).expect("the broker's URL is well formed");
    let decode = |text: &str, default: &str| match &*percent_decode_str(text).decode_utf8_lossy() {
        "" => default.to_owned(),
        text => text.to_owned(),
    };
    let address = (
        url.host_str().unwrap_or("localhost"),
        url.port().unwrap_or(5672),
    );
    let socket = std::net::TcpStream::connect(address).expect("the broker is running");
    socket.set_nodelay(true).expect("it is connected");
    let username = decode(url.username(), "guest");
    let password = decode(url.password().unwrap_or_default(), "guest");
    let vhost = decode(url.path().trim_start_matches('/'), "/");
    let options = ConnectionOptions::default()
        .auth(Auth::Plain { username, password })
        .virtual_host(vhost);
    let stream = TcpStream::from_stream(socket).expect("it is connected");
    let opened = Connection::insecure_open_stream(stream, options, ConnectionTuning::default());
    opened.expect("the broker accepts the test")
}

fn long_string(text: &str) -> AmqpValue {
    AmqpValue::LongString(text.into())
}

/// Sends a request as a peer, and returns the reply.
pub(crate) fn call(queue: &str, body: &[u8], properties: AmqpProperties) -> Delivery {
    let replies = Queue::declare(&format!("replies.{}", Uuid::new_v4()));
    let peer = Peer::connect();
    peer.publish(queue, body, properties.with_reply_to(replies.to_owned()));
    peer.take(&replies)
}

/// The type of queue that `rpc-server` declares by default at this broker.
pub(crate) fn default_queue_type(url: &str) -> &'static str {
    if broker_version_at(url) < (4, 0) {
        "transient"
    } else {
        "quorum"
    }
}

/// Whether a broker permits transient queues. RabbitMQ 4.3 can be configured not to; it then closes
/// the connection that declares one.
pub(crate) fn permits_transient_queues(url: &str) -> bool {
    static BY_URL: Mutex<BTreeMap<String, bool>> = Mutex::new(BTreeMap::new());
    let mut by_url = BY_URL.lock().unwrap_or_else(PoisonError::into_inner);
    *by_url.entry(url.into()).or_insert_with(|| {
        let peer = Peer::connect_to(url);
        let queue = format!("test.permitted.{}", Uuid::new_v4());
        let declared = peer
            .channel
            .queue_declare(&*queue, QueueDeclareOptions::default());
        let permitted = declared.is_ok();
        peer.delete_queue(&queue);
        permitted
    })
}

/// The name of a queue that only one test uses. The queue is deleted when this is dropped.
pub(crate) struct Queue(String);

impl Queue {
    /// A name for the queue of one test. The queue is not declared.
    pub(crate) fn named(test: &str) -> Self {
        Queue(format!("test.{test}.{}", std::process::id()))
    }

    /// The queue of one test, declared as `rpc-server` does by default.
    pub(crate) fn declare(test: &str) -> Self {
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
            Peer::connect().delete_queue(&self.0);
        }
    }
}
