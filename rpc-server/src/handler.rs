//! The function that is served: from a request to a reply, without AMQP.

use rpc_common::fib::fib;
use rpc_common::fib::{parse_number, NumberError};
use rpc_common::message::{ErrorCode, Failure, Reply, Request};
use rpc_common::text::escape;
use std::panic::{self, AssertUnwindSafe};
use std::thread;
use std::time::Duration;

/// A **handler** is a function that can be served: it turns a request into a reply, on any thread.
///
/// ```
/// use rpc_common::message::{Failure, Request};
/// use rpc_server::{Caller, Handler};
///
/// let upper: &Handler = &|request: &Request, _: &Caller| {
///     let text = request.text()?; // not UTF-8: the error invalid-argument
///     if text.is_empty() {
///         return Err(Failure::new("empty".into(), "there is no text"));
///     }
///     Ok(text.to_uppercase().into())
/// };
/// ```
pub type Handler<'a> = dyn Fn(&Request, &Caller) -> Reply + Sync + 'a;

/// The **caller** of a request, for functions that take long.
pub struct Caller<'a>(pub(crate) &'a dyn Fn() -> bool);

impl Caller<'_> {
    /// Whether the caller has gone: the broker says that the queue for the reply no longer exists.
    /// Asks the broker; a caller whose broker does not answer is not known to have gone.
    pub fn is_gone(&self) -> bool {
        (self.0)()
    }
}

/// Calls the handler. A panic becomes the failure `internal`; its message is in the server's log
/// only.
pub(crate) fn call(handler: &Handler, request: &Request, caller: &Caller) -> Reply {
    // A handler whose state a panic can break must handle that itself, as with a poisoned mutex.
    panic::catch_unwind(AssertUnwindSafe(|| handler(request, caller))).unwrap_or_else(|_| {
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
pub fn fib_handler(
    max_n: u64,
    delay: Duration,
    on_request: impl Fn(u64) + Sync,
) -> impl Fn(&Request, &Caller) -> Reply + Sync {
    move |request, _| {
        let n = parse_argument(request.body, max_n)?;
        on_request(n);
        thread::sleep(delay);
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

    fn ask(handler: &Handler, body: &[u8]) -> Reply {
        call(
            handler,
            &Request {
                body,
                ..Request::default()
            },
            &Caller(&|| false),
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
        let failure = ask(&|_, _| panic!("on purpose"), b"1").unwrap_err();
        assert_eq!(failure.code, ErrorCode::Internal);
        assert!(
            !failure.message.contains("on purpose"),
            "the detail belongs to the log"
        );
    }
}
