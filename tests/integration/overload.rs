//! Promise: overload is reported at once, and a queue that takes no requests is not flooded with
//! them.

use crate::support::broker::{authority, exclusive_node, url};
use crate::support::eventually;
use crate::support::peer::{Peer, Queue};
use crate::support::programs::{assert_output, client, Program};
use amiquip::AmqpProperties;
use serde_json::Value;

#[test]
fn a_full_queue_is_exit_code_4() {
    let peer = Peer::connect();
    for queue_type in ["classic", "quorum"] {
        let queue = Queue::named(&format!("full.{queue_type}"));
        peer.declare_with_max_length(&queue, queue_type, 1);
        // A quorum queue takes a few more than its limit, before it knows of it.
        let full = eventually("a full queue", || {
            peer.publish(&queue, b"30", AmqpProperties::default());
            let call = client(&queue, &["-q", "-t", "300ms", "30"])
                .output()
                .expect("the client runs");
            (call.status.code() == Some(4)).then_some(call)
        });
        let error = format!(
            "rpc-client: queue '{}' on {} is full: nothing ran\n",
            &*queue,
            authority()
        );
        let text = |bytes| String::from_utf8(bytes).expect("it is text");
        assert_eq!(
            (text(full.stdout), text(full.stderr)),
            (String::new(), error.clone())
        );
        let mut call = client(&queue, &["-q", "-t", "1h", "-o", "json", "30"]);
        let output = call.output().expect("the client runs");
        let json: Value = serde_json::from_slice(&output.stdout).expect("it is JSON");
        assert_eq!(
            (output.status.code(), &json["error"]["code"]),
            (Some(4), &"queue-full".into()),
            "{json}"
        );
        assert_eq!(text(output.stderr), error);
    }
}

/// The queue takes nothing at all: it never has a message that a passive declaration would count.
#[test]
fn a_queue_with_maximum_length_0_is_exit_code_4() {
    let queue = Queue::named("max_length_0");
    Peer::connect().declare_with_max_length(&queue, "classic", 0);
    let error = format!(
        "rpc-client: queue '{}' on {} is full: nothing ran\n",
        &*queue,
        authority()
    );
    let mut call = client(&queue, &["-q", "-t", "1h", "30"]);
    assert_output(&mut call, 4, "", &error);
}

/// The process of a queue that dies nacks requests, and the queue has messages: it is not full, and
/// the request is sent again.
#[test]
fn a_queue_whose_process_dies_is_not_full() {
    let broker = exclusive_node();
    let queue = "killed_process";
    let peer = Peer::connect_to(broker.url());
    peer.declare(queue, "classic");
    peer.publish_persistent(queue, b"1");
    broker.kill_queue_at_next_message(queue);
    let args = ["--queue", queue, "-t", "1h", "-v", "30"];
    let call = Program::spawn_at(broker.url(), "rpc-client", &args);
    call.wait_for_log("refused a request: sending again");
    let server = Program::start_server_at(broker.url(), queue, &["-q"]);
    assert_eq!(call.next_line(), "832040");
    let (answers, log) = call.remaining_output();
    let has_reconnected = log.iter().any(|line| line.contains("connected to"));
    assert!(answers.is_empty() && !has_reconnected, "{log:?}");
    assert_eq!(call.wait_for_exit_code(), Some(0));
    server.stop();
    peer.delete_queue(queue);
}

/// Two calls fill the queue, and the other two of four in flight are refused. While the queue is
/// full, one call at a time tries it: nearly all numbers are left to be answered when a server
/// comes.
#[test]
fn a_batch_begins_no_call_while_the_queue_is_full() {
    let queue = Queue::named("batch_full");
    let peer = Peer::connect();
    peer.declare_with_max_length(&queue, "classic", 2);
    let args = [
        "--queue",
        &queue,
        "-v",
        "-t",
        "1h",
        "-o",
        "json",
        "--unordered",
        "-j",
        "4",
        "--repeat",
        "1000",
        "30",
    ];
    let mut client = Program::spawn_at(url(), "rpc-client", &args);
    client.wait_for_log("is full");
    let _server = Program::start_server(&queue, &["-q", "--prefetch", "64"]);
    assert_eq!(client.wait().code(), Some(4));
    let (calls, _) = client.remaining_output();
    let refused = calls
        .iter()
        .filter(|call| call.contains("queue-full"))
        .count();
    let answered = calls.iter().filter(|call| call.contains("832040")).count();
    assert_eq!(refused + answered, 1000);
    assert!((2..100).contains(&refused), "{refused} were refused");
}

