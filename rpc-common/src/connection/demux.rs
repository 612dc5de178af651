//! The demultiplexer of the broker's frames: messages and confirmations go to the inboxes of their
//! channels, other methods to amiquip.

use super::error::ErrorKind;
use super::frames::{
    parse_content_header, Frame, FrameError, BODY, HEADER, MAX_NOTIFICATIONS, METHOD,
};
use super::inbox::Inbox;
use super::methods::{put_for_amiquip, take_heartbeat, Method};
use crate::sync::lock;
use crate::text::{describe_io_error, escape};
use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Period of [`MAX_NOTIFICATIONS`].
const NOTIFICATION_PERIOD: Duration = Duration::from_secs(60);

/// Whether the broker blocks publishers, each time that this changes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notification {
    /// The broker blocks publishers, for this reason, which is safe to print.
    Blocked(String),
    /// The broker no longer blocks publishers.
    Unblocked,
}

/// The end of a connection.
#[derive(Debug)]
pub(crate) enum End {
    /// The broker closed the connection.
    Closed { code: u16, text: Vec<u8> },
    /// The socket ended without a word.
    Eof,
    /// The socket failed.
    Io(io::Error),
    /// The broker violated the protocol.
    Frame(FrameError),
    /// Nothing came for two heartbeat intervals, or a blocking call was not answered in time.
    Silent,
    /// amiquip ended the connection: after we closed it, or because of a method that amiquip got.
    Amiquip,
    /// We ended the connection.
    Local,
}

impl From<FrameError> for End {
    fn from(error: FrameError) -> Self {
        End::Frame(error)
    }
}

impl From<&End> for ErrorKind {
    fn from(end: &End) -> Self {
        match end {
            End::Closed { code, text } => ErrorKind::connection_closed(*code, text),
            End::Eof => ErrorKind::ConnectionLost("the broker closed the socket".into()),
            End::Io(error) => {
                ErrorKind::ConnectionLost(escape(describe_io_error(error).as_bytes()).to_string())
            }
            End::Frame(error) => ErrorKind::ConnectionLost(error.to_string()),
            End::Silent => ErrorKind::Silent,
            End::Amiquip => ErrorKind::ConnectionLost("amiquip has ended the connection".into()),
            End::Local => ErrorKind::ConnectionLost("it is closed".into()),
        }
    }
}

/// The inboxes of a connection's open channels.
#[derive(Default)]
pub(crate) struct Inboxes {
    by_channel: Mutex<HashMap<u16, Arc<Inbox>>>,
}

impl Inboxes {
    /// The inbox of a channel that was opened.
    pub(crate) fn open(&self, channel: u16, max_unread: usize) -> Arc<Inbox> {
        let inbox = Arc::new(Inbox::new(max_unread));
        lock(&self.by_channel).insert(channel, inbox.clone());
        inbox
    }

    fn get(&self, channel: u16) -> Option<Arc<Inbox>> {
        lock(&self.by_channel).get(&channel).cloned()
    }

    /// The channel has ended. Its number may be used again.
    fn close(&self, channel: u16, cause: ErrorKind) {
        if let Some(inbox) = lock(&self.by_channel).remove(&channel) {
            inbox.close(cause);
        }
    }

    /// The connection has ended.
    pub(crate) fn close_all(&self, cause: &ErrorKind) {
        let inboxes = std::mem::take(&mut *lock(&self.by_channel));
        for inbox in inboxes.into_values() {
            inbox.close(cause.clone());
        }
    }

    /// Makes all threads that wait for an inbox ask again whether something is ready.
    pub(crate) fn ask_all_again(&self) {
        lock(&self.by_channel)
            .values()
            .for_each(|inbox| inbox.ask_again());
    }
}

/// A **demultiplexer** takes the frames of one connection.
pub(crate) struct Demultiplexer {
    /// Frames for amiquip, which gets methods only.
    pub(crate) to_amiquip: Vec<u8>,
    /// The interval of heartbeats that the broker wants, in seconds.
    pub(crate) brokers_heartbeat: u16,
    /// Number of notifications in the current period.
    notifications: u32,
    period_start: Instant,
}

impl Demultiplexer {
    pub(crate) fn new() -> Self {
        Demultiplexer {
            to_amiquip: Vec::new(),
            brokers_heartbeat: 0,
            notifications: 0,
            period_start: Instant::now(),
        }
    }

    /// Takes a frame. Returns its consequence for the connection.
    ///
    /// # Errors
    /// The end of the connection, if this frame ends it.
    pub(crate) fn take(
        &mut self,
        inboxes: &Inboxes,
        frame: Frame,
    ) -> Result<Option<Notification>, End> {
        match frame.kind {
            METHOD => return self.take_method(inboxes, frame),
            HEADER => match inboxes.get(frame.channel) {
                Some(inbox) => inbox.on_header(frame.payload)?,
                None => drop(parse_content_header(frame.payload)?),
            },
            BODY => {
                if let Some(inbox) = inboxes.get(frame.channel) {
                    inbox.on_body(frame.payload)?;
                }
            }
            _ => {} // a heartbeat
        }
        Ok(None)
    }

