//! A proxy between a program and the broker, to pull the cable.

use super::broker;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;

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
    /// Every connection's ends.
    streams: Vec<TcpStream>,
    refuses: bool,
    frozen: bool,
    /// The bytes of a client's that wait for it, and what is done before they pass.
    trap: Option<Trap>,
}

/// What is done when a client has sent a method so often.
struct Trap {
    method: [u8; 4],
    times: usize,
    act: Box<dyn FnOnce() + Send>,
}

/// Methods of AMQP 0-9-1 as they stand in a frame: class and method.
pub(crate) const CONNECTION_START_OK: [u8; 4] = [0, 10, 0, 11];
pub(crate) const CHANNEL_OPEN: [u8; 4] = [0, 20, 0, 10];
pub(crate) const QUEUE_DECLARE: [u8; 4] = [0, 50, 0, 10];
pub(crate) const BASIC_CONSUME: [u8; 4] = [0, 60, 0, 20];

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

    /// The broker's URL, by way of this proxy.
    pub(crate) fn url(&self) -> String {
        broker::url_with(None, Some(&self.authority()), None)
    }

    /// Host and port, as messages name it.
    pub(crate) fn authority(&self) -> String {
        self.address.to_string()
    }

    /// Breaks all connections.
    pub(crate) fn cut(&self) {
        for stream in self.cable.state().streams.drain(..) {
            let _ = stream.shutdown(Shutdown::Both); // its other end may have done so already
        }
    }

    /// Does something before a client's `method` passes for the `times`-th time.
    pub(crate) fn before_passing(
        &self,
        method: [u8; 4],
        times: usize,
        act: impl FnOnce() + Send + 'static,
    ) {
        self.cable.state().trap = Some(Trap { method, times, act: Box::new(act) });
    }

    /// Whether new connections are refused from now on.
    pub(crate) fn refuse(&self, refuses: bool) {
        self.cable.state().refuses = refuses;
    }

    /// Lets nothing pass any more, in either direction, without closing anything.
    pub(crate) fn freeze(&self) {
        self.cable.state().frozen = true;
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.refuse(true);
        self.cable.state().frozen = false;
        self.cable.changed.notify_all();
        self.cut();
    }
}

impl Cable {
    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().expect("no test panics with it")
    }

    fn connect(self: &Arc<Self>, client: TcpStream) {
        let mut state = self.state();
        let Ok(server) = TcpStream::connect(&self.broker) else { return };
        if state.refuses {
            return;
        }
        let both = [(&client, &server), (&server, &client)];
        for (from, to) in both.map(|(from, to)| (clone(from), clone(to))) {
            let cable = self.clone();
            thread::spawn(move || cable.copy(from, to));
        }
        state.streams.extend([client, server]);
    }

    fn copy(&self, mut from: TcpStream, mut to: TcpStream) {
        let mut buffer = [0; 16_384];
        while let Ok(count @ 1..) = from.read(&mut buffer) {
            let mut state = self.state();
            if let Some(trap) = state.trap.take_if(|trap| trap.is_sprung_by(&buffer[..count])) {
                (trap.act)();
            }
            drop(self.changed.wait_while(state, |state| state.frozen));
            if to.write_all(&buffer[..count]).is_err() {
                break;
            }
        }
        let _ = to.shutdown(Shutdown::Both); // it may be closed already
    }
}

impl Trap {
    fn is_sprung_by(&mut self, bytes: &[u8]) -> bool {
        if bytes.windows(4).any(|window| window == self.method) {
            self.times -= 1;
        }
        self.times == 0
    }
}

fn clone(stream: &TcpStream) -> TcpStream {
    stream.set_nodelay(true).expect("it is a TCP socket");
    stream.try_clone().expect("there are file descriptors")
}
