//! A cluster of three nodes: nodes fail under load. Every call ends with its right answer or with
//! exit code 5 (4 where the queue is gone), no server ends, and calls flow again.
//!
//! `make test-cluster` sets `CLUSTER_FAULTS=all`; without it only the quick faults are tried, and
//! with a part of a name the faults of that name. `--nocapture` shows a table.

mod cases;

use crate::soak::CallCounts;
use crate::support::broker::Cluster;
use crate::support::broker_features::broker_version_at;
use crate::support::eventually;
use crate::support::peer::Peer;
use crate::support::programs::Program;
use cases::{Case, Fault, CASES};
use crossbeam_channel::bounded;
use rpc_common::fib::fib;
use rpc_server::Stop;
use rustix::process::Signal;
use std::collections::BTreeMap;
use std::io::{self, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use std::{env, thread};

use Fault::{DeleteQueue, FreezeFor, Kill, KillFor, KillTwoFor, MemoryAlarmFor, RollingRestart};

/// The calls of each client that are outstanding at once; while none is answered, it makes another
/// one after this pause.
const IN_FLIGHT: u64 = 32;
const MAX_PAUSE: Duration = Duration::from_millis(500);

/// Of each client, before and after the fault.
const ENOUGH_CALLS: u64 = 100;

/// In seconds. Programs notice a frozen node in twice this time.
const HEARTBEAT: u64 = 3;

/// How long after the last answer a client with stuck calls is ended.
const MAX_DRAIN: Duration = Duration::from_secs(5);

/// How long calls may rest after a fault has been detected.
const MAX_SILENCE: Duration = Duration::from_secs(15);

#[test]
fn every_call_ends_right_or_with_exit_code_5_when_nodes_fail() {
    let wanted = env::var("CLUSTER_FAULTS").ok();
    let is_wanted = |case: &Case| match wanted.as_deref() {
        None => case.is_quick,
        Some(part) => part == "all" || case.name.contains(part),
    };
    let cluster = Cluster::start("cluster");
    // From RabbitMQ 4.3 on a quorum queue returns the messages of a consumer on a dead node after a
    // timeout: a minute by default.
    if broker_version_at(&cluster.urls()[0]) >= (4, 3) {
        let policy = r#"{"consumer-disconnected-timeout":5000}"#;
        cluster.run_on_node(1, "ctl", &["set_policy", "return", "^fault", policy]);
    }
    println!(
        "| fault | calls in flight | answered | code 5 | code 4 | wrong | computed twice | s until calls flowed |"
    );
    println!("| --- | --- | --- | --- | --- | --- | --- | --- |");
    let mut failures = Vec::new();
    let mut left_out = Vec::new();
    for (index, case) in CASES.iter().enumerate() {
        if is_wanted(case) {
            failures.extend(Trial::new(&cluster, case, index).run());
        } else {
            left_out.push(case.name);
        }
    }
    if !left_out.is_empty() {
        // Not eprintln!: the test runner shows its output for failed tests only.
        let _ = writeln!(
            io::stderr(),
            "only `make test-cluster` tries: {}",
            left_out.join("; ")
        );
    }
    assert!(failures.is_empty(), "{failures:#?}");
}

/// What the clients have done, as far as it is known while they run.
#[derive(Default)]
struct Progress {
    asked: AtomicU64,
    right: AtomicU64,
    ended: AtomicU64,
}

struct Trial<'a> {
    cluster: &'a Cluster,
    case: &'a Case,
    queue: String,
    clients: [Progress; 3],
    version: (u32, u32),
    /// Each call has a number of its own, so that a number that was computed twice is a request
    /// that was.
    next_number: AtomicU64,
}

impl<'a> Trial<'a> {
    fn new(cluster: &'a Cluster, case: &'a Case, index: usize) -> Self {
        let queue = format!("fault-{index}");
        let version = broker_version_at(&cluster.urls()[1]);
        Trial {
            cluster,
            case,
            queue,
            clients: Default::default(),
            version,
            next_number: 0.into(),
        }
    }

