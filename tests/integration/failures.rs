//! What goes wrong, as users see it: one clear line, and the exit code of the table. The lines that a
//! command alone can provoke stand on the page of messages.

use crate::messages::assert_on_page;
use crate::support::broker::{self, exclusive_node};
use crate::support::peer::{Peer, Queue};
use crate::support::programs::{assert_output, client, command, Program};
use rpc_common::exit;
use std::net::TcpListener;
use std::path::Path;
use std::{fs, thread};

#[test]
fn without_arguments_there_is_usage() {
    let output = command("rpc-client").assert().code(2).stdout("").get_output().clone();
    let usage = String::from_utf8(output.stderr).expect("help is text");
    assert!(usage.contains("Usage: rpc-client [OPTIONS] <N>..."), "{usage}");
}

#[test]
fn help_lists_the_exit_codes_and_hides_the_environment() {
    for (program, codes) in [("rpc-client", exit::CLIENT), ("rpc-server", exit::SERVER)] {
        let mut help = command(program);
        let output = help
            .arg("--help")
            .env("AMQP_URL", "amqp://me:sesame@host")
            .assert()
            .code(0)
            .stderr("")
            .get_output()
            .clone();
        let text = String::from_utf8(output.stdout).expect("help is text");
        assert!(text.contains(&exit::help(codes)), "{text}");
        assert!(!text.contains("sesame"), "{text}");
    }
}

#[test]
fn what_is_no_number_never_leaves_the_client() {
    let queue = Queue::declare("no_number");
    for wrong in ["", "+5", "1.5", " 1", "1e3", "0x10", "123456789012345678901"] {
        client(&queue, &["1", "--", wrong]).assert().code(2).stdout("");
    }
    assert!(Peer::connect().try_take(&queue).is_none());
}

#[test]
fn a_password_in_an_argument_draws_a_warning() {
    let queue = Queue::named("password_warning");
    let _server = Program::start_server(&queue, &[]);
    let url = broker::url_with_credentials(broker::credentials());
    let warning =
        "rpc-client: warning: ps shows everybody the password in --url: put the URL into AMQP_URL\n";
    assert_output(&mut client(&queue, &["--url", &url, "30"]), 0, "832040\n", warning);
    assert_output(&mut client(&queue, &["--url", &url, "30", "-q"]), 0, "832040\n", "");
    assert_output(client(&queue, &["30"]).env("AMQP_URL", &url), 0, "832040\n", "");
}

#[test]
fn a_password_file_stands_in_for_the_password_of_the_url() {
    let queue = Queue::named("password_file");
    let (user, password) = broker::credentials().split_once(':').expect("both are in the URL");
    let url = broker::url_with_credentials(user);
    let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join("password");
    let name = file.to_str().expect("the target folder is UTF-8");
    fs::write(&file, format!("{password}\n")).expect("there is room for it");
    let _server = Program::start_server_at(&url, &queue, &["--password-file", name]);
    let mut call = client(&queue, &["--password-file", name, "30"]);
    assert_output(call.env("AMQP_URL", &url), 0, "832040\n", "");
}

#[test]
fn no_log_shows_a_password() {
    let queue = Queue::named("secrets");
    let _server = Program::start_server(&queue, &[]);
    // The user's name spelt otherwise in the URL than on the wire tells where a log has it from.
    let (user, password) = broker::credentials().split_once(':').expect("both are in the URL");
    let encoded = password.bytes().map(|byte| format!("%{byte:02x}")).collect::<String>();
    let secret = broker::url_with_credentials(&format!("{user}:{encoded}"));
    let output = client(&queue, &["30"])
        .env("AMQP_URL", secret)
        .env("RUST_LOG", "trace,amiquip=trace,amiquip::io_loop::handshake_state=trace")
        .assert()
        .code(0)
        .get_output()
        .clone();
    let log = String::from_utf8_lossy(&output.stderr);
    assert!(log.len() > 1_000, "trace logs: {log}");
    let on_the_wire = format!("\\u{{0}}{password}");
    assert!(!log.contains(&encoded) && !log.contains(&on_the_wire), "{log}");
    assert!(!log.contains("StartOk"), "{log}");
}

#[test]
fn no_broker_is_exit_code_3() {
    let free = TcpListener::bind("127.0.0.1:0")
        .expect("there are ports")
        .local_addr()
        .expect("it is bound");
    let stderr = format!(
        "rpc-client: cannot reach {free}: connection refused: is RabbitMQ running there, or AMQP_URL to be set?\n"
    );
    let nobody = format!("amqp://{free}");
    assert_output(client("any", &["1", "2"]).env("AMQP_URL", &nobody), 3, "\n", &stderr);
    assert_output(
        client("any", &["1", "-o", "text", "-q"]).env("AMQP_URL", &nobody),
        3,
        "",
        &stderr,
    );
}

