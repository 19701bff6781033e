//! The flags of `doctor`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::service::ServiceArgs;

/// The flags of `doctor`.
#[derive(Args, Clone, Debug, Default)]
pub struct DoctorArgs {
    /// Where the service is.
    #[command(flatten)]
    pub service: ServiceArgs,
    /// The service's configuration, TOML [env: SECURE_COMMS_CONFIG] [default: /etc/secure-comms/adaptor.toml]
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Look at this pod as well: its id, the first digits of it, or NAMESPACE/NAME
    #[arg(long, value_name = "ID")]
    pub pod: Option<String>,
    /// json: one object [default: lines for people]
    #[arg(
        short,
        long,
        value_enum,
        value_name = "FORMAT",
        default_value = "text",
        hide_default_value = true,
        hide_possible_values = true
    )]
    pub output: ReportFormat,
}

/// The form of the report.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum ReportFormat {
    /// Lines for people.
    #[default]
    #[value(hide = true)]
    Text,
    /// One object.
    Json,
}
