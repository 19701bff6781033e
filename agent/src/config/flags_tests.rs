use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

fn run(args: &[&str]) -> Result<Options, Exit> {
    parse(args.iter().map(OsString::from))
}

fn fault(args: &[&str]) -> String {
    let exit = run(args).unwrap_err();
    assert_eq!((exit.code, exit.to_stderr), (2, true), "{exit:?}");
    assert_eq!(exit.text.matches('\n').count(), 1, "one line: {:?}", exit.text);
    exit.text
}

#[test]
fn without_flags_the_defaults_are_those_of_the_manual() {
    let options = run(&[]).unwrap();
    assert_eq!(options.config.unwrap().to_str(), Some("/run/peerpod/apf.json"));
    assert_eq!(options.kata_agent_socket.to_str(), Some("/run/kata-containers/agent.sock"));
    assert_eq!(options.pod_namespace.as_deref(), Some("/run/netns/podns"));
    assert_eq!(options.listen.to_string(), "[::]:2222");
    assert_eq!(options.guest_api.to_string(), "127.0.0.1:8006");
    assert_eq!(options.state_dir.to_str(), Some("/run/secure-comms"));
    assert_eq!(options.rekey_bytes, limits::REKEY_BYTES);
    assert_eq!(options.missing_namespace, MissingNamespace::Awaited);
    assert!(!options.secure_comms && options.unused.is_empty());
}

#[test]
fn the_command_line_of_existing_unit_files_works_word_for_word() {
    let options = run(&[
        "-kata-agent-namespace",
        "/run/netns/podns",
        "-secure-comms",
        "-kata-agent-socket",
        "/run/kata-containers/agent.sock",
        "-disable-tls",
        "-cert-file=/c",
        "-listen",
        "0.0.0.0:15150",
        "",
    ])
    .unwrap();
    assert!(options.secure_comms);
    assert_eq!(options.unused, ["listen", "cert-file", "disable-tls"]);
}

#[test]
fn every_go_spelling_of_a_flag_is_understood() {
    for args in [["-config", "/x"], ["--config", "/x"]] {
        assert_eq!(run(&args).unwrap().config.unwrap().to_str(), Some("/x"));
    }
    assert_eq!(run(&["-config=/x"]).unwrap().config.unwrap().to_str(), Some("/x"));
    assert_eq!(run(&["-config="]).unwrap().config, None);
    assert_eq!(run(&["--config=/x=y"]).unwrap().config.unwrap().to_str(), Some("/x=y"));
    for (arg, on) in [("-secure-comms=t", true), ("--secure-comms=TRUE", true), ("-secure-comms=0", false)] {
        assert_eq!(run(&["-secure-comms", arg]).unwrap().secure_comms, on, "{arg}");
    }
    assert_eq!(run(&["-secure-comms-inbounds", "-x", "--"]).unwrap().inbounds, "-x");
    assert_eq!(run(&["-secure-comms-inbounds", "--help"]).unwrap().inbounds, "--help");
}

#[test]
fn an_empty_namespace_is_our_own_and_two_are_refused() {
    assert_eq!(run(&["-pod-namespace", ""]).unwrap().pod_namespace, None);
    assert_eq!(run(&["-kata-agent-namespace="]).unwrap().pod_namespace, None);
    let same = run(&["-pod-namespace", "a", "-kata-agent-namespace", "a"]).unwrap();
    assert_eq!(same.pod_namespace.as_deref(), Some("a"));
    let text = fault(&["-pod-namespace", "a", "-kata-agent-namespace", "b"]);
    assert!(
        text.contains("-pod-namespace 'a' and -kata-agent-namespace 'b'") && text.contains("keep"),
        "{text}"
    );
}

#[test]
fn a_missing_namespace_is_made_only_if_named() {
    let missing = |args: &[&str]| run(args).unwrap().missing_namespace;
    assert_eq!(missing(&["-create-pod-namespace"]), MissingNamespace::Made);
    assert_eq!(missing(&["-create-pod-namespace=false"]), MissingNamespace::Awaited);
    assert_eq!(missing(&["--create-pod-namespace-only"]), MissingNamespace::MadeOnly);
    assert_eq!(missing(&["-create-pod-namespace", "-create-pod-namespace-only"]), MissingNamespace::MadeOnly);
    for flag in ["-create-pod-namespace", "-create-pod-namespace-only"] {
        let text = fault(&[flag, "-pod-namespace", ""]);
        assert!(text.contains("-pod-namespace is empty; name the one to make"), "{text}");
    }
}

#[test]
fn an_address_is_only_for_a_namespace_that_is_made() {
    let flag = ["-pod-namespace-address", "169.254.169.254/32"];
    let address = |made: &str| run(&[made, flag[0], flag[1]]).unwrap().namespace_address.unwrap();
    assert_eq!(address("-create-pod-namespace-only").to_string(), flag[1]);
    assert_eq!(address("-create-pod-namespace").to_string(), flag[1]);
    let text = fault(&flag);
    assert!(text.contains("add -create-pod-namespace"), "{text}");
    for wrong in ["", "169.254.169.254", "169.254.169.254/33", "metadata/32"] {
        let text = fault(&["-create-pod-namespace-only", "-pod-namespace-address", wrong]);
        assert!(text.contains("such as 10.244.1.7/24"), "{text}");
    }
}

