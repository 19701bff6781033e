use std::fs::{self, File, FileTimes, Permissions};
use std::os::unix::fs::{PermissionsExt as _, chown, symlink};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::time::SystemTime;

use rcgen::KeyPair;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::task::JoinHandle;

use super::*;
use crate::caa::testing::Caa;

/// Ends a test that would hang.
const LIMIT: Duration = Duration::from_secs(60);
/// Longer than any test.
const NEVER: Duration = Duration::from_secs(3600);
/// Soon.
const SOON: Duration = Duration::from_millis(100);

const A: &str = "aaaaaaaa11";
const B: &str = "bbbbbbbb22";
const NAME: &str = "podvm-web-0-aaaaaaaa";

struct World {
    _dir: TempDir,
    path: PathBuf,
    directory: PodsDirectory,
    changes: Changes,
    health: Health,
    _stop: channel::Sender<bool>,
    follower: Option<JoinHandle<()>>,
}

impl World {
    /// A directory that is not followed yet.
    fn new(settle: Duration, events: bool) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pods");
        fs::create_dir(&path).unwrap();
        let directory = PodsDirectory::with(path.clone(), settle, events);
        let changes = directory.changes();
        let (health, stop) = (Health::default(), channel::Sender::new(false));
        Self { _dir: dir, path, directory, changes, health, _stop: stop, follower: None }
    }

    fn follow(&mut self) {
        let (directory, health, stop) = (self.directory.clone(), self.health.clone(), self._stop.subscribe());
        self.follower = Some(tokio::spawn(async move { directory.run(health, stop).await }));
    }

    fn following(settle: Duration) -> Self {
        let mut world = Self::new(settle, true);
        world.follow();
        world
    }

    fn file(&self, id: &str) -> PathBuf {
        self.path.join(id).join("apf.json")
    }

    fn write(&self, id: &str, text: impl AsRef<[u8]>) {
        fs::create_dir_all(self.path.join(id)).unwrap();
        fs::write(self.file(id), text).unwrap();
    }

    fn write_old(&self, id: &str, text: impl AsRef<[u8]>) {
        self.write(id, text);
        let hour_ago = SystemTime::now() - Duration::from_secs(3600);
        File::open(self.file(id)).unwrap().set_times(FileTimes::new().set_modified(hour_ago)).unwrap();
    }

    fn listen(&self, id: &str) -> UnixListener {
        UnixListener::bind(self.path.join(id).join("agent.ttrpc")).unwrap()
    }

    async fn next(&mut self) -> Change {
        timeout(LIMIT, self.changes.next()).await.expect("no change came")
    }

    async fn appears(&mut self, id: &str) -> Arc<Sandbox> {
        match self.next().await {
            Change::Appeared(sandbox) if sandbox.id.as_str() == id => sandbox,
            change => panic!("{change:?}"),
        }
    }

    async fn breaks(&mut self, id: &str) -> String {
        match self.next().await {
            Change::Broken { id: broken, reason } if broken.as_str() == id => reason,
            change => panic!("{change:?}"),
        }
    }

    async fn goes(&mut self, id: &str) {
        let change = self.next().await;
        assert!(matches!(&change, Change::Gone(gone) if gone.as_str() == id), "{change:?}");
    }

    async fn find(&self, server_name: &str) -> Result<PodId, LookupError> {
        let found = timeout(LIMIT, self.directory.by_server_name(server_name)).await.unwrap();
        found.map(|sandbox| sandbox.id.clone())
    }

    /// Waits for a state of what is known, which nothing announces.
    async fn until(&self, reached: impl Fn(&Known) -> bool) {
        let wait = async {
            while !reached(&self.directory.known()) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(LIMIT, wait).await.expect("the state was not reached");
    }
}

fn id(text: &str) -> PodId {
    text.parse().unwrap()
}

#[test]
fn the_corpus_of_caa_files_holds() {
    crate::caa::testing::corpus::replay("caa_files", caa_files::exercise);
}

