//! The link of a connection: its socket, which one thread at a time reads, with amiquip behind a
//! socketpair.
//!
//! To **drive** a link is to poll the socket, our end of the socketpair, the waker and the timers,
//! and to move what is ready: messages and confirmations go to the inboxes of their channels, other
//! methods to amiquip, and what amiquip sends to the socket. The owner of the connection drives it
//! while it waits: the client's event loop, or a server's only worker. Where nobody does, a standby
//! thread drives it.

use super::amiquip_stream::{AmiquipStream, FromAmiquip};
use super::deadline::Deadline;
use super::demux::{Demultiplexer, End, Inboxes, Notification};
use super::error::ErrorKind;
use super::frames::{put_frame, put_method, FrameBuffer, FrameError, HEARTBEAT};
use super::inbox::Inbox;
use super::phase::Phase;
use super::socket::Transport;
use super::wake::Waker;
use super::writer::SocketWriter;
use crate::sync::{lock, try_lock};
use crate::text::describe_io_error;
use crossbeam_channel::{unbounded, Receiver, Sender};
use rustix::event::{PollFd, PollFlags};
use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

/// Interval at which a standby thread checks whether the link is driven. A worker does not wake
/// that thread for each request.
const STANDBY_INTERVAL: Duration = Duration::from_millis(100);

/// Maximum number of bytes that wait for amiquip, which reads at once.
const MAX_FOR_AMIQUIP: usize = 1 << 20;

/// The **link** of a connection, shared by all who use it.
pub struct Link {
    socket: TcpStream,
    has_tls: bool,
    /// Our end of the socketpair.
    pair: UnixStream,
    writer: SocketWriter,
    waker: Waker,
    driver: Mutex<Driver>,
    /// Number of threads that wait for the driver: the standby thread leaves it to them.
    wants_to_drive: AtomicUsize,
    standby: OnceLock<Thread>,
    inboxes: Inboxes,
    blocking: Mutex<BlockingCalls>,
    /// The negotiated size of frames; 0 before the login.
    frame_max: AtomicU32,
    /// Whether the peer has sent a frame.
    pub(crate) saw_frame: AtomicBool,
    end: OnceLock<End>,
    /// `None` when the connection has ended.
    notifier: Mutex<Option<Sender<Notification>>>,
    notifications: Receiver<Notification>,
}

/// The blocking calls of amiquip that are running.
struct BlockingCalls {
    /// Their deadlines, by number.
    deadlines: HashMap<u64, Instant>,
    begun: u64,
    /// End of the driver's current poll.
    wakes_at: Option<Instant>,
    /// Whether the poll must end earlier.
    is_changed: bool,
}

impl Link {
    /// The link of a connected transport, and amiquip's end of the socketpair. `heartbeat` is the
    /// wanted interval in seconds; `waker` ends a wait of [`drive`](Self::drive).
    pub(crate) fn new(
        transport: Transport,
        connection_name: String,
        heartbeat: u16,
        waker: Waker,
    ) -> io::Result<(Arc<Self>, AmiquipStream)> {
        let (pair, amiquips) = UnixStream::pair()?;
        pair.set_nonblocking(true)?;
        amiquips.set_nonblocking(true)?;
        let (notifier, notifications) = unbounded();
        let link = Link {
            socket: transport.socket().try_clone()?,
            has_tls: matches!(transport, Transport::Tls(_)),
            pair,
            writer: SocketWriter::new(transport),
            waker,
            driver: Mutex::new(Driver::new(connection_name, heartbeat)),
            wants_to_drive: AtomicUsize::new(0),
            standby: OnceLock::new(),
            inboxes: Inboxes::default(),
            blocking: Mutex::new(BlockingCalls {
                deadlines: HashMap::new(),
                begun: 0,
                wakes_at: None,
                is_changed: false,
            }),
            frame_max: AtomicU32::new(0),
            saw_frame: AtomicBool::new(false),
            end: OnceLock::new(),
            notifier: Mutex::new(Some(notifier)),
            notifications,
        };
        Ok((Arc::new(link), AmiquipStream(amiquips)))
    }

