//! Promise: every wait ends. A call ends at its deadline in every phase, and its error names the
//! phase.
//!
//! `cargo test -p rpc-tests -- every_wait_ends --nocapture` prints how long each call took.

use crate::support::broker::{exclusive_node, private_node};
use crate::support::peer::{Peer, Queue};
use crate::support::programs::{assert_output, client, Program};
use crate::support::proxy::{
    Proxy, Traffic, BASIC_CONSUME, CHANNEL_OPEN, CONNECTION_START_OK, QUEUE_DECLARE,
};
use crate::support::scripted_broker::{Action, ScriptedBroker, CONSUME};
use crate::tls::listeners;
use socket2::{Domain, Socket, Type};
use std::io::Write;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

/// How much later than its deadline a call may end on a loaded machine.
const TOLERANCE: Duration = Duration::from_secs(9);

/// The timeout of a call in seconds, if a loaded broker needs time for the phases before the tested
/// one.
const LONG_TIMEOUT: u64 = 4;

/// Makes a call that ends at its deadline, after `seconds`, and checks the exit code and all of the
/// output.
#[track_caller]
fn assert_call_ends(
    seconds: u64,
    situation: &str,
    call: &mut assert_cmd::Command,
    code: i32,
    message: &str,
) {
    let limit = format!("{seconds}s");
    let message = format!("rpc-client: {message}");
    let start = Instant::now();
    assert_output(
        call.args(["-q", "-t", &limit, "30"]),
        code,
        "",
        &format!("{message}\n"),
    );
    let took = start.elapsed();
    eprintln!(
        "| {situation} | {seconds} s | {:.3} s | {code} | {message} |",
        took.as_secs_f64()
    );
    let limit = Duration::from_secs(seconds);
    assert!(
        took >= limit && took < limit + TOLERANCE,
        "{situation} took {took:?}"
    );
}

fn call_at(url: &str) -> assert_cmd::Command {
    let mut call = client("any", &[]);
    call.env("AMQP_URL", url);
    call
}

/// Builds a library whose code replaces functions of the C library, by `LD_PRELOAD`.
fn library(name: &str, code: &str) -> PathBuf {
    let source = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let library = source.with_extension("so");
    std::fs::write(&source, code).expect("the folder is writable");
    let mut cc = Command::new("cc");
    let built = cc
        .args(["-w", "-shared", "-fPIC", "-o"])
        .arg(&library)
        .arg(&source)
        .status();
    assert!(built
        .expect("cc is installed: rustc links with it")
        .success());
    library
}

#[test]
fn a_call_ends_when_the_name_server_does_not_answer() {
    let library = library(
        "resolver.c",
        "int pause(void); int getaddrinfo(void) { for (;;) pause(); }",
    );
    let message = "rabbit.invalid:5672 timed out after 1s while resolving the host name";
    let mut call = call_at("amqp://rabbit.invalid");
    assert_call_ends(
        1,
        "a name server that does not answer",
        call.env("LD_PRELOAD", library),
        3,
        message,
    );
}

/// Each host name has two addresses: 127.0.0.2, then 127.0.0.1.
const TWO_ADDRESSES: &str = r"
    #include <netdb.h>
    #include <netinet/in.h>
    static struct sockaddr_in address[2];
    static struct addrinfo info[2];
    int getaddrinfo(const char *host, const char *port, const struct addrinfo *hints, struct addrinfo **found) {
        for (int i = 0; i < 2; i++) {
            address[i].sin_family = info[i].ai_family = AF_INET;
            address[i].sin_addr.s_addr = htonl(0x7f000002 - i);
            info[i].ai_socktype = SOCK_STREAM;
            info[i].ai_addr = (struct sockaddr *) &address[i];
            info[i].ai_addrlen = sizeof address[i];
        }
        info[0].ai_next = &info[1];
        *found = info;
        return 0;
    }
    void freeaddrinfo(struct addrinfo *info) {}";

