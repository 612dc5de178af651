//! The programs under test: built fresh, run with a limit, stopped whatever happens.

use super::{broker, PATIENCE};
use assert_cmd::assert::Assert;
use assert_cmd::Command;
use crossbeam_channel::{unbounded, Receiver, Sender};
use procfs::process::Process;
use rustix::process::{kill_process, Pid, Signal};
use std::io::{BufRead, BufReader, Read, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::{env, io, process, thread};

/// The folder of the programs, after making sure that they are built from this source: cargo does
/// not do so for the tests of another package.
pub(crate) fn folder() -> &'static PathBuf {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let test = env::current_exe().expect("a test has a path");
        let folder =
            test.ancestors().nth(2).expect("tests are in target/<profile>/deps").to_owned();
        let mut build = process::Command::new(env!("CARGO"));
        build.args(["build", "--quiet", "--locked", "--bins", "--examples"]);
        build.args(["-p", "rpc-server", "-p", "rpc-client"]);
        if folder.ends_with("release") {
            build.arg("--release");
        }
        assert!(build.status().expect("cargo runs").success(), "the programs do not build");
        folder
    })
}

/// A program of ours, or anything else that is run to its end, in the tests' environment.
pub(crate) fn command(program: &str) -> Command {
    let mut command = Command::new(folder().join(program));
    command.env("AMQP_URL", broker::url()).env_remove("RUST_LOG").timeout(PATIENCE);
    command
}

/// `rpc-client` on a queue.
pub(crate) fn client(queue: &str, args: &[&str]) -> Command {
    let mut command = command("rpc-client");
    command.args(["--queue", queue]).args(args);
    command
}

/// Runs a command to its end and checks all that its user sees of it.
#[track_caller]
pub(crate) fn expect(command: &mut Command, code: i32, stdout: &str, stderr: &str) {
    let (stdout, stderr) = (stdout.to_owned(), stderr.to_owned());
    command.assert().code(code).stdout(stdout).stderr(stderr);
}

/// Runs a script with our programs on the PATH.
pub(crate) fn bash(script: &str) -> Assert {
    let path = format!("{}:{}", folder().display(), env::var("PATH").unwrap_or_default());
    Command::new("bash")
        .args(["-c", script])
        .env("PATH", path)
        .env("AMQP_URL", broker::url())
        .env_remove("RUST_LOG")
        .timeout(PATIENCE)
        .assert()
}

/// A program that runs in the background. It is killed when it is dropped, or when this process ends.
pub(crate) struct Program {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: Receiver<String>,
    stderr: Receiver<String>,
}

impl Program {
    /// Starts `rpc-server` and waits until it serves.
    #[track_caller]
    pub(crate) fn start(queue: &str, args: &[&str]) -> Self {
        Program::start_at(broker::url(), queue, args)
    }

    /// The same, where the broker is reached by another URL.
    #[track_caller]
    pub(crate) fn start_at(url: &str, queue: &str, args: &[&str]) -> Self {
        let server = Program::spawn_at(url, "rpc-server", &[&["--queue", queue], args].concat());
        assert_eq!(server.next_line(), " [x] Awaiting RPC requests");
        server
    }

    /// Starts a program without waiting for anything.
    pub(crate) fn spawn(program: &str, args: &[&str]) -> Self {
        Program::spawn_at(broker::url(), program, args)
    }

    /// The same, where the broker is reached by another URL.
    pub(crate) fn spawn_at(url: &str, program: &str, args: &[&str]) -> Self {
        let mut command = process::Command::new(folder().join(program));
        command.args(args).env("AMQP_URL", url);
        Program::spawn_command(&command)
    }