    /// Starts a standby thread, which ends with the connection.
    ///
    /// # Errors
    /// [`ErrorKind::NoThread`].
    pub(crate) fn start_standby(self: &Arc<Self>) -> Result<(), ErrorKind> {
        let link = self.clone();
        let thread = thread::Builder::new()
            .name("standby".into())
            .spawn(move || link.stand_by())
            .map_err(|error| ErrorKind::no_thread(&error))?;
        let _ = self.standby.set(thread.thread().clone()); // it is empty
        Ok(())
    }

    /// Drives the link while nobody else does.
    fn stand_by(&self) {
        let is_wanted = || self.wants_to_drive.load(Ordering::SeqCst) > 0;
        while !self.has_ended() {
            if let Some(mut driver) = try_lock(&self.driver).filter(|_| !is_wanted()) {
                while !self.has_ended() && !is_wanted() {
                    driver.turn(self, None, &is_wanted);
                }
            }
            thread::park_timeout(STANDBY_INTERVAL);
        }
    }

    /// Drives the link once: until something arrives, the waker is woken, this instant, or at once
    /// if something `is_ready`. Returns whether the socket has had input.
    pub fn drive(&self, until: Option<Instant>, is_ready: &dyn Fn() -> bool) -> bool {
        if self.has_ended() {
            self.waker.wait(until, is_ready);
            return false;
        }
        lock(&self.driver).turn(self, until, is_ready)
    }

    /// Drives the link in place of the standby thread, until something `is_ready`, until this
    /// instant, or until it ends.
    pub(crate) fn drive_until(&self, until: Instant, is_ready: &dyn Fn() -> bool) {
        if is_ready() {
            return;
        }
        self.wants_to_drive.fetch_add(1, Ordering::SeqCst);
        let mut driver = try_lock(&self.driver).unwrap_or_else(|| {
            self.waker.wake();
            lock(&self.driver)
        });
        self.wants_to_drive.fetch_sub(1, Ordering::SeqCst);
        while !is_ready() && !self.has_ended() && Instant::now() < until {
            driver.turn(self, Some(until), is_ready);
        }
        drop(driver);
        if self.has_backlog() || !lock(&self.blocking).deadlines.is_empty() {
            self.wake_standby();
        }
    }

    fn wake_standby(&self) {
        if let Some(standby) = self.standby.get() {
            standby.unpark();
        }
    }

    /// Makes all waits on this link ask again whether something is ready.
    pub fn wake_all(&self) {
        self.waker.wake();
        self.inboxes.ask_all_again();
    }

    /// Runs a blocking call of amiquip, and ends the connection if the call is still running at the
    /// deadline: then it returns within milliseconds, and the result is `None`, whatever the call
    /// returned.
    pub(crate) fn run_blocking_until<T>(
        &self,
        deadline: &Deadline,
        call: impl FnOnce() -> T,
    ) -> Option<T> {
        let number = self.add_blocking(deadline.instant());
        self.wake_standby();
        let result = call();
        // `check_timers` removes the entry at the deadline: without one, the call timed out.
        lock(&self.blocking)
            .deadlines
            .remove(&number)
            .map(|_| result)
    }

    fn add_blocking(&self, deadline: Instant) -> u64 {
        let mut calls = lock(&self.blocking);
        calls.begun += 1;
        let number = calls.begun;
        calls.deadlines.insert(number, deadline);
        if calls.wakes_at.is_none_or(|wakes_at| deadline < wakes_at) {
            calls.is_changed = true;
            self.waker.wake();
        }
        number
    }

    /// Runs a blocking call of amiquip. `phase` names the call in the error of a timeout.
    pub(crate) fn run_blocking<T>(
        &self,
        deadline: &Deadline,
        phase: Phase,
        call: impl FnOnce() -> amiquip::Result<T>,
    ) -> Result<T, ErrorKind> {
        match self.run_blocking_until(deadline, call) {
            Some(result) => result.map_err(|error| self.explain(error)),
            None => Err(deadline.timed_out(phase)),
        }
    }

