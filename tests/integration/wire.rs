//! What goes over the wire, seen by a foreign peer at the other end.

use crate::support::broker_features::broker_version;
use crate::support::peer::{Peer, Queue};
use crate::support::programs::{assert_output, client, Program};
use crate::support::{eventually, TEST_TIMEOUT};
use amiquip::{AmqpProperties, AmqpValue, ConsumerMessage};
use std::thread;
use uuid::Uuid;

#[test]
fn a_request_is_what_the_wire_table_says() {
    let queue = Queue::declare("request");
    let caller = thread::spawn({
        let mut call = client(&queue, &["-q", "-t", "20s", "30"]);
        move || assert_output(&mut call, 0, "832040\n", "")
    });
    let mut peer = Peer::connect();
    let request = peer.take(&queue);
    assert_eq!(request.body, b"30");
    assert_eq!(request.exchange, "");
    assert_eq!(request.routing_key, *queue);
    let properties = &request.properties;
    assert_eq!(properties.content_type().as_deref(), Some("text/plain"));
    assert_eq!(properties.delivery_mode(), &Some(2));
    assert_eq!(properties.type_(), &None);
    let expiration: u64 =
        properties.expiration().as_ref().expect("set").parse().expect("milliseconds");
    assert!((1..=20_000).contains(&expiration), "{expiration}");
    let id = properties.correlation_id().as_deref().expect("set");
    assert_eq!(Uuid::try_parse(id).expect("a UUID").get_version_num(), 4);
    let reply_to = properties.reply_to().clone().expect("set");
    let name = reply_to.strip_prefix("rpc.reply.").expect("its name says what it is");
    assert_eq!(Uuid::try_parse(name).expect("a UUID").get_version_num(), 4);
    // A foreign server sends a body and the id, and nothing else.
    peer.reply(&request, b"832040");
    caller.join().expect("the caller got its answer");
    eventually("the end of the reply queue", || {
        peer.message_count(&reply_to).is_none().then_some(())
    });
}

/// Sends a request as a foreign client may, and returns the reply.
fn ask(queue: &str, body: &[u8], properties: AmqpProperties) -> amiquip::Delivery {
    let replies = Queue::declare(&format!("replies.{}", Uuid::new_v4()));
    let peer = Peer::connect();
    peer.publish(queue, body, properties.with_reply_to(replies.to_owned()));
    peer.take(&replies)
}

#[test]
fn a_reply_is_what_the_wire_table_says() {
    let queue = Queue::named("reply");
    let _server = Program::start_server(&queue, &[]);
    for id in ["1", "5f3a1b.uniqid", "ÄÖÜ ☃", &"x".repeat(255)] {
        let reply = ask(&queue, b"30", AmqpProperties::default().with_correlation_id(id.into()));
        assert_eq!(reply.body, b"832040");
        assert_eq!(reply.exchange, "");
        let expected = AmqpProperties::default()
            .with_content_type("text/plain".into())
            .with_correlation_id(id.into());
        assert_eq!(reply.properties, expected);
    }
    let without_id = ask(&queue, b"30", AmqpProperties::default());
    assert_eq!(without_id.properties.correlation_id(), &None);
}

