//! Reply codes of AMQP 0-9-1, with which the broker closes a channel or a connection.

/// An operator closed the connection, or the broker shuts down.
pub(crate) const CONNECTION_FORCED: u16 = 320;
/// The user lacks a permission.
pub const ACCESS_REFUSED: u16 = 403;
/// There is no such queue.
pub const NOT_FOUND: u16 = 404;
/// The queue is exclusive to another connection.
pub(crate) const RESOURCE_LOCKED: u16 = 405;
/// A declaration does not match the queue; or an acknowledgement came too
/// late.
pub const PRECONDITION_FAILED: u16 = 406;
/// There is no such vhost, or the user may not access it.
pub(crate) const NOT_ALLOWED: u16 = 530;
/// The broker failed, or is configured not to do this.
pub(crate) const INTERNAL_ERROR: u16 = 541;
