//! What the API and its clients say to each other. The OpenAPI document is made from these types, their comments included.

mod end;
mod event;
mod pod;
mod problem;
mod secret;
mod status;
mod time;

pub use self::end::{Deletion, Forgotten, Orphan, OrphanList};
pub use self::event::{Event, EventKind, Lost};
pub use self::pod::{
    Endpoint, Launcher, Phase, Pod, PodList, PodRef, PodSpec, Prepared, Runtime, RuntimeState, Session,
    StartOrder,
};
pub use self::problem::{Fault, Problem};
pub use self::secret::Secret;
pub use self::status::{Part, Status, StopCost};
pub use self::time::Time;

/// Addresses that a start may name at most.
pub(super) const ADDRESSES_MAX: usize = 16;
/// The longest deadline, in seconds: a day.
pub(super) const DEADLINE_MAX: u32 = 86_400;