    /// Prints a row of the table, and returns what is not as promised.
    fn run(&self) -> Vec<String> {
        let servers = [1, 2, 3].map(|node| self.start_server(node));
        self.check_leader();
        let mut in_flight = 0;
        let mut fault_time = Duration::ZERO;
        let (running, stop) = bounded(0);
        let results = thread::scope(|scope| {
            let running = running; // dropped when a wait fails, too
            let clients = [0, 1, 2].map(|index| {
                let stop = stop.clone();
                scope.spawn(move || self.call_until(&stop, index))
            });
            self.wait_for_answers();
            self.inject(&mut in_flight, &mut fault_time);
            self.wait_until_calls_flow();
            drop(running);
            clients.map(|client| client.join().expect("a client thread does not panic"))
        });
        let mut peer = Peer::connect_to(&self.cluster.urls()[1]);
        // RabbitMQ may tell a consumer nothing of the deletion of its queue; its server consumes
        // again when requests wait.
        if self.case.fault != DeleteQueue {
            peer.wait_for_consumers(&self.queue, 3);
        }
        let computed = servers.map(Program::stop); // with exit code 0
        peer.delete_queue(&self.queue);
        self.report(in_flight, fault_time, &results, &computed.concat())
    }

    /// The options that name all nodes, beginning with this one.
    fn urls_from(&self, node: usize) -> Vec<&str> {
        let mut urls = self
            .cluster
            .urls()
            .iter()
            .map(String::as_str)
            .collect::<Vec<_>>();
        urls.rotate_left(node - 1);
        urls.into_iter().flat_map(|url| ["--url", url]).collect()
    }

    fn start_server(&self, node: usize) -> Program {
        let heartbeat = HEARTBEAT.to_string();
        let args = [
            "--queue-type",
            self.case.queue_type,
            "--delay",
            "10ms",
            "--heartbeat",
            &heartbeat,
        ];
        let args = [&args[..], &["--url-order", "given"], &self.urls_from(node)].concat();
        Program::start_server_at("", &self.queue, &args)
    }

    /// A new queue's leader is on the node that declared it.
    fn check_leader(&self) {
        let column = if self.case.queue_type == "quorum" {
            "leader"
        } else {
            "pid"
        };
        let table = self.cluster.run_on_node(
            1,
            "ctl",
            &["list_queues", "--no-table-headers", "name", column],
        );
        let node = table
            .lines()
            .find_map(|line| line.strip_prefix(&self.queue))
            .expect("it is listed");
        let port = self.cluster.urls()[0]
            .rsplit(':')
            .next()
            .expect("a URL has a port");
        assert!(node.contains(&format!("rpc-{port}@localhost")), "{table}");
    }

    /// Keeps one client busy until `stop` is disconnected, and returns how its calls ended and how
    /// long it was without an answer.
    fn call_until(&self, stop: &Stop, index: usize) -> (CallCounts, Duration) {
        let heartbeat = HEARTBEAT.to_string();
        let args = [
            "--queue",
            &self.queue,
            "-t",
            self.case.timeout(),
            "-j",
            "1000",
            "-o",
            "json",
            "--unordered",
            "-",
        ];
        let args = [
            &args[..],
            &["--heartbeat", &heartbeat],
            &self.urls_from(self.case.clients[index]),
        ]
        .concat();
        let mut client = Program::spawn_at("", "rpc-client", &args);
        let progress = &self.clients[index];
        let mut counts = CallCounts::default();
        let mut log = Vec::new();
        let mut asked = 0;
        let mut asked_at = Instant::now();
        let mut answered_at = None::<Instant>;
        let mut silence = Duration::ZERO;
        while stop
            .recv_timeout(Duration::from_millis(1))
            .is_err_and(|end| end.is_timeout())
        {
            // Calls that were lost keep their places until their deadline.
            while asked < counts.total() + IN_FLIGHT || asked_at.elapsed() > MAX_PAUSE {
                asked += 1;
                asked_at = Instant::now();
                client.write_line(&self.next_number.fetch_add(1, Ordering::Relaxed).to_string());
            }
            progress.asked.store(asked, Ordering::Relaxed);
            let right = counts.right;
            log.extend(client.new_log());
            counts.add(&client.new_lines(), &[]);
            if counts.right > right {
                silence = silence.max(answered_at.map_or(Duration::ZERO, |at| at.elapsed()));
                answered_at = Some(Instant::now());
            }
            progress.right.store(counts.right, Ordering::Relaxed);
            progress.ended.store(counts.total(), Ordering::Relaxed);
        }
        client.close_stdin();
        let is_interrupted = self.may_have_stuck_clients();
        if is_interrupted {
            // What is not stuck is answered soon.
            let mut answered_at = Instant::now();
            while counts.total() < asked && answered_at.elapsed() < MAX_DRAIN {
                let lines = client.new_lines();
                if !lines.is_empty() {
                    answered_at = Instant::now();
                }
                counts.add(&lines, &[]);
                thread::sleep(Duration::from_millis(1));
            }
            client.send_signal(Signal::INT);
        }
        let (answers, more_log) = client.remaining_output();
        counts.add(&answers, &[]);
        log.extend(more_log);
        let code = client.wait_for_exit_code();
        let expected = match counts {
            CallCounts { timeouts: 1.., .. } => 5,
            CallCounts { no_queue: 1.., .. } | CallCounts { refused: 1.., .. } => 4,
            _ => 0,
        };
        if is_interrupted {
            counts.timeouts += asked - counts.total(); // they would have ended so
        } else if code != Some(expected) || counts.total() != asked {
            counts
                .wrong
                .push(format!("exit code {code:?} after {log:#?}"));
        }
        (counts, silence)
    }

