//! The flags of `keys`.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::service::Format;

/// The flags of `keys`.
#[derive(Args, Clone, Debug)]
pub struct KeysArgs {
    /// Where keys are kept [env: SECURE_COMMS_STORE] [default: that of the settings' file, or
    /// /var/lib/secure-comms-adaptor]
    #[arg(long, global = true, value_name = "DIR")]
    pub store: Option<PathBuf>,
    /// The settings' file [env: SECURE_COMMS_CONFIG] [default: /etc/secure-comms/adaptor.toml, if it is there]
    #[arg(long, global = true, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// What to do.
    #[command(subcommand)]
    pub command: KeysCommand,
}

/// The commands of `keys`.
#[derive(Clone, Debug, Subcommand)]
pub enum KeysCommand {
    /// List the valid keys of this worker node, and the pods that each one drives
    List(KeysListArgs),
    /// Make a new key, for pods that are launched from now on; the earlier ones stay valid
    Rotate,
    /// Delete the earlier keys that no pod needs
    Prune,
}

/// The flags of `keys list`.
#[derive(Args, Clone, Debug, Default)]
pub struct KeysListArgs {
    /// wide (more columns), json or yaml [default: a table]
    #[arg(
        short,
        long,
        value_enum,
        value_name = "FORMAT",
        default_value = "table",
        hide_default_value = true,
        hide_possible_values = true
    )]
    pub output: Format,
    /// No line of headers
    #[arg(long)]
    pub no_headers: bool,
}
