//! A session: one connection with its reply queue, as the event loop's thread sees it.
//!
//! That thread drives the link of the connection: it reads replies, and publishes requests.
//! Blocking calls are made by the [thread of the session](crate::session_thread).

use crate::call::Error;
use crate::config::Config;
use crate::request_publisher::RequestPublisher;
use crate::requests::Requests;
use crate::run_state::Event;
use crate::session_thread::{self, Attempt, Connected, Report, Reporter, ThreadCommand};
use crossbeam_channel::{unbounded, Receiver, Sender};
use rpc_common::connection::{
    close_timeout, Arrived, Deadline, Endpoint, Error as ConnectionError, ErrorKind, Link, Message,
    Waker,
};
use std::mem;
use std::sync::Arc;
use std::thread;
use std::time::Instant;

/// Receives events, until one of them ends the session.
pub(crate) type OnEvent<'a> = dyn FnMut(Event) -> Result<(), Error> + 'a;

/// A **session**, as the event loop's thread sees it.
pub(crate) struct Session {
    commands: Sender<ThreadCommand>,
    reports: Receiver<Report>,
    /// The link to drive. `None` until a socket is connected.
    link: Option<Arc<Link>>,
    /// `None` until it is connected.
    connected: Option<Connected>,
    /// Whether the thread has not answered [`ThreadCommand::QueueStats`] yet.
    is_stats_pending: bool,
    /// Deadline of closing.
    close_deadline: Deadline,
    /// The error of the session when its thread has ended, or was not started.
    end_of_thread: ConnectionError,
}

impl Session {
    /// Starts to connect. The `deadline` is that of connecting. With `needs_consumers`, a request
    /// queue without consumers ends the session. The `waker` ends a wait of the event loop.
    pub(crate) fn start(
        endpoints: Vec<Endpoint>,
        config: &Config,
        needs_consumers: bool,
        deadline: Deadline,
        waker: &Waker,
    ) -> Self {
        let (command_sender, commands) = unbounded();
        let (report_sender, reports) = unbounded();
        let address = endpoints.first().map(|endpoint| endpoint.address.clone());
        let attempt = Attempt {
            endpoints,
            config: config.clone(),
            needs_consumers,
            deadline,
        };
        let reporter = Reporter {
            reports: report_sender,
            waker: waker.clone(),
        };
        let started = thread::Builder::new()
            .spawn(move || session_thread::run(&attempt, &reporter, &commands));
        Session {
            end_of_thread: ConnectionError {
                address,
                kind: match started {
                    Ok(_) => ErrorKind::ConnectionLost("the session has ended".into()),
                    Err(error) => ErrorKind::no_thread(&error),
                },
            },
            commands: command_sender,
            reports,
            link: None,
            connected: None,
            is_stats_pending: false,
            close_deadline: deadline,
        }
    }

    /// Publishes requests. `None` until it is connected.
    pub(crate) fn publisher(&self) -> Option<&RequestPublisher> {
        self.connected
            .as_ref()
            .map(|connected| &connected.publisher)
    }

    /// Sets the deadline of closing.
    pub(crate) fn set_close_deadline(&mut self, deadline: Deadline) {
        self.close_deadline = deadline;
    }

    /// Drives the link until something arrives, a request if it `takes_requests`, or until this
    /// instant.
    pub(crate) fn wait<T>(
        &self,
        until: Option<Instant>,
        requests: &Requests<T>,
        takes_requests: bool,
    ) {
        self.drive(until, requests.waker(), &|| {
            requests.prepare_wait(takes_requests)
        });
    }

    /// Receives what the broker has sent by now, but not more than `max_reads` pieces: a peer may
    /// never stop sending.
    pub(crate) fn receive(&self, max_reads: u32) {
        let now = Some(Instant::now());
        let Some(link) = &self.link else { return };
        for _ in 0..max_reads {
            let has_input = link.drive(now, &|| true);
            if !has_input {
                break;
            }
        }
    }

    fn drive(&self, until: Option<Instant>, waker: &Waker, is_ready: &dyn Fn() -> bool) {
        let is_ready = || is_ready() || !self.reports.is_empty();
        match &self.link {
            Some(link) => drop(link.drive(until, &is_ready)),
            None => waker.wait(until, &is_ready),
        }
    }

