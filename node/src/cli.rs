//! The command line, as texts. [`crate::settings`] validates them, so that all faults are reported together.

pub mod doctor;
pub mod keys;
pub mod serve;
pub mod service;
pub mod setting;
pub mod texts;

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use secure_comms_keys::text::escape;

use self::doctor::DoctorArgs;
use self::keys::KeysArgs;
use self::serve::{CaaCertsArgs, ConfigArgs, ServeArgs};
use self::service::{PodArgs, StatusArgs};
use self::texts::{CompletionsArgs, ManArgs};

/// Secure Comms on the worker node: keys, tunnels and state of peer pods.
#[derive(Debug, Parser)]
#[command(
    name = "secure-comms-adaptor",
    version,
    arg_required_else_help = false,
    max_term_width = 100,
    after_help = "Documentation: docs/OPERATIONS.md of https://github.com/confidential-containers/secure-comms\n\
                  Report a bug: https://github.com/confidential-containers/secure-comms/issues"
)]
pub struct Cli {
    /// error, warn, info, debug or trace [env: SECURE_COMMS_LOG] [default: info]
    #[arg(long, global = true, value_name = "LEVEL", display_order = 901)]
    pub log: Option<String>,
    /// The log's lines on standard error: text or json [env: SECURE_COMMS_LOG_FORMAT] [default: text]
    #[arg(long, global = true, value_name = "FORMAT", display_order = 902)]
    pub log_format: Option<String>,
    /// The command.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Bring one pod's tunnels up and keep them up, in the foreground
    #[command(
        after_help = "Example: the keys come from a KBS, and a service of the node is reached from the pod:\n  \
        secure-comms-adaptor connect --pod-id 3f2a --address 10.0.0.7 --kbs kbs.example:8080 \\\n    \
        --kbs-admin-key admin.pem --outbounds KUBERNETES_PHASE:LOG:127.0.0.1:5170\n\n\
        It ends with 0 on SIGTERM, SIGINT or SIGHUP once the pod is up, with 128 and the signal's number before."
    )]
    Connect(Box<ConnectArgs>),
    /// Print the apf.json fragment for a pod VM without Trustee (secret: it holds the pod's private key)
    UserData(UserDataArgs),
    /// Make the worker node's key pair if it is missing, and print its public half
    Keygen(KeygenArgs),
    /// Run the node's service: every pod of this node, until a signal
    Serve(Box<ServeArgs>),
    /// Show the configuration of `serve`
    Config(ConfigArgs),
    /// Make the certificates with which cloud-api-adaptor trusts nothing but this service
    CaaCerts(CaaCertsArgs),
    /// Show and drive the pods of this node's service
    #[command(visible_alias = "pods")]
    Pod(PodArgs),
    /// Show how this node's service is
    Status(StatusArgs),
    /// Show, rotate and prune the worker node's keys
    Keys(KeysArgs),
    /// Look for what is wrong with this node or a pod, and say what to do
    #[command(after_help = "It ends with 0 if nothing is wrong, and with 1 if something is.")]
    Doctor(DoctorArgs),
    /// Print the API's description, OpenAPI 3.1 in JSON
    Openapi,
    /// Print a script with which a shell completes this program's command lines
    #[command(after_help = "Example:\n  secure-comms-adaptor completions bash > \
                            /usr/share/bash-completion/completions/secure-comms-adaptor")]
    Completions(CompletionsArgs),
    /// Print this program's man page, or write those of all commands
    #[command(after_help = "Example:\n  secure-comms-adaptor man --directory /usr/share/man/man8")]
    Man(ManArgs),
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
    /// Further inbounds; may be repeated [env: SECURE_COMMS_INBOUNDS]
    #[arg(long, value_name = "TAGS")]
    pub inbounds: Vec<String>,
    /// Further outbounds; may be repeated [env: SECURE_COMMS_OUTBOUNDS]
    #[arg(long, value_name = "TAGS")]
    pub outbounds: Vec<String>,
    /// Inbounds that the VM's agent may have; may be repeated [env: SECURE_COMMS_PP_INBOUNDS] [default: only KBS]
    #[arg(long, value_name = "TAGS")]
    pub pp_inbounds: Vec<String>,
    /// Outbounds that the VM's agent may have; may be repeated [env: SECURE_COMMS_PP_OUTBOUNDS] [default: only KATAAGENT]
    #[arg(long, value_name = "TAGS")]
    pub pp_outbounds: Vec<String>,
    /// Where the agent may have the kata agent's socket; may be repeated [default: /run/kata-agent/agent.sock and
    /// /run/kata-containers/agent.sock]
    #[arg(long = "kata-agent-socket", value_name = "PATH")]
    pub kata_agent_sockets: Vec<String>,
    /// Where the sockets of the pods' inbounds are [env: SECURE_COMMS_RUN_DIR] [default: /run/secure-comms]
    #[arg(long, value_name = "DIR")]
    pub run_dir: Option<PathBuf>,
    /// Let only an attesting agent's requests pass to the KBS: on or off [env: SECURE_COMMS_KBS_FILTER] [default: on]
    #[arg(long, value_name = "SWITCH")]
    pub kbs_filter: Option<String>,
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
    /// The init-data that the VM is started with: TOML, or base64 of its gzip [env: SECURE_COMMS_INIT_DATA]
    #[arg(long, value_name = "FILE")]
    pub init_data: Option<String>,
    /// Its digest instead, SHA-256, SHA-384 or SHA-512 in hex [env: SECURE_COMMS_INIT_DATA_DIGEST]
    #[arg(long, value_name = "HEX")]
    pub init_data_digest: Option<String>,
    /// Which init-data which pod has instead, TOML [env: SECURE_COMMS_INIT_DATA_RULES]
    #[arg(long, value_name = "FILE")]
    pub init_data_rules: Option<String>,
    /// The pod in Kubernetes, for the rules [env: SECURE_COMMS_POD]
    #[arg(long, value_name = "NAMESPACE/NAME")]
    pub pod: Option<String>,
    /// Public keys of further worker nodes that may log in, as authorized_keys [env: SECURE_COMMS_WORKER_NODE_KEYS]
    #[arg(long, value_name = "FILE")]
    pub worker_node_keys: Option<String>,
    /// Serve agents before version 0.2, less safely [env: SECURE_COMMS_ALLOW_OLD_AGENTS=true]
    #[arg(long)]
    pub allow_old_agents: bool,
    /// The VM has its keys from user data, not from a KBS [env: SECURE_COMMS_NO_TRUSTEE=true]
    #[arg(long)]
    pub no_trustee: bool,
    /// Where keys are kept [default: /var/lib/secure-comms-adaptor]
    #[arg(long, value_name = "DIR")]
    pub store: Option<PathBuf>,
    /// How long the start may take, as 90s, 5m or 1h30m [default: 5m]
    #[arg(long, value_name = "TIME")]
    pub deadline: Option<String>,
    /// Data in a direction after which new session keys are made, as 64MiB or 1GiB; at least 1MiB [default: 32GiB]
    #[arg(long, value_name = "SIZE")]
    pub rekey_bytes: Option<String>,
    /// Only post-quantum key exchange (mlkem768x25519-sha256), in both phases [env: SECURE_COMMS_REQUIRE_PQ=true]
    #[arg(long)]
    pub require_pq: bool,
    /// On a signal that ends it, forget the pod: delete its key and its KBS resource; after a failed start only if no VM
    /// can have them [default: keep, to resume]
    #[arg(long)]
    pub delete_on_exit: bool,
    /// Events for a program, on standard output: json or none [env: SECURE_COMMS_EVENTS] [default: none]
    #[arg(long, value_name = "FORMAT")]
    pub events: Option<String>,
}

