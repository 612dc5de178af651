//! The processes of programs: each has a session and a process group of its own.
//!
//! Without a session of its own, a program of a server in a terminal that asks on /dev/tty (git,
//! ssh, sudo) is stopped by the kernel, and waits without a word. posix_spawn(3) makes the session
//! (`POSIX_SPAWN_SETSID`), and costs as much as `std::process::Command`, which cannot.

use super::children;
use nix::errno::Errno;
use nix::spawn::{posix_spawn, PosixSpawnAttr, PosixSpawnFileActions, PosixSpawnFlags};
use nix::sys::signal;
use rpc_common::sync::lock;
use rustix::fs::{fcntl_setfl, OFlags};
use rustix::pipe::{pipe_with, PipeFlags};
use rustix::process::{kill_process_group, pidfd_open, Pid, PidfdFlags, Signal};
use std::collections::HashSet;
use std::ffi::{CStr, CString};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::ExitStatus;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Flag of posix_spawn(3) of glibc and musl: the process gets a session, and with it a process
/// group, of its own.
const POSIX_SPAWN_SETSID: i32 = 0x80;

/// Maximum time in which a start is tried again when the system is out of processes, memory or file
/// descriptors.
const START_TIMEOUT: Duration = Duration::from_secs(1);

/// Pause between two tries of a start.
const START_PAUSE: Duration = Duration::from_millis(50);

/// Maximum time that the second signal waits for starts in progress: a start may hang where the
/// program is on a network filesystem.
const KILL_TIMEOUT: Duration = Duration::from_secs(1);

/// A command: a path, and what execve(2) takes.
pub(crate) struct Invocation<'a> {
    pub(crate) path: &'a CStr,
    pub(crate) args: &'a [CString],
    pub(crate) environment: &'a [&'a CStr],
}

/// The process groups of the runs.
#[derive(Default)]
pub(crate) struct Groups {
    state: Mutex<State>,
    /// Notified when a start has ended.
    has_started: Condvar,
}

#[derive(Default)]
struct State {
    running: HashSet<Pid>,
    /// Number of starts in progress.
    starting: u32,
    /// Whether [`Groups::kill_all`] was called.
    is_killed: bool,
}

impl Groups {
    /// Kills all runs. None of them returns, and none begins: rpc-server is about to exit, and
    /// their requests must not be answered.
    pub(crate) fn kill_all(&self) {
        let mut state = lock(&self.state);
        state.is_killed = true;
        for group in &state.running {
            signal_group(*group, Signal::KILL);
        }
        // What starts meanwhile is killed by the thread that starts it.
        let is_starting = |state: &mut State| state.starting > 0;
        let waited = self
            .has_started
            .wait_timeout_while(state, KILL_TIMEOUT, is_starting);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }

    /// Starts a process. Other threads start theirs meanwhile: an exec may take long.
    fn start(&self, start: impl FnOnce() -> io::Result<Pid>) -> io::Result<Pid> {
        self.lock_or_park().starting += 1;
        let started = start();
        let mut state = lock(&self.state);
        if let Ok(group) = started {
            state.running.insert(group);
            if state.is_killed {
                signal_group(group, Signal::KILL);
            }
        }
        state.starting -= 1;
        drop(state);
        self.has_started.notify_all();
        drop(self.lock_or_park());
        started
    }

    /// Removes a group before its number can belong to others.
    fn remove(&self, group: Pid) {
        self.lock_or_park().running.remove(&group);
    }

    fn lock_or_park(&self) -> MutexGuard<'_, State> {
        let state = lock(&self.state);
        if !state.is_killed {
            return state;
        }
        drop(state);
        loop {
            thread::park(); // until rpc-server exits
        }
    }
}

/// Sends a signal to a process group that may have ended.
fn signal_group(group: Pid, signal: Signal) {
    let _ = kill_process_group(group, signal);
}

/// Our ends of the pipes of a process, which do not block.
pub(crate) struct Pipes {
    pub(crate) stdin: File,
    pub(crate) stdout: File,
    pub(crate) stderr: File,
}

/// A program's process. Its end is also that of its group.
pub(crate) struct Process {
    /// The process id, which is also that of the group.
    id: Pid,
    groups: Arc<Groups>,
    /// Readable when the process has exited.
    pidfd: Arc<OwnedFd>,
    /// Whether the process is reaped, or given up.
    is_released: bool,
}

impl Process {
    /// Starts a process. Tries again for a short time where the system is out of something.
    ///
    /// # Errors
    /// The error of posix_spawn(3), which says why exec failed.
    pub(crate) fn start(
        invocation: &Invocation,
        groups: &Arc<Groups>,
    ) -> io::Result<(Self, Pipes)> {
        let begun = Instant::now();
        loop {
            match Process::try_start(invocation, groups) {
                Err(error) if is_temporary(&error) && begun.elapsed() < START_TIMEOUT => {
                    thread::sleep(START_PAUSE);
                }
                result => return result,
            }
        }
    }

