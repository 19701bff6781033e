//! The flags of `serve`, `config` and `caa-certs`.

use std::path::PathBuf;

use clap::{Args, Subcommand};

/// The flags of `serve`.
#[derive(Args, Clone, Debug, Default)]
pub struct ServeArgs {
    /// The settings' file, TOML [default: /etc/secure-comms/adaptor.toml, if it is there]
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Where the sockets of the pods' inbounds are [env: SECURE_COMMS_RUN_DIR] [default: /run/secure-comms]
    #[arg(long, value_name = "DIR")]
    pub run_dir: Option<PathBuf>,
    /// Where keys are kept [default: /var/lib/secure-comms-adaptor]
    #[arg(long, value_name = "DIR")]
    pub store: Option<PathBuf>,
    /// Where the VMs' KBS tunnel leads [env: SECURE_COMMS_KBS_ADDR] [default: kbs-service.trustee-operator-system:8080]
    #[arg(long, value_name = "HOST:PORT")]
    pub kbs: Option<String>,
    /// Where we publish keys, http or https [default: http:// and the address of --kbs]
    #[arg(long, value_name = "URL")]
    pub kbs_url: Option<String>,
    /// The KBS admin's Ed25519 key, PKCS#8 PEM; without it no admin token is sent
    #[arg(long, value_name = "FILE")]
    pub kbs_admin_key: Option<PathBuf>,
    /// The VMs have their keys from user data, not from a KBS [env: SECURE_COMMS_NO_TRUSTEE=true]
    #[arg(long)]
    pub no_trustee: bool,
    /// Serve cloud-api-adaptor: on or off [default: on]
    #[arg(long, value_name = "SWITCH")]
    pub caa: Option<String>,
    /// The socket of the API [default: /run/secure-comms/adaptor.sock]
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// Where monitoring reads /metrics, /healthz and /readyz [default: 127.0.0.1:9464]
    #[arg(long, value_name = "HOST:PORT")]
    pub metrics_listen: Option<String>,
    /// Where cloud-api-adaptor writes its sandboxes [default: /run/peerpod/pods]
    #[arg(long, value_name = "DIR")]
    pub pods_directory: Option<PathBuf>,
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
