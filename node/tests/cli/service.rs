//! A service that answers from a table, on a unix socket.
#![allow(dead_code, reason = "each of the tests that share this file uses some of it")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::extract::Request;
use axum::http::{Response, StatusCode};
use secure_comms_node::api::types::Time;
use serde_json::{Value, json};
use tempfile::TempDir;

/// An answer: its status and its body.
type Answer = (u16, String);
type Answers = Arc<Mutex<BTreeMap<String, Answer>>>;

/// A fake service, and where commands find it.
pub(crate) struct Service {
    dir: TempDir,
    answers: Answers,
    requests: Arc<Mutex<Vec<String>>>,
    runtime: tokio::runtime::Runtime,
}

/// A time so long ago that a test does not outlive its day.
pub(crate) fn days_ago(days: u64) -> String {
    Time::from(SystemTime::now() - Duration::from_secs(days * 86_400)).to_string()
}

/// A pod of the API.
pub(crate) fn pod(id: &str, namespace: &str, name: &str, phase: &str) -> Value {
    json!({
        "id": id, "namespace": namespace, "name": name, "phase": phase, "launcher": "caa",
        "since": days_ago(3), "created": days_ago(10), "addresses": ["10.0.0.7:2222"],
        "endpoints": [{"tunnel": "KATAAGENT", "local": "/run/secure-comms/pods/x/agent.ttrpc"}],
        "session": {"lanes": ["main", "data"], "resumed": 2},
        "runtime": {"state": "Connected", "since": days_ago(3)},
    })
}

impl Service {
    /// A service with these pods.
    pub(crate) fn with_pods(pods: &[Value]) -> Self {
        let service = Self::start();
        service.answer("GET /v1/pods", 200, &json!({ "items": pods }));
        service
    }

    pub(crate) fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (answers, requests) = (Answers::default(), Arc::<Mutex<Vec<String>>>::default());
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let (table, log) = (Arc::clone(&answers), Arc::clone(&requests));
        let app = Router::new().fallback(move |request: Request| {
            let (table, log) = (Arc::clone(&table), Arc::clone(&log));
            async move { respond(&table, &log, request).await }
        });
        let _entered = runtime.enter();
        let listener = tokio::net::UnixListener::bind(dir.path().join("s")).unwrap();
        runtime.spawn(async move { axum::serve(listener, app).await.unwrap() });
        Self { dir, answers, requests, runtime }
    }

    /// Answers a request, as `GET /v1/pods`, with JSON.
    pub(crate) fn answer(&self, request: &str, status: u16, body: &Value) {
        self.answer_text(request, status, &body.to_string());
    }

    /// Answers a request with a text. The stream of events stays open after it, unless it ends with `END`.
    pub(crate) fn answer_text(&self, request: &str, status: u16, body: &str) {
        self.answers.lock().unwrap().insert(request.to_owned(), (status, body.to_owned()));
    }

    /// The requests so far, with their bodies.
    pub(crate) fn requests(&self) -> Vec<String> {
        self.requests.lock().unwrap().clone()
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.path().join("s")
    }

    /// A command that asks the service.
    pub(crate) fn command(&self, args: &[&str]) -> Command {
        command(&self.socket(), args)
    }

    pub(crate) fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    /// What a command prints; it must succeed, in silence.
    #[track_caller]
    pub(crate) fn stdout(&self, args: &[&str]) -> String {
        let output = self.run(args);
        assert_eq!((output.status.code(), &*String::from_utf8_lossy(&output.stderr)), (Some(0), ""));
        String::from_utf8(output.stdout).unwrap()
    }

    /// Ends, with its connections.
    pub(crate) fn end(self) {
        self.runtime.shutdown_background();
    }
}

pub(crate) fn command(socket: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_secure-comms-adaptor"));
    command.args(args).env_clear().env("SECURE_COMMS_SOCKET", socket);
    command
}

async fn respond(answers: &Answers, log: &Mutex<Vec<String>>, request: Request) -> Response<Body> {
    let (parts, body) = request.into_parts();
    let path = parts.uri.path_and_query().unwrap().to_string();
    let body = String::from_utf8(to_bytes(body, 1 << 20).await.unwrap().to_vec()).unwrap();
    let name = format!("{} {path}", parts.method);
    log.lock().unwrap().push(format!("{name} {body}").trim_end().to_owned());
    let (status, text) = answers.lock().unwrap().get(&name).cloned().unwrap_or_else(|| {
        let problem = json!({
            "type": "https://example.org#not-found", "title": "Not found", "status": 404, "detail": format!("no {name}"),
        });
        (404, problem.to_string())
    });
    let answer = Response::builder().status(StatusCode::from_u16(status).unwrap());
    if !path.starts_with("/v1/events") {
        return answer.body(Body::from(text)).unwrap();
    }
    let (events, ends) =
        text.strip_suffix("END").map_or((text.clone(), false), |events| (events.to_owned(), true));
    let first = futures_util::stream::iter([Ok::<_, std::io::Error>(events)]);
    let body = if ends {
        Body::from_stream(first)
    } else {
        use futures_util::StreamExt as _;
        Body::from_stream(first.chain(futures_util::stream::pending()))
    };
    answer.header("content-type", "text/event-stream").body(body).unwrap()
}