/// The first address accepts connections and sends nothing, like a frozen broker.
#[test]
fn a_frozen_address_leaves_time_for_the_next_address_of_its_host_name() {
    let library = library("two_addresses.c", TWO_ADDRESSES);
    let queue = Queue::named("two_addresses");
    let _server = Program::start_server_at(private_node().url(), &queue, &[]);
    let plain = private_node().port();
    let tls = listeners().good;
    for (url, port) in [
        (format!("amqp://two.example:{plain}"), plain),
        (format!("amqps://localhost:{tls}"), tls),
    ] {
        let _frozen =
            TcpListener::bind(("127.0.0.2", port)).expect("the node listens at 127.0.0.1");
        let mut call = client(&queue, &["-t", "10s", "--url", &url, "30"]);
        if port == tls {
            call.args(["--ca-file", &listeners().ca]);
        }
        assert_output(call.env("LD_PRELOAD", &library), 0, "832040\n", "");
    }
}

/// A refusal is not hidden by what happens at the next address.
#[test]
fn a_refusal_by_one_address_of_a_host_name_is_reported_at_once() {
    let library = library("refusing_address.c", TWO_ADDRESSES);
    let silent = TcpListener::bind("127.0.0.1:0").expect("a port is free");
    let port = silent.local_addr().expect("the socket is bound").port();
    let broker = Proxy::start_at(("127.0.0.2", port), private_node().authority());
    let url = format!("amqp://nobody:wrong@two.example:{port}");
    let error =
        format!("rpc-client: two.example:{port} refused user 'nobody': is the password right?\n");
    let mut call = client("any", &["30"]);
    assert_output(
        call.env("AMQP_URL", &url).env("LD_PRELOAD", &library),
        3,
        "",
        &error,
    );
    drop(broker);
}

/// The kernel drops connection requests to a listener whose backlog is full.
#[test]
fn a_call_ends_when_the_host_drops_packets() {
    let listener = Socket::new(Domain::IPV4, Type::STREAM, None).expect("the system has sockets");
    listener
        .bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into())
        .expect("a port is free");
    listener.listen(0).expect("the socket is bound");
    let address = listener
        .local_addr()
        .ok()
        .and_then(|address| address.as_socket());
    let address = address.expect("the socket has an IP address");
    let fill = || TcpStream::connect_timeout(&address, Duration::from_millis(200));
    let _full = std::iter::from_fn(|| fill().ok())
        .take(10)
        .collect::<Vec<_>>();
    assert!(fill().is_err(), "the backlog is not full");
    let message = format!("{address} timed out after 1s while opening the TCP connection");
    assert_call_ends(
        1,
        "a host that drops packets",
        &mut call_at(&format!("amqp://{address}")),
        3,
        &message,
    );
}

/// Listens on a port, and sends `bytes` to each connection, one every 100 ms.
fn listen_and_send_slowly(bytes: &'static [u8]) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port is free");
    let address = listener.local_addr().expect("the socket is bound");
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            for byte in bytes.chunks(1) {
                let _ = stream.write_all(byte); // fails if the client has closed the connection
                thread::sleep(Duration::from_millis(100));
            }
            thread::park();
        }
    });
    address
}

#[test]
fn a_call_ends_when_the_port_accepts_and_sends_nothing() {
    for (scheme, phase) in [("amqp", "AMQP"), ("amqps", "TLS")] {
        let address = listen_and_send_slowly(b"");
        let message =
            format!("{address} timed out after 1s while waiting for the {phase} handshake");
        let situation = format!("a port that sends nothing, {scheme}");
        assert_call_ends(
            1,
            &situation,
            &mut call_at(&format!("{scheme}://{address}")),
            3,
            &message,
        );
    }
}

/// The bytes begin a long `connection.start`, and a server hello of TLS.
#[test]
fn a_call_ends_when_the_peer_sends_byte_by_byte() {
    for (scheme, phase, bytes) in [
        (
            "amqp",
            "AMQP",
            &[1, 0, 0, 0, 0, 1, 0, 0, 10, 0, 10, 0, 9, 0, 0, 0, 200][..],
        ),
        (
            "amqps",
            "TLS",
            &[22, 3, 3, 0, 122, 2, 0, 0, 118, 3, 3, 0, 0, 0, 0, 0, 0],
        ),
    ] {
        let address = listen_and_send_slowly(bytes);
        let message =
            format!("{address} timed out after 1s while waiting for the {phase} handshake");
        let situation = format!("a peer that sends byte by byte, {scheme}");
        assert_call_ends(
            1,
            &situation,
            &mut call_at(&format!("{scheme}://{address}")),
            3,
            &message,
        );
    }
}

