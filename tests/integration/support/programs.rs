//! The programs under test: built before they run, with a time limit, and never left running.

use super::{broker, TEST_TIMEOUT};
use assert_cmd::assert::Assert;
use assert_cmd::Command;
use crossbeam_channel::{unbounded, Receiver, RecvTimeoutError, Sender};
use procfs::process::Process;
use rustix::process::{kill_process, Pid, Signal};
use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::thread::JoinHandle;
use std::{env, io, process, thread};

/// The folder of the programs. The first call builds them from this source, because cargo does not
/// build the binaries of other packages for a test.
pub(crate) fn program_folder() -> &'static PathBuf {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let test = env::current_exe().expect("a test has a path");
        let folder = test
            .ancestors()
            .nth(2)
            .expect("tests are in target/<profile>/deps")
            .to_owned();
        let mut build = process::Command::new(env!("CARGO"));
        build.args(["build", "--quiet", "--locked", "--bins", "--examples"]);
        build.args(["-p", "rpc-server", "-p", "rpc-client"]);
        if folder.ends_with("release") {
            build.arg("--release");
        }
        assert!(
            build.status().expect("cargo runs").success(),
            "the programs do not build"
        );
        folder
    })
}

/// Resets SIGINT and SIGHUP, and then executes the command behind it. A shell starts its background
/// jobs with SIGINT ignored, `nohup` its program with SIGHUP, and all their children inherit that:
/// `make test &` in a script, for example.
const WITH_DEFAULT_SIGNALS: [&str; 2] = ["env", "--default-signal=INT,HUP"];

/// A command that runs to its end: in the tests' environment, with [`TEST_TIMEOUT`].
fn command_of(program: impl AsRef<OsStr>) -> Command {
    let [env, default_signals] = WITH_DEFAULT_SIGNALS;
    let mut command = Command::new(env);
    command.arg(default_signals).arg(program);
    command
        .env("AMQP_URL", broker::url())
        .env_remove("RUST_LOG")
        .timeout(TEST_TIMEOUT);
    command
}

/// `rpc-client`, `rpc-server` or an example, to be run to its end.
pub(crate) fn command(program: &str) -> Command {
    command_of(program_folder().join(program))
}

/// `rpc-client` on a queue.
pub(crate) fn client(queue: &str, args: &[&str]) -> Command {
    let mut command = command("rpc-client");
    command.args(["--queue", queue]).args(args);
    command
}

/// Runs a command to its end, and checks its exit code and all of its output.
#[track_caller]
pub(crate) fn assert_output(command: &mut Command, code: i32, stdout: &str, stderr: &str) {
    let stdout = stdout.to_owned();
    let stderr = stderr.to_owned();
    command.assert().code(code).stdout(stdout).stderr(stderr);
}

/// Runs `rpc-client` on a queue in a thread, which panics if the answers are not as expected.
pub(crate) fn call_in_background(
    queue: &str,
    args: &[&str],
    answers: &'static str,
) -> JoinHandle<()> {
    // Quiet: a queue without consumers, as some tests have for a while, would cause a warning.
    let mut command = client(queue, &[&["-q"], args].concat());
    thread::spawn(move || assert_output(&mut command, 0, answers, ""))
}

/// Runs a bash script with the programs on the PATH.
pub(crate) fn bash(script: &str) -> Assert {
    let path = env::var("PATH").unwrap_or_default();
    let path = format!("{}:{path}", program_folder().display());
    command_of("bash")
        .args(["-c", script])
        .env("PATH", path)
        .assert()
}

/// A program that runs in the background. It is killed when it is dropped, or when this process
/// ends. A test that fails shows its log.
pub(crate) struct Program {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: Receiver<String>,
    stderr: Receiver<String>,
}

impl Program {
    /// Starts `rpc-server`, and waits until it serves.
    #[track_caller]
    pub(crate) fn start_server(queue: &str, args: &[&str]) -> Self {
        Program::start_server_at(broker::url(), queue, args)
    }

    /// Like [`Program::start_server`], at another broker URL.
    #[track_caller]
    pub(crate) fn start_server_at(url: &str, queue: &str, args: &[&str]) -> Self {
        let server = Program::spawn_at(url, "rpc-server", &[&["--queue", queue], args].concat());
        assert_eq!(server.next_line(), " [x] Awaiting RPC requests");
        server
    }

    /// Starts a program, and waits for nothing.
    pub(crate) fn spawn(program: &str, args: &[&str]) -> Self {
        Program::spawn_at(broker::url(), program, args)
    }

    /// Like [`Program::spawn`], at another broker URL.
    pub(crate) fn spawn_at(url: &str, program: &str, args: &[&str]) -> Self {
        let mut command = process::Command::new(program_folder().join(program));
        command.args(args).env("AMQP_URL", url);
        Program::spawn_command(&command)
    }

    /// Starts any command, and waits for nothing.
    pub(crate) fn spawn_command(command: &process::Command) -> Self {
        let mut setpriv = process::Command::new("setpriv");
        setpriv
            .args(["--pdeathsig", "KILL"])
            .args(WITH_DEFAULT_SIGNALS)
            .arg(command.get_program())
            .args(command.get_args())
            .envs(
                command
                    .get_envs()
                    .filter_map(|(name, value)| Some((name, value?))),
            )
            .env_remove("RUST_LOG")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = spawn(setpriv).expect("setpriv, of util-linux, runs");
        let stdin = child.stdin.take();
        let stdout = read_lines(child.stdout.take().expect("piped"));
        let stderr = read_lines(child.stderr.take().expect("piped"));
        Program {
            child,
            stdin,
            stdout,
            stderr,
        }
    }

