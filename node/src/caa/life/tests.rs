//! Lives in a world that is simulated: no time passes but that which is waited for.

use std::collections::{HashMap, HashSet};
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use secure_comms_protocol::PodId;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};

use super::machine::{ReleaseFailure, StartFailure};
use super::router::EARLY_MAX;
use super::world::{Dial, Directory, Failed, World};
use super::*;
use crate::caa::Sandbox;
use crate::caa::directory::Change;
use crate::pods::Runtime;

const TIMES: Times = Times { grace: Duration::from_secs(60), first_dial: Duration::from_secs(600) };

fn id(text: &str) -> PodId {
    text.parse().unwrap()
}

fn vm(number: u32) -> IpAddr {
    Ipv4Addr::from_bits(0x0a00_0000 + number).into()
}

/// A sandbox that was created at this second.
fn sandbox(name: &str, second: u64) -> Arc<Sandbox> {
    Arc::new(Sandbox {
        id: id(name),
        name: None,
        pod_ip: None,
        vxlan_id: None,
        tls: None,
        written: SystemTime::UNIX_EPOCH + Duration::from_secs(second),
    })
}

/// What the world does, and what was done in it.
#[derive(Debug)]
struct Scene {
    log: watch::Sender<Vec<String>>,
    known: Mutex<HashMap<String, Arc<Sandbox>>>,
    faults: Mutex<HashMap<String, u32>>,
    hangs: Mutex<HashSet<String>>,
    strangers: Mutex<HashSet<u64>>,
    ends: watch::Sender<HashSet<String>>,
    down: watch::Sender<HashSet<String>>,
    latency: Duration,
}

impl Scene {
    fn say(&self, line: String) {
        self.log.send_modify(|log| log.push(line));
    }

    /// An operation of the world: it takes its time, and fails as often as the test has said.
    async fn act(&self, line: String) -> bool {
        self.say(line.clone());
        if self.hangs.lock().unwrap().contains(&line) {
            std::future::pending::<()>().await;
        }
        sleep(self.latency).await;
        let mut faults = self.faults.lock().unwrap();
        match faults.get_mut(&line) {
            Some(0) | None => true,
            Some(left) => {
                *left -= 1;
                false
            }
        }
    }
}

struct FakeDial {
    number: u64,
    name: String,
    vm: IpAddr,
    closed: watch::Receiver<bool>,
    scene: Arc<Scene>,
}

impl Drop for FakeDial {
    fn drop(&mut self) {
        self.scene.say(format!("closed {}", self.number));
    }
}

impl Dial for FakeDial {
    fn vm(&self) -> IpAddr {
        self.vm
    }

    fn server_name(&self) -> String {
        self.name.clone()
    }

    async fn closed(&mut self) -> String {
        drop(self.closed.wait_for(|closed| *closed).await);
        "closed by the test".to_owned()
    }

    fn refuse(self, reason: &str) {
        self.scene.say(format!("refused {}: {reason}", self.number));
    }

    fn supersede(self) {
        self.scene.say(format!("superseded {}", self.number));
    }
}

struct Fake(Arc<Scene>);

impl World for Fake {
    type Dial = FakeDial;
    type Client = FakeDial;
    type Stream = ();

    async fn sandbox_of(&self, dial: &FakeDial) -> Result<Arc<Sandbox>, String> {
        let known = self.0.known.lock().unwrap();
        known.get(&dial.name).cloned().ok_or_else(|| "unknown".to_owned())
    }

    async fn prepare(&self, sandbox: &Sandbox) -> Result<(), String> {
        let done = self.0.act(format!("prepare {}", sandbox.id)).await;
        done.then_some(()).ok_or_else(|| "the KBS is down".to_owned())
    }

    async fn start(&self, id: &PodId, vm: IpAddr) -> Result<(), Failed<StartFailure>> {
        let done = self.0.act(format!("start {id} {vm}")).await;
        let failed = || Failed { failure: StartFailure::Again, reason: "no answer".to_owned() };
        done.then_some(()).ok_or_else(failed)
    }

