//! What RabbitMQ's sentences mean, `rpc_common::connection::Meaning`: each sentence is provoked at
//! the broker of the tests, and must be recognised in its words of this version.

use crate::support::broker::{self, exclusive_node};
use crate::support::broker_features::report_not_applicable;
use crate::support::peer::{permits_transient_queues, Peer, Queue};
use crate::support::programs::{client, Program};
use amiquip::{AmqpValue, ConsumerOptions, FieldTable, QueueDeclareOptions};
use rpc_common::command_line::BrokerOptions;
use rpc_common::connection::{Connection, Deadline, Error, ErrorKind, Meaning, Owner, Phase};
use rpc_common::message::Publish;
use std::time::Duration;

fn connect(url: &str) -> Result<Connection, Error> {
    let endpoints = BrokerOptions::from_url(url).endpoints()?;
    Connection::open(&endpoints[0], "test", &deadline(), &Owner::Standby)
}

fn deadline() -> Deadline {
    Deadline::after(Duration::from_secs(30))
}

/// The meaning of what the broker says to a declaration of `queue`.
fn meaning_of_declaration(queue: &str, options: QueueDeclareOptions) -> Option<Meaning> {
    error_of_declaration(queue, options).meaning()
}

/// What the broker says to a declaration of `queue`.
fn error_of_declaration(queue: &str, options: QueueDeclareOptions) -> Error {
    let mut connection = connect(broker::url()).expect("the broker is running");
    let declared = connection.run_blocking(&deadline(), Phase::DeclaringQueue, |amqp| {
        let channel = amqp.open_channel(None)?;
        channel.queue_declare(queue, options).map(drop)
    });
    declared.expect_err("the broker refuses it")
}

/// The meaning of what the broker says to a message of `size` bytes to the default exchange.
fn meaning_of_publish(url: &str, size: usize) -> Option<Meaning> {
    let mut connection = connect(url).expect("the broker accepts the user");
    let (channel, publisher) = connection.open_channel(9, &deadline()).expect("it is open");
    let message = Publish {
        routing_key: b"nobody",
        mandatory: false,
        properties: vec![0, 0],
        body: &vec![b'x'; size],
    };
    publisher
        .add_message(&message)
        .expect("it fits into a frame");
    publisher.flush().expect("the channel is open");
    let round_trip = channel.run_blocking(&deadline(), Phase::PublishingReply, |amqp| {
        amqp.qos(0, 0, false)
    });
    round_trip
        .expect_err("the broker closes the channel")
        .meaning()
}

#[test]
fn a_queue_that_does_not_exist_is_told_from_one_that_is_exclusive_to_its_owner() {
    let mut connection = connect(broker::url()).expect("the broker is running");
    let mut meaning_of = |queue: &str| {
        let stats = connection.queue_stats(queue, &deadline());
        stats.expect_err("the broker refuses it").meaning()
    };
    let queue = Queue::named("sentences.missing");
    assert_eq!(meaning_of(&queue), Some(Meaning::NoQueue));
    let owner = Peer::connect();
    let exclusive = owner.declare_exclusive();
    assert_eq!(meaning_of(&exclusive), None);
}

#[test]
fn a_durable_queue_is_told_from_a_transient_one_and_a_quorum_queue_from_a_classic_one() {
    let queue = Queue::named("sentences");
    Peer::connect().declare(&queue, "classic");
    let quorum = FieldTable::from([(
        "x-queue-type".to_owned(),
        AmqpValue::LongString("quorum".into()),
    )]);
    let quorum = QueueDeclareOptions {
        durable: true,
        arguments: quorum,
        ..QueueDeclareOptions::default()
    };
    let meaning = meaning_of_declaration(&queue, quorum);
    assert_eq!(meaning, Some(Meaning::OtherQueueType));
    let meaning = meaning_of_declaration(&queue, QueueDeclareOptions::default());
    assert_eq!(meaning, Some(Meaning::OtherDurability));
}

