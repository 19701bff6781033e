//! The conformance table of fetching: what the original `process-user-data` did on 182 machines and metadata services, and what ours
//! does.
//!
//! tests/data/README.md says where it comes from and what a verdict means. Needs root. Time is simulated: pauses take none, the limits of a
//! row with a slow service are scaled down, and that service goes on when the client has given up.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "clippy.toml lets tests fail loudly; clippy does not take the helpers of an integration test for tests"
)]

use std::cell::RefCell;
use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use base64ct::{Base64, Encoding};
use metadata::{Request, Script, Server, Step, answer};
use nix::sched::{CloneFlags, unshare};
use serde_json::Value;
use user_data::cloud::{self, Cloud, Places};
use user_data::cloud_config;
use user_data::console::Console;
use user_data::fetch::{Clock, Endpoints, Fault, Fetch, Pace, Rejection, fetch};
use user_data::files::{FileName, UserData};
use user_data::http::{HttpError, Limits};

/// The user data of the table.
const GOOD: &str = "#cloud-config\n\nwrite_files:\n  - path: /run/peerpod/cdh.toml\n    content: |\n      v = \"net>>>???\"\n  \
                    - path: /run/peerpod/auth.json\n    content: |\n      {}\n";
const TOKEN: &str = "TOK-abc==";
/// For all tries of a row.
const TOTAL: Duration = Duration::from_secs(30);
/// The scaled limit of an answer, for services that are slower than any limit.
const SHORT: Duration = Duration::from_millis(40);

/// Time passes by itself and by pauses, which take none; the network may appear in one.
struct Simulated<'a> {
    start: Instant,
    paused: Duration,
    pauses: usize,
    at_pause: Box<dyn FnMut(usize) + 'a>,
}

impl Clock for Simulated<'_> {
    fn now(&self) -> Duration {
        self.start.elapsed() + self.paused
    }

    fn pause(&mut self, time: Duration) {
        self.paused += time;
        self.pauses += 1;
        (self.at_pause)(self.pauses);
    }
}

/// What is at the address of the metadata service.
enum Network {
    Service(Script),
    /// From the third pause on.
    LateService(Script),
    /// No listener.
    Refused,
    /// Connections are not answered.
    Silent,
    NoRoute,
}

/// How a row is set up.
struct Setup {
    facts: Vec<(&'static str, &'static str)>,
    file: Option<&'static str>,
    network: Network,
    limits: Limits,
}

fn facts(cloud: &str) -> Vec<(&'static str, &'static str)> {
    match cloud {
        "aws" => vec![("sys_vendor", "Amazon EC2")],
        "azure" => vec![
            ("sys_vendor", "Microsoft Corporation"),
            ("chassis_asset_tag", "7783-7084-3265-9085-8269-3286-77"),
        ],
        "gcp" => vec![("sys_vendor", "Google"), ("product_name", "Google Compute Engine")],
        "alibaba" => vec![("sys_vendor", "Alibaba Cloud")],
        _ => panic!("{cloud}"),
    }
}

/// The machine and the network of a row, by its name.
fn setup(cloud: &str, what: &str) -> Setup {
    let mut facts = facts(cloud);
    match what {
        "man-space" => facts = vec![("sys_vendor", "Amazon EC2 ")],
        "man-lower" => facts = vec![("sys_vendor", "amazon ec2")],
        "man-xen" => facts = vec![("sys_vendor", "Xen")],
        "man-empty" => facts = vec![("sys_vendor", "")],
        // The kernel shows nothing of tables whose checksum is wrong.
        "smbios-badsum" | "file-none-nodns" | "ipv6-only-none" => facts = vec![],
        _ => {}
    }
    let slow = what.contains("slow-") || what.contains("stall") || what == "blackhole";
    let limits =
        if slow { Limits { connect: SHORT, answer: SHORT, total: 2 * SHORT } } else { Limits::default() };
    let network = match what {
        "noroute" => Network::NoRoute,
        "refused" => Network::Refused,
        "blackhole" => Network::Silent,
        "x-latenet" => Network::LateService(service(cloud, "ok")),
        _ => Network::Service(service(cloud, what)),
    };
    let file = (what == "file-first").then_some(GOOD);
    Setup { facts, file, network, limits }
}

