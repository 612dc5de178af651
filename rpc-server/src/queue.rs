//! The request queue: adopted as it is where it exists, declared where it does not.

use amiquip::{AmqpValue, FieldTable, QueueDeclareOptions};
use rpc_common::broker::{Error, Link, NOT_FOUND};
use rpc_common::deadline::{Deadline, Phase};

/// The **queue type** is how the request queue is declared, should it not exist.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum QueueType {
    /// Transient as in the tutorial; quorum where the broker permits no transient queues any more
    #[default]
    Auto,
    /// Gone with a restart of the broker, as in the tutorial
    Transient,
    /// Durable, on one node
    Classic,
    /// Durable and replicated, as in the tutorial's newest ports
    Quorum,
}

/// How often a declaration may lose the race against another one before we give up.
const ATTEMPTS: u32 = 5;

/// Reply code of AMQP 0-9-1: the queue is another one than declared; or an acknowledgement came too late.
pub(crate) const PRECONDITION_FAILED: u16 = 406;

/// Makes sure that the queue exists, whatever its type: tutorial peers declare it each in their way,
/// and a declaration that does not match an existing queue is an error. So look first. Returns what was
/// done, for the log.
///
/// # Errors
/// What the broker says where the queue can be neither adopted nor declared.
pub(crate) fn ensure(
    link: &mut Link,
    queue: &str,
    queue_type: QueueType,
    deadline: &Deadline,
) -> Result<String, Error> {
    let mut attempts = 0;
    loop {
        attempts += 1;
        match link.look(queue, deadline) {
            Ok(_) => return Ok(format!("adopted queue '{queue}' as it is")),
            Err(Error::ChannelClosed { code: NOT_FOUND, .. }) => {}
            Err(error) => return Err(error),
        }
        match declare(link, queue, queue_type, deadline) {
            Ok(()) => return Ok(format!("declared queue '{queue}' ({})", name(queue_type))),
            Err(Error::ChannelClosed { code: PRECONDITION_FAILED, target, reason }) => {
                // Somebody was faster, and declared it otherwise: look again.
                if attempts == ATTEMPTS {
                    return Err(Error::Refused { target, code: PRECONDITION_FAILED, reason });
                }
            }
            Err(error) => return Err(error),
        }
    }
}

/// Whether the error means that this broker permits no transient queues (RabbitMQ 4.3 and later
/// close the connection with 541 and this name).
pub(crate) fn forbids_transient(error: &Error) -> bool {
    matches!(error, Error::ConnectionClosed { reason, .. } if reason.contains("transient_nonexcl_queues"))
}

fn declare(
    link: &mut Link,
    queue: &str,
    queue_type: QueueType,
    deadline: &Deadline,
) -> Result<(), Error> {
    let mut arguments = FieldTable::new();
    if queue_type == QueueType::Quorum {
        arguments.insert("x-queue-type".into(), AmqpValue::LongString("quorum".into()));
    }
    let durable = matches!(queue_type, QueueType::Classic | QueueType::Quorum);
    let options = QueueDeclareOptions { durable, arguments, ..QueueDeclareOptions::default() };
    let channel = link.open_channel(deadline)?;
    // The channel moves in, so that its close is bounded by the deadline, too.
    link.within(deadline, Phase::Declare, move |_| channel.queue_declare(queue, options).map(drop))
}

fn name(queue_type: QueueType) -> &'static str {
    match queue_type {
        QueueType::Auto | QueueType::Transient => "transient",
        QueueType::Classic => "classic",
        QueueType::Quorum => "quorum",
    }
}
