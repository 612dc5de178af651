//! Promise: nothing runs for a caller whose deadline has passed.

use crate::support::broker;
use crate::support::peer::{call, Peer, Queue};
use crate::support::programs::{assert_output, client, Program};
use amiquip::{AmqpProperties, AmqpValue, FieldTable};
use rpc_common::message::unix_time_ms;
use std::thread;
use std::time::{Duration, SystemTime};

#[test]
fn a_call_without_an_answer_is_exit_code_5_and_its_request_leaves_the_queue() {
    let queue = Queue::declare("no_answer");
    let error = format!(
        "rpc-client: fib(30): no answer from '{}' on {} within 5s: \
         no server is consuming, 1 message is waiting\n",
        &*queue,
        broker::authority()
    );
    assert_output(
        &mut client(&queue, &["-q", "-t", "5s", "30"]),
        5,
        "",
        &error,
    );
    Peer::connect().wait_for_messages(&queue, 0);
}

/// The second request waits in the prefetch of the server for longer than its caller does.
#[test]
fn a_server_does_not_run_a_prefetched_request_that_has_expired() {
    let queue = Queue::named("expired");
    let server = Program::start_server(&queue, &["--prefetch", "2", "--delay", "6s"]);
    client(&queue, &["-q", "-t", "3s", "1", "2"])
        .assert()
        .code(5);
    server.wait_for_log("answered with the error expired: expired: ");
    assert_eq!(server.stop(), [" [.] fib(1)"]);
    assert_eq!(Peer::connect().message_count(&queue), Some(0));
}

#[test]
fn a_request_past_its_deadline_is_answered_with_expired() {
    let queue = Queue::named("past_deadline");
    let server = Program::start_server(&queue, &[]);
    let hour = Duration::from_secs(3600);
    let request = |deadline: SystemTime| {
        let deadline = AmqpValue::LongLongInt(unix_time_ms(deadline));
        let headers = FieldTable::from([("x-deadline-ms".into(), deadline)]);
        call(
            &queue,
            b"30",
            AmqpProperties::default().with_headers(headers),
        )
    };
    let reply = request(SystemTime::now() - hour);
    let code = AmqpValue::LongString("expired".into());
    assert_eq!(
        reply
            .properties
            .headers()
            .as_ref()
            .and_then(|headers| headers.get("x-error-code")),
        Some(&code)
    );
    let text = String::from_utf8_lossy(&reply.body);
    assert!(
        text.starts_with("expired: 1h ")
            && text.ends_with(" after the deadline, by the server's clock"),
        "{text}"
    );
    assert_eq!(request(SystemTime::now() + hour).body, b"832040");
    // Without the header a request expires in the queue only.
    assert_eq!(
        call(
            &queue,
            b"7",
            AmqpProperties::default().with_expiration("5000".into())
        )
        .body,
        b"13"
    );
    assert_eq!(server.stop(), [" [.] fib(30)", " [.] fib(7)"]);
}

/// Only a clock that is ahead of the client's makes a server answer that before the deadline.
#[test]
fn a_client_whose_request_expires_too_early_says_that_the_clocks_differ() {
    let queue = Queue::declare("clocks");
    let mut call = client(&queue, &["-q", "-t", "1h", "30"]);
    let caller = thread::spawn(move || call.assert().code(1).get_output().clone());
    let peer = Peer::connect();
    let request = peer.take(&queue);
    let properties = AmqpProperties::default()
        .with_type_("error".into())
        .with_correlation_id(
            request
                .properties
                .correlation_id()
                .clone()
                .expect("it is set"),
        )
        .with_headers(FieldTable::from([(
            "x-error-code".into(),
            AmqpValue::LongString("expired".into()),
        )]));
    let reply_to = request.properties.reply_to().clone().expect("it is set");
    peer.publish(&reply_to, b"expired: 5s late", properties);
    let output = caller.join().expect("the call ends");
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    let start = "rpc-client: fib(30): expired: 5s late: the server's clock is at least 59m ";
    assert!(
        stderr.starts_with(start) && stderr.ends_with(" ahead of this machine's\n"),
        "{stderr}"
    );
}

/// A server whose clock is an hour ahead: its request gets a deadline that is an hour earlier.
#[test]
fn the_difference_of_the_clocks_is_one_number() {
    let queue = Queue::declare("clocks_ahead");
    let other_queue = Queue::named("clocks_served");
    let server = Program::start_server(&other_queue, &[]);
    let mut call = client(&queue, &["-q", "-t", "2m", "30"]);
    let caller = thread::spawn(move || call.assert().code(1).stdout("").get_output().clone());
    let peer = Peer::connect();
    let request = peer.take(&queue);
    let properties = request.properties;
    let mut headers = properties.headers().clone().expect("it has a deadline");
    let Some(AmqpValue::LongString(deadline)) = headers.get("x-deadline-ms") else {
        panic!("no deadline: {headers:?}");
    };
    let deadline: i64 = deadline.parse().expect("it is a number of milliseconds");
    let earlier = AmqpValue::LongString((deadline - 3_600_000).to_string());
    headers.insert("x-deadline-ms".into(), earlier);
    peer.publish(
        &other_queue,
        &request.body,
        properties.with_headers(headers),
    );
    let output = caller.join().expect("the call ends");
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    let (message, difference) = stderr
        .split_once(" after the deadline, by the server's clock: ")
        .expect("it says how late the request was");
    assert!(
        message.starts_with("rpc-client: fib(30): expired: 5"),
        "{stderr}"
    );
    // The time that the reply took is missing.
    let is_hour = ["the server's clock is 1h ", "the server's clock is 59m 5"]
        .iter()
        .any(|start| difference.starts_with(start));
    assert!(
        is_hour && difference.ends_with(" ahead of this machine's\n"),
        "{stderr}"
    );
    assert!(server.stop().is_empty(), "nothing ran");
}

/// It means: only if a consumer is ready.
#[test]
fn a_request_with_expiration_0_is_served_by_a_server_that_is_ready() {
    let queue = Queue::named("expiration_0");
    let _server = Program::start_server(&queue, &[]);
    let reply = call(
        &queue,
        b"30",
        AmqpProperties::default().with_expiration("0".into()),
    );
    assert_eq!(reply.body, b"832040");
}