/// What the service of a row answers. Requests of the token and of user data are answered apart; of user data by their number.
fn service(cloud: &str, what: &str) -> Script {
    let encoded = matches!(cloud, "azure" | "gcp");
    let what = what.to_owned();
    let tries = AtomicUsize::new(0);
    Arc::new(move |request: &Request, _| {
        if request.path == "/latest/api/token" {
            return token(&what);
        }
        let number = tries.fetch_add(1, Ordering::Relaxed);
        user_data(&what, encoded, number, request)
    })
}

fn send(bytes: impl Into<Vec<u8>>) -> Vec<Step> {
    vec![Step::Send(bytes.into())]
}

fn token(what: &str) -> Vec<Step> {
    match what {
        "token-401" => send(answer(401, &[], b"")),
        "token-403" | "token-403-then-ok" => send(answer(403, &[], b"")),
        "token-404" => send(answer(404, &[], b"")),
        "token-500" => send(answer(500, &[], b"")),
        "token-close" => vec![],
        "token-redirect" => send(answer(302, &[("Location", "/tok2")], b"")),
        "token-slow4" => send(answer(200, &[], b"TOK\nabc\n")),
        "token-stall-ud-404" => vec![Step::Stall],
        _ => send(answer(200, &[], TOKEN.as_bytes())),
    }
}

fn user_data(what: &str, encoded: bool, number: usize, request: &Request) -> Vec<Step> {
    let base64 = Base64::encode_string(GOOD.as_bytes());
    let body = if encoded { base64.clone() } else { GOOD.to_owned() };
    let ok = answer(200, &[], body.as_bytes());
    let framed = |headers: &str| send(format!("HTTP/1.1 200 OK\r\n{headers}\r\n{body}"));
    if let Some(status) =
        what.strip_prefix("http").and_then(|status| status.parse().ok()).filter(|status| *status >= 100)
    {
        return send(answer(status, &[], if status == 204 { b"" } else { body.as_bytes() }));
    }
    match what {
        "404x3-then-ok" if number < 3 => send(answer(404, &[], b"")),
        "close" => vec![],
        "rst" => vec![Step::Reset],
        "slow-headers-20s" => vec![Step::Stall, Step::Send(ok)],
        "slow-body-15s" => {
            let (first, rest) = ok.split_at(ok.len() / 2);
            vec![Step::Send(first.into()), Step::Stall, Step::Send(rest.into())]
        }
        "stall-headers" => vec![Step::Stall],
        "stall-body" => vec![Step::Send(ok[..ok.len() / 2].into()), Step::Stall],
        "redirect-same" | "redirect-other-host" => match request.path.as_str() {
            "/other" => send(ok),
            _ => send(answer(302, &[("Location", "/other")], b"")),
        },
        "redirect-loop" => send(answer(302, &[("Location", &request.path)], b"")),
        "cl-too-long" => framed(&format!("Content-Length: {}\r\n", body.len() + 10)),
        "cl-too-short" => framed(&format!("Content-Length: {}\r\n", body.len() - 10)),
        "no-cl" => framed(""),
        "x-no-cl-cut" => send(format!("HTTP/1.1 200 OK\r\n\r\n{}", &body[..body.len() - 10])),
        "http10" => send(format!("HTTP/1.0 200 OK\r\n\r\n{body}")),
        "garbage" => send("garbage\r\n\r\n"),
        "chunked" | "chunked-cut" => {
            let end = if what == "chunked" { "0\r\n\r\n" } else { "" };
            let size = body.len();
            send(format!("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n{size:x}\r\n{body}\r\n{end}"))
        }
        "content-encoding-gzip" | "x-ce-bomb" => {
            framed(&format!("Content-Encoding: gzip\r\nContent-Length: {}\r\n", body.len()))
        }
        "100-then-ok" => send([b"HTTP/1.1 100 Continue\r\n\r\n", ok.as_slice()].concat()),
        "empty" => send(answer(200, &[], b"")),
        "empty-then-ok" if number == 0 => send(answer(200, &[], b"")),
        "html" => send(answer(200, &[], b"<html><body>login</body></html>")),
        "gzipped" => {
            let gzip = b"\x1f\x8b\x08\0\0\0\0\0\0\xff\x03\0\0\0\0\0\0\0\0\0";
            let text = if encoded { Base64::encode_string(gzip).into_bytes() } else { gzip.to_vec() };
            send(answer(200, &[], &text))
        }
        "b64" => send(answer(200, &[], base64.as_bytes())),
        "b64twice" => send(answer(200, &[], Base64::encode_string(base64.as_bytes()).as_bytes())),
        "b64crlf" => send(answer(200, &[], wrapped(&base64, "\r\n").as_bytes())),
        "b64nl" => send(answer(200, &[], format!("{base64}\n").as_bytes())),
        "b64space" => send(answer(200, &[], wrapped(&base64, " ").as_bytes())),
        "b64url" => send(answer(200, &[], base64.replace('+', "-").replace('/', "_").as_bytes())),
        "b64nopad" => send(answer(
            200,
            &[],
            Base64::encode_string(format!("{GOOD}#").as_bytes()).trim_end_matches('=').as_bytes(),
        )),
        "b64bad" => send(answer(200, &[], b"!!!!")),
        "plain" => send(answer(200, &[], GOOD.as_bytes())),
        "big-header" => framed(&format!("X: {}\r\n", "x".repeat(2 << 20))),
        "x-huge" => framed("Content-Length: 67108864\r\n"),
        "token-stall-ud-404" => send(answer(404, &[], b"")),
        _ => send(ok),
    }
}

