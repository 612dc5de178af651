//! The source of `--data` and `--lines`: a file or standard input.

use rpc_common::stdio;
use rpc_common::text::{describe_io_error, escape};
use std::ffi::OsString;
use std::fmt::{self, Display};
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, ErrorKind, Read};
use std::os::unix::fs::FileTypeExt;
use std::path::PathBuf;

/// A file or standard input.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    StandardInput,
    File(PathBuf),
}

impl From<OsString> for Source {
    fn from(name: OsString) -> Self {
        match name.as_encoded_bytes() {
            b"-" => Source::StandardInput,
            _ => Source::File(name.into()),
        }
    }
}

/// The source's name in messages.
impl Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Source::StandardInput => f.write_str("standard input"),
            Source::File(path) => write!(f, "'{}'", escape(path.as_os_str().as_encoded_bytes())),
        }
    }
}

/// A file or standard input that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("cannot read {name}: {reason}")]
pub(crate) struct Unreadable {
    name: String,
    reason: String,
}

/// Reason to refuse a request of more than [`MAX_SIZE`](rpc_common::options::MAX_SIZE).
pub(crate) const TOO_LARGE: &str = "larger than 512MiB, RabbitMQ's limit";

impl Source {
    /// Checks that the source can be read. Returns its size in bytes; 0 if the size is not known.
    pub(crate) fn validate(&self) -> Result<u64, Unreadable> {
        let Source::File(path) = self else {
            return Ok(0);
        };
        let check = || {
            let metadata = fs::metadata(path)?;
            match metadata.file_type() {
                kind if kind.is_dir() => Err(ErrorKind::IsADirectory.into()),
                // Opened in its turn only: this waits for its writer, who notices if it is closed
                // again.
                kind if kind.is_fifo() => Ok(0),
                _ => File::open(path).map(|_| metadata.len()),
            }
        };
        check().map_err(|error| self.unreadable(&error))
    }

    pub(crate) fn open(&self) -> Result<Box<dyn BufRead>, Unreadable> {
        Ok(match self {
            Source::StandardInput => Box::new(BufReader::new(stdio::stdin())),
            Source::File(path) => Box::new(BufReader::new(
                File::open(path).map_err(|error| self.unreadable(&error))?,
            )),
        })
    }

    /// Reads all of it, if that is at most `max` bytes.
    pub(crate) fn read_up_to(&self, max: usize) -> Result<Vec<u8>, Unreadable> {
        let mut bytes = Vec::new();
        let result = self.open()?.take(max as u64 + 1).read_to_end(&mut bytes);
        result.map_err(|error| self.unreadable(&error))?;
        if bytes.len() > max {
            return Err(self.too_large());
        }
        Ok(bytes)
    }

    pub(crate) fn unreadable(&self, error: &io::Error) -> Unreadable {
        Unreadable {
            name: self.to_string(),
            reason: describe_io_error(error),
        }
    }

    pub(crate) fn too_large(&self) -> Unreadable {
        Unreadable {
            name: self.to_string(),
            reason: TOO_LARGE.into(),
        }
    }
}
