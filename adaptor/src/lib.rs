//! The adaptor: the worker node's end of Secure Comms, as a library.
//!
//! The blocks below follow a pod. Its keys come from the [`store`]. They reach the VM through the [`kbs`] or in its
//! [`user_data`]. Then the [`registry`] runs a task for each [`pod`], whose driver connects over `transport`: SSH, a connection
//! with the agent, and routes for local clients.
//!
//! A caller uses [`Adaptor`]:
//!
//! ```no_run
//! use std::sync::Arc;
//! use std::time::Duration;
//!
//! use secure_comms_adaptor::kbs::{KbsClient, KbsSettings};
//! use secure_comms_adaptor::key_source::KeySource;
//! use secure_comms_adaptor::store::DirectoryStore;
//! use secure_comms_adaptor::{Adaptor, Config, Deadline, PodSpec};
//! use secure_comms_protocol::tag::parse_list;
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let store = Arc::new(DirectoryStore::open("/var/lib/secure-comms-adaptor")?);
//! let kbs = KbsSettings { url: "https://kbs.example:8080".parse()?, ca: None, admin: None };
//! let kbs = KbsClient::new(&kbs, Duration::from_secs(60))?;
//! let config = Config {
//!     inbounds: parse_list("KUBERNETES_PHASE:KATAAGENT:/run/sc/{pod}/agent.ttrpc").map_err(|faults| format!("{faults:?}"))?,
//!     outbounds: parse_list("BOTH_PHASES:KBS:kbs.example:8080").map_err(|faults| format!("{faults:?}"))?,
//!     require_pq: true,
//!     ..Config::new(Arc::new(|pod, event| println!("pod {pod}: {event}")))
//! };
//! let adaptor = Adaptor::new(store, KeySource::Kbs(kbs), config);
//! let pod = "sandbox-1".parse()?;
//!
//! // Before the VM starts: its keys are published, and local clients can connect.
//! let deadline = Deadline::after(Duration::from_secs(300));
//! let init_data = "0a1b".repeat(16).parse()?;
//! for endpoint in adaptor.prepare(&pod, PodSpec::bound_to(Some(init_data)), deadline).await? {
//!     println!("tunnel {} listens on {}", endpoint.name, endpoint.local);
//! }
//! // Once the VM has an address: returns when the Kubernetes phase is up.
//! adaptor.start(&pod, &["10.0.0.7".parse()?], deadline).await?;
//!
//! // The channel is kept up; the state says how it is.
//! if let Some(mut changes) = adaptor.subscribe(&pod) {
//!     changes.changed().await?;
//!     println!("pod {pod}: {:?}", changes.borrow().state);
//! }
//!
//! adaptor.stop(&pod).await?;
//! # Ok(())
//! # }
//! ```

pub mod registry;
pub use deadline::Deadline;
pub use registry::{Adaptor, AdaptorError, Config, Endpoint, MEMORY, PodRecord, PodSpec, Stopped, Traffic};

pub mod address;
mod deadline;
pub mod key_source;
pub mod store;

pub mod kbs;
mod publication;
pub mod user_data;

pub mod pod;

mod transport;
pub use transport::kbs_filter;
pub use transport::ssh::{Greeting, GreetingError, greeting};

mod text;
pub use text::with_causes;
mod throttle;

mod handover;

// Unit tests share the simulated agent with the integration tests, which know this crate by its name.
#[cfg(test)]
extern crate self as secure_comms_adaptor;
#[cfg(test)]
#[path = "../tests/support/mod.rs"]
mod support;
