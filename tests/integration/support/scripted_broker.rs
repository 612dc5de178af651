//! A scripted broker: it accepts everything like a real one, and misbehaves at one method, as a
//! test says.

use super::raw_peer::{long_str, short_str};
use socket2::{SockFilter, SockRef};
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::mpsc::{channel, Receiver, Sender};
use std::thread;
use std::time::{Duration, Instant};

/// A method of AMQP 0-9-1: the numbers of its class and of itself.
pub(crate) type Method = (u8, u8);

pub(crate) const START_OK: Method = (10, 11);
pub(crate) const CHANNEL_OPEN: Method = (20, 10);
pub(crate) const QUEUE_DECLARE: Method = (50, 10);
pub(crate) const QOS: Method = (60, 10);
pub(crate) const CONSUME: Method = (60, 20);
pub(crate) const CANCEL: Method = (60, 30);
pub(crate) const PUBLISH: Method = (60, 40);

/// The instruction of a packet filter that returns how many bytes of a packet the socket gets.
const BPF_RETURN: u16 = 6;

/// The sentence of a broker that refuses to publish to the default exchange.
pub(crate) const EXCHANGE_REFUSED: &str =
    "ACCESS_REFUSED - access to exchange 'amq.default' in vhost '/' refused for user 'guest'";

/// The consumer tag of all consumers.
const TAG: &[u8] = b"tag";

/// What the broker does when it receives the scripted method.
#[derive(Clone, Copy)]
pub(crate) enum Action {
    /// Answers as it does to any other method: the test counts them.
    Answer,
    /// Answers with this method instead of the right one.
    AnswerWith(Method),
    /// Answers, then cancels the consumer.
    Cancel,
    /// Answers, then sends the same message until the connection ends.
    Flood(Flood),
    /// Answers, cancels the consumer, and then sends nothing more.
    CancelThenSilence,
    /// Sends this challenge of a login (`connection.secure`).
    Challenge(&'static [u8]),
    /// Closes the socket.
    CloseSocket,
    /// Answers, and closes the socket after this time.
    CloseSocketAfter(Duration),
    /// Closes the channel with 403, when it receives the method for this time (1, 2, …) on a
    /// connection.
    Refuse(usize),
    /// Answers, and then drops all packets, as a host that is switched off.
    DropPackets,
}

/// What a flood consists of.
#[derive(Clone, Copy)]
pub(crate) enum Flood {
    /// `basic.deliver`
    Deliveries,
    /// `basic.return`
    Returns,
    /// `connection.blocked`
    Blocked,
}

/// A broker on loopback. It runs until the tests' process ends.
pub(crate) struct ScriptedBroker {
    pub(crate) url: String,
    /// The times at which it received the scripted method.
    pub(crate) received: Receiver<Instant>,
    /// A message for each flood that was ended by the other side.
    pub(crate) flood_ended: Receiver<()>,
}

impl ScriptedBroker {
    pub(crate) fn start(method: Method, action: Action) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port is free");
        let address = listener.local_addr().expect("the socket is bound");
        let (times, received) = channel();
        let (flood_ends, flood_ended) = channel();
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let times = times.clone();
                let flood_ends = flood_ends.clone();
                let connection = Connection {
                    stream,
                    method,
                    action,
                    count: 0,
                    times,
                    flood_ends,
                };
                // The result is ignored: the test sees at the other end how a connection ends.
                thread::spawn(move || connection.serve());
            }
        });
        ScriptedBroker {
            url: format!("amqp://{address}"),
            received,
            flood_ended,
        }
    }
}

struct Connection {
    stream: TcpStream,
    method: Method,
    action: Action,
    /// How often it has received the scripted method.
    count: usize,
    times: Sender<Instant>,
    flood_ends: Sender<()>,
}

impl Connection {
    fn serve(mut self) -> io::Result<()> {
        self.stream.read_exact(&mut [0; 8])?; // the protocol header
        let start = [
            &[0, 9, 0, 0, 0, 0][..],
            &long_str(b"PLAIN"),
            &long_str(b"en_US"),
        ]
        .concat();
        self.send(0, (10, 10), &start)?;
        loop {
            let (channel, kind, payload) = self.read_frame()?;
            if kind != 1 {
                continue; // a body or its header, or a heartbeat
            }
            let method = (payload[1], payload[3]);
            if is_no_wait_declaration(&payload) {
                continue;
            }
            if method == self.method {
                // Fails if the test has dropped the receiver.
                let _ = self.times.send(Instant::now());
                self.count += 1;
                self.misbehave(channel, method)?;
            } else {
                self.answer(channel, method)?;
            }
        }
    }

