//! The RPC tutorial on the libraries of other languages (`tests/peers`): each is a drop-in half.

use crate::support::broker_features::{permitted_queue_types, report_not_applicable};
use crate::support::peer::{default_queue_type, permits_transient_queues, Peer, Queue};
use crate::support::programs::{assert_output, client, program_folder, Program};
use crate::support::{broker, eventually, TEST_TIMEOUT};
use assert_cmd::Command;
use rpc_common::fib::fib;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;
use std::{fmt, fs, process};

/// A language of the tutorial.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Language {
    Php,
    Python,
    Go,
    Node,
}

use Language::{Go, Node, Php, Python};

const LANGUAGES: [Language; 4] = [Php, Python, Go, Node];

impl Language {
    /// The command that runs its `server` or `client`.
    fn program(self, half: &str) -> process::Command {
        let sources = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("peers");
        match self {
            Php => self.run(&sources.join(format!("php/{half}.php"))),
            Python => self.run(&sources.join(format!("python/{half}.py"))),
            Node => self.run(&sources.join(format!("node/{half}.js"))),
            Go => process::Command::new(installed().join(format!("go-{half}"))),
        }
    }

    /// The command that runs a source file.
    fn run(self, source: &Path) -> process::Command {
        let mut command = match self {
            Php => process::Command::new("php"),
            Python => process::Command::new(installed().join("python/bin/python")),
            Node => process::Command::new("node"),
            Go => process::Command::new("go"),
        };
        match self {
            Node => command.env("NODE_PATH", installed().join("node/node_modules")),
            // Built first, so that it is the program itself that is stopped. Debian's libraries are
            // found below GOPATH, without modules.
            Go => {
                let program = source.with_extension("");
                command.env("GO111MODULE", "off").env("GOPATH", "/usr/share/gocode");
                let built = command.args(["build", "-o"]).arg(&program).arg(source).status();
                assert!(built.expect("go runs").success(), "{} does not build", source.display());
                return process::Command::new(program);
            }
            Php | Python => &mut command,
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

/// The folder of what `tests/setup.sh peers` installs.
fn installed() -> PathBuf {
    let installed =
        program_folder().parent().expect("profiles are below the target folder").join("peers");
    assert!(
        installed.join("go-client").exists(),
        "the peers are not installed: run 'tests/setup.sh peers', or 'make test' which does"
    );
    installed
}

fn with_environment(mut command: process::Command, variables: &[(&str, &str)]) -> process::Command {
    command.env("AMQP_URL", broker::url()).envs(variables.iter().copied());
    command
}

/// How long a cell of the matrix may take; a peer that lost an answer waits for ever.
const LIMIT: Duration = Duration::from_secs(120);

const NUMBERS: [u64; 6] = [0, 1, 7, 30, 78, 90];

/// The caller and the server of a row of the matrix.
struct Row {
    caller: String,
    server: String,
    /// For [`NUMBERS`], then for 300 calls with 16 in flight.
    cells: Vec<bool>,
}

impl Row {
    /// Fills the cells with what `call` prints for its arguments.
    fn new(caller: &str, server: &str, call: impl Fn(&[u64]) -> Command) -> Self {
        let answers = |numbers: &[u64]| {
            let output = call(numbers).timeout(LIMIT).output();
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
        Row { caller: caller.into(), server: server.into(), cells }
    }
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "| {:14} | {:21} |", self.caller, self.server)?;
        self.cells.iter().try_for_each(|ok| write!(f, " {:6} |", if *ok { "ok" } else { "FAILED" }))
    }
}

/// The rows of the peers' clients with rpc-server, one of them also by direct reply-to, and of rpc-client
/// with the peers' servers.
fn rows(queue_type: &str) -> Vec<Row> {
    let queue = Queue::named(&format!("matrix_{queue_type}"));
    let ours = Program::start_server(&queue, &["--queue-type", queue_type]);
    let peers =
        LANGUAGES.map(|language| (language, "queue")).into_iter().chain([(Python, "direct")]);
    let mut rows: Vec<Row> = peers
        .map(|(language, reply_to)| {
            let caller = format!("{language:?}, {reply_to}");
            Row::new(&caller, &format!("rpc-server, {queue_type}"), |numbers| {
                let environment = [("RPC_QUEUE", &*queue), ("RPC_REPLY_TO", reply_to)];
                let mut command = with_environment(language.program("client"), &environment);
                command.args(numbers.iter().map(u64::to_string));
                Command::from_std(command)
            })
        })
        .collect();
    ours.stop();
    rows.extend(LANGUAGES.map(|language| {
        let queue = Queue::named(&format!("matrix_{queue_type}_{language:?}"));
        let _theirs = language.start_server(&queue, queue_type);
        Row::new("rpc-client", &format!("{language:?}, {queue_type}"), |numbers| {
            let mut command = client(&queue, &["-j", "16", "-t", "20s"]);
            command.args(numbers.iter().map(u64::to_string));
            command
        })
    }));
    rows
}

/// The types of queue that the tutorial declares in one form or another, and the broker permits.
fn tutorial_queue_types() -> impl Iterator<Item = &'static str> {
    permitted_queue_types().into_iter().filter(|&queue_type| queue_type != "classic")
}

/// The tutorial as it was, and its form of today: a durable quorum queue, and direct reply-to.
#[test]
fn the_matrix() {
    let rows: Vec<Row> = tutorial_queue_types().flat_map(rows).collect();
    let header =
        "| caller         | server                | n = 0  | n = 1  | n = 7  | n = 30 | n = 78 | n = 90 | 300/16 |";
    let rule = header.replace(|char| char != '|', "-");
    let table: String = rows.iter().map(|row| format!("{row}\n")).collect();
    // To the handle: what the macros print is shown of failed tests only.
    let _ = write!(std::io::stderr(), "\n{header}\n{rule}\n{table}\n");
    assert!(
        rows.iter().all(|row| row.cells.iter().all(|ok| *ok)),
        "cells of the matrix have failed"
    );
}

/// On one queue, started in either order, of either type: nobody is refused, the calls are shared out.
#[track_caller]
fn shares_a_queue(language: Language) {
    for queue_type in tutorial_queue_types() {
        for ours_first in [true, false] {
            let queue = Queue::named(&format!("shared_{queue_type}_{language:?}_{ours_first}"));
            let start_ours = || Program::start_server(&queue, &["--queue-type", queue_type]);
            let (ours, theirs) = if ours_first {
                let ours = start_ours();
                (ours, language.start_server(&queue, queue_type))
            } else {
                let theirs = language.start_server(&queue, queue_type);
                (start_ours(), theirs)
            };
            let (mut of_ours, mut of_theirs) = (0, 0);
            eventually("both take their share", || {
                let mut call = client(&queue, &["-j", "16", "--repeat", "100", "10"]);
                assert_output(&mut call, 0, &"55\n".repeat(100), "");
                of_ours += ours.new_lines().len();
                of_theirs += theirs.new_lines().len();
                (of_ours >= 10 && of_theirs >= 10).then_some(())
            });
            ours.stop();
        }
    }
}

#[test]
fn rpc_server_shares_a_queue_with_php() {
    shares_a_queue(Php);
}

#[test]
fn rpc_server_shares_a_queue_with_python() {
    shares_a_queue(Python);
}

#[test]
fn rpc_server_shares_a_queue_with_go() {
    shares_a_queue(Go);
}

#[test]
fn rpc_server_shares_a_queue_with_node() {
    shares_a_queue(Node);
}

/// A foreign client knows no error replies: it gets the sentence for an answer, and the server goes on.
#[test]
fn a_peers_bad_request_is_answered_with_a_sentence() {
    let queue = Queue::named("peers_bad_request");
    let _server = Program::start_server(&queue, &[]);
    let answers = "invalid argument: 'abc' is not a natural number in decimal digits, 20 at most\n\
                   out of range: 2000000 is larger than 1000000, the largest n served here\n\
                   832040\n";
    for language in LANGUAGES {
        let mut call = with_environment(language.program("client"), &[("RPC_QUEUE", &queue)]);
        call.args(["abc", "2000000", "30"]);
        assert_output(Command::from_std(call).timeout(LIMIT), 0, answers, "");
    }
}

/// A foreign server knows no error replies either: its sentence is no number.
#[test]
fn a_peer_servers_sentence_is_a_bad_reply() {
    for language in LANGUAGES {
        let queue = Queue::named(&format!("sentence_{language:?}"));
        let _server = language.start_server(&queue, default_queue_type(broker::url()));
        let call = client(&queue, &["7", "18446744073709551615", "8"])
            .assert()
            .code(1)
            .stdout("13\n\n21\n");
        let stderr = String::from_utf8_lossy(&call.get_output().stderr).into_owned();
        let start = "rpc-client: fib(18446744073709551615): bad reply: 'not a natural number";
        assert!(stderr.starts_with(start), "{language:?}: {stderr}");
    }
}

/// Exactly one answer a call, and the reply queue is gone with the client.
#[test]
fn direct_reply_to_gets_one_answer() {
    let queue = Queue::named("direct");
    let server = Program::start_server(&queue, &[]);
    let mut call = with_environment(
        Python.program("client"),
        &[("RPC_QUEUE", &queue), ("RPC_REPLY_TO", "direct")],
    );
    call.args(std::iter::repeat_n("7", 100));
    // It says on standard error when a second answer comes.
    assert_output(Command::from_std(call).timeout(LIMIT), 0, &"13\n".repeat(100), "");
    let log = server.new_log();
    assert!(!log.iter().any(|line| line.contains("WARN")), "{log:#?}");
    assert_eq!(server.stop().len(), 100);
    assert_eq!(Peer::connect().message_count(&queue), Some(0), "all are acknowledged");
}

/// The README's blocks of a language: the first calls rpc-server, the second serves rpc-client.
#[track_caller]
fn guest(language: Language, block: &str, extension: &str) {
    let readme = concat!(env!("CARGO_MANIFEST_DIR"), "/../README.md");
    let readme = fs::read_to_string(readme).expect("the file exists");
    let queue = Queue::named(&format!("guest_{language:?}"));
    let authority = broker::authority();
    let (host, port) = authority.rsplit_once(':').expect("the port is named");
    let (user, password) = broker::credentials().split_once(':').expect("both are in the URL");
    let fence = format!("```{block}\n");
    let mut programs = readme.split(&fence).skip(1).enumerate().map(|(place, rest)| {
        let source = rest.split("```").next().expect("a block ends");
        assert!(source.lines().count() <= 10, "ten lines are promised");
        let source =
            source.replace("rpc_queue", &queue).replace("amqp://localhost", broker::url()).replace(
                "'localhost', 5672, 'guest', 'guest'",
                &format!("'{host}', {port}, '{user}', '{password}'"),
            );
        let file =
            Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{}.{place}.{extension}", &*queue));
        fs::write(&file, source).expect("the folder is writable");
        language.run(&file)
    });
    {
        let _server = Program::start_server(&queue, &[]);
        let call = programs.next().expect("a block that calls");
        assert_output(Command::from_std(call).timeout(TEST_TIMEOUT), 0, "832040\n", "");
    }
    if !permits_transient_queues(broker::url()) {
        return report_not_applicable(
            "the guest's server",
            "it declares a transient queue, as in the tutorial",
        );
    }
    Peer::connect().delete_queue(&queue); // it declares it itself
    let _server = Program::spawn_command(&programs.next().expect("a block that serves"));
    Peer::connect().wait_for_consumers(&queue, 1);
    assert_output(&mut client(&queue, &["30"]), 0, "832040\n", "");
}

#[test]
fn the_readmes_guests_from_php_work() {
    guest(Php, "php", "php");
}

#[test]
fn the_readmes_guests_from_python_work() {
    guest(Python, "python", "py");
}

#[test]
fn the_readmes_guests_from_go_work() {
    guest(Go, "go", "go");
}

#[test]
fn the_readmes_guests_from_node_work() {
    guest(Node, "js", "js");
}