#[test]
fn help_and_version_go_to_stdout_and_succeed() {
    for args in [&["-h"][..], &["--help"], &["-help"], &["help"], &["-secure-comms", "help"]] {
        let exit = run(args).unwrap_err();
        assert_eq!((exit.code, exit.to_stderr), (0, false));
        for flag in FLAGS {
            let listed = |line: &str| line.split(' ').nth(2) == Some(&format!("-{}", flag.name));
            assert!(exit.text.lines().any(listed), "{}: {}", flag.name, exit.text);
        }
        assert!(exit.text.lines().all(|line| line.len() <= 80 && !line.contains("--")), "{}", exit.text);
        assert!(exit.text.lines().any(|line| line.starts_with("  -help ")), "{}", exit.text);
    }
    for args in [["-version"], ["--version"], ["-V"], ["--V"], ["version"]] {
        let exit = run(&args).unwrap_err();
        assert_eq!(exit.text, format!("agent-protocol-forwarder {}\n", env!("CARGO_PKG_VERSION")));
        assert_eq!((exit.code, exit.to_stderr), (0, false));
    }
    assert!(run(&["-version=false"]).is_ok());
}

#[test]
fn an_address_without_a_host_is_read_as_go_reads_it() {
    assert_eq!(run(&["-secure-comms-listen", ":2222"]).unwrap().listen.to_string(), "[::]:2222");
    assert_eq!(run(&["-secure-comms-listen=:0"]).unwrap().listen.to_string(), "[::]:0");
    assert_eq!(run(&["-secure-comms-guest-api=:8006"]).unwrap().guest_api.to_string(), "127.0.0.1:8006");
    for text in [":", "::", ":x", ":65536", ":-1", "", "2222", "localhost:2222"] {
        let text = fault(&["-secure-comms-listen", text]);
        assert!(text.contains("flag '-secure-comms-listen': value '"), "{text}");
        assert!(text.contains("such as [::]:2222"), "{text}");
    }
    fault(&["-secure-comms-guest-api=:0"]);
}

#[test]
fn a_size_takes_units() {
    let rekey = |text: &str| run(&["-secure-comms-rekey-bytes", text]).map(|options| options.rekey_bytes);
    for (text, bytes) in [
        ("1048576", 1 << 20),
        ("1M", 1 << 20),
        ("1mib", 1 << 20),
        ("2MB", 2_000_000),
        ("64m", 64 << 20),
        ("1G", 1 << 30),
        ("32GiB", 32 << 30),
        ("1T", 1 << 40),
        ("2000000b", 2_000_000),
        ("1024K", 1 << 20),
    ] {
        assert_eq!(rekey(text).unwrap(), bytes, "{text}");
    }
    for text in ["", "G", "1.5G", "-1", "+1", "1 G", "1GiBs", "1x", "1Gi", "1\u{fc}", "99999999999T", "1023K"]
    {
        assert!(rekey(text).is_err(), "{text}");
    }
}

#[test]
fn a_typo_of_a_flag_gets_a_suggestion() {
    for (typo, flag) in [
        ("-secure-coms", "secure-comms"),
        ("-secure-comms-inbound", "secure-comms-inbounds"),
        ("--conifg=/x", "config"),
        ("-pod_namespace", "pod-namespace"),
        ("-Config", "config"),
        ("-secure-comms-statedir", "secure-comms-state-dir"),
        ("config=/x", "config=/x"),
        ("secure-comms", "secure-comms"),
    ] {
        let text = fault(&[typo]);
        assert!(text.contains(&format!("did you mean -{flag}?")), "{text}");
    }
    assert!(fault(&["-nonsense"]).contains("correct or remove it"));
}

#[test]
fn every_fault_names_the_flag_and_the_fix() {
    for (args, parts) in [
        (&["-nonsense"][..], &["flag '-nonsense'", "no such flag"][..]),
        (&["-config"], &["flag -config", "needs a value"]),
        (&["-config", "x"], &["'-config'", "'x'", "expected an absolute path"]),
        (&["-secure-comms", "true"], &["argument 'true'", "not a flag", "-flag=true"]),
        (&["-secure-comms=yes"], &["'-secure-comms=yes'", "expected true or false"]),
        (&["stray"], &["argument 'stray'", "not a flag"]),
        (&["--", "stray"], &["argument 'stray'", "not a flag"]),
        (&["-"], &["argument '-'", "not a flag"]),
        (&["---config=/x"], &["'---config=/x'", "bad flag syntax"]),
        (&["-=x"], &["'-=x'", "bad flag syntax"]),
        (&["-secure-comms-listen", "2222"], &["'-secure-comms-listen'", "'2222'", "such as [::]:2222"]),
        (&["-secure-comms-guest-api=127.0.0.1:0"], &["'-secure-comms-guest-api'", "from 1 to 65535"]),
        (&["-secure-comms-rekey-bytes=1024"], &["'-secure-comms-rekey-bytes'", "at least 1048576"]),
        (&["-secure-comms-rekey-bytes=-1"], &["'-secure-comms-rekey-bytes'", "a number of bytes"]),
        (&["-secure-comms-state-dir="], &["'-secure-comms-state-dir'", "absolute path"]),
        (&["-con\nfig"], &["'-con\\nfig'", "no such flag"]),
    ] {
        let text = fault(args);
        for part in parts {
            assert!(text.contains(part), "{args:?}: {part:?} is not in {text:?}");
        }
    }
}

