//! Open channels: what the stream below amiquip knows about them and shares with their users.

use super::sanitize::Changes;
use amiquip::{ConsumerMessage, Return};
use crossbeam_channel::Receiver;
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

/// The channels of a connection, by number.
#[derive(Default)]
pub(crate) struct Channels(Mutex<HashMap<u16, Arc<ChannelState>>>);

/// The state of one opening of a channel. A channel number is used again; each opening has a state of its own.
pub(crate) struct ChannelState {
    /// False once the broker has closed the channel. Locked while something is written on it.
    pub(crate) is_open: Mutex<bool>,
    /// What has arrived and was not taken yet.
    pub(crate) deliveries: OnceLock<Receiver<ConsumerMessage>>,
    returns: Receiver<Return>,
    max_unread: usize,
    /// What was changed in the latest deliveries, by delivery tag.
    pub(crate) changes: Mutex<BTreeMap<u64, Changes>>,
}

impl Channels {
    pub(crate) fn open(&self, number: u16, max_unread: usize, returns: Receiver<Return>) -> Arc<ChannelState> {
        let (is_open, deliveries, changes) = (Mutex::new(true), OnceLock::new(), Mutex::default());
        let state = Arc::new(ChannelState { is_open, deliveries, returns, max_unread, changes });
        lock(&self.0).insert(number, state.clone());
        state
    }

    /// The state of an open channel; `None` for the channels without a publisher.
    pub(crate) fn get(&self, number: u16) -> Option<Arc<ChannelState>> {
        lock(&self.0).get(&number).cloned()
    }

    /// Marks a channel as closed. From when this returns, nothing more is written on it.
    pub(crate) fn close(&self, number: u16) {
        if let Some(state) = lock(&self.0).remove(&number) {
            *lock(&state.is_open) = false;
        }
    }
}

impl ChannelState {
    /// Whether more has arrived than the user has asked for.
    pub(crate) fn is_flooded(&self) -> bool {
        let deliveries = self.deliveries.get().map_or(0, Receiver::len);
        deliveries.max(self.returns.len()) > self.max_unread
    }

    /// Keeps what was changed in a delivery, until it is taken or was due to be.
    pub(crate) fn keep_changes(&self, delivery_tag: u64, new: Changes) {
        let mut changes = lock(&self.changes);
        changes.insert(delivery_tag, new);
        let due = delivery_tag.saturating_sub(self.max_unread as u64);
        *changes = changes.split_off(&due);
    }
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
