//! Table 5, each row with its verdict: tests/data/README.md says what a verdict means.

use std::collections::BTreeMap;
use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use metadata::{Script, Server as Simulator, Step, answer};
use nix::sys::socket::{Backlog, listen};

use super::*;

const TABLE: &str = include_str!("../../tests/data/azure-ready.jsonl");
const VERDICTS: &str = include_str!("../../tests/data/azure-ready.verdicts");

const VERSIONS: &str = "<?xml version=\"1.0\" encoding=\"utf-8\"?>\n<Versions>\n  <Preferred>\n    <Version>2015-04-05</Version>\n  \
    </Preferred>\n  <Supported>\n    <Version>2015-04-05</Version>\n    <Version>2012-11-30</Version>\n  </Supported>\n</Versions>";
const GOAL_STATE: &str = "<?xml version=\"1.0\" encoding=\"utf-8\"?>\n<GoalState>\n  <Version>2015-04-05</Version>\n  \
    <Incarnation>1</Incarnation>\n  <Machine>\n    <ExpectedState>Started</ExpectedState>\n  </Machine>\n  <Container>\n    \
    <ContainerId>c-1111</ContainerId>\n    <RoleInstanceList>\n      <RoleInstance>\n        <InstanceId>i-2222</InstanceId>\n        \
    <State>Started</State>\n      </RoleInstance>\n    </RoleInstanceList>\n  </Container>\n</GoalState>";

/// Time passes only while the program waits.
struct Simulated(Duration);

impl Clock for Simulated {
    fn now(&self) -> Duration {
        self.0
    }

    fn pause(&mut self, time: Duration) {
        self.0 += time;
    }
}

/// What a server can depend on: a request without what names the client.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Seen {
    method: String,
    path: String,
    headers: BTreeMap<String, String>,
    body: Vec<u8>,
}

impl Seen {
    fn new(method: &str, path: &str, headers: impl Iterator<Item = (String, String)>, body: Vec<u8>) -> Self {
        let known =
            ["host", "connection", "content-length", "content-type", "x-ms-agent-name", "x-ms-version"];
        let headers = headers.filter(|(name, _)| known.contains(&name.as_str())).collect();
        Self { method: method.to_owned(), path: path.to_owned(), headers, body }
    }

    /// From a row; `host` stands for the address that was used there.
    fn of_row(request: &serde_json::Value, host: &str) -> Self {
        let raw = request["raw"].as_str().unwrap().trim_end();
        let mut lines = raw.split("\r\n");
        let mut first = lines.next().unwrap().split(' ');
        let headers = lines.map(|line| {
            let (name, value) = line.split_once(": ").unwrap();
            let value = if name == "Host" { host } else { value };
            (name.to_ascii_lowercase(), value.to_owned())
        });
        // The table has one character for each byte.
        let body =
            request["body"].as_str().unwrap().chars().map(|byte| u8::try_from(u32::from(byte)).unwrap());
        Self::new(first.next().unwrap(), first.next().unwrap(), headers, body.collect())
    }
}

struct Run {
    result: Result<(), ReadyError>,
    requests: Vec<Seen>,
    log: String,
    host: String,
}

#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn report_to(endpoint: Endpoint, timeout: Duration, tries: u64) -> (Result<(), ReadyError>, String) {
    let settings =
        Settings { endpoint, timeout, total: Duration::from_secs(5 * tries), ..Settings::default() };
    let log = Log::default();
    let mut console = Console::new("azure-ready", Box::new(log.clone()), None);
    let result = report(&settings, &mut Simulated(Duration::ZERO), &mut console);
    let text = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
    (result, text)
}

fn run_for(script: Script, timeout: Duration, tries: u64) -> Run {
    let server = Simulator::start(TcpListener::bind("127.0.0.1:0").unwrap(), script).unwrap();
    let host = server.address().to_string();
    let endpoint = format!("http://{host}").parse().unwrap();
    let (result, log) = report_to(endpoint, timeout, tries);
    let requests = server.requests().into_iter();
    let requests = requests
        .map(|request| Seen::new(&request.method, &request.path, request.headers.into_iter(), request.body));
    Run { result, requests: requests.collect(), log, host }
}

fn run(script: Script) -> Run {
    run_for(script, Duration::from_secs(60), 2)
}

fn send(status: u16, headers: &[(&str, &str)], body: &str) -> Vec<Step> {
    vec![Step::Send(answer(status, headers, body.as_bytes()))]
}

/// The same steps whenever the path has this text, else what is right.
fn only(part: &'static str, steps: Vec<Step>) -> Script {
    Arc::new(move |request, _| if request.path.contains(part) { steps.clone() } else { right(&request.path) })
}

fn right(path: &str) -> Vec<Step> {
    match path {
        "/?comp=versions" => send(200, &[], VERSIONS),
        "/machine/?comp=goalstate" => send(200, &[], GOAL_STATE),
        "/machine?comp=health" => send(200, &[], ""),
        "/moved" => send(200, &[], VERSIONS),
        _ => send(404, &[], ""),
    }
}