    /// Translates an error of amiquip. Where the connection has ended, we know the cause.
    fn explain(&self, error: amiquip::Error) -> ErrorKind {
        use amiquip::Error::{ExhaustedChannelIds, ServerClosedChannel};
        match (error, self.cause()) {
            (error @ (ServerClosedChannel { .. } | ExhaustedChannelIds), _) | (error, None) => {
                error.into()
            }
            (_, Some(cause)) => cause,
        }
    }

    /// Gives the blocking calls that are running no longer than this deadline.
    pub fn limit_blocking(&self, deadline: &Deadline) {
        let mut calls = lock(&self.blocking);
        calls
            .deadlines
            .values_mut()
            .for_each(|running| *running = deadline.instant().min(*running));
        calls.is_changed = true;
        self.waker.wake();
    }

    /// The inbox of a channel that was opened.
    pub(crate) fn open_inbox(&self, channel: u16, max_unread: usize) -> Arc<Inbox> {
        let inbox = self.inboxes.open(channel, max_unread);
        if let Some(end) = self.end.get() {
            inbox.close(end.into()); // it has ended meanwhile
        }
        inbox
    }

    /// Writes frames to the broker, without waiting for it.
    ///
    /// # Errors
    /// If the connection has ended.
    pub(crate) fn write(&self, frames: &[u8]) -> Result<(), ErrorKind> {
        if let Some(end) = self.end.get() {
            return Err(end.into());
        }
        let written = self.writer.write(frames);
        if !matches!(written, Ok(false)) {
            self.waker.wake(); // the driver writes the backlog, or learns why writing has failed
            self.wake_standby();
        }
        written
            .map(drop)
            .map_err(|error| ErrorKind::ConnectionLost(describe_io_error(&error)))
    }

    /// Whether the broker does not take what we send at once.
    pub fn has_backlog(&self) -> bool {
        self.writer.has_backlog()
    }

    /// Waits until the broker has taken what was sent, as long as it takes some within each
    /// `timeout`.
    pub fn drain(&self, timeout: Duration) {
        while self.has_backlog() && !self.has_ended() {
            let before = self.writer.backlog_len();
            let is_taken = || self.writer.backlog_len() != before;
            self.drive_until(Instant::now() + timeout, &is_taken);
            if !is_taken() {
                return;
            }
        }
    }

    /// The size of frames in bytes.
    pub(crate) fn frame_max(&self) -> usize {
        self.frame_max.load(Ordering::Relaxed) as usize
    }

    /// Whether both sides have logged in.
    pub(crate) fn is_logged_in(&self) -> bool {
        self.frame_max() > 0
    }

    /// Receives whether the broker blocks publishers. Disconnected when the connection ends.
    pub fn notifications(&self) -> Receiver<Notification> {
        self.notifications.clone()
    }

    /// How the connection ended, if it has.
    pub(crate) fn ended(&self) -> Option<&End> {
        self.end.get()
    }

    /// Whether the connection has ended.
    pub fn has_ended(&self) -> bool {
        self.end.get().is_some()
    }

    /// The end of the connection as an error, if it has ended.
    pub fn cause(&self) -> Option<ErrorKind> {
        self.end.get().map(ErrorKind::from)
    }

    fn notify(&self, notification: Notification) {
        if let Some(notifier) = &*lock(&self.notifier) {
            let _ = notifier.send(notification); // the link has a receiver
        }
    }

    /// Answers `connection.close`.
    fn confirm_close(&self) {
        const CLOSE_OK: (u16, u16) = (10, 51);
        let mut close_ok = Vec::new();
        put_method(&mut close_ok, 0, CLOSE_OK, |_| ());
        let _ = self.writer.write(&close_ok); // if it fails, the broker has gone
    }

    /// Ends the connection now, and with it all blocking calls on it.
    pub fn shut_down(&self) {
        self.end(End::Local);
    }

    /// Ends the connection, because the broker has not answered in time.
    pub fn give_up(&self) {
        self.end(End::Silent);
    }

    /// The connection has ended; the first cause counts.
    pub(crate) fn end(&self, end: End) {
        if self.end.set(end).is_err() {
            return;
        }
        let cause = self.cause().expect("it was set");
        self.writer.shut_down();
        let _ = self.pair.shutdown(Shutdown::Both); // fails only if it is shut down already
        self.inboxes.close_all(&cause);
        lock(&self.notifier).take();
        self.waker.wake();
        self.wake_standby();
    }
}

