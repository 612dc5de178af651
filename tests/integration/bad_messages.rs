//! Promise: a bad message cannot stop a server. Messages that anybody with access to the queue can
//! publish stop no server, none of them stays in the queue, and the next call is answered.

use crate::support::broker::private_node;
use crate::support::peer::{call, Peer, Queue};
use crate::support::programs::{assert_output, client, Program};
use crate::support::raw_peer::{
    large_table, nested_arrays, nested_tables, short_str, RawPeer, CORRELATION_ID, EXPIRATION,
    HEADERS, REPLY_TO,
};
use amiquip::{AmqpProperties, AmqpValue};
use rpc_common::properties::Properties;
use rustix::process::Signal;

#[test]
fn a_bad_request_gets_an_error_reply_and_the_server_goes_on() {
    let queue = Queue::named("bad_requests");
    let server = Program::start_server(&queue, &["--max-n", "100"]);
    for (body, code, message) in [
        (
            &b"abc"[..],
            "invalid-argument",
            "invalid argument: 'abc' is not a whole number",
        ),
        (
            b"",
            "invalid-argument",
            "invalid argument: '' is not a whole number",
        ),
        (
            b"-1",
            "invalid-argument",
            "invalid argument: '-1' is not a whole number",
        ),
        (
            b" 30",
            "invalid-argument",
            "invalid argument: ' 30' is not a whole number",
        ),
        (
            b"\xff\xfe",
            "invalid-argument",
            "invalid argument: '\\xff\\xfe' is not a whole number",
        ),
        (
            &vec![b'1'; 10_000_000],
            "invalid-argument",
            "invalid argument: '111111111111111111111' is not",
        ),
        (
            b"101",
            "out-of-range",
            "out of range: 101 is larger than 100",
        ),
        (
            b"99999999999999999999",
            "out-of-range",
            "out of range: 99999999999999999999 is too large",
        ),
    ] {
        let reply = call(
            &queue,
            body,
            AmqpProperties::default().with_correlation_id("id".into()),
        );
        let text = String::from_utf8(reply.body).expect("an error is text");
        assert!(text.starts_with(message), "{text}");
        assert_eq!(reply.properties.type_().as_deref(), Some("error"));
        assert_eq!(reply.properties.correlation_id().as_deref(), Some("id"));
        assert_eq!(
            reply.properties.content_type().as_deref(),
            Some("text/plain")
        );
        let headers = reply.properties.headers().clone().expect("set");
        assert_eq!(
            headers.get("x-error-code"),
            Some(&AmqpValue::LongString(code.into()))
        );
    }
    assert_eq!(call(&queue, b"10", AmqpProperties::default()).body, b"55");
    assert_eq!(server.stop(), [" [.] fib(10)"]);
    assert_eq!(Peer::connect().message_count(&queue), Some(0));
}

#[test]
fn a_request_without_reply_to_is_rejected_and_not_requeued() {
    let queue = Queue::named("no_reply_to");
    let server = Program::start_server(&queue, &[]);
    let peer = Peer::connect();
    peer.publish(&queue, b"30\x1b[2J", AmqpProperties::default());
    let line = server.wait_for_log("it has no reply_to");
    assert!(line.ends_with(r"'30\u{1b}[2J'"), "{line}");
    assert_eq!(call(&queue, b"10", AmqpProperties::default()).body, b"55");
    assert_eq!(server.stop(), [" [.] fib(10)"]);
    assert_eq!(Peer::connect().message_count(&queue), Some(0));
}

#[test]
fn a_dead_letter_exchange_receives_rejected_requests() {
    let dead_letters = Queue::declare("dead_letters");
    let queue = Queue::named("with_dead_letters");
    let peer = Peer::connect();
    peer.declare_with_dead_letters(&queue, "classic", &dead_letters);
    let _server = Program::start_server(&queue, &[]);
    peer.publish(&queue, b"30", AmqpProperties::default());
    assert_eq!(peer.take(&dead_letters).body, b"30");
}

/// The size of a header value that fits into a frame, but not together with a header that RabbitMQ
/// adds.
const NEARLY_A_FRAME: usize = 130_900;

/// A queue with servers, and a peer that publishes bad messages to it.
struct AttackedQueue {
    queue: Queue,
    replies: Queue,
    dead_letters: Queue,
    servers: Vec<Program>,
    attacker: RawPeer,
}