/// What the server of a row does to one of the three requests.
fn steps(name: &str, document: &str) -> Vec<Step> {
    let text = |from: &str, to: &str| {
        assert!(document.contains(from));
        send(200, &[], &document.replace(from, to))
    };
    match name {
        "200" | "201" | "202" | "204" | "400" | "403" | "404" | "410" | "429" | "500" | "503" => {
            send(name.parse().unwrap(), &[], "")
        }
        "302" => send(302, &[("Location", "/moved")], ""),
        "close" => vec![],
        "empty" => send(200, &[], ""),
        "notxml" => send(200, &[], "hello"),
        "stall" | "stall-headers" => vec![Step::Stall],
        "stall-body" => vec![
            Step::Send(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n<Versions>".to_vec()),
            Step::Stall,
        ],
        "slow20" => send(200, &[], "#cloud-config\n"),
        "gzip-cl" => send(200, &[("Content-Encoding", "gzip")], document),
        "only-old" => text("<Version>2015-04-05</Version>\n    <Version>2012", "<Version>2012"),
        "none" => text("<Version>2015-04-05</Version>\n    <Version>2012-11-30</Version>", ""),
        "wrongroot" => send(200, &[], &document.replace("Versions>", "Others>")),
        "namespace" => text("<Versions>", "<Versions xmlns=\"http://example.com\">"),
        "bom" => send(200, &[], &format!("\u{feff}{document}")),
        "utf16decl" => text("utf-8", "utf-16"),
        "trailing-trash" => send(200, &[], &format!("{document}trash &<")),
        "spaces" if document == VERSIONS => text(
            "<Version>2015-04-05</Version>\n    <Version>2012-11-30</Version>",
            "<Version>\n 2012-11-30\n</Version>",
        ),
        "inject" => text(
            "<Version>2015-04-05</Version>\n    <Version>2012-11-30</Version>",
            "<Version>2012\r\nX-Evil: 1</Version>",
        ),
        "no-inc" => text("<Incarnation>1</Incarnation>", ""),
        "no-container" => text("<ContainerId>c-1111</ContainerId>", ""),
        "no-instance" => text("<InstanceId>i-2222</InstanceId>", ""),
        "two-instances" => text(
            "</RoleInstanceList>",
            "<RoleInstance><InstanceId>i-3333</InstanceId></RoleInstance></RoleInstanceList>",
        ),
        "escape" => {
            send(200, &[], &document.replace("c-1111", "c&amp;&lt;\"'x\ny").replace("i-2222", "_i-2\u{e9}"))
        }
        "spaces" => text("c-1111", "\n  c-1111\n "),
        "stopped" => text("<ExpectedState>Started", "<ExpectedState>Stopped"),
        "big" => text("<Version>", &format!("<!--{}--><Version>", "x".repeat(2 << 20))),
        _ => panic!("{name}: no such server"),
    }
}

fn script(case: &str) -> Script {
    let (part, name, document) = match case.split_once('-') {
        Some(("ver", name)) => ("versions", name, VERSIONS),
        Some(("gs", name)) => ("goalstate", name, GOAL_STATE),
        Some(("health", name)) => ("health", name, ""),
        _ if case == "timeout3-stall" => ("versions", "stall", VERSIONS),
        _ => return Arc::new(|request, _| right(&request.path)),
    };
    if name == "500-then-ok" {
        let failed = Mutex::new(false);
        return Arc::new(move |request, _| {
            let mut failed = failed.lock().unwrap();
            if request.path.contains(part) && !std::mem::replace(&mut *failed, true) {
                return send(500, &[], "");
            }
            drop(failed);
            right(&request.path)
        });
    }
    only(part, steps(name, document))
}

/// The verdict that a row earns.
fn verdict(row: &serde_json::Value) -> String {
    let case = row["case"].as_str().unwrap();
    let original_succeeds = row["exit"] == "0";
    let run = match case {
        "badflag" | "help" | "extra-arg" => return "elsewhere -> cli".to_owned(),
        "refused" | "noroute" => return "elsewhere -> a_server_that_is_not_there_is_asked_again".to_owned(),
        "blackhole" => return "elsewhere -> a_server_that_drops_connections_is_asked_again".to_owned(),
        // One try: each waits for the timeout, which also bounds the requests before.
        case if case.contains("stall") => run_for(script(case), Duration::from_secs(6), 1),
        case => run(script(case)),
    };
    let tries = if case.contains("stall") { 1 } else { 2 };
    let original: Vec<_> =
        row["requests"].as_array().unwrap().iter().map(|request| Seen::of_row(request, &run.host)).collect();
    let class = |error: &ReadyError| {
        let text = with_causes(error);
        text.split_once(": ").map_or(text.clone(), |(_, class)| class.to_owned())
    };
    match run.result {
        Ok(()) if run.requests == original => {
            assert!(original_succeeds, "{case}");
            "equal".to_owned()
        }
        Ok(()) => {
            assert!(!original_succeeds && run.requests.starts_with(&original), "{case}: {:?}", run.requests);
            "better: succeeds with a later try".to_owned()
        }
        Err(error) if error.is_permanent() => {
            assert!(original.starts_with(&run.requests), "{case}: {:?}", run.requests);
            let who = if original_succeeds { "refused" } else { "both refuse" };
            format!("{who}: {}", class(&error))
        }
        Err(error) => {
            assert!(!original_succeeds, "{case}");
            assert_eq!(run.requests, vec![original; tries].concat(), "{case}");
            assert_eq!(run.log.matches("trying again").count(), tries - 1, "{case}: {}", run.log);
            format!("better, tries again: {}", class(&error))
        }
    }
}

#[test]
fn each_row_of_the_table_has_its_verdict() {
    let rows: Vec<serde_json::Value> =
        TABLE.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    // Those that wait do it at once.
    let verdicts: String = std::thread::scope(|scope| {
        let waits = |row: &serde_json::Value| row["case"].as_str().unwrap().contains("stall");
        let threads: Vec<_> =
            rows.iter().map(|row| waits(row).then(|| scope.spawn(|| verdict(row)))).collect();
        let each = rows.iter().zip(threads).map(|(row, thread)| {
            let verdict = thread.map_or_else(|| verdict(row), |thread| thread.join().unwrap());
            format!("{}: {verdict}\n", row["case"].as_str().unwrap())
        });
        each.collect()
    });
    assert_eq!(verdicts.lines().count(), 65);
    for (found, expected) in verdicts.lines().zip(VERDICTS.lines()) {
        assert_eq!(found, expected);
    }
    assert_eq!(verdicts, VERDICTS);
}

#[test]
fn a_server_that_is_not_there_is_asked_again() {
    let timeout = Duration::from_secs(60);
    // Refused: the kernel hands out no port as low as this. No route: nobody answers to a broadcast by TCP.
    for host in ["127.0.0.1:1", "255.255.255.255"] {
        let (result, log) = report_to(format!("http://{host}").parse().unwrap(), timeout, 2);
        let error = result.unwrap_err();
        assert!(!error.is_permanent());
        assert!(matches!(error, ReadyError::Http { cause: HttpError::Connect(_), .. }), "{host}: {error:?}");
        assert_eq!(log.matches("trying again").count(), 1, "{log}");
        assert!(
            log.starts_with(&format!(
                "azure-ready: Azure: GET http://{host}/?comp=versions: no connection: "
            )),
            "{log}"
        );
    }
}

#[test]
fn a_server_that_drops_connections_is_asked_again() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listen(&listener, Backlog::new(0).unwrap()).unwrap();
    let address = listener.local_addr().unwrap();
    // Fills the queue; from now on the kernel answers to nobody.
    let _waiting = TcpStream::connect(address).unwrap();
    let (result, _) = report_to(format!("http://{address}").parse().unwrap(), Duration::from_millis(200), 1);
    let error = result.unwrap_err();
    assert!(!error.is_permanent());
    assert!(matches!(error, ReadyError::Http { cause: HttpError::ConnectTimeout(_), .. }), "{error:?}");
}

