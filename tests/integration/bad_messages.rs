//! Messages that anybody may publish who may publish to the queue, made to stop its servers: none of them does, none
//! stays in the queue, and the next call is answered.

use crate::support::broker::private_node;
use crate::support::eventually;
use crate::support::peer::{Peer, Queue};
use crate::support::programs::{assert_output, client, Program};
use crate::support::raw_peer::{
    large_table, nested_arrays, nested_tables, short_str, RawPeer, CORRELATION_ID, EXPIRATION,
    HEADERS, REPLY_TO,
};
use rpc_common::sanitize::correlation_id_range;
use rustix::process::Signal;

/// What RabbitMQ adds to a content header of this size makes it larger than a frame.
const NEARLY_A_FRAME: usize = 130_900;

/// A queue with servers, and what strikes it.
struct Scene {
    queue: Queue,
    replies: Queue,
    dead_letters: Queue,
    servers: Vec<Program>,
    attacker: RawPeer,
}

impl Scene {
    fn new(name: &str, queue_type: &str, servers: usize) -> Self {
        let queue = Queue::named(&format!("bad_{name}_{queue_type}"));
        let replies = Queue::declare(&format!("bad_{name}_{queue_type}.replies"));
        let dead_letters = Queue::declare(&format!("bad_{name}_{queue_type}.dead_letters"));
        Peer::connect_to(private_node().url()).declare_with_dead_letters(
            &queue,
            queue_type,
            &dead_letters,
        );
        let start =
            || Program::start_server_at(private_node().url(), &queue, &["--heartbeat", "60"]);
        let servers = (0..servers).map(|_| start()).collect();
        let attacker = RawPeer::connect(private_node().url());
        Scene { queue, replies, dead_letters, servers, attacker }
    }

    /// One server of a classic queue, and three of a quorum queue.
    fn both(name: &str) -> [Self; 2] {
        [Scene::new(name, "classic", 1), Scene::new(name, "quorum", 3)]
    }

    fn strike(&mut self, flags: u16, properties: &[&[u8]]) {
        self.attacker.publish(("", self.queue.as_bytes()), flags, properties);
    }

    /// Waits for the reply to a message of the attacker, and returns its content header frame.
    fn reply(&mut self) -> Vec<u8> {
        let (header, body) = self.attacker.take(&self.replies);
        assert_eq!(body, b"832040");
        header
    }

    /// The message was rejected.
    fn expect_dead_letter(&mut self) {
        assert_eq!(self.attacker.take(&self.dead_letters).1, b"30");
    }

    /// The message is gone, the servers live, and the next call is answered.
    #[track_caller]
    fn ends_well(self) {
        eventually("a queue of which nothing is left", || {
            let columns = ["name", "messages_ready", "messages_unacknowledged"];
            let table = private_node()
                .rabbitmqctl(&[&["list_queues", "--no-table-headers"][..], &columns].concat());
            table.lines().any(|line| line == format!("{}\t0\t0", &*self.queue)).then_some(())
        });
        let mut call = client(&self.queue, &["-q", "-t", "10s", "20"]);
        assert_output(call.env("AMQP_URL", private_node().url()), 0, "6765\n", "");
        for server in self.servers {
            server.stop();
        }
    }
}

/// How many kinds of message [`publish`] knows.
pub(crate) const KINDS: usize = 7;

/// Publishes a message of some kind to a queue, or to an exchange that is bound to it.
pub(crate) fn publish(
    attacker: &mut RawPeer,
    kind: usize,
    queue: &str,
    exchange: &str,
    replies: &str,
) {
    let (queue, reply_to) = (("", queue.as_bytes()), &short_str(replies.as_bytes())[..]);
    match kind {
        0 => attacker.publish(queue, HEADERS | REPLY_TO, &[&nested_tables(130_000), reply_to]),
        1 => attacker.publish(queue, HEADERS, &[&nested_arrays(130_000)]),
        2 => attacker.publish(queue, REPLY_TO, &[&short_str(b"amq.rabbitmq.reply-to.%%%.%%%")]),
        3 => {
            let headers = large_table(NEARLY_A_FRAME);
            attacker.publish(queue, HEADERS | REPLY_TO, &[&headers, reply_to]);
        }
        4 => attacker.publish((exchange, b"\xff\xfe"), REPLY_TO, &[reply_to]),
        5 => attacker.publish(queue, CORRELATION_ID | REPLY_TO, &[b"\x02\xff\xfe", reply_to]),
        _ => attacker.publish(queue, REPLY_TO, &[b"\x02\xff\xfe"]),
    }
}

/// Without harm to the stack of amiquip's thread, which parses them, and of the worker, which drops them.
#[test]
fn deeply_nested_headers_are_answered() {
    for mut scene in Scene::both("nested") {
        for table in [nested_tables(90_000), nested_tables(130_000), nested_arrays(130_000)] {
            let reply_to = short_str(scene.replies.as_bytes());
            scene.strike(HEADERS | REPLY_TO, &[&table, &reply_to]);
            scene.reply();
            scene.strike(HEADERS, &[&table]);
            scene.expect_dead_letter();
        }
        scene.ends_well();
    }
}

