//! The inbox of a channel: messages, confirmations, and its end.
//!
//! The thread that reads the socket assembles them from frames; the channel's user takes them.

use super::error::ErrorKind;
use super::frames::{parse_content_header, FrameError};
use super::methods::Method;
use crate::encoding::Malformed;
use crate::properties::Properties;
use crate::sync::lock;
use std::collections::VecDeque;
use std::mem;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// A message that the broker delivered to a consumer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Delivery {
    /// The delivery tag, for the acknowledgement.
    pub delivery_tag: u64,
    /// Whether the broker has delivered the message before.
    pub is_redelivered: bool,
    /// As encoded by [`Properties::encode`].
    pub encoded_properties: Vec<u8>,
    /// The body.
    pub body: Vec<u8>,
}

impl Delivery {
    /// The message's properties.
    ///
    /// # Errors
    /// [`Malformed`] if they do not fit into their content header.
    pub fn properties(&self) -> Result<Properties<'_>, Malformed> {
        Properties::parse(&self.encoded_properties)
    }
}

/// A message that was published here, and that the broker could not route to a queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Returned {
    /// The queue that does not exist.
    pub routing_key: Vec<u8>,
    /// As encoded by [`Properties::encode`].
    pub encoded_properties: Vec<u8>,
}

impl Returned {
    /// The correlation id of the message, if it has one.
    pub fn correlation_id(&self) -> Option<&[u8]> {
        Properties::parse(&self.encoded_properties)
            .ok()?
            .correlation_id
    }
}

/// A message in an inbox.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// See [`Delivery`].
    Delivery(Delivery),
    /// See [`Returned`].
    Returned(Returned),
}

/// Acks or nacks of published messages, by their numbers on the channel, from 1. Neighbours
/// are merged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Confirmation {
    /// The number of the first message; 1 also if some of them were confirmed before.
    pub first: u64,
    /// The number of the last message.
    pub last: u64,
    /// Whether the broker has taken them (ack), or not (nack).
    pub is_ack: bool,
}

/// The content of an inbox.
#[derive(Debug, Default)]
pub struct Arrived {
    /// In the order of their arrival.
    pub messages: VecDeque<Message>,
    /// A returned message is in `messages` before its confirmation is here.
    pub confirmations: Vec<Confirmation>,
    /// The end of the consumer, the channel or the connection. Nothing arrives after that.
    pub end: Option<ErrorKind>,
}

/// The **inbox** of an open channel.
pub(crate) struct Inbox {
    state: Mutex<Received>,
    /// Notified when something arrives.
    changed: Condvar,
    /// Maximum number of unread messages, and of unread confirmations.
    max_unread: usize,
    /// Whether the channel is in confirm mode. Else confirmations are dropped.
    pub(crate) has_confirms: AtomicBool,
    /// False once the broker has closed the channel, or the connection has ended. Locked while
    /// something is written on it.
    pub(crate) is_open: Mutex<bool>,
}

#[derive(Default)]
struct Received {
    incoming: Incoming,
    arrived: Arrived,
    /// Whether a thread waits that was not notified. To notify nobody is a system call, too.
    is_awaited: bool,
}

/// The message that is being assembled.
#[derive(Debug, Default)]
enum Incoming {
    #[default]
    Nothing,
    /// The method has arrived.
    Begun(Message),
    /// The content header has arrived; this many bytes of the body have not.
    Body(Message, usize),
}

impl Inbox {
    pub(crate) fn new(max_unread: usize) -> Self {
        Inbox {
            state: Mutex::default(),
            changed: Condvar::new(),
            max_unread,
            has_confirms: AtomicBool::new(false),
            is_open: Mutex::new(true),
        }
    }