    async fn halt(&self, id: &PodId) {
        self.0.act(format!("halt {id}")).await;
    }

    async fn stop(&self, id: &PodId) -> Result<(), String> {
        let done = self.0.act(format!("stop {id}")).await;
        done.then_some(()).ok_or_else(|| "the KBS is down".to_owned())
    }

    async fn check(&self, id: &PodId) -> Result<(), Failed<ReleaseFailure>> {
        let done = self.0.act(format!("check {id}")).await;
        let failed = || Failed { failure: ReleaseFailure::Again, reason: "refused".to_owned() };
        done.then_some(()).ok_or_else(failed)
    }

    async fn open(&self, id: &PodId) -> Result<(), Failed<ReleaseFailure>> {
        let done = self.0.act(format!("open {id}")).await;
        let failed = || Failed { failure: ReleaseFailure::Again, reason: "refused".to_owned() };
        done.then_some(()).ok_or_else(failed)
    }

    async fn finish(&self, dial: FakeDial, _sandbox: &Sandbox) -> Result<FakeDial, String> {
        self.0.act(format!("finish {}", dial.number)).await;
        let stranger = self.0.strangers.lock().unwrap().contains(&dial.number);
        if stranger { Err("another certificate".to_owned()) } else { Ok(dial) }
    }

    async fn relay(&self, id: &PodId, mut client: FakeDial, _stream: ()) -> String {
        self.0.say(format!("relay {id} {}", client.number));
        let mut ends = self.0.ends.subscribe();
        tokio::select! {
            _ = ends.wait_for(|ends| ends.contains(id.as_str())) => "the VM has ended it".to_owned(),
            reason = client.closed() => reason,
        }
    }

    async fn until_down(&self, id: &PodId) {
        let mut down = self.0.down.subscribe();
        drop(down.wait_for(|down| down.contains(id.as_str())).await);
    }

    fn show(&self, id: &PodId, runtime: Runtime) {
        let shown = match runtime {
            Runtime::None => "none".to_owned(),
            Runtime::Held { .. } => "held".to_owned(),
            Runtime::Connected { .. } => "connected".to_owned(),
            Runtime::Ended { reason, .. } => format!("ended: {reason}"),
        };
        self.0.say(format!("show {id} {shown}"));
    }

    fn obstacle(&self, id: &PodId, _sandbox: Option<&Sandbox>, reason: Option<String>) {
        self.0.say(format!("obstacle {id} {reason:?}"));
    }
}

struct FakeDirectory(mpsc::UnboundedReceiver<Change>);

impl Directory for FakeDirectory {
    async fn next(&mut self) -> Change {
        match self.0.recv().await {
            Some(change) => change,
            None => std::future::pending().await,
        }
    }
}

/// The other end of a dial.
struct Caller {
    number: u64,
    close: watch::Sender<bool>,
}

/// A router that runs in a simulated world.
struct Stage {
    scene: Arc<Scene>,
    dials: mpsc::Sender<FakeDial>,
    changes: mpsc::UnboundedSender<Change>,
    taken_away: mpsc::UnboundedSender<PodId>,
    stop: watch::Sender<bool>,
    numbers: u64,
    seen: usize,
    running: JoinHandle<()>,
}

impl Stage {
    fn new() -> Self {
        Self::with(Duration::from_millis(1), Vec::new())
    }