/// The state of the thread that drives a link.
struct Driver {
    from_broker: FrameBuffer,
    from_amiquip: FromAmiquip,
    demultiplexer: Demultiplexer,
    heartbeat: Heartbeat,
}

/// The heartbeats of a connection (AMQP 0-9-1, 4.2.7).
struct Heartbeat {
    /// Instant of the last received bytes, of a frame or of a part of it.
    last_heard: Instant,
    interval: Interval,
}

enum Interval {
    /// Before the login: what we want, in seconds.
    Wanted(u16),
    /// The next heartbeat is sent at `send_at`, if nothing else was sent since the last one.
    Running {
        interval: Duration,
        send_at: Instant,
    },
}

impl Heartbeat {
    /// The smaller interval, or the one that is not 0: heartbeats cannot be turned off here.
    fn negotiated(&self, brokers: u16) -> u16 {
        match (&self.interval, brokers) {
            (Interval::Wanted(ours), 0) => *ours,
            (Interval::Wanted(ours), brokers) => brokers.min(*ours),
            (Interval::Running { .. }, brokers) => brokers, // not asked after the login
        }
    }

    fn start(&mut self, seconds: u16, now: Instant) {
        let interval = Duration::from_secs(seconds.into());
        self.interval = Interval::Running {
            interval,
            send_at: now + interval / 2,
        };
    }

    fn next_timer(&self) -> Option<Instant> {
        match self.interval {
            Interval::Wanted(_) => None, // the login has a deadline
            Interval::Running { interval, send_at } => {
                Some(send_at.min(self.last_heard + 2 * interval))
            }
        }
    }
}

/// The result of poll(2).
#[derive(Clone, Copy)]
struct Events {
    socket: PollFlags,
    pair: PollFlags,
}

impl Driver {
    fn new(connection_name: String, heartbeat: u16) -> Self {
        let now = Instant::now();
        Driver {
            from_broker: FrameBuffer::new(),
            from_amiquip: FromAmiquip::new(connection_name),
            demultiplexer: Demultiplexer::new(),
            heartbeat: Heartbeat {
                last_heard: now,
                interval: Interval::Wanted(heartbeat),
            },
        }
    }

    /// Waits once, and moves what is ready. Returns whether the socket has had input. If the
    /// connection ends, `link` knows.
    fn turn(&mut self, link: &Link, until: Option<Instant>, is_ready: &dyn Fn() -> bool) -> bool {
        let until = until.into_iter().chain(self.heartbeat.next_timer()).min();
        let until = {
            let mut calls = lock(&link.blocking);
            calls.wakes_at = calls.deadlines.values().copied().chain(until).min();
            calls.is_changed = false;
            calls.wakes_at
        };
        let events = self.poll(link, until, is_ready);
        if let Err(end) = self
            .exchange(link, events)
            .and_then(|()| self.check_timers(link))
        {
            link.end(end);
        }
        events.socket.contains(PollFlags::IN)
    }

    fn poll(&self, link: &Link, until: Option<Instant>, is_ready: &dyn Fn() -> bool) -> Events {
        let interest = |writes| {
            if writes {
                PollFlags::IN | PollFlags::OUT
            } else {
                PollFlags::IN
            }
        };
        let has_backlog = link.writer.has_backlog();
        let mut files = [
            PollFd::new(&link.socket, interest(has_backlog)),
            PollFd::new(
                &link.pair,
                interest(!self.demultiplexer.to_amiquip.is_empty()),
            ),
        ];
        // Ends the poll if a backlog or an earlier deadline appeared meanwhile; the next turn
        // includes it.
        let is_changed =
            || has_backlog != link.writer.has_backlog() || lock(&link.blocking).is_changed;
        link.waker
            .poll(&mut files, until, &|| is_changed() || is_ready());
        Events {
            socket: files[0].revents(),
            pair: files[1].revents(),
        }
    }

