//! The flags of `serve`, `config` and `caa-certs`.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};

use super::setting::Flags;

/// The flags of `serve`.
#[derive(Args, Clone, Debug, Default)]
pub struct ServeArgs {
    /// The settings' file, TOML [env: SECURE_COMMS_CONFIG] [default: /etc/secure-comms/adaptor.toml, if it is there]
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Take the node's nftables rules away, and end
    #[arg(long)]
    pub remove_rules: bool,
    /// The settings.
    #[command(flatten)]
    pub flags: Flags,
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
    Show(Box<ConfigShowArgs>),
    /// Look for faults in the settings of `serve`, as it would at its start
    Check(Box<ConfigCheckArgs>),
}

/// The flags of `config show`.
#[derive(Args, Clone, Debug, Default)]
pub struct ConfigShowArgs {
    /// The form of what is printed
    #[arg(short, long, value_enum, value_name = "FORMAT", default_value_t)]
    pub output: ConfigFormat,
    /// The settings' file [env: SECURE_COMMS_CONFIG] [default: /etc/secure-comms/adaptor.toml, if it is there]
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// The settings.
    #[command(flatten)]
    pub flags: Flags,
}

/// The flags of `config check`.
#[derive(Args, Clone, Debug, Default)]
pub struct ConfigCheckArgs {
    /// The settings' file [env: SECURE_COMMS_CONFIG] [default: /etc/secure-comms/adaptor.toml, if it is there]
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// The settings.
    #[command(flatten)]
    pub flags: Flags,
}

/// The form in which settings are printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum ConfigFormat {
    /// As a settings' file, with a comment that says where each value comes from.
    #[default]
    Toml,
    /// One object, for programs.
    Json,
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
