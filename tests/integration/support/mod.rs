//! What the tests use: a broker, the programs, a proxy, and peers that speak plain AMQP.

pub(crate) mod broker;
pub(crate) mod broker_features;
pub(crate) mod certificates;
pub(crate) mod peer;
pub(crate) mod programs;
pub(crate) mod proxy;
pub(crate) mod raw_peer;
pub(crate) mod scripted_broker;
pub(crate) mod served;

use rustix::process::Pid;
use std::path::PathBuf;
use std::time::{Duration, Instant};
use std::{env, fs, process, thread};

/// The limit of every wait for something that is expected to happen. Only a failing test reaches
/// it.
pub(crate) const TEST_TIMEOUT: Duration = Duration::from_secs(60);

/// Calls `poll` until it returns a value, and fails after [`TEST_TIMEOUT`].
#[track_caller]
pub(crate) fn eventually<T>(what: &str, mut poll: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(value) = poll() {
            return value;
        }
        assert!(
            start.elapsed() < TEST_TIMEOUT,
            "timed out after {TEST_TIMEOUT:?}: {what}"
        );
        thread::sleep(Duration::from_millis(5));
    }
}

/// A folder for the files of one test, which is removed when this is dropped.
pub(crate) struct Folder(PathBuf);

impl Folder {
    pub(crate) fn new(test: &str) -> Self {
        let folder = env::temp_dir().join(format!("rpc-tests-{test}-{}", process::id()));
        fs::create_dir(&folder).expect("the folder is new");
        Folder(folder)
    }

    pub(crate) fn path(&self, name: &str) -> String {
        self.0
            .join(name)
            .to_str()
            .expect("the temporary folder is UTF-8")
            .to_owned()
    }

    /// The process ids that programs have written to a file, once there are this many.
    pub(crate) fn process_ids(&self, name: &str, count: usize) -> Vec<Pid> {
        eventually("the process ids", || {
            let text = fs::read_to_string(self.0.join(name)).unwrap_or_default();
            let is_complete = text.lines().count() == count && text.ends_with('\n');
            is_complete.then(|| {
                text.lines()
                    .map(|id| Pid::from_raw(id.parse().unwrap()).unwrap())
                    .collect()
            })
        })
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
