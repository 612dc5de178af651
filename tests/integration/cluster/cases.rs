//! The faults that the test of a cluster tries.

use std::time::Duration;

/// What happens to the cluster. Node 1 has the queue's leader, or the whole queue if it is not
/// replicated.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Fault {
    /// SIGKILL; the node is started again when calls flow.
    Kill(usize),
    /// SIGKILL; the node is started again later.
    KillFor(usize, Duration),
    KillTwoFor(Duration),
    FreezeFor(usize, Duration),
    /// Stops each node, and starts it, one after the other.
    RollingRestart,
    MemoryAlarmFor(usize, Duration),
    DeleteQueue,
}

use Fault::{DeleteQueue, FreezeFor, Kill, KillFor, KillTwoFor, MemoryAlarmFor, RollingRestart};

/// A fault, and where it meets the calls.
pub(super) struct Case {
    pub(super) name: &'static str,
    pub(super) fault: Fault,
    pub(super) queue_type: &'static str,
    /// The node that each client prefers.
    pub(super) clients: [usize; 3],
    /// Whether it is tried in every test run.
    pub(super) is_quick: bool,
}

const fn case(name: &'static str, fault: Fault, clients: [usize; 3]) -> Case {
    Case {
        name,
        fault,
        queue_type: "quorum",
        clients,
        is_quick: false,
    }
}

impl Case {
    /// The timeout of each call: longer than the fault lasts, or short where calls are lost for
    /// certain.
    pub(super) fn timeout(&self) -> &'static str {
        match (self.fault, self.queue_type) {
            (DeleteQueue, _) | (_, "transient") => "10s",
            _ => "1m",
        }
    }

    /// Whether clients connect again while a quorum queue has no leader, or use a connection that
    /// has published to an earlier queue of this name. RabbitMQ 3.10 then takes nothing more from
    /// that connection.
    pub(super) fn sticks_on_3_10(&self) -> bool {
        match self.fault {
            Kill(1) | FreezeFor(1, _) | RollingRestart => self.clients.contains(&1),
            DeleteQueue => true,
            _ => false,
        }
    }
}

const SECONDS_5: Duration = Duration::from_secs(5);
const SECONDS_15: Duration = Duration::from_secs(15);
const SECONDS_20: Duration = Duration::from_secs(20);

/// On each node there is a server. (RabbitMQ 3.10 loses what is published on a new connection while
/// the queue elects a leader.)
pub(super) const CASES: [Case; 13] = [
    Case {
        is_quick: true,
        ..case("kill -9 of the leader", Kill(1), [2, 3, 2])
    },
    Case {
        is_quick: true,
        ..case(
            "kill -9 of a follower and the clients' node",
            Kill(2),
            [2, 2, 2],
        )
    },
    case("the queue deleted", DeleteQueue, [1, 2, 3]),
    case("kill -9 of a follower, a server's node", Kill(3), [1, 2, 1]),
    case(
        "kill -9 of the leader and the clients' node",
        Kill(1),
        [1, 1, 1],
    ),
    case(
        "the leader frozen for 20 s",
        FreezeFor(1, SECONDS_20),
        [2, 3, 2],
    ),
    case(
        "the leader and the clients' node frozen for 20 s",
        FreezeFor(1, SECONDS_20),
        [1, 1, 1],
    ),
    case(
        "a follower and the clients' node frozen for 20 s",
        FreezeFor(2, SECONDS_20),
        [2, 2, 2],
    ),
    case(
        "a rolling restart of all three nodes",
        RollingRestart,
        [1, 2, 3],
    ),
    case(
        "two of three nodes gone for 15 s",
        KillTwoFor(SECONDS_15),
        [3, 3, 3],
    ),
    case(
        "a memory alarm on one node for 5 s",
        MemoryAlarmFor(3, SECONDS_5),
        [1, 2, 3],
    ),
    Case {
        queue_type: "transient",
        ..case(
            "kill -9 of a transient queue's node for 15 s",
            KillFor(1, SECONDS_15),
            [2, 3, 2],
        )
    },
    Case {
        queue_type: "classic",
        ..case(
            "kill -9 of a classic queue's node for 15 s",
            KillFor(1, SECONDS_15),
            [2, 3, 2],
        )
    },
];
