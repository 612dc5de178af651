//! Faults strike at random while clients and servers work: every call ends with its right answer or with
//! exit code 5, and nothing is left behind.
//!
//! `SOAK_SECONDS` is how long (60), `SOAK_SEED` repeats a run. With `--nocapture` it reports.

use crate::bad_messages;
use crate::support::broker::private_node;
use crate::support::eventually;
use crate::support::peer::{Peer, Queue};
use crate::support::programs::Program;
use crate::support::proxy::{Proxy, Traffic};
use crate::support::raw_peer::RawPeer;
use fastrand::Rng;
use rpc_common::fib::fib;
use rustix::process::Signal;
use serde_json::Value;
use std::collections::BTreeMap;
use std::os::unix::process::ExitStatusExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Mutex;
use std::time::{Duration, Instant};
use std::{env, thread};

/// The limit of the client that does not outlast every fault.
const IMPATIENT: &str = "4s";

/// Of three servers with two workers each.
const CONSUMERS: u32 = 6;

/// Above this, fib(n) would be the load.
const LARGEST: u64 = 300;

/// How often the programs' memory is reported.
const REPORTING: Duration = Duration::from_secs(60);

/// A server and the way to its broker.
struct Station {
    proxy: Proxy,
    server: Option<Program>,
    args: Vec<String>,
}

impl Station {
    fn new(queue: &str, prefetch: &str) -> Self {
        let args = ["--queue", queue, "--queue-type", "classic", "--prefetch", prefetch];
        let args = [&args[..], &["--workers", "2", "--heartbeat", "2", "-q"]].concat();
        let args = args.into_iter().map(str::to_owned).collect();
        let mut station =
            Station { proxy: Proxy::start_to(private_node().authority()), server: None, args };
        station.start();
        station
    }

    fn start(&mut self) {
        let args = self.args.iter().map(String::as_str).collect::<Vec<_>>();
        self.server = Some(Program::spawn_at(
            &format!("amqp://{}", self.proxy.authority()),
            "rpc-server",
            &args,
        ));
    }

    /// Ends the server as a crash or an operator does, and starts another one.
    fn replace(&mut self, signal: Signal) -> &'static str {
        let mut server = self.server.take().expect("it runs");
        server.send_signal(signal);
        let status = server.wait();
        let (_, log) = server.remaining_output();
        // Before it handles signals, they end it; and two connections in a row that break in its first login
        // look as if the broker refused its password.
        let is_graceful = status.code() == Some(0) || status.signal() == Some(signal.as_raw());
        let is_refused =
            status.code() == Some(3) && log.iter().any(|line| line.contains("refused user"));
        assert!(is_graceful || is_refused, "{status} after {log:#?}");
        self.start();
        if signal == Signal::KILL {
            "kill -9"
        } else {
            "SIGTERM"
        }
    }
}

/// One fault: strikes, lasts, and is over.
fn strike(rng: &mut Rng, proxy: &Proxy) -> &'static str {
    let lasting = |rng: &mut Rng, most: u64| {
        thread::sleep(Duration::from_millis(rng.u64(50..most)));
    };
    let spell = |rng: &mut Rng, weather, most| {
        proxy.set_traffic(weather);
        lasting(rng, most);
        proxy.set_traffic(Traffic::Normal);
    };
    match rng.u8(0..7) {
        0 => {
            proxy.close_connections();
            "cut"
        }
        1 => {
            spell(rng, Traffic::Frozen, 5_000);
            "black hole"
        }
        2 => {
            let pause = Duration::from_millis(rng.u64(1..100));
            spell(rng, Traffic::Delayed(pause), 2_000);
            "delay"
        }
        3 => {
            spell(rng, Traffic::ByteByByte, 2_000);
            "drip"
        }
        4 => {
            proxy.close_client_side();
            lasting(rng, 5_000);
            proxy.close_connections();
            "half open"
        }
        5 => {
            proxy.reset_after(rng.usize(0..20_000));
            lasting(rng, 1_000);
            "reset"
        }
        _ => {
            proxy.refuse(true);
            proxy.close_connections();
            lasting(rng, 2_000);
            proxy.refuse(false);
            "refusal"
        }
    }
}