    /// A method has arrived that concerns messages.
    pub(crate) fn on_method(&self, method: Method) -> Result<(), FrameError> {
        let encoded_properties = Vec::new();
        let body = Vec::new();
        let mut state = lock(&self.state);
        match method {
            Method::Ack { .. } | Method::Nack { .. }
                if !self.has_confirms.load(Ordering::Relaxed) => {}
            Method::Deliver {
                delivery_tag,
                is_redelivered,
            } => {
                state.begin(Message::Delivery(Delivery {
                    delivery_tag,
                    is_redelivered,
                    encoded_properties,
                    body,
                }))?;
            }
            Method::Return { routing_key } => {
                state.begin(Message::Returned(Returned {
                    routing_key: routing_key.to_vec(),
                    encoded_properties,
                }))?;
            }
            Method::Ack {
                delivery_tag,
                is_multiple,
            } => state.arrived.confirm(delivery_tag, is_multiple, true),
            Method::Nack {
                delivery_tag,
                is_multiple,
            } => state.arrived.confirm(delivery_tag, is_multiple, false),
            _ => {}
        }
        if state
            .arrived
            .messages
            .len()
            .max(state.arrived.confirmations.len())
            > self.max_unread
        {
            return Err(FrameError::TooManyMessages);
        }
        Ok(())
    }

    /// A content header has arrived.
    pub(crate) fn on_header(&self, payload: &[u8]) -> Result<(), FrameError> {
        let (body_size, properties) = parse_content_header(payload)?;
        let mut state = lock(&self.state);
        let Incoming::Begun(mut message) = mem::take(&mut state.incoming) else {
            return Err(FrameError::Malformed);
        };
        match &mut message {
            Message::Delivery(delivery) => {
                delivery.encoded_properties = properties.to_vec();
                delivery.body.reserve_exact(body_size);
            }
            Message::Returned(returned) => returned.encoded_properties = properties.to_vec(),
        }
        self.expect_body(state, message, body_size);
        Ok(())
    }

    /// A part of a body has arrived. That of a returned message is dropped.
    pub(crate) fn on_body(&self, payload: &[u8]) -> Result<(), FrameError> {
        let mut state = lock(&self.state);
        let Incoming::Body(mut message, missing) = mem::take(&mut state.incoming) else {
            return Err(FrameError::Malformed);
        };
        let missing = missing
            .checked_sub(payload.len())
            .ok_or(FrameError::Malformed)?;
        if let Message::Delivery(delivery) = &mut message {
            delivery.body.extend_from_slice(payload);
        }
        self.expect_body(state, message, missing);
        Ok(())
    }

    /// So many bytes of the body are missing.
    fn expect_body(&self, mut state: MutexGuard<Received>, message: Message, missing: usize) {
        if missing > 0 {
            state.incoming = Incoming::Body(message, missing);
        } else {
            state.arrived.messages.push_back(message);
            self.notify(state);
        }
    }

    /// The consumer, the channel or the connection has ended. The first cause counts.
    pub(crate) fn end(&self, cause: ErrorKind) {
        let mut state = lock(&self.state);
        state.arrived.end.get_or_insert(cause);
        self.notify(state);
    }

    /// Nothing is written on the channel from when this returns.
    pub(crate) fn close(&self, cause: ErrorKind) {
        self.end(cause);
        *lock(&self.is_open) = false;
    }

    /// The end of the consumer, the channel or the connection, if one of them has ended.
    pub(crate) fn ended(&self) -> Option<ErrorKind> {
        lock(&self.state).arrived.end.clone()
    }

    /// Whether something can be taken.
    pub(crate) fn has_arrived(&self) -> bool {
        let arrived = &lock(&self.state).arrived;
        !arrived.messages.is_empty() || !arrived.confirmations.is_empty() || arrived.end.is_some()
    }

    /// Takes the next message.
    pub(crate) fn take_message(&self) -> Option<Message> {
        lock(&self.state).arrived.messages.pop_front()
    }

