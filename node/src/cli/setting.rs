//! The settings of a node's service: one table, from which the flags, the variables, the keys of the settings' file and
//! their help are made.

use std::collections::BTreeMap;
use std::ffi::OsString;

use clap::builder::OsStringValueParser;
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches};

/// A setting. Its name is that of the flag, with `--`, and of the key in the file.
#[derive(Debug)]
pub struct Setting {
    /// The name.
    pub name: &'static str,
    /// The variables that set it; the first one that is set counts.
    pub variables: &'static [&'static str],
    /// The form of its value.
    pub kind: Kind,
    /// What stands for the value in help texts.
    pub value: &'static str,
    /// The value if nothing sets it.
    pub default: DefaultValue,
    /// What it is, in one line.
    pub help: &'static str,
}

/// The form of a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A text.
    Text,
    /// A number, or a text.
    Number,
    /// on or off. A flag without a value is on.
    Switch,
    /// true or false. A flag without a value is true.
    Boolean,
    /// Any number of texts.
    List,
}

/// The value of a setting that nothing sets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DefaultValue {
    /// None.
    None,
    /// This text.
    Text(&'static str),
    /// Several texts.
    List(&'static [&'static str]),
    /// It follows from another setting, in these words.
    Derived(&'static str),
}

const fn setting(
    name: &'static str,
    variables: &'static [&'static str],
    (kind, value): (Kind, &'static str),
    default: DefaultValue,
    help: &'static str,
) -> Setting {
    Setting { name, variables, kind, value, default, help }
}

const DIR: (Kind, &str) = (Kind::Text, "DIR");
const FILE: (Kind, &str) = (Kind::Text, "FILE");
const TAGS: (Kind, &str) = (Kind::List, "TAGS");
const PORT: (Kind, &str) = (Kind::Number, "PORT");
const TIME: (Kind, &str) = (Kind::Text, "TIME");
const SIZE: (Kind, &str) = (Kind::Number, "SIZE");
const SWITCH: (Kind, &str) = (Kind::Switch, "SWITCH");
const BOOLEAN: (Kind, &str) = (Kind::Boolean, "BOOLEAN");
const NAME: (Kind, &str) = (Kind::Text, "NAME");

macro_rules! settings {
    ($($constant:ident: $name:literal, $variables:expr, $form:expr, $default:expr, $help:literal;)*) => {
        $(
            #[doc = $help]
            pub const $constant: Setting = setting($name, &$variables, $form, $default, $help);
        )*
        /// All settings of `serve`, in the order in which they are shown.
        pub const SERVE: &[&Setting] = &[$(&$constant),*];
    };
}

