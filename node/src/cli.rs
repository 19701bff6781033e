//! The command line, as texts. [`crate::settings`] validates them, so that all faults are reported together.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

/// Secure Comms on the worker node: keys, tunnels and state of peer pods.
#[derive(Debug, Parser)]
#[command(name = "secure-comms-adaptor", version, arg_required_else_help = false)]
pub struct Cli {
    /// error, warn, info, debug or trace [env: SECURE_COMMS_LOG] [default: info]
    #[arg(long, global = true, value_name = "LEVEL")]
    pub log: Option<String>,
    /// The command.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Bring one pod's tunnels up and keep them up, in the foreground
    Connect(Box<ConnectArgs>),
    /// Print the apf.json fragment for a pod VM without Trustee (secret: it holds the pod's private key)
    UserData(UserDataArgs),
    /// Make the worker node's key pair if it is missing, and print its public half
    Keygen(KeygenArgs),
}

/// The flags of `connect`.
#[derive(Args, Clone, Debug, Default)]
pub struct ConnectArgs {
    /// The pod: the runtime's sandbox id (required)
    #[arg(long, value_name = "ID")]
    pub pod_id: Option<String>,
    /// Where the pod VM's agent is; may be repeated (required) [default port: 2222]
    #[arg(long = "address", value_name = "HOST[:PORT]")]
    pub addresses: Vec<String>,
    /// Further inbounds [env: SECURE_COMMS_INBOUNDS]
    #[arg(long, value_name = "TAGS")]
    pub inbounds: Option<String>,
    /// Further outbounds [env: SECURE_COMMS_OUTBOUNDS]
    #[arg(long, value_name = "TAGS")]
    pub outbounds: Option<String>,
    /// Where the VM's KBS tunnel leads [env: SECURE_COMMS_KBS_ADDR] [default: kbs-service.trustee-operator-system:8080]
    #[arg(long, value_name = "HOST:PORT")]
    pub kbs: Option<String>,
    /// Where we publish keys, http or https [default: http:// and the address of --kbs]
    #[arg(long, value_name = "URL")]
    pub kbs_url: Option<String>,
    /// The CA of an https KBS, PEM [default: the system's]
    #[arg(long, value_name = "FILE")]
    pub kbs_ca: Option<PathBuf>,
    /// The KBS admin's Ed25519 key, PKCS#8 PEM; without it no admin token is sent
    #[arg(long, value_name = "FILE")]
    pub kbs_admin_key: Option<PathBuf>,
    /// `iss` of the admin token [default: secure-comms-adaptor]
    #[arg(long, value_name = "NAME")]
    pub kbs_admin_issuer: Option<String>,
    /// `role` of the admin token [default: admin]
    #[arg(long, value_name = "NAME")]
    pub kbs_admin_role: Option<String>,
    /// The VM has its keys from user data, not from a KBS [env: SECURE_COMMS_NO_TRUSTEE=true]
    #[arg(long)]
    pub no_trustee: bool,
    /// Where keys are kept [default: /var/lib/secure-comms-adaptor]
    #[arg(long, value_name = "DIR")]
    pub store: Option<PathBuf>,
    /// How long the start may take [default: 300]
    #[arg(long, value_name = "SECONDS")]
    pub deadline: Option<String>,
    /// Data in a direction after which new session keys are made, at least 1048576
    #[arg(long, value_name = "BYTES")]
    pub rekey_bytes: Option<String>,
    /// On SIGTERM or SIGINT forget the pod: delete its key and its KBS resource [default: keep, to resume]
    #[arg(long)]
    pub delete_on_exit: bool,
}

/// The flags of `user-data`.
#[derive(Args, Clone, Debug, Default)]
pub struct UserDataArgs {
    /// The pod: the runtime's sandbox id (required)
    #[arg(long, value_name = "ID")]
    pub pod_id: Option<String>,
    /// Inbounds of the VM's agent [env: SECURE_COMMS_PP_INBOUNDS]
    #[arg(long, value_name = "TAGS")]
    pub pp_inbounds: Option<String>,
    /// Outbounds of the VM's agent [env: SECURE_COMMS_PP_OUTBOUNDS]
    #[arg(long, value_name = "TAGS")]
    pub pp_outbounds: Option<String>,
    /// Where keys are kept [default: /var/lib/secure-comms-adaptor]
    #[arg(long, value_name = "DIR")]
    pub store: Option<PathBuf>,
    /// Write to this file (0600) instead of standard output
    #[arg(long, value_name = "FILE")]
    pub output: Option<PathBuf>,
}

/// The flags of `keygen`.
#[derive(Args, Clone, Debug, Default)]
pub struct KeygenArgs {
    /// Make this pod's key pair too, and print its public half on a second line
    #[arg(long, value_name = "ID")]
    pub pod_id: Option<String>,
    /// Where keys are kept [default: /var/lib/secure-comms-adaptor]
    #[arg(long, value_name = "DIR")]
    pub store: Option<PathBuf>,
}

/// Parses the command line. Help and version end the process with code 0, unknown flags and commands with code 2.
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Cli {
    Cli::parse_from(args)
}