#[tokio::test]
async fn a_sandbox_appears_with_its_keys() {
    let (caa, mut world) = (Caa::new(), World::following(NEVER));
    world.write(A, caa.text(NAME));
    let sandbox = world.appears(A).await;
    assert_eq!(sandbox.name.as_ref().unwrap().to_string(), "shop/web-0");
    assert_eq!(sandbox.pod_ip.unwrap().to_string(), "10.244.3.5");
    assert_eq!(sandbox.vxlan_id, Some(555_006));
    assert_eq!(sandbox.tls.as_ref().unwrap().server_name, NAME);
    assert_eq!(world.find(NAME).await, Ok(id(A)));
    assert_eq!(world.find(&NAME.to_uppercase()).await, Ok(id(A)));
    assert_eq!(world.find("podvm-web-0-aaaaaaab").await, Err(LookupError::Unknown));
    assert!(world.directory.by_id(&id(A)).is_some());
    assert!(!world.directory.living().await.contains(&id(A)));
    let _listener = world.listen(A);
    assert!(world.directory.living().await.contains(&id(A)));
}

#[tokio::test]
async fn the_older_file_name_is_read_if_alone() {
    let (caa, mut world) = (Caa::new(), World::new(NEVER, true));
    for (sandbox, files) in [(A, &["daemon.json"][..]), (B, &["daemon.json", "apf.json"])] {
        fs::create_dir(world.path.join(sandbox)).unwrap();
        for file in files {
            fs::write(world.path.join(sandbox).join(file), caa.text(&format!("{sandbox}-{}", &file[..3])))
                .unwrap();
        }
    }
    world.follow();
    assert_eq!(world.find(&format!("{A}-dae")).await, Ok(id(A)));
    assert_eq!(world.find(&format!("{B}-apf")).await, Ok(id(B)));
    assert_eq!(world.find(&format!("{B}-dae")).await, Err(LookupError::Unknown));
}

#[tokio::test]
async fn a_half_written_file_is_awaited() {
    let (caa, mut world) = (Caa::new(), World::following(NEVER));
    fs::create_dir(world.path.join(A)).unwrap();
    world.until(|known| known.waiting() == [id(A)]).await;
    let text = caa.text(NAME);
    world.write(A, "");
    world.until(|known| known.unsettled() == [id(A)]).await;
    world.write(A, &text[..text.len() / 2]);
    world.write(A, &text);
    world.appears(A).await;
    world.until(|known| known.waiting().is_empty()).await;
}

#[tokio::test]
async fn a_broken_file_is_said_once_for_each_content() {
    let (caa, mut world) = (Caa::new(), World::following(SOON));
    world.write(A, "{ not JSON");
    assert!(world.breaks(A).await.starts_with("apf.json: key must be a string"));
    let error = world.find(NAME).await.unwrap_err();
    assert!(matches!(&error, LookupError::Broken { id, .. } if id.as_str() == A), "{error}");
    // The same content is not said again, another one is.
    world.write(A, "{ not JSON");
    world.write(A, "{}");
    assert!(world.breaks(A).await.contains("none of the keys"));
    world.write(A, caa.text(NAME));
    world.appears(A).await;
    assert_eq!(world.find(NAME).await, Ok(id(A)));
}

#[tokio::test]
async fn what_was_good_remains_when_the_file_breaks() {
    let (caa, mut world) = (Caa::new(), World::following(SOON));
    let text = caa.text(NAME);
    world.write(A, &text);
    world.appears(A).await;
    world.write(A, &text[..100]);
    world.breaks(A).await;
    assert_eq!(world.find(NAME).await, Ok(id(A)));
    // The same as before: nothing has changed.
    world.write(A, &text);
    world.until(|known| known.waiting().is_empty()).await;
    world.write(A, caa.text("podvm-other-aaaaaaaa"));
    assert!(matches!(world.next().await, Change::Changed(_)));
    assert_eq!(world.find("podvm-other-aaaaaaaa").await, Ok(id(A)));
    assert!(world.find(NAME).await.is_err());
}

