//! The driver against simulated agents, where a test needs other limits than an adaptor sets.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use secure_comms_keys::{PodKey, WorkerNodeKey};
use secure_comms_protocol::limits::REKEY_BYTES;
use secure_comms_protocol::tag::parse_list;
use secure_comms_protocol::{AgentConfig, PhaseName};
use secure_comms_ssh::profile::KeyExchange;
use secure_comms_tunnel::Account;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

use super::candidates::Candidates;
use super::connect::Failure;
use super::{
    AgentTunnels, AttestationLimits, Driver, Ended, Entry, ExpectedAgent, LOST, LaneLimits, LostLimits, Plan,
    PodSnapshot, PodState, StatusReporter, Stop,
};
use crate::key_source::KeySource;
use crate::publication::Given;
use crate::support::agent::{Agent, Mode};
use crate::support::{KATAAGENT, Lines, PATIENCE, addresses, pod};
use crate::transport::agent_connection::Tunnels;
use crate::transport::ssh::{Admission, Flag};

const LONG: Duration = Duration::from_secs(600);

/// A driver, what it reports, and the keys of its pod.
struct Driven {
    driver: Driver,
    events: Lines,
    now: watch::Receiver<PodSnapshot>,
    order: watch::Sender<Option<Stop>>,
    latched: Mode,
}

/// A plan without addresses, and an agent that has its keys.
pub(super) fn plan(inbounds: &str, outbounds: &str) -> (Plan, Mode) {
    let (node_key, key) = (WorkerNodeKey::generate().unwrap(), PodKey::generate().unwrap());
    let latched = Mode::kubernetes(key.clone(), node_key.public().unwrap());
    let (inbounds, outbounds) = (parse_list(inbounds).unwrap(), parse_list(outbounds).unwrap());
    let expected = ExpectedAgent::new(&pod(), &node_key, &Given::default(), &AgentTunnels::default());
    let plan = Plan {
        id: pod(),
        addresses: Vec::new(),
        node_key,
        pod_key: key.public().unwrap(),
        publication: None,
        expected: Arc::new(expected),
        attestation: KeySource::Kbs(Tunnels::new(&inbounds, &outbounds, true)),
        kubernetes: Tunnels::new(&inbounds, &outbounds, true),
        rekey_bytes: REKEY_BYTES,
        kex: KeyExchange::Any,
        admission: Admission::default(),
        attestation_limits: patient(),
        lost_limits: LostLimits::for_start(LONG),
        lane_limits: LaneLimits::default(),
        answered: Flag::default(),
        account: Account::unlimited(),
        session: None,
    };
    (plan, latched)
}

impl Driven {
    fn new(at: &[SocketAddr], limits: AttestationLimits) -> Self {
        let (plan, latched) = plan(KATAAGENT, "");
        let plan = Plan { addresses: addresses(at), attestation_limits: limits, ..plan };
        let events = Lines::default();
        let recorded = events.clone();
        let status = StatusReporter::new(pod(), Arc::new(move |_, event| recorded.push(event.to_string())));
        let now = status.subscribe();
        let (order, orders) = watch::channel(None);
        let driver = Driver::new(plan, Arc::default(), status, orders);
        Self { driver, events, now, order, latched }
    }

