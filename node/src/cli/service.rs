//! The flags of the commands that ask the service.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};

/// Where the service is.
#[derive(Args, Clone, Debug, Default)]
pub struct ServiceArgs {
    /// Where the service listens [env: SECURE_COMMS_SOCKET] [default: /run/secure-comms/adaptor.sock]
    #[arg(long, global = true, value_name = "PATH", display_order = 900)]
    pub socket: Option<PathBuf>,
}

/// The form of what is printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// A table.
    #[default]
    #[value(hide = true)]
    Table,
    /// A table with more columns.
    Wide,
    /// The API's objects.
    Json,
    /// The API's objects.
    Yaml,
}

/// The flags of `pod`.
#[derive(Args, Clone, Debug)]
pub struct PodArgs {
    /// Where the service is.
    #[command(flatten)]
    pub service: ServiceArgs,
    /// What to do.
    #[command(subcommand)]
    pub command: PodCommand,
}

/// The commands of `pod`.
#[derive(Clone, Debug, Subcommand)]
pub enum PodCommand {
    /// List the pods of this node
    #[command(visible_alias = "ls")]
    List(PodListArgs),
    /// Show all that is known of a pod, and what is wrong with its next step
    #[command(visible_alias = "describe")]
    Show(PodShowArgs),
    /// Print what happens to the pods, until it is interrupted
    Watch(PodWatchArgs),
    /// Launch a pod: publish its keys, connect to its VM, and wait until it can be used
    #[command(
        after_help = "Example:\n  secure-comms-adaptor pod start 3f2a --address 10.0.0.7 --namespace default \
                            --name web-1\n\nIt may be repeated: a pod that is up stays so, and what is left out then stays as it is."
    )]
    Start(Box<PodStartArgs>),
    /// End a pod: its channel, its keys here and at the KBS
    Stop(PodStopArgs),
    /// Delete a pod here although the KBS cannot delete its resource
    Forget(PodForgetArgs),
    /// List the records of pods that no launcher will end, or end them
    Orphans(PodOrphansArgs),
}

/// The form of what is printed.
#[derive(Args, Clone, Copy, Debug, Default)]
pub struct FormArgs {
    /// wide (more columns), json or yaml (the API's objects) [default: a table]
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
}

/// The flags of `pod list`.
#[derive(Args, Clone, Debug, Default)]
pub struct PodListArgs {
    /// Only pods of this namespace
    #[arg(short, long, value_name = "NAMESPACE")]
    pub namespace: Option<String>,
    /// Pods of all namespaces, which is the default
    #[arg(short = 'A', long, conflicts_with = "namespace")]
    pub all_namespaces: bool,
    /// Only pods in these phases, comma separated; `!` before one: not in it
    #[arg(long, value_name = "PHASES")]
    pub phase: Option<String>,
    /// The form of what is printed.
    #[command(flatten)]
    pub form: FormArgs,
    /// No line of headers
    #[arg(long)]
    pub no_headers: bool,
}

/// The flags of `pod show`.
#[derive(Args, Clone, Debug)]
pub struct PodShowArgs {
    /// The pod: its id, the first digits of it, or NAMESPACE/NAME
    pub id: String,
    /// The form of what is printed.
    #[command(flatten)]
    pub form: FormArgs,
}

/// The flags of `pod watch`.
#[derive(Args, Clone, Debug)]
pub struct PodWatchArgs {
    /// Only this pod: its id, the first digits of it, or NAMESPACE/NAME
    pub id: Option<String>,
    /// Only pods of this namespace
    #[arg(short, long, value_name = "NAMESPACE", conflicts_with = "id")]
    pub namespace: Option<String>,
    /// json: the API's objects, one a line [default: lines for people]
    #[arg(
        short,
        long,
        value_enum,
        value_name = "FORMAT",
        default_value = "text",
        hide_default_value = true,
        hide_possible_values = true
    )]
    pub output: EventFormat,
}

/// The form of events.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum EventFormat {
    /// A line for people.
    #[default]
    #[value(hide = true)]
    Text,
    /// The API's objects, one a line.
    Json,
}

/// The flags of `pod start`.
#[derive(Args, Clone, Debug)]
pub struct PodStartArgs {
    /// The pod: the runtime's sandbox id
    pub id: String,
    /// Where the pod VM's agent is; may be repeated [default port: 2222]
    #[arg(long = "address", value_name = "HOST[:PORT]", required = true)]
    pub addresses: Vec<String>,
    /// The pod's namespace in Kubernetes
    #[arg(short, long, value_name = "NAMESPACE", requires = "name")]
    pub namespace: Option<String>,
    /// The pod's name in Kubernetes
    #[arg(long, value_name = "NAME", requires = "namespace")]
    pub name: Option<String>,
    /// Digest of the init-data that the VM is started with, SHA-256, SHA-384 or SHA-512 in hex
    #[arg(long, value_name = "HEX")]
    pub init_data_digest: Option<String>,
    /// How long the start may take, as 90s, 5m or 1h30m [default: 5m]
    #[arg(long, value_name = "TIME")]
    pub deadline: Option<String>,
    /// Do not wait until the pod can be used
    #[arg(long)]
    pub no_wait: bool,
}

/// The flags of `pod stop`.
#[derive(Args, Clone, Debug)]
pub struct PodStopArgs {
    /// The pod: its id, the first digits of it, or NAMESPACE/NAME
    pub id: String,
    /// Stop it though the runtime still uses it, or another launcher launched it
    #[arg(long)]
    pub force: bool,
}

/// The flags of `pod forget`.
#[derive(Args, Clone, Debug)]
pub struct PodForgetArgs {
    /// The pod: its id, the first digits of it, or NAMESPACE/NAME
    pub id: String,
    /// Forget it though the runtime still uses it, or another launcher launched it
    #[arg(long)]
    pub force: bool,
}

/// The flags of `pod orphans`.
#[derive(Args, Clone, Debug, Default)]
pub struct PodOrphansArgs {
    /// End them: delete their keys here and at the KBS
    #[arg(long, conflicts_with = "output")]
    pub collect: bool,
    /// The form of what is printed.
    #[command(flatten)]
    pub form: FormArgs,
    /// No line of headers
    #[arg(long)]
    pub no_headers: bool,
}

/// The flags of `status`.
#[derive(Args, Clone, Debug, Default)]
pub struct StatusArgs {
    /// Where the service is.
    #[command(flatten)]
    pub service: ServiceArgs,
    /// The form of what is printed.
    #[command(flatten)]
    pub form: FormArgs,
}
