//! Keys, private files and texts from strangers, for both ends of Secure Comms.
//!
//! A text becomes a key: [`base64`], PEM, OpenSSH or PKCS#8, and `authorized_keys` lines. Each key gets a role
//! ([`PodKey`], [`WorkerNodeKey`], ...), so that no key can be taken for another. Keys are stored in
//! [`private_file`]s; the agent has them in a [`private_directory`]. What a stranger sends becomes one line of a log
//! by [`text`].

pub mod base64;
mod error;
mod pem;
mod private_key;
mod public_key;

mod admin_key;
mod pod_keys;
mod roles;

mod file_error;
pub mod private_directory;
pub mod private_file;

pub mod text;

pub use admin_key::AdminKey;
pub use error::{KeyError, PrivateKeyFault, PrivateKeyRole, PublicKeyFault, TextFault};
pub use file_error::{FileError, PrivacyFault};
pub use pod_keys::PodKeys;
pub use public_key::WorkerNodeKeys;
pub use roles::{AttestationKey, PodKey, PodPublic, WorkerNodeKey, WorkerNodePublic};
pub use ssh_key::{PrivateKey, PublicKey};