    fn exchange(&mut self, link: &Link, events: Events) -> Result<(), End> {
        let has_input = PollFlags::IN | PollFlags::HUP | PollFlags::ERR;
        if events.pair.intersects(has_input) {
            self.take_from_amiquip(link)?;
        }
        if events.socket.intersects(has_input) {
            self.heartbeat.last_heard = Instant::now();
            self.take_from_broker(link)?;
        }
        if events.socket.contains(PollFlags::OUT) {
            link.writer.write_backlog();
        }
        self.write_to_amiquip(link)
    }

    fn take_from_amiquip(&mut self, link: &Link) -> Result<(), End> {
        let count = match (&link.pair).read(self.from_amiquip.buffer.space()) {
            Ok(0) => return Err(End::Amiquip),
            Ok(count) => count,
            Err(error) if is_temporary(&error) => return Ok(()),
            Err(error) => return Err(End::Io(error)),
        };
        self.from_amiquip.buffer.advance(count);
        let mut frames = Vec::new();
        let heartbeat = self
            .heartbeat
            .negotiated(self.demultiplexer.brokers_heartbeat);
        if let Some(negotiated) = self.from_amiquip.take_frames(&mut frames, heartbeat)? {
            link.frame_max
                .store(negotiated.frame_max, Ordering::Relaxed);
            self.heartbeat.start(negotiated.heartbeat, Instant::now());
        }
        let _ = link.writer.write(&frames); // if it fails, reading tells how the connection ended
        Ok(())
    }

    fn take_from_broker(&mut self, link: &Link) -> Result<(), End> {
        loop {
            let space = self.from_broker.space();
            // Without TLS, reading does not wait for those who write.
            let read = if link.has_tls {
                link.writer.read(space)
            } else {
                (&link.socket).read(space)
            };
            let count = match read {
                Ok(0) => return Err(link.writer.take_error().map_or(End::Eof, End::Io)),
                Ok(count) => count,
                Err(error) if is_temporary(&error) => return Ok(()),
                Err(error) => return Err(End::Io(error)),
            };
            self.from_broker.advance(count);
            while let Some(frame) = self.from_broker.next_frame()? {
                link.saw_frame.store(true, Ordering::Relaxed);
                match self.demultiplexer.take(&link.inboxes, frame) {
                    Ok(None) => {}
                    Ok(Some(notification)) => link.notify(notification),
                    Err(end) => {
                        if let End::Closed { .. } = end {
                            link.confirm_close();
                        }
                        return Err(end);
                    }
                }
            }
            if !link.has_tls || !link.writer.has_plaintext() {
                return Ok(());
            }
        }
    }

    fn write_to_amiquip(&mut self, link: &Link) -> Result<(), End> {
        let to_amiquip = &mut self.demultiplexer.to_amiquip;
        if to_amiquip.is_empty() {
            return Ok(());
        }
        match (&link.pair).write(to_amiquip) {
            Ok(count) => drop(to_amiquip.drain(..count)),
            Err(error) if is_temporary(&error) => {}
            Err(_) => return Err(End::Amiquip),
        }
        if to_amiquip.len() > MAX_FOR_AMIQUIP {
            return Err(FrameError::TooManyMessages.into());
        }
        Ok(())
    }

    /// Ends a connection that is silent, or on which a blocking call is late; and sends a heartbeat
    /// when it is time.
    fn check_timers(&mut self, link: &Link) -> Result<(), End> {
        let now = Instant::now();
        let mut calls = lock(&link.blocking);
        if calls.wakes_at.is_none_or(|wakes_at| now < wakes_at) {
            return Ok(());
        }
        if calls
            .deadlines
            .extract_if(|_, deadline| *deadline <= now)
            .count()
            > 0
        {
            return Err(End::Silent);
        }
        drop(calls);
        if let Interval::Running { interval, send_at } = &mut self.heartbeat.interval {
            if self.heartbeat.last_heard + 2 * *interval <= now {
                return Err(End::Silent);
            }
            if *send_at <= now {
                *send_at = now + *interval / 2;
                if !link.writer.take_has_written() {
                    let mut frame = Vec::new();
                    put_frame(&mut frame, HEARTBEAT, 0, |_| ());
                    // If it fails, reading tells how the connection ended.
                    let _ = link.writer.write(&frame);
                    link.writer.take_has_written(); // this one does not replace the next
                }
            }
        }
        Ok(())
    }
}

