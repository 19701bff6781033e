//! The real thing: lives over the adaptor's pods, the pods directory and the connections of cloud-api-adaptor.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use secure_comms_adaptor::address::Address;
use secure_comms_adaptor::pod::{PodSnapshot, PodState};
use secure_comms_adaptor::with_causes;
use secure_comms_adaptor::{AdaptorError, Deadline, Stopped};
use secure_comms_protocol::limits::SSH_PORT;
use secure_comms_protocol::tag::Host;
use secure_comms_protocol::{InitDataDigest, PodId, TunnelName};
use tokio::net::UnixStream;
use tokio::sync::watch;
use tokio::task::spawn_blocking;
use tokio::time::timeout;

use super::super::Sandbox;
use super::super::check::check;
use super::super::front::{CaaStream, Closed, Held, Refusal, Side, relay};
use super::super::strict::Identities;
use super::machine::{ReleaseFailure, StartFailure};
use super::world::{Dial, Failed, World};
use crate::init_data::InitDataPolicy;
use crate::pods::{Launch, Launcher, Pods, Runtime};

/// Time limit of one publication; it is tried again.
const PREPARE_TIME: Duration = Duration::from_secs(60);
/// How long the agent may take to confirm a stream.
const OPEN_TIME: Duration = Duration::from_secs(10);
/// How long the kata agent may take to answer.
const CHECK_TIME: Duration = Duration::from_secs(5);
/// How long a pod whose address a younger sandbox claims may be down before the claim counts: the patience of its runtime,
/// after which the VM of the older sandbox is lost anyway.
const LOST_AFTER: Duration = Duration::from_secs(33);

/// The parts of the service that lives need.
#[derive(Debug)]
pub(super) struct Node {
    pub(super) pods: Pods,
    pub(super) init_data: InitDataPolicy,
    pub(super) identities: Identities,
    /// Time limit of one start; it is tried again.
    pub(super) start_deadline: Duration,
}

impl Dial for Held {
    fn vm(&self) -> IpAddr {
        self.vm.ip().to_canonical()
    }

    fn server_name(&self) -> String {
        self.server_name.clone()
    }

    async fn closed(&mut self) -> String {
        match Self::closed(self).await {
            Closed::ByClient => "cloud-api-adaptor closed its connection before the pod could be used",
            Closed::Reset => "cloud-api-adaptor reset its connection before the pod could be used",
            Closed::Superseded => "newer connections with its server name took its place",
        }
        .to_owned()
    }

    fn refuse(self, reason: &str) {
        self.refuse_with(Refusal::UnknownPod, reason);
    }

    fn supersede(self) {
        self.superseded();
    }
}

impl Node {
    async fn expected_init_data(&self, sandbox: &Sandbox) -> Result<Option<InitDataDigest>, String> {
        let (policy, name) = (self.init_data.clone(), sandbox.name.clone());
        // Rules are files.
        let expected = spawn_blocking(move || policy.of(name.as_ref())).await;
        match expected {
            Ok(expected) => expected.map_err(|error| format!("init-data: {error}")),
            Err(error) => Err(format!("init-data: {error}")),
        }
    }

    /// How the pod is launched; an error if another launcher has it.
    fn launch(&self, sandbox: &Sandbox) -> Result<Launch, String> {
        let mut launch = Launch::now(Launcher::Caa, sandbox.name.clone());
        if let Some(earlier) = self.pods.get(&sandbox.id).map(|pod| pod.launch) {
            if let Some(launcher) = earlier.launcher.filter(|launcher| *launcher != Launcher::Caa) {
                return Err(format!("a pod of this id was launched by {launcher}: stop it there"));
            }
            launch.created = earlier.created.or(launch.created);
        }
        Ok(launch)
    }

    fn is_ours(&self, id: &PodId) -> bool {
        self.pods
            .get(id)
            .is_none_or(|pod| pod.launch.launcher.is_none_or(|launcher| launcher == Launcher::Caa))
    }

