//! `connect`: one pod in the foreground. Being written.

use crate::settings::Settings;

/// Why a pod could not be connected.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// This part is being written.
    #[error("connect to pod {0}: not built yet")]
    NotBuilt(String),
}

/// Brings the pod up and keeps its channel up until SIGTERM or SIGINT.
///
/// # Errors
/// What was last seen when the deadline passed.
pub async fn run(settings: Settings) -> Result<(), ConnectError> {
    Err(ConnectError::NotBuilt(settings.pod.to_string()))
}
