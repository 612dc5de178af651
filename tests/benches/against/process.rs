//! Running programs: to their end with a limit, or in the background until they are dropped.

use anyhow::{bail, ensure, Context, Result};
use rustix::process::{kill_process, Pid, Signal};
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

/// How long anything may take. Reached only by a program that hangs.
const PATIENCE: Duration = Duration::from_secs(300);

/// What a program wrote that ran to its end.
pub(crate) struct Output {
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// Runs a program to its end, which has to be a good one.
///
/// Nothing is put around it that would be measured with it. Ctrl-C reaches it as it reaches us; and it
/// ends at the latest when the broker does, because it is a client.
pub(crate) fn run(command: Command, stdin: &[u8]) -> Result<Output> {
    let what = format!("{command:?}");
    let output = assert_cmd::Command::from_std(command)
        .write_stdin(stdin)
        .timeout(PATIENCE)
        .output()
        .with_context(|| what.clone())?;
    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
    let stderr = text(&output.stderr);
    ensure!(output.status.success(), "{what}: {}: {stderr}", output.status);
    Ok(Output { stdout: text(&output.stdout), stderr })
}

/// The command behind other words, as `time` or `valgrind` take it.
pub(crate) fn behind(words: &[&str], command: &Command) -> Command {
    let mut whole = Command::new(words[0]);
    whole.args(&words[1..]).arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => whole.env(name, value),
            None => whole.env_remove(name),
        };
    }
    whole
}

/// A server in the background. It is killed when it is dropped, or when this process ends.
pub(crate) struct Server(Child);

impl Server {
    /// Starts it and waits until it serves.
    ///
    /// To the system its parent is the thread that starts it: that must be one that lives as long as this
    /// process, and here it is the main one.
    pub(crate) fn start(command: &Command) -> Result<Self> {
        let child = behind(&["setpriv", "--pdeathsig", "KILL"], command)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("setpriv, of util-linux")?;
        let mut server = Server(child);
        let stdout = BufReader::new(server.0.stdout.take().context("piped")?);
        let (sender, lines) = mpsc::channel();
        thread::spawn(move || {
            // To the end: a server must not wait for a reader.
            stdout.lines().map_while(Result::ok).for_each(|line| drop(sender.send(line)));
        });
        match lines.recv_timeout(PATIENCE) {
            Ok(line) if line == " [x] Awaiting RPC requests" => Ok(server),
            Ok(line) => bail!("{command:?}: it said '{line}' where it should await requests"),
            Err(_) => bail!("{command:?}: it does not serve; what it says above is missing"),
        }
    }

    /// Asks it to stop, and waits until it has.
    pub(crate) fn stop(mut self) -> Result<ExitStatus> {
        kill_process(Pid::from_child(&self.0), Signal::TERM)?;
        let start = Instant::now();
        loop {
            if let Some(status) = self.0.try_wait()? {
                return Ok(status);
            }
            ensure!(start.elapsed() < PATIENCE, "a server does not stop");
            thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill(); // fails when it has ended already
        let _ = self.0.wait();
    }
}