    fn with(latency: Duration, resumed: Vec<Resumed>) -> Self {
        let scene = Arc::new(Scene {
            log: watch::Sender::new(Vec::new()),
            known: Mutex::default(),
            faults: Mutex::default(),
            hangs: Mutex::default(),
            strangers: Mutex::default(),
            ends: watch::Sender::new(HashSet::new()),
            down: watch::Sender::new(HashSet::new()),
            latency,
        });
        let (dials, held) = mpsc::channel(16);
        let (changes, directory) = mpsc::unbounded_channel();
        let (taken_away, is_taken_away) = mpsc::unbounded_channel();
        let (stop, stopped) = watch::channel(false);
        let mut router = Router::new(Fake(Arc::clone(&scene)), TIMES, Metrics::default());
        for pod in resumed {
            router.resume(pod);
        }
        let running = tokio::spawn(async move {
            router.run(held, FakeDirectory(directory), is_taken_away, stopped).await;
        });
        Self { scene, dials, changes, taken_away, stop, numbers: 0, seen: 0, running }
    }

    /// Its directory appears.
    fn appears(&self, sandbox: &Arc<Sandbox>) {
        self.knows(sandbox);
        self.changes.send(Change::Appeared(Arc::clone(sandbox))).unwrap();
    }

    /// A dial for it finds it.
    fn knows(&self, sandbox: &Arc<Sandbox>) {
        self.scene.known.lock().unwrap().insert(sandbox.id.to_string(), Arc::clone(sandbox));
    }

    async fn dial(&mut self, name: &str, vm: IpAddr) -> Caller {
        self.numbers += 1;
        let (close, closed) = watch::channel(false);
        let scene = Arc::clone(&self.scene);
        let dial = FakeDial { number: self.numbers, name: name.to_owned(), vm, closed, scene };
        self.dials.send(dial).await.ok().unwrap();
        Caller { number: self.numbers, close }
    }

    fn fails(&self, line: &str, times: u32) {
        self.scene.faults.lock().unwrap().insert(line.to_owned(), times);
    }

    fn log(&self) -> Vec<String> {
        self.scene.log.borrow().clone()
    }

    /// Waits for a line of the log that the test has not waited for yet.
    async fn sees(&mut self, line: &str) {
        let mut log = self.scene.log.subscribe();
        let seen = self.seen;
        let found = log.wait_for(|log| log[seen..].iter().any(|logged| logged == line));
        let found = tokio::time::timeout(Duration::from_secs(3600), found).await;
        let Ok(log) = found else { panic!("no {line:?} in {:#?}", self.log()) };
        self.seen += log.unwrap()[seen..].iter().position(|logged| logged == line).unwrap() + 1;
    }

    fn count(&self, line: &str) -> usize {
        self.log().iter().filter(|logged| *logged == line).count()
    }
}

#[tokio::test(start_paused = true)]
async fn a_pod_lives_from_its_directory_to_the_end_of_the_grace() {
    let mut stage = Stage::new();
    stage.appears(&sandbox("a", 1));
    stage.sees("prepare a").await;
    let caller = stage.dial("a", vm(1)).await;
    stage.sees("relay a 1").await;
    let before = Instant::now();
    caller.close.send_replace(true);
    stage.sees("stop a").await;
    assert_eq!(before.elapsed().as_secs(), TIMES.grace.as_secs());
    let shown = "show a ended: closed by the test";
    assert_eq!(
        stage.log(),
        [
            "prepare a",
            "show a held",
            "start a 10.0.0.1",
            "check a",
            "open a",
            "finish 1",
            "show a connected",
            "relay a 1",
            "closed 1",
            shown,
            "stop a",
        ]
    );
}

#[tokio::test(start_paused = true)]
async fn a_pod_whose_kbs_hangs_holds_up_no_other() {
    let mut stage = Stage::new();
    stage.scene.hangs.lock().unwrap().insert("prepare a".to_owned());
    stage.appears(&sandbox("a", 1));
    stage.sees("prepare a").await;
    let _a = stage.dial("a", vm(1)).await;
    stage.appears(&sandbox("b", 2));
    let _b = stage.dial("b", vm(2)).await;
    stage.sees("relay b 2").await;
}

