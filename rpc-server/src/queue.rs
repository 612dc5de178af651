//! The request queue: used as it is if it exists, else declared.

use amiquip::{AmqpValue, FieldTable, QueueDeclareOptions};
use rpc_common::connection::{
    Connection, Deadline, Difference, Error, ErrorKind, Phase, Reason, ACCESS_REFUSED,
    PRECONDITION_FAILED,
};

/// The type with which the request queue is declared if it does not exist.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
#[non_exhaustive]
pub enum QueueType {
    /// As the tutorial of the broker's time declares it: quorum on RabbitMQ 4 and later, and where
    /// the broker does not permit transient queues; else transient.
    Auto,
    /// Lost when the broker restarts, as in the tutorial before March 2026.
    Transient,
    /// Durable, on one node.
    Classic,
    /// Durable and replicated, as in the tutorial since March 2026.
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
    let (name, options) = declaration(match queue_type {
        QueueType::Auto if connection.is_rabbitmq_4() => QueueType::Quorum,
        queue_type => queue_type,
    });
    let mut attempts_left = MAX_ATTEMPTS;
    loop {
        match connection.queue_stats(queue, deadline) {
            Ok(_) if queue_type == QueueType::Auto => return Ok(None),
            Ok(_) => return check_type(connection, queue, options, deadline).map(|()| None),
            Err(error) if error.is_not_found() => {}
            Err(error) => return Err(error),
        }
        let declared = declare(connection, queue, &options, Phase::DeclaringQueue, deadline);
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

/// The name of a type in the log, and the options of its declaration.
fn declaration(queue_type: QueueType) -> (&'static str, QueueDeclareOptions) {
    let durable = |name: &'static str| {
        let value = AmqpValue::LongString(name.into());
        let options = QueueDeclareOptions {
            durable: true,
            arguments: FieldTable::from([("x-queue-type".to_owned(), value)]),
            ..QueueDeclareOptions::default()
        };
        (name, options)
    };
    match queue_type {
        // Without an argument: a transient queue is classic in every vhost.
        QueueType::Auto | QueueType::Transient => ("transient", QueueDeclareOptions::default()),
        // With the argument: a vhost may have another default type. Where it has not, the argument
        // and its absence, as in the tutorial, are equivalent.
        QueueType::Classic => durable("classic"),
        QueueType::Quorum => durable("quorum"),
    }
}

/// Checks that an existing queue has the type of these options. What else others have set when they
/// declared it is accepted with a warning, and so is a user that may not declare.
///
/// The broker names the first difference only, and the type is one of the last. So the queue is
/// declared again with what is accepted, until the broker names the type, or nothing.
fn check_type(
    connection: &mut Connection,
    queue: &str,
    options: QueueDeclareOptions,
    deadline: &Deadline,
) -> Result<(), Error> {
    let mut check = TypeCheck::new(options);
    let unknown = loop {
        let declared = declare(
            connection,
            queue,
            &check.options,
            Phase::CheckingQueueType,
            deadline,
        );
        let refused = |kind| Err(Error::new(connection.address(), kind));
        let reason = match declared {
            Ok(()) => break None,
            Err(Error {
                kind: ErrorKind::ChannelClosed(reason),
                ..
            }) if reason.code == PRECONDITION_FAILED => reason,
            Err(Error {
                kind: ErrorKind::Refused(reason),
                ..
            }) if reason.code == ACCESS_REFUSED => break Some(reason),
            Err(error) => return Err(error),
        };
        match check.on_difference(reason) {
            Verdict::DeclareAgain => {}
            Verdict::OtherType(reason) => return refused(ErrorKind::Refused(reason)),
            Verdict::Stream => return refused(ErrorKind::StreamQueue(queue.into())),
            Verdict::Unknown(reason) => break Some(reason),
        }
    };
    if let Some(reason) = check.other_durability {
        return Err(Error::new(connection.address(), ErrorKind::Refused(reason)));
    }
    for reason in check.accepted {
        log::warn!(
            "queue '{queue}' differs from its declaration, and is used as it is: {}",
            reason.text
        );
    }
    if let Some(reason) = unknown {
        log::warn!("cannot check the type of queue '{queue}': {}", reason.text);
    }
    Ok(())
}

/// The check of an existing queue's type: what the queue is declared with next, and the differences
/// that were found before.
struct TypeCheck {
    options: QueueDeclareOptions,
    /// The queue is durable, or transient, unlike its declaration. It may be a stream besides.
    other_durability: Option<Reason>,
    accepted: Vec<Reason>,
}

/// The conclusion from a difference.
#[derive(Debug, PartialEq)]
enum Verdict {
    /// Declare the queue again, with the options that are changed now.
    DeclareAgain,
    /// The queue has another type.
    OtherType(Reason),
    Stream,
    /// The broker's sentence does not help further.
    Unknown(Reason),
}

impl TypeCheck {
    fn new(options: QueueDeclareOptions) -> Self {
        TypeCheck {
            options,
            other_durability: None,
            accepted: Vec::new(),
        }
    }