/// SIGSTOP stops the process of the broker just before it receives a method.
#[test]
fn a_call_ends_when_the_broker_freezes_in_any_phase() {
    let broker = exclusive_node();
    let queue = "frozen";
    Peer::connect_to(broker.url()).declare_default(queue);
    for (scheme, phase) in [("amqp", "AMQP"), ("amqps", "TLS")] {
        let (freeze, _thaw) = broker.freezer();
        freeze();
        let target = broker.authority();
        let message =
            format!("{target} timed out after 1s while waiting for the {phase} handshake");
        let situation = format!("SIGSTOP before the {phase} handshake");
        assert_call_ends(
            1,
            &situation,
            &mut call_at(&format!("{scheme}://{target}")),
            3,
            &message,
        );
    }
    for (method, times, phase, code) in [
        (CONNECTION_START_OK, 1, "logging in", 3),
        (CHANNEL_OPEN, 1, "opening a channel", 3),
        (QUEUE_DECLARE, 1, "starting a consumer", 5),
        (BASIC_CONSUME, 1, "starting a consumer", 5),
        (CHANNEL_OPEN, 2, "looking at the queue", 5),
    ] {
        let (freeze, _thaw) = broker.freezer();
        let proxy = Proxy::start_to(broker.authority());
        proxy.before_forwarding(method, times, freeze);
        let target = proxy.authority();
        let message = match code {
            3 => format!("{target} timed out after {LONG_TIMEOUT}s while {phase}"),
            _ => {
                format!("fib(30): no answer from '{queue}' on {target} within {LONG_TIMEOUT}s: timed out while {phase}")
            }
        };
        let mut call = client(queue, &["--heartbeat", "600"]);
        call.env("AMQP_URL", format!("amqp://{target}"));
        assert_call_ends(
            LONG_TIMEOUT,
            &format!("SIGSTOP in {phase}"),
            &mut call,
            code,
            &message,
        );
    }
}

/// Starting the consumer takes 12 s each time. The client gives the broker 10 s, and then 20 s on
/// another connection.
#[test]
fn a_broker_that_is_slow_to_start_the_consumer_is_given_up_and_gets_more_time() {
    let queue = Queue::declare("slow_start");
    let _server = Program::start_server(&queue, &[]);
    let proxy = Proxy::start();
    let delay = || thread::sleep(Duration::from_secs(12));
    proxy.before_forwarding(BASIC_CONSUME, 1, delay);
    let start = Instant::now();
    let args = [
        "--queue",
        &queue,
        "-v",
        "-t",
        "1m",
        "--heartbeat",
        "600",
        "30",
    ];
    let client = Program::spawn_at(&proxy.url(), "rpc-client", &args);
    let given_up = client.wait_for_log("connecting again");
    assert_eq!(
        given_up,
        format!(
            "rpc-client: {} no longer answers: connecting again",
            proxy.authority()
        )
    );
    assert!(
        start.elapsed() >= Duration::from_secs(10),
        "{:?}",
        start.elapsed()
    );
    proxy.before_forwarding(BASIC_CONSUME, 1, delay);
    let (answers, log) = client.remaining_output();
    assert_eq!(
        (client.wait_for_exit_code(), answers),
        (Some(0), vec!["832040".to_owned()]),
        "{log:#?}"
    );
    assert!(
        !log.iter().any(|line| line.contains("connecting again")),
        "{log:#?}"
    );
    assert!(
        start.elapsed() >= Duration::from_secs(22),
        "{:?}",
        start.elapsed()
    );
}

#[test]
fn a_call_ends_when_the_connection_freezes_while_it_waits() {
    let queue = Queue::declare("frozen_call");
    let mut peer = Peer::connect();
    let proxy = Proxy::start();
    let args = ["--queue", &queue, "-t", "5s", "--heartbeat", "600", "30"];
    let client = Program::spawn_at(&proxy.url(), "rpc-client", &args);
    let start = Instant::now();
    peer.wait_for_messages(&queue, 1);
    proxy.set_traffic(Traffic::Frozen);
    assert_eq!(client.wait_for_exit_code(), Some(5));
    assert!(
        start.elapsed() < Duration::from_secs(30),
        "it took {:?}",
        start.elapsed()
    );
}