    /// Waits for a start that is under way, or was made by an earlier process.
    async fn await_start(
        &self,
        id: &PodId,
        address: &Address,
        deadline: Deadline,
    ) -> Result<(), Failed<StartFailure>> {
        let failed = |failure, reason: &str| Err(Failed { failure, reason: reason.to_owned() });
        let Some(mut pod) = self.pods.subscribe(id) else {
            return failed(StartFailure::NotPrepared, "the pod is not served");
        };
        loop {
            let now = pod.borrow_and_update().clone();
            if !now.addresses.iter().all(|at| at == address) {
                self.pods.adaptor().suspend(id).await;
                return failed(StartFailure::NotPrepared, "the pod was started at another address");
            }
            match now.state {
                PodState::Up { .. } => return Ok(()),
                PodState::Failed { reason } => return failed(StartFailure::Again, &reason),
                PodState::Connecting { .. }
                | PodState::Attesting { .. }
                | PodState::Upgrading
                | PodState::Down { .. }
                | PodState::Preparing
                | PodState::Prepared => {}
                _ => return failed(StartFailure::NotPrepared, "the pod was stopped"),
            }
            match timeout(deadline.left(), pod.changed()).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) => return failed(StartFailure::NotPrepared, "the pod was stopped"),
                Err(_) => {
                    let seconds = self.start_deadline.as_secs();
                    return failed(StartFailure::Again, &format!("not up within {seconds} s"));
                }
            }
        }
    }

    async fn await_up(&self, id: &PodId) -> Result<(), Failed<ReleaseFailure>> {
        let lost =
            || Failed { failure: ReleaseFailure::Lost, reason: "the pod is not served any more".to_owned() };
        let mut pod = self.pods.subscribe(id).ok_or_else(lost)?;
        loop {
            match &pod.borrow_and_update().state {
                PodState::Up { .. } => return Ok(()),
                PodState::Down { .. } => {}
                _ => return Err(lost()),
            }
            pod.changed().await.map_err(|_| lost())?;
        }
    }

    /// What the end of the VM's side comes from.
    fn channel_state(&self, id: &PodId) -> String {
        match self.pods.get(id).map(|pod| pod.snapshot.state) {
            Some(PodState::Down { reason } | PodState::Failed { reason }) => {
                format!(" (channel down: {reason})")
            }
            Some(PodState::Up { .. }) => String::new(),
            _ => " (the pod was stopped)".to_owned(),
        }
    }
}

impl World for Node {
    type Dial = Held;
    type Client = CaaStream;
    type Stream = UnixStream;

    async fn sandbox_of(&self, dial: &Held) -> Result<Arc<Sandbox>, String> {
        let sandbox = self.identities.sandbox(&dial.server_name, dial.vm.ip()).await?;
        dial.recognise();
        Ok(sandbox)
    }

    async fn prepare(&self, sandbox: &Sandbox) -> Result<(), String> {
        let launch = self.launch(sandbox)?;
        let init_data = self.expected_init_data(sandbox).await?;
        let deadline = Deadline::after(PREPARE_TIME);
        let prepared = self.pods.prepare(&sandbox.id, &launch, init_data, deadline).await;
        prepared.map(drop).map_err(|error| with_causes(&error))
    }

    async fn start(&self, id: &PodId, vm: IpAddr) -> Result<(), Failed<StartFailure>> {
        let address = Address { host: Host::Ip(vm), port: SSH_PORT };
        let deadline = Deadline::after(self.start_deadline);
        let failure = match self.pods.start(id, std::slice::from_ref(&address), deadline).await {
            Ok(()) => return Ok(()),
            Err(AdaptorError::AlreadyStarted(_)) => return self.await_start(id, &address, deadline).await,
            Err(error) => {
                let failure = match error {
                    AdaptorError::UnexpectedAgent { .. } => StartFailure::Final,
                    AdaptorError::NotPrepared(_) | AdaptorError::Stopped(_) | AdaptorError::TaskEnded(_) => {
                        StartFailure::NotPrepared
                    }
                    _ => StartFailure::Again,
                };
                Failed { failure, reason: with_causes(&error) }
            }
        };
        Err(failure)
    }

    async fn halt(&self, id: &PodId) {
        if self.is_ours(id) {
            self.pods.adaptor().suspend(id).await;
        }
    }

    async fn stop(&self, id: &PodId) -> Result<(), String> {
        if !self.is_ours(id) {
            return Ok(());
        }
        match self.pods.stop(id).await {
            Ok(Stopped::Done) => Ok(()),
            Ok(Stopped::Retried(error)) => {
                Err(format!("{}; it is retried until it is done", with_causes(&error)))
            }
            Err(error) => Err(with_causes(&error)),
        }
    }

    async fn check(&self, id: &PodId) -> Result<(), Failed<ReleaseFailure>> {
        let stream = self.open(id).await?;
        let checked = check(stream, CHECK_TIME).await;
        checked.map_err(|error| Failed { failure: ReleaseFailure::Again, reason: with_causes(&error) })
    }

    async fn open(&self, id: &PodId) -> Result<UnixStream, Failed<ReleaseFailure>> {
        self.await_up(id).await?;
        let again = |reason| Failed { failure: ReleaseFailure::Again, reason };
        match timeout(OPEN_TIME, self.pods.open(id, &TunnelName::kata_agent())).await {
            Ok(Ok(stream)) => Ok(stream),
            Ok(Err(error @ (AdaptorError::NotPrepared(_) | AdaptorError::TaskEnded(_)))) => {
                Err(Failed { failure: ReleaseFailure::Lost, reason: with_causes(&error) })
            }
            Ok(Err(error)) => Err(again(with_causes(&error))),
            Err(_) => Err(again(format!("the agent has not confirmed it within {} s", OPEN_TIME.as_secs()))),
        }
    }