    /// Takes all that has arrived. The end stays.
    pub(crate) fn take(&self) -> Arrived {
        let arrived = &mut lock(&self.state).arrived;
        let end = arrived.end.clone();
        mem::replace(
            arrived,
            Arrived {
                end,
                ..Arrived::default()
            },
        )
    }

    /// Waits until something has arrived, until this instant, or until `is_ready` after
    /// [`ask_again`](Self::ask_again).
    pub(crate) fn wait(&self, until: Instant, is_ready: &dyn Fn() -> bool) {
        let mut state = lock(&self.state);
        while state.arrived.messages.is_empty() && state.arrived.end.is_none() && !is_ready() {
            let Some(timeout) = until
                .checked_duration_since(Instant::now())
                .filter(|timeout| !timeout.is_zero())
            else {
                return;
            };
            state.is_awaited = true;
            state = self
                .changed
                .wait_timeout(state, timeout)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
            state.is_awaited = false;
        }
    }

    /// Makes a thread that waits ask again whether something is ready.
    pub(crate) fn ask_again(&self) {
        self.notify(lock(&self.state)); // a thread that is about to wait has asked, or asks again
    }

    fn notify(&self, mut state: MutexGuard<Received>) {
        let is_awaited = mem::take(&mut state.is_awaited);
        drop(state);
        if is_awaited {
            self.changed.notify_all();
        }
    }
}

impl Received {
    fn begin(&mut self, message: Message) -> Result<(), FrameError> {
        match mem::replace(&mut self.incoming, Incoming::Begun(message)) {
            Incoming::Nothing => Ok(()),
            _ => Err(FrameError::Malformed), // the message before is not complete
        }
    }
}

