//! Properties of the parser of any command line.

use agent_protocol_forwarder::config::flags::{self, Exit, MissingNamespace, Options, StatePlace};
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;

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

/// Flags that must appear in the options.
fn write(options: &Options) -> Vec<String> {
    let path = |path: &std::path::Path| path.to_str().expect("flags are UTF-8").to_owned();
    let (made, only) = match options.missing_namespace {
        MissingNamespace::Awaited => (false, false),
        MissingNamespace::Made => (true, false),
        MissingNamespace::MadeOnly => (false, true),
    };
    let mut written = vec![
        format!("-config={}", options.config.as_deref().map(path).unwrap_or_default()),
        format!("-kata-agent-socket={}", path(&options.kata_agent_socket)),
        format!("--pod-namespace={}", options.pod_namespace.as_deref().unwrap_or_default()),
        format!("-create-pod-namespace={made}"),
        format!("-create-pod-namespace-only={only}"),
        format!("-host-interface={}", options.host_interface.as_deref().unwrap_or_default()),
        format!("--secure-comms={}", options.secure_comms),
        "-secure-comms-inbounds".into(),
        options.inbounds.clone(),
        "--secure-comms-outbounds".into(),
        options.outbounds.clone(),
        format!("-secure-comms-listen={}", options.listen),
        format!("-secure-comms-guest-api={}", options.guest_api),
        format!("-secure-comms-state-dir={}", path(&options.state_dir)),
        format!("-secure-comms-state-dir-on-disk={}", options.state_place == StatePlace::AnyDisk),
        format!("-secure-comms-require-pq={}", options.require_pq),
        format!("-secure-comms-mount-prefixes={}", options.mount_prefixes),
        format!("-secure-comms-volumes-socket={}", path(&options.volumes_socket)),
        format!("-secure-comms-rekey-bytes={}", options.rekey_bytes),
    ];
    written.extend(options.namespace_address.map(|address| format!("-pod-namespace-address={address}")));
    written
}