/// The flags of `user-data`.
#[derive(Args, Clone, Debug, Default)]
pub struct UserDataArgs {
    /// The pod: the runtime's sandbox id (required)
    #[arg(long, value_name = "ID")]
    pub pod_id: Option<String>,
    /// Inbounds of the VM's agent; may be repeated [env: SECURE_COMMS_PP_INBOUNDS]
    #[arg(long, value_name = "TAGS")]
    pub pp_inbounds: Vec<String>,
    /// Outbounds of the VM's agent; may be repeated [env: SECURE_COMMS_PP_OUTBOUNDS]
    #[arg(long, value_name = "TAGS")]
    pub pp_outbounds: Vec<String>,
    /// Where keys are kept [default: /var/lib/secure-comms-adaptor]
    #[arg(long, value_name = "DIR")]
    pub store: Option<PathBuf>,
    /// Write to this file (0600) instead of standard output; `-` is standard output
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

/// What the command line asks for, other than a command.
#[derive(Debug)]
pub enum Stop {
    /// Help or the version, for standard output; the exit code is 0.
    Text(String),
    /// A fault, in one line; the exit code is 2.
    Fault(String),
}

/// Parses the command line.
///
/// # Errors
/// It asks for help or the version, or has an unknown flag or command.
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Cli, Stop> {
    Cli::try_parse_from(args).map_err(|error| {
        let text = error.render().to_string();
        if error.use_stderr() { Stop::Fault(fault(&text)) } else { Stop::Text(text) }
    })
}

/// The paragraphs of the parser's message as one line, as our own faults are.
///
/// ```text
/// error: unexpected argument '--adress' found
///
///   tip: a similar argument exists: '--address'
///
/// Usage: secure-comms-adaptor connect --address <HOST[:PORT]>
///
/// For more information, try '--help'.
/// ```
fn fault(text: &str) -> String {
    let mut parts: Vec<String> = Vec::new();
    for paragraph in text.split("\n\n") {
        let line = paragraph.split_whitespace().collect::<Vec<_>>().join(" ");
        if line.is_empty() || line.starts_with("Usage:") {
            continue;
        }
        let line = line.strip_prefix("error: ").or_else(|| line.strip_prefix("tip: ")).unwrap_or(&line);
        parts.push(line.replace("For more information, try '--help'.", "see --help"));
    }
    escape(&parts.join("; "))
}