    /// Takes all events. Order: what has arrived, then the thread's reports, then the end.
    pub(crate) fn take_events(&mut self, on_event: &mut OnEvent) -> Result<(), Error> {
        self.take_arrived(on_event)?; // the end stays in the inbox, and is taken below
        while let Ok(report) = self.reports.try_recv() {
            match report {
                Report::Linked(link) => self.link = link.claim(),
                Report::Connected(connected) => {
                    let address = connected.address.clone();
                    self.connected = Some(*connected);
                    on_event(Event::Connected(address))?;
                }
                Report::Consuming => on_event(Event::Consuming)?,
                Report::QueueStats(stats) => {
                    self.is_stats_pending = false;
                    on_event(Event::QueueStats(stats))?;
                }
                Report::Failed(error) => on_event(Event::Failed(error))?,
                Report::ThreadEnded => on_event(Event::Failed(self.thread_ended()))?,
            }
        }
        // Again, because the end comes after the reports, and after all that arrived before it.
        if let Some(end) = self.take_arrived(on_event)? {
            on_event(Event::ChannelEnded(end))?;
        }
        match self.link.as_ref().filter(|_| self.connected.is_some()) {
            Some(link) if link.has_ended() => {
                let end = link.cause().map(Event::ConnectionEnded);
                end.map_or(Ok(()), on_event)
            }
            _ => Ok(()),
        }
    }

    /// Takes what has arrived: replies and returned requests, then confirmations (a request that is
    /// confirmed although there is no queue was returned before), then notifications. Returns how
    /// the consumer, its channel or the connection ended.
    pub(crate) fn take_arrived(&self, on_event: &mut OnEvent) -> Result<Option<ErrorKind>, Error> {
        let Some(connected) = &self.connected else {
            return Ok(None);
        };
        let Arrived {
            messages,
            confirmations,
            end,
        } = connected.inbox.take();
        for message in messages {
            on_event(match message {
                Message::Delivery(delivery) => Event::Reply(delivery),
                Message::Returned(request) => Event::Returned(request),
            })?;
        }
        for confirmation in confirmations {
            on_event(Event::Confirmation(confirmation))?;
        }
        for notification in connected.notifications.try_iter() {
            on_event(Event::Notification(notification))?;
        }
        Ok(end)
    }

    fn thread_ended(&self) -> Error {
        let mut error = self.end_of_thread.clone();
        if let Some(connected) = &self.connected {
            error.address = Some(connected.address.clone());
        }
        error.into()
    }

    /// Asks for [`Event::QueueStats`], unless they are still to come.
    pub(crate) fn request_queue_stats(&mut self) {
        if !mem::replace(&mut self.is_stats_pending, true) {
            let _ = self.commands.send(ThreadCommand::QueueStats); // fails if the session has ended
        }
    }

    /// Ends the connection, and with it the thread's wait for the consumer: the broker has not
    /// started the consumer in time. Not if a report has arrived meanwhile: the consumer may have
    /// started.
    pub(crate) fn give_up(&self) {
        if let Some(link) = self.link.as_ref().filter(|_| self.reports.is_empty()) {
            link.give_up();
        }
    }

    /// Closes the connection. Waits for the broker not longer than
    /// [`Connection`](rpc_common::connection::Connection) does.
    pub(crate) fn close(mut self, waker: &Waker) {
        // Fails if the thread has ended.
        let _ = self
            .commands
            .send(ThreadCommand::Close(self.close_deadline));
        let limit = Deadline::after(close_timeout(&self.close_deadline));
        while !limit.remaining().is_zero() {
            match self.reports.try_recv() {
                Ok(Report::ThreadEnded) => break,
                Ok(Report::Linked(link)) => self.link = link.claim(),
                Ok(_) => {}
                Err(_) => self.drive(Some(limit.instant()), waker, &|| false),
            }
        }
        // If the thread has not ended, this ends its blocking call. A link that comes later is shut
        // down unclaimed.
        if let Some(link) = &self.link {
            link.shut_down();
        }
    }
}
