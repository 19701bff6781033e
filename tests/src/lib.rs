//! What the tests and the `double` demo are made of: stand-ins for the systems around Secure Comms, and a harness
//! for real processes.
//!
//! In the order in which a pod meets them:
//!
//! - [`process`], [`netns`]: run the real binaries, in network namespaces if asked for; [`cable`], [`mod@line`], [`tamper`]: what lies between;
//! - [`kbs`]: Trustee's key broker, with faults on demand;
//! - [`guest`]: the guest components in the VM (`api-server-rest`, AA, CDH), which fetch keys through the agent;
//! - [`kata`]: the kata agent behind `KATAAGENT`, and the client side that checks every byte;
//! - [`kata_api`]: a kata agent and its runtime that speak the real protocol, for what the agent does to requests;
//! - [`openssh`]: stock OpenSSH as the other end; [`stranger`]: one that means harm, or a peer by hand; [`pod_keys`]: what
//!   an adaptor would have made for the pod;
//! - [`scene`]: one pod with all of that around it; [`siege`]: the same, with the agent under attack; [`flood`]: with thousands that mean no good; [`impostor`]: with one that plays the agent; [`vm`]: the same, with the VM in network namespaces; [`half`]: one
//!   half of it, by hand; [`pod_site`]: the VM's and the worker node's ends of the pod's network; [`boot`]: the VM as a machine under qemu, with an [`inspector`] in it;
//! - [`chaos`]: many pods, each with what befalls it drawn from a seed; [`mod@bench`]: beside OpenSSH.
//!
//! Everything binds port 0, reports what it got, and stops when dropped.

pub mod bench;
pub mod boot;
pub mod cable;
pub mod chaos;
pub mod flood;
pub mod half;
pub mod impostor;
pub mod kbs;
pub mod line;
pub mod netns;
pub mod openssh;
pub mod pod_keys;
pub mod pod_site;
pub mod process;
pub mod scene;
pub mod siege;
pub mod stranger;
pub mod tamper;
pub mod vm;

pub use secure_comms_kata_api as kata_api;
pub use secure_comms_stand_ins::{args, guest, inspector, kata};
