//! The function that is served: from a request to a reply, without AMQP.

use crate::cancel::Cancel;
use crate::signals::Stop;
use rpc_common::fib::fib;
use rpc_common::fib::{parse_number, NumberError};
use rpc_common::message::{ErrorCode, Failure, Reply, Request};
use rpc_common::text::escape;
use std::cell::Cell;
use std::os::fd::BorrowedFd;
use std::panic::{self, AssertUnwindSafe};
use std::time::Duration;

/// A **handler** is a function that can be served: it turns a request into a reply, on any thread.
/// A closure is a handler.
///
/// ```
/// use rpc_common::message::{Failure, Request};
/// use rpc_server::{Caller, Handler};
///
/// let upper: &dyn Handler = &|request: &Request, _: &Caller| {
///     let text = request.text()?; // not UTF-8: the error invalid-argument
///     if text.is_empty() {
///         return Err(Failure::new("empty".into(), "there is no text"));
///     }
///     Ok(text.to_uppercase().into())
/// };
/// assert!(upper.is_ready());
/// ```
pub trait Handler: Sync {
    /// Handles a request.
    ///
    /// # Errors
    /// The failure that the caller gets.
    fn handle(&self, request: &Request, caller: &Caller) -> Reply;

    /// Whether the function can handle a request at the moment. A worker asks before each request;
    /// while it is not so, the worker takes none, and gives those that it has taken back.
    fn is_ready(&self) -> bool {
        true
    }

    /// Waits until the function [`is_ready`](Self::is_ready), or until it is time to stop.
    fn wait_until_ready(&self, _stop: &Stop) {}
}

impl<Function: Fn(&Request, &Caller) -> Reply + Sync> Handler for Function {
    fn handle(&self, request: &Request, caller: &Caller) -> Reply {
        self(request, caller)
    }
}

/// The **caller** of a request, for functions that take long.
pub struct Caller<'a> {
    is_gone: &'a dyn Fn() -> bool,
    cancel: &'a Cancel,
    is_given_back: Cell<bool>,
}

impl<'a> Caller<'a> {
    pub(crate) fn new(is_gone: &'a dyn Fn() -> bool, cancel: &'a Cancel) -> Self {
        Caller {
            is_gone,
            cancel,
            is_given_back: Cell::new(false),
        }
    }

    /// Whether the caller has gone: the broker says that the queue for the reply no longer exists.
    /// Asks the broker, but not more often than is of use; a caller whose broker does not answer is
    /// not known to have gone.
    pub fn is_gone(&self) -> bool {
        (self.is_gone)()
    }

    /// Whether the server gives this request up, because it stops. A function that takes long may
    /// end early then, and [give the request back](Self::give_back).
    pub fn is_cancelled(&self) -> bool {
        self.cancel.is_cancelled()
    }

    /// A file descriptor that poll(2) reports as ready once [`is_cancelled`](Self::is_cancelled).
    pub fn cancelled(&self) -> BorrowedFd<'_> {
        self.cancel.reader()
    }

    /// Sleeps for this duration. Returns false if the request [`is_cancelled`](Self::is_cancelled).
    pub fn sleep(&self, duration: Duration) -> bool {
        self.cancel.wait(duration);
        !self.is_cancelled()
    }

    /// Gives the request back to the queue, for another server. The reply to it is dropped.
    pub fn give_back(&self) {
        self.is_given_back.set(true);
    }

    pub(crate) fn is_given_back(&self) -> bool {
        self.is_given_back.get()
    }
}

/// Calls the handler. A panic becomes the failure `internal`; its message is in the server's log
/// only.
pub(crate) fn call(handler: &dyn Handler, request: &Request, caller: &Caller) -> Reply {
    // A handler whose state a panic can break must handle that itself, as with a poisoned mutex.
    let reply = panic::catch_unwind(AssertUnwindSafe(|| handler.handle(request, caller)));
    reply.unwrap_or_else(|_| {
        Err(Failure::new(
            ErrorCode::Internal,
            "internal error: the function failed, see the server's log",
        ))
    })
}

/// A handler for fib(n), exact, up to `max_n`.
///
/// It calls `on_request` with each n that it serves, and sleeps for `delay`, so that fair dispatch
/// can be watched.
pub fn fib_handler(max_n: u64, delay: Duration, on_request: impl Fn(u64) + Sync) -> impl Handler {
    move |request: &Request, caller: &Caller| -> Reply {
        let n = parse_argument(request.body, max_n)?;
        on_request(n);
        if !delay.is_zero() && !caller.sleep(delay) {
            caller.give_back();
        }
        Ok(fib(n).to_string().into())
    }
}

fn parse_argument(body: &[u8], max_n: u64) -> Result<u64, Failure> {
    let (code, message) = match parse_number(body) {
        Ok(n) if n <= max_n => return Ok(n),
        Ok(n) => (
            ErrorCode::OutOfRange,
            format!("out of range: {n} is larger than {max_n}, the largest n served here"),
        ),
        Err(error @ NumberError::TooLarge) => (
            ErrorCode::OutOfRange,
            format!("out of range: {} is {error}", escape(body)),
        ),
        Err(error @ NumberError::Malformed) => {
            let start = escape(&body[..body.len().min(21)]);
            (
                ErrorCode::InvalidArgument,
                format!("invalid argument: '{start}' is {error}"),
            )
        }
    };
    Err(Failure::new(code, message))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU64, Ordering};

    fn ask(handler: &dyn Handler, body: &[u8]) -> Reply {
        call(
            handler,
            &Request {
                body,
                ..Request::default()
            },
            &Caller::new(&|| false, &Cancel::new().unwrap()),
        )
    }

    #[test]
    fn fib_is_served_and_announced() {
        let announced = AtomicU64::new(0);
        let handler = fib_handler(100, Duration::ZERO, |n| {
            announced.store(n, Ordering::Relaxed);
        });
        assert_eq!(ask(&handler, b"30"), Ok("832040".to_owned().into()));
        assert_eq!(announced.load(Ordering::Relaxed), 30);
    }

    #[test]
    fn what_is_no_number_or_too_large_is_a_failure_with_its_code() {
        let handler = fib_handler(100, Duration::ZERO, |n| panic!("announced {n}"));
        for (body, code, message) in [
            (
                "abc",
                ErrorCode::InvalidArgument,
                "invalid argument: 'abc' is not a whole number (digits only, such as 30)",
            ),
            (
                "101",
                ErrorCode::OutOfRange,
                "out of range: 101 is larger than 100, the largest n served here",
            ),
            (
                "18446744073709551616",
                ErrorCode::OutOfRange,
                "out of range: 18446744073709551616 is too large (at most 18446744073709551615)",
            ),
        ] {
            assert_eq!(
                ask(&handler, body.as_bytes()),
                Err(Failure::new(code, message))
            );
        }
    }

    #[test]
    fn a_panic_is_contained() {
        let failure = ask(&|_: &Request, _: &Caller| panic!("on purpose"), b"1").unwrap_err();
        assert_eq!(failure.code, ErrorCode::Internal);
        assert!(
            !failure.message.contains("on purpose"),
            "the detail belongs to the log"
        );
    }
}