    /// Takes the broker's reason, code 406, to refuse the declaration.
    fn on_difference(&mut self, reason: Reason) -> Verdict {
        let Some(Difference { name, current }) = reason.difference() else {
            return Verdict::Unknown(reason);
        };
        match (&*name, current) {
            ("x-queue-type", Some(AmqpValue::LongString(other))) if other == "stream" => {
                Verdict::Stream
            }
            ("x-queue-type", _) => {
                Verdict::OtherType(self.other_durability.take().unwrap_or(reason))
            }
            ("durable", _) if self.other_durability.is_none() => {
                self.options.durable = !self.options.durable;
                self.other_durability = Some(reason);
                Verdict::DeclareAgain
            }
            ("auto_delete", _) if !self.options.auto_delete => {
                self.options.auto_delete = true;
                self.accepted.push(reason);
                Verdict::DeclareAgain
            }
            // Not twice: the value is not what the sentence says.
            (_, Some(value)) if !self.options.arguments.contains_key(&name) => {
                self.options.arguments.insert(name, value);
                self.accepted.push(reason);
                Verdict::DeclareAgain
            }
            _ => Verdict::Unknown(reason),
        }
    }
}

/// Declares the queue, on a channel of its own.
fn declare(
    connection: &mut Connection,
    queue: &str,
    options: &QueueDeclareOptions,
    phase: Phase,
    deadline: &Deadline,
) -> Result<(), Error> {
    connection.run_blocking(deadline, phase, |amqp| {
        // Dropped in this call, so that its closing has the deadline, too.
        let channel = amqp.open_channel(None)?;
        channel.queue_declare(queue, options.clone()).map(drop)
    })
}

/// Describes the result of [`find_or_declare`] for the log.
pub(crate) fn describe(queue: &str, declared: Option<&str>) -> String {
    match declared {
        Some(name) => format!("declared queue '{queue}' ({name})"),
        None => format!("using existing queue '{queue}'"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reason(name: &str, end: &str) -> Reason {
        Reason {
            code: PRECONDITION_FAILED,
            text: format!(
                "PRECONDITION_FAILED - inequivalent arg '{name}' for queue 'q' in vhost '/': {end}"
            ),
        }
    }

    fn check(queue_type: QueueType) -> TypeCheck {
        TypeCheck::new(declaration(queue_type).1)
    }

    #[test]
    fn arguments_of_others_are_declared_until_the_broker_names_the_type() {
        let mut check = check(QueueType::Quorum);
        let max_length = reason(
            "x-max-length",
            "received none but current is the value '10' of type 'signedint'",
        );
        let auto_delete = reason("auto_delete", "received 'false' but current is 'true'");
        for reason in [&auto_delete, &max_length] {
            assert_eq!(check.on_difference(reason.clone()), Verdict::DeclareAgain);
        }
        assert!(check.options.auto_delete);
        assert_eq!(
            check.options.arguments["x-max-length"],
            AmqpValue::LongLongInt(10)
        );
        assert_eq!(check.accepted, [auto_delete, max_length]);
        let other = reason(
            "x-queue-type",
            "received the value 'quorum' of type 'longstr' but current is none",
        );
        assert_eq!(
            check.on_difference(other.clone()),
            Verdict::OtherType(other)
        );
    }

    #[test]
    fn a_difference_that_stays_or_is_not_understood_ends_the_check() {
        let mut check = check(QueueType::Classic);
        let overflow = reason(
            "x-overflow",
            "received none but current is the value 'drop-head' of type 'longstr'",
        );
        assert_eq!(check.on_difference(overflow.clone()), Verdict::DeclareAgain);
        assert_eq!(
            check.on_difference(overflow.clone()),
            Verdict::Unknown(overflow)
        );
        let cut = reason("x-max-length", "received none but cur");
        assert_eq!(check.on_difference(cut.clone()), Verdict::Unknown(cut));
    }

    #[test]
    fn a_stream_is_recognised_behind_another_difference() {
        let mut check = check(QueueType::Transient);
        let durable = reason("durable", "received 'false' but current is 'true'");
        assert_eq!(check.on_difference(durable.clone()), Verdict::DeclareAgain);
        assert!(check.options.durable);
        assert_eq!(check.other_durability, Some(durable));
        for current in ["'stream'", "the value 'stream' of type 'longstr'"] {
            let reason = reason(
                "x-queue-type",
                &format!("received none but current is {current}"),
            );
            assert_eq!(check.on_difference(reason), Verdict::Stream);
        }
    }
}