#[tokio::test]
async fn a_sandbox_is_gone_with_its_file_or_directory() {
    let (caa, mut world) = (Caa::new(), World::following(SOON));
    for sandbox in [A, B] {
        world.write(sandbox, caa.text(&format!("podvm-{sandbox}")));
        world.appears(sandbox).await;
    }
    fs::remove_file(world.file(A)).unwrap();
    world.goes(A).await;
    fs::remove_dir_all(world.path.join(B)).unwrap();
    world.goes(B).await;
    assert!(world.directory.list().is_empty());
    world.until(|known| known.counts() == (1, 0)).await;
    world.write(A, caa.text(NAME));
    world.appears(A).await;
}

#[tokio::test]
async fn a_file_that_is_replaced_is_not_gone() {
    let (caa, mut world) = (Caa::new(), World::following(NEVER));
    world.write(A, caa.text(NAME));
    world.appears(A).await;
    fs::remove_file(world.file(A)).unwrap();
    world.until(|known| known.unsettled() == [id(A)]).await;
    assert_eq!(world.find(NAME).await, Ok(id(A)));
    world.write(A, caa.text(NAME));
    assert!(matches!(world.next().await, Change::Changed(_)));
}

#[tokio::test]
async fn links_and_files_of_others_are_refused() {
    let (caa, mut world) = (Caa::new(), World::following(SOON));
    let elsewhere = tempfile::tempdir().unwrap();
    fs::write(elsewhere.path().join("apf.json"), caa.text(NAME)).unwrap();
    symlink(elsewhere.path(), world.path.join(A)).unwrap();
    assert!(world.breaks(A).await.contains("directory is a symbolic link"));
    fs::create_dir(world.path.join(B)).unwrap();
    symlink(elsewhere.path().join("apf.json"), world.file(B)).unwrap();
    assert!(world.breaks(B).await.contains("apf.json: it is a symbolic link"));
    world.write("mode", caa.text(NAME));
    fs::set_permissions(world.file("mode"), Permissions::from_mode(0o666)).unwrap();
    // What was read before its mode changed does not matter here.
    let reason = loop {
        match world.next().await {
            Change::Broken { reason, .. } => break reason,
            Change::Appeared(_) => world.write("mode", caa.text(NAME)),
            change => panic!("{change:?}"),
        }
    };
    assert!(reason.contains("other users may write it"), "{reason}");
    fs::create_dir(world.path.join("fifo")).unwrap();
    nix::unistd::mkfifo(&world.file("fifo"), nix::sys::stat::Mode::S_IRUSR).unwrap();
    assert!(world.breaks("fifo").await.contains("not a regular file"));
    // Only root can give a file away.
    fs::create_dir(world.path.join("owner")).unwrap();
    if chown(world.path.join("owner"), Some(4321), None).is_ok() {
        fs::write(world.file("owner"), caa.text(NAME)).unwrap();
        assert!(world.breaks("owner").await.contains("belongs to user 4321"));
    }
    assert!(world.find(NAME).await.is_err());
}

#[tokio::test]
async fn of_two_with_one_name_the_one_that_lives_is_found() {
    let (caa, mut world) = (Caa::new(), World::new(NEVER, true));
    world.write(A, caa.text(NAME));
    world.write(B, caa.text(NAME));
    world.write_old("old", caa.text(NAME));
    world.follow();
    world.until(|known| known.candidates(NAME).left_over.len() == 1).await;
    match world.find(NAME).await {
        Err(LookupError::Ambiguous(mut ids)) => {
            ids.sort();
            assert_eq!(ids, [id(A), id(B)]);
        }
        other => panic!("{other:?}"),
    }
    let listener = world.listen(B);
    assert_eq!(world.find(NAME).await, Ok(id(B)));
    drop(listener);
    let _old = world.listen("old");
    assert_eq!(world.find(NAME).await, Ok(id("old")));
    let _a = world.listen(A);
    assert!(matches!(world.find(NAME).await, Err(LookupError::Ambiguous(ids)) if ids.len() == 2));
}