    /// Waits until each client has had more right answers.
    fn wait_for_answers(&self) {
        let right = |client: &Progress| client.right.load(Ordering::Relaxed);
        let wanted = self
            .clients
            .each_ref()
            .map(|client| right(client) + ENOUGH_CALLS);
        eventually(&format!("calls flow: {}", self.case.name), || {
            self.clients
                .iter()
                .zip(wanted)
                .all(|(client, wanted)| right(client) >= wanted)
                .then_some(())
        });
    }

    fn may_have_stuck_clients(&self) -> bool {
        self.version < (4, 0) && self.case.sticks_on_3_10()
    }

    /// Where clients may be stuck, new ones show that calls flow.
    fn wait_until_calls_flow(&self) {
        if !self.may_have_stuck_clients() {
            return self.wait_for_answers();
        }
        eventually(&format!("a new client's call: {}", self.case.name), || {
            let number = self.next_number.fetch_add(1, Ordering::Relaxed);
            let text = number.to_string();
            let args = ["--queue", &self.queue, "-q", "-t", "3s", &text];
            let client =
                Program::spawn_at("", "rpc-client", &[&args[..], &self.urls_from(2)].concat());
            (client.remaining_output().0 == [fib(number).to_string()]).then_some(())
        });
    }

    /// Brings about the fault, and ends it. Counts the calls that are in flight when it has come,
    /// and measures how long it lasts.
    fn inject(&self, in_flight: &mut u64, fault_time: &mut Duration) {
        let start = Instant::now();
        let on_node =
            |node, command, args: &[&str]| drop(self.cluster.run_on_node(node, command, args));
        let mut has_come = || {
            let count = |client: &Progress| {
                client
                    .asked
                    .load(Ordering::Relaxed)
                    .saturating_sub(client.ended.load(Ordering::Relaxed))
            };
            *in_flight = self.clients.iter().map(count).sum();
        };
        match self.case.fault {
            Kill(node) => {
                on_node(node, "kill", &[]);
                has_come();
                self.wait_until_calls_flow();
                on_node(node, "start", &[]);
            }
            KillFor(node, duration) => {
                on_node(node, "kill", &[]);
                has_come();
                thread::sleep(duration);
                on_node(node, "start", &[]);
            }
            KillTwoFor(duration) => {
                on_node(1, "kill", &[]);
                on_node(2, "kill", &[]);
                has_come();
                thread::sleep(duration);
                on_node(1, "start", &[]);
                on_node(2, "start", &[]);
            }
            FreezeFor(node, duration) => {
                on_node(node, "freeze", &[]);
                has_come();
                thread::sleep(duration);
                on_node(node, "thaw", &[]);
            }
            RollingRestart => {
                has_come();
                for node in [1, 2, 3] {
                    on_node(node, "stop", &[]);
                    on_node(node, "start", &[]);
                    self.wait_for_members();
                }
            }
            MemoryAlarmFor(node, duration) => {
                on_node(node, "ctl", &["set_vm_memory_high_watermark", "0"]);
                has_come();
                thread::sleep(duration);
                on_node(node, "ctl", &["set_vm_memory_high_watermark", "0.4"]);
            }
            DeleteQueue => {
                Peer::connect_to(&self.cluster.urls()[0]).delete_queue(&self.queue);
                has_come();
            }
        }
        *fault_time = start.elapsed();
    }

