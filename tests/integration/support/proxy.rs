//! A proxy between the programs and a broker, to do to a connection what networks do.

use super::broker;
use rustix::net::connect_unspec;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

/// A TCP proxy before a broker.
pub(crate) struct Proxy {
    address: SocketAddr,
    cable: Arc<Cable>,
}

struct Cable {
    /// Host and port of the broker.
    broker: String,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    connections: Vec<Connection>,
    /// Whether connections are accepted only to be closed.
    refuses: bool,
    /// How many were.
    refused: usize,
    /// Whether the end of a client's connection is kept from the broker.
    half_open: bool,
    weather: Weather,
    /// How often the broker has answered, and whether a client has spoken since.
    turns: (usize, bool),
    /// After how many more bytes all connections are reset.
    reset_in: Option<usize>,
    trap: Option<Trap>,
}

/// Both ends of a connection through the proxy.
struct Connection {
    client: TcpStream,
    server: TcpStream,
}

/// How bytes pass.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Weather {
    /// At once.
    #[default]
    Fair,
    /// Not at all, in either direction; nothing is closed. A black hole.
    Frozen,
    /// Each piece after so long.
    Delayed(Duration),
    /// Byte by byte.
    Dripping,
}

/// What is done when a client has sent a method so often.
struct Trap {
    method: [u8; 4],
    times: usize,
    act: Box<dyn FnOnce(&mut Weather) + Send>,
}

/// Methods of AMQP 0-9-1 as they stand in a frame: class and method.
pub(crate) const CONNECTION_START_OK: [u8; 4] = [0, 10, 0, 11];
pub(crate) const CHANNEL_OPEN: [u8; 4] = [0, 20, 0, 10];
pub(crate) const QUEUE_DECLARE: [u8; 4] = [0, 50, 0, 10];
pub(crate) const BASIC_CONSUME: [u8; 4] = [0, 60, 0, 20];
pub(crate) const BASIC_PUBLISH: [u8; 4] = [0, 60, 0, 40];
pub(crate) const BASIC_ACK: [u8; 4] = [0, 60, 0, 80];

/// What comes before class and method in a frame: type, channel and size.
const FRAME_HEADER: usize = 7;

impl Proxy {
    /// A proxy before the broker of the tests.
    pub(crate) fn start() -> Self {
        Proxy::before(&broker::authority())
    }

    /// A proxy before another broker.
    pub(crate) fn before(broker: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("there are ports");
        let address = listener.local_addr().expect("it is bound");
        let (state, changed) = (Mutex::default(), Condvar::new());
        let cable = Arc::new(Cable { broker: broker.into(), state, changed });
        let at_work = cable.clone();
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                at_work.connect(client);
            }
        });
        Proxy { address, cable }
    }

    /// The URL of the tests' broker, by way of this proxy.
    pub(crate) fn url(&self) -> String {
        broker::url_with(None, Some(&self.authority()), None)
    }

    /// Host and port, as messages name it.
    pub(crate) fn authority(&self) -> String {
        self.address.to_string()
    }

    /// Breaks all connections.
    pub(crate) fn cut(&self) {
        let mut state = self.cable.state();
        state.half_open = false;
        for connection in state.connections.drain(..) {
            connection.cut();
        }
    }

    /// Breaks all connections for the clients; the broker learns nothing of it before they are cut.
    pub(crate) fn half_open(&self) {
        let mut state = self.cable.state();
        state.half_open = true;
        for connection in &state.connections {
            let _ = connection.client.shutdown(Shutdown::Both); // it may be closed already
        }
    }

    /// Resets all connections when so many more bytes have passed, in the middle of a frame or not.
    pub(crate) fn reset_after(&self, bytes: usize) {
        self.cable.state().reset_in = Some(bytes);
    }

    /// Does something before a client's `method` passes for the `times`-th time; what was sent before
    /// it has passed.
    pub(crate) fn before_passing(
        &self,
        method: [u8; 4],
        times: usize,
        act: impl FnOnce() + Send + 'static,
    ) {
        self.cable.state().trap = Some(Trap { method, times, act: Box::new(|_| act()) });
    }

    /// Freezes before a client's `method` passes.
    pub(crate) fn freeze_before(&self, method: [u8; 4]) {
        let act = Box::new(|weather: &mut Weather| *weather = Weather::Frozen);
        self.cable.state().trap = Some(Trap { method, times: 1, act });
    }

    /// How often the direction of what passes has turned from the client to the broker and back.
    pub(crate) fn round_trips(&self) -> usize {
        self.cable.state().turns.0
    }

    /// Whether new connections are refused from now on.
    pub(crate) fn refuse(&self, refuses: bool) {
        self.cable.state().refuses = refuses;
    }

    /// Waits until so many connections were refused.
    #[track_caller]
    pub(crate) fn await_refusals(&self, count: usize) {
        super::eventually("refused connections", || {
            (self.cable.state().refused >= count).then_some(())
        });
    }

    /// How bytes pass from now on. What a frozen cable has held passes when it thaws.
    pub(crate) fn set(&self, weather: Weather) {
        self.cable.state().weather = weather;
        self.cable.changed.notify_all();
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.refuse(true);
        self.cut(); // before what a frozen cable has held can pass
        self.set(Weather::Fair);
    }
}