fn wrapped(text: &str, with: &str) -> String {
    text.as_bytes().chunks(76).map(|line| std::str::from_utf8(line).unwrap()).collect::<Vec<_>>().join(with)
}

/// What ours did.
enum Ours {
    NoCloud,
    UserData(UserData),
    Failed(String),
}

/// Gives the thread, and those that it starts, a network of its own with nothing but the loopback interface. Needs root.
fn isolate() {
    unshare(CloneFlags::CLONE_NEWNET).expect("this test needs root");
    let status = Command::new("ip").args(["link", "set", "lo", "up"]).status().unwrap();
    assert!(status.success());
}

/// The facts of the machine below `root`.
fn machine(root: &Path, setup: &Setup) -> Places {
    let places = Places { no_cloud: root.join("user-data"), dmi: root.join("dmi") };
    if !setup.facts.is_empty() {
        fs::create_dir(&places.dmi).unwrap();
    }
    for (name, fact) in &setup.facts {
        fs::write(places.dmi.join(name), format!("{fact}\n")).unwrap();
    }
    if let Some(text) = setup.file {
        fs::write(&places.no_cloud, text).unwrap();
    }
    places
}

/// A listener that takes no more connections: what is sent to it is dropped.
fn clogged(address: SocketAddr) -> (TcpListener, TcpStream) {
    let listener = TcpListener::bind(address).unwrap();
    nix::sys::socket::listen(&listener, nix::sys::socket::Backlog::new(0).unwrap()).unwrap();
    let first = TcpStream::connect(address).unwrap();
    (listener, first)
}

fn run(setup: &Setup, number: u8) -> (Ours, Vec<Request>) {
    let root = tempfile::tempdir().unwrap();
    let places = machine(root.path(), setup);
    let Some(cloud) = cloud::detect(&places).unwrap() else { return (Ours::NoCloud, vec![]) };
    // An address for each row: nothing of an earlier one listens there.
    let own = SocketAddr::from((Ipv4Addr::new(127, 182, number, 1), 8182));
    let listen = |script: &Script| Server::start(TcpListener::bind(own).unwrap(), script.clone()).unwrap();
    let server = RefCell::new(match &setup.network {
        Network::Service(script) => Some(listen(script)),
        _ => None,
    });
    let _clogged = matches!(setup.network, Network::Silent).then(|| clogged(own));
    let no_route = SocketAddr::from((Ipv4Addr::BROADCAST, 80));
    let address = if matches!(setup.network, Network::NoRoute) { no_route } else { own };
    let at_pause = |pauses| match &setup.network {
        Network::LateService(script) if pauses == 3 => *server.borrow_mut() = Some(listen(script)),
        _ => {}
    };
    let ours = fetched(cloud, &places, address, setup.limits, Box::new(at_pause));
    let requests = server.borrow().as_ref().map(Server::requests).unwrap_or_default();
    (ours, requests)
}