/// What became of the calls of a client.
#[derive(Debug, Default)]
struct Tally {
    right: u64,
    timeouts: u64,
    /// Calls that were not sent, because the broker was away for too long.
    unreachable: u64,
    wrong: Vec<String>,
    /// Replies that came late, or twice.
    discarded: u64,
}

impl Tally {
    fn take(&mut self, answers: &[String], log: &[String]) {
        for answer in answers {
            let call: Value = serde_json::from_str(answer).expect("it is JSON");
            let expected = call["n"].as_u64().map(|n| fib(n).to_string());
            match (call["result"].as_str(), call["error"]["code"].as_str()) {
                (Some(result), None) if expected.as_deref() == Some(result) => self.right += 1,
                (None, Some("timeout")) => self.timeouts += 1,
                (None, Some("unreachable")) => self.unreachable += 1,
                _ => self.wrong.push(answer.clone()),
            }
        }
        self.discarded +=
            log.iter().filter(|line| line.contains("discarded a reply")).count() as u64;
    }

    fn ended(&self) -> u64 {
        self.right + self.timeouts + self.unreachable + self.wrong.len() as u64
    }
}

/// Calls until it is told to stop, and checks every answer.
fn call_until(
    stop: &AtomicBool,
    proxy: &Proxy,
    queue: &str,
    timeout: &str,
    rng: &mut Rng,
) -> Tally {
    let mut tally = Tally::default();
    while !stop.load(Ordering::Relaxed) {
        call_with_one_client(stop, proxy, queue, timeout, rng, &mut tally);
    }
    tally
}

fn call_with_one_client(
    stop: &AtomicBool,
    proxy: &Proxy,
    queue: &str,
    timeout: &str,
    rng: &mut Rng,
    tally: &mut Tally,
) {
    let args = ["--queue", queue, "-t", timeout, "-j", "32", "--heartbeat", "2", "-o", "json"];
    let args = [&args[..], &["-v", "--unordered", "-"]].concat();
    let mut client =
        Program::spawn_at(&format!("amqp://{}", proxy.authority()), "rpc-client", &args);
    let mut report_at = Instant::now() + REPORTING;
    let (mut asked, before) = (0, tally.ended());
    while !stop.load(Ordering::Relaxed) {
        if asked - (tally.ended() - before) < 500 {
            asked += 1;
            if !client.write_line(&rng.u64(0..=LARGEST).to_string()) {
                break; // it has ended: the exit code will tell
            }
        } else {
            thread::sleep(Duration::from_millis(1));
        }
        tally.take(&client.new_lines(), &client.new_log());
        if Instant::now() > report_at {
            report_at += REPORTING;
            println!(
                "rpc-client -t {timeout}: {} KiB, {} right",
                client.memory_kib().unwrap_or_default(),
                tally.right
            );
        }
    }
    client.close_stdin();
    let code = client.wait().code();
    let (answers, log) = client.remaining_output();
    tally.take(&answers, &log);
    // A run that ends because the broker is away for longer than a call may take leaves its input unread:
    // that is to happen to the impatient one only, and to one that was struck before it ever was connected.
    let whole = asked == tally.ended() - before;
    let is_away = code == Some(3) && (timeout == IMPATIENT || tally.right == 0);
    let is_right = whole && matches!(code, Some(0 | 5));
    if !(is_away || is_right) {
        tally.wrong.push(format!("exit code {code:?} after {log:#?}"));
    }
}

