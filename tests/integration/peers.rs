//! The RPC tutorial on libraries of other languages (`tests/peers`): their clients call rpc-server,
//! and their servers answer rpc-client.

use crate::support::broker_features::{
    broker_version, permitted_queue_types, report_not_applicable,
};
use crate::support::peer::{default_queue_type, permits_transient_queues, Peer, Queue};
use crate::support::programs::{assert_output, client, program_folder, Program};
use crate::support::{broker, eventually, TEST_TIMEOUT};
use assert_cmd::Command;
use rpc_common::fib::fib;
use rustix::process::Signal;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;
use std::{fmt, fs, process};

/// A language of a peer.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Language {
    Php,
    Python,
    Go,
    Node,
    Perl,
}

use Language::{Go, Node, Perl, Php, Python};

const LANGUAGES: [Language; 5] = [Php, Python, Go, Node, Perl];

impl Language {
    /// The command that runs its `server` or `client`.
    fn program(self, half: &str) -> process::Command {
        let sources = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("peers");
        match self {
            Php => self.run(&sources.join(format!("php/{half}.php"))),
            Python => self.run(&sources.join(format!("python/{half}.py"))),
            Node => self.run(&sources.join(format!("node/{half}.js"))),
            Perl => self.run(&sources.join(format!("perl/{half}.pl"))),
            Go => process::Command::new(peer_folder().join(format!("go-{half}"))),
        }
    }

    /// The command that runs a source file.
    fn run(self, source: &Path) -> process::Command {
        let mut command = match self {
            Php => process::Command::new("php"),
            Python => process::Command::new(peer_folder().join("python/bin/python")),
            Node => process::Command::new("node"),
            Perl => process::Command::new("perl"),
            Go => process::Command::new("go"),
        };
        match self {
            Node => command.env("NODE_PATH", peer_folder().join("node/node_modules")),
            // Not `go run`: a signal must reach the program itself. Debian installs the libraries
            // below GOPATH, without modules.
            Go => {
                let program = source.with_extension("");
                command
                    .env("GO111MODULE", "off")
                    .env("GOPATH", "/usr/share/gocode");
                let built = command
                    .args(["build", "-o"])
                    .arg(&program)
                    .arg(source)
                    .status();
                assert!(
                    built.expect("go runs").success(),
                    "{} does not build",
                    source.display()
                );
                return process::Command::new(program);
            }
            Php | Python | Perl => &mut command,
        };
        command.arg(source);
        command
    }

    /// Starts its server on a queue, declared as `queue_type` says, and waits until it serves.
    fn start_server(self, queue: &str, queue_type: &str) -> Program {
        let environment = [("RPC_QUEUE", queue), ("RPC_QUEUE_TYPE", queue_type)];
        let server =
            Program::spawn_command(&with_environment(self.program("server"), &environment));
        assert_eq!(server.next_line(), " [x] Awaiting RPC requests");
        server
    }
}

/// The folder into which `tests/setup.sh peers` installs.
fn peer_folder() -> PathBuf {
    let folder = program_folder()
        .parent()
        .expect("profiles are below the target folder")
        .join("peers");
    assert!(
        folder.join("go-client").exists(),
        "the peers are not installed: run 'tests/setup.sh peers', or 'make test' which does"
    );
    folder
}

fn with_environment(mut command: process::Command, variables: &[(&str, &str)]) -> process::Command {
    command
        .env("AMQP_URL", broker::url())
        .envs(variables.iter().copied());
    command
}

/// The limit of a peer's run: one that lost an answer waits for ever.
const PEER_TIMEOUT: Duration = Duration::from_secs(120);

const NUMBERS: [u64; 6] = [0, 1, 7, 30, 78, 90];

/// A row of the matrix: whether a client gets the right answers from a server.
struct Row {
    client: String,
    server: String,
    /// A cell for each of [`NUMBERS`], and one for 300 calls with 16 in flight.
    cells: Vec<bool>,
}

impl Row {
    /// Fills the cells. `call` returns the command that prints fib(n) for each number.
    fn new(client: &str, server: &str, call: impl Fn(&[u64]) -> Command) -> Self {
        let answers = |numbers: &[u64]| {
            let output = call(numbers).timeout(PEER_TIMEOUT).output();
            let output = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
            let lines: Vec<String> = output.unwrap_or_default().lines().map(Into::into).collect();
            numbers
                .iter()
                .enumerate()
                .map(move |(place, n)| lines.get(place) == Some(&fib(*n).to_string()))
                .collect::<Vec<bool>>()
        };
        let many: Vec<u64> = (0..300).map(|i| i % 90).collect();
        let mut cells = answers(&NUMBERS);
        cells.push(answers(&many).into_iter().all(|ok| ok));
        Row {
            client: client.into(),
            server: server.into(),
            cells,
        }
    }
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "| {:14} | {:21} |", self.client, self.server)?;
        self.cells
            .iter()
            .try_for_each(|ok| write!(f, " {:6} |", if *ok { "ok" } else { "FAILED" }))
    }
}