#[tokio::test]
async fn a_younger_sandbox_is_seen_before_a_name_is_answered() {
    let (caa, mut world) = (Caa::new(), World::new(NEVER, false));
    world.write(A, caa.text(NAME));
    world.follow();
    assert_eq!(world.find(NAME).await, Ok(id(A)));
    // No event and no time says that it is there, and it is asked for at once.
    world.write(B, caa.text(NAME));
    assert!(matches!(world.find(NAME).await, Err(LookupError::Ambiguous(ids)) if ids.len() == 2));
    let _listener = world.listen(B);
    assert_eq!(world.find(NAME).await, Ok(id(B)));
}

#[tokio::test]
async fn thousands_left_over_cost_neither_watches_nor_keys() {
    const MANY: usize = 5000;
    let (caa, mut world) = (Caa::new(), World::new(NEVER, true));
    let key = KeyPair::generate().unwrap();
    for number in 0..MANY {
        let name = format!("podvm-old-{number:08}");
        world.write_old(&format!("{number:08}00"), caa.apf(&name, &key).to_string());
    }
    world.write_old(A, caa.text(NAME));
    let _listener = world.listen(A);
    world.write(B, caa.text("podvm-young"));
    let began = Instant::now();
    world.follow();
    let (one, two) = (world.next().await, world.next().await);
    let mut appeared = [one.id().as_str(), two.id().as_str()];
    appeared.sort_unstable();
    assert_eq!(appeared, [A, B]);
    let first = began.elapsed();
    world.until(|known| known.candidates("podvm-old-00004999").left_over.len() == 1).await;
    world.until(|known| known.named() == MANY).await;
    eprintln!("{MANY} left over: first sandboxes after {first:?}, all names after {:?}", began.elapsed());
    assert_eq!(world.directory.counts(), (MANY + 2, MANY));
    let began = Instant::now();
    world.directory.blocking(|scanner| scanner.scan(scan::What::Thorough)).await.unwrap().unwrap();
    eprintln!("a look at everything, every 30 s: {:?}", began.elapsed());
    let began = Instant::now();
    world.directory.blocking(|scanner| scanner.scan(scan::What::All)).await.unwrap().unwrap();
    eprintln!("a look at all that may have changed, every 5 s: {:?}", began.elapsed());
    let began = Instant::now();
    world.directory.blocking(|scanner| scanner.scan(scan::What::Served)).await.unwrap().unwrap();
    eprintln!("a look that a dial causes: {:?}", began.elapsed());
    assert_eq!(world.directory.list().len(), 2);
    world.until(|known| known.waiting().is_empty()).await;
    assert_eq!(world.find("podvm-old-00000017").await, Ok(id("0000001700")));
    assert_eq!(world.find("podvm-old-x").await, Err(LookupError::Unknown));
    // One of them lives, after all.
    world.write("0000001700", caa.text("podvm-old-00000017"));
    world.appears("0000001700").await;
}

#[tokio::test]
async fn a_look_for_a_dial_leaves_out_what_is_left_over() {
    let (caa, world) = (Caa::new(), World::new(NEVER, true));
    let scan = async |what| world.directory.blocking(|scanner| scanner.scan(what)).await.unwrap().unwrap();
    world.write_old(A, caa.text(NAME));
    scan(scan::What::Thorough).await;
    assert_eq!(world.directory.counts(), (1, 1));
    // Its file is new: what looks at it sees that.
    world.write(A, caa.text(NAME));
    world.write(B, caa.text("podvm-young"));
    scan(scan::What::Served).await;
    assert_eq!(world.directory.counts(), (2, 1));
    scan(scan::What::All).await;
    assert_eq!(world.directory.counts(), (2, 0));
    fs::remove_dir_all(world.path.join(A)).unwrap();
    scan(scan::What::Served).await;
    assert!(world.directory.by_id(&id(A)).is_some(), "its file may be late");
}