/// RabbitMQ 3.10 closes the connection for a reply to such a name.
#[test]
fn a_direct_reply_to_that_cannot_be_is_given_up() {
    for reply_to in ["amq.rabbitmq.reply-to.%%%.%%%", "amq.rabbitmq.reply-to.AAAA.AAAA"] {
        let name = if reply_to.contains('%') { "not_base64" } else { "no_process" };
        for mut scene in Scene::both(name) {
            scene.strike(REPLY_TO, &[&short_str(reply_to.as_bytes())]);
            scene.ends_well();
        }
    }
}

/// A dead-letter exchange adds `x-death`.
#[test]
fn headers_that_outgrow_a_frame_in_a_dead_letter_exchange_are_answered() {
    for mut scene in Scene::both("x_death") {
        let waiting = Queue::named(&format!("{}.waiting", &*scene.queue));
        let peer = Peer::connect_to(private_node().url());
        peer.declare_with_dead_letters(&waiting, "classic", &scene.queue);
        let reply_to = short_str(scene.replies.as_bytes());
        let properties = [&large_table(NEARLY_A_FRAME)[..], &reply_to, &short_str(b"1")];
        let to = ("", waiting.as_bytes());
        scene.attacker.publish(to, HEADERS | REPLY_TO | EXPIRATION, &properties);
        scene.reply();
        scene.ends_well();
    }
}

/// A quorum queue adds `x-delivery-count`.
#[test]
fn headers_that_outgrow_a_frame_when_they_are_redelivered_are_answered() {
    let mut scene = Scene::new("redelivered", "quorum", 0);
    let busy = Program::start_server_at(private_node().url(), &scene.queue, &["--delay", "365d"]);
    let reply_to = short_str(scene.replies.as_bytes());
    scene.strike(HEADERS | REPLY_TO, &[&large_table(NEARLY_A_FRAME), &reply_to]);
    assert_eq!(busy.next_line(), " [.] fib(30)");
    busy.send_signal(Signal::KILL);
    scene.servers.push(Program::start_server_at(private_node().url(), &scene.queue, &[]));
    scene.reply();
    scene.ends_well();
}

#[test]
fn a_routing_key_that_is_not_utf8_is_answered() {
    for mut scene in Scene::both("routing_key") {
        let exchange = Peer::connect_to(private_node().url()).declare_fanout_exchange(&scene.queue);
        let reply_to = short_str(scene.replies.as_bytes());
        scene.attacker.publish((&exchange, b"\xff\xfe"), REPLY_TO, &[&reply_to]);
        scene.reply();
        scene.ends_well();
    }
}

/// As PHP's `random_bytes` makes them.
#[test]
fn a_correlation_id_that_is_not_utf8_is_copied_byte_for_byte() {
    for mut scene in Scene::both("correlation_id") {
        let reply_to = short_str(scene.replies.as_bytes());
        for id in [&b"\xff\xfe\x00\x80"[..], b"\xc3\xa9\xc3", &[0xf0; 255]] {
            scene.strike(CORRELATION_ID | REPLY_TO, &[&short_str(id), &reply_to]);
            let header = scene.reply();
            assert_eq!(&header[correlation_id_range(&header).expect("it has one")], id);
        }
        scene.ends_well();
    }
}

#[test]
fn a_reply_to_that_is_not_utf8_is_rejected_with_that_reason() {
    let mut scene = Scene::new("reply_to", "classic", 1);
    scene.strike(REPLY_TO, &[&short_str(b"re\xffply")]);
    scene.servers[0].wait_for_log("its reply_to is not UTF-8: '30'");
    scene.expect_dead_letter();
    scene.ends_well();
}

/// A reply may be as bad as a request.
#[test]
fn a_client_survives_a_bad_reply() {
    let queue = Queue::named("bad_reply_headers");
    let server = Peer::connect_to(private_node().url());
    server.declare_default(&queue);
    let mut attacker = RawPeer::connect(private_node().url());
    let client =
        Program::spawn_at(private_node().url(), "rpc-client", &["--queue", &queue, "-q", "30"]);
    let request = server.take(&queue);
    let reply_to = request.properties.reply_to().as_deref().expect("ours set it");
    let id = request.properties.correlation_id().as_deref().expect("ours set it");
    let table = nested_tables(130_000);
    for id in [&b"\xff"[..], id.as_bytes()] {
        let properties = [&table[..], &short_str(id)];
        attacker.publish(("", reply_to.as_bytes()), HEADERS | CORRELATION_ID, &properties);
    }
    assert_eq!(client.next_line(), "30");
    assert_eq!(client.wait_for_exit_code(), Some(0));
    server.delete_queue(&queue);
}