/// The rows of the peers' clients with rpc-server (Python's also with direct reply-to), and of
/// rpc-client with the peers' servers.
fn rows(queue_type: &str) -> Vec<Row> {
    let queue = Queue::named(&format!("matrix_{queue_type}"));
    let server = Program::start_server(&queue, &["--queue-type", queue_type]);
    let peers = LANGUAGES
        .map(|language| (language, "queue"))
        .into_iter()
        .chain([(Python, "direct")]);
    let mut rows: Vec<Row> = peers
        .map(|(language, reply_to)| {
            let client = format!("{language:?}, {reply_to}");
            Row::new(&client, &format!("rpc-server, {queue_type}"), |numbers| {
                let environment = [("RPC_QUEUE", &*queue), ("RPC_REPLY_TO", reply_to)];
                let mut command = with_environment(language.program("client"), &environment);
                command.args(numbers.iter().map(u64::to_string));
                Command::from_std(command)
            })
        })
        .collect();
    server.stop();
    rows.extend(LANGUAGES.map(|language| {
        let queue = Queue::named(&format!("matrix_{queue_type}_{language:?}"));
        let _server = language.start_server(&queue, queue_type);
        Row::new(
            "rpc-client",
            &format!("{language:?}, {queue_type}"),
            |numbers| {
                let mut command = client(&queue, &["-j", "16", "-t", "20s"]);
                command.args(numbers.iter().map(u64::to_string));
                command
            },
        )
    }));
    rows
}

/// The queue types that versions of the tutorial declare, as far as the broker permits them.
fn tutorial_queue_types() -> impl Iterator<Item = &'static str> {
    permitted_queue_types()
        .into_iter()
        .filter(|&queue_type| queue_type != "classic")
}

/// With the older form of the tutorial (a transient queue) and the current one (a quorum queue, and
/// direct reply-to).
#[test]
fn every_pair_of_client_and_server_gives_right_answers() {
    let rows: Vec<Row> = tutorial_queue_types().flat_map(rows).collect();
    let header =
        "| client         | server                | n = 0  | n = 1  | n = 7  | n = 30 | n = 78 | n = 90 | 300/16 |";
    let rule = header.replace(|char| char != '|', "-");
    let table: String = rows.iter().map(|row| format!("{row}\n")).collect();
    // Not eprintln!: the test runner shows its output for failed tests only.
    let _ = write!(std::io::stderr(), "\n{header}\n{rule}\n{table}\n");
    assert!(
        rows.iter().all(|row| row.cells.iter().all(|ok| *ok)),
        "cells of the matrix have failed"
    );
}

/// rpc-server and a peer's server serve one queue of each type, started in either order: both
/// answer calls.
#[track_caller]
fn assert_shares_a_queue(language: Language) {
    for queue_type in tutorial_queue_types() {
        for ours_first in [true, false] {
            let queue = Queue::named(&format!("shared_{queue_type}_{language:?}_{ours_first}"));
            // The tutorial of the broker's time: without the option.
            let is_default = queue_type == default_queue_type(broker::url());
            let options = ["--queue-type", queue_type];
            let options = if is_default { &[] } else { &options[..] };
            let start_ours = || Program::start_server(&queue, options);
            let (ours, theirs) = if ours_first {
                let ours = start_ours();
                (ours, language.start_server(&queue, queue_type))
            } else {
                let theirs = language.start_server(&queue, queue_type);
                (start_ours(), theirs)
            };
            let mut our_calls = 0;
            let mut their_calls = 0;
            eventually("both servers have answered ten calls", || {
                let mut call = client(&queue, &["-j", "16", "--repeat", "100", "10"]);
                assert_output(&mut call, 0, &"55\n".repeat(100), "");
                our_calls += ours.new_lines().len();
                their_calls += theirs.new_lines().len();
                (our_calls >= 10 && their_calls >= 10).then_some(())
            });
            ours.stop();
        }
    }
}

#[test]
fn rpc_server_shares_a_queue_with_php() {
    assert_shares_a_queue(Php);
}

#[test]
fn rpc_server_shares_a_queue_with_python() {
    assert_shares_a_queue(Python);
}

#[test]
fn rpc_server_shares_a_queue_with_go() {
    assert_shares_a_queue(Go);
}