#[tokio::test]
async fn without_events_everything_is_seen_as_well() {
    let (caa, mut world) = (Caa::new(), World::new(SOON, false));
    world.follow();
    world.until(|_| world.directory.0.looked.borrow().is_some()).await;
    world.write(A, caa.text(NAME));
    world.appears(A).await;
    world.write(A, caa.text("podvm-other"));
    assert!(matches!(world.next().await, Change::Changed(_)));
    world.write(A, "{");
    world.breaks(A).await;
    fs::remove_dir_all(world.path.join(A)).unwrap();
    world.goes(A).await;
}

#[tokio::test]
async fn a_name_that_is_asked_for_is_looked_for_at_once() {
    let (caa, world) = (Caa::new(), World::new(NEVER, false));
    let mut world = world;
    // Before the first look has ended.
    world.write(A, caa.text(NAME));
    let directory = world.directory.clone();
    let asked =
        tokio::spawn(async move { directory.by_server_name(NAME).await.map(|found| found.id.clone()) });
    world.follow();
    assert_eq!(timeout(LIMIT, asked).await.unwrap().unwrap(), Ok(id(A)));
}

#[tokio::test]
async fn a_directory_may_come_later_and_be_replaced() {
    let (caa, mut world) = (Caa::new(), World::new(SOON, true));
    fs::remove_dir(&world.path).unwrap();
    world.follow();
    world.until(|_| world.directory.0.looked.borrow().is_some()).await;
    assert!(world.health.faults().is_empty(), "it is made with the first sandbox");
    world.write(A, caa.text(NAME));
    world.appears(A).await;
    // Another one under the same path.
    fs::rename(&world.path, world.path.with_extension("away")).unwrap();
    world.write(B, caa.text("podvm-b"));
    let mut both = vec![format!("{:?}", world.next().await), format!("{:?}", world.next().await)];
    both.sort();
    assert!(both[0].starts_with("Appeared(") && both[0].contains(B), "{both:?}");
    assert_eq!(both[1], format!("Gone(PodId({A:?}))"));
    // No directory at all.
    fs::remove_dir_all(&world.path).unwrap();
    fs::write(&world.path, "").unwrap();
    let mut health = world.health.subscribe();
    let fault = health.wait_for(|parts| parts.get(HEALTH).is_some_and(Option::is_some));
    let fault = timeout(LIMIT, fault).await.unwrap().unwrap()[HEALTH].clone().unwrap();
    assert!(fault.contains("Not a directory") && fault.contains("make it a directory"), "{fault}");
    assert_eq!(world.find("podvm-b").await, Ok(id(B)), "what is known remains");
    fs::remove_file(&world.path).unwrap();
    world.goes(B).await;
}

#[tokio::test]
async fn a_sandbox_that_lives_without_a_file_is_said() {
    let mut world = World::new(Duration::ZERO, true);
    fs::create_dir(world.path.join(A)).unwrap();
    let _listener = world.listen(A);
    world.follow();
    assert!(world.breaks(A).await.contains("has another layout"));
}

#[tokio::test]
async fn a_slow_receiver_gets_the_last_state() {
    let (caa, mut world) = (Caa::new(), World::following(SOON));
    world.write(A, caa.text(NAME));
    world.until(|known| known.sandbox(&id(A)).is_some()).await;
    for _ in 0..3 {
        let before = world.directory.by_id(&id(A)).unwrap();
        world.write(A, caa.text(NAME));
        world.until(|known| known.sandbox(&id(A)).is_some_and(|now| !Arc::ptr_eq(&before, &now))).await;
    }
    let last = world.directory.by_id(&id(A)).unwrap();
    assert!(Arc::ptr_eq(&world.appears(A).await, &last));
    assert!(world.changes.try_next().is_none());
    let mut later = world.directory.changes();
    assert!(matches!(later.try_next(), Some(Change::Appeared(sandbox)) if Arc::ptr_eq(&sandbox, &last)));
}

