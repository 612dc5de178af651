//! The limits of the system: open files and processes.

use crate::support::peer::Queue;
use crate::support::programs::{assert_output, client, program_folder, Program};
use crate::support::{broker, eventually};
use std::net::TcpListener;
use std::path::PathBuf;
use std::process::Command;
use std::{env, fs, process};

/// A copy of a program that every user may execute, and a user of its own for one test: the limit of
/// processes is one of the user, and does not bind root.
struct LimitedUser {
    folder: PathBuf,
    id: u32,
}

impl LimitedUser {
    /// The `index` differs between tests.
    fn new(index: u32, program: &str) -> Self {
        let folder = env::temp_dir().join(format!("rpc-tests-limits-{index}-{}", process::id()));
        fs::create_dir(&folder).expect("the folder is new");
        fs::copy(program_folder().join(program), folder.join(program)).expect("there is room");
        // Other runs of these tests have other users.
        let id = 20_000 + process::id() % 10_000 + 10_000 * index;
        LimitedUser { folder, id }
    }

    /// Starts the program with this limit of processes, threads included.
    fn spawn(&self, processes: u32, program: &str, args: &[&str]) -> Program {
        let mut command = Command::new("setpriv");
        command
            .arg(format!("--reuid={}", self.id))
            .args(["--clear-groups", "prlimit"])
            .arg(format!("--nproc={processes}"))
            .arg(self.folder.join(program))
            .args(args)
            .current_dir("/")
            .env("AMQP_URL", broker::url());
        Program::spawn_command(&command)
    }
}

impl Drop for LimitedUser {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.folder);
    }
}

#[test]
fn many_workers_raise_the_limit_of_open_files() {
    let queue = Queue::named("limit_of_files");
    let start = |limit: &str| {
        let mut command = Command::new("prlimit");
        command
            .arg(format!("--nofile={limit}"))
            .arg(program_folder().join("rpc-server"))
            .args(["--queue", &queue, "-q", "--workers", "40", "--", "sh", "-c"])
            .arg("sleep 1; printf %s $(ulimit -n)")
            .env("AMQP_URL", broker::url());
        let server = Program::spawn_command(&command);
        assert_eq!(server.next_line(), " [x] Awaiting RPC requests");
        server
    };
    // 8 for each worker, and 64.
    let server = start("100:1000");
    assert_output(
        &mut client(&queue, &["-j", "40", "--repeat", "40", "--data", ""]),
        0,
        &"384\n".repeat(40),
        "",
    );
    assert!(!server
        .new_log()
        .iter()
        .any(|line| line.contains("hard limit")));
    server.stop();
    let server = start("100:300");
    server.wait_for_log("40 workers need 384 open files, and the hard limit is 300");
    assert_output(&mut client(&queue, &["--data", ""]), 0, "300", "");
    server.stop();
}

/// Each limit lets one thread more start.
#[test]
fn a_server_without_enough_threads_ends_with_exit_code_2_and_one_line() {
    let queue = Queue::named("limit_of_threads");
    let user = LimitedUser::new(0, "rpc-server");
    let metrics = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
    let metrics = metrics.expect("a port is free").to_string();
    let args = ["--queue", &queue, "--workers", "3", "--metrics", &metrics];
    for limit in 1.. {
        assert!(limit < 30, "a server needs no more threads");
        let mut server = user.spawn(limit, "rpc-server", &args);
        let first_line = server.next_line_or_end();
        if first_line.as_deref() == Some(" [x] Awaiting RPC requests") {
            server.stop();
            assert!(limit > 6, "three workers, and others");
            return;
        }
        let code = server.wait().code();
        let (stdout, stderr) = server.remaining_output();
        let errors: Vec<_> = stderr
            .iter()
            .filter(|line| !line.contains(" INFO ] "))
            .collect();
        assert_eq!(
            (first_line, &stdout[..], code),
            (None, &[][..], Some(2)),
            "{errors:?}"
        );
        let [error] = errors[..] else {
            panic!("with {limit} threads: {errors:?}")
        };
        assert!(
            error.contains(": resource temporarily unavailable: "),
            "{error}"
        );
    }
}

