//! A scripted broker, for what no real one does: it accepts everything, but for what a test has it do.

use super::raw::{long_str, short_str};
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::mpsc::{channel, Receiver, Sender};
use std::thread;
use std::time::Instant;

/// A method by class and method, as in the tables of AMQP 0-9-1.
pub(crate) type Method = (u8, u8);

pub(crate) const QOS: Method = (60, 10);
pub(crate) const CONSUME: Method = (60, 20);
pub(crate) const CANCEL: Method = (60, 30);

/// The consumer tag of all consumers.
const TAG: &[u8] = b"tag";

/// What the broker does when it gets a method, in the place of an answer or after it.
#[derive(Clone, Copy)]
pub(crate) enum Act {
    /// Answers with this method instead.
    AnswerWith(Method),
    /// Answers, then cancels the consumer.
    Cancel,
    /// Answers, then sends this again and again, for as long as somebody reads.
    Flood(Flood),
    /// Answers, cancels the consumer, and never says anything again.
    CancelAndFallSilent,
}

#[derive(Clone, Copy)]
pub(crate) enum Flood {
    Deliveries,
    Returns,
    Notices,
}

/// A broker on loopback. Its connections end with the test's process.
pub(crate) struct ScriptedBroker {
    pub(crate) url: String,
    /// When it has got the method that it acts on.
    pub(crate) acted: Receiver<Instant>,
    /// How many bytes of a flood were read before the connection ended.
    pub(crate) flooded: Receiver<usize>,
}

impl ScriptedBroker {
    pub(crate) fn start(method: Method, act: Act) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("there are ports");
        let address = listener.local_addr().expect("it is bound");
        let ((acts, acted), (floods, flooded)) = (channel(), channel());
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (acts, floods) = (acts.clone(), floods.clone());
                // How a connection ends is for the test to see at its other end.
                thread::spawn(move || Connection { stream, method, act, acts, floods }.serve());
            }
        });
        ScriptedBroker { url: format!("amqp://{address}"), acted, flooded }
    }
}

struct Connection {
    stream: TcpStream,
    method: Method,
    act: Act,
    acts: Sender<Instant>,
    floods: Sender<usize>,
}

impl Connection {
    fn serve(mut self) -> io::Result<()> {
        self.stream.read_exact(&mut [0; 8])?; // the protocol header
        let start = [&[0, 9, 0, 0, 0, 0][..], &long_str(b"PLAIN"), &long_str(b"en_US")].concat();
        self.send(0, (10, 10), &start)?;
        loop {
            let (channel, kind, payload) = self.read_frame()?;
            if kind != 1 {
                continue; // a body or its header, or a heartbeat
            }
            let method = (payload[1], payload[3]);
            if method == self.method {
                let _ = self.acts.send(Instant::now()); // a test that has seen enough does not listen
                self.act(channel, method)?;
            } else {
                self.answer(channel, method)?;
            }
        }
    }

    fn act(&mut self, channel: u8, method: Method) -> io::Result<()> {
        match self.act {
            Act::AnswerWith(other) => self.send(channel, other, &short_str(TAG)),
            Act::Cancel => {
                self.answer(channel, method)?;
                self.send(channel, CANCEL, &[&short_str(TAG)[..], &[1]].concat())
            }
            Act::CancelAndFallSilent => {
                self.answer(channel, method)?;
                self.send(channel, CANCEL, &[&short_str(TAG)[..], &[1]].concat())?;
                loop {
                    thread::park();
                }
            }
            Act::Flood(flood) => {
                self.answer(channel, method)?;
                let piece = frames(flood, channel);
                let mut count = 0;
                while self.stream.write_all(&piece).is_ok() {
                    count += piece.len();
                }
                let _ = self.floods.send(count); // as above
                Err(io::ErrorKind::BrokenPipe.into())
            }
        }
    }

    /// Answers as a broker does that accepts everything.
    fn answer(&mut self, channel: u8, method: Method) -> io::Result<()> {
        match method {
            (10, 11) => self.send(0, (10, 30), &[0, 0, 0, 2, 0, 0, 0, 0]), // tune
            (10, 40) => self.send(0, (10, 41), &[0]),
            (10, 50) => self.send(0, (10, 51), &[]),
            (20, 10) => self.send(channel, (20, 11), &[0; 4]),
            (20, 40) => self.send(channel, (20, 41), &[]),
            // An exclusive queue is declared without waiting for an answer.
            (50, 10) if self.is_client() => Ok(()),
            (50, 10) => self.send(channel, (50, 11), &[&short_str(b"q")[..], &[0; 8]].concat()),
            QOS => self.send(channel, (60, 11), &[]),
            CONSUME => self.send(channel, (60, 21), &short_str(TAG)),
            CANCEL => self.send(channel, (60, 31), &short_str(TAG)),
            _ => Ok(()),
        }
    }

    /// Whether the peer is rpc-client, as far as the script is concerned: only that is met by a silent broker.
    fn is_client(&self) -> bool {
        matches!(self.act, Act::CancelAndFallSilent)
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

fn frame(channel: u8, kind: u8, payload: &[u8]) -> Vec<u8> {
    [&[kind, 0, channel][..], &long_str(payload), &[0xce]].concat()
}

/// A piece of a flood.
fn frames(flood: Flood, channel: u8) -> Vec<u8> {
    let body = [b'x'; 1000];
    let header = [&[0, 60, 0, 0, 0, 0, 0, 0, 0, 0, 3, 0xe8][..], &[0, 0]].concat();
    let content = [frame(channel, 2, &header), frame(channel, 3, &body)].concat();
    let (tag, name) = (short_str(TAG), short_str(b"q"));
    let method = match flood {
        Flood::Notices => return frame(0, 1, &[&[0, 10, 0, 60][..], &short_str(b"low")].concat()),
        Flood::Deliveries => [&[0, 60, 0, 60][..], &tag, &[0; 9], &[0], &name].concat(),
        Flood::Returns => [&[0, 60, 0, 50, 1, 0x38][..], &short_str(b"no"), &[0], &name].concat(),
    };
    [frame(channel, 1, &method), content].concat()
}