settings! {
    STORE: "store", ["SECURE_COMMS_STORE"], DIR, DefaultValue::Text("/var/lib/secure-comms-adaptor"),
        "Where keys are kept";
    RUN_DIR: "run-dir", ["SECURE_COMMS_RUN_DIR"], DIR, DefaultValue::Text("/run/secure-comms"),
        "Where the sockets of the pods' inbounds are";
    SOCKET: "socket", ["SECURE_COMMS_SOCKET"], (Kind::Text, "PATH"), DefaultValue::Derived("adaptor.sock in --run-dir"),
        "The API's socket";
    ALLOWED_UIDS: "allowed-uids", ["SECURE_COMMS_ALLOWED_UIDS"], (Kind::List, "UID"), DefaultValue::None,
        "Users that may use the API, beyond root and the service's own";
    METRICS_LISTEN: "metrics-listen", ["SECURE_COMMS_METRICS_LISTEN"], (Kind::Text, "IP:PORT"),
        DefaultValue::Text("127.0.0.1:9464"),
        "Where monitoring reads /metrics, /healthz and /readyz; off: nowhere";
    METRICS_PODS: "metrics-pods", ["SECURE_COMMS_METRICS_PODS"], SWITCH, DefaultValue::Text("off"),
        "Metrics of each pod as well, labelled with its id";
    CAA: "caa", ["SECURE_COMMS_CAA"], SWITCH, DefaultValue::Text("on"),
        "Serve the pods of cloud-api-adaptor";
    PODS_DIRECTORY: "pods-directory", ["SECURE_COMMS_PODS_DIRECTORY"], DIR, DefaultValue::Text("/run/peerpod/pods"),
        "Where cloud-api-adaptor writes what it knows of its sandboxes (its -pods-dir)";
    FORWARDER_PORT: "forwarder-port", ["SECURE_COMMS_FORWARDER_PORT", "FORWARDER_PORT"], PORT, DefaultValue::Text("15150"),
        "The port of the VMs that cloud-api-adaptor dials (its -forwarder-port)";
    LISTEN_PORT: "listen-port", ["SECURE_COMMS_LISTEN_PORT"], PORT, DefaultValue::Text("15151"),
        "The service's port, on the loopback addresses, to which those dials are redirected";
    CERTIFICATES: "certificates", ["SECURE_COMMS_CERTIFICATES"], DIR, DefaultValue::None,
        "Strict variant: the directory of `caa-certs`; cloud-api-adaptor trusts nothing else";
    GRACE: "grace", ["SECURE_COMMS_GRACE"], TIME, DefaultValue::Text("60s"),
        "How long a pod stays after the runtime's connection has ended: it may connect again";
    SERVE_DEADLINE: "deadline", ["SECURE_COMMS_DEADLINE"], TIME, DefaultValue::Text("10m"),
        "How long a pod's start may take, as 90s, 5m or 1h30m";
    KBS: "kbs", ["SECURE_COMMS_KBS_ADDR"], (Kind::Text, "HOST:PORT"),
        DefaultValue::Text("kbs-service.trustee-operator-system:8080"),
        "Where the VMs' KBS tunnel leads";
    KBS_URL: "kbs-url", ["SECURE_COMMS_KBS_URL"], (Kind::Text, "URL"), DefaultValue::Derived("http:// and the address of --kbs"),
        "Where we publish keys, http or https";
    KBS_CA: "kbs-ca", ["SECURE_COMMS_KBS_CA"], FILE, DefaultValue::Derived("the system's"),
        "The CA of an https KBS, PEM";
    KBS_ADMIN_KEY: "kbs-admin-key", ["SECURE_COMMS_KBS_ADMIN_KEY"], FILE, DefaultValue::Derived("no admin token is sent"),
        "The KBS admin's Ed25519 key, PKCS#8 PEM, in a private file";
    KBS_ADMIN_ISSUER: "kbs-admin-issuer", ["SECURE_COMMS_KBS_ADMIN_ISSUER"], NAME, DefaultValue::Text("secure-comms-adaptor"),
        "`iss` of the admin token";
    KBS_ADMIN_ROLE: "kbs-admin-role", ["SECURE_COMMS_KBS_ADMIN_ROLE"], NAME, DefaultValue::Text("admin"),
        "`role` of the admin token";
    KBS_FILTER: "kbs-filter", ["SECURE_COMMS_KBS_FILTER"], SWITCH, DefaultValue::Text("on"),
        "Let only an attesting agent's requests pass to the KBS";
    NO_TRUSTEE: "no-trustee", ["SECURE_COMMS_NO_TRUSTEE"], BOOLEAN, DefaultValue::Text("false"),
        "The VMs have their keys from user data, not from a KBS";
    INIT_DATA: "init-data", ["SECURE_COMMS_INIT_DATA"], FILE, DefaultValue::None,
        "The init-data that all VMs are started with: TOML, or base64 of its gzip";
    INIT_DATA_DIGEST: "init-data-digest", ["SECURE_COMMS_INIT_DATA_DIGEST"], (Kind::Text, "HEX"), DefaultValue::None,
        "Its digest instead, SHA-256, SHA-384 or SHA-512 in hex";
    INIT_DATA_RULES: "init-data-rules", ["SECURE_COMMS_INIT_DATA_RULES"], FILE, DefaultValue::None,
        "Which init-data which pod has instead, TOML; read again for each pod";
    WORKER_NODE_KEYS: "worker-node-keys", ["SECURE_COMMS_WORKER_NODE_KEYS"], FILE, DefaultValue::None,
        "Public keys of further worker nodes that may log in, as authorized_keys";
    ALLOW_OLD_AGENTS: "allow-old-agents", ["SECURE_COMMS_ALLOW_OLD_AGENTS"], BOOLEAN, DefaultValue::Text("false"),
        "Serve agents before version 0.2, less safely";
    REQUIRE_PQ: "require-pq", ["SECURE_COMMS_REQUIRE_PQ"], BOOLEAN, DefaultValue::Text("false"),
        "Only post-quantum key exchange (mlkem768x25519-sha256), in both phases";
    INBOUNDS: "inbounds", ["SECURE_COMMS_INBOUNDS"], TAGS, DefaultValue::None,
        "Further inbounds of each pod: unix sockets with {pod} in the path, or port 0";
    OUTBOUNDS: "outbounds", ["SECURE_COMMS_OUTBOUNDS"], TAGS, DefaultValue::None,
        "Further outbounds of each pod";
    PP_INBOUNDS: "pp-inbounds", ["SECURE_COMMS_PP_INBOUNDS"], TAGS, DefaultValue::None,
        "Inbounds that the VMs' agents may have, beyond KBS";
    PP_OUTBOUNDS: "pp-outbounds", ["SECURE_COMMS_PP_OUTBOUNDS"], TAGS, DefaultValue::None,
        "Outbounds that the VMs' agents may have, beyond KATAAGENT";
    KATA_AGENT_SOCKET: "kata-agent-socket", ["SECURE_COMMS_KATA_AGENT_SOCKET"], (Kind::List, "PATH"),
        DefaultValue::List(&["/run/kata-agent/agent.sock", "/run/kata-containers/agent.sock"]),
        "Where the agents may have the kata agent's socket";
    REKEY_BYTES: "rekey-bytes", ["SECURE_COMMS_REKEY_BYTES"], SIZE, DefaultValue::Text("32GiB"),
        "Data in a direction after which new session keys are made, as 64MiB or 1GiB; at least 1MiB";
    MEMORY: "memory", ["SECURE_COMMS_MEMORY"], SIZE, DefaultValue::Text("128MiB"),
        "Memory for what slow readers of all pods' streams have not taken yet, as 64MiB or 1GiB; at least 4MiB";
    LOG: "log", ["SECURE_COMMS_LOG"], (Kind::Text, "LEVEL"), DefaultValue::Text("info"),
        "error, warn, info, debug or trace";
    LOG_FORMAT: "log-format", ["SECURE_COMMS_LOG_FORMAT"], (Kind::Text, "FORMAT"), DefaultValue::Text("text"),
        "The log's lines on standard error: text or json";
}

