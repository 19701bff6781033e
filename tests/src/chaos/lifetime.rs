//! One life: the pod comes up, is hit, comes up again; then it is looked at.

use std::net::SocketAddr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use futures_util::future::join_all;
use tokio::io::AsyncReadExt as _;
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{interval, sleep, timeout};

use super::attacker;
use super::fault::inject_fault;
use super::pod_scene::{Route, PodScene};
use super::resources::Resources;
use super::script::{Fault, Hit, Script, Side};
use super::secrets::Secrets;
use super::traffic::{Seen, Traffic, request};

/// What the issue allows a pod to need once all faults are over.
pub const GOAL: Duration = Duration::from_secs(10);
/// Beyond this it is a failure. The longest timers of the protocol are 20 s (`SILENCE`, `KBS_FIRST_BYTE`), and a pause
/// between tries is up to 5 s; the rest is for a machine that does six lives at a time.
pub const BOUND: Duration = Duration::from_secs(45);
/// What a whole life may take.
const LIFE: Duration = Duration::from_secs(240);
/// A pod that nothing has hit yet comes up in this time, however busy the machine is.
const FIRST: Duration = Duration::from_secs(60);
/// A new try to reach the kata agent, so often.
const PROBE: Duration = Duration::from_millis(100);
/// Connections that must work, one after the other, once all is calm.
const CALM: u64 = 10;
/// How long what must not be answered is listened to.
const LISTEN: Duration = Duration::from_millis(300);
/// What an idle process may hold: twice what it needs. Blocking threads of tokio end after 10 s without work.
const AGENT: Resources = Resources { files: 40, threads: 2, rss_kib: 16 * 1024 };
const ADAPTOR: Resources = Resources { files: 40, threads: 32, rss_kib: 64 * 1024 };
/// Until connections that clients have left are gone on both sides.
const IDLE: Duration = Duration::from_secs(20);

/// What a life came to.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// What was to befall it.
    pub script: Script,
    /// From the end of the last fault until the kata agent answered.
    pub recovery: Option<Duration>,
    /// What its clients saw.
    pub seen: Seen,
    /// What the agent held at the end.
    pub agent: Resources,
    /// What the adaptor held at the end.
    pub adaptor: Resources,
    /// What must not be.
    pub violations: Vec<String>,
    /// What the processes said.
    pub logs: String,
}

/// Lives it.
pub async fn live(script: Script) -> Outcome {
    let mut outcome = Outcome {
        script: script.clone(),
        recovery: None,
        seen: Seen::default(),
        agent: Resources::default(),
        adaptor: Resources::default(),
        violations: Vec::new(),
        logs: String::new(),
    };
    let ended = timeout(LIFE, lived(&script, &mut outcome)).await;
    match ended {
        Ok(Ok(())) => {}
        Ok(Err(error)) => outcome.violations.push(format!("{error:#}")),
        Err(_) => outcome.violations.push(format!("the life did not end within {} s", LIFE.as_secs())),
    }
    outcome
}

async fn lived(script: &Script, outcome: &mut Outcome) -> Result<()> {
    let scene = PodScene::new(script).await?;
    let lived = run_faults(&scene, script, outcome).await;
    let examined = if lived.is_ok() { examine(&scene, outcome).await } else { Ok(()) };
    let secrets = secrets(&scene)?;
    for side in [Side::Agent, Side::Adaptor] {
        let found = scene.program(side).pid().map(|pid| secrets.in_process(pid));
        outcome.violations.extend(found.into_iter().flatten().map(|what| format!("{side:?}: {what}")));
    }
    let allowed = [scene.store.path(), scene.state.path(), &scene.directory().join("kbs-admin.pem")];
    let in_files = secrets.in_files(scene.directory(), &allowed);
    let PodScene { agent, adaptor, route, .. } = scene;
    for (side, program) in [(Side::Agent, agent), (Side::Adaptor, adaptor)] {
        let past = program.stop().await.with_context(|| format!("stopping the {side:?}"))?;
        outcome.violations.extend(past.own_ends.iter().filter_map(|status| {
            let excused = status.code() == Some(1) && script.has(|fault| keeps_from_starting(fault, side));
            (!excused).then(|| format!("the {side:?} ended by itself: {status}"))
        }));
        for log in past.logs {
            let found = secrets.in_text(log.as_bytes());
            outcome.violations.extend(found.iter().map(|what| format!("{side:?}: {what} in its log")));
            outcome.logs.push_str(&log);
            outcome.logs.push('\n');
        }
    }
    drop(route);
    outcome.violations.extend(in_files?);
    lived.and(examined)
}

/// Faults in which a program that starts says why it can't, and ends: whoever runs it starts it again.
fn keeps_from_starting(fault: &Fault, side: Side) -> bool {
    match fault {
        Fault::StoreFull
        | Fault::StoreReadOnly
        | Fault::KbsClock(_)
        | Fault::KbsBroken
        | Fault::KbsGarbage => side == Side::Adaptor,
        Fault::NoFiles(of, _) => *of == side,
        _ => false,
    }
}