#[test]
fn no_text_of_the_server_is_in_the_log() {
    for case in ["ver-inject", "ver-notxml", "ver-slow20", "gs-no-instance", "health-500", "gs-two-instances"]
    {
        let run = run(script(case));
        // The digits of its port could be those of a secret.
        let text = format!("{}{}", run.log, with_causes(&run.result.unwrap_err())).replace(&run.host, "host");
        for secret in ["Evil", "hello", "cloud-config", "1111", "2222", "3333"] {
            assert!(!text.contains(secret), "{case}: {text}");
        }
    }
}

#[test]
fn names_are_bounded() {
    for (length, passes) in [(256, true), (257, false)] {
        let state = GOAL_STATE.replace("c-1111", &"c".repeat(length));
        let run = run(only("goalstate", send(200, &[], &state)));
        assert_eq!(run.result.is_ok(), passes);
    }
}

#[test]
fn an_endpoint_is_an_address() {
    let host =
        |url: &str| url.parse::<Endpoint>().map(|endpoint| (endpoint.host, endpoint.address.to_string()));
    let found = |host: &str, address: &str| Ok((host.to_owned(), address.to_owned()));
    assert_eq!(host("http://168.63.129.16"), found("168.63.129.16", "168.63.129.16:80"));
    assert_eq!(host("http://168.63.129.16").unwrap(), {
        let Endpoint { host, address } = Endpoint::default();
        (host, address.to_string())
    });
    assert_eq!(host("http://127.0.0.1:8080/"), found("127.0.0.1:8080", "127.0.0.1:8080"));
    assert_eq!(host("http://[::1]"), found("[::1]", "[::1]:80"));
    for url in [
        "",
        "http://",
        "127.0.0.1",
        "https://127.0.0.1",
        "http://name",
        "http://127.0.0.1/path",
        "http://1.2.3.4:x",
    ] {
        assert_eq!(host(url), Err(EndpointError), "{url}");
    }
}