fn fetched(
    cloud: Cloud,
    places: &Places,
    address: SocketAddr,
    limits: Limits,
    at_pause: Box<dyn FnMut(usize) + '_>,
) -> Ours {
    let endpoints = Endpoints { no_cloud: places.no_cloud.clone(), link_local: address, alibaba: address };
    let mut clock = Simulated { start: Instant::now(), paused: Duration::ZERO, pauses: 0, at_pause };
    let mut console = Console::new("test", Box::new(std::io::sink()), None);
    let pace = Pace { limits, ..Pace::within(TOTAL) };
    let with = Fetch { cloud, endpoints: &endpoints, pace, clock: &mut clock, console: &mut console };
    let judged = fetch(with, |body| {
        cloud_config::read(body)
            .map_err(|error| Rejection { is_permanent: error.is_permanent(), cause: Box::new(error) })
    });
    match judged {
        Ok(user_data) => Ours::UserData(user_data),
        Err(error) => {
            let until =
                if error.tries() == pace.permanent_faults { "3 tries" } else { "until the time is over" };
            Ours::Failed(format!("{} ({until})", class(error.fault())))
        }
    }
}

fn class(fault: &Fault) -> String {
    match fault {
        Fault::Status { status, .. } => format!("status {status}"),
        Fault::Token { .. } => "token".into(),
        Fault::Base64 { .. } => "base64".into(),
        Fault::Base64Cut { .. } => "base64 cut".into(),
        Fault::File { cause, .. } => format!("file: {cause}"),
        Fault::Rejected { cause, .. } => cause.to_string(),
        Fault::Http { cause, .. } => match cause {
            HttpError::Connect(_) => "no connection".into(),
            HttpError::ConnectTimeout(_) | HttpError::AnswerTimeout => "timeout".into(),
            HttpError::Broken(_) => "reset".into(),
            HttpError::Cut(_) => "cut".into(),
            HttpError::Redirect(_) => "redirect".into(),
            HttpError::Malformed(_) | HttpError::Refused(_) => "no HTTP".into(),
            HttpError::TooLong { what, .. } => format!("{what} too long"),
            HttpError::ContentEncoding => "content encoding".into(),
        },
    }
}

/// What the original did, by its row.
#[derive(PartialEq, Eq)]
enum Original {
    /// The files of the user data.
    UserData,
    /// Exit code 0 with fewer files or none: it found no cloud, took an empty answer for the user data, or one that was cut.
    Nothing,
    Failed,
}

fn original(row: &Value) -> Original {
    let files = row["files"].as_object().unwrap();
    match row["exit"].as_str().unwrap() {
        "0" if files.get("/run/peerpod/auth.json").is_some_and(|file| file[0] == 3) => Original::UserData,
        "0" => Original::Nothing,
        _ => Original::Failed,
    }
}

/// How ours relates to the original.
fn verdict(row: &Value, ours: &Ours) -> String {
    match (original(row), ours) {
        // The original asked Azure's service, by the CPU's word against the firmware's.
        (Original::UserData, Ours::UserData(_)) if row["case"] == "aws-cpuid-msvm" => {
            "equal, from AWS".into()
        }
        (Original::UserData, Ours::UserData(_)) => "equal".into(),
        (Original::Nothing, Ours::NoCloud) => "equal, no cloud".into(),
        (Original::Failed, Ours::Failed(class)) => format!("both fail: {class}"),
        (Original::UserData, Ours::Failed(class)) => format!("refused: {class}"),
        (Original::Nothing, Ours::Failed(class)) => format!("fails instead of going on without: {class}"),
        (Original::Nothing | Original::Failed, Ours::UserData(_)) => "better: has the user data".into(),
        (Original::UserData | Original::Failed, Ours::NoCloud) => "worse: no cloud".into(),
    }
}