impl AttackedQueue {
    fn new(name: &str, queue_type: &str, servers: usize) -> Self {
        let url = private_node().url();
        let queue = Queue::named(&format!("bad_{name}_{queue_type}"));
        let replies = Queue::declare(&format!("bad_{name}_{queue_type}.replies"));
        let dead_letters = Queue::declare(&format!("bad_{name}_{queue_type}.dead_letters"));
        Peer::connect_to(url).declare_with_dead_letters(&queue, queue_type, &dead_letters);
        let start = || Program::start_server_at(url, &queue, &["--heartbeat", "60"]);
        let servers = (0..servers).map(|_| start()).collect();
        let attacker = RawPeer::connect(url);
        AttackedQueue {
            queue,
            replies,
            dead_letters,
            servers,
            attacker,
        }
    }

    /// A classic queue with one server, and a quorum queue with three.
    fn classic_and_quorum(name: &str) -> [Self; 2] {
        [
            AttackedQueue::new(name, "classic", 1),
            AttackedQueue::new(name, "quorum", 3),
        ]
    }

    fn attack(&mut self, flags: u16, properties: &[&[u8]]) {
        self.attacker
            .publish(("", self.queue.as_bytes()), flags, properties);
    }

    /// Waits for the reply to a message of the attacker, and returns the frame of its content
    /// header.
    fn wait_for_reply(&mut self) -> Vec<u8> {
        let (header, body) = self.attacker.take(&self.replies);
        assert_eq!(body, b"832040");
        header
    }

    /// Waits until a server has rejected the message.
    fn wait_for_dead_letter(&mut self) {
        assert_eq!(self.attacker.take(&self.dead_letters).1, b"30");
    }

    /// Checks that no message is left, the next call is answered, and all servers are running.
    #[track_caller]
    fn assert_survived(self) {
        private_node().wait_until_empty(&self.queue);
        let mut call = client(&self.queue, &["-q", "-t", "10s", "20"]);
        assert_output(call.env("AMQP_URL", private_node().url()), 0, "6765\n", "");
        for server in self.servers {
            server.stop();
        }
    }
}

/// How many kinds of bad messages [`publish`] has.
pub(crate) const KINDS: usize = 7;

/// Publishes a bad message of this kind, to the queue or to an exchange that is bound to it.
/// Headers are nested in `nested` bytes.
pub(crate) fn publish(
    attacker: &mut RawPeer,
    kind: usize,
    nested: usize,
    (queue, exchange, replies): (&str, &str, &str),
) {
    let queue = ("", queue.as_bytes());
    let reply_to = &short_str(replies.as_bytes())[..];
    match kind {
        0 => attacker.publish(
            queue,
            HEADERS | REPLY_TO,
            &[&nested_tables(nested), reply_to],
        ),
        1 => attacker.publish(queue, HEADERS, &[&nested_arrays(nested)]),
        2 => attacker.publish(
            queue,
            REPLY_TO,
            &[&short_str(b"amq.rabbitmq.reply-to.%%%.%%%")],
        ),
        3 => {
            let headers = large_table(NEARLY_A_FRAME);
            attacker.publish(queue, HEADERS | REPLY_TO, &[&headers, reply_to]);
        }
        4 => attacker.publish((exchange, b"\xff\xfe"), REPLY_TO, &[reply_to]),
        5 => attacker.publish(
            queue,
            CORRELATION_ID | REPLY_TO,
            &[b"\x02\xff\xfe", reply_to],
        ),
        _ => attacker.publish(queue, REPLY_TO, &[b"\x02\xff\xfe"]),
    }
}

/// Neither the stack of amiquip's I/O thread, which parses the headers, nor that of the worker,
/// which drops them, overflows.
#[test]
fn requests_with_deeply_nested_headers_are_answered() {
    for mut attacked in AttackedQueue::classic_and_quorum("nested") {
        for table in [
            nested_tables(90_000),
            nested_tables(130_000),
            nested_arrays(130_000),
        ] {
            let reply_to = short_str(attacked.replies.as_bytes());
            attacked.attack(HEADERS | REPLY_TO, &[&table, &reply_to]);
            attacked.wait_for_reply();
            attacked.attack(HEADERS, &[&table]);
            attacked.wait_for_dead_letter();
        }
        attacked.assert_survived();
    }
}

/// RabbitMQ 3.10 closes the connection that publishes to such a name.
#[test]
fn a_request_with_a_made_up_direct_reply_to_is_dropped() {
    for reply_to in [
        "amq.rabbitmq.reply-to.%%%.%%%",
        "amq.rabbitmq.reply-to.AAAA.AAAA",
    ] {
        let name = if reply_to.contains('%') {
            "not_base64"
        } else {
            "no_process"
        };
        for mut attacked in AttackedQueue::classic_and_quorum(name) {
            attacked.attack(REPLY_TO, &[&short_str(reply_to.as_bytes())]);
            attacked.assert_survived();
        }
    }
}