    /// Waits until all members of the queue are running, as an operator does before the next node.
    fn wait_for_members(&self) {
        let args = ["list_queues", "--no-table-headers", "name", "online"];
        eventually("all members of the queue", || {
            let table = self.cluster.run_on_node(1, "ctl", &args);
            let members = table
                .lines()
                .find_map(|line| line.strip_prefix(&self.queue))?;
            (members.matches('@').count() == 3).then_some(())
        });
    }

    fn report(
        &self,
        in_flight: u64,
        fault_time: Duration,
        results: &[(CallCounts, Duration); 3],
        computed: &[String],
    ) -> Vec<String> {
        let sum = |count: fn(&CallCounts) -> u64| {
            results.iter().map(|(counts, _)| count(counts)).sum::<u64>()
        };
        let right = sum(|it| it.right);
        let timeouts = sum(|it| it.timeouts);
        let no_queue = sum(|it| it.no_queue + it.refused);
        let wrong = sum(|it| it.unreachable + it.wrong.len() as u64);
        let mut by_number = BTreeMap::<_, u64>::new();
        for line in computed {
            *by_number.entry(line).or_default() += 1;
        }
        let repeated = by_number.values().map(|times| times - 1).sum::<u64>();
        let silence = results
            .iter()
            .map(|(_, silence)| *silence)
            .max()
            .unwrap_or_default();
        let seconds = silence.as_secs_f64();
        let name = self.case.name;
        println!("| {name} | {in_flight} | {right} | {timeouts} | {no_queue} | {wrong} | {repeated} | {seconds:.1} |");
        let mut failures = Vec::new();
        let mut expect = |holds: bool, what: String| {
            if !holds {
                failures.push(format!("{name}: {what}"));
            }
        };
        expect(
            in_flight >= IN_FLIGHT,
            format!("{in_flight} calls in flight"),
        );
        expect(
            wrong == 0,
            format!(
                "{:#?}",
                results
                    .iter()
                    .map(|(counts, _)| &counts.wrong)
                    .collect::<Vec<_>>()
            ),
        );
        let is_gone = self.case.fault == DeleteQueue || self.case.queue_type == "transient";
        expect(
            no_queue == 0 || is_gone,
            format!("{no_queue} with exit code 4"),
        );
        // One node less is no reason to lose a call.
        let is_lossless =
            matches!(self.case.fault, Kill(_) | RollingRestart) && !self.may_have_stuck_clients();
        expect(
            timeouts == 0 || !is_lossless,
            format!("{timeouts} with exit code 5"),
        );
        let noticed = Duration::from_secs(2 * HEARTBEAT);
        let has_khepri = self.version >= (4, 3);
        let unavoidable = match self.case.fault {
            // With Mnesia, the clients' reply queues cannot be declared elsewhere until the node is
            // back.
            FreezeFor(node, _) if self.case.clients.contains(&node) && !has_khepri => fault_time,
            FreezeFor(..) => noticed,
            // RabbitMQ deletes the queue, and the servers declare it on another node; from 4.3 on
            // they may wait for the node.
            KillFor(..) if self.case.queue_type == "transient" && !has_khepri => Duration::ZERO,
            // Nothing can be served meanwhile.
            KillFor(..) | KillTwoFor(..) | MemoryAlarmFor(..) => fault_time,
            Kill(_) | RollingRestart | DeleteQueue => Duration::ZERO,
        };
        let flows = silence <= unavoidable + MAX_SILENCE || self.may_have_stuck_clients();
        expect(flows, format!("no answer for {seconds:.1} s"));
        failures
    }
}