    fn lost_after(mut self, limits: LostLimits) -> Self {
        self.driver.plan.lost_limits = limits;
        self
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

/// Limits that no test reaches.
fn patient() -> AttestationLimits {
    AttestationLimits { progress: LONG, total: LONG, share: LONG }
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
async fn an_agent_that_reports_nothing_is_connected_to_again() {
    let limits = AttestationLimits { progress: Duration::from_secs(1), ..patient() };
    for entry in [Entry::New, Entry::Restarted] {
        // It answers pings, as an agent does, and has nothing else to say.
        let agent = Agent::start(Mode::attestation()).await;
        let driven = Driven::new(&[agent.address], limits);
        let (events, latched) = (driven.events.clone(), driven.latched.clone());
        let vm = async {
            events.wait("attestation: connected to", 1).await;
            agent.become_(latched);
            events.wait("the agent reported nothing on its keys within 1 s; connecting again", 1).await;
        };
        tokio::join!(driven.until_up(entry), vm);
    }
}

#[tokio::test]
async fn an_agent_that_never_gets_its_keys_is_connected_to_again() {
    let agent = Agent::start(Mode::attestation()).await;
    let limits = AttestationLimits { total: Duration::from_secs(2), ..patient() };
    let driven = Driven::new(&[agent.address], limits);
    let (events, latched) = (driven.events.clone(), driven.latched.clone());
    let vm = async {
        events.wait("attestation: connected to", 1).await;
        agent.become_(latched);
        for attempt in 1..20 {
            agent.keys(attempt, "not yet");
            sleep(Duration::from_millis(100)).await;
        }
        events.wait("the agent did not get its keys within 2 s", 1).await;
    };
    tokio::join!(driven.until_up(Entry::New), vm);
}

#[tokio::test]
async fn reports_on_the_keys_keep_an_attestation() {
    let agent = Agent::start(Mode::attestation()).await;
    let limits = AttestationLimits { progress: Duration::from_secs(4), ..patient() };
    let driven = Driven::new(&[agent.address], limits);
    let (events, latched) = (driven.events.clone(), driven.latched.clone());
    let vm = async {
        agent.seen.wait("hello", 1).await;
        // For longer than that.
        for attempt in 1..18 {
            agent.keys(attempt, "not yet");
            sleep(Duration::from_millis(250)).await;
        }
        agent.upgrade(latched);
    };
    tokio::join!(driven.until_up(Entry::New), vm);
    assert_eq!(events.count("connection ended"), 0, "{:?}", events.all());
}

#[tokio::test]
async fn a_stranger_that_attests_holds_up_no_other_address() {
    for entry in [Entry::New, Entry::Restarted] {
        let impostor = Agent::start(Mode::attestation()).await;
        let agent = Agent::start(Mode::attestation()).await;
        let driven = Driven::new(&[impostor.address, agent.address], patient());
        let (events, now, latched) = (driven.events.clone(), driven.now.clone(), driven.latched.clone());
        let vm = async {
            impostor.seen.wait("hello", 1).await;
            agent.seen.wait("hello", 1).await;
            impostor.keys(7, "no");
            let named = format!("keys: attempt 7: {}: no", impostor.address);
            events.wait(&named, 1).await;
            let shown =
                PodState::Attesting { attempt: 7, last_error: Some(format!("{}: no", impostor.address)) };
            assert_eq!(now.borrow().state, shown);
            agent.upgrade(latched);
            impostor
                .seen
                .wait("the peer said bye: the Kubernetes phase is up on another connection", 1)
                .await;
        };
        tokio::join!(driven.until_up(entry), vm);
        assert_eq!(events.count(&format!("kubernetes phase up at {}", agent.address)), 1);
        assert_eq!(impostor.seen.count("hello pod-1"), 1, "{:?}", impostor.seen.all());
    }
}

#[tokio::test]
async fn forged_upgrades_disturb_no_other_session() {
    let impostor = Agent::start(Mode::attestation()).await;
    let agent = Agent::start(Mode::attestation()).await;
    let driven = Driven::new(&[impostor.address, agent.address], patient());
    let (events, latched) = (driven.events.clone(), driven.latched.clone());
    let vm = async {
        agent.seen.wait("hello", 1).await;
        for forged in 1..4 {
            impostor.seen.wait("hello", forged).await;
            impostor.upgrade(Mode::attestation());
        }
        events.wait(&format!("attestation done at {}", impostor.address), 3).await;
        assert_eq!(agent.seen.count("connection"), 1, "{:?}", agent.seen.all());
        agent.upgrade(latched);
    };
    tokio::join!(driven.until_up(Entry::New), vm);
    assert_eq!(events.count("connection ended"), 0, "{:?}", events.all());
}

#[tokio::test]
async fn more_strangers_than_slots_do_not_keep_the_agent_out() {
    let mut strangers = Vec::new();
    for _ in 0..9 {
        strangers.push(Agent::start(Mode::attestation()).await);
    }
    let agent = Agent::start(Mode::attestation()).await;
    let mut at: Vec<_> = strangers.iter().map(|stranger| stranger.address).collect();
    at.push(agent.address);
    let driven = Driven::new(&at, AttestationLimits { share: Duration::from_secs(1), ..patient() });
    let (events, latched) = (driven.events.clone(), driven.latched.clone());
    let vm = async {
        agent.seen.wait("hello", 1).await;
        assert_ne!(events.count("within 1 s; other addresses wait"), 0, "{:?}", events.all());
        agent.upgrade(latched);
    };
    tokio::join!(driven.until_up(Entry::New), vm);
}

#[tokio::test]
async fn a_stranger_that_hangs_up_does_not_slow_another_address_down() {
    let impostor = Agent::start(Mode { hangs_up: true, ..Mode::attestation() }).await;
    let agent = Agent::start(Mode { hangs_up: true, ..Mode::attestation() }).await;
    let driven = Driven::new(&[impostor.address, agent.address], patient());
    let latched = driven.latched.clone();
    let vm = async {
        impostor.seen.wait("auth attestation", 3).await;
        agent.become_(latched);
    };
    tokio::join!(driven.until_up(Entry::New), vm);
}

/// One finding is enough, so that whatever withholds the verdict is not time.
const AT_ONCE: LostLimits = LostLimits { rounds: 1, time: Duration::ZERO };

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
        let driven = Driven::new(&at, patient()).lost_after(AT_ONCE);
        agent.become_(booting(&driven.latched));
        let (events, latched) = (driven.events.clone(), driven.latched.clone());
        let vm = async {
            events.wait("connecting: ", 1).await;
            stale.seen.wait("auth attestation", 3).await;
            agent.become_(latched);
        };
        tokio::join!(driven.until_up(Entry::New), vm);
        assert_eq!(events.count("lost to this pod"), 0, "{:?}", events.all());
    }
}

#[tokio::test]
async fn a_start_fails_if_every_address_goes_on_showing_a_lost_vm() {
    let agents = [Agent::start(lost()).await, Agent::start(lost()).await];
    let limits = LostLimits { rounds: 3, time: Duration::from_millis(500) };
    let driven = Driven::new(&agents.each_ref().map(|agent| agent.address), patient()).lost_after(limits);
    let events = driven.events.clone();
    let ended = timeout(PATIENCE, driven.driver.run(Entry::New)).await;
    assert_eq!(ended.unwrap(), Ended::VmLost);
    assert_eq!(
        events.count("the start fails only if every address goes on like this"),
        1,
        "{:?}",
        events.all()
    );
    for agent in agents {
        // A finding takes one refusal to attest, and one before it finds the phase.
        assert!(agent.seen.count("auth attestation") >= 3, "{:?}", agent.seen.all());
    }
}

#[tokio::test]
async fn a_stranger_that_poses_as_a_lost_vm_delays_a_start_only_as_long_as_it_lasts() {
    let agent = Agent::start(lost()).await;
    let driven = Driven::new(&[agent.address], patient());
    let (events, now, latched) = (driven.events.clone(), driven.now.clone(), driven.latched.clone());
    let vm = async {
        events.wait("it is lost to this pod", 1).await;
        let state = now.borrow().state.clone();
        assert!(
            matches!(&state, PodState::Connecting { last_error: Some(why) } if why.contains(LOST)),
            "{state:?}"
        );
        agent.seen.wait("auth attestation", 8).await;
        agent.become_(latched);
    };
    tokio::join!(driven.until_up(Entry::New), vm);
}

#[tokio::test]
async fn a_stranger_with_a_new_host_key_each_time_is_no_lost_vm() {
    let agent = Agent::start(lost()).await;
    let driven = Driven::new(&[agent.address], patient()).lost_after(AT_ONCE);
    agent.script((0..16).map(|_| lost()).chain([driven.latched.clone()]).collect::<Vec<_>>());
    driven.until_up(Entry::New).await;
}

#[tokio::test]
async fn a_name_that_cannot_be_looked_up_withholds_the_verdict() {
    let agent = Agent::start(lost()).await;
    let mut driven = Driven::new(&[agent.address], patient()).lost_after(AT_ONCE);
    driven.driver.plan.addresses.push("no-such-name.invalid:2222".parse().unwrap());
    let (events, latched) = (driven.events.clone(), driven.latched.clone());
    let vm = async {
        events.wait("no-such-name.invalid", 1).await;
        agent.seen.wait("auth attestation", 4).await;
        agent.become_(latched);
    };
    tokio::join!(driven.until_up(Entry::New), vm);
}

#[tokio::test]
async fn every_address_that_a_name_resolves_to_counts() {
    let mut driven = Driven::new(&[], patient());
    driven.driver.plan.addresses.push("no-such-name.invalid:2222".parse().unwrap());
    let mut candidates = Candidates::new(&driven.driver.plan, PhaseName::Attestation, None);
    let at = |last| SocketAddr::from(([127, 0, 0, last], 1));
    let lost = |last| {
        let mut failure = Failure::new(at(last));
        failure.vm_lost = true;
        failure
    };
    assert!(!candidates.lost_for_good(AT_ONCE), "not looked up yet");
    candidates.on_lookup(0, Ok(vec![at(1), at(2)]));
    candidates.failed(at(1), lost(1));
    assert!(!candidates.lost_for_good(AT_ONCE) && !candidates.all_failed());
    candidates.failed(at(2), lost(2));
    assert!(candidates.lost_for_good(AT_ONCE));
    // Another address appears, and answers something else.
    candidates.on_lookup(0, Ok(vec![at(1), at(2), at(3)]));
    assert!(!candidates.lost_for_good(AT_ONCE));
    candidates.failed(at(3), Failure::new(at(3)));
    assert!(!candidates.lost_for_good(AT_ONCE) && candidates.all_failed());
    // It disappears again; then the name cannot be looked up.
    candidates.on_lookup(0, Ok(vec![at(2), at(1)]));
    assert!(candidates.lost_for_good(AT_ONCE));
    candidates.on_lookup(0, Err(Failure::new("no-such-name.invalid:2222")));
    assert!(!candidates.lost_for_good(AT_ONCE) && !candidates.all_lost());
    assert_eq!(candidates.failures().len(), 3);
}

#[tokio::test]
async fn no_address_at_all_is_no_lost_vm() {
    let driven = Driven::new(&[], patient());
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
        assert!(states.wait_for(|now| matches!(now.state, PodState::Up { .. })).await.is_ok());
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
