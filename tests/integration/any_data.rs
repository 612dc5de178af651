//! Requests and replies of any bytes: `--data`, `--lines`, `--content-type` and `--header`.

use crate::support::broker::{self, exclusive_node};
use crate::support::peer::{Peer, Queue};
use crate::support::programs::{assert_output, bash, client, Program};
use crate::support::proxy::{Proxy, BASIC_PUBLISH};
use assert_cmd::Command;
use crossbeam_channel::{bounded, Sender};
use rpc_common::command_line::BrokerOptions;
use rpc_common::message::{Answer, ErrorCode, Failure, Reply, Request};
use rpc_server::{serve, Caller, Config};
use serde_json::{json, Value};
use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};
use std::time::Duration;
use std::{env, fs};

/// A server in this process, which stops when it is dropped.
struct Server {
    running: Option<Sender<Infallible>>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    fn start(queue: &str) -> Self {
        Server::start_at(broker::url(), queue)
    }

    /// Starts to serve [`echo`] on two workers, and waits until it serves.
    fn start_at(url: &str, queue: &str) -> Self {
        let broker = BrokerOptions::from_url(url);
        let config = Config {
            queue: queue.into(),
            broker,
            workers: 2,
            ..Config::default()
        };
        let (running, stop) = bounded(0);
        let (ready_sender, ready) = bounded(1);
        let thread = thread::spawn(move || {
            let on_ready = || ready_sender.send(()).expect("the test waits for it");
            serve(&config, &echo, &stop, &on_ready).expect("it serves until it is stopped");
        });
        ready.recv().expect("it serves");
        Server {
            running: Some(running),
            thread: Some(thread),
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.running = None;
        let _ = self.thread.take().map(JoinHandle::join); // a second panic would hide the first
    }
}

/// Answers with the body and the content type of the request; a few bodies are commands.
fn echo(request: &Request, _: &Caller) -> Reply {
    let content_type = request
        .content_type
        .map(|text| String::from_utf8_lossy(text).into_owned());
    let body = match request.body {
        b"nothing" => Vec::new(),
        b"fail" => {
            return Err(Failure::new(ErrorCode::Failed, "it failed").with_exit_code(3));
        }
        b"headers" => {
            let headers = request
                .text_headers()
                .filter(|(name, _)| !name.starts_with("x-deadline"));
            headers
                .map(|(name, value)| format!("{name}={value};"))
                .collect::<String>()
                .into()
        }
        b"slow" => {
            thread::sleep(Duration::from_secs(3));
            Vec::new()
        }
        body => body.to_vec(),
    };
    let mut answer = Answer::new(body);
    answer.content_type = content_type;
    Ok(answer)
}

/// A file of one test with this content.
fn file(name: &str, content: &[u8]) -> PathBuf {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR"))
        .join(format!("any_data.{name}.{}", std::process::id()));
    fs::write(&path, content).expect("there is room");
    path
}

/// The value of `--data` that names a file.
fn at(path: &Path) -> String {
    format!("@{}", path.display())
}

/// Like `assert_output`, for output of any bytes.
#[track_caller]
fn assert_bytes(command: &mut Command, code: i32, stdout: &[u8], stderr: &str) {
    let output = command
        .assert()
        .code(code)
        .stderr(stderr.to_owned())
        .get_output()
        .clone();
    let start =
        String::from_utf8_lossy(&output.stdout[..output.stdout.len().min(1_000)]).into_owned();
    assert!(
        output.stdout == stdout,
        "{} bytes, not {}: {start:?}",
        output.stdout.len(),
        stdout.len()
    );
}

#[test]
fn all_256_byte_values_go_there_and_back_unchanged() {
    let queue = Queue::named("bytes");
    let _server = Server::start(&queue);
    let bytes: Vec<u8> = (0..=255).collect();
    let path = file("bytes", &bytes);
    assert_bytes(&mut client(&queue, &["--data", &at(&path)]), 0, &bytes, "");
    assert_bytes(
        client(&queue, &["--data", "@-"]).write_stdin(bytes.clone()),
        0,
        &bytes,
        "",
    );
    let script = format!(
        "rpc-client --queue {} --data $'\\xff\\x01' | od -An -tx1",
        &*queue
    );
    bash(&script).code(0).stdout(" ff 01\n").stderr("");
}

#[test]
fn requests_and_replies_may_be_empty() {
    let queue = Queue::named("empty");
    let _server = Server::start(&queue);
    for (data, input) in [("", ""), ("@-", ""), ("@/dev/null", ""), ("nothing", "")] {
        assert_output(
            client(&queue, &["--data", data]).write_stdin(input),
            0,
            "",
            "",
        );
    }
    assert_output(
        &mut client(&queue, &["-o", "text", "--data", ""]),
        0,
        "\n",
        "",
    );
    assert_output(
        &mut client(&queue, &["--data", "", "--data", "nothing"]),
        0,
        "\n\n",
        "",
    );
}

#[test]
fn eight_mebibytes_go_there_and_back() {
    let queue = Queue::named("large");
    let _server = Server::start(&queue);
    let bytes: Vec<u8> = (0..=255).cycle().take(8 << 20).collect();
    let path = file("large", &bytes);
    assert_bytes(&mut client(&queue, &["--data", &at(&path)]), 0, &bytes, "");
    let twice = [&bytes[..], b"\n", &bytes, b"\n"].concat();
    assert_bytes(
        &mut client(&queue, &["--data", &at(&path), "--repeat", "2"]),
        0,
        &twice,
        "",
    );
}

#[test]
fn data_is_text_or_a_file_and_may_begin_with_a_minus() {
    let queue = Queue::named("data");
    let _server = Server::start(&queue);
    assert_output(
        &mut client(&queue, &["--data", "to be or not to be"]),
        0,
        "to be or not to be",
        "",
    );
    assert_output(&mut client(&queue, &["--data", "-x"]), 0, "-x", "");
    assert_output(
        &mut client(&queue, &["--data", "--queue", "--data=-1"]),
        0,
        "--queue\n-1\n",
        "",
    );
    let path = file("data", b"two\nlines\n");
    let mut call = client(
        &queue,
        &[
            "--data",
            "one",
            "--data",
            &at(&path),
            "--data",
            "@-",
            "--repeat",
            "2",
        ],
    );
    let expected = "one\none\ntwo\nlines\n\ntwo\nlines\n\nthree\nthree\n";
    assert_output(call.write_stdin("three"), 0, expected, "");
    let script = format!(
        "rpc-client --queue {} --data @<(printf 'from a pipe')",
        &*queue
    );
    bash(&script).code(0).stdout("from a pipe").stderr("");
}

#[test]
fn each_line_is_a_request_without_its_newline_and_nothing_else_is_cut() {
    let queue = Queue::named("lines");
    let _server = Server::start(&queue);
    let lines = b"one\n\n  two \r\n\xff\0\nlast";
    let expected = b"one\n\n  two \r\n\xff\0\nlast\n";
    let path = file("lines", lines);
    let name = path.to_str().expect("the path is UTF-8");
    assert_bytes(&mut client(&queue, &["--lines", name]), 0, expected, "");
    assert_bytes(
        client(&queue, &["--lines", "-"]).write_stdin(lines),
        0,
        expected,
        "",
    );
    assert_bytes(&mut client(&queue, &["--lines", "/dev/null"]), 0, b"", "");
    let script = format!(
        "coproc CALL {{ rpc-client --queue {} --lines -; }}
         echo one >&${{CALL[1]}}; read -r first <&${{CALL[0]}}; echo first $first",
        &*queue
    );
    bash(&script).code(0).stdout("first one\n").stderr("");
}

/// A failed one of several prints an empty line, and a single one nothing; messages say which one
/// it is.
#[test]
fn a_failed_call_keeps_lines_aligned_and_is_named() {
    let queue = Queue::named("data_failed");
    let _server = Server::start(&queue);
    let args = ["--data", "one", "--data", "fail", "--data", "three"];
    assert_output(
        &mut client(&queue, &args),
        1,
        "one\n\nthree\n",
        "rpc-client: request 2: it failed\n",
    );
    let mut call = client(&queue, &["--lines", "-"]);
    assert_output(
        call.write_stdin("one\nfail\nthree\n"),
        1,
        "one\n\nthree\n",
        "rpc-client: line 2: it failed\n",
    );
    assert_output(
        &mut client(&queue, &["--data", "fail"]),
        1,
        "",
        "rpc-client: it failed\n",
    );
    assert_output(
        &mut client(&queue, &["-o", "text", "--data", "fail"]),
        1,
        "",
        "rpc-client: it failed\n",
    );
    let missing = Queue::named("data_no_queue");
    let stderr = format!(
        "rpc-client: no queue '{}' on {}: is rpc-server running?\n",
        &*missing,
        broker::authority()
    );
    assert_output(&mut client(&missing, &["--data", "x"]), 4, "", &stderr);
}

#[test]
fn text_output_has_no_label_no_control_characters_and_a_newline_at_its_end() {
    let queue = Queue::named("data_text");
    let _server = Server::start(&queue);
    let args = [
        "-o",
        "text",
        "--data",
        "a\tb\nc",
        "--data",
        "d\n",
        "--data",
        "\u{1b}[2J\u{202e}",
        "--data",
        "@-",
    ];
    let expected = "a\tb\nc\nd\n\\u{1b}[2J\\u{202e}\n\\xff\n";
    assert_output(
        client(&queue, &args).write_stdin(b"\xff".to_vec()),
        0,
        expected,
        "",
    );
    let long = "0123456789".repeat(100);
    assert_output(
        &mut client(&queue, &["-o", "text", "--data", &long]),
        0,
        &format!("{long}\n"),
        "",
    );
    bash(&format!(
        r#"script -qec 'rpc-client --queue {} --data "$(printf "a\233b")"' /dev/null"#,
        &*queue
    ))
    .code(0)
    .stdout("a\\x9bb\r\n");
}

/// The JSON objects of a run, without the fields whose values differ between runs.
fn json_lines(command: &mut Command, code: i32) -> Vec<Value> {
    let output = command.assert().code(code).get_output().clone();
    let lines = output
        .stdout
        .split(|byte| *byte == b'\n')
        .filter(|line| !line.is_empty());
    let mut objects: Vec<Value> = lines
        .map(|line| serde_json::from_slice(line).expect("it is JSON"))
        .collect();
    for object in objects.iter_mut().filter_map(Value::as_object_mut) {
        let varying = ["latency_ms", "correlation_id"].map(|name| object.remove(name).is_some());
        assert!(
            varying == [true; 2] || object["error"]["code"] == "usage",
            "{object:?}"
        );
    }
    objects
}

#[test]
fn json_has_data_and_result_as_text_or_base64() {
    let queue = Queue::named("data_json");
    let _server = Server::start(&queue);
    let mut call = client(
        &queue,
        &["-o", "json", "--content-type", "text/csv", "--lines", "-"],
    );
    let expected = [
        json!({"data": "a\"\u{1b}", "result": "a\"\u{1b}", "content_type": "text/csv"}),
        json!({"data_base64": "/wA=", "result_base64": "/wA=", "content_type": "text/csv"}),
        json!({"data": "nothing", "result": "", "content_type": "text/csv"}),
        json!({"data": "fail", "error": {"code": "failed", "message": "it failed", "exit_code": 3}}),
    ];
    assert_eq!(
        json_lines(
            call.write_stdin(b"a\"\x1b\n\xff\0\nnothing\nfail\n".to_vec()),
            1
        ),
        expected
    );
    let output = client(&queue, &["-o", "json", "--data", "\u{7f}\u{9b}\u{202e}"])
        .assert()
        .get_output()
        .clone();
    let output = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.starts_with(r#"{"data":"\u007f\u009b\u202e","result":"\u007f\u009b\u202e""#),
        "{output}"
    );
}

#[test]
fn a_server_gets_the_content_type_and_the_headers() {
    let queue = Queue::declare("data_headers");
    let peer = Peer::connect();
    let args = [
        "--data",
        "x",
        "--content-type",
        "image/png",
        "-H",
        "a=b=c",
        "--header",
        "ä=",
        "-H",
        "a=last",
    ];
    let mut call = client(&queue, &args);
    let call = thread::spawn(move || assert_output(&mut call, 0, "y", ""));
    let request = peer.take(&queue);
    peer.reply(&request, b"y");
    call.join().expect("the call is answered");
    assert_eq!(
        request.properties.content_type().as_deref(),
        Some("image/png")
    );
    let headers = request
        .properties
        .headers()
        .clone()
        .expect("it has headers");
    assert_eq!(
        headers.keys().collect::<Vec<_>>(),
        ["a", "x-deadline-ms", "ä"]
    );

    let _server = Server::start(&queue);
    let args = [
        "--data", "headers", "--data", "headers", "-H", "a=b=c", "-H", "b=",
    ];
    assert_output(&mut client(&queue, &args), 0, "a=b=c;b=;\na=b=c;b=;\n", "");
    let json = json_lines(&mut client(&queue, &["-o", "json", "--data", "x"]), 0);
    assert_eq!(json[0]["content_type"], "text/plain", "the default");
    let mut call = client(&queue, &["--content-type", "a/b", "-H", "c=d", "30"]);
    assert_output(&mut call, 0, "30\n", "");
}

/// All files are looked at before anything is sent.
#[test]
fn a_file_that_cannot_be_read_is_exit_code_2_and_nothing_is_sent() {
    let queue = Queue::declare("data_files");
    let large = file("sparse", b"");
    let sparse = fs::File::options()
        .write(true)
        .open(&large)
        .expect("it is ours");
    sparse.set_len((512 << 20) + 1).expect("it needs no room");
    let large = at(&large);
    let too_large = format!(
        "cannot read '{}': larger than 512MiB, RabbitMQ's limit",
        &large[1..]
    );
    for (args, error) in [
        (
            ["--data", "x", "--data", "@/no/such/file"],
            "cannot read '/no/such/file': no such file or directory",
        ),
        (
            ["--data", "x", "--data", "@/"],
            "cannot read '/': is a directory",
        ),
        (
            ["--data", "x", "--data", "@"],
            "cannot read '': no such file or directory",
        ),
        (["--data", "x", "--data", &large], &too_large),
        (
            ["-o", "json", "--lines", "/no/such/file"],
            "cannot read '/no/such/file': no such file or directory",
        ),
        (
            ["-o", "json", "--lines", "/"],
            "cannot read '/': is a directory",
        ),
    ] {
        assert_output(
            &mut client(&queue, &args),
            2,
            "",
            &format!("rpc-client: {error}\n"),
        );
    }
    let directory = |option| format!("rpc-client --queue {} {option} </", &*queue);
    for option in ["--data @-", "--lines -"] {
        bash(&directory(option))
            .code(2)
            .stdout("")
            .stderr("rpc-client: cannot read standard input: is a directory\n");
    }
    assert!(Peer::connect().try_take(&queue).is_none());
}

/// Without reading all of it: /dev/zero has no end.
#[test]
fn a_request_of_more_than_512_mebibytes_is_exit_code_2() {
    let queue = Queue::named("too_large_data");
    let _server = Server::start(&queue);
    let stderr = "rpc-client: cannot read '/dev/zero': larger than 512MiB, RabbitMQ's limit\n";
    assert_output(
        &mut client(&queue, &["--data", "@/dev/zero"]),
        2,
        "",
        stderr,
    );
    let script = format!(
        "{{ echo one; head -c $((512 << 20)) /dev/zero; echo x; echo three; }} | rpc-client --queue {} --lines -",
        &*queue
    );
    let stderr = "rpc-client: line 2: larger than 512MiB, RabbitMQ's limit\n";
    bash(&script)
        .code(2)
        .stdout("one\n\nthree\n")
        .stderr(stderr);
}

/// The broker closes the channel of all calls. Each of those that are too large ends with an error
/// that says so, in turn, and the others are answered.
#[test]
fn a_request_that_is_too_large_for_the_broker_ends_alone() {
    let broker = exclusive_node();
    let queue = "too_large_request";
    let _server = Server::start_at(broker.url(), queue);
    let [large, larger] =
        [200_000, 300_000].map(|size| (size, at(&file(&size.to_string(), &vec![b'x'; size]))));
    let error = |size| {
        let broker = broker.authority();
        let refused = "PRECONDITION_FAILED - message size";
        format!("the request of {size} bytes is too large for {broker}: {refused} {size} is larger than configured max size 100000")
    };
    let at_node = |args: &[&str]| {
        let mut call = client(queue, args);
        call.env("AMQP_URL", broker.url());
        call
    };
    let args = [
        "--data", "1", "--data", &larger.1, "--data", "slow", "--data", &large.1, "--data", "5",
    ];
    let output = at_node(&args)
        .assert()
        .code(1)
        .stdout("1\n\n\n\n5\n")
        .get_output()
        .clone();
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    let lines: Vec<&str> = stderr.lines().collect();
    assert_eq!(lines.len(), 2, "{stderr}");
    assert!(lines[0].starts_with(&format!(
        "rpc-client: request 2: the request of {} bytes is too large",
        larger.0
    )));
    assert!(lines[1].starts_with(&format!(
        "rpc-client: request 4: the request of {} bytes is too large",
        large.0
    )));
    let message = error(large.0);
    let json = json_lines(
        &mut at_node(&["-q", "-t", "1h", "-o", "json", "--data", &large.1]),
        1,
    );
    assert_eq!(
        json[0]["error"],
        json!({"code": "too-large", "message": message})
    );
    assert_output(
        &mut at_node(&["-q", "--data", &large.1]),
        1,
        "",
        &format!("rpc-client: {message}\n"),
    );
}

/// A content header is one frame (AMQP 0-9-1, 4.2.6.1): RabbitMQ closes the connection that sends a
/// larger one. Bodies are divided into frames.
#[test]
fn a_request_whose_headers_do_not_fit_into_a_frame_is_not_sent() {
    let broker = exclusive_node();
    broker.rabbitmqctl(&["eval", "application:set_env(rabbit, frame_max, 8192)."]);
    let queue = "large_headers";
    let _server = Server::start_at(broker.url(), queue);
    let at_node = |args: &[&str]| {
        let mut call = client(queue, args);
        call.env("AMQP_URL", broker.url());
        call
    };
    let body = "x".repeat(50_000);
    assert_output(
        &mut at_node(&["-q", "-H", "a=b", "--data", &body]),
        0,
        &body,
        "",
    );
    let header = format!("a={}", "x".repeat(9_000));
    let address = broker.authority();
    let stderr = format!(
        "rpc-client: the request of 1 bytes is too large for {address}: its properties and headers take 9204 bytes, and a frame holds 8192\n"
    );
    assert_output(
        &mut at_node(&["-q", "-H", &header, "--data", "1"]),
        1,
        "",
        &stderr,
    );
    broker.rabbitmqctl(&["eval", "application:set_env(rabbit, frame_max, 131072)."]);
}

/// The broker does not read. Requests that wait for it are not encoded, and those that expire take
/// no memory.
#[test]
fn requests_at_a_broker_that_does_not_read_take_little_memory() {
    let queue = Queue::declare("unread_requests");
    let proxy = Proxy::start();
    proxy.freeze_before(BASIC_PUBLISH);
    let args = [
        "--queue",
        &queue,
        "-q",
        "-t",
        "100ms",
        "--heartbeat",
        "600",
        "--lines",
        "-",
    ];
    let mut client = Program::spawn_at(&proxy.url(), "rpc-client", &args);
    let line = "x".repeat(200_000);
    let mut peak = 0;
    for _ in 0..1_000 {
        client.write_line(&line);
        peak = client.peak_memory_kib().unwrap_or(peak);
    }
    client.close_stdin();
    assert_eq!(client.wait_for_exit_code(), Some(5));
    assert!(peak < 80 << 10, "{peak} KiB");
}

/// The first call is slow. Behind it, no more than twice the calls in flight are read.
#[test]
fn large_requests_that_wait_behind_a_slow_one_take_little_memory() {
    let queue = Queue::named("data_memory");
    let _server = Server::start(&queue);
    let mut client = Program::spawn(
        "rpc-client",
        &["--queue", &queue, "-q", "-j", "2", "--lines", "-"],
    );
    client.write_line("slow");
    let line = "x".repeat(1 << 20);
    for _ in 0..50 {
        client.write_line(&line);
    }
    client.close_stdin();
    let peak = client.peak_memory_kib().expect("it is running");
    assert_eq!(client.next_line(), "");
    (0..50).for_each(|_| assert!(client.next_line() == line));
    assert_eq!(client.wait_for_exit_code(), Some(0));
    assert!(peak < 40 << 10, "{peak} KiB");
}