#[test]
fn whatever_strikes_every_call_ends_right_or_with_exit_code_5() {
    let number = |name| env::var(name).ok().and_then(|value| value.parse::<u64>().ok());
    let seed = number("SOAK_SEED").unwrap_or_else(|| fastrand::u64(..));
    let time = Duration::from_secs(number("SOAK_SECONDS").unwrap_or(60));
    println!("SOAK_SEED={seed} repeats the faults");
    let mut rng = Rng::with_seed(seed);
    let queue = Queue::named("soak");
    // The third one is never replaced.
    let stations = ["1", "64", "8"].map(|prefetch| Mutex::new(Station::new(&queue, prefetch)));
    let mut peer = Peer::connect_to(private_node().url());
    peer.wait_for_consumers(&queue, CONSUMERS);
    let (exchange, replies) = (peer.declare_fanout_exchange(&queue), Queue::named("soak.replies"));
    peer.declare(&replies, "classic");
    let mut attacker = RawPeer::connect(private_node().url());
    let ways =
        [Proxy::start_to(private_node().authority()), Proxy::start_to(private_node().authority())];
    let (stop, faults) = (AtomicBool::new(false), Mutex::new(BTreeMap::<_, u64>::new()));
    let strikes = |name| *faults.lock().expect("no panic").entry(name).or_default() += 1;
    let start = Instant::now();
    let tallies = thread::scope(|scope| {
        let (stop, queue, strikes) = (&stop, &*queue, &strikes);
        let (exchange, replies) = (&*exchange, &*replies);
        for (station, is_replaced) in stations.iter().zip([true, true, false]) {
            let mut rng = rng.fork();
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    thread::sleep(Duration::from_millis(rng.u64(100..2_000)));
                    let mut station = station.lock().expect("no panic");
                    strikes(match rng.u8(0..4) {
                        0 if is_replaced => station.replace(Signal::KILL),
                        1 if is_replaced => station.replace(Signal::TERM),
                        _ => strike(&mut rng, &station.proxy),
                    });
                }
            });
        }
        let mut kinds = (0..bad_messages::KINDS).cycle();
        scope.spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                thread::sleep(Duration::from_secs(1));
                let kind = kinds.next().expect("it has no end");
                bad_messages::publish(&mut attacker, kind, queue, exchange, replies);
                strikes("bad message");
            }
        });
        let ways = [(&ways[0], "10s"), (&ways[1], IMPATIENT)];
        let callers = ways.map(|(proxy, timeout)| {
            let (mut faults_rng, mut calls_rng) = (rng.fork(), rng.fork());
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    thread::sleep(Duration::from_millis(faults_rng.u64(100..4_000)));
                    strikes(strike(&mut faults_rng, proxy));
                }
            });
            scope.spawn(move || call_until(stop, proxy, queue, timeout, &mut calls_rng))
        });
        while start.elapsed() < time {
            thread::sleep(REPORTING.min(time.saturating_sub(start.elapsed())));
            for station in &stations {
                let station = station.lock().expect("no panic");
                let memory = station.server.as_ref().and_then(Program::memory_kib);
                println!("rpc-server: {} KiB", memory.unwrap_or_default());
            }
        }
        stop.store(true, Ordering::Relaxed);
        callers.map(|caller| caller.join().expect("it counts"))
    });
    println!("faults: {faults:?}");
    for tally in &tallies {
        println!("{tally:?}");
        assert!(tally.wrong.is_empty() && tally.right > 0);
    }
    peer.wait_for_consumers(&queue, CONSUMERS); // whatever has struck, they come back
    eventually("a queue of which nothing is left", || {
        let columns = ["name", "messages_ready", "messages_unacknowledged"];
        let table = private_node()
            .rabbitmqctl(&[&["list_queues", "--no-table-headers"][..], &columns].concat());
        let line = format!("{}\t0\t0", &*queue);
        table.lines().any(|queue| queue == line).then_some(())
    });
    for station in stations {
        station.into_inner().expect("no panic").server.expect("it runs").stop();
    }
    peer.delete_queue(&queue);
    peer.delete_queue(&replies);
}