#[test]
fn a_client_without_enough_threads_ends_with_exit_code_2_and_one_line() {
    let queue = Queue::named("limit_of_client");
    let _server = Program::start_server(&queue, &["-q"]);
    let user = LimitedUser::new(1, "rpc-client");
    for (args, answers) in [(&["30"][..], 1), (&["30", "30"], 2)] {
        let args = [&["--queue", &queue], args].concat();
        for limit in 1.. {
            assert!(limit < 30, "a client needs no more threads");
            let mut client = user.spawn(limit, "rpc-client", &args);
            let code = client.wait().code();
            let (stdout, stderr) = client.remaining_output();
            if code == Some(0) {
                assert_eq!(stdout, vec!["832040"; answers]);
                break;
            }
            let [error] = &stderr[..] else {
                panic!("with {limit} threads: {stderr:?}")
            };
            assert!(stdout.iter().all(String::is_empty), "{stdout:?}");
            assert_eq!(code, Some(2), "{error}");
            // Those of a batch are not all for the connection.
            let broker = format!("cannot connect to {}: ", broker::authority());
            let start = if answers == 1 { &*broker } else { "" };
            assert!(
                error.starts_with(&format!("rpc-client: {start}"))
                    && error.contains(": the system provides no thread: "),
                "{error}"
            );
        }
    }
}

/// The program with this limit of open files.
fn with_open_files(limit: u32, program: &str) -> Command {
    let mut command = Command::new("prlimit");
    command
        .arg(format!("--nofile={limit}:{limit}"))
        .arg(program_folder().join(program));
    command
}

/// Each limit lets one file more be opened. Below 4, the program is not loaded.
#[test]
fn too_many_open_files_are_named_and_not_the_broker() {
    let queue = Queue::named("open_files");
    let server = Program::start_server(&queue, &["-q"]);
    let urls = ["127.0.0.1", "localhost"].map(|host| {
        let url = broker::url()
            .replace("localhost", host)
            .replace("127.0.0.1", host);
        let address = broker::authority()
            .replace("localhost", host)
            .replace("127.0.0.1", host);
        (url, address)
    });
    for ((url, address), args) in urls
        .iter()
        .flat_map(|url| [(url, &["30"][..]), (url, &["--check", "-o", "json"])])
    {
        let error = format!(
            "rpc-client: cannot connect to {address}: too many open files: raise the limit (ulimit -n)"
        );
        for limit in 4.. {
            assert!(limit < 40, "a client needs no more files");
            let mut command = with_open_files(limit, "rpc-client");
            command
                .args(["--queue", &queue])
                .args(args)
                .env("AMQP_URL", url);
            let mut client = Program::spawn_command(&command);
            let code = client.wait().code();
            let (stdout, stderr) = client.remaining_output();
            if code == Some(0) {
                assert!(limit > 4, "it needs a socket, and more");
                break;
            }
            assert_eq!(
                (stdout, stderr, code),
                (vec![], vec![error.clone()], Some(3)),
                "{limit}"
            );
        }
    }
    server.stop();
    for limit in 4.. {
        assert!(limit < 40, "a server needs no more files");
        let mut command = with_open_files(limit, "rpc-server");
        command
            .args(["--queue", &queue, "-q"])
            .env("AMQP_URL", &urls[0].0);
        let server = Program::spawn_command(&command);
        let first = eventually("the server is ready, or says why not", || {
            let is_info =
                |line: &String| line.contains(" INFO ]") || line.contains(" workers need ");
            let mut lines = server.new_lines();
            lines.extend(server.new_log().into_iter().filter(|line| !is_info(line)));
            lines.pop()
        });
        if first == " [x] Awaiting RPC requests" {
            assert!(limit > 4, "it needs a socket, and more");
            return;
        }
        assert!(
            first.contains(": too many open files: raise the limit (ulimit -n)")
                && !first.contains("RabbitMQ"),
            "{limit}: {first}"
        );
    }
}