#[test]
fn a_bad_request_gets_an_error_reply_and_the_server_goes_on() {
    let queue = Queue::named("bad_requests");
    let server = Program::start_server(&queue, &["--max-n", "100"]);
    for (body, code, message) in [
        (&b"abc"[..], "invalid-argument", "invalid argument: 'abc' is not a natural number"),
        (b"", "invalid-argument", "invalid argument: '' is not a natural number"),
        (b"-1", "invalid-argument", "invalid argument: '-1' is not a natural number"),
        (b" 30", "invalid-argument", "invalid argument: ' 30' is not a natural number"),
        (b"\xff\xfe", "invalid-argument", "invalid argument: '\\xff\\xfe' is not a natural number"),
        (
            &vec![b'1'; 10_000_000],
            "invalid-argument",
            "invalid argument: '111111111111111111111' is not",
        ),
        (b"101", "out-of-range", "out of range: 101 is larger than 100"),
        (
            b"99999999999999999999",
            "out-of-range",
            "out of range: 99999999999999999999 is larger than",
        ),
    ] {
        let reply = ask(&queue, body, AmqpProperties::default().with_correlation_id("id".into()));
        let text = String::from_utf8(reply.body).expect("an error is text");
        assert!(text.starts_with(message), "{text}");
        assert_eq!(reply.properties.type_().as_deref(), Some("error"));
        assert_eq!(reply.properties.correlation_id().as_deref(), Some("id"));
        assert_eq!(reply.properties.content_type().as_deref(), Some("text/plain"));
        let headers = reply.properties.headers().clone().expect("set");
        assert_eq!(headers.get("x-error-code"), Some(&AmqpValue::LongString(code.into())));
    }
    assert_eq!(ask(&queue, b"10", AmqpProperties::default()).body, b"55");
    assert_eq!(server.stop(), [" [.] fib(10)"]);
    assert_eq!(Peer::connect().message_count(&queue), Some(0));
}

#[test]
fn a_request_that_cannot_be_answered_is_rejected_and_not_requeued() {
    let queue = Queue::named("no_reply_to");
    let server = Program::start_server(&queue, &[]);
    let peer = Peer::connect();
    peer.publish(&queue, b"30\x1b[2J", AmqpProperties::default());
    let line = server.wait_for_log("without a reply_to");
    assert!(line.ends_with(r"'30\u{1b}[2J'"), "{line}");
    assert_eq!(ask(&queue, b"10", AmqpProperties::default()).body, b"55");
    assert_eq!(server.stop(), [" [.] fib(10)"]);
    assert_eq!(Peer::connect().message_count(&queue), Some(0));
}

#[test]
fn a_dead_letter_exchange_catches_what_cannot_be_answered() {
    let dead_letters = Queue::declare("dead_letters");
    let queue = Queue::named("with_dead_letters");
    let peer = Peer::connect();
    peer.declare_with_dead_letters(&queue, "classic", &dead_letters);
    let _server = Program::start_server(&queue, &[]);
    peer.publish(&queue, b"30", AmqpProperties::default());
    assert_eq!(peer.take(&dead_letters).body, b"30");
}

#[test]
fn a_caller_that_is_gone_is_logged_and_its_request_is_done() {
    let queue = Queue::named("caller_gone");
    let server = Program::start_server(&queue, &[]);
    let properties =
        AmqpProperties::default().with_reply_to("gone".into()).with_correlation_id("its-id".into());
    Peer::connect().publish(&queue, b"30", properties);
    let line = server.wait_for_log("the caller is gone");
    assert!(
        line.ends_with("its queue 'gone' does not exist any more (correlation id: its-id)"),
        "{line}"
    );
    server.stop();
    assert_eq!(Peer::connect().message_count(&queue), Some(0));
}

/// Why a reply to a direct reply-to is not mandatory: up to RabbitMQ 4.1 it would be returned though it arrives.
#[test]
fn a_mandatory_reply_to_a_direct_reply_to_arrives_and_is_returned_before_rabbitmq_4_2() {
    let queue = Queue::declare("mandatory_direct");
    let (caller, server) = (Peer::connect(), Peer::connect());
    let replies = caller.call_with_direct_reply_to(&queue);
    let request = server.take(&queue);
    let reply_to = request.properties.reply_to().as_deref().expect("set");
    assert_eq!(server.publish_mandatory(reply_to, b"832040"), broker_version() < (4, 2));
    let reply = replies.receiver().recv_timeout(TEST_TIMEOUT).expect("it arrives");
    assert!(matches!(reply, ConsumerMessage::Delivery(reply) if reply.body == b"832040"));
}
