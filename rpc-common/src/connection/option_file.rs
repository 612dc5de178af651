//! The files that options name: passwords, certificates and keys.

use super::deadline::Deadline;
use super::error::ErrorKind;
use crate::sync::lock;
use crate::text::{describe_io_error, format_duration};
use rustix::event::PollFlags;
use rustix::fs::{open, Mode, OFlags};
use std::ffi::OsString;
use std::fmt::{self, Debug};
use std::fs::{self, File};
use std::io::{self, Read};
use std::mem;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

/// Maximum size of an option file in bytes: `/dev/zero` has no end.
const MAX_SIZE: usize = 16 << 20;

/// Number of bytes that one read of a pipe asks for.
const READ_SIZE: usize = 4 << 10;

/// An **option file** is a file that an option names.
///
/// A regular file is read for each connection: it may have changed. Anything else, such as a pipe,
/// can be read only once: its contents are kept, and clones share them.
#[derive(Clone)]
pub(crate) struct OptionFile {
    path: PathBuf,
    pipe: Arc<Mutex<PipeState>>,
}

/// The state of a file that is not a regular file.
#[derive(Default)]
enum PipeState {
    #[default]
    NotOpened,
    /// Opened, with the bytes that were read by now. The next attempt reads the rest.
    Opened(File, Vec<u8>),
    /// Read to its end.
    Read(Vec<u8>),
}

impl From<OsString> for OptionFile {
    fn from(path: OsString) -> Self {
        OptionFile {
            path: path.into(),
            pipe: Arc::default(),
        }
    }
}

impl Debug for OptionFile {
    /// Without the contents, which may be a password.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.path.fmt(f)
    }
}

impl OptionFile {
    /// Whether the file can be read again and again without waiting.
    ///
    /// # Errors
    /// [`ErrorKind::Configuration`] if there is no such file.
    pub(crate) fn is_rereadable(&self, option: &str) -> Result<bool, ErrorKind> {
        let metadata = fs::metadata(&self.path)
            .map_err(|error| self.bad(option, &describe_io_error(&error)))?;
        // A directory cannot be read either, but the error comes at once.
        Ok(metadata.is_file() || metadata.is_dir())
    }

    /// Reads the file, or returns the contents that were kept.
    ///
    /// # Errors
    /// [`ErrorKind::Configuration`]: the file cannot be read, or not by the deadline.
    pub(crate) fn read(&self, option: &str, deadline: &Deadline) -> Result<Vec<u8>, ErrorKind> {
        self.try_read(deadline).map_err(|error| match error.kind() {
            io::ErrorKind::TimedOut => {
                let limit = format_duration(deadline.limit());
                let reason = format!("timed out after {limit} while reading it: does a program write to it, and close it?");
                self.bad(option, &reason)
            }
            _ => self.bad(option, &describe_io_error(&error)),
        })
    }

    /// The error that the file is bad.
    pub(crate) fn bad(&self, option: &str, reason: &str) -> ErrorKind {
        ErrorKind::bad_file(option, &self.path, reason)
    }

    fn try_read(&self, deadline: &Deadline) -> io::Result<Vec<u8>> {
        // Another thread holds the lock until its own deadline at most.
        let mut pipe = lock(&self.pipe);
        if let PipeState::NotOpened = *pipe {
            // Without NONBLOCK, opening a FIFO waits for a writer.
            let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
            let file = File::from(open(&self.path, flags, Mode::empty())?);
            if file.metadata()?.is_file() {
                return read_regular(file);
            }
            *pipe = PipeState::Opened(file, Vec::new());
        }
        if let PipeState::Opened(file, contents) = &mut *pipe {
            match read_pipe(file, contents, deadline) {
                Ok(()) => *pipe = PipeState::Read(mem::take(contents)),
                Err(error) if error.kind() == io::ErrorKind::TimedOut => return Err(error),
                Err(error) => {
                    *pipe = PipeState::NotOpened;
                    return Err(error);
                }
            }
        }
        match &*pipe {
            PipeState::Read(contents) => Ok(contents.clone()),
            PipeState::NotOpened | PipeState::Opened(..) => unreachable!("it was read above"),
        }
    }
}

fn read_regular(file: File) -> io::Result<Vec<u8>> {
    let mut contents = Vec::new();
    file.take(MAX_SIZE as u64 + 1).read_to_end(&mut contents)?;
    check_size(&contents)?;
    Ok(contents)
}