/// A queue that is deleted in the middle of a batch: nothing ends, and all is answered when a
/// server has declared it again.
#[test]
fn a_batch_waits_for_a_queue_that_was_deleted() {
    let queue = Queue::declare("batch_deleted");
    let mut peer = Peer::connect();
    let args = ["--queue", &queue, "-v", "-t", "1h", "-j", "8", "-"];
    let mut client = Program::spawn_at(url(), "rpc-client", &args);
    client.write_line("30");
    peer.reply(&peer.take(&queue), b"832040");
    assert_eq!(client.next_line(), "832040");
    peer.delete_queue(&queue);
    for _ in 0..100 {
        client.write_line("7");
    }
    client.close_stdin();
    client.wait_for_log("sending again");
    client.wait_for_log("sending again");
    peer = Peer::connect();
    assert_eq!(peer.message_count(&queue), None);
    let _server = Program::start_server(&queue, &["-q"]);
    assert_eq!(client.wait().code(), Some(0));
    let (answers, _) = client.remaining_output();
    assert_eq!(answers, vec!["13"; 100]);
}

/// A request that the queue had taken is gone with the queue. It is sent again, under the same id,
/// when the queue is back.
#[test]
fn a_request_that_is_lost_with_its_queue_is_sent_again() {
    let queue = Queue::declare("lost_request");
    let mut peer = Peer::connect();
    let args = ["--queue", &queue, "-v", "-t", "1h", "30"];
    let client = Program::spawn_at(url(), "rpc-client", &args);
    peer.wait_for_messages(&queue, 1);
    let lost = peer.take(&queue);
    peer.delete_queue(&queue);
    client.wait_for_log("sending again");
    Peer::connect().declare_default(&queue);
    let again = peer.take(&queue);
    assert_eq!(
        again.properties.correlation_id(),
        lost.properties.correlation_id()
    );
    peer.reply(&again, b"832040");
    assert_eq!(client.next_line(), "832040");
    assert_eq!(client.wait_for_exit_code(), Some(0));
}

/// The user may publish no more when the client connects again. The call had been sent before, and
/// may have run.
#[test]
fn a_permission_that_is_taken_away_after_a_request_was_sent_is_exit_code_5() {
    let broker = exclusive_node();
    broker.add_user("demoted", "demoted");
    let queue = "demoted";
    let mut peer = Peer::connect_to(broker.url());
    peer.declare_default(queue);
    let url = format!("amqp://demoted:demoted@{}", broker.authority());
    let mut call = client(queue, &["-q", "-t", "1h", "30"]);
    let call =
        std::thread::spawn(move || call.env("AMQP_URL", url).output().expect("the client runs"));
    peer.wait_for_messages(queue, 1);
    broker.rabbitmqctl(&["set_permissions", "demoted", "", "", ""]);
    broker.rabbitmqctl(&["close_all_user_connections", "demoted", "test"]);
    let output = call.join().expect("the client runs");
    assert_eq!(
        (
            output.status.code(),
            String::from_utf8_lossy(&output.stdout)
        ),
        (Some(5), "".into())
    );
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        stderr.contains("refused") && stderr.contains("the user lacks this permission"),
        "{stderr}"
    );
    broker.rabbitmqctl(&["delete_user", "demoted"]);
}

/// The requests that were written before the broker said that it blocks publishers are not run
/// either: their deadline has passed when the broker reads them.
#[test]
fn nothing_runs_for_the_calls_that_expired_while_the_broker_blocked_publishers() {
    let broker = exclusive_node();
    let queue = "alarm";
    let server = Program::start_server_at(broker.url(), queue, &[]);
    let blocked = broker.block_publishers();
    let args = ["-v", "-t", "200ms", "-j", "4", "--repeat", "60", "30"];
    let output = client(queue, &args)
        .env("AMQP_URL", broker.url())
        .output()
        .expect("the client runs");
    let log = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(5), "{log}");
    assert_eq!(String::from_utf8_lossy(&output.stdout), "\n".repeat(60));
    let connections = log.matches("connected to").count();
    assert!(
        (1..=5).contains(&connections),
        "{connections} connections: {log}"
    );
    drop(blocked);
    let mut call = client(queue, &["-q", "7"]);
    call.env("AMQP_URL", broker.url())
        .assert()
        .code(0)
        .stdout("13\n")
        .stderr("");
    assert_eq!(server.stop(), [" [.] fib(7)"]);
}