    fn try_start(invocation: &Invocation, groups: &Arc<Groups>) -> io::Result<(Self, Pipes)> {
        let [(stdin, ours_in), (ours_out, stdout), (ours_err, stderr)] =
            [pipe()?, pipe()?, pipe()?];
        let mut actions = PosixSpawnFileActions::init()?;
        for (fd, number) in [(&stdin, 0), (&stdout, 1), (&stderr, 2)] {
            actions.add_dup2(fd.as_raw_fd(), number)?;
        }
        let mut attributes = PosixSpawnAttr::init()?;
        attributes.set_flags(
            PosixSpawnFlags::POSIX_SPAWN_SETSIGDEF
                | PosixSpawnFlags::POSIX_SPAWN_SETSIGMASK
                | PosixSpawnFlags::from_bits_retain(POSIX_SPAWN_SETSID),
        )?;
        // Rust's runtime ignores SIGPIPE.
        attributes.set_sigdefault(&signal::Signal::SIGPIPE.into())?;
        attributes.set_sigmask(&signal::SigSet::empty())?;
        let Invocation {
            path,
            args,
            environment,
        } = invocation;
        let id = groups.start(|| {
            let id = posix_spawn(*path, &actions, &attributes, args, environment)?;
            let id = Pid::from_raw(id.as_raw()).expect("a process id is not 0");
            children::add(id);
            Ok(id)
        })?;
        let pidfd = pidfd_open(id, PidfdFlags::empty()).inspect_err(|_| {
            signal_group(id, Signal::KILL);
            groups.remove(id);
            let _ = children::reap(id);
        })?;
        let process = Process {
            id,
            groups: groups.clone(),
            pidfd: pidfd.into(),
            is_released: false,
        };
        for pipe in [&ours_in, &ours_out, &ours_err] {
            fcntl_setfl(pipe, OFlags::NONBLOCK)?;
        }
        let pipes = Pipes {
            stdin: ours_in.into(),
            stdout: ours_out.into(),
            stderr: ours_err.into(),
        };
        Ok((process, pipes))
    }

    /// The process id.
    pub(crate) fn number(&self) -> i32 {
        self.id.as_raw_pid()
    }

    /// Whether the process is reaped or given up: then its process id may be that of another one.
    pub(crate) fn is_released(&self) -> bool {
        self.is_released
    }

    /// A file that is readable when the process has exited.
    pub(crate) fn exit_fd(&self) -> &Arc<OwnedFd> {
        &self.pidfd
    }

    /// Sends a signal to the group. A group that was stopped by a signal is continued to handle
    /// SIGTERM.
    pub(crate) fn signal(&self, signal: Signal) {
        signal_group(self.id, signal);
        if signal == Signal::TERM {
            signal_group(self.id, Signal::CONT);
        }
    }

    /// Waits for the end of the process.
    pub(crate) fn reap(&mut self) -> io::Result<ExitStatus> {
        self.groups.remove(self.id);
        self.is_released = true;
        children::reap(self.id)
    }

    /// Gives up a process that cannot be killed: it belongs to another user, or hangs in the
    /// kernel. It is reaped when it ends.
    pub(crate) fn leave_alone(&mut self) {
        log::warn!(
            "process {} cannot be killed, and is left alone",
            self.number()
        );
        self.groups.remove(self.id);
        self.is_released = true;
        let id = self.id;
        // Without a thread for it, the process is not reaped.
        let _ = thread::Builder::new().spawn(move || children::reap(id));
    }
}

impl Drop for Process {
    /// Ends a process that is not reaped, after an error.
    fn drop(&mut self) {
        if !self.is_released {
            self.signal(Signal::KILL);
            let _ = self.reap();
        }
    }
}

fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(pipe_with(PipeFlags::CLOEXEC)?)
}

/// Whether a start may succeed a short time later.
fn is_temporary(error: &io::Error) -> bool {
    let errno = error.raw_os_error().map(Errno::from_raw);
    matches!(
        errno,
        Some(Errno::EAGAIN | Errno::ENOMEM | Errno::EMFILE | Errno::ENFILE | Errno::ETXTBSY)
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crossbeam_channel::bounded;
    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;

    /// A process in a group of its own, as posix_spawn(3) makes it.
    fn sleeping() -> Pid {
        use std::os::unix::process::CommandExt;
        let child = Command::new("sleep").arg("1000").process_group(0).spawn();
        Pid::from_child(&child.unwrap())
    }

    #[test]
    fn a_start_that_takes_long_stops_neither_the_others_nor_the_second_signal() {
        let groups: &Groups = Box::leak(Box::default()); // the threads below never end
        let (begun, has_begun) = bounded(0);
        let (end, has_ended) = bounded::<()>(0);
        let (slow_id, slow_ids) = bounded(1);
        thread::spawn(move || {
            groups.start(|| {
                begun.send(()).unwrap();
                has_ended.recv().unwrap();
                let id = sleeping();
                slow_id.send(id).unwrap();
                Ok(id)
            })
        });
        has_begun.recv().unwrap();
        let id = groups.start(|| Ok(sleeping())).unwrap();
        groups.kill_all();
        assert_eq!(children::reap(id).unwrap().signal(), Some(9));
        // The start that was in progress is killed by its thread.
        end.send(()).unwrap();
        assert_eq!(
            children::reap(slow_ids.recv().unwrap()).unwrap().signal(),
            Some(9)
        );
    }
}
