//! The control channel: every message of the protocol, read and written, whole and in pieces.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "clippy.toml lets tests fail loudly; clippy does not take the helpers of an integration test for tests"
)]

use proptest::prelude::*;
use secure_comms_protocol::control::{
    Bye, ControlError, Empty, KnownStreams, Lines, LogLine, SessionReply, StreamPosition, WantedLane,
};
use secure_comms_protocol::limits::CONTROL_LINE_MAX;
use secure_comms_protocol::{AgentConfig, Control, Credit, Hello, KeyProgress, PhaseName};

fn parse(line: &str) -> Control {
    Control::parse(line.as_bytes()).unwrap().expect("a message we know")
}

fn shown(message: &Control) -> String {
    let mut line = Vec::new();
    message.write_line(&mut line);
    String::from_utf8(line).unwrap()
}

fn feed(lines: &mut Lines, data: &[u8]) -> Result<Vec<Control>, ControlError> {
    let mut messages = Vec::new();
    lines.feed(data, |message| messages.push(message))?;
    Ok(messages)
}

#[test]
fn each_line_of_the_protocol_survives_a_round_trip() {
    let adaptor_hello = Hello {
        version: 1,
        credit: Some(524_288),
        pod_id: Some("p1".into()),
        inbounds: vec!["KATAAGENT".into()],
        outbounds: vec!["KBS".into()],
        ..Hello::default()
    };
    let agent_hello = Hello {
        version: 1,
        credit: Some(524_288),
        phase: Some(PhaseName::Attestation),
        instance: Some("0a1b".into()),
        inbounds: vec!["KBS".into()],
        outbounds: vec!["KATAAGENT".into()],
        ..Hello::default()
    };
    let kubernetes_hello = Hello {
        version: 1,
        phase: Some(PhaseName::Kubernetes),
        init_data: Some("ab".repeat(32)),
        config: Some(AgentConfig {
            pod_id: Some("p1".into()),
            worker_nodes: vec!["SHA256:x".into()],
            inbounds: vec!["BOTH_PHASES:KBS:8080".into()],
            outbounds: vec!["KUBERNETES_PHASE:KATAAGENT:/run/k".into()],
            user_data: "none".into(),
        }),
        ..Hello::default()
    };
    let config = concat!(
        r#"{"pod_id":"p1","worker_nodes":["SHA256:x"],"inbounds":["BOTH_PHASES:KBS:8080"],"#,
        r#""outbounds":["KUBERNETES_PHASE:KATAAGENT:/run/k"],"user_data":"none"}"#
    );
    let kubernetes_line = format!(
        r#"{{"hello":{{"version":1,"phase":"kubernetes","inbounds":[],"outbounds":[],"init_data":"{}","config":{config}}}}}"#,
        "ab".repeat(32)
    );
    let progress =
        |attempt, error: Option<&str>| Control::Keys(KeyProgress { attempt, error: error.map(Into::into) });
    let cases = [
        (
            r#"{"hello":{"version":1,"credit":524288,"pod_id":"p1","inbounds":["KATAAGENT"],"outbounds":["KBS"]}}"#,
            Control::Hello(adaptor_hello),
        ),
        (
            r#"{"hello":{"version":1,"credit":524288,"phase":"attestation","instance":"0a1b","inbounds":["KBS"],"outbounds":["KATAAGENT"]}}"#,
            Control::Hello(agent_hello),
        ),
        (&kubernetes_line, Control::Hello(kubernetes_hello)),
        (
            r#"{"keys":{"attempt":3,"error":"api-server-rest: connection refused"}}"#,
            progress(3, Some("api-server-rest: connection refused")),
        ),
        (r#"{"keys":{"attempt":4,"error":null}}"#, progress(4, None)),
        (r#"{"upgrade":{}}"#, Control::Upgrade(Empty {})),
        (
            r#"{"log":{"seq":7,"age":12,"level":"warning","text":"tunnel X: \"no\" server"}}"#,
            Control::Log(LogLine {
                seq: 7,
                age: 12,
                level: "warning".into(),
                text: "tunnel X: \"no\" server".into(),
            }),
        ),
        (r#"{"credit":{"stream":7,"bytes":131072}}"#, Control::Credit(Credit { stream: 7, bytes: 131_072 })),
        (r#"{"ping":18446744073709551615}"#, Control::Ping(u64::MAX)),
        (r#"{"pong":0}"#, Control::Pong(0)),
        (
            r#"{"bye":{"reason":"a \"newer\" one\n came"}}"#,
            Control::Bye(Bye { reason: "a \"newer\" one\n came".into(), ..Bye::default() }),
        ),
    ];
    for (line, message) in cases {
        assert_eq!(parse(line), message, "{line}");
        assert_eq!(parse(&format!("{line}\n")), message, "{line} with its newline");
        assert_eq!(shown(&message), format!("{line}\n"));
    }
}

#[test]
fn keys_of_a_later_version_are_ignored() {
    assert_eq!(parse(r#"{"ping":1,"colour":{"deep":[1,{"er":null}]}}"#), Control::Ping(1));
    assert_eq!(
        parse(r#"{"credit":{"stream":1,"bytes":2,"colour":3}}"#),
        Control::Credit(Credit { stream: 1, bytes: 2 })
    );
    assert_eq!(parse(r#"{"hello":{"colour":"red"}}"#), Control::Hello(Hello::default()));
    assert_eq!(parse(r#"{"log":{"colour":"red"}}"#), Control::Log(LogLine::default()));
    assert_eq!(parse(r#"{"upgrade":{"colour":"red"}}"#), Control::Upgrade(Empty {}));
    for later in [r#"{"colour":"red"}"#, "{}", r#"{"ping":null}"#] {
        assert_eq!(Control::parse(later.as_bytes()), Ok(None), "{later}");
    }
}

#[test]
fn a_malformed_line_is_an_error_that_says_so() {
    for line in [
        "hello",
        "{",
        "[]",
        "[null,null,null,null,null,null,null]",
        "null",
        "1",
        "\"ping\"",
        r#"{"ping":-1}"#,
        r#"{"ping":"1"}"#,
        r#"{"ping":1}{"ping":2}"#,
        r#"{"ping":1,"ping":2}"#,
        r#"{"credit":{"stream":1}}"#,
        r#"{"credit":{"stream":4294967296,"bytes":1}}"#,
        r#"{"hello":{"phase":"root"}}"#,
        r#"{"keys":{}}"#,
        r#"{"log":{"seq":-1}}"#,
        r#"{"log":{"text":7}}"#,
        "\u{feff}{}",
    ] {
        let error = Control::parse(line.as_bytes()).expect_err(line).to_string();
        assert!(error.starts_with("control line: not a control message: "), "{line}: {error}");
    }
    assert!(matches!(Control::parse(b"{\"bye\":{\"reason\":\"\xff\"}}"), Err(ControlError::Malformed(_))));
}

#[test]
fn a_deeply_nested_line_does_not_overflow_the_stack() {
    let deep = |key: &str| format!("{{\"{key}\":{}{}}}", "[".repeat(30_000), "]".repeat(30_000));
    assert_eq!(Control::parse(deep("colour").as_bytes()), Ok(None));
    assert!(matches!(Control::parse(deep("hello").as_bytes()), Err(ControlError::Malformed(_))));
}

#[test]
fn a_line_may_have_at_most_64_kib() {
    let line = |len: usize| format!("{{\"ping\":1{}}}", " ".repeat(len - 10));
    let (longest, too_long) = (line(CONTROL_LINE_MAX), line(CONTROL_LINE_MAX + 1));
    assert_eq!(parse(&longest), Control::Ping(1));
    assert_eq!(parse(&format!("{longest}\n")), Control::Ping(1));
    assert_eq!(Control::parse(too_long.as_bytes()), Err(ControlError::TooLong));
    assert_eq!(ControlError::TooLong.to_string(), "control line: longer than 65536 bytes");
    assert_eq!(feed(&mut Lines::default(), format!("{longest}\n").as_bytes()), Ok(vec![Control::Ping(1)]));
    assert_eq!(feed(&mut Lines::default(), format!("{too_long}\n").as_bytes()), Err(ControlError::TooLong));
}

#[test]
fn a_line_without_an_end_is_refused_before_it_fills_memory() {
    let mut lines = Lines::default();
    let piece = [b' '; 1000];
    let fed = (1..).find(|_| feed(&mut lines, &piece).is_err());
    assert_eq!(fed, Some(CONTROL_LINE_MAX / 1000 + 1));
}

#[test]
fn blanks_count_towards_the_length_in_any_split() {
    let line = [vec![b' '; CONTROL_LINE_MAX], b"{\"ping\":1}\n".to_vec()].concat();
    assert_eq!(feed(&mut Lines::default(), &line), Err(ControlError::TooLong));
    let mut lines = Lines::default();
    assert_eq!(feed(&mut lines, &line[..9]), Ok(vec![]));
    assert_eq!(feed(&mut lines, &line[9..]), Err(ControlError::TooLong));
}

#[test]
fn empty_lines_and_carriage_returns_are_blanks() {
    let fed = feed(&mut Lines::default(), b"\n\r\n {\"ping\":1}\r\n\n{\"pong\":2}\n{\"pi");
    assert_eq!(fed, Ok(vec![Control::Ping(1), Control::Pong(2)]));
}

fn any_message() -> impl Strategy<Value = Control> {
    let names = || proptest::collection::vec(any::<String>(), 0..3);
    let phase = proptest::option::of(prop_oneof![Just(PhaseName::Attestation), Just(PhaseName::Kubernetes)]);
    let config = (any::<Option<String>>(), names(), names(), names(), any::<String>()).prop_map(
        |(pod_id, worker_nodes, inbounds, outbounds, user_data)| AgentConfig {
            pod_id,
            worker_nodes,
            inbounds,
            outbounds,
            user_data,
        },
    );
    let hello = (
        any::<u32>(),
        any::<Option<u32>>(),
        any::<Option<String>>(),
        phase,
        names(),
        names(),
        proptest::option::of(config),
    )
        .prop_map(|(version, credit, pod_id, phase, inbounds, outbounds, config)| {
            Control::Hello(Hello {
                init_data: pod_id.clone(),
                config,
                version,
                credit,
                instance: pod_id.clone(),
                lane: pod_id.clone(),
                session: pod_id.clone(),
                pod_id,
                phase,
                inbounds,
                outbounds,
            })
        });
    prop_oneof![
        hello,
        (any::<u64>(), any::<Option<String>>())
            .prop_map(|(attempt, error)| Control::Keys(KeyProgress { attempt, error })),
        Just(Control::Upgrade(Empty {})),
        (any::<(u64, u64)>(), any::<(String, String)>())
            .prop_map(|((seq, age), (level, text))| { Control::Log(LogLine { seq, age, level, text }) }),
        (any::<u32>(), any::<u32>()).prop_map(|(stream, bytes)| Control::Credit(Credit { stream, bytes })),
        any::<u64>().prop_map(Control::Ping),
        any::<u64>().prop_map(Control::Pong),
        any::<(String, bool)>().prop_map(|(reason, ends_session)| Control::Bye(Bye { reason, ends_session })),
        any::<(u32, u64, u64)>().prop_map(|(stream, received, granted)| {
            Control::Position(StreamPosition { stream, received, granted })
        }),
        any::<(String, bool)>().prop_map(|(id, resumed)| Control::Session(SessionReply { id, resumed })),
        any::<Vec<u32>>().prop_map(|known| Control::Streams(KnownStreams { known })),
        any::<String>().prop_map(|name| Control::Lane(WantedLane { name })),
    ]
}

proptest! {
    #[test]
    fn every_message_is_one_line_that_parses_back(message in any_message()) {
        let line = shown(&message);
        prop_assert_eq!(line.matches('\n').count(), 1);
        prop_assert_eq!(parse(&line), message);
    }

    #[test]
    fn any_split_of_the_bytes_gives_the_same_messages(
        messages in proptest::collection::vec(any_message(), 0..6),
        cuts in proptest::collection::vec(any::<prop::sample::Index>(), 0..8),
    ) {
        let data: Vec<u8> = messages.iter().map(shown).collect::<String>().into_bytes();
        let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(data.len() + 1)).collect();
        cuts.extend([0, data.len()]);
        cuts.sort_unstable();
        let mut lines = Lines::default();
        let mut seen = Vec::new();
        for ends in cuts.windows(2) {
            seen.extend(feed(&mut lines, &data[ends[0]..ends[1]]).unwrap());
        }
        prop_assert_eq!(seen, messages);
    }

    #[test]
    fn no_bytes_make_the_parser_panic(data in any::<Vec<u8>>()) {
        let _ = Control::parse(&data);
        let _ = feed(&mut Lines::default(), &data);
    }
}
