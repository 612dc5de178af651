//! The child processes of this process that are programs of ours, and the orphans that it adopts as
//! process 1 of a container.
//!
//! Process 1 must reap every orphan. A program of ours is reaped by its run only, which needs its
//! exit status. So each program is [added](add) when it has started, and reaped by [`reap`].

use nix::errno::Errno;
use nix::sys::wait::{waitid, waitpid, Id, WaitPidFlag};
use rpc_common::sync::lock;
use rustix::io::retry_on_intr;
use rustix::process::{Pid, WaitId, WaitIdOptions, WaitOptions};
use signal_hook::consts::SIGCHLD;
use signal_hook::iterator::{Handle, Signals};
use std::collections::BTreeSet;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::sync::Mutex;
use std::{io, panic, thread};

/// The process ids of the programs that are not reaped. Global, as the system's list of the children
/// of a process is.
static OURS: Mutex<BTreeSet<i32>> = Mutex::new(BTreeSet::new());

/// A program was started, which [`reap`] must reap.
///
/// Until this is called, the program is safe all the same: [`reap_orphans`] leaves the children of
/// other threads alone.
pub(crate) fn add(id: Pid) {
    lock(&OURS).insert(id.as_raw_pid());
}

/// Waits until a program has exited, and reaps it.
pub(crate) fn reap(id: Pid) -> io::Result<ExitStatus> {
    let exited = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
    // Without the lock. If this fails, the call below fails, too.
    let _ = retry_on_intr(|| rustix::process::waitid(WaitId::Pid(id), exited));
    // Once the program is reaped, its process id may be that of a new one.
    let mut ours = lock(&OURS);
    let status = retry_on_intr(|| rustix::process::waitpid(Some(id), WaitOptions::empty()));
    ours.remove(&id.as_raw_pid());
    match status? {
        Some((_, status)) => Ok(ExitStatus::from_raw(status.as_raw())),
        None => Err(io::ErrorKind::NotFound.into()), // only without the option that is not set
    }
}

/// Runs `work` on a thread of its own, and reaps all orphans until `work` has returned. For the main
/// thread of process 1, to which the system gives orphans.
///
/// # Errors
/// The system refuses the signal handler or the thread.
///
/// # Panics
/// If `work` panics.
pub fn reap_orphans_during<T: Send>(work: impl FnOnce() -> T + Send) -> io::Result<T> {
    let mut signals = Signals::new([SIGCHLD])?;
    let end = CloseOnDrop(signals.handle());
    reap_orphans(); // those of the program that has executed this one
    thread::scope(|scope| {
        let working =
            thread::Builder::new()
                .name("server".into())
                .spawn_scoped(scope, move || {
                    let _end = end;
                    work()
                })?;
        signals.forever().for_each(|_| reap_orphans());
        Ok(working
            .join()
            .unwrap_or_else(|cause| panic::resume_unwind(cause)))
    })
}

/// Ends a wait for signals when it is dropped.
struct CloseOnDrop(Handle);

impl Drop for CloseOnDrop {
    fn drop(&mut self) {
        self.0.close();
    }
}

/// Reaps the orphans that have exited.
fn reap_orphans() {
    // A child of the main thread is an orphan, or a program whose thread has ended. Programs of other
    // threads, which may stay unreaped for a while, hide no orphan.
    let of_this_thread = WaitPidFlag::__WNOTHREAD | WaitPidFlag::WNOHANG;
    let look = of_this_thread | WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT;
    loop {
        let ours = lock(&OURS);
        let reaped = match waitid(Id::All, look) {
            Ok(exited) => match exited.pid() {
                Some(pid) if !ours.contains(&pid.as_raw()) => waitpid(pid, Some(of_this_thread)),
                _ => return,
            },
            // nix does not know the real-time signal that ended this one.
            Err(Errno::EINVAL) => waitpid(None, Some(of_this_thread)),
            Err(_) => return, // there are no children
        };
        drop(ours);
        log::debug!("reaped an orphan: {reaped:?}");
    }
}
