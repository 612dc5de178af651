//! The error of a call, or of the whole run, with its exit code and its code in JSON.

use crate::input::BadInput;
use rpc_client::Error as CallError;
use rpc_common::exit::ExitCode;
use rpc_common::message::ErrorCode;
use rpc_common::text::describe_io_error;
use std::io;

/// The error in place of an answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The call failed.
    #[error(transparent)]
    Call(#[from] CallError),
    /// The reply cannot be an answer.
    #[error("the reply '{reply}' is {problem}: does another program serve this queue?")]
    BadReply {
        /// The reply, escaped.
        reply: String,
        problem: &'static str,
    },
    #[error(transparent)]
    BadInput(#[from] BadInput),
    #[error("cannot write to standard output: {}", describe_io_error(.0))]
    Output(io::Error),
    #[error(
        "the system provides no thread: {}: raise the limit of processes (ulimit -u)",
        describe_io_error(.0)
    )]
    NoThread(io::Error),
    /// Options that do not go together.
    #[error("{0}; see --help")]
    Usage(&'static str),
}

/// Error codes that only the client itself sets.
const CLIENT_CODES: [&str; 6] = [
    "unreachable",
    "no-server",
    "queue-full",
    "timeout",
    "bad-reply",
    "usage",
];

impl Error {
    /// The code in JSON: one of ours, or the server's. If a server uses one of ours, it is
    /// `internal`.
    pub(crate) fn code(&self) -> &str {
        match self {
            Error::Call(CallError::Connection(_)) => "unreachable",
            Error::Call(CallError::NoQueue { .. } | CallError::NoConsumers { .. }) => "no-server",
            Error::Call(CallError::QueueFull { .. }) => "queue-full",
            Error::Call(CallError::NoAnswer { .. } | CallError::RefusedAfterSend(_)) => "timeout",
            Error::Call(CallError::TooLarge { .. }) => ErrorCode::TooLarge.as_str(),
            Error::Call(CallError::Failed(failure)) => match failure.code.as_str() {
                code if CLIENT_CODES.contains(&code) => "internal",
                code => code,
            },
            Error::BadReply { .. } => "bad-reply",
            Error::BadInput(_) | Error::NoThread(_) | Error::Usage(_) => "usage",
            Error::Output(_) => "output", // in no JSON: it cannot be written
        }
    }

    pub(crate) fn exit_code(&self) -> ExitCode {
        match self {
            Error::Call(CallError::Connection(error)) => error.into(),
            Error::Call(
                CallError::NoQueue { .. }
                | CallError::NoConsumers { .. }
                | CallError::QueueFull { .. },
            ) => ExitCode::NotAccepted,
            Error::Call(CallError::NoAnswer { .. } | CallError::RefusedAfterSend(_)) => {
                ExitCode::NoAnswer
            }
            Error::Call(CallError::Failed(_) | CallError::TooLarge { .. })
            | Error::BadReply { .. } => ExitCode::RemoteError,
            Error::BadInput(_) | Error::NoThread(_) | Error::Usage(_) => ExitCode::Usage,
            Error::Output(error) if error.kind() == io::ErrorKind::BrokenPipe => {
                ExitCode::BrokenPipe
            }
            Error::Output(_) => ExitCode::Output,
        }
    }

    /// Whether the error is the same for every call, so that its message needs no number.
    pub(crate) fn concerns_every_call(&self) -> bool {
        use CallError::{Connection, NoConsumers, NoQueue, QueueFull, RefusedAfterSend};
        matches!(
            self,
            Error::Call(
                Connection(_)
                    | RefusedAfterSend(_)
                    | NoQueue { .. }
                    | NoConsumers { .. }
                    | QueueFull { .. }
            )
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rpc_common::message::Failure;

    #[test]
    fn a_server_cannot_use_the_clients_own_codes() {
        let code = |code: &str| {
            let failure = Failure::new(code.into(), "no");
            Error::Call(CallError::Failed(failure)).code().to_owned()
        };
        assert_eq!(
            [code("quota"), code("out-of-range")],
            ["quota", "out-of-range"]
        );
        assert_eq!(
            [code("unreachable"), code("timeout")],
            ["internal", "internal"]
        );
    }
}
