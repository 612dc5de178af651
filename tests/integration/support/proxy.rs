//! A TCP proxy between the programs and a broker. It breaks, delays and freezes connections as
//! networks do.

use super::broker;
use rustix::net::connect_unspec;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

/// A TCP proxy to a broker.
pub(crate) struct Proxy {
    address: SocketAddr,
    forwarder: Arc<Forwarder>,
}

/// What the threads of a proxy share.
struct Forwarder {
    /// Host and port of the broker.
    broker: String,
    state: Mutex<State>,
    traffic_changed: Condvar,
}

#[derive(Default)]
struct State {
    connections: Vec<Connection>,
    /// Whether new connections are closed at once.
    refuses: bool,
    /// How many connections were refused.
    refused: usize,
    /// Whether the proxy hides from the broker that a client's connection has ended.
    hides_client_close: bool,
    traffic: Traffic,
    round_trips: usize,
    /// Whether the latest bytes came from a client.
    client_sent_last: bool,
    /// After how many more bytes all connections are reset.
    reset_after: Option<usize>,
    trigger: Option<Trigger>,
}

/// Both sockets of a connection through the proxy.
struct Connection {
    client: TcpStream,
    broker: TcpStream,
}

/// How the proxy forwards bytes, in both directions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Traffic {
    /// At once.
    #[default]
    Normal,
    /// Not at all; the connections stay open.
    Frozen,
    /// Each piece after this delay.
    Delayed(Duration),
    /// One byte every millisecond.
    ByteByByte,
}

/// An action that runs before the proxy forwards a method of a client for the `times`-th time.
struct Trigger {
    method: [u8; 4],
    times: usize,
    action: Box<dyn FnOnce(&mut Traffic) + Send>,
}

/// Methods of AMQP 0-9-1 as they are encoded in a frame: class and method.
pub(crate) const CONNECTION_START_OK: [u8; 4] = [0, 10, 0, 11];
pub(crate) const CHANNEL_OPEN: [u8; 4] = [0, 20, 0, 10];
pub(crate) const QUEUE_DECLARE: [u8; 4] = [0, 50, 0, 10];
pub(crate) const BASIC_CONSUME: [u8; 4] = [0, 60, 0, 20];
pub(crate) const BASIC_PUBLISH: [u8; 4] = [0, 60, 0, 40];
pub(crate) const BASIC_ACK: [u8; 4] = [0, 60, 0, 80];

/// The size of what precedes class and method in a frame: type, channel and size.
const FRAME_HEADER: usize = 7;

impl Proxy {
    /// Starts a proxy to the broker of the tests.
    pub(crate) fn start() -> Self {
        Proxy::start_to(&broker::authority())
    }

    /// Starts a proxy to another broker.
    pub(crate) fn start_to(broker: &str) -> Self {
        Proxy::start_at(("127.0.0.1", 0), broker)
    }

    /// Starts a proxy at this address to another broker.
    pub(crate) fn start_at(address: (&str, u16), broker: &str) -> Self {
        let listener = TcpListener::bind(address).expect("the port is free");
        let address = listener.local_addr().expect("the socket is bound");
        let state = Mutex::default();
        let traffic_changed = Condvar::new();
        let forwarder = Arc::new(Forwarder {
            broker: broker.into(),
            state,
            traffic_changed,
        });
        let acceptor = forwarder.clone();
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                acceptor.connect(client);
            }
        });
        Proxy { address, forwarder }
    }

    /// The URL of the tests' broker, through this proxy.
    pub(crate) fn url(&self) -> String {
        broker::url_at(&self.authority())
    }

    /// Host and port, as messages show them.
    pub(crate) fn authority(&self) -> String {
        self.address.to_string()
    }

    /// Closes all connections.
    pub(crate) fn close_connections(&self) {
        let mut state = self.forwarder.state();
        state.hides_client_close = false;
        for connection in state.connections.drain(..) {
            connection.close();
        }
    }

    /// Closes all connections to the clients. The broker does not see it until
    /// [`Proxy::close_connections`].
    pub(crate) fn close_client_side(&self) {
        let mut state = self.forwarder.state();
        state.hides_client_close = true;
        for connection in &state.connections {
            let _ = connection.client.shutdown(Shutdown::Both); // fails if it is closed already
        }
    }

    /// Resets all connections after `bytes` more bytes, which may be in the middle of a frame.
    pub(crate) fn reset_after(&self, bytes: usize) {
        self.forwarder.state().reset_after = Some(bytes);
    }

    /// Runs `action` before a client's `method` is forwarded for the `times`-th time. All bytes
    /// before that method are forwarded first.
    pub(crate) fn before_forwarding(
        &self,
        method: [u8; 4],
        times: usize,
        action: impl FnOnce() + Send + 'static,
    ) {
        let action = Box::new(|_: &mut Traffic| action());
        self.forwarder.state().trigger = Some(Trigger {
            method,
            times,
            action,
        });
    }

    /// Freezes the traffic before a client's `method` is forwarded.
    pub(crate) fn freeze_before(&self, method: [u8; 4]) {
        self.set_traffic_before(method, Traffic::Frozen);
    }

    /// Changes the traffic before a client's `method` is forwarded.
    pub(crate) fn set_traffic_before(&self, method: [u8; 4], new: Traffic) {
        let action = Box::new(move |traffic: &mut Traffic| *traffic = new);
        self.forwarder.state().trigger = Some(Trigger {
            method,
            times: 1,
            action,
        });
    }

    /// How often the broker sent something after a client did.
    pub(crate) fn round_trips(&self) -> usize {
        self.forwarder.state().round_trips
    }

    /// Sets whether new connections are refused.
    pub(crate) fn refuse(&self, refuses: bool) {
        self.forwarder.state().refuses = refuses;
    }

    /// Waits until at least `count` connections were refused.
    #[track_caller]
    pub(crate) fn wait_for_refusals(&self, count: usize) {
        super::eventually("refused connections", || {
            (self.forwarder.state().refused >= count).then_some(())
        });
    }

    /// Waits until a client has connected.
    #[track_caller]
    pub(crate) fn wait_for_connection(&self) {
        super::eventually("a connection", || {
            (!self.forwarder.state().connections.is_empty()).then_some(())
        });
    }

    /// Sets how bytes are forwarded. Bytes that [`Traffic::Frozen`] held back are forwarded when it
    /// ends.
    pub(crate) fn set_traffic(&self, traffic: Traffic) {
        self.forwarder.state().traffic = traffic;
        self.forwarder.traffic_changed.notify_all();
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.refuse(true);
        self.close_connections(); // first, so that bytes that were held back are not forwarded
        self.set_traffic(Traffic::Normal);
    }
}