#[test]
fn rpc_server_shares_a_queue_with_node() {
    assert_shares_a_queue(Node);
}

#[test]
fn rpc_server_shares_a_queue_with_perl() {
    assert_shares_a_queue(Perl);
}

/// RabbitMQ's own AMQP 1.0, since version 4: its clients and servers match by the message id.
#[test]
fn programs_of_amqp_1_0_call_and_are_called() {
    if broker_version() < (4, 3) {
        let part = "calls between AMQP 1.0 and 0-9-1";
        return report_not_applicable(part, "RabbitMQ 4.3 and later convert its addresses");
    }
    let qpid = |program: &str, variables: &[(&str, &str)]| {
        let sources = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("peers/qpid");
        // Debian's, which has the package python3-qpid-proton.
        let mut command = process::Command::new("/usr/bin/python3");
        command.arg(sources.join(program));
        let mut command = with_environment(command, variables);
        let url = format!("amqp://{}@{}", broker::credentials(), broker::authority());
        command.env("AMQP_URL", url);
        command
    };
    let queue = Queue::named("amqp_1_0");
    let replies = Queue::declare("amqp_1_0_replies");
    let ours = Program::start_server(&queue, &[]);
    for (section, answers) in [
        ("data", "832040\n55\n"),
        (
            "value",
            "invalid argument: the body is a value of AMQP 1.0: send a data section\n\
             invalid argument: the body is a value of AMQP 1.0: send a data section\n",
        ),
    ] {
        let variables = [
            ("RPC_QUEUE", &*queue),
            ("RPC_REPLY_QUEUE", &*replies),
            ("RPC_SECTION", section),
        ];
        let mut call = qpid("client.py", &variables);
        call.args(["30", "10"]);
        let mut call = Command::from_std(call);
        assert_output(call.timeout(PEER_TIMEOUT), 0, answers, "");
    }
    ours.stop();
    let errors = [1, 2].map(|number| {
        format!(
            "rpc-client: request {number}: the reply is a value of AMQP 1.0, not a data section: \
             the server must send a data section\n"
        )
    });
    for (section, code, answers, errors) in [
        ("data", 0, "HELLO\nWORLD\n", String::new()),
        ("value", 1, "\n\n", errors.concat()),
    ] {
        // Of its own: the server may be killed before it accepts the last request.
        let queue = Queue::declare(&format!("amqp_1_0_{section}"));
        let variables = [("RPC_QUEUE", &*queue), ("RPC_SECTION", section)];
        let theirs = Program::spawn_command(&qpid("server.py", &variables));
        assert_eq!(theirs.next_line(), " [x] Awaiting RPC requests");
        let mut call = client(&queue, &["--data", "hello", "--data", "world"]);
        assert_output(&mut call, code, answers, &errors);
    }
}

/// A peer's client does not know error replies: it prints the sentence as the answer, and the
/// server goes on.
#[test]
fn a_peer_gets_a_sentence_for_a_bad_request() {
    let queue = Queue::named("peers_bad_request");
    let _server = Program::start_server(&queue, &[]);
    let answers = "invalid argument: 'abc' is not a whole number (digits only, such as 30)\n\
                   out of range: 2000000 is larger than 1000000, the largest n served here\n\
                   832040\n";
    for language in LANGUAGES {
        let mut call = with_environment(language.program("client"), &[("RPC_QUEUE", &queue)]);
        call.args(["abc", "2000000", "30"]);
        assert_output(
            Command::from_std(call).timeout(PEER_TIMEOUT),
            0,
            answers,
            "",
        );
    }
}

/// A peer's server does not know error replies: its sentence is not a number.
#[test]
fn a_sentence_from_a_peers_server_is_a_bad_reply() {
    for language in LANGUAGES {
        let queue = Queue::named(&format!("sentence_{language:?}"));
        let _server = language.start_server(&queue, default_queue_type(broker::url()));
        let call = client(&queue, &["7", "18446744073709551615", "8"])
            .assert()
            .code(1)
            .stdout("13\n\n21\n");
        let stderr = String::from_utf8_lossy(&call.get_output().stderr).into_owned();
        let start = "rpc-client: fib(18446744073709551615): the reply 'not a natural number";
        assert!(stderr.starts_with(start), "{language:?}: {stderr}");
    }
}

/// All byte values, so that nothing on the way can take them for text.
fn all_bytes() -> Vec<u8> {
    (0..=255).cycle().take(100_000).collect()
}