/// The faults, and what comes after them.
async fn run_faults(scene: &PodScene, script: &Script, outcome: &mut Outcome) -> Result<()> {
    let places = [
        ("KATAAGENT", scene.kata_inbound),
        ("VMSERVICE", scene.vm_inbound),
        ("NODESERVICE", scene.node_inbound),
    ];
    if script.hit == Hit::Kubernetes {
        up(scene.kata_inbound, FIRST).await.context("before any fault")?;
    }
    let traffic = Traffic::start(&places, script.seed, script.request);
    let opened = Mutex::new(Vec::new());
    let faults = async {
        let strikes = script.faults.iter().map(|planned| inject_fault(scene, *planned));
        let (held, struck) = tokio::join!(hold(scene, script.hit), join_all(strikes));
        struck.into_iter().fold(held, Result::and)
    };
    let struck = tokio::select! {
        struck = faults => struck,
        error = strangers(scene, script, &opened) => error,
    };
    let over = Instant::now();
    struck?;
    let recovered = async {
        for (name, address) in places {
            up(address, BOUND).await.with_context(|| format!("after all faults: {name}"))?;
            outcome.recovery.get_or_insert_with(|| over.elapsed());
        }
        anyhow::Ok(())
    };
    recovered.await?;
    traffic.calm();
    let before = traffic.seen().finished;
    let calm = async {
        while traffic.seen().finished < before + CALM {
            sleep(PROBE).await;
        }
    };
    timeout(BOUND, calm).await.context("clients are no longer served, though nothing happened")?;
    outcome.seen = traffic.end().await;
    outcome.violations.append(&mut outcome.seen.violations);
    outcome.violations.extend(opened.into_inner().unwrap_or_else(PoisonError::into_inner));
    Ok(())
}

/// Until the KBS lets the VM have its keys, nobody may reach anything.
async fn hold(scene: &PodScene, hit: Hit) -> Result<()> {
    let Hit::Attestation(held) = hit else { return Ok(()) };
    sleep(held).await;
    for (name, server) in
        [("KATAAGENT", &scene.kata), ("VMSERVICE", &scene.vm_service), ("NODESERVICE", &scene.node_service)]
    {
        if server.connections().await > 0 {
            bail!("{name} was reached in the Attestation phase");
        }
    }
    scene.release_keys();
    Ok(())
}

/// Ends only if it could not begin.
async fn strangers(scene: &PodScene, script: &Script, opened: &Mutex<Vec<String>>) -> Result<()> {
    if let (true, Route::Proxy(_, agent)) = (script.stranger, &scene.route) {
        let tell = |what| opened.lock().unwrap_or_else(PoisonError::into_inner).push(what);
        return attacker::try_doors(*agent, scene.directory(), tell).await;
    }
    std::future::pending().await
}

/// Tries again and again until a request is answered.
pub(super) async fn up(address: SocketAddr, bound: Duration) -> Result<()> {
    let tries = async {
        let mut probes = JoinSet::new();
        let mut due = interval(PROBE);
        // Enough that one finds out soon, whatever the others are stuck in.
        const AT_ONCE: usize = 50;
        for number in 0.. {
            tokio::select! {
                _ = due.tick(), if probes.len() < AT_ONCE => drop(probes.spawn(request(address, number))),
                Some(done) = probes.join_next(), if !probes.is_empty() => if let Ok(Ok(())) = done {
                    return;
                },
            }
        }
    };
    timeout(bound, tries).await.with_context(|| format!("not up within {} s", bound.as_secs()))
}

/// What is so of every pod that is up and left alone.
async fn examine(scene: &PodScene, outcome: &mut Outcome) -> Result<()> {
    let before = scene.early.connections().await;
    let mut early = TcpStream::connect(scene.early_inbound).await.context("a client of EARLY")?;
    // It may be closed; a byte it must not get.
    if let Ok(Ok(1..)) = timeout(LISTEN, early.read(&mut [0])).await {
        outcome.violations.push("a client of an Attestation-phase tunnel got an answer".to_owned());
    }
    drop(early);
    if scene.early.connections().await > before {
        outcome.violations.push("an Attestation-phase tunnel was reached in the Kubernetes phase".to_owned());
    }
    if let Route::Proxy(_, agent) = &scene.route
        && attacker::may_attest(*agent).await
    {
        outcome.violations.push("a stranger may attest to a VM that runs a pod".to_owned());
    }
    for (side, most) in [(Side::Agent, AGENT), (Side::Adaptor, ADAPTOR)] {
        let (held, over) = idle(scene, side, &most).await?;
        match side {
            Side::Agent => outcome.agent = held,
            Side::Adaptor => outcome.adaptor = held,
        }
        outcome.violations.extend(over.map(|over| format!("the {side:?}, idle, holds {over}")));
    }
    Ok(())
}

/// What a process holds once its clients have left.
async fn idle(scene: &PodScene, side: Side, most: &Resources) -> Result<(Resources, Option<String>)> {
    let began = Instant::now();
    loop {
        let pid = scene.program(side).pid().with_context(|| format!("the {side:?} does not run"))?;
        let held = Resources::of(pid)?;
        let over = held.over(most);
        if over.is_none() || began.elapsed() > IDLE {
            return Ok((held, over));
        }
        sleep(PROBE).await;
    }
}

fn secrets(scene: &PodScene) -> Result<Secrets> {
    let mut secrets = Secrets::default();
    secrets.add_key("the KBS admin's key", scene.kbs.admin_key_pem())?;
    let pod = scene.kbs.resource(&format!("default/pp-{}/privateKey", scene.pod));
    if let Some(pem) = pod.filter(|pem| !pem.is_empty()) {
        secrets.add_key("the pod's key", std::str::from_utf8(&pem)?)?;
    }
    let node = std::fs::read_to_string(scene.store.path().join("worker-node.key"));
    if let Ok(pem) = node {
        secrets.add_key("the worker node's key", &pem)?;
    }
    secrets.check_any()?;
    Ok(secrets)
}
