//! Properties of the parser of any command line.

use agent_protocol_forwarder::config::flags::{self, Exit, MissingNamespace, Options, StatePlace};
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// Arguments are separated by newlines.
pub(crate) fn exercise(data: &[u8]) {
    let args: Vec<&OsStr> = data.split(|byte| *byte == b'\n').map(OsStr::from_bytes).collect();
    let options = match parse(&args) {
        Ok(options) => options,
        Err(Exit { code, text, to_stderr }) => {
            let text = text.strip_suffix('\n').expect("it ends a line");
            assert!(!text.is_empty() && to_stderr == (code == 2) && matches!(code, 0 | 2));
            assert!(code == 0 || !text.chars().any(char::is_control), "it forges a line: {text:?}");
            return;
        }
    };
    assert_eq!(
        parse(&[&args[..], &[OsStr::new("")]].concat()).as_ref(),
        Ok(&options),
        "an empty argument matters"
    );
    let is_whole =
        |arg: &&OsStr| arg.is_empty() || arg.as_bytes().contains(&b'=') && arg.as_bytes().starts_with(b"-");
    if args.iter().all(is_whole) {
        assert_eq!(parse(&[&args[..], &args].concat()).as_ref(), Ok(&options), "the last one of each counts");
        let dashes: Vec<OsString> = args.iter().map(|arg| other_dashes(arg)).collect();
        let dashes: Vec<&OsStr> = dashes.iter().map(OsString::as_os_str).collect();
        assert_eq!(parse(&dashes).as_ref(), Ok(&options), "one dash is as good as two");
    }
    let written = write(&options);
    let written: Vec<&OsStr> = written.iter().map(OsStr::new).collect();
    assert_eq!(parse(&written), Ok(Options { unused: Vec::new(), ..options }));
}

fn parse(args: &[&OsStr]) -> Result<Options, Exit> {
    flags::parse(args.iter().map(OsString::from))
}

fn other_dashes(arg: &OsStr) -> OsString {
    let rest = arg.as_bytes();
    let (dashes, rest) = match rest.strip_prefix(b"--") {
        Some(rest) => ("-", rest),
        None if rest.is_empty() => ("", rest),
        None => ("-", rest),
    };
    [OsStr::new(dashes), OsStr::from_bytes(rest)].into_iter().collect()
}

/// The flags that give these options, whatever their defaults are.
fn write(options: &Options) -> Vec<String> {
    // Each field by its name: a new one does not compile before it is written.
    let Options {
        config,
        kata_agent_socket,
        pod_namespace,
        missing_namespace,
        namespace_address,
        host_interface,
        secure_comms,
        inbounds,
        outbounds,
        user_data,
        user_data_hosts,
        init_data,
        init_data_digest,
        pod_id,
        separate_resources,
        listen,
        guest_api,
        state_dir,
        state_place,
        require_pq,
        mount_prefixes,
        volumes_socket,
        rekey_bytes,
        unused: _,
    } = options;
    let path = |path: &Path| path.to_str().expect("flags are UTF-8").to_owned();
    let path_or_none = |name: Option<&Path>| name.map(path).unwrap_or_default();
    let (made, only) = match missing_namespace {
        MissingNamespace::Awaited => (false, false),
        MissingNamespace::Made => (true, false),
        MissingNamespace::MadeOnly => (false, true),
    };
    let hosts: Vec<String> = user_data_hosts.iter().map(ToString::to_string).collect();
    let mut written = vec![
        format!("-config={}", path_or_none(config.as_deref())),
        format!("-kata-agent-socket={}", path(kata_agent_socket)),
        format!("--pod-namespace={}", pod_namespace.as_deref().unwrap_or_default()),
        format!("-create-pod-namespace={made}"),
        format!("-create-pod-namespace-only={only}"),
        format!("-host-interface={}", host_interface.as_deref().unwrap_or_default()),
        format!("--secure-comms={secure_comms}"),
        "-secure-comms-inbounds".into(),
        inbounds.clone(),
        "--secure-comms-outbounds".into(),
        outbounds.clone(),
        format!("-secure-comms-user-data={user_data}"),
        format!("-secure-comms-user-data-hosts={}", hosts.join(",")),
        format!("-secure-comms-init-data={}", path_or_none(init_data.as_deref())),
        format!("-secure-comms-init-data-digest={}", path_or_none(init_data_digest.as_deref())),
        format!("-secure-comms-separate-resources={separate_resources}"),
        format!("-secure-comms-listen={listen}"),
        format!("-secure-comms-guest-api={guest_api}"),
        format!("-secure-comms-state-dir={}", path(state_dir)),
        format!("-secure-comms-state-dir-on-disk={}", *state_place == StatePlace::AnyDisk),
        format!("-secure-comms-require-pq={require_pq}"),
        format!("-secure-comms-mount-prefixes={mount_prefixes}"),
        format!("-secure-comms-volumes-socket={}", path(volumes_socket)),
        format!("-secure-comms-rekey-bytes={rekey_bytes}"),
    ];
    written.extend(namespace_address.map(|address| format!("-pod-namespace-address={address}")));
    written.extend(pod_id.as_ref().map(|pod| format!("-secure-comms-pod-id={pod}")));
    written
}