    /// Writes a line to its standard input; false if the program does not read it any more.
    pub(crate) fn write_line(&mut self, line: &str) -> bool {
        self.stdin
            .as_mut()
            .is_some_and(|stdin| writeln!(stdin, "{line}").is_ok())
    }

    pub(crate) fn close_stdin(&mut self) {
        self.stdin = None;
    }

    /// Waits for the next line of its standard output.
    #[track_caller]
    pub(crate) fn next_line(&self) -> String {
        let line = self.stdout.recv_timeout(TEST_TIMEOUT);
        line.unwrap_or_else(|error| panic!("no line ({error}); the log: {:#?}", self.new_log()))
    }

    /// Like [`Program::next_line`]; `None` if it closes its standard output first.
    #[track_caller]
    pub(crate) fn next_line_or_end(&self) -> Option<String> {
        match self.stdout.recv_timeout(TEST_TIMEOUT) {
            Ok(line) => Some(line),
            Err(RecvTimeoutError::Disconnected) => None,
            Err(RecvTimeoutError::Timeout) => panic!("no line; the log: {:#?}", self.new_log()),
        }
    }

    /// The lines of its standard output that are there and were not returned before.
    pub(crate) fn new_lines(&self) -> Vec<String> {
        self.stdout.try_iter().collect()
    }

    /// The lines of its log (standard error) that are there and were not returned before.
    pub(crate) fn new_log(&self) -> Vec<String> {
        self.stderr.try_iter().collect()
    }

    /// Waits until the program has closed its standard output and its log, and returns what was not
    /// returned before of both.
    pub(crate) fn remaining_output(&self) -> (Vec<String>, Vec<String>) {
        (self.stdout.iter().collect(), self.stderr.iter().collect())
    }

    /// Waits for a line of its log that contains `text`, and returns it. Lines before it are
    /// dropped.
    #[track_caller]
    pub(crate) fn wait_for_log(&self, text: &str) -> String {
        let mut others = Vec::new();
        while let Ok(line) = self.stderr.recv_timeout(TEST_TIMEOUT) {
            if line.contains(text) {
                return line;
            }
            others.push(line);
        }
        panic!("no log line contains '{text}': {others:#?}");
    }

    pub(crate) fn send_signal(&self, signal: Signal) {
        let pid = Pid::from_child(&self.child);
        kill_process(pid, signal).expect("the program is running");
    }

    pub(crate) fn process_id(&self) -> u32 {
        self.child.id()
    }

    /// Its resident memory in KiB; None if it has ended.
    pub(crate) fn memory_kib(&self) -> Option<u64> {
        let pid = Pid::from_child(&self.child).as_raw_pid();
        Process::new(pid)
            .and_then(|process| process.status())
            .ok()?
            .vmrss
    }

    /// The most resident memory that it has used, in KiB; None if it has ended.
    pub(crate) fn peak_memory_kib(&self) -> Option<u64> {
        let pid = Pid::from_child(&self.child).as_raw_pid();
        Process::new(pid)
            .and_then(|process| process.status())
            .ok()?
            .vmhwm
    }

    /// Waits until it ends.
    #[track_caller]
    pub(crate) fn wait(&mut self) -> ExitStatus {
        super::eventually("the end of the program", || {
            self.child
                .try_wait()
                .expect("it is a child of this process")
        })
    }

    /// Waits until it ends, and returns its exit code; None if a signal ended it.
    #[track_caller]
    pub(crate) fn wait_for_exit_code(mut self) -> Option<i32> {
        self.wait().code()
    }

    /// Stops it by SIGTERM, checks that its exit code is 0, and returns the lines of its standard
    /// output and of its log that were not returned before.
    #[track_caller]
    pub(crate) fn send_stop_and_wait(mut self) -> (Vec<String>, Vec<String>) {
        self.send_signal(Signal::TERM);
        let code = self.wait().code();
        let (stdout, log) = self.remaining_output();
        assert_eq!(code, Some(0), "its log: {log:#?}");
        (stdout, log)
    }

    /// Stops it by SIGTERM, checks that its exit code is 0, and returns the lines of its standard
    /// output that were not returned before.
    #[track_caller]
    pub(crate) fn stop(mut self) -> Vec<String> {
        self.send_signal(Signal::TERM);
        assert_eq!(
            self.wait().code(),
            Some(0),
            "its log: {:#?}",
            self.new_log()
        );
        self.stdout.iter().collect()
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill(); // fails if it has ended already
        let _ = self.child.wait();
        if thread::panicking() {
            eprintln!(
                "the log of process {}: {:#?}",
                self.process_id(),
                self.new_log()
            );
        }
    }
}

/// Spawns from a thread that lives as long as this process: for Linux the parent of a process is a
/// thread, and `--pdeathsig` kills the child when that thread ends.
fn spawn(command: process::Command) -> io::Result<Child> {
    type SpawnRequest = (process::Command, Sender<io::Result<Child>>);
    static SPAWNER: OnceLock<Sender<SpawnRequest>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (spawner, requests) = unbounded::<SpawnRequest>();
        thread::spawn(move || {
            for (mut command, reply) in requests {
                let _ = reply.send(command.spawn()); // the receiver exists: the caller waits for it
            }
        });
        spawner
    });
    let (reply, child) = unbounded();
    spawner
        .send((command, reply))
        .expect("the thread never ends");
    child.recv().expect("the thread never ends")
}

fn read_lines(pipe: impl Read + Send + 'static) -> Receiver<String> {
    let (sender, lines) = unbounded();
    thread::spawn(move || {
        for line in BufReader::new(pipe).lines().map_while(Result::ok) {
            let _ = sender.send(line); // fails if the test has dropped the program
        }
    });
    lines
}