    async fn finish(&self, dial: Held, sandbox: &Sandbox) -> Result<CaaStream, String> {
        let identity = self.identities.identity(&dial.server_name, sandbox)?;
        dial.finish(identity).await.map_err(|error| with_causes(&error))
    }

    async fn relay(&self, id: &PodId, client: CaaStream, stream: UnixStream) -> String {
        let end = relay(client, stream).await;
        let (by, channel) = match end.by {
            Side::Runtime => ("cloud-api-adaptor", String::new()),
            Side::Pod => ("the VM's side", self.channel_state(id)),
        };
        let (to_vm, from_vm) = (end.to_vm, end.from_vm);
        format!("{by}: {}{channel} ({to_vm} bytes to the VM, {from_vm} from it)", end.reason)
    }

    async fn until_down(&self, id: &PodId) {
        let Some(mut pod) = self.pods.subscribe(id) else { return };
        until_lost(&mut pod).await;
    }

    fn show(&self, id: &PodId, runtime: Runtime) {
        self.pods.set_runtime(id, runtime);
    }

    fn obstacle(&self, id: &PodId, sandbox: Option<&Sandbox>, reason: Option<String>) {
        let name = sandbox.and_then(|sandbox| sandbox.name.clone());
        self.pods.set_obstacle(id, &Launch::now(Launcher::Caa, name), reason);
    }
}

/// Completes once the pod has ended or failed, or was not up for [`LOST_AFTER`] without a break. A shorter interruption, as
/// a reset of its line, says nothing of who has the address.
async fn until_lost(pod: &mut watch::Receiver<PodSnapshot>) {
    let is_up = |now: &PodSnapshot| matches!(now.state, PodState::Up { .. });
    let is_over = |now: &PodSnapshot| !is_up(now) && !matches!(now.state, PodState::Down { .. });
    loop {
        // An error: it has ended.
        let Ok(down_for) = pod.wait_for(|now| !is_up(now)).await.map(|now| now.since.elapsed()) else {
            return;
        };
        let left = LOST_AFTER.saturating_sub(down_for.unwrap_or_default());
        match timeout(left, pod.wait_for(|now| is_up(now) || is_over(now))).await {
            Ok(Ok(now)) if is_up(&now) => {}
            _ => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use tokio::time::sleep;

    use super::*;

    fn snapshot(state: PodState) -> PodSnapshot {
        PodSnapshot {
            state,
            since: SystemTime::now(),
            labels: Default::default(),
            addresses: Vec::new(),
            endpoints: Vec::new(),
            init_data: None,
            session: None,
        }
    }

    fn up() -> PodState {
        PodState::Up { instance: "one".to_owned() }
    }

    fn down() -> PodState {
        PodState::Down { reason: "cut".to_owned() }
    }

    #[tokio::test(start_paused = true)]
    async fn a_short_interruption_loses_no_address() {
        let (sender, mut pod) = watch::channel(snapshot(up()));
        let lost = tokio::spawn(async move { until_lost(&mut pod).await });
        for _ in 0..3 {
            sender.send_replace(snapshot(down()));
            sleep(LOST_AFTER - Duration::from_secs(1)).await;
            assert!(!lost.is_finished(), "its runtime still waits");
            sender.send_replace(snapshot(up()));
            sleep(2 * LOST_AFTER).await;
        }
        assert!(!lost.is_finished());
        sender.send_replace(snapshot(down()));
        sleep(LOST_AFTER + Duration::from_secs(1)).await;
        assert!(lost.is_finished(), "down for longer than its runtime waits");
    }

    #[tokio::test(start_paused = true)]
    async fn the_time_before_the_claim_counts() {
        let since = SystemTime::now().checked_sub(LOST_AFTER / 2).unwrap();
        let (_sender, mut pod) = watch::channel(PodSnapshot { since, ..snapshot(down()) });
        let lost = tokio::spawn(async move { until_lost(&mut pod).await });
        sleep(LOST_AFTER / 2 + Duration::from_secs(1)).await;
        assert!(lost.is_finished(), "down for longer than its runtime waits");
    }

    #[tokio::test(start_paused = true)]
    async fn a_pod_that_ends_loses_its_address_at_once() {
        for end in [PodState::Failed { reason: "another agent".to_owned() }, PodState::Stopped] {
            for before in [up(), down()] {
                let (sender, mut pod) = watch::channel(snapshot(before));
                let lost = tokio::spawn(async move { until_lost(&mut pod).await });
                sleep(Duration::from_secs(1)).await;
                assert!(!lost.is_finished());
                sender.send_replace(snapshot(end.clone()));
                sleep(Duration::from_secs(1)).await;
                assert!(lost.is_finished(), "{end:?}");
            }
        }
    }
}
