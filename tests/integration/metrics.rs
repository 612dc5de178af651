//! `--metrics`: what Prometheus reads from a server.

use crate::support::broker::{self, private_node};
use crate::support::eventually;
use crate::support::peer::{Peer, Queue};
use crate::support::programs::{assert_output, client, command, program_folder, Program};
use crate::support::proxy::Proxy;
use crate::support::served::Served;
use assert_cmd::Command;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};
use std::{fs, process};

/// An address of one test: no other process uses it.
fn address(test: u8) -> String {
    let id = process::id();
    format!("127.{}.{}.{}:9394", 100 + test, id >> 8 & 255, id & 255)
}

/// Gets a page: its status line, and its text.
fn get(address: &str, path: &str) -> (String, String) {
    let mut connection = TcpStream::connect(address).expect("the server listens");
    let request = format!("GET {path} HTTP/1.1\r\nHost: {address}\r\n\r\n");
    connection
        .write_all(request.as_bytes())
        .expect("the server reads");
    let mut response = String::new();
    connection
        .read_to_string(&mut response)
        .expect("the server answers, and closes the connection");
    let (head, text) = response.split_once("\r\n\r\n").expect("it has a head");
    (head.lines().next().unwrap_or_default().into(), text.into())
}

/// Waits until the page has these lines.
#[track_caller]
fn wait_for_lines(address: &str, lines: &[&str]) {
    eventually(&format!("{lines:?}"), || {
        let (_, page) = get(address, "/metrics");
        lines
            .iter()
            .all(|line| page.lines().any(|other| other == *line))
            .then_some(())
    });
}

#[test]
fn the_page_shows_what_the_server_does() {
    let queue = Queue::named("metrics");
    let proxy = Proxy::start();
    let address = address(1);
    let file = format!("{}/metrics.{}", env!("CARGO_TARGET_TMPDIR"), process::id());
    let script =
        format!("read -r word; case $word in fail) exit 1;; wait) until [ -e {file} ]; do sleep 0.1; done;; esac");
    let mut server = process::Command::new(program_folder().join("rpc-server"));
    server
        .args(["--queue", &queue, "--", "sh", "-c", &script])
        .env("AMQP_URL", proxy.url());
    let server = Program::spawn_command(server.env("RPC_SERVER_METRICS", &address));
    assert_eq!(server.next_line(), " [x] Awaiting RPC requests");
    let call = |args: &[&str], code| {
        drop(
            client(&queue, &[&["-q"], args].concat())
                .assert()
                .code(code),
        );
    };
    call(&["--data", "x\n"], 0);
    call(&["--data", "fail\n"], 1);
    call(&["--timeout", "1s", "--data", "wait\n"], 5);
    let killed = [
        r#"rpc_server_requests_total{outcome="ok"} 1"#,
        r#"rpc_server_requests_total{outcome="failed"} 1"#,
        r#"rpc_server_requests_total{outcome="time-limit"} 1"#,
        r#"rpc_server_requests_total{outcome="expired"} 0"#,
        "rpc_server_programs_killed_total 1",
        "rpc_server_request_duration_seconds_count 3",
        r#"rpc_server_request_duration_seconds_bucket{le="+Inf"} 3"#,
        "rpc_server_requests_in_flight 0",
        "rpc_server_connected 1",
        "rpc_server_consuming_workers 1",
        "rpc_server_reconnects_total 0",
    ];
    wait_for_lines(&address, &killed);
    let waiting = Program::spawn(
        "rpc-client",
        &[
            "--queue",
            &queue,
            "-q",
            "--timeout",
            "1h",
            "--data",
            "wait\n",
        ],
    );
    wait_for_lines(&address, &["rpc_server_requests_in_flight 1"]);
    fs::write(&file, "").expect("the folder is writable");
    assert_eq!(waiting.wait_for_exit_code(), Some(0));
    proxy.refuse(true);
    proxy.close_connections();
    wait_for_lines(
        &address,
        &[
            "rpc_server_connected 0",
            "rpc_server_consuming_workers 0",
            "rpc_server_requests_in_flight 0",
            "rpc_server_reconnects_total 1",
        ],
    );
    proxy.refuse(false);
    wait_for_lines(
        &address,
        &["rpc_server_connected 1", "rpc_server_reconnects_total 1"],
    );
    fs::remove_file(&file).expect("it exists");
    server.stop();
}

#[test]
fn promtool_accepts_the_page() {
    let queue = Queue::named("metrics_check");
    let address = address(2);
    let server = Program::start_server(&queue, &["--metrics", &address]);
    assert_output(&mut client(&queue, &["30"]), 0, "832040\n", "");
    let (status, page) = get(&address, "/metrics");
    assert_eq!(status, "HTTP/1.1 200 OK");
    let mut check = Command::new("promtool"); // of Debian's prometheus: tests/setup.sh peers
    assert_output(
        check.args(["check", "metrics"]).write_stdin(page),
        0,
        "",
        "",
    );
    assert_eq!(get(&address, "/metrics?name=x").0, "HTTP/1.1 200 OK");
    assert_page(
        &address,
        "/",
        NOT_FOUND,
        "the pages are /metrics, /ready and /live\n",
    );
    server.stop();
}