#[test]
fn hostile_files_are_refused_with_a_reason() {
    let (caa, key, other) = (Caa::new(), KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
    let good = caa.apf(NAME, &key);
    let with = |field: &str, value: Value| {
        let mut apf = good.clone();
        apf[field] = value;
        apf.to_string()
    };
    let two = |names: &[&str]| with("tls-server-cert", caa.certificate(names, &key).into());
    let key_text = key.serialize_pem();
    for (text, reason) in [
        (String::new(), "EOF while parsing"),
        ("[".repeat(100_000), "not a JSON object"),
        (format!("{{\"x\": {}", "[".repeat(100_000)), "EOF while parsing"),
        (format!("{{\"pod-network\": {}", "{\"podip\":".repeat(100_000)), "invalid type: map"),
        ("{\"pod-name\": \"a\0b\"}".to_owned(), "control character"),
        (json!(good.to_string()).to_string(), "not a JSON object"),
        (good.to_string() + "x", "trailing characters"),
        ("{\"pod-name\": \"a\", \"pod-name\": \"b\"}".to_owned(), "duplicate field"),
        (with("pod-network", json!(key_text)), "invalid type: a string, expected struct"),
        (with("tls-server-key", json!("")), "tls-server-key is missing"),
        (with("tls-client-ca", json!(null)), "tls-client-ca is missing"),
        (
            with("tls-server-key", other.serialize_pem().into()),
            "does not fit its certificate for 'podvm-web-0-aaaaaaaa'",
        ),
        (with("tls-server-key", caa.client.clone().into()), "private key is not PEM"),
        (with("tls-server-cert", json!(key_text)), "server's certificate is not PEM"),
        (
            with("tls-client-ca", json!("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")),
            "client's certificate is not an X.509",
        ),
        (with("tls-client-ca", format!("{0}{0}", caa.client).into()), "one certificate is expected"),
        (with("tls-server-cert", caa.client.clone().into()), "has no DNS name"),
        (two(&["a.example", "b.example"]), "more than one DNS name"),
    ] {
        let error = parse(text.as_bytes(), id(A), SystemTime::now()).unwrap_err().to_string();
        assert!(error.contains(reason), "{reason}: {error}");
        assert!(error.len() < 400 && !error.contains("PRIVATE"), "{error}");
    }
    let not_utf8 = [b"{\"pod-name\": \"", &[0xff, 0xfe][..], b"\"}"].concat();
    parse(&not_utf8, id(A), SystemTime::now()).unwrap_err();
    // Names and addresses that are of no use are left out: they are only shown.
    let odd =
        json!({"pod-name": "Odd\nname", "pod-namespace": "x", "pod-network": {"podip": "?", "vxlan-id": 0}});
    let odd = parse(odd.to_string().as_bytes(), id(A), SystemTime::now()).unwrap();
    assert!(odd.name.is_none() && odd.pod_ip.is_none() && odd.vxlan_id.is_none() && odd.tls.is_none());
}

#[tokio::test]
async fn a_huge_file_is_refused() {
    let mut world = World::following(SOON);
    world.write(A, vec![b' '; 1024 * 1024 + 1]);
    assert!(world.breaks(A).await.contains("larger than 1048576 bytes"));
}

proptest::proptest! {
    #[test]
    fn damaged_files_are_refused_in_one_short_line(at in 0_usize..4000, byte: u8, cut in 0_usize..4000) {
        let (caa, key) = (Caa::new(), KeyPair::generate().unwrap());
        let mut text = caa.apf(NAME, &key).to_string().into_bytes();
        let length = text.len();
        text[at % length] = byte;
        if cut % 4 == 0 {
            text.truncate(cut);
        }
        if let Err(error) = parse(&text, id(A), SystemTime::now()) {
            let error = error.to_string();
            proptest::prop_assert!(error.len() < 400 && !error.contains('\n'), "{}", error);
            let secret = key.serialize_pem();
            let secret = secret.lines().nth(1).unwrap();
            proptest::prop_assert!(!error.contains(&secret[..16]), "{}", error);
        }
    }
}