/// The deadline of `connect`.
pub const CONNECT_DEADLINE: Setting = Setting { default: DefaultValue::Text("5m"), ..SERVE_DEADLINE };

/// These are flags of every command.
const GLOBAL: [&str; 2] = [LOG.name, LOG_FORMAT.name];

impl Setting {
    /// The flag.
    pub fn flag(&self) -> String {
        format!("--{}", self.name)
    }

    /// The default in words; `None`: there is none.
    pub fn default_text(&self) -> Option<String> {
        match self.default {
            DefaultValue::None => None,
            DefaultValue::Text(text) | DefaultValue::Derived(text) => Some(text.to_owned()),
            DefaultValue::List(texts) => Some(texts.join(" and ")),
        }
    }

    fn arg(&self) -> Arg {
        let repeated = if self.kind == Kind::List { "; may be repeated" } else { "" };
        let variables: String = self.variables.iter().map(|variable| format!(" [env: {variable}]")).collect();
        let default = self.default_text().map(|text| format!(" [default: {text}]")).unwrap_or_default();
        let arg = Arg::new(self.name)
            .long(self.name)
            .value_name(self.value)
            .value_parser(OsStringValueParser::new())
            .help(format!("{}{repeated}{variables}{default}", self.help));
        match self.kind {
            Kind::Text | Kind::Number => arg,
            Kind::List => arg.action(ArgAction::Append),
            Kind::Switch => arg.num_args(0..=1).default_missing_value("on"),
            Kind::Boolean => arg.num_args(0..=1).default_missing_value("true"),
        }
    }
}

/// The settings that flags give, by their names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Flags(BTreeMap<&'static str, Vec<OsString>>);

impl Flags {
    /// Adds a flag with its values.
    pub fn insert(&mut self, setting: &Setting, values: Vec<OsString>) {
        self.0.insert(setting.name, values);
    }

    /// Adds a flag, if it has a value.
    pub fn insert_value(&mut self, setting: &Setting, value: Option<impl Into<OsString>>) {
        if let Some(value) = value {
            self.insert(setting, vec![value.into()]);
        }
    }

    /// Adds other flags.
    pub fn extend(&mut self, others: Self) {
        self.0.extend(others.0);
    }

    /// The values of a flag; `None` if it is not given.
    pub fn get(&self, setting: &Setting) -> Option<&[OsString]> {
        self.0.get(setting.name).map(Vec::as_slice)
    }
}

impl Args for Flags {
    fn augment_args(command: Command) -> Command {
        let flags = SERVE.iter().filter(|setting| !GLOBAL.contains(&setting.name));
        command.args(flags.map(|setting| setting.arg()))
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for Flags {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut flags = Self::default();
        flags.update_from_arg_matches(matches)?;
        Ok(flags)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        for setting in SERVE.iter().filter(|setting| !GLOBAL.contains(&setting.name)) {
            if matches.value_source(setting.name) == Some(ValueSource::CommandLine) {
                let values = matches.get_many::<OsString>(setting.name).into_iter().flatten();
                self.insert(setting, values.cloned().collect());
            }
        }
        Ok(())
    }
}
