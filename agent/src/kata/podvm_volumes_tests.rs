use std::future::Future;

use tempfile::TempDir;
use tokio::net::UnixListener;

use super::*;

/// A `podvm-volumes` that waits for one request.
struct Stand {
    directory: TempDir,
    listener: UnixListener,
}

impl Stand {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(directory.path().join("socket")).unwrap();
        Self { directory, listener }
    }

    fn asks(&self) -> PodvmVolumes {
        PodvmVolumes::at(&self.directory.path().join("socket"))
    }

    /// Reads a request, and sends these bytes.
    async fn answers(&self, bytes: &[u8]) -> Request {
        let mut stream = BufReader::new(self.listener.accept().await.unwrap().0);
        let mut line = String::new();
        stream.read_line(&mut line).await.unwrap();
        // A client that has read enough closes before all is sent.
        drop(stream.write_all(bytes).await);
        serde_json::from_str(&line).unwrap()
    }
}

fn volumes() -> Vec<Volume> {
    ["vol-0", "vol-1"].map(|name| Volume { name: name.into(), ..Volume::default() }).into()
}

fn line(answer: &Answer) -> Vec<u8> {
    [serde_json::to_vec(answer).unwrap(), b"\n".into()].concat()
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

async fn both<T>(asking: impl Future<Output = T>, stand: impl Future<Output = Request>) -> (T, Request) {
    tokio::join!(asking, stand)
}

/// The fault that this answer is, with the code of its status.
async fn fault(answer: &[u8]) -> (String, u64) {
    let stand = Stand::new();
    let (result, _) = both(stand.asks().mount(volumes(), soon()), stand.answers(answer)).await;
    let fault = result.unwrap_err();
    (fault.to_string(), fault.code())
}

#[tokio::test]
async fn volumes_are_mounted_as_they_were_asked_for() {
    let stand = Stand::new();
    let asks = stand.asks();
    assert!(!asks.is_in_use());
    let mounted =
        line(&Answer::Mounted(vec!["/run/cloud-volumes/vol-0".into(), "/run/cloud-volumes/vol-1".into()]));
    let (result, request) = both(asks.mount(volumes(), soon()), stand.answers(&mounted)).await;
    result.unwrap();
    assert_eq!(request, Request::Mount(volumes()));
    assert!(asks.clone().is_in_use());
    let (_, request) = both(asks.unmount(soon()), stand.answers(&line(&Answer::Unmounted))).await;
    assert_eq!(request, Request::UnmountAll);
    assert!(!asks.is_in_use());
}

#[tokio::test]
async fn each_kind_of_failure_has_its_code() {
    for (kind, code) in [
        (FailureKind::Invalid, 3),
        (FailureKind::NoDisk, 5),
        (FailureKind::Refused, 9),
        (FailureKind::Internal, 13),
    ] {
        let message = format!("vol-0: no\n{}", "x".repeat(2000));
        let (text, found) = fault(&line(&Answer::Failed(Failure { kind, message }))).await;
        assert_eq!(found, code, "{kind:?}");
        assert!(text.starts_with("vol-0: no xxx") && text.len() == TEXT_MAX, "{text}");
    }
}

#[tokio::test]
async fn an_answer_that_is_none_is_a_fault() {
    let path = |name: &str| format!("/run/cloud-volumes/{name}");
    let mounted = |paths: &[String]| line(&Answer::Mounted(paths.into()));
    let whole = mounted(&[path("vol-0"), path("vol-1")]);
    for (answer, expected) in [
        (b"".to_vec(), "gave no answer"),
        (whole[..whole.len() - 1].to_vec(), "gave no answer"),
        (b"\n".to_vec(), "an answer that is not in its protocol"),
        (b"{\"mounted\":7}\n".to_vec(), "an answer that is not in its protocol"),
        (
            "[".repeat(60_000).into_bytes().into_iter().chain(*b"\n").collect(),
            "an answer that is not in its protocol",
        ),
        (vec![b' '; LINE_MAX], "too long an answer"),
        (vec![b' '; 4 * LINE_MAX], "too long an answer"),
        (mounted(&[]), "somewhere else"),
        (mounted(&[path("vol-0")]), "somewhere else"),
        (mounted(&[path("vol-1"), path("vol-0")]), "somewhere else"),
        (mounted(&[path("vol-0"), path("vol-1"), path("vol-1")]), "somewhere else"),
        (mounted(&[path("vol-0"), "/etc".into()]), "somewhere else"),
        (mounted(&[path("vol-0"), path("vol-0/../vol-1")]), "somewhere else"),
        (line(&Answer::Unmounted), "unmounted volumes instead"),
    ] {
        let (text, code) = fault(&answer).await;
        assert!(text.contains(expected), "{text}, not '{expected}'");
        assert_eq!(code, 13, "{text}");
    }
    let (text, _) = fault(&mounted(&[path("vol-0"), "/etc".into()])).await;
    assert!(text.contains("see its log"), "{text}");
}

#[tokio::test]
async fn without_its_socket_it_is_not_waited_for() {
    let Stand { directory, listener } = Stand::new();
    let socket = directory.path().join("socket");
    drop(listener);
    for (socket, expected) in [
        (socket, "Connection refused"),
        (directory.path().join("none"), "No such file or directory"),
        (PathBuf::from("/x".repeat(100)), "-secure-comms-volumes-socket"),
    ] {
        let fault = PodvmVolumes::at(&socket).mount(volumes(), soon()).await.unwrap_err();
        assert_eq!(fault.code(), 9, "{fault}");
        assert!(fault.to_string().contains(expected), "{fault}");
        assert!(fault.to_string().contains("its service must run"), "{fault}");
    }
}

#[tokio::test]
async fn a_request_that_is_given_up_closes_its_connection() {
    let stand = Stand::new();
    let end = Instant::now() + Duration::from_millis(50);
    let asks = stand.asks();
    let silent = async {
        let mut stream = stand.listener.accept().await.unwrap().0;
        let mut all = String::new();
        // To its end: the agent closes it.
        stream.read_to_string(&mut all).await.unwrap();
        serde_json::from_str(&all).unwrap()
    };
    let (result, _) = both(asks.mount(volumes(), end), silent).await;
    let fault = result.unwrap_err();
    assert!(matches!(fault, VolumesFault::Late(_)), "{fault}");
    assert_eq!(fault.code(), 4);
    assert!(asks.is_in_use(), "some of them may be mounted");
}

#[tokio::test]
async fn what_is_not_unmounted_is_asked_for_again() {
    let stand = Stand::new();
    let asks = stand.asks();
    asks.in_use.store(true, Ordering::Relaxed);
    let busy =
        Answer::Failed(Failure { kind: FailureKind::Internal, message: "vol-0: target is busy".into() });
    let (_, request) = both(asks.unmount(soon()), stand.answers(&line(&busy))).await;
    assert_eq!(request, Request::UnmountAll);
    assert!(asks.is_in_use());
}

#[tokio::test]
async fn more_than_a_line_holds_is_not_asked_for() {
    let long = Volume { name: "n".repeat(LINE_MAX), ..Volume::default() };
    let stand = Stand::new();
    let fault = stand.asks().mount(vec![long], soon()).await.unwrap_err();
    assert!(matches!(fault, VolumesFault::RequestTooLong), "{fault}");
}
