//! Runs programs: to their end with a timeout, or in the background until they are dropped.

use anyhow::{bail, ensure, Context, Result};
use rustix::process::{kill_process, Pid, Signal};
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};
use std::{fs, thread};

/// The limit of every wait for a program. Only a program that hangs reaches it.
const PROCESS_TIMEOUT: Duration = Duration::from_secs(300);

/// The output of a program that has ended.
pub(crate) struct Output {
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// Runs a program to its end, and fails unless its exit code is 0.
///
/// No other program is wrapped around it, because that would be measured, too. Ctrl-C also ends the
/// program, and it ends at the latest with the broker, because it is a client.
pub(crate) fn run(command: Command, stdin: &[u8]) -> Result<Output> {
    let what = format!("{command:?}");
    let output = assert_cmd::Command::from_std(command)
        .write_stdin(stdin)
        .timeout(PROCESS_TIMEOUT)
        .output()
        .with_context(|| what.clone())?;
    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
    let stderr = text(&output.stderr);
    ensure!(
        output.status.success(),
        "{what}: {}: {stderr}",
        output.status
    );
    Ok(Output {
        stdout: text(&output.stdout),
        stderr,
    })
}

/// The command as arguments of another one, such as `time` or `valgrind`.
pub(crate) fn wrap(prefix: &[&str], command: &Command) -> Command {
    let mut outer = Command::new(prefix[0]);
    outer
        .args(&prefix[1..])
        .arg(command.get_program())
        .args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => outer.env(name, value),
            None => outer.env_remove(name),
        };
    }
    outer
}

/// A server in the background. It is killed when it is dropped, or when this process ends.
pub(crate) struct Server(Child);

impl Server {
    /// Starts it, and waits until it serves.
    ///
    /// The caller must be the main thread: for Linux the parent of a process is a thread, and
    /// `--pdeathsig` kills the child when that thread ends.
    pub(crate) fn start(command: &Command) -> Result<Self> {
        let child = wrap(&["setpriv", "--pdeathsig", "KILL"], command)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("setpriv, of util-linux")?;
        let mut server = Server(child);
        let stdout = BufReader::new(server.0.stdout.take().context("piped")?);
        let (sender, lines) = mpsc::channel();
        thread::spawn(move || {
            // Reads to the end, so that the server never waits for a reader.
            stdout
                .lines()
                .map_while(Result::ok)
                .for_each(|line| drop(sender.send(line)));
        });
        match lines.recv_timeout(PROCESS_TIMEOUT) {
            Ok(line) if line == " [x] Awaiting RPC requests" => Ok(server),
            Ok(line) => bail!("{command:?}: it printed '{line}' instead of awaiting requests"),
            Err(_) => bail!("{command:?}: it does not serve: see its error above"),
        }
    }

    /// The voluntary context switches of all its threads until now.
    pub(crate) fn context_switches(&self) -> Result<f64> {
        let mut all = 0.0;
        for thread in fs::read_dir(format!("/proc/{}/task", self.0.id()))? {
            let status = fs::read_to_string(thread?.path().join("status"))?;
            let count = status
                .lines()
                .find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
            all += count.context("Linux counts them")?.trim().parse::<f64>()?;
        }
        Ok(all)
    }

    /// Stops it by SIGTERM, and waits until it has ended.
    pub(crate) fn stop(mut self) -> Result<ExitStatus> {
        kill_process(Pid::from_child(&self.0), Signal::TERM)?;
        let start = Instant::now();
        loop {
            if let Some(status) = self.0.try_wait()? {
                return Ok(status);
            }
            ensure!(start.elapsed() < PROCESS_TIMEOUT, "a server does not stop");
            thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill(); // fails if it has ended already
        let _ = self.0.wait();
    }
}
