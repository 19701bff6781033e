//! Why a request failed.

use std::error::Error;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use secure_comms_protocol::volumes::{Failure, FailureKind};

use crate::cdh::CallError;
use crate::program::ProgramError;
use crate::signature::Unsure;
use crate::text::{message_line, one_line};
use crate::volume::{BadVolume, FileSystem, VolumeName};

/// A request failed.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    /// It can't be right.
    #[error(transparent)]
    Bad(#[from] BadVolume),
    /// The agent closed the connection.
    #[error("the agent gave the request up")]
    GivenUp,
    /// A volume failed.
    #[error("volume {name}")]
    Volume {
        /// The volume.
        name: VolumeName,
        /// The cause.
        #[source]
        cause: VolumeError,
    },
    /// What was written to a volume could not be brought to its disk.
    #[error("writing {} to its disk", at.display())]
    Flush {
        /// Where it is mounted.
        at: PathBuf,
        /// The cause.
        #[source]
        cause: io::Error,
    },
    /// A volume, or what it leaves, could not be unmounted.
    #[error("unmounting {}", at.display())]
    Unmount {
        /// Where it is mounted, or the name of its mapping.
        at: PathBuf,
        /// The cause.
        #[source]
        cause: io::Error,
    },
    /// The mounts can't be read.
    #[error("reading the list of mounts")]
    Mounts(#[source] io::Error),
}

/// Why a volume is not mounted.
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    /// sysfs or the mounts can't be read.
    #[error("looking for its disk")]
    Search(#[source] io::Error),
    /// No disk has its number or id.
    #[error("no disk with LUN {lun}{} within {} s{}; check that the cloud has attached it",
        id_text(disk_id), waited.as_secs(), refused_text(refused))]
    NoDisk {
        /// Number of the disk.
        lun: u32,
        /// The cloud's id of it; may be empty.
        disk_id: String,
        /// How long it was looked for.
        waited: Duration,
        /// Disks that can't be it.
        refused: Vec<String>,
    },
    /// Another disk is mounted in its place.
    #[error("another disk is mounted at {}", .0.display())]
    OtherMounted(PathBuf),
    /// The disk is in use, or gone.
    #[error("opening {}", node.display())]
    Open {
        /// The disk.
        node: PathBuf,
        /// The cause.
        #[source]
        cause: io::Error,
    },
    /// It is not sure what is on the disk.
    #[error("not sure what is on {}, so it is neither mounted nor formatted", node.display())]
    Unsure {
        /// The disk.
        node: PathBuf,
        /// The cause.
        #[source]
        cause: Unsure,
    },
    /// The disk has something else.
    #[error("{} has {there}, not {wanted}: it is neither mounted nor formatted", node.display())]
    Content {
        /// The disk.
        node: PathBuf,
        /// What it has.
        there: String,
        /// What is asked for.
        wanted: &'static str,
    },
    /// It is empty and read-only.
    #[error("{} is empty and read-only", .0.display())]
    EmptyReadOnly(PathBuf),
    /// The image's policy.
    #[error(
        "it is not encrypted, and this image refuses such volumes (--require-encryption): the cloud reads and writes \
        what is on it; set encrypt_type and key_id"
    )]
    NotEncrypted,
    /// The file system could not be made.
    #[error("making {} on {}", fs.name(), node.display())]
    Format {
        /// File system.
        fs: FileSystem,
        /// The disk.
        node: PathBuf,
        /// The cause.
        #[source]
        cause: ProgramError,
    },
    /// The mount failed.
    #[error("mounting at {}", at.display())]
    Mount {
        /// Where.
        at: PathBuf,
        /// The cause.
        #[source]
        cause: io::Error,
    },
    /// The group could not be set.
    #[error("giving it to its fs_group")]
    Group(#[source] io::Error),
    /// The data hub failed.
    #[error(transparent)]
    DataHub(#[from] CallError),
    /// The data hub says that it has mounted the volume, and it has not, or not as it should be.
    #[error("the confidential data hub says that it is mounted, but {0}")]
    NotAsAsked(String),
}

fn id_text(id: &str) -> String {
    if id.is_empty() { String::new() } else { format!(" or id {}", one_line(id)) }
}

fn refused_text(refused: &[String]) -> String {
    if refused.is_empty() { String::new() } else { format!(" ({})", refused.join("; ")) }
}

impl RequestError {
    /// What the agent gets.
    #[must_use]
    pub fn to_failure(&self) -> Failure {
        Failure { kind: self.kind(), message: chain(self) }
    }

    fn kind(&self) -> FailureKind {
        match self {
            Self::Bad(_) => FailureKind::Invalid,
            Self::GivenUp | Self::Flush { .. } | Self::Unmount { .. } | Self::Mounts(_) => {
                FailureKind::Internal
            }
            Self::Volume { cause, .. } => cause.kind(),
        }
    }
}

impl VolumeError {
    fn kind(&self) -> FailureKind {
        match self {
            Self::NoDisk { .. } => FailureKind::NoDisk,
            Self::OtherMounted(_)
            | Self::Open { .. }
            | Self::Unsure { .. }
            | Self::Content { .. }
            | Self::EmptyReadOnly(_)
            | Self::NotEncrypted
            | Self::Format { cause: ProgramError::Missing(_), .. }
            | Self::DataHub(CallError::Absent(..))
            | Self::NotAsAsked(_) => FailureKind::Refused,
            Self::Search(_)
            | Self::Format { .. }
            | Self::Mount { .. }
            | Self::Group(_)
            | Self::DataHub(_) => FailureKind::Internal,
        }
    }
}

/// An error and its causes, in one line.
#[must_use]
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    message_line(&text)
}