#[tokio::test(start_paused = true)]
async fn a_publication_that_fails_is_retried_until_the_pod_is_gone() {
    let mut stage = Stage::new();
    stage.fails("prepare a", u32::MAX);
    stage.appears(&sandbox("a", 1));
    stage.sees("obstacle a Some(\"publish the keys: the KBS is down\")").await;
    stage.sees("stop a").await;
    let tries = stage.count("prepare a");
    assert!((20..40).contains(&tries), "{tries} in {:?}", TIMES.first_dial);
    assert_eq!(stage.count("obstacle a None"), 1);
}

#[tokio::test(start_paused = true)]
async fn a_kata_agent_that_is_late_is_asked_again() {
    let mut stage = Stage::new();
    stage.appears(&sandbox("a", 1));
    stage.fails("check a", 3);
    stage.fails("open a", 1);
    stage.fails("start a 10.0.0.1", 2);
    let _caller = stage.dial("a", vm(1)).await;
    stage.sees("relay a 1").await;
    assert_eq!(stage.count("start a 10.0.0.1"), 3);
    assert_eq!(stage.count("check a"), 5, "the fifth before the second stream");
}

#[tokio::test(start_paused = true)]
async fn a_dial_whose_file_is_late_waits_and_an_unknown_one_is_refused() {
    let mut stage = Stage::new();
    let began = Instant::now();
    let _late = stage.dial("a", vm(1)).await;
    let unknown = stage.dial("x", vm(2)).await;
    sleep(Duration::from_secs(5)).await;
    stage.appears(&sandbox("a", 1));
    stage.sees("relay a 1").await;
    assert_eq!(began.elapsed().as_secs(), 5);
    stage.sees(&format!("refused {}: unknown", unknown.number)).await;
    assert_eq!(began.elapsed().as_secs(), 10);
}

#[tokio::test(start_paused = true)]
async fn unknown_dials_are_bounded_and_known_ones_are_not_held_up() {
    let mut stage = Stage::new();
    stage.knows(&sandbox("a", 1));
    let mut callers = Vec::new();
    for _ in 0..1000 {
        callers.push(stage.dial("x", vm(1)).await);
    }
    let began = Instant::now();
    callers.push(stage.dial("a", vm(2)).await);
    stage.sees("relay a 1001").await;
    assert!(began.elapsed() < Duration::from_secs(1));
    let refused = stage.log().iter().filter(|line| line.starts_with("refused")).count();
    assert_eq!(refused, 1000 - 128);
}

#[tokio::test(start_paused = true)]
async fn a_stranger_does_not_keep_the_runtime_from_its_pod() {
    let mut stage = Stage::new();
    stage.appears(&sandbox("a", 1));
    stage.scene.strangers.lock().unwrap().insert(1);
    let _stranger = stage.dial("a", vm(1)).await;
    let _caller = stage.dial("a", vm(1)).await;
    stage.sees("closed 1").await;
    stage.sees("relay a 2").await;
    assert_eq!(stage.count("open a"), 1, "nothing was sent on the stream");
}

#[tokio::test(start_paused = true)]
async fn a_zombie_is_parked_and_its_pod_stopped() {
    let mut stage = Stage::new();
    let (old, young) = (sandbox("old", 1), sandbox("young", 2));
    stage.appears(&old);
    stage.sees("prepare old").await;
    stage.appears(&young);
    let _young = stage.dial("young", vm(1)).await;
    stage.sees("relay young 1").await;
    let zombie = stage.dial("old", vm(1)).await;
    stage.sees("stop old").await;
    sleep(Duration::from_secs(3600)).await;
    let line = format!("closed {}", zombie.number);
    assert_eq!(stage.count(&line), 0);
    assert!(!stage.log().iter().any(|line| line.starts_with("start old")));
    zombie.close.send_replace(true);
    stage.sees(&line).await;
}