#[test]
fn a_call_ends_when_the_broker_blocks_publishers() {
    let broker = exclusive_node();
    let queue = "blocked";
    let _server = Program::start_server_at(broker.url(), queue, &[]);
    let blocked = broker.block_publishers();
    let mut call = client(queue, &[]);
    let message = format!(
        "fib(30): no answer from '{queue}' on {} within {LONG_TIMEOUT}s: the broker blocks publishers: low on memory",
        broker.authority()
    );
    assert_call_ends(
        LONG_TIMEOUT,
        "a memory alarm",
        call.env("AMQP_URL", broker.url()),
        5,
        &message,
    );

    let client = Program::spawn_at(
        broker.url(),
        "rpc-client",
        &["--queue", queue, "-t", "1h", "30"],
    );
    let warning = client.wait_for_log("blocks publishers");
    let expected = format!(
        "rpc-client: warning: {} blocks publishers: low on memory; waiting",
        broker.authority()
    );
    assert_eq!(warning, expected);
    drop(blocked);
    assert_eq!(client.next_line(), "832040");
    assert_eq!(client.wait_for_exit_code(), Some(0));
}

/// A look at the queue takes three round trips of 0.4 s, and the calls expire meanwhile. None of
/// them costs the connection.
#[test]
fn a_slow_look_at_the_queue_does_not_end_the_connection() {
    let queue = Queue::declare("slow_look");
    let proxy = Proxy::start();
    proxy.set_traffic(Traffic::Delayed(Duration::from_millis(200)));
    let args = ["--queue", &queue, "-v", "-t", "5s", "-j", "2", "-"];
    let mut client = Program::spawn_at(&proxy.url(), "rpc-client", &args);
    for n in 0..6 {
        client.write_line(&n.to_string());
    }
    client.close_stdin();
    assert_eq!(client.wait().code(), Some(5));
    let (_, log) = client.remaining_output();
    assert_eq!(
        log.iter()
            .filter(|line| line.contains("connected to"))
            .count(),
        1,
        "{log:#?}"
    );
    assert!(
        log.iter()
            .any(|line| line.contains("no server is consuming")),
        "{log:#?}"
    );
}

/// The broker allows the channel of the calls only, so that the queue cannot be looked at.
#[test]
fn a_long_call_is_answered_where_the_broker_allows_one_channel() {
    let broker = exclusive_node();
    let queue = "one_channel";
    let server = Program::start_server_at(broker.url(), queue, &["--delay", "3s"]);
    let one_channel = broker.set_variable("channel_max", "1");
    let mut call = client(queue, &["-q", "30"]);
    call.env("AMQP_URL", broker.url())
        .assert()
        .code(0)
        .stdout("832040\n")
        .stderr("");
    drop(one_channel);
    assert_eq!(server.stop(), [" [.] fib(30)"]);
}

/// The consumer is cancelled just before the deadline, and the broker sends nothing more: closing
/// the session must not exceed the deadline by much.
#[test]
fn a_silent_broker_does_not_delay_a_client_that_ends_its_session() {
    let broker = ScriptedBroker::start(CONSUME, Action::CancelThenSilence);
    let mut call = client("q", &["-q", "-t", "500ms", "30"]);
    let start = Instant::now();
    call.env("AMQP_URL", &broker.url)
        .assert()
        .code(5)
        .stdout("");
    let took = start.elapsed();
    eprintln!(
        "a silent broker at the end of a session: 0.5 s, took {:.3} s",
        took.as_secs_f64()
    );
    assert!(took < Duration::from_secs(10), "{took:?}");
}

/// Each connection ends a moment after the consumer was started: the error says so, and not that
/// there is no server.
#[test]
fn the_cause_is_that_of_the_latest_connection_though_there_is_a_new_one() {
    let moment = Duration::from_millis(300);
    let broker = ScriptedBroker::start(CONSUME, Action::CloseSocketAfter(moment));
    let authority = broker.url.trim_start_matches("amqp://");
    let cause = format!("{authority} was disconnected: ");
    let error =
        format!("rpc-client: fib(30): no answer from 'q' on {authority} within 6s: {cause}");
    // At these deadlines the client is connected, or waits before it connects again.
    let calls = [(); 8].map(|()| {
        let mut call = client("q", &["-q", "-t", "6s", "30"]);
        call.env("AMQP_URL", &broker.url);
        thread::spawn(move || call.output().expect("the client runs"))
    });
    for call in calls {
        let output = call.join().expect("the client runs");
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!((output.status.code(), output.stdout), (Some(5), Vec::new()));
        assert!(stderr.starts_with(&error), "{stderr}");
    }
}