impl Connection {
    fn close(&self) {
        for socket in [&self.client, &self.broker] {
            let _ = socket.shutdown(Shutdown::Both); // fails if it is closed already
        }
    }

    fn reset(&self) {
        for socket in [&self.client, &self.broker] {
            let _ = connect_unspec(socket); // sends RST
        }
    }
}

impl Forwarder {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state
            .lock()
            .expect("no thread panics while it holds the lock")
    }

    fn connect(self: &Arc<Self>, client: TcpStream) {
        let mut state = self.state();
        let Ok(broker) = TcpStream::connect(&self.broker) else {
            return;
        };
        if state.refuses {
            state.refused += 1;
            return;
        }
        for (from, to, is_client) in [(&client, &broker, true), (&broker, &client, false)] {
            let forwarder = self.clone();
            let from = clone_socket(from);
            let to = clone_socket(to);
            thread::spawn(move || forwarder.copy(from, to, is_client));
        }
        state.connections.push(Connection { client, broker });
    }

    fn copy(&self, mut from: TcpStream, mut to: TcpStream, is_client: bool) {
        let mut buffer = [0; 16_384];
        while let Ok(count @ 1..) = from.read(&mut buffer) {
            let bytes = &buffer[..count];
            self.state().count_round_trips(is_client);
            let trigger = if is_client {
                self.state().take_trigger(bytes)
            } else {
                None
            };
            let (before, rest) = bytes.split_at(trigger.as_ref().map_or(0, |(at, _)| *at));
            let mut is_open = self.forward(before, &mut to);
            if let Some((_, trigger)) = trigger {
                (trigger.action)(&mut self.state().traffic);
            }
            is_open = is_open && self.forward(rest, &mut to);
            if !is_open {
                break;
            }
        }
        if !(is_client && self.state().hides_client_close) {
            let _ = to.shutdown(Shutdown::Both); // fails if it is closed already
        }
    }

    /// Writes bytes as the current [`Traffic`] says; false if the connection is broken.
    fn forward(&self, bytes: &[u8], to: &mut TcpStream) -> bool {
        if bytes.is_empty() {
            return true;
        }
        let is_frozen = |state: &mut State| state.traffic == Traffic::Frozen;
        let state = self.traffic_changed.wait_while(self.state(), is_frozen);
        let mut state = state.expect("no thread panics while it holds the lock");
        if let Some(left) = &mut state.reset_after {
            let last = bytes.len().min(*left);
            *left -= last;
            if *left == 0 {
                state.reset_after = None;
                let _ = to.write_all(&bytes[..last]); // the connection ends anyway
                state
                    .connections
                    .drain(..)
                    .for_each(|connection| connection.reset());
                return false;
            }
        }
        let traffic = state.traffic;
        drop(state);
        match traffic {
            Traffic::Normal | Traffic::Frozen => to.write_all(bytes).is_ok(),
            Traffic::Delayed(delay) => {
                thread::sleep(delay);
                to.write_all(bytes).is_ok()
            }
            Traffic::ByteByByte => {
                let mut left = bytes;
                // When this traffic ends the rest is forwarded at once: a large piece would take
                // minutes.
                while self.state().traffic == Traffic::ByteByByte && left.len() > 1 {
                    thread::sleep(Duration::from_millis(1));
                    if to.write_all(&left[..1]).is_err() {
                        return false;
                    }
                    left = &left[1..];
                }
                to.write_all(left).is_ok()
            }
        }
    }
}

impl State {
    fn count_round_trips(&mut self, is_client: bool) {
        self.round_trips += usize::from(self.client_sent_last && !is_client);
        self.client_sent_last = is_client;
    }

    /// Takes the trigger if these bytes contain its method for the last of its `times`, with the
    /// position of that method's frame.
    fn take_trigger(&mut self, bytes: &[u8]) -> Option<(usize, Trigger)> {
        let trigger = self.trigger.as_mut()?;
        let is_method = |window: &[u8]| window == trigger.method;
        for at in (0..bytes.len()).filter(|&at| bytes[at..].get(..4).is_some_and(is_method)) {
            trigger.times -= 1;
            if trigger.times == 0 {
                return self
                    .trigger
                    .take()
                    .map(|it| (at.saturating_sub(FRAME_HEADER), it));
            }
        }
        None
    }
}

fn clone_socket(stream: &TcpStream) -> TcpStream {
    stream.set_nodelay(true).expect("it is a TCP socket");
    stream.try_clone().expect("a file descriptor is free")
}