impl Arrived {
    fn confirm(&mut self, last: u64, is_multiple: bool, is_ack: bool) {
        let first = if is_multiple { 1 } else { last };
        match self.confirmations.last_mut() {
            Some(before)
                if before.is_ack == is_ack
                    && first <= before.last.saturating_add(1)
                    && last >= before.last =>
            {
                before.first = before.first.min(first);
                before.last = last;
            }
            _ => self.confirmations.push(Confirmation {
                first,
                last,
                is_ack,
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::frames::tests::content_header;
    use super::*;
    use std::thread;
    use std::time::Duration;

    fn payload(frame: &[u8]) -> &[u8] {
        &frame[7..frame.len() - 1]
    }

    fn inbox_with_confirms(max_unread: usize) -> Inbox {
        let inbox = Inbox::new(max_unread);
        inbox.has_confirms.store(true, Ordering::Relaxed);
        inbox
    }

    const DELIVER: Method = Method::Deliver {
        delivery_tag: 7,
        is_redelivered: true,
    };
    const RETURN: Method = Method::Return { routing_key: b"q" };

    #[test]
    fn a_message_is_there_when_its_last_byte_is() {
        let inbox = Inbox::new(9);
        inbox.on_method(DELIVER).unwrap();
        inbox.on_header(payload(&content_header(5))).unwrap();
        inbox.on_body(b"to ").unwrap();
        assert!(!inbox.has_arrived());
        inbox.on_body(b"be").unwrap();
        let encoded_properties = vec![0, 0];
        let delivery = Delivery {
            delivery_tag: 7,
            is_redelivered: true,
            encoded_properties,
            body: b"to be".to_vec(),
        };
        assert_eq!(inbox.take_message(), Some(Message::Delivery(delivery)));
        inbox.on_method(RETURN).unwrap();
        inbox.on_header(payload(&content_header(0))).unwrap();
        let returned = Returned {
            routing_key: b"q".to_vec(),
            encoded_properties: vec![0, 0],
        };
        assert_eq!(inbox.take_message(), Some(Message::Returned(returned)));
    }

    #[test]
    fn frames_out_of_order_are_malformed() {
        let header = content_header(5);
        let begun = || {
            let inbox = Inbox::new(9);
            inbox.on_method(DELIVER).unwrap();
            inbox
        };
        let with_header = || {
            let inbox = begun();
            inbox.on_header(payload(&header)).unwrap();
            inbox
        };
        for result in [
            Inbox::new(9).on_header(payload(&header)),
            Inbox::new(9).on_body(b"x"),
            begun().on_body(b"x"),
            begun().on_method(RETURN),
            with_header().on_header(payload(&header)),
            with_header().on_method(DELIVER),
            with_header().on_body(b"longer"),
        ] {
            assert_eq!(result, Err(FrameError::Malformed));
        }
    }

    #[test]
    fn more_than_was_asked_for_is_an_error() {
        let inbox = Inbox::new(1);
        for expected in [Ok(()), Ok(()), Err(FrameError::TooManyMessages)] {
            assert_eq!(inbox.on_method(RETURN), expected);
            inbox.on_header(payload(&content_header(0))).unwrap();
        }
        let inbox = inbox_with_confirms(1);
        let ack = |delivery_tag| {
            inbox.on_method(Method::Ack {
                delivery_tag,
                is_multiple: false,
            })
        };
        assert_eq!(
            [ack(1), ack(3), ack(1)],
            [
                Ok(()),
                Err(FrameError::TooManyMessages),
                Err(FrameError::TooManyMessages)
            ]
        );
    }

    #[test]
    fn neighbouring_confirmations_are_merged_and_keep_their_order() {
        let inbox = inbox_with_confirms(9);
        let ack = |delivery_tag, is_multiple| {
            inbox
                .on_method(Method::Ack {
                    delivery_tag,
                    is_multiple,
                })
                .unwrap();
        };
        ack(1, false);
        ack(2, false);
        ack(5, true);
        inbox
            .on_method(Method::Nack {
                delivery_tag: 6,
                is_multiple: false,
            })
            .unwrap();
        ack(7, false);
        ack(9, false);
        ack(8, false);
        let confirmed = |first, last, is_ack| Confirmation {
            first,
            last,
            is_ack,
        };
        let expected = [
            confirmed(1, 5, true),
            confirmed(6, 6, false),
            confirmed(7, 7, true),
            confirmed(9, 9, true),
            confirmed(8, 8, true),
        ];
        assert_eq!(inbox.take().confirmations, expected);
        assert!(!inbox.has_arrived());
    }

    /// Else a worker, which takes none, would never wait again.
    #[test]
    fn without_confirm_mode_confirmations_are_dropped() {
        let inbox = Inbox::new(9);
        inbox
            .on_method(Method::Ack {
                delivery_tag: 1,
                is_multiple: false,
            })
            .unwrap();
        inbox
            .on_method(Method::Nack {
                delivery_tag: 1,
                is_multiple: true,
            })
            .unwrap();
        assert!(!inbox.has_arrived());
    }

    #[test]
    fn the_first_end_counts_and_stays() {
        let inbox = Inbox::new(9);
        inbox.end(ErrorKind::ConsumerCancelled);
        assert!(
            *lock(&inbox.is_open),
            "what was delivered before may be answered"
        );
        inbox.close(ErrorKind::Silent);
        for _ in 0..2 {
            assert_eq!(inbox.take().end, Some(ErrorKind::ConsumerCancelled));
        }
        assert!(!*lock(&inbox.is_open));
    }

    #[test]
    fn a_wait_ends_when_something_arrives_or_is_ready() {
        let inbox = Inbox::new(9);
        let far = Instant::now() + Duration::from_secs(60);
        thread::scope(|scope| {
            let waiting = scope.spawn(|| inbox.wait(far, &|| false));
            while !lock(&inbox.state).is_awaited {
                thread::yield_now();
            }
            inbox.end(ErrorKind::Silent);
            waiting.join().unwrap();
        });
        inbox.wait(far, &|| false);
        let other = Inbox::new(9);
        other.wait(Instant::now() + Duration::from_millis(5), &|| false);
        other.wait(far, &|| true);
        assert!(Instant::now() < far);
    }
}