/// A dead-letter exchange adds the header `x-death`.
#[test]
fn headers_that_a_dead_letter_exchange_makes_larger_than_a_frame_are_answered() {
    for mut attacked in AttackedQueue::classic_and_quorum("x_death") {
        let waiting = Queue::named(&format!("{}.waiting", &*attacked.queue));
        let peer = Peer::connect_to(private_node().url());
        peer.declare_with_dead_letters(&waiting, "classic", &attacked.queue);
        let reply_to = short_str(attacked.replies.as_bytes());
        let properties = [
            &large_table(NEARLY_A_FRAME)[..],
            &reply_to,
            &short_str(b"1"),
        ];
        let to = ("", waiting.as_bytes());
        attacked
            .attacker
            .publish(to, HEADERS | REPLY_TO | EXPIRATION, &properties);
        attacked.wait_for_reply();
        attacked.assert_survived();
    }
}

/// A quorum queue adds the header `x-delivery-count`.
#[test]
fn headers_that_a_redelivery_makes_larger_than_a_frame_are_answered() {
    let mut attacked = AttackedQueue::new("redelivered", "quorum", 0);
    let busy =
        Program::start_server_at(private_node().url(), &attacked.queue, &["--delay", "365d"]);
    let reply_to = short_str(attacked.replies.as_bytes());
    attacked.attack(
        HEADERS | REPLY_TO,
        &[&large_table(NEARLY_A_FRAME), &reply_to],
    );
    assert_eq!(busy.next_line(), " [.] fib(30)");
    busy.send_signal(Signal::KILL);
    attacked.servers.push(Program::start_server_at(
        private_node().url(),
        &attacked.queue,
        &[],
    ));
    attacked.wait_for_reply();
    attacked.assert_survived();
}

#[test]
fn a_request_with_a_routing_key_that_is_not_utf8_is_answered() {
    for mut attacked in AttackedQueue::classic_and_quorum("routing_key") {
        let exchange =
            Peer::connect_to(private_node().url()).declare_fanout_exchange(&attacked.queue);
        let reply_to = short_str(attacked.replies.as_bytes());
        attacked
            .attacker
            .publish((&exchange, b"\xff\xfe"), REPLY_TO, &[&reply_to]);
        attacked.wait_for_reply();
        attacked.assert_survived();
    }
}

/// PHP's `random_bytes` makes such ids. A content header frame is a frame header (7 bytes), a class
/// (2), a weight (2) and the body's size (8), then the properties.
const PROPERTIES_OFFSET: usize = 7 + 2 + 2 + 8;

#[test]
fn a_correlation_id_that_is_not_utf8_is_copied_byte_for_byte() {
    for mut attacked in AttackedQueue::classic_and_quorum("correlation_id") {
        let reply_to = short_str(attacked.replies.as_bytes());
        for id in [&b"\xff\xfe\x00\x80"[..], b"\xc3\xa9\xc3", &[0xf0; 255]] {
            attacked.attack(CORRELATION_ID | REPLY_TO, &[&short_str(id), &reply_to]);
            let header = attacked.wait_for_reply();
            let properties =
                Properties::parse(&header[PROPERTIES_OFFSET..]).expect("they are well formed");
            assert_eq!(properties.correlation_id, Some(id));
        }
        attacked.assert_survived();
    }
}

#[test]
fn a_reply_goes_to_a_reply_to_that_is_not_utf8_byte_for_byte() {
    let mut attacked = AttackedQueue::new("reply_to", "classic", 1);
    attacked.attack(REPLY_TO, &[&short_str(b"re\xffply")]);
    attacked.servers[0].wait_for_log("a reply was returned: there is no queue 're\\xffply'");
    attacked.assert_survived();
}

/// A reply can have the same hostile headers as a request.
#[test]
fn a_client_survives_a_bad_reply() {
    let queue = Queue::named("bad_reply_headers");
    let server = Peer::connect_to(private_node().url());
    server.declare_default(&queue);
    let mut attacker = RawPeer::connect(private_node().url());
    let client = Program::spawn_at(
        private_node().url(),
        "rpc-client",
        &["--queue", &queue, "-q", "30"],
    );
    let request = server.take(&queue);
    let reply_to = request
        .properties
        .reply_to()
        .as_deref()
        .expect("rpc-client sets it");
    let id = request
        .properties
        .correlation_id()
        .as_deref()
        .expect("rpc-client sets it");
    let table = nested_tables(130_000);
    for id in [&b"\xff"[..], id.as_bytes()] {
        let properties = [&table[..], &short_str(id)];
        attacker.publish(
            ("", reply_to.as_bytes()),
            HEADERS | CORRELATION_ID,
            &properties,
        );
    }
    assert_eq!(client.next_line(), "30");
    assert_eq!(client.wait_for_exit_code(), Some(0));
    server.delete_queue(&queue);
}
