//! Every call ends at its deadline, in whatever phase it is stuck, and says so.
//!
//! `cargo test -p rpc-tests -- deadlines --nocapture` prints what each took.

use crate::messages::assert_on_page;
use crate::support::broker::exclusive_node;
use crate::support::broker_features::broker_version_at;
use crate::support::peer::Peer;
use crate::support::programs::{assert_output, client, Program};
use crate::support::proxy::{
    Proxy, BASIC_CONSUME, CHANNEL_OPEN, CONNECTION_START_OK, QUEUE_DECLARE,
};
use socket2::{Domain, Socket, Type};
use std::io::Write;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

/// What a loaded machine may take longer than it was given.
const GENEROUS: Duration = Duration::from_secs(9);

/// The limit of a call whose other phases a loaded broker needs time for, in seconds.
const UNHURRIED: u64 = 4;

/// Makes a call that ends at its deadline, in so many seconds, and checks all that its user sees.
#[track_caller]
fn ends(seconds: u64, situation: &str, call: &mut assert_cmd::Command, code: i32, message: &str) {
    let (limit, message) = (format!("{seconds}s"), format!("rpc-client: {message}"));
    let begun = Instant::now();
    assert_output(call.args(["-q", "-t", &limit, "30"]), code, "\n", &format!("{message}\n"));
    let took = begun.elapsed();
    assert_on_page(&message.replace(&format!("within {limit}:"), "within 1s:"));
    eprintln!("| {situation} | {seconds} s | {:.3} s | {code} | {message} |", took.as_secs_f64());
    let limit = Duration::from_secs(seconds);
    assert!(took >= limit && took < limit + GENEROUS, "{situation} took {took:?}");
}

fn at(url: &str) -> assert_cmd::Command {
    let mut call = client("any", &[]);
    call.env("AMQP_URL", url);
    call
}

/// The C library's resolver is replaced by one that never returns, as when no name server answers.
#[test]
fn a_name_server_that_says_nothing() {
    let source = Path::new(env!("CARGO_TARGET_TMPDIR")).join("resolver.c");
    let library = source.with_extension("so");
    let code = "int pause(void); int getaddrinfo(void) { for (;;) pause(); }";
    std::fs::write(&source, code).expect("there is room for it");
    let mut cc = Command::new("cc");
    let built = cc.args(["-w", "-shared", "-fPIC", "-o"]).arg(&library).arg(&source).status();
    assert!(built.expect("cc is there: rustc links with it").success());
    let message =
        "rabbit.invalid:5672 was not ready within 1s: timed out in resolving the host name";
    let mut call = at("amqp://rabbit.invalid");
    ends(1, "a name server that says nothing", call.env("LD_PRELOAD", library), 3, message);
}

/// A listener whose backlog is full: the kernel drops what else would connect.
#[test]
fn a_host_that_drops_packets() {
    let listener = Socket::new(Domain::IPV4, Type::STREAM, None).expect("there are sockets");
    listener.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into()).expect("there are ports");
    listener.listen(0).expect("it is bound");
    let address = listener.local_addr().ok().and_then(|address| address.as_socket());
    let address = address.expect("it is bound to an IP address");
    let fill = || TcpStream::connect_timeout(&address, Duration::from_millis(200));
    let _full = std::iter::from_fn(|| fill().ok()).take(10).collect::<Vec<_>>();
    assert!(fill().is_err(), "the backlog takes more than it should");
    let message =
        format!("{address} was not ready within 1s: timed out in opening the TCP connection");
    ends(1, "a host that drops packets", &mut at(&format!("amqp://{address}")), 3, &message);
}

/// A port that accepts, and then a peer that says `bytes`, one every 100 ms.
fn dripping(bytes: &'static [u8]) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("there are ports");
    let address = listener.local_addr().expect("it is bound");
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            for byte in bytes.chunks(1) {
                let _ = stream.write_all(byte); // the other end may have had enough
                thread::sleep(Duration::from_millis(100));
            }
            thread::park();
        }
    });
    address
}

#[test]
fn a_port_that_accepts_and_says_nothing() {
    for (scheme, phase) in [("amqp", "AMQP"), ("amqps", "TLS")] {
        let address = dripping(b"");
        let message =
            format!("{address} was not ready within 1s: timed out in the {phase} handshake");
        let situation = format!("a port that says nothing, {scheme}");
        ends(1, &situation, &mut at(&format!("{scheme}://{address}")), 3, &message);
    }
}

/// The first bytes of a long connection.start, and of a TLS server's hello.
#[test]
fn a_peer_that_drips() {
    for (scheme, phase, bytes) in [
        ("amqp", "AMQP", &[1, 0, 0, 0, 0, 1, 0, 0, 10, 0, 10, 0, 9, 0, 0, 0, 200][..]),
        ("amqps", "TLS", &[22, 3, 3, 0, 122, 2, 0, 0, 118, 3, 3, 0, 0, 0, 0, 0, 0]),
    ] {
        let address = dripping(bytes);
        let message =
            format!("{address} was not ready within 1s: timed out in the {phase} handshake");
        let situation = format!("a peer that drips, {scheme}");
        ends(1, &situation, &mut at(&format!("{scheme}://{address}")), 3, &message);
    }
}