#[test]
fn an_argument_that_is_not_utf_8_is_refused() {
    use std::os::unix::ffi::OsStringExt;
    let exit = parse([OsString::from_vec(vec![b'-', 0xff])].into_iter()).unwrap_err();
    assert!(exit.text.contains("not UTF-8"), "{}", exit.text);
}

/// Go's `FlagSet.parseOne`, transliterated, with our two changes: empty arguments are skipped, and an argument that
/// would end the flags is a fault, unless only empty arguments follow.
fn model(mut args: &[String]) -> Option<BTreeMap<&'static str, String>> {
    let mut given = BTreeMap::new();
    while let [first, rest @ ..] = args {
        args = rest;
        let bytes = first.as_bytes();
        if bytes.is_empty() {
            continue;
        }
        if bytes.len() < 2 || bytes[0] != b'-' {
            return None;
        }
        let mut minuses = 1;
        if bytes[1] == b'-' {
            minuses = 2;
            if bytes.len() == 2 {
                return args.iter().all(String::is_empty).then_some(given);
            }
        }
        let mut name = &first[minuses..];
        if name.is_empty() || name.starts_with('-') || name.starts_with('=') {
            return None;
        }
        let mut value = None;
        if let Some(at) = (1..name.len()).find(|&i| name.as_bytes()[i] == b'=') {
            value = Some(name[at + 1..].to_owned());
            name = &name[..at];
        }
        let flag = FLAGS.iter().find(|flag| flag.name == name)?;
        let value = if flag.boolean {
            match value.as_deref().unwrap_or("true") {
                "1" | "t" | "T" | "true" | "TRUE" | "True" => "true".to_owned(),
                "0" | "f" | "F" | "false" | "FALSE" | "False" => "false".to_owned(),
                _ => return None,
            }
        } else if let Some(value) = value {
            value
        } else {
            let [next, rest @ ..] = args else { return None };
            args = rest;
            next.clone()
        };
        given.insert(flag.name, value);
    }
    Some(given)
}

fn argument() -> impl Strategy<Value = String> {
    let flag = (0..FLAGS.len()).prop_map(|i| FLAGS[i].name);
    let dashes = prop::sample::select(vec!["-", "--", "-", "--", "---", ""]);
    let tail = prop::sample::select(vec!["", "", "", "=", "=true", "=F", "=x", "=a=b"]);
    prop_oneof![
        6 => (dashes, flag, tail).prop_map(|(dashes, flag, tail)| format!("{dashes}{flag}{tail}")),
        1 => prop::sample::select(vec!["", "-", "--", "true", "/x", "-=", "--=x", "-q"]).prop_map(String::from),
        1 => "[-=a-z\\PC]{0,6}",
    ]
}

proptest! {
    #[test]
    fn normalising_agrees_with_go(args in prop::collection::vec(argument(), 0..6)) {
        // Help is an exit of its own, not a fault and not a flag.
        prop_assume!(!args.iter().any(|arg| matches!(arg.trim_start_matches('-').split('=').next(), Some("h" | "help"))));
        let ours = normalise(args.iter().map(OsString::from));
        prop_assert_eq!(ours.ok().map(|given| given.0), model(&args));
    }

    #[test]
    fn what_argh_gets_is_what_was_given(
        texts in prop::collection::vec("\\PC{0,12}", 2..3), on in any::<bool>(), equals in any::<bool>()
    ) {
        let mut args = vec![format!("-secure-comms={on}")];
        for (flag, text) in ["-secure-comms-inbounds", "--secure-comms-outbounds"].iter().zip(&texts) {
            if equals {
                args.push(format!("{flag}={text}"));
            } else {
                args.extend([(*flag).to_owned(), text.clone()]);
            }
        }
        let options = parse(args.iter().map(OsString::from)).unwrap();
        prop_assert_eq!([&options.inbounds, &options.outbounds], [&texts[0], &texts[1]]);
        prop_assert_eq!(options.secure_comms, on);
    }

    #[test]
    fn no_arguments_make_it_panic(args in prop::collection::vec("\\PC{0,8}", 0..5)) {
        let _ = run(&args.iter().map(String::as_str).collect::<Vec<_>>());
    }
}