impl Connection {
    fn cut(&self) {
        for end in [&self.client, &self.server] {
            let _ = end.shutdown(Shutdown::Both); // it may be closed already
        }
    }
}

impl Cable {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no test panics with it")
    }

    fn connect(self: &Arc<Self>, client: TcpStream) {
        let mut state = self.state();
        let Ok(server) = TcpStream::connect(&self.broker) else { return };
        if state.refuses {
            state.refused += 1;
            return;
        }
        for (from, to, is_client) in [(&client, &server, true), (&server, &client, false)] {
            let (cable, from, to) = (self.clone(), clone(from), clone(to));
            thread::spawn(move || cable.copy(from, to, is_client));
        }
        state.connections.push(Connection { client, server });
    }

    fn copy(&self, mut from: TcpStream, mut to: TcpStream, is_client: bool) {
        let mut buffer = [0; 16_384];
        while let Ok(count @ 1..) = from.read(&mut buffer) {
            let bytes = &buffer[..count];
            self.state().turn(is_client);
            let trap = if is_client { self.state().spring_trap(bytes) } else { None };
            let (before, rest) = bytes.split_at(trap.as_ref().map_or(0, |(at, _)| *at));
            let mut passed = self.pass(before, &mut to);
            if let Some((_, trap)) = trap {
                (trap.act)(&mut self.state().weather);
            }
            passed = passed && self.pass(rest, &mut to);
            if !passed {
                break;
            }
        }
        if !(is_client && self.state().half_open) {
            let _ = to.shutdown(Shutdown::Both); // it may be closed already
        }
    }

    /// Writes bytes as the weather permits; false when the connection is of no use any more.
    fn pass(&self, bytes: &[u8], to: &mut TcpStream) -> bool {
        let frozen = |state: &mut State| state.weather == Weather::Frozen;
        let mut state = self.changed.wait_while(self.state(), frozen).expect("as above");
        if let Some(left) = &mut state.reset_in {
            let passing = bytes.len().min(*left);
            *left -= passing;
            if *left == 0 {
                state.reset_in = None;
                let _ = to.write_all(&bytes[..passing]); // it is broken anyway
                for connection in state.connections.drain(..) {
                    let _ = connect_unspec(&connection.client); // resets it
                    let _ = connect_unspec(&connection.server);
                }
                return false;
            }
        }
        let weather = state.weather;
        drop(state);
        match weather {
            Weather::Fair | Weather::Frozen => to.write_all(bytes).is_ok(),
            Weather::Delayed(pause) => {
                thread::sleep(pause);
                to.write_all(bytes).is_ok()
            }
            Weather::Dripping => {
                let mut left = bytes;
                // What is left when it is over passes at once: byte by byte a large piece takes minutes.
                while self.state().weather == Weather::Dripping && left.len() > 1 {
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
    fn turn(&mut self, is_client: bool) {
        let (trips, client_spoke) = &mut self.turns;
        *trips += usize::from(*client_spoke && !is_client);
        *client_spoke = is_client;
    }

    /// Whether the trap closes on these bytes, and before which of them.
    fn spring_trap(&mut self, bytes: &[u8]) -> Option<(usize, Trap)> {
        let trap = self.trap.as_mut()?;
        let is_method = |window: &[u8]| window == trap.method;
        for at in (0..bytes.len()).filter(|&at| bytes[at..].get(..4).is_some_and(is_method)) {
            trap.times -= 1;
            if trap.times == 0 {
                return self.trap.take().map(|trap| (at.saturating_sub(FRAME_HEADER), trap));
            }
        }
        None
    }
}

fn clone(stream: &TcpStream) -> TcpStream {
    stream.set_nodelay(true).expect("it is a TCP socket");
    stream.try_clone().expect("there are file descriptors")
}
