//! The driver against simulated agents, where a test needs other limits than an adaptor sets.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use secure_comms_keys::{PodKey, WorkerNodeKey};
use secure_comms_protocol::AgentConfig;
use secure_comms_protocol::limits::REKEY_BYTES;
use secure_comms_protocol::tag::parse_list;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

use super::{
    AgentTunnels, AttestationLimits, Driver, Ended, Entry, ExpectedAgent, Plan, PodSnapshot, PodState,
    StatusReporter, Stop,
};
use crate::key_source::KeySource;
use crate::support::agent::{Agent, Mode};
use crate::support::{KATAAGENT, Lines, PATIENCE, addresses, pod};
use crate::transport::session::Tunnels;

const LONG: Duration = Duration::from_secs(600);

/// A driver, what it reports, and the keys of its pod.
struct Driven {
    driver: Driver,
    events: Lines,
    now: watch::Receiver<PodSnapshot>,
    order: watch::Sender<Option<Stop>>,
    latched: Mode,
}

impl Driven {
    fn new(at: &[SocketAddr], limits: AttestationLimits) -> Self {
        let (node_key, key) = (WorkerNodeKey::generate().unwrap(), PodKey::generate().unwrap());
        let latched = Mode::kubernetes(key.clone(), node_key.public().unwrap());
        let (inbounds, outbounds) = (parse_list(KATAAGENT).unwrap(), parse_list("").unwrap());
        let expected = ExpectedAgent::new(&pod(), &node_key, None, &AgentTunnels::default());
        let plan = Plan {
            id: pod(),
            addresses: addresses(at),
            node_key,
            pod_key: key.public().unwrap(),
            expected: Arc::new(expected),
            attestation: KeySource::Kbs(Tunnels::new(&inbounds, &outbounds, true)),
            kubernetes: Tunnels::new(&inbounds, &outbounds, true),
            rekey_bytes: REKEY_BYTES,
            attestation_limits: limits,
        };
        let events = Lines::default();
        let recorded = events.clone();
        let status = StatusReporter::new(pod(), Arc::new(move |_, event| recorded.push(event.to_string())));
        let now = status.subscribe();
        let (order, orders) = watch::channel(None);
        let driver = Driver::new(plan, Arc::default(), status, orders);
        Self { driver, events, now, order, latched }
    }

    async fn until_up(self, entry: Entry) {
        let Self { driver, mut now, order, events, .. } = self;
        let up = async {
            let up = now.wait_for(|now| matches!(now.state, PodState::Up { .. }));
            let up = timeout(PATIENCE, up).await.is_ok();
            assert!(up, "{:#?}", events.all());
            order.send_replace(Some(Stop { reason: "done", drain: Duration::ZERO }));
        };
        let (ended, ()) = tokio::join!(driver.run(entry), up);
        assert_eq!(ended, Ended::Stopped);
    }
}

/// An agent that answers nothing yet, as one whose VM is booting.
fn booting(latched: &Mode) -> Mode {
    Mode { hangs_up: true, ..latched.clone() }
}

/// A VM that has another pod's keys.
fn lost() -> Mode {
    let node = WorkerNodeKey::generate().unwrap().public().unwrap();
    Mode::kubernetes(PodKey::generate().unwrap(), node)
}

#[tokio::test]
async fn an_agent_that_reports_nothing_does_not_keep_the_pod() {
    let limits = AttestationLimits { progress: Duration::from_secs(1), total: LONG };
    for entry in [Entry::New, Entry::Restarted] {
        // It answers pings, as an agent does, and has nothing else to say.
        let impostor = Agent::start(Mode::attestation()).await;
        let agent = Agent::start(Mode::attestation()).await;
        let driven = Driven::new(&[impostor.address, agent.address], limits);
        agent.become_(booting(&driven.latched));
        let (events, latched) = (driven.events.clone(), driven.latched.clone());
        let vm = async {
            events.wait("attestation: connected to", 1).await;
            agent.become_(latched);
            events
                .wait("the agent reported nothing on its keys within 1 s; trying every address again", 1)
                .await;
        };
        tokio::join!(driven.until_up(entry), vm);
    }
}

#[tokio::test]
async fn an_agent_that_never_gets_its_keys_does_not_keep_the_pod() {
    let impostor = Agent::start(Mode::attestation()).await;
    let agent = Agent::start(Mode::attestation()).await;
    let limits = AttestationLimits { progress: LONG, total: Duration::from_secs(2) };
    let driven = Driven::new(&[impostor.address, agent.address], limits);
    agent.become_(booting(&driven.latched));
    let (events, latched) = (driven.events.clone(), driven.latched.clone());
    let vm = async {
        events.wait("attestation: connected to", 1).await;
        agent.become_(latched);
        for attempt in 1..20 {
            impostor.keys(attempt, "not yet");
            sleep(Duration::from_millis(100)).await;
        }
        events.wait("the agent did not get its keys within 2 s", 1).await;
    };
    tokio::join!(driven.until_up(Entry::New), vm);
}

