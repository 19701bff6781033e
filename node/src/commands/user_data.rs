//! `user-data`: the keys and tunnels of a pod VM that has no Trustee.

use std::path::Path;

use secure_comms_adaptor::user_data;

use super::open_store;
use super::output::Output;
use crate::settings::UserDataSettings;

/// Writes the fragment of `apf.json` to a file (mode 0600) or a stream. Makes the keys that are missing.
///
/// # Errors
/// The store failed, or the fragment could not be written.
pub async fn run(settings: UserDataSettings) -> anyhow::Result<()> {
    // First: no key is made for an output that is refused.
    let path = settings.output.as_deref();
    let waiting = || {
        let path = path.unwrap_or(Path::new("-")).display();
        tracing::warn!("waiting until a reader opens the FIFO {path}; Ctrl-C ends the wait");
    };
    let output = Output::open(path, waiting)?;
    if output.is_terminal() {
        tracing::warn!(
            "pod {}: its private key is shown on this terminal: clear the screen and its history, or give \
             --output FILE",
            settings.pod
        );
    }
    let store = open_store(&settings.store)?;
    let (inbounds, outbounds) = (&settings.inbounds, &settings.outbounds);
    let json = user_data::of_pod(&store, &settings.pod, inbounds, outbounds).await?;
    output.write(&json)
}
