//! The flags of `serve`, `config` and `caa-certs`.

use std::path::PathBuf;

use clap::{Args, Subcommand};

/// The flags of `serve`.
#[derive(Args, Clone, Debug, Default)]
pub struct ServeArgs {
    /// The configuration, TOML [env: SECURE_COMMS_CONFIG] [default: /etc/secure-comms/adaptor.toml]
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Take the node's nftables rules away, and end
    #[arg(long)]
    pub remove_rules: bool,
}

/// The flags of `config`.
#[derive(Args, Clone, Debug)]
pub struct ConfigArgs {
    /// What to do.
    #[command(subcommand)]
    pub command: ConfigCommand,
}

/// The commands of `config`.
#[derive(Clone, Debug, Subcommand)]
pub enum ConfigCommand {
    /// Print each setting of `serve`, its value and where that comes from
    Show(Box<ServeArgs>),
}

/// The flags of `caa-certs`.
#[derive(Args, Clone, Debug)]
pub struct CaaCertsArgs {
    /// The directory
    #[arg(value_name = "DIR")]
    pub directory: PathBuf,
    /// Replace certificates that are there
    #[arg(long)]
    pub overwrite: bool,
}