#[test]
fn peers_call_a_program_with_any_bytes() {
    let queue = Queue::named("peers_bytes");
    let _server = Program::start_server(&queue, &["--", "cat"]);
    for language in [Python, Node] {
        let call = with_environment(language.program("bytes_client"), &[("RPC_QUEUE", &queue)]);
        let mut call = Command::from_std(call);
        call.write_stdin(all_bytes())
            .timeout(PEER_TIMEOUT)
            .assert()
            .success()
            .stdout(all_bytes())
            .stderr("");
    }
}

#[test]
fn rpc_client_gets_any_bytes_from_a_peers_server() {
    let queue = Queue::declare("bytes_of_a_peer");
    let server = with_environment(Python.program("bytes_server"), &[("RPC_QUEUE", &queue)]);
    let server = Program::spawn_command(&server);
    assert_eq!(server.next_line(), " [x] Awaiting RPC requests");
    let reversed: Vec<u8> = all_bytes().into_iter().rev().collect();
    client(&queue, &["--data", "@-"])
        .write_stdin(all_bytes())
        .assert()
        .success()
        .stdout(reversed)
        .stderr("");
}

/// The client prints a second answer on standard error, and the server would log a reply without a
/// receiver.
#[test]
fn direct_reply_to_gets_exactly_one_answer() {
    let queue = Queue::named("direct");
    let mut server = Program::start_server(&queue, &[]);
    let mut call = with_environment(
        Python.program("client"),
        &[("RPC_QUEUE", &queue), ("RPC_REPLY_TO", "direct")],
    );
    call.args(std::iter::repeat_n("7", 100));
    assert_output(
        Command::from_std(call).timeout(PEER_TIMEOUT),
        0,
        &"13\n".repeat(100),
        "",
    );
    server.send_signal(Signal::TERM);
    assert_eq!(server.wait().code(), Some(0));
    let (lines, log) = server.remaining_output();
    assert!(!log.iter().any(|line| line.contains("WARN")), "{log:#?}");
    assert_eq!(lines.len(), 100);
    assert_eq!(
        Peer::connect().message_count(&queue),
        Some(0),
        "all requests are acknowledged"
    );
}

/// Runs the README's two programs in a language: the first calls rpc-server, the second serves
/// rpc-client.
#[track_caller]
fn assert_readme_programs_work(language: Language, block: &str, extension: &str) {
    let readme = concat!(env!("CARGO_MANIFEST_DIR"), "/README.md");
    let readme = fs::read_to_string(readme).expect("the file exists");
    let queue = Queue::named(&format!("readme_{language:?}"));
    let authority = broker::authority();
    let (host, port) = authority.rsplit_once(':').expect("it has a port");
    let (user, password) = broker::credentials()
        .split_once(':')
        .expect("both are in the URL");
    let fence = format!("```{block}\n");
    let mut programs = readme
        .split(&fence)
        .skip(1)
        .enumerate()
        .map(|(place, rest)| {
            let source = rest.split("```").next().expect("a block ends");
            assert!(
                source.lines().count() <= 10,
                "the README promises ten lines"
            );
            let source = source
                .replace("rpc_queue", &queue)
                .replace("amqp://localhost", broker::url())
                .replace(
                    "'localhost', 5672, 'guest', 'guest'",
                    &format!("'{host}', {port}, '{user}', '{password}'"),
                );
            let file = Path::new(env!("CARGO_TARGET_TMPDIR"))
                .join(format!("{}.{place}.{extension}", &*queue));
            fs::write(&file, source).expect("the folder is writable");
            language.run(&file)
        });
    {
        let _server = Program::start_server(&queue, &[]);
        let call = programs.next().expect("a block that calls");
        assert_output(
            Command::from_std(call).timeout(TEST_TIMEOUT),
            0,
            "832040\n",
            "",
        );
    }
    if !permits_transient_queues(broker::url()) {
        return report_not_applicable(
            "the server in this language",
            "it declares a transient queue, as in the tutorial",
        );
    }
    Peer::connect().delete_queue(&queue); // the program declares it
    let _server = Program::spawn_command(&programs.next().expect("a block that serves"));
    Peer::connect().wait_for_consumers(&queue, 1);
    assert_output(&mut client(&queue, &["30"]), 0, "832040\n", "");
}

#[test]
fn the_readmes_php_programs_work() {
    assert_readme_programs_work(Php, "php", "php");
}

#[test]
fn the_readmes_python_programs_work() {
    assert_readme_programs_work(Python, "python", "py");
}

#[test]
fn the_readmes_go_programs_work() {
    assert_readme_programs_work(Go, "go", "go");
}

#[test]
fn the_readmes_node_programs_work() {
    assert_readme_programs_work(Node, "js", "js");
}

#[test]
fn the_persistent_program_in_javascript_answers() {
    crate::persistent_programs::assert_copied("copied_node", "node", "persistent.js");
}
