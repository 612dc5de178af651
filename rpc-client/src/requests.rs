//! The requests of a run: a channel that wakes the event loop, which waits in poll(2).

use crate::call::Request;
use crossbeam_channel::{bounded, unbounded, Receiver, Sender};
use rpc_common::connection::Waker;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::time::Instant;

/// Sends the requests of a run, from any thread. When the sender is dropped there are no more.
pub struct RequestSender<T> {
    /// `None` once `drop` has begun.
    sender: Option<Sender<Request<T>>>,
    shared: Arc<Shared>,
}

/// The requests of a [`run`](crate::run()).
pub struct Requests<T> {
    receiver: Receiver<Request<T>>,
    shared: Arc<Shared>,
}

/// Stops a [`run`](crate::run()), from any thread.
#[derive(Clone)]
pub struct Stopper(Arc<Shared>);

struct Shared {
    waker: Waker,
    /// Whether the event loop waits for requests. Otherwise a request wakes nobody.
    is_awaited: AtomicBool,
    /// Whether the sender is dropped.
    is_closed: AtomicBool,
    is_stopped: AtomicBool,
}

/// A channel for the requests of a run. If there is a `capacity`, the sender waits while so many
/// are not taken.
///
/// # Panics
/// If the system refuses a file descriptor.
pub fn request_channel<T>(capacity: Option<usize>) -> (RequestSender<T>, Requests<T>) {
    let (sender, receiver) = capacity.map_or_else(unbounded, bounded);
    let waker = Waker::new().expect("the system provides a file descriptor");
    let [is_awaited, is_closed, is_stopped] = [(); 3].map(|()| AtomicBool::new(false));
    let shared = Arc::new(Shared {
        waker,
        is_awaited,
        is_closed,
        is_stopped,
    });
    (
        RequestSender {
            sender: Some(sender),
            shared: shared.clone(),
        },
        Requests { receiver, shared },
    )
}

impl<T> RequestSender<T> {
    /// Sends a request. False if nobody receives it: the run has ended.
    pub fn send(&self, request: Request<T>) -> bool {
        let is_sent = self
            .sender
            .as_ref()
            .is_some_and(|sender| sender.send(request).is_ok());
        self.shared.wake_for_request();
        is_sent
    }
}

impl<T> Drop for RequestSender<T> {
    fn drop(&mut self) {
        self.sender = None;
        self.shared.is_closed.store(true, Ordering::SeqCst);
        self.shared.wake_for_request();
    }
}

impl Stopper {
    /// Stops the run; calls without an answer have no outcome.
    pub fn stop(&self) {
        self.0.is_stopped.store(true, Ordering::SeqCst);
        self.0.waker.wake();
    }
}

impl Shared {
    fn wake_for_request(&self) {
        if self.is_awaited.swap(false, Ordering::SeqCst) {
            self.waker.wake();
        }
    }
}

impl<T> Requests<T> {
    /// Stops the run that uses these requests.
    pub fn stopper(&self) -> Stopper {
        Stopper(self.shared.clone())
    }

    pub(crate) fn waker(&self) -> &Waker {
        &self.shared.waker
    }

    /// Takes the next request, if there is one.
    pub fn try_take(&self) -> Option<Request<T>> {
        self.receiver.try_recv().ok()
    }

    /// Whether there is a request, or may be one later.
    pub(crate) fn has_more(&self) -> bool {
        // In this order: a request that was sent before the end is there when the end is.
        !self.shared.is_closed.load(Ordering::SeqCst) || !self.receiver.is_empty()
    }

    pub(crate) fn is_stopped(&self) -> bool {
        self.shared.is_stopped.load(Ordering::SeqCst)
    }

    /// Prepares a wait. Returns true if the event loop must not wait: the run is stopped; or the
    /// loop `takes_requests`, and there is one, or the sender is dropped. If this returns false and
    /// the loop takes requests, the next request wakes the loop.
    pub(crate) fn prepare_wait(&self, takes_requests: bool) -> bool {
        self.shared
            .is_awaited
            .store(takes_requests, Ordering::SeqCst);
        let has_news = || !self.receiver.is_empty() || self.shared.is_closed.load(Ordering::SeqCst);
        self.is_stopped() || (takes_requests && has_news())
    }

    /// Waits until [`prepare_wait`](Self::prepare_wait) says that there is something, or until this
    /// instant. It may end before that.
    pub(crate) fn wait(&self, until: Option<Instant>, takes_requests: bool) {
        self.shared
            .waker
            .wait(until, &|| self.prepare_wait(takes_requests));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    fn request(number: u8) -> Request<()> {
        Request {
            context: (),
            body: vec![number],
        }
    }

    #[test]
    fn requests_arrive_in_order_until_the_sender_is_dropped() {
        let (sender, requests) = request_channel(None);
        let sending = thread::spawn(move || (0..100).all(|number| sender.send(request(number))));
        let mut received = Vec::new();
        while requests.has_more() {
            match requests.try_take() {
                Some(request) => received.push(request.body[0]),
                None => requests.wait(None, true),
            }
        }
        assert!(sending.join().unwrap());
        assert_eq!(received, (0..100).collect::<Vec<_>>());
        assert!(requests.prepare_wait(true) && !requests.prepare_wait(false));
    }

    #[test]
    fn a_stop_ends_a_wait_and_a_run_that_has_ended_takes_nothing() {
        let (sender, requests) = request_channel(Some(1));
        let stopper = requests.stopper();
        thread::spawn(move || stopper.stop());
        while !requests.is_stopped() {
            requests.wait(None, true);
        }
        assert!(requests.prepare_wait(false));
        drop(requests);
        assert!(!sender.send(request(1)));
    }
}