/// The broker says it in two forms: with the type of the value, and without.
#[test]
fn a_difference_has_the_value_that_the_queue_has() {
    let queue = Queue::named("sentences.limited");
    Peer::connect().declare_with_max_length(&queue, "classic", 10);
    for declared in [None, Some(9)] {
        let arguments = declared.map(|value| ("x-max-length".into(), AmqpValue::LongInt(value)));
        let options = QueueDeclareOptions {
            durable: true,
            arguments: arguments.into_iter().collect(),
            ..QueueDeclareOptions::default()
        };
        let error = error_of_declaration(&queue, options);
        let ErrorKind::ChannelClosed(reason) = error.kind else {
            panic!("{error}");
        };
        let difference = reason.difference().expect("it is one");
        assert_eq!(difference.name, "x-max-length");
        let expected = match declared {
            None => AmqpValue::LongLongInt(10),
            Some(_) => AmqpValue::LongString("10".into()), // the sentence does not tell the type
        };
        assert_eq!(difference.current, Some(expected));
    }
}

#[test]
fn a_stream_refuses_a_consumer_with_a_priority() {
    let queue = Queue::named("sentences.stream");
    Peer::connect().declare(&queue, "stream");
    let mut connection = connect(broker::url()).expect("the broker is running");
    let consumed = connection.run_blocking(&deadline(), Phase::StartingConsumer, |amqp| {
        let channel = amqp.open_channel(None)?;
        channel.qos(0, 1, false)?;
        let options = ConsumerOptions {
            arguments: FieldTable::from([("x-priority".to_owned(), AmqpValue::LongInt(0))]),
            ..ConsumerOptions::default()
        };
        channel.basic_consume(&*queue, options).map(drop)
    });
    let meaning = consumed.expect_err("the broker refuses it").meaning();
    assert_eq!(meaning, Some(Meaning::NoConsumerPriority));
}

#[test]
fn a_broker_that_permits_no_transient_queues_says_so() {
    if permits_transient_queues(broker::url()) {
        return report_not_applicable("", "the broker permits transient queues");
    }
    let meaning = meaning_of_declaration("sentences.transient", QueueDeclareOptions::default());
    assert_eq!(meaning, Some(Meaning::TransientQueueRefused));
}

#[test]
fn a_message_that_is_too_large_and_one_to_an_exchange_that_is_refused_are_told_apart() {
    let node = exclusive_node();
    let meaning = meaning_of_publish(node.url(), 200_000);
    assert_eq!(meaning, Some(Meaning::MessageTooLarge));
    node.add_user("mute", "page");
    node.rabbitmqctl(&["set_permissions", "mute", ".*", "^$", ".*"]);
    let url = format!("amqp://mute:page@{}", node.authority());
    assert_eq!(meaning_of_publish(&url, 1), Some(Meaning::ExchangeRefused));
}

/// Retrying helps: a connection may end.
#[test]
fn a_limit_of_connections_is_not_a_missing_permission() {
    let node = exclusive_node();
    node.add_user("crowd", "page");
    let url = format!("amqp://crowd:page@{}", node.authority());
    let error_with = |set: &[&str], clear: &[&str]| {
        node.rabbitmqctl(set);
        let error = connect(&url).err().expect("no connection is allowed");
        node.rabbitmqctl(clear);
        error
    };
    let limit = r#"{"max-connections":0}"#;
    let of_user = error_with(
        &["set_user_limits", "crowd", limit],
        &["clear_user_limits", "crowd", "max-connections"],
    );
    let of_vhost = error_with(&["set_vhost_limits", limit], &["clear_vhost_limits"]);
    for error in [of_user, of_vhost] {
        assert!(
            error.to_string().contains("connection limit (0)"),
            "{error}"
        );
        assert!(!error.is_permanent(), "{error}");
    }
    assert!(connect(&url).is_ok());
}

/// The request ran: it may not be exit code 3, which says that nothing was sent.
#[test]
fn a_user_whose_name_is_a_word_of_a_sentence_is_told_the_truth() {
    let node = exclusive_node();
    let queue = "sentences.word";
    let _server = Program::start_server_at(node.url(), queue, &[]);
    node.add_user("exchange", "page");
    node.rabbitmqctl(&["set_permissions", "exchange", ".*", ".*", "^$"]);
    let url = format!("amqp://exchange:page@{}", node.authority());
    let mut call = client(queue, &["30"]);
    let output = call.env("AMQP_URL", url).assert().code(5).stdout("");
    let stderr = String::from_utf8_lossy(&output.get_output().stderr).into_owned();
    assert!(stderr.contains("refused for user 'exchange'"), "{stderr}");
}