/// Whatever came as user data must be the files of the table.
fn check_files(case: &str, user_data: &UserData) {
    let text =
        |name| user_data.files.iter().find(|(file, _)| *file == name).map(|(_, content)| content.as_slice());
    assert_eq!(text(FileName::ConfidentialDataHub), Some(&b"v = \"net>>>???\"\n"[..]), "{case}");
    assert_eq!(text(FileName::Auth), Some(&b"{}\n"[..]), "{case}");
}

/// A request as the table has it: what a metadata service looks at.
fn essence(request: &Request) -> Vec<String> {
    let ours = ["host", "user-agent", "content-length", "connection"];
    let headers = request.headers.iter().filter(|(name, _)| !ours.contains(&name.as_str()));
    let first = format!("{} {} HTTP/1.1", request.method, request.path);
    std::iter::once(first)
        .chain(headers.map(|(name, value)| format!("{name}: {value}").to_ascii_lowercase()))
        .collect()
}

/// Where the table kept the requests in full, ours are the same, but for the probe of GCP.
fn check_requests(row: &Value, ours: &[Request]) {
    let Some(requests) = row["requests"].as_array() else { return };
    let lower = |(index, line): (usize, &Value)| {
        let line = line.as_str().unwrap();
        if index == 0 { line.to_owned() } else { line.to_ascii_lowercase() }
    };
    let of = |request: &Value| request.as_array().unwrap().iter().enumerate().map(lower).collect::<Vec<_>>();
    let expected: Vec<_> = requests
        .iter()
        .map(of)
        .filter(|lines| lines[0] != "GET /computeMetadata/v1/instance HTTP/1.1")
        .collect();
    assert_eq!(ours.iter().map(essence).collect::<Vec<_>>(), expected, "{}", row["case"]);
    if row["case"].as_str().unwrap().starts_with("gcp") {
        assert!(ours.iter().all(|request| request.header("host") == Some("metadata.google.internal")));
    }
}

/// The verdict on a row.
fn judged(number: usize, line: &str) -> String {
    let row: Value = serde_json::from_str(line).unwrap();
    let case = row["case"].as_str().unwrap();
    let (cloud, what) = case.split_once('-').unwrap();
    let (ours, requests) = run(&setup(cloud, what), u8::try_from(number).unwrap());
    if let Ours::UserData(user_data) = &ours {
        check_files(case, user_data);
        if original(&row) == Original::UserData {
            check_requests(&row, &requests);
        }
    }
    format!("{case}: {}", verdict(&row, &ours))
}

#[test]
fn each_row_has_its_verdict() {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data");
    let table = fs::read_to_string(data.join("fetch.jsonl")).unwrap();
    let rows: Vec<_> = table.lines().enumerate().collect();
    assert_eq!(rows.len(), 182);
    // Most rows wait for a limit.
    let verdicts: Vec<String> = std::thread::scope(|scope| {
        let part = |rows: &[(usize, &str)]| {
            isolate();
            rows.iter().map(|(number, line)| judged(*number, line)).collect::<Vec<_>>()
        };
        let parts: Vec<_> = rows.chunks(12).map(|rows| scope.spawn(move || part(rows))).collect();
        parts.into_iter().flat_map(|part| part.join().unwrap()).collect()
    });
    let expected = fs::read_to_string(data.join("fetch.verdicts")).unwrap();
    let expected: Vec<_> = expected.lines().collect();
    let differing: Vec<_> =
        verdicts.iter().zip(&expected).filter(|(ours, expected)| ours != *expected).collect();
    assert!(differing.is_empty() && expected.len() == rows.len(), "{differing:#?}");
}

#[test]
fn a_stalled_answer_is_asked_for_again() {
    isolate();
    let tries = AtomicUsize::new(0);
    let script: Script = Arc::new(move |_, _| match tries.fetch_add(1, Ordering::Relaxed) {
        0 => vec![Step::Stall],
        _ => send(answer(200, &[], GOOD.as_bytes())),
    });
    // A busy machine may need longer for an answer; that is one more try.
    let limits = Limits { answer: Duration::from_secs(1), ..Limits::default() };
    let setup = Setup { facts: facts("alibaba"), file: None, network: Network::Service(script), limits };
    let (ours, requests) = run(&setup, 255);
    assert!(matches!(ours, Ours::UserData(_)) && requests.len() >= 2);
}