const OK: &str = "HTTP/1.1 200 OK";
const NOT_FOUND: &str = "HTTP/1.1 404 Not Found";
const UNAVAILABLE: &str = "HTTP/1.1 503 Service Unavailable";

#[track_caller]
fn assert_page(address: &str, path: &str, status: &str, text: &str) {
    assert_eq!(get(address, path), (status.into(), text.into()), "{path}");
}

/// The broker is away at first; later it is there, but refuses the consumers.
#[test]
fn a_server_is_ready_while_a_worker_consumes() {
    let node = private_node();
    let user = "probed";
    node.add_user(user, "page");
    let queue = Queue::named("metrics_probes");
    let address = address(5);
    let proxy = Proxy::start_to(node.authority());
    proxy.refuse(true);
    let args = ["--queue", &queue, "--workers", "2", "--metrics", &address];
    let url = format!("amqp://{user}:page@{}", proxy.authority());
    let server = Program::spawn_at(&url, "rpc-server", &args);
    server.wait_for_log("retrying");
    let assert_not_ready = || {
        wait_for_lines(
            &address,
            &["rpc_server_connected 0", "rpc_server_consuming_workers 0"],
        );
        assert_page(&address, "/ready", UNAVAILABLE, "no worker consumes\n");
        assert_page(&address, "/live", OK, "live\n");
    };
    assert_not_ready();
    proxy.refuse(false);
    assert_eq!(server.next_line(), " [x] Awaiting RPC requests");
    wait_for_lines(
        &address,
        &["rpc_server_connected 1", "rpc_server_consuming_workers 2"],
    );
    assert_page(&address, "/ready?verbose=1", OK, "ready\n");
    assert_page(&address, "/live", OK, "live\n");
    node.rabbitmqctl(&["set_permissions", user, "^$", ".*", "^$"]);
    Peer::connect_to(node.url()).delete_queue(&queue);
    assert_not_ready();
    node.rabbitmqctl(&["set_permissions", user, ".*", ".*", ".*"]);
    wait_for_lines(
        &address,
        &[
            "rpc_server_connected 1",
            "rpc_server_consuming_workers 2",
            "rpc_server_reconnects_total 0",
        ],
    );
    assert_page(&address, "/ready", OK, "ready\n");
    server.stop();
    node.rabbitmqctl(&["delete_user", user]);
}

/// Sixteen threads answer scrapers, each for two seconds at most.
#[test]
fn silent_scrapers_block_no_call_and_no_other_scraper() {
    let queue = Queue::named("metrics_silent");
    let address = address(3);
    let server = Program::start_server(&queue, &["--metrics", &address]);
    let connect = |_| {
        let mut connection = TcpStream::connect(&address).expect("the server listens");
        connection
            .write_all(b"GET /metr")
            .expect("the server reads");
        connection
    };
    let mut silent: Vec<_> = (0..12).map(connect).collect();
    let begun = Instant::now();
    assert_eq!(get(&address, "/metrics").0, "HTTP/1.1 200 OK");
    assert!(begun.elapsed() < Duration::from_secs(10)); // one after the other they take 12 s
    silent.extend((0..30).map(connect)); // more than there are threads
    assert_output(&mut client(&queue, &["30"]), 0, "832040\n", "");
    assert_eq!(get(&address, "/metrics").0, "HTTP/1.1 200 OK");
    drop(silent);
    server.stop();
}

#[test]
fn an_address_that_is_in_use_is_exit_code_2() {
    let address = address(4);
    let _other = TcpListener::bind(&address).expect("the address is free");
    let error = format!("rpc-server: cannot serve metrics on {address}: address already in use\n");
    let mut server = command("rpc-server");
    assert_output(
        server
            .args(["--metrics", &address])
            .env("AMQP_URL", broker::url()),
        2,
        "",
        &error,
    );
}

#[test]
fn the_starts_of_a_persistent_program_are_counted_by_reason() {
    let address = address(9);
    let script = "echo '{\"ready\":true}'; read line; \
        case $line in *fail*) exit 1;; *stray*) echo here; read line;; esac; \
        echo '{\"id\":1,\"result\":\"x\"}'; read line";
    let options = ["--metrics", &address, "--max-requests", "1", "--persistent"];
    let served = Served::start(
        "program_starts",
        &[&options[..], &["--", "sh", "-c", script]].concat(),
    );
    for data in ["fail", "stray", "x"] {
        let _ = served.ask(data.as_bytes());
    }
    wait_for_lines(
        &address,
        &[
            "rpc_server_program_starts_total{reason=\"first\"} 1",
            "rpc_server_program_starts_total{reason=\"exited\"} 1",
            "rpc_server_program_starts_total{reason=\"disagreed\"} 1",
            "rpc_server_program_starts_total{reason=\"max-requests\"} 1",
        ],
    );
}
