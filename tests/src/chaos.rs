//! Pod lives under faults: each is drawn from a seed, run over the real binaries, and held against what must always be true.
//!
//! In the order of a life:
//!
//! - [`script`]: what is drawn: the path, the phase that is hit, the faults and when; from the seed only;
//! - [`site`]: the pod with all around it; [`program`]: its processes, started again when they end; [`disk`]: their disks;
//! - [`traffic`]: clients at every inbound, all the time, that check each byte; [`stranger`]: one that tries every door;
//! - [`strike`]: how a fault is done, and undone;
//! - [`life`]: all of that, one after the other; [`secrets`], [`resources`]: what is looked for once it is over;
//! - [`soak`]: one pod that reconnects many times, and what that leaves behind; [`leftovers`]: what all of it has left behind here;
//! - [`summary`]: what many lives come to.

pub mod attacker;
pub mod disk;
pub mod fault;
pub mod leftovers;
pub mod lifetime;
pub mod pod_scene;
pub mod program;
pub mod resources;
pub mod script;
pub mod secrets;
pub mod soak;
pub mod summary;
pub mod traffic;