#[test]
fn no_queue_is_exit_code_4() {
    let queue = Queue::named("no_queue");
    let error = format!(
        "rpc-client: no queue '{}' on {}: is rpc-server running?\n",
        &*queue,
        broker::authority()
    );
    assert_output(&mut client(&queue, &["30"]), 4, "\n", &error);
    assert_output(&mut client(&queue, &["-o", "text", "-q", "30"]), 4, "", &error);
}

#[test]
fn no_answer_in_time_is_exit_code_5_and_leaves_nothing_behind() {
    let queue = Queue::declare("no_answer");
    let error = format!(
        "rpc-client: fib(30): no answer from '{}' on {} within 5s: \
         the queue had 0 consumers and 1 message waiting\n",
        &*queue,
        broker::authority()
    );
    assert_output(&mut client(&queue, &["-q", "-t", "5s", "30"]), 5, "\n", &error);
    Peer::connect().wait_for_messages(&queue, 0);
}

#[test]
fn a_queue_without_consumers_draws_a_warning_and_is_waited_for() {
    let queue = Queue::declare("no_consumers");
    let call = Program::spawn("rpc-client", &["--queue", &queue, "30"]);
    let warning = call.wait_for_log("no server is consuming");
    let expected =
        format!("rpc-client: warning: no server is consuming '{}'; waiting up to 30s", &*queue);
    assert_eq!(warning, expected);
    let _server = Program::start_server(&queue, &[]);
    assert_eq!(call.next_line(), "832040");
    assert_eq!(call.wait_for_exit_code(), Some(0));
}

#[test]
fn a_remote_error_is_exit_code_1_and_stops_nothing() {
    let queue = Queue::named("remote_error");
    let server = Program::start_server(&queue, &["--max-n", "100"]);
    let error =
        "rpc-client: fib(101): out of range: 101 is larger than 100, the largest n served here\n";
    assert_output(&mut client(&queue, &["7", "101", "8"]), 1, "13\n\n21\n", error);
    assert_eq!(server.stop(), [" [.] fib(7)", " [.] fib(8)"]);
}

#[test]
fn a_reply_that_is_no_number_is_exit_code_1() {
    let queue = Queue::declare("bad_reply");
    let nonsense = ["", "NaN", "abc", "-1", "1\n", "12345678"];
    let server = thread::spawn({
        let queue = queue.to_owned();
        move || {
            let peer = Peer::connect();
            for reply in nonsense {
                let request = peer.take(&queue);
                peer.reply(&request, reply.as_bytes());
            }
        }
    });
    for reply in nonsense {
        let error = format!(
            "rpc-client: fib(30): bad reply: '{}' is {}: does another program serve this queue?\n",
            reply.escape_debug(),
            if reply.len() == 8 { "longer than the answer can be" } else { "no number" }
        );
        assert_output(&mut client(&queue, &["-q", "30"]), 1, "\n", &error);
    }
    server.join().expect("the peer was served");
}

#[test]
fn a_server_that_drops_the_request_is_exit_code_5() {
    let queue = Queue::declare("drops");
    let server = thread::spawn({
        let (peer, queue) = (Peer::connect(), queue.to_owned());
        move || peer.take(&queue)
    });
    let error = format!(
        "rpc-client: fib(30): no answer from '{}' on {} within 5s: \
         the queue had 0 consumers and 0 messages waiting\n",
        &*queue,
        broker::authority()
    );
    assert_output(&mut client(&queue, &["-q", "-t", "5s", "30"]), 5, "\n", &error);
    server.join().expect("it took the request");
}

/// The README's tables of exit codes say the same as `--help`.
#[test]
fn the_readme_lists_the_exit_codes() {
    let readme = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../README.md"))
        .expect("it is there");
    for (code, meaning) in exit::CLIENT.iter().chain(exit::SERVER) {
        let row = format!("| {} | {meaning} |", *code as u8);
        assert!(readme.contains(&row), "the README has no row '{row}'");
    }
}

#[test]
fn too_many_workers_for_the_broker_are_exit_code_3() {
    let broker = exclusive_node();
    let _few = broker.set_variable("channel_max", "3");
    let mut server = command("rpc-server");
    server.args(["--queue", "few_channels", "--workers", "8"]).env("AMQP_URL", broker.url());
    let output = server.assert().code(3).get_output().clone();
    let log = String::from_utf8_lossy(&output.stderr);
    let error = format!(
        "rpc-server: {} allows no more channels: fewer --workers, or a larger channel_max there\n",
        broker.authority()
    );
    assert!(log.ends_with(&error), "{log}");
    assert_on_page(error.trim_end());
}