#[tokio::test(start_paused = true)]
async fn an_address_that_is_used_again_ends_the_older_pod() {
    let mut stage = Stage::new();
    stage.appears(&sandbox("old", 1));
    stage.scene.hangs.lock().unwrap().insert("start old 10.0.0.1".to_owned());
    let old = stage.dial("old", vm(1)).await;
    stage.sees("start old 10.0.0.1").await;
    stage.appears(&sandbox("young", 2));
    let _young = stage.dial("young", vm(1)).await;
    stage.sees("stop old").await;
    stage.sees("relay young 2").await;
    sleep(Duration::from_secs(3600)).await;
    assert_eq!(stage.count(&format!("closed {}", old.number)), 0, "it would dial again");
    assert_eq!(stage.count("stop old"), 1);
}

#[tokio::test(start_paused = true)]
async fn a_dial_alone_does_not_end_a_pod_that_is_connected() {
    let mut stage = Stage::new();
    stage.appears(&sandbox("old", 1));
    let _old = stage.dial("old", vm(1)).await;
    stage.sees("relay old 1").await;
    stage.appears(&sandbox("young", 2));
    stage.scene.hangs.lock().unwrap().insert("start young 10.0.0.1".to_owned());
    let _young = stage.dial("young", vm(1)).await;
    sleep(Duration::from_secs(60)).await;
    assert_eq!(stage.count("stop old"), 0);
    stage.scene.down.send_modify(|down| assert!(down.insert("old".to_owned())));
    stage.sees("closed 1").await;
    stage.sees("stop old").await;
}

#[tokio::test(start_paused = true)]
async fn a_dial_that_makes_room_is_counted_as_superseded() {
    let mut stage = Stage::new();
    stage.appears(&sandbox("a", 1));
    stage.scene.hangs.lock().unwrap().insert("start a 10.0.0.1".to_owned());
    let mut dials = Vec::new();
    for _ in 0..4 {
        dials.push(stage.dial("a", vm(1)).await);
    }
    stage.sees("superseded 2").await;
    stage.sees("closed 2").await;
    assert!(!stage.log().iter().any(|line| line == "closed 1"));
}

#[tokio::test(start_paused = true)]
async fn a_start_that_is_taken_away_does_not_begin_again() {
    let mut stage = Stage::new();
    stage.scene.hangs.lock().unwrap().insert("start a 10.0.0.1".to_owned());
    stage.appears(&sandbox("a", 1));
    let caller = stage.dial("a", vm(1)).await;
    stage.sees("start a 10.0.0.1").await;
    stage.taken_away.send(id("a")).unwrap();
    stage.sees("stop a").await;
    sleep(Duration::from_secs(3600)).await;
    assert_eq!((stage.count("prepare a"), stage.count("stop a"), stage.count("closed 1")), (1, 1, 0));
    caller.close.send_replace(true);
    stage.sees("closed 1").await;
}

#[tokio::test(start_paused = true)]
async fn parked_dials_are_bounded() {
    let mut stage = Stage::new();
    stage.knows(&sandbox("old", 1));
    stage.appears(&sandbox("young", 2));
    let _young = stage.dial("young", vm(1)).await;
    stage.sees("relay young 1").await;
    let mut zombies = Vec::new();
    for _ in 0..300 {
        zombies.push(stage.dial("old", vm(1)).await);
    }
    stage.sees("closed 45").await;
    sleep(Duration::from_secs(60)).await;
    let closed = stage.log().iter().filter(|line| line.starts_with("closed")).count();
    assert_eq!(closed, 300 - 256);
}

