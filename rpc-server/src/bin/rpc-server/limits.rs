//! The limit of open files, which many workers reach.

use rpc_common::text::describe_io_error;
use rustix::process::{getrlimit, setrlimit, Resource, Rlimit};

/// Number of open files that a worker needs at most: the pipes of a program and their other ends
/// while it starts, and its pidfd.
const FILES_PER_WORKER: u64 = 8;

/// Number of open files that a server needs besides: connections, the log, metrics.
const FURTHER_FILES: u64 = 64;

/// Raises the soft limit of open files to what the workers need, or to the hard limit if that is
/// lower. Programs inherit the limit, so it is not raised further: select(2) fails above 1,024.
pub(crate) fn raise_open_files(workers: usize) {
    let limit = getrlimit(Resource::Nofile);
    let needed = files_needed(workers);
    if let Some(raised) = raised(limit, needed) {
        if let Err(error) = setrlimit(Resource::Nofile, raised) {
            let reason = describe_io_error(&error.into());
            log::warn!("cannot raise the limit of open files to {needed}: {reason}");
        }
    }
    if let Some(hard) = limit.maximum.filter(|hard| *hard < needed) {
        log::warn!(
            "{workers} workers need {needed} open files, and the hard limit is {hard}: requests may fail with 'unavailable'; reduce --workers, or raise the limit (ulimit -Hn, or LimitNOFILE of the unit)"
        );
    }
}

/// Number of open files that a server with this many workers needs.
fn files_needed(workers: usize) -> u64 {
    FILES_PER_WORKER * workers as u64 + FURTHER_FILES
}

/// The limit that is to be set. `None` if it need not, or cannot, be raised.
fn raised(limit: Rlimit, needed: u64) -> Option<Rlimit> {
    let wanted = limit.maximum.map_or(needed, |hard| hard.min(needed));
    let current = Some(wanted).filter(|wanted| limit.current.is_some_and(|soft| soft < *wanted))?;
    Some(Rlimit {
        current: Some(current),
        maximum: limit.maximum,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_is_raised_to_what_is_needed_within_the_hard_limit() {
        let limit = |current, maximum| Rlimit { current, maximum };
        let soft = |limit| raised(limit, 3264).map(|raised| (raised.current, raised.maximum));
        let hard = Some(524_288);
        assert_eq!(soft(limit(Some(1024), hard)), Some((Some(3264), hard)));
        assert_eq!(soft(limit(Some(1024), None)), Some((Some(3264), None)));
        let low = Some(2048);
        assert_eq!(soft(limit(Some(1024), low)), Some((low, low)));
        assert_eq!(soft(limit(low, low)), None);
        assert_eq!(soft(limit(Some(4096), hard)), None);
        assert_eq!(soft(limit(None, None)), None);
        assert_eq!(files_needed(400), 3264);
    }
}
