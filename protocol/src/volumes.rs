//! What the agent asks of `podvm-volumes`, the program in the VM that mounts cloud volumes, over a unix socket.
//!
//! A connection has one request, a line of JSON, and one answer, a line of JSON. Each line has at most [`LINE_MAX`] bytes with its
//! newline. The agent closes the connection to give a request up: no further volume is mounted then. What was being mounted may be, and a
//! repeated request takes it as it is. An unmount is carried out in any case.

use alloc::string::String;
use alloc::vec::Vec;

use serde::{Deserialize, Serialize};

/// The longest request and the longest answer, in bytes.
pub const LINE_MAX: usize = 64 * 1024;
/// Most volumes in a request.
pub const VOLUMES_MAX: usize = 32;

/// A request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// Find, format if empty, and mount these volumes, in this order.
    Mount(Vec<Volume>),
    /// Unmount all volumes, in the reverse order of their mounts.
    UnmountAll,
}

/// A volume, as cloud-api-adaptor describes it in the annotation `io.confidentialcontainers.org.cloud_volumes`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Volume {
    /// Its key in the annotation, such as `vol-0`: one path component.
    pub name: String,
    /// `ext4`, `ext3` or `xfs`.
    pub fs_type: String,
    /// Number of the disk on its controller, decimal.
    pub lun: String,
    /// The cloud's id of the disk; may be empty.
    pub disk_id: String,
    /// Group that is to own it, decimal; may be empty.
    pub fs_group: String,
    /// Empty, `luks` or `luks2`.
    pub encrypt_type: String,
    /// KBS resource with the key of an encrypted one, `repository/type/tag`; may be empty without encryption.
    pub key_id: String,
}

/// The answer to a request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// All are mounted: their paths, in the order of the request.
    Mounted(Vec<String>),
    /// No volume is mounted any more.
    Unmounted,
    /// The request failed. What it had mounted before the fault stays mounted, and a repeated request takes it as it is.
    Failed(Failure),
}

/// Why a request failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// What kind of fault it is.
    pub kind: FailureKind,
    /// The volume, the cause, and what to do, in one line.
    pub message: String,
}

/// What kind of fault it is; the agent makes it a ttrpc status.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureKind {
    /// The request can't be right.
    Invalid,
    /// No disk was found in the time for it.
    NoDisk,
    /// The disk is there, but must not or can't be used: its content, its encryption, the policy of this image.
    Refused,
    /// A mount, a program or the confidential data hub failed.
    Internal,
}
