//! The numbers of a queue, by a passive declaration.

/// The number of messages and consumers of a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueStats {
    /// Messages that are ready for delivery.
    pub messages: u32,
    /// Consumers: the workers of all servers.
    pub consumers: u32,
}

impl QueueStats {
    /// Asks by a passive declaration. If there is no such queue, the broker closes the channel.
    pub(crate) fn ask(channel: &amiquip::Channel, queue: &str) -> amiquip::Result<Self> {
        let queue = channel.queue_declare_passive(queue)?;
        Ok(QueueStats {
            messages: queue.declared_message_count().unwrap_or_default(), // always there
            consumers: queue.declared_consumer_count().unwrap_or_default(),
        })
    }
}