    fn take_method(
        &mut self,
        inboxes: &Inboxes,
        frame: Frame,
    ) -> Result<Option<Notification>, End> {
        let method = Method::parse(frame.payload).map_err(FrameError::from)?;
        match method {
            Method::Deliver { .. }
            | Method::Return { .. }
            | Method::Ack { .. }
            | Method::Nack { .. } => {
                // A channel without an inbox has no consumer and no publisher: what comes on it is
                // dropped.
                inboxes
                    .get(frame.channel)
                    .map_or(Ok(()), |inbox| inbox.on_method(method))?;
                return Ok(None);
            }
            Method::Blocked { reason } => {
                self.count_notification()?;
                return Ok(Some(Notification::Blocked(escape(reason).to_string())));
            }
            Method::Unblocked => {
                self.count_notification()?;
                return Ok(Some(Notification::Unblocked));
            }
            // amiquip learns that the connection has ended from the end of its stream.
            Method::ConnectionClose { code, text } => {
                return Err(End::Closed {
                    code,
                    text: text.to_vec(),
                })
            }
            // Before amiquip confirms it: from then on nothing may be written on the channel.
            Method::ChannelClose { code, text } => {
                inboxes.close(frame.channel, ErrorKind::channel_closed(code, text));
            }
            Method::ChannelCloseOk => inboxes.close(frame.channel, (&End::Local).into()),
            Method::Cancel => {
                inboxes
                    .get(frame.channel)
                    .inspect(|inbox| inbox.end(ErrorKind::ConsumerCancelled));
            }
            Method::Tune | Method::Other => {}
        }
        let start = self.to_amiquip.len();
        put_for_amiquip(&mut self.to_amiquip, frame)?;
        if method == Method::Tune {
            self.brokers_heartbeat = take_heartbeat(&mut self.to_amiquip[start..]);
        }
        Ok(None)
    }

    fn count_notification(&mut self) -> Result<(), FrameError> {
        if self.period_start.elapsed() >= NOTIFICATION_PERIOD {
            self.notifications = 0;
            self.period_start = Instant::now();
        }
        self.notifications += 1;
        if self.notifications > MAX_NOTIFICATIONS {
            return Err(FrameError::TooManyNotifications);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::frames::tests::content_header;
    use super::super::frames::{put_frame, put_method, FrameBuffer};
    use super::super::inbox::Message;
    use super::*;
    use std::sync::atomic::Ordering;

    /// Takes these bytes of the broker. Returns what amiquip gets.
    fn take(inboxes: &Inboxes, bytes: &[u8]) -> Result<Vec<u8>, End> {
        let mut buffer = FrameBuffer::new();
        let mut demultiplexer = Demultiplexer::new();
        buffer.space()[..bytes.len()].copy_from_slice(bytes);
        buffer.advance(bytes.len());
        while let Some(frame) = buffer.next_frame()? {
            demultiplexer.take(inboxes, frame)?;
        }
        Ok(demultiplexer.to_amiquip)
    }

    fn method(channel: u16, method: (u16, u16), arguments: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        put_method(&mut bytes, channel, method, |to| {
            to.extend_from_slice(arguments);
        });
        bytes
    }

    /// A delivery on channel 1.
    fn delivery() -> Vec<u8> {
        let mut body = Vec::new();
        put_frame(&mut body, BODY, 1, |to| to.extend_from_slice(b"30"));
        [
            method(1, (60, 60), b"\x01t\0\0\0\0\0\0\0\x07\0\0\0"),
            content_header(2),
            body,
        ]
        .concat()
    }

    const CHANNEL_CLOSE: &[u8] = b"\x01\x94\x02no\0\0\0\0";

    #[test]
    fn messages_and_confirmations_do_not_reach_amiquip_on_any_channel() {
        let inboxes = Inboxes::default();
        let ack = method(1, (60, 80), &[0, 0, 0, 0, 0, 0, 0, 1, 0]);
        let bytes = [delivery(), ack].concat();
        assert!(
            take(&inboxes, &bytes).unwrap().is_empty(),
            "without an inbox they are dropped"
        );
        let inbox = inboxes.open(1, 9);
        inbox.has_confirms.store(true, Ordering::Relaxed);
        assert!(take(&inboxes, &bytes).unwrap().is_empty());
        let arrived = inbox.take();
        assert!(
            matches!(&arrived.messages.as_slices().0, [Message::Delivery(delivery)] if delivery.body == b"30")
        );
        assert_eq!(arrived.confirmations.len(), 1);
    }

    #[test]
    fn the_end_of_a_consumer_and_of_a_channel_reach_amiquip_and_the_inbox() {
        let inboxes = Inboxes::default();
        let cancel = method(1, (60, 30), b"\x01t\x01");
        let close = method(1, (20, 40), CHANNEL_CLOSE);
        let inbox = inboxes.open(1, 9);
        assert_eq!(
            take(&inboxes, &[delivery(), cancel.clone()].concat()).unwrap(),
            cancel
        );
        assert!(matches!(
            inbox.take().end,
            Some(ErrorKind::ConsumerCancelled)
        ));
        let other = inboxes.open(1, 9);
        assert_eq!(take(&inboxes, &close).unwrap(), close);
        assert!(
            matches!(other.ended(), Some(ErrorKind::ChannelClosed(reason)) if reason.code == 404)
        );
        assert!(!*lock(&other.is_open) && *lock(&inbox.is_open));
        assert!(
            take(&inboxes, &delivery()).unwrap().is_empty(),
            "the number is free again"
        );
    }

    #[test]
    fn the_broker_may_close_the_connection_and_may_not_flood_it_with_notifications() {
        let inboxes = Inboxes::default();
        let closed = take(&inboxes, &method(0, (10, 50), b"\x01\x40\x02by\0\0\0\0"));
        assert!(matches!(closed, Err(End::Closed { code: 320, text }) if text == b"by"));
        let blocked = method(0, (10, 60), b"\x03low").repeat(100);
        assert!(take(&inboxes, &blocked).is_ok());
        let more = [blocked, method(0, (10, 61), b"")].concat();
        assert!(matches!(
            take(&inboxes, &more),
            Err(End::Frame(FrameError::TooManyNotifications))
        ));
    }
}
