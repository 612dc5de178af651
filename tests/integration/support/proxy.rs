//! A proxy between a program and the broker, to pull the cable.

use super::broker;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;

/// A TCP proxy before the broker of the tests.
pub(crate) struct Proxy {
    address: SocketAddr,
    cable: Arc<Cable>,
}

#[derive(Default)]
struct Cable {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// Every connection's ends.
    streams: Vec<TcpStream>,
    refuses: bool,
    frozen: bool,
}

impl Proxy {
    pub(crate) fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("there are ports");
        let address = listener.local_addr().expect("it is bound");
        let cable = Arc::new(Cable::default());
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
        broker::url_with(None, Some(&self.address.to_string()), None)
    }

    /// Breaks all connections.
    pub(crate) fn cut(&self) {
        for stream in self.cable.state().streams.drain(..) {
            let _ = stream.shutdown(Shutdown::Both); // its other end may have done so already
        }
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
        let Ok(server) = TcpStream::connect(broker::authority()) else { return };
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
            let state = self.state();
            drop(self.changed.wait_while(state, |state| state.frozen));
            if to.write_all(&buffer[..count]).is_err() {
                break;
            }
        }
        let _ = to.shutdown(Shutdown::Both); // it may be closed already
    }
}

fn clone(stream: &TcpStream) -> TcpStream {
    stream.set_nodelay(true).expect("it is a TCP socket");
    stream.try_clone().expect("there are file descriptors")
}
