//! Servers and workers share the requests of a queue.

use crate::support::peer::{Peer, Queue};
use crate::support::programs::{assert_output, client, Program};
use amiquip::AmqpProperties;

#[test]
fn three_servers_share_the_calls_fairly() {
    let queue = Queue::named("three");
    let servers: Vec<Program> = (0..3)
        .map(|_| Program::start_server(&queue, &["--delay", "1s"]))
        .collect();
    assert_output(
        &mut client(&queue, &["--repeat", "30", "10"]),
        0,
        &"55\n".repeat(30),
        "",
    );
    let shares: Vec<usize> = servers
        .into_iter()
        .map(|server| server.stop().len())
        .collect();
    assert_eq!(shares.iter().sum::<usize>(), 30);
    assert!(
        shares.iter().all(|share| (8..=12).contains(share)),
        "{shares:?}"
    );
}

/// Four workers have one request each; the other four requests wait in the queue.
#[test]
fn workers_serve_requests_at_the_same_time() {
    let queue = Queue::named("workers");
    let server = Program::start_server(&queue, &["--workers", "4", "--delay", "365d"]);
    let mut peer = Peer::connect();
    for _ in 0..8 {
        peer.publish(
            &queue,
            b"30",
            AmqpProperties::default().with_reply_to("nobody".into()),
        );
    }
    for _ in 0..4 {
        assert_eq!(server.next_line(), " [.] fib(30)");
    }
    peer.wait_for_messages(&queue, 4);
    assert_eq!(server.new_lines(), [""; 0]);
}