    /// Starts any command without waiting for anything.
    pub(crate) fn spawn_command(command: &process::Command) -> Self {
        let mut setpriv = process::Command::new("setpriv");
        setpriv
            .args(["--pdeathsig", "KILL"])
            // What a script starts in the background ignores SIGINT, and so would its children.
            .args(["env", "--default-signal=INT"])
            .arg(command.get_program())
            .args(command.get_args())
            .envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))))
            .env_remove("RUST_LOG")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = spawn(setpriv).expect("setpriv, of util-linux, runs");
        let stdin = child.stdin.take();
        let stdout = lines(child.stdout.take().expect("piped"));
        let stderr = lines(child.stderr.take().expect("piped"));
        Program { child, stdin, stdout, stderr }
    }

    /// Writes a line to its standard input; false when it does not read any more.
    pub(crate) fn say(&mut self, line: &str) -> bool {
        self.stdin.as_mut().is_some_and(|stdin| writeln!(stdin, "{line}").is_ok())
    }

    /// Ends its standard input.
    pub(crate) fn end_input(&mut self) {
        self.stdin = None;
    }

    /// The next line of its standard output.
    #[track_caller]
    pub(crate) fn next_line(&self) -> String {
        let line = self.stdout.recv_timeout(PATIENCE);
        line.unwrap_or_else(|error| panic!("no line ({error}); the log: {:#?}", self.log()))
    }

    /// The lines of its standard output that nobody has asked for yet.
    pub(crate) fn lines_at_hand(&self) -> Vec<String> {
        self.stdout.try_iter().collect()
    }

    /// What is left of its standard output and of its log when it has ended.
    pub(crate) fn rest(&self) -> (Vec<String>, Vec<String>) {
        (self.stdout.iter().collect(), self.stderr.iter().collect())
    }

    /// The lines of its log that nobody has asked for yet.
    pub(crate) fn log(&self) -> Vec<String> {
        self.stderr.try_iter().collect()
    }

    /// Waits for a line of its log that contains `text`, and returns it.
    #[track_caller]
    pub(crate) fn await_log(&self, text: &str) -> String {
        let mut passed = Vec::new();
        while let Ok(line) = self.stderr.recv_timeout(PATIENCE) {
            if line.contains(text) {
                return line;
            }
            passed.push(line);
        }
        panic!("the log never said '{text}' but: {passed:#?}");
    }

    pub(crate) fn signal(&self, signal: Signal) {
        let pid = Pid::from_child(&self.child);
        kill_process(pid, signal).expect("the program is running");
    }

    /// Its resident memory, in KiB; 0 when it has ended.
    pub(crate) fn memory(&self) -> u64 {
        let pid = Pid::from_child(&self.child).as_raw_pid();
        let status = Process::new(pid).and_then(|process| process.status());
        status.ok().and_then(|status| status.vmrss).unwrap_or_default()
    }

    /// Waits for its end.
    #[track_caller]
    pub(crate) fn wait(&mut self) -> ExitStatus {
        super::eventually("the end of the program", || {
            self.child.try_wait().expect("it is our child")
        })
    }

    /// Waits for its end, and returns the exit code.
    #[track_caller]
    pub(crate) fn end(mut self) -> Option<i32> {
        self.wait().code()
    }

    /// Stops it gracefully, checks that it exits with 0, and returns what it printed last.
    #[track_caller]
    pub(crate) fn stop(mut self) -> Vec<String> {
        self.signal(Signal::TERM);
        assert_eq!(self.wait().code(), Some(0), "its log: {:#?}", self.log());
        self.stdout.iter().collect()
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill(); // fails when it has ended already
        let _ = self.child.wait();
    }
}

/// Spawns from a thread that lives as long as this process: to the system the parent of a process is the
/// thread that began it, and that thread's end would be its end.
fn spawn(command: process::Command) -> io::Result<Child> {
    type Order = (process::Command, Sender<io::Result<Child>>);
    static SPAWNER: OnceLock<Sender<Order>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (spawner, orders) = unbounded::<Order>();
        thread::spawn(move || {
            for (mut command, reply) in orders {
                let _ = reply.send(command.spawn()); // whoever asks waits for it
            }
        });
        spawner
    });
    let (reply, child) = unbounded();
    spawner.send((command, reply)).expect("the spawner never ends");
    child.recv().expect("the spawner never ends")
}

fn lines(pipe: impl Read + Send + 'static) -> Receiver<String> {
    let (sender, lines) = unbounded();
    thread::spawn(move || {
        for line in BufReader::new(pipe).lines().map_while(Result::ok) {
            let _ = sender.send(line); // a test that has seen enough does not listen
        }
    });
    lines
}
