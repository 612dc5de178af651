//! The parts that only redelivered requests need.
//!
//! A request is delivered again when its first delivery got no acknowledgement. Its reply may be
//! why: so the reply is published alone, on the [`IsolatedPublisher`]'s connection. And the reply
//! may have been computed already: then [`KeptReplies`] has it.

mod isolated;
mod kept;

pub(crate) use isolated::{IsolatedPublisher, IsolatedResult};
pub(crate) use kept::{Begun, End, InHand, KeptReplies, Sent};