    fn misbehave(&mut self, channel: u8, method: Method) -> io::Result<()> {
        match self.action {
            Action::Answer => self.answer(channel, method),
            Action::AnswerWith(other) => self.send(channel, other, &short_str(TAG)),
            Action::Cancel => {
                self.answer(channel, method)?;
                self.send(channel, CANCEL, &[&short_str(TAG)[..], &[1]].concat())
            }
            Action::CancelThenSilence => {
                self.answer(channel, method)?;
                self.send(channel, CANCEL, &[&short_str(TAG)[..], &[1]].concat())?;
                loop {
                    thread::park();
                }
            }
            Action::Challenge(text) => self.send(0, (10, 20), &long_str(text)),
            Action::CloseSocket => Err(io::ErrorKind::ConnectionAborted.into()),
            Action::CloseSocketAfter(time) => {
                self.answer(channel, method)?;
                thread::sleep(time);
                Err(io::ErrorKind::ConnectionAborted.into())
            }
            Action::Refuse(count) if count == self.count => {
                let text = short_str(EXCHANGE_REFUSED.as_bytes());
                let reason = [&[1, 0x93][..], &text, &[0; 4]].concat();
                self.send(channel, (20, 40), &reason)?;
                // Like a broker, it ignores what was sent before close-ok.
                loop {
                    let (_, kind, payload) = self.read_frame()?;
                    if kind == 1 && (payload[1], payload[3]) == (20, 41) {
                        return Ok(());
                    }
                }
            }
            Action::Refuse(_) => Ok(()),
            Action::DropPackets => {
                self.answer(channel, method)?;
                let accept_nothing = SockFilter::new(BPF_RETURN, 0, 0, 0);
                SockRef::from(&self.stream).attach_filter(&[accept_nothing])?;
                loop {
                    thread::park();
                }
            }
            Action::Flood(flood) => {
                self.answer(channel, method)?;
                let message = flood_message(flood, channel);
                while self.stream.write_all(&message).is_ok() {}
                let _ = self.flood_ends.send(()); // fails if the test has dropped the receiver
                Err(io::ErrorKind::BrokenPipe.into())
            }
        }
    }

    /// Answers like a broker that accepts everything.
    fn answer(&mut self, channel: u8, method: Method) -> io::Result<()> {
        match method {
            START_OK => self.send(0, (10, 30), &[0, 0, 0, 2, 0, 0, 0, 0]), // tune
            (10, 40) => self.send(0, (10, 41), &[0]),
            (10, 50) => self.send(0, (10, 51), &[]),
            (20, 10) => self.send(channel, (20, 11), &[0; 4]),
            (20, 40) => self.send(channel, (20, 41), &[]),
            (50, 10) => self.send(channel, (50, 11), &[&short_str(b"q")[..], &[0; 8]].concat()),
            QOS => self.send(channel, (60, 11), &[]),
            CONSUME => self.send(channel, (60, 21), &short_str(TAG)),
            CANCEL => self.send(channel, (60, 31), &short_str(TAG)),
            _ => Ok(()),
        }
    }

    fn send(&mut self, channel: u8, (class, method): Method, arguments: &[u8]) -> io::Result<()> {
        let payload = [&[0, class, 0, method], arguments].concat();
        self.stream.write_all(&frame(channel, 1, &payload))
    }

    fn read_frame(&mut self) -> io::Result<(u8, u8, Vec<u8>)> {
        let mut head = [0; 7];
        self.stream.read_exact(&mut head)?;
        let size = u32::from_be_bytes([head[3], head[4], head[5], head[6]]) as usize;
        let mut payload = vec![0; size + 1];
        self.stream.read_exact(&mut payload)?;
        Ok((head[2], head[0], payload))
    }
}

/// Whether this is the payload of `queue.declare` with no-wait, as rpc-client declares its reply
/// queue.
fn is_no_wait_declaration(payload: &[u8]) -> bool {
    let no_wait = 1 << 4;
    let flags = || payload[7 + usize::from(payload[6])];
    payload[..4] == [0, 50, 0, 10] && flags() & no_wait != 0
}

fn frame(channel: u8, kind: u8, payload: &[u8]) -> Vec<u8> {
    [&[kind, 0, channel][..], &long_str(payload), &[0xce]].concat()
}

/// One message of a flood.
fn flood_message(flood: Flood, channel: u8) -> Vec<u8> {
    let body = [b'x'; 1000];
    let header = [&[0, 60, 0, 0, 0, 0, 0, 0, 0, 0, 3, 0xe8][..], &[0, 0]].concat();
    let content = [frame(channel, 2, &header), frame(channel, 3, &body)].concat();
    let tag = short_str(TAG);
    let name = short_str(b"q");
    let method = match flood {
        Flood::Blocked => return frame(0, 1, &[&[0, 10, 0, 60][..], &short_str(b"low")].concat()),
        Flood::Deliveries => [&[0, 60, 0, 60][..], &tag, &[0; 9], &[0], &name].concat(),
        Flood::Returns => [&[0, 60, 0, 50, 1, 0x38][..], &short_str(b"no"), &[0], &name].concat(),
    };
    [frame(channel, 1, &method), content].concat()
}