/// Whether reading or writing can go on later.
fn is_temporary(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::connection::frames::HEARTBEAT;
    use std::net::TcpListener;

    /// A driven link, amiquip's end of the socketpair, which blocks, and the broker's end of the
    /// socket.
    fn link() -> (Arc<Link>, UnixStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let socket = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        socket.set_nonblocking(true).unwrap();
        let waker = Waker::new().unwrap();
        let (link, AmiquipStream(amiquip)) =
            Link::new(Transport::Plain(socket), "test".into(), 1, waker).unwrap();
        amiquip.set_nonblocking(false).unwrap();
        link.start_standby().unwrap();
        let broker = listener.accept().unwrap().0;
        broker
            .set_read_timeout(Some(Duration::from_secs(60)))
            .unwrap();
        (link, amiquip, broker)
    }

    fn after(millis: u64) -> Deadline {
        Deadline::after(Duration::from_millis(millis))
    }

    const LONG: u64 = 60_000;

    /// Blocks until the link has ended, as a call of amiquip does at a frozen broker.
    fn block(mut amiquip: &UnixStream) -> bool {
        amiquip.read(&mut [0]).is_ok_and(|count| count == 0)
    }

    fn wait_for_end(link: &Link) -> ErrorKind {
        let start = Instant::now();
        while !link.has_ended() {
            assert!(
                start.elapsed() < Duration::from_secs(60),
                "the link does not end"
            );
            thread::sleep(Duration::from_millis(1));
        }
        link.cause().unwrap()
    }

    /// amiquip sends the protocol header, and tune-ok without heartbeats.
    fn log_in(mut amiquip: &UnixStream, broker: &mut TcpStream) {
        let mut bytes = b"AMQP\0\0\x09\x01".to_vec();
        put_method(&mut bytes, 0, (10, 31), |to| {
            to.extend_from_slice(&[0, 9, 0, 2, 0, 0, 0, 0]);
        });
        amiquip.write_all(&bytes).unwrap();
        broker.read_exact(&mut bytes).unwrap();
        assert_eq!(
            bytes[bytes.len() - 3..],
            [0, 1, 0xce],
            "with heartbeats each second"
        );
    }

    #[test]
    fn a_blocking_call_ends_at_its_deadline_and_the_connection_with_it() {
        let (link, amiquip, _broker) = link();
        let deadline = after(20);
        assert_eq!(link.run_blocking_until(&deadline, || block(&amiquip)), None);
        assert!(deadline.remaining().is_zero());
        assert_eq!(link.cause(), Some(ErrorKind::Silent));
        assert_eq!(link.write(b"x"), Err(ErrorKind::Silent));
    }

    #[test]
    fn a_call_that_ends_in_time_keeps_its_result_and_its_connection() {
        let (link, _amiquip, _broker) = link();
        assert_eq!(link.run_blocking_until(&after(LONG), || 42), Some(42));
        assert!(!link.has_ended());
    }

    #[test]
    fn the_deadline_of_a_running_call_can_be_made_earlier() {
        let (link, amiquip, _broker) = link();
        let (started, is_running) = crossbeam_channel::bounded(1);
        let call = || {
            started.send(()).unwrap();
            block(&amiquip)
        };
        let result = thread::scope(|scope| {
            let blocked = scope.spawn(|| link.run_blocking_until(&after(LONG), call));
            is_running.recv().unwrap();
            link.limit_blocking(&after(20));
            blocked.join().unwrap()
        });
        assert_eq!(result, None);
    }

    #[test]
    fn of_several_running_calls_the_one_whose_deadline_passes_has_no_result() {
        let (link, amiquip, _broker) = link();
        let results = thread::scope(|scope| {
            let blocked = [LONG, 20].map(|millis| {
                scope.spawn({
                    let link = &link;
                    let amiquip = &amiquip;
                    move || link.run_blocking_until(&after(millis), || block(amiquip))
                })
            });
            blocked.map(|thread| thread.join().unwrap())
        });
        assert_eq!(results, [Some(true), None]);
    }

    #[test]
    fn what_the_socket_does_not_take_is_written_by_the_driver() {
        let (link, amiquip, mut broker) = link();
        log_in(&amiquip, &mut broker);
        let sent = vec![7; 64 << 20]; // more than a socket buffers
        link.write(&sent).unwrap();
        assert!(link.has_backlog());
        let mut received = vec![0; sent.len()];
        broker.read_exact(&mut received).unwrap();
        assert!(received == sent && !link.has_ended());
    }

    #[test]
    fn a_broker_without_heartbeats_does_not_turn_ours_off() {
        let heartbeat = Heartbeat {
            last_heard: Instant::now(),
            interval: Interval::Wanted(10),
        };
        assert_eq!(
            [0, 5, 60].map(|theirs| heartbeat.negotiated(theirs)),
            [10, 5, 10]
        );
    }

    #[test]
    fn heartbeats_are_sent_and_a_silent_broker_ends_the_connection() {
        let (link, amiquip, mut broker) = link();
        let start = Instant::now();
        log_in(&amiquip, &mut broker);
        let mut frame = [0; 8];
        for _ in 0..2 {
            broker.read_exact(&mut frame).unwrap();
            assert_eq!(frame, [HEARTBEAT, 0, 0, 0, 0, 0, 0, 0xce]);
        }
        assert_eq!(wait_for_end(&link), ErrorKind::Silent);
        assert!(
            start.elapsed() >= Duration::from_secs(2),
            "two intervals: {:?}",
            start.elapsed()
        );
    }

    #[test]
    fn the_end_of_the_socket_is_known_at_once_and_a_write_is_an_error() {
        let (link, amiquip, broker) = link();
        let inbox = link.open_inbox(1, 9);
        let notifications = link.notifications();
        drop(broker);
        let lost = ErrorKind::ConnectionLost("the broker closed the socket".into());
        assert_eq!(wait_for_end(&link), lost);
        assert!(block(&amiquip), "amiquip's stream has ended");
        assert_eq!(
            (link.write(b"x"), inbox.ended()),
            (Err(lost.clone()), Some(lost.clone()))
        );
        assert!(notifications.recv().is_err() && !*lock(&inbox.is_open));
        assert_eq!(
            link.open_inbox(2, 9).ended(),
            Some(lost),
            "also of a channel that is opened meanwhile"
        );
    }

    #[test]
    fn the_thread_that_waits_drives_the_link_in_place_of_the_standby_thread_and_leaves_it_again() {
        let (link, amiquip, mut broker) = link();
        log_in(&amiquip, &mut broker);
        let inbox = link.open_inbox(1, 9);
        inbox.has_confirms.store(true, Ordering::Relaxed);
        for _ in 0..3 {
            let mut ack = Vec::new();
            put_method(&mut ack, 1, (60, 80), |to| {
                to.extend_from_slice(&[0, 0, 0, 0, 0, 0, 0, 1, 0]);
            });
            broker.write_all(&ack).unwrap();
            link.drive_until(Instant::now() + Duration::from_secs(60), &|| {
                inbox.has_arrived()
            });
            assert_eq!(inbox.take().confirmations.len(), 1);
        }
        // Nobody waits: the standby thread drives.
        broker
            .write_all(&[1, 0, 1, 0, 0, 0, 4, 0, 60, 0, 1, 0xce])
            .unwrap();
        let malformed = ErrorKind::ConnectionLost(FrameError::Malformed.to_string());
        assert_eq!(wait_for_end(&link), malformed);
    }

    #[test]
    fn the_broker_may_close_the_connection_and_gets_an_answer() {
        let (link, amiquip, mut broker) = link();
        log_in(&amiquip, &mut broker);
        let mut close = Vec::new();
        put_method(&mut close, 0, (10, 50), |to| {
            to.extend_from_slice(b"\x01\x40\x02by\0\0\0\0");
        });
        broker.write_all(&close).unwrap();
        let mut answer = [0; 12];
        broker.read_exact(&mut answer).unwrap();
        assert_eq!(answer[7..11], [0, 10, 0, 51]);
        assert_eq!(
            wait_for_end(&link),
            ErrorKind::connection_closed(320, b"by")
        );
    }
}