#[tokio::test(start_paused = true)]
async fn pods_of_an_earlier_process_have_the_grace() {
    let pod = |name: &str, at: Option<u32>| Resumed { id: id(name), vm: at.map(vm), created: None };
    let resumed =
        vec![pod("dialled", Some(1)), pod("ended", Some(2)), pod("left-over", None), pod("new", None)];
    let mut stage = Stage::with(Duration::from_millis(1), resumed);
    let began = Instant::now();
    stage.knows(&sandbox("dialled", 1));
    stage.appears(&sandbox("new", 2));
    let _caller = stage.dial("dialled", vm(1)).await;
    stage.sees("relay dialled 1").await;
    while stage.count("stop ended") + stage.count("stop left-over") < 2 {
        sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(began.elapsed().as_secs(), TIMES.grace.as_secs());
    sleep(TIMES.grace).await;
    assert_eq!(stage.count("stop dialled") + stage.count("stop new"), 0);
    stage.sees("stop new").await;
}

#[tokio::test(start_paused = true)]
async fn many_pods_start_at_the_same_time() {
    let mut stage = Stage::with(Duration::from_secs(1), Vec::new());
    let began = Instant::now();
    let mut callers = Vec::new();
    for number in 0..250 {
        let name = format!("p{number}");
        stage.appears(&sandbox(&name, number.into()));
        callers.push(stage.dial(&name, vm(number)).await);
    }
    let mut log = stage.scene.log.subscribe();
    let relays = |log: &Vec<String>| log.iter().filter(|line| line.starts_with("relay")).count();
    drop(log.wait_for(|log| relays(log) == 250).await.unwrap());
    assert_eq!(began.elapsed().as_secs(), 5, "prepare, start, check, open, finish");
}

#[tokio::test(start_paused = true)]
async fn of_thousands_that_look_new_all_start_and_few_are_prepared() {
    let mut stage = Stage::new();
    let name = |number: usize| format!("p{number}");
    let last = name(3 * EARLY_MAX - 1);
    for number in 0..3 * EARLY_MAX {
        stage.appears(&sandbox(&name(number), 1));
    }
    // Simulated time: it passes once nothing is left to do.
    sleep(Duration::from_secs(1)).await;
    let prepared = |stage: &Stage| stage.log().iter().filter(|line| line.starts_with("prepare ")).count();
    assert_eq!((prepared(&stage), stage.count(&format!("prepare {last}"))), (EARLY_MAX, 0));
    let _caller = stage.dial(&last, vm(1)).await;
    stage.sees(&format!("relay {last} 1")).await;
    assert_eq!((prepared(&stage), stage.count(&format!("prepare {last}"))), (EARLY_MAX + 1, 1));
}

#[tokio::test(start_paused = true)]
async fn a_pod_that_ended_begins_again_when_it_is_dialled() {
    let mut stage = Stage::new();
    stage.fails("stop a", 1);
    stage.appears(&sandbox("a", 1));
    let caller = stage.dial("a", vm(1)).await;
    stage.sees("relay a 1").await;
    caller.close.send_replace(true);
    stage.sees("stop a").await;
    sleep(Duration::from_secs(1)).await;
    let _again = stage.dial("a", vm(1)).await;
    stage.sees("prepare a").await;
    stage.sees("check a").await;
    stage.sees("relay a 2").await;
}

#[tokio::test(start_paused = true)]
async fn a_file_that_is_broken_is_shown_until_it_is_mended() {
    let mut stage = Stage::new();
    stage.changes.send(Change::Broken { id: id("a"), reason: "no JSON".to_owned() }).unwrap();
    stage.sees("obstacle a Some(\"no JSON\")").await;
    stage.appears(&sandbox("a", 1));
    stage.sees("obstacle a None").await;
    stage.sees("prepare a").await;
    stage.changes.send(Change::Gone(id("a"))).unwrap();
    let began = Instant::now();
    stage.sees("stop a").await;
    assert_eq!(began.elapsed().as_secs(), TIMES.grace.as_secs());
}

#[tokio::test(start_paused = true)]
async fn a_stop_of_the_service_closes_what_is_held_and_stops_no_pod() {
    let mut stage = Stage::new();
    stage.appears(&sandbox("a", 1));
    let _caller = stage.dial("a", vm(1)).await;
    stage.sees("relay a 1").await;
    stage.stop.send_replace(true);
    stage.running.await.unwrap();
    let mut log = stage.scene.log.subscribe();
    drop(log.wait_for(|log| log.iter().any(|line| line == "closed 1")).await.unwrap());
    assert!(!stage.scene.log.borrow().iter().any(|line| line.starts_with("stop")));
}
