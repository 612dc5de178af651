//! The request queue: used as it is if it exists, else declared.

use amiquip::{AmqpValue, FieldTable, QueueDeclareOptions};
use rpc_common::connection::{
    Connection, Deadline, Error, ErrorKind, Meaning, Phase, ACCESS_REFUSED, PRECONDITION_FAILED,
};

/// The type with which the request queue is declared if it does not exist.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
#[non_exhaustive]
pub enum QueueType {
    /// Transient, as in the tutorial; quorum where the broker does not permit transient queues.
    Auto,
    /// Lost when the broker restarts, as in the tutorial.
    Transient,
    /// Durable, on one node.
    Classic,
    /// Durable and replicated, as in the newest versions of the tutorial.
    Quorum,
}

/// Maximum number of times that another server may declare the queue between `queue_stats` and our
/// declaration.
const MAX_ATTEMPTS: u32 = 5;

/// Finds the queue, or declares it. A passive declaration is first, because tutorial peers declare
/// the queue in different ways, and a declaration that does not match an existing queue is an
/// error. Returns the type of the declaration, or `None` if the queue existed.
///
/// # Errors
/// The broker's error if the queue can be neither used nor declared.
pub(crate) fn find_or_declare(
    connection: &mut Connection,
    queue: &str,
    queue_type: QueueType,
    deadline: &Deadline,
) -> Result<Option<&'static str>, Error> {
    let (name, durable) = match queue_type {
        QueueType::Auto | QueueType::Transient => ("transient", false),
        QueueType::Classic => ("classic", true),
        QueueType::Quorum => ("quorum", true),
    };
    let mut arguments = FieldTable::new();
    if queue_type == QueueType::Quorum {
        arguments.insert(
            "x-queue-type".into(),
            AmqpValue::LongString("quorum".into()),
        );
    }
    let options = QueueDeclareOptions {
        durable,
        arguments,
        ..QueueDeclareOptions::default()
    };
    let mut attempts_left = MAX_ATTEMPTS;
    loop {
        match connection.queue_stats(queue, deadline) {
            Ok(_) if queue_type == QueueType::Auto => return Ok(None),
            Ok(_) => return check_type(connection, queue, options, deadline).map(|()| None),
            Err(error) if error.is_not_found() => {}
            Err(error) => return Err(error),
        }
        let declared = connection.run_blocking(deadline, Phase::DeclaringQueue, |amqp| {
            // Dropped in this call, so that its closing has the deadline, too.
            let channel = amqp.open_channel(None)?;
            channel.queue_declare(queue, options.clone()).map(drop)
        });
        match declared {
            // Another server has declared the queue in another way: ask again. If that does not
            // end, retrying cannot help.
            Err(Error {
                address,
                kind: ErrorKind::ChannelClosed(reason),
            }) if reason.code == PRECONDITION_FAILED => {
                attempts_left -= 1;
                if attempts_left == 0 {
                    return Err(Error {
                        address,
                        kind: ErrorKind::Refused(reason),
                    });
                }
            }
            declared => return declared.map(|()| Some(name)),
        }
    }
}

/// Checks that an existing queue has the type of these options. What else others have set when they
/// declared it is accepted, and so is a user that may not declare.
fn check_type(
    connection: &mut Connection,
    queue: &str,
    options: QueueDeclareOptions,
    deadline: &Deadline,
) -> Result<(), Error> {
    let declared = connection.run_blocking(deadline, Phase::CheckingQueueType, |amqp| {
        amqp.open_channel(None)?
            .queue_declare(queue, options)
            .map(drop)
    });
    match declared {
        Err(Error {
            address,
            kind: ErrorKind::ChannelClosed(reason),
        }) if reason.code == PRECONDITION_FAILED => {
            let is_other_type = matches!(
                reason.meaning(),
                Some(Meaning::OtherDurability | Meaning::OtherQueueType)
            );
            if is_other_type {
                return Err(Error {
                    address,
                    kind: ErrorKind::Refused(reason),
                });
            }
            Ok(())
        }
        Err(Error {
            kind: ErrorKind::Refused(reason),
            ..
        }) if reason.code == ACCESS_REFUSED => {
            log::warn!("cannot check the type of queue '{queue}': {}", reason.text);
            Ok(())
        }
        declared => declared,
    }
}

/// Describes the result of [`find_or_declare`] for the log.
pub(crate) fn describe(queue: &str, declared: Option<&str>) -> String {
    match declared {
        Some(name) => format!("declared queue '{queue}' ({name})"),
        None => format!("using existing queue '{queue}'"),
    }
}