/// The broker's process is stopped by SIGSTOP, just before it would see what it is asked.
#[test]
fn a_broker_that_freezes_in_each_phase() {
    let broker = exclusive_node();
    let queue = "frozen";
    Peer::connect_to(broker.url()).declare_default(queue);
    for (scheme, phase) in [("amqp", "AMQP"), ("amqps", "TLS")] {
        let (freeze, _thaw) = broker.freezer();
        freeze();
        let target = broker.authority();
        let message =
            format!("{target} was not ready within 1s: timed out in the {phase} handshake");
        let situation = format!("SIGSTOP before the {phase} handshake");
        ends(1, &situation, &mut at(&format!("{scheme}://{target}")), 3, &message);
    }
    for (method, times, phase, code) in [
        (CONNECTION_START_OK, 1, "the login: is the password right?", 3),
        (CHANNEL_OPEN, 1, "opening a channel", 3),
        (QUEUE_DECLARE, 1, "starting a consumer", 5),
        (BASIC_CONSUME, 1, "starting a consumer", 5),
        (CHANNEL_OPEN, 2, "looking at a queue", 5),
    ] {
        let (freeze, _thaw) = broker.freezer();
        let proxy = Proxy::start_to(broker.authority());
        proxy.before_forwarding(method, times, freeze);
        let target = proxy.authority();
        let message = match code {
            3 => format!("{target} was not ready within {UNHURRIED}s: timed out in {phase}"),
            _ => format!(
                "fib(30): no answer from '{queue}' on {target} within {UNHURRIED}s: timed out in {phase}"
            ),
        };
        let mut call = client(queue, &["--heartbeat", "600"]);
        call.env("AMQP_URL", format!("amqp://{target}"));
        ends(UNHURRIED, &format!("SIGSTOP in {phase}"), &mut call, code, &message);
    }
}

#[test]
fn a_broker_that_blocks_publishers() {
    let broker = exclusive_node();
    let queue = "blocked";
    let _server = Program::start_server_at(broker.url(), queue, &[]);
    let blocked = broker.block_publishers();
    let mut call = client(queue, &[]);
    let message = format!(
        "fib(30): no answer from '{queue}' on {} within {UNHURRIED}s: the broker takes no requests: low on memory",
        broker.authority()
    );
    ends(UNHURRIED, "a memory alarm", call.env("AMQP_URL", broker.url()), 5, &message);

    let waits =
        Program::spawn_at(broker.url(), "rpc-client", &["--queue", queue, "-t", "1h", "30"]);
    let warning = waits.wait_for_log("takes no requests");
    let expected = format!(
        "rpc-client: warning: {} takes no requests: low on memory; waiting",
        broker.authority()
    );
    assert_eq!(warning, expected);
    drop(blocked);
    assert_eq!(waits.next_line(), "832040");
    assert_eq!(waits.wait_for_exit_code(), Some(0));
}

/// RabbitMQ waits no longer than its `consumer_timeout` for an acknowledgement, and delivers the request again. Up to 4.2
/// it closes the channel, and the server answers that by what it has computed. From 4.3 on it cancels the consumer of a
/// quorum queue, which the server takes for a deleted queue; a classic queue waits for ever.
#[test]
fn a_server_that_takes_too_long_for_the_broker_goes_on() {
    let broker = exclusive_node();
    let _ticks = broker.set_variable("channel_tick_interval", "500");
    let _patience = broker.set_variable("consumer_timeout", "500");
    let closes_channel = broker_version_at(broker.url()) < (4, 3);
    for queue_type in ["classic", "quorum"] {
        let queue = format!("too_long.{queue_type}");
        let args = ["--queue-type", queue_type, "--delay", "5s"];
        let server = Program::start_server_at(broker.url(), &queue, &args);
        let waits = Program::spawn_at(broker.url(), "rpc-client", &["--queue", &queue, "-q", "30"]);
        let cancels = !closes_channel && queue_type == "quorum";
        if closes_channel {
            server.wait_for_log("PRECONDITION_FAILED - delivery acknowledgement on channel");
        } else if cancels {
            server.wait_for_log(&format!("queue '{queue}' was deleted"));
        }
        assert_eq!(waits.next_line(), "832040");
        assert_eq!(waits.wait_for_exit_code(), Some(0));
        if !cancels {
            assert_eq!(server.stop(), [" [.] fib(30)"], "it was computed once");
        }
    }
}

#[test]
fn a_reply_queue_that_is_deleted_is_set_up_anew() {
    let broker = exclusive_node();
    let queue = "deleted";
    let server = Peer::connect_to(broker.url());
    server.declare_default(queue);
    let args = ["--queue", queue, "-v", "-t", "1h", "30"];
    let waits = Program::spawn_at(broker.url(), "rpc-client", &args);
    let request = server.take(queue);
    let reply_queue = request.properties.reply_to().as_deref().expect("ours set it");
    broker.rabbitmqctl(&["delete_queue", reply_queue]);
    waits.wait_for_log("the reply queue was deleted");
    server.reply(&server.take(queue), b"832040");
    assert_eq!(waits.next_line(), "832040");
    assert_eq!(waits.wait_for_exit_code(), Some(0));
}