/// Reads to the end, and appends to `contents`. Fails with `TimedOut` when the deadline passes.
fn read_pipe(file: &mut File, contents: &mut Vec<u8>, deadline: &Deadline) -> io::Result<()> {
    let mut buffer = [0; READ_SIZE];
    loop {
        // Reading a FIFO that no writer has opened yet reports the end; polling waits for a writer.
        deadline.wait_for(&*file, PollFlags::IN)?;
        match file.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(len) => contents.extend_from_slice(&buffer[..len]),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
        check_size(contents)?;
    }
}

fn check_size(contents: &[u8]) -> io::Result<()> {
    if contents.len() > MAX_SIZE {
        return Err(io::Error::other(format!(
            "larger than {} MiB",
            MAX_SIZE >> 20
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{mknodat, FileType, CWD};
    use std::fs::OpenOptions;
    use std::io::Write;
    use std::time::Duration;
    use std::{env, process, thread};

    /// A file in the temporary folder, removed when this is dropped.
    struct TestFile(PathBuf);

    impl TestFile {
        fn named(test: &str) -> Self {
            TestFile(env::temp_dir().join(format!("rpc-common-{test}-{}", process::id())))
        }

        fn fifo(test: &str) -> Self {
            let file = TestFile::named(test);
            mknodat(CWD, &file.0, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)
                .expect("the folder is writable");
            file
        }

        fn option(&self) -> OptionFile {
            self.0.clone().into_os_string().into()
        }
    }

    impl Drop for TestFile {
        fn drop(&mut self) {
            let _ = fs::remove_file(&self.0);
        }
    }

    fn soon() -> Deadline {
        Deadline::after(Duration::from_millis(50))
    }

    fn later() -> Deadline {
        Deadline::after(Duration::from_secs(30))
    }

    fn error(file: &OptionFile) -> String {
        file.read("--ca-file", &soon()).unwrap_err().to_string()
    }

    #[test]
    fn a_regular_file_is_read_again() {
        let file = TestFile::named("regular");
        let option = file.option();
        for contents in ["first", "second"] {
            fs::write(&file.0, contents).unwrap();
            assert_eq!(option.is_rereadable("--ca-file"), Ok(true));
            assert_eq!(
                option.read("--ca-file", &soon()).unwrap(),
                contents.as_bytes()
            );
        }
    }

    #[test]
    fn a_fifo_is_read_once_and_kept_for_all_clones() {
        let file = TestFile::fifo("kept");
        let option = file.option();
        assert_eq!(option.is_rereadable("--ca-file"), Ok(false));
        let path = file.0.clone();
        let writer = thread::spawn(move || fs::write(path, "sesame"));
        let clone = option.clone();
        assert_eq!(option.read("--ca-file", &later()).unwrap(), b"sesame");
        writer.join().unwrap().unwrap();
        assert_eq!(clone.read("--ca-file", &soon()).unwrap(), b"sesame");
    }

    #[test]
    fn a_fifo_without_a_writer_is_an_error_at_the_deadline() {
        let file = TestFile::fifo("silent");
        let expected = format!(
            "--ca-file {}: timed out after 50ms while reading it: does a program write to it, and close it?",
            file.0.display()
        );
        assert_eq!(error(&file.option()), expected);
    }

    #[test]
    fn what_was_read_before_the_deadline_is_not_lost() {
        let file = TestFile::fifo("slow");
        let option = file.option();
        assert!(error(&option).contains("timed out"));
        let mut writer = OpenOptions::new().write(true).open(&file.0).unwrap();
        writer.write_all(b"ses").unwrap();
        assert!(error(&option).contains("timed out"));
        writer.write_all(b"ame").unwrap();
        drop(writer);
        assert_eq!(option.read("--ca-file", &later()).unwrap(), b"sesame");
    }

    #[test]
    fn a_file_without_an_end_a_directory_and_a_missing_file_are_errors() {
        for (path, reason) in [
            ("/dev/zero", "larger than 16 MiB"),
            ("/", "is a directory"),
            ("/no/such/file", "no such file or directory"),
        ] {
            let option = OptionFile::from(OsString::from(path));
            let error = option.read("--ca-file", &later()).unwrap_err().to_string();
            assert_eq!(error, format!("--ca-file {path}: {reason}"));
        }
    }

    #[test]
    fn debug_shows_no_contents() {
        let file = TestFile::fifo("debug");
        let option = file.option();
        let path = file.0.clone();
        let writer = thread::spawn(move || fs::write(path, "sesame"));
        option.read("--ca-file", &later()).unwrap();
        writer.join().unwrap().unwrap();
        assert!(!format!("{option:?}").contains("sesame"));
    }
}