#[tokio::test]
async fn reports_on_the_keys_keep_an_attestation() {
    let agent = Agent::start(Mode::attestation()).await;
    let limits = AttestationLimits { progress: Duration::from_secs(2), total: LONG };
    let driven = Driven::new(&[agent.address], limits);
    let (events, latched) = (driven.events.clone(), driven.latched.clone());
    let vm = async {
        agent.seen.wait("hello", 1).await;
        for attempt in 1..12 {
            agent.keys(attempt, "not yet");
            sleep(Duration::from_millis(250)).await;
        }
        agent.upgrade(latched);
    };
    tokio::join!(driven.until_up(Entry::New), vm);
    assert_eq!(events.count("connection ended"), 0, "{:?}", events.all());
}

#[tokio::test]
async fn one_lost_vm_among_the_addresses_does_not_fail_a_start() {
    // A stale address that is another pod's now comes first, and then last.
    for stale_first in [true, false] {
        let stale = Agent::start(lost()).await;
        let agent = Agent::start(Mode::attestation()).await;
        let mut at = vec![stale.address, agent.address];
        if !stale_first {
            at.reverse();
        }
        let driven = Driven::new(&at, AttestationLimits::default());
        agent.become_(booting(&driven.latched));
        let (events, latched) = (driven.events.clone(), driven.latched.clone());
        let vm = async {
            events.wait("connecting: ", 1).await;
            agent.become_(latched);
        };
        tokio::join!(driven.until_up(Entry::New), vm);
    }
}

#[tokio::test]
async fn a_start_fails_if_every_address_has_a_lost_vm() {
    let agents = [Agent::start(lost()).await, Agent::start(lost()).await];
    let driven = Driven::new(&agents.map(|agent| agent.address), AttestationLimits::default());
    let ended = timeout(PATIENCE, driven.driver.run(Entry::New)).await;
    assert_eq!(ended.unwrap(), Ended::VmLost);
}

#[tokio::test]
async fn no_address_at_all_is_no_lost_vm() {
    let driven = Driven::new(&[], AttestationLimits::default());
    let (events, order) = (driven.events.clone(), driven.order);
    let stop = async {
        events.wait("connecting: ", 1).await;
        order.send_replace(Some(Stop { reason: "done", drain: Duration::ZERO }));
    };
    let (ended, ()) = tokio::join!(driven.driver.run(Entry::New), stop);
    assert_eq!(ended, Ended::Stopped);
}

/// What an agent says whose unmeasured configuration sends the runtime elsewhere.
fn redirected(mode: &Mode) -> Mode {
    let config = AgentConfig {
        outbounds: vec!["KUBERNETES_PHASE:KATAAGENT:evil.example:1234".into()],
        ..mode.config().unwrap()
    };
    Mode { config: Some(config), ..mode.clone() }
}

#[tokio::test]
async fn a_start_with_an_unexpected_agent_fails_at_once() {
    let agent = Agent::start(Mode::attestation()).await;
    let driven = Driven::new(&[agent.address], AttestationLimits::default());
    agent.become_(redirected(&driven.latched));
    let ended = timeout(PATIENCE, driven.driver.run(Entry::New)).await.unwrap();
    let Ended::Unexpected(why) = ended else { panic!("{ended:?}") };
    assert!(
        why.contains("its outbound KUBERNETES_PHASE:KATAAGENT:evil.example:1234 is not expected"),
        "{why}"
    );
    agent.seen.wait("control ended: the peer said bye: the agent is refused", 1).await;
    assert_eq!(driven.events.count("up"), 0, "{:?}", driven.events.all());
}

#[tokio::test]
async fn an_unexpected_agent_after_the_start_is_down_and_retried() {
    let agent = Agent::start(Mode::attestation()).await;
    let driven = Driven::new(&[agent.address], AttestationLimits::default());
    agent.become_(redirected(&driven.latched));
    let (events, latched, now) = (driven.events.clone(), driven.latched.clone(), driven.now.clone());
    let vm = async {
        events.wait("the agent is refused, no client was connected to it", 2).await;
        let state = now.borrow().state.clone();
        assert!(!matches!(state, PodState::Up { .. }), "{state:?}");
        agent.become_(latched);
    };
    tokio::join!(driven.until_up(Entry::Restarted), vm);
}

#[tokio::test]
async fn a_reconnect_to_an_unexpected_agent_gets_no_client() {
    let agent = Agent::start(Mode::attestation()).await;
    let driven = Driven::new(&[agent.address], AttestationLimits::default());
    let Driven { driver, events, now: mut states, order, latched } = driven;
    agent.become_(latched.clone());
    let vm = async {
        let up = states.wait_for(|now| matches!(now.state, PodState::Up { .. })).await;
        assert!(up.is_ok());
        agent.become_(redirected(&latched));
        agent.cut();
        events.wait("the agent is refused, no client was connected to it", 1).await;
        agent.become_(latched);
        events.wait("kubernetes phase up", 2).await;
        order.send_replace(Some(Stop { reason: "done", drain: Duration::ZERO }));
    };
    let (ended, ()) = tokio::join!(driver.run(Entry::New), vm);
    assert_eq!(ended, Ended::Stopped);
}
