//! The kata agent's protocol, end to end: a runtime that speaks ttrpc, adaptor, agent, and a kata agent that records its
//!  requests. Runtime and kata agent are the `ttrpc` crate's client and server, as in kata itself. Needs root, for a network
//!  namespace and for mounts.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)] // a test's helpers fail as the test does

#[path = "kata_agent/cloud_volumes.rs"]
mod cloud_volumes;
#[path = "kata_agent/sources.rs"]
mod sources;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use secure_comms_tests::harness::process::Child;
use secure_comms_tests::harness::scene::{PATIENCE, Scene, SceneOptions, client, endpoint, says, up};
use secure_comms_tests::harness::test_namespace::TestNamespace;
use secure_comms_tests::simulators::kata_api::VOLUMES;
use secure_comms_tests::simulators::kata_api::api::agent::{
    CopyFileRequest, CreateContainerRequest, CreateSandboxRequest, DestroySandboxRequest, GetOOMEventRequest,
    GuestDetailsRequest, ReadStreamRequest, RemoveContainerRequest, RemoveStaleVirtiofsShareMountsRequest,
    SignalProcessRequest, StartContainerRequest, Storage, WaitProcessRequest,
};
use secure_comms_tests::simulators::kata_api::api::oci::{Linux, LinuxNamespace, Mount, Spec};
use secure_comms_tests::simulators::kata_api::client::Runtime;
use secure_comms_tests::simulators::kata_api::protobuf::{Message, MessageField};
use secure_comms_tests::simulators::kata_api::server::{KataServer, OWN_DIRECTORY, Request, output};
use secure_comms_tests::simulators::kata_api::ttrpc::Error;
use secure_comms_tests::simulators::kata_api::ttrpc::context::Context;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixListener};
use tokio::task::JoinSet;
use tokio::time::timeout;

const MIB: u32 = 1024 * 1024;

/// A pod in the Kubernetes phase, with a network namespace.
struct Pod {
    agent: Child,
    adaptor: Child,
    namespace: TestNamespace,
    scene: Scene,
}

impl Pod {
    /// No kata agent runs yet.
    async fn up() -> Result<Self> {
        let mut scene = Scene::new(SceneOptions { user_data: true, ..SceneOptions::default() }).await?;
        let namespace = TestNamespace::new("kata")?;
        scene.pod_namespace = namespace.path().display().to_string();
        // Where the kata agent has it by default, and removes it.
        let directory = scene.path(OWN_DIRECTORY);
        std::fs::create_dir(&directory)?;
        scene.kata_socket = directory.join("agent.sock");
        scene.write_user_data().await?;
        let (agent, adaptor) = (scene.agent().await?, scene.adaptor()?);
        up(&adaptor).await?;
        Ok(Self { agent, adaptor, namespace, scene })
    }

    async fn with_kata_agent() -> Result<(Self, KataServer)> {
        let pod = Self::up().await?;
        let kata = pod.kata_agent().await?;
        Ok((pod, kata))
    }

    async fn kata_agent(&self) -> Result<KataServer> {
        KataServer::start(&self.scene.kata_socket).await
    }

    /// A connection to the kata agent's inbound, without a protocol.
    async fn stream(&self) -> Result<TcpStream> {
        client(endpoint(&self.adaptor, "KATAAGENT").await?).await
    }

    async fn runtime(&self) -> Result<Runtime> {
        Ok(Runtime::new(self.stream().await?))
    }

    /// The result of a call, with a timeout.
    async fn within<T>(&self, what: &str, call: impl Future<Output = T>) -> Result<T> {
        let answer = timeout(PATIENCE, call).await;
        answer.with_context(|| format!("{what} hangs\n{}{}", self.agent.log(), self.adaptor.log()))
    }

    /// The request to make a container, as it arrives.
    async fn arrives(
        &self,
        kata: &KataServer,
        request: &CreateContainerRequest,
    ) -> Result<CreateContainerRequest> {
        let runtime = self.runtime().await?;
        self.within("CreateContainer", runtime.create_container(request)).await??;
        let arrived = self.within("its arrival", kata.container(&request.container_id)).await?;
        arrived.context("it was answered and did not arrive")
    }

    /// The only network namespace that a container may have.
    fn network(&self) -> LinuxNamespace {
        namespace("network", &self.namespace.path().display().to_string())
    }
}

fn namespace(kind: &str, path: &str) -> LinuxNamespace {
    LinuxNamespace { Type: kind.into(), Path: path.into(), ..LinuxNamespace::default() }
}

fn bind(source: &Path) -> Mount {
    let (destination, source) = ("/data".to_owned(), source.display().to_string());
    Mount {
        destination,
        source,
        type_: "bind".into(),
        options: vec!["rbind".into(), "rw".into()],
        ..Mount::default()
    }
}

/// A request with a field of a later version in each message, and the namespaces that a runtime requests.
fn container(id: &str, namespaces: Vec<LinuxNamespace>) -> CreateContainerRequest {
    let mut linux = Linux { Namespaces: namespaces, ..Linux::default() };
    linux.special_fields.mut_unknown_fields().add_length_delimited(3, b"a cgroup path".to_vec());
    let mut proc = Mount { destination: "/proc".into(), type_: "proc".into(), ..Mount::default() };
    proc.special_fields.mut_unknown_fields().add_varint(77, 7);
    let mut spec = Spec { Mounts: vec![proc], Linux: MessageField::some(linux), ..Spec::default() };
    spec.Annotations = HashMap::from([("a".into(), "b".into()), (String::new(), String::new())]);
    spec.special_fields.mut_unknown_fields().add_length_delimited(1, b"1.0.2".to_vec());
    spec.special_fields.mut_unknown_fields().add_fixed64(1000, u64::MAX);
    let mut request = CreateContainerRequest {
        container_id: id.into(),
        OCI: MessageField::some(spec),
        ..Default::default()
    };
    for device in [&b"a device"[..], b"", b"another"] {
        request.special_fields.mut_unknown_fields().add_length_delimited(4, device.to_vec());
    }
    request.special_fields.mut_unknown_fields().add_fixed32(536_870_911, 1);
    request
}

/// The same request without its network namespaces, which are returned separately.
fn without_network(mut request: CreateContainerRequest) -> (CreateContainerRequest, Vec<LinuxNamespace>) {
    let namespaces = &mut request.OCI.mut_or_insert_default().Linux.mut_or_insert_default().Namespaces;
    let networks = namespaces.extract_if(.., |namespace| namespace.Type == "network").collect();
    (request, networks)
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_that_are_not_edited_arrive_unchanged() -> Result<()> {
    let (pod, kata) = Pod::with_kata_agent().await?;
    let runtime = pod.runtime().await?;
    let health = pod.within("Check", runtime.check()).await??;
    ensure!(health.status == 1, "{health}");
    pod.within("StatsContainer", runtime.stats_container("a")).await??;
    // About the longest data that fits into a frame with its envelope.
    for length in [0, 1, 200, MIB, 4 * MIB - 4096] {
        let data = output("stdin", usize::try_from(length)?);
        let taken = pod.within("WriteStdin", runtime.write_stdin("a", data.clone())).await??;
        ensure!(taken == length, "{taken} bytes of {length} were taken");
        let written = kata.requests().pop();
        ensure!(
            matches!(written, Some(Request::WriteStdin(written)) if written.data == data),
            "{length} bytes"
        );
        let read = pod.within("ReadStdout", runtime.read_stdout("a", length)).await??;
        ensure!(read == output("a", usize::try_from(length)?), "{length} bytes, or others, were read");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn every_container_joins_the_pods_network() -> Result<()> {
    let (pod, kata) = Pod::with_kata_agent().await?;
    let (mnt, pid) = (namespace("mount", ""), namespace("pid", "/proc/1/ns/pid"));
    let elsewhere = namespace("network", "/run/netns/elsewhere");
    let asked = [
        ("none", vec![mnt.clone(), pid.clone()]),
        ("no-path", vec![mnt.clone(), namespace("network", ""), pid.clone()]),
        ("elsewhere", vec![elsewhere.clone(), mnt.clone(), pid.clone()]),
        ("both", vec![mnt.clone(), elsewhere.clone(), pod.network()]),
        ("twice", vec![elsewhere.clone(), pid.clone(), elsewhere]),
        ("already", vec![mnt, pod.network(), pid]),
    ];
    for (id, namespaces) in asked {
        let sent = container(id, namespaces);
        let (arrived, networks) = without_network(pod.arrives(&kata, &sent).await?);
        ensure!(networks == [pod.network()], "{id}: {networks:?}");
        ensure!(arrived == without_network(sent.clone()).0, "{id}: {sent}\nbecame\n{arrived}");
    }
    let mut sent = container("no-linux", vec![]);
    sent.OCI.mut_or_insert_default().Linux.take();
    let (arrived, networks) = without_network(pod.arrives(&kata, &sent).await?);
    ensure!(networks == [pod.network()], "{networks:?}");
    ensure!(arrived == without_network(sent.clone()).0, "{sent}\nbecame\n{arrived}");
    // A request without a specification must not get the VM's own network either.
    let bare = CreateContainerRequest { container_id: "bare".into(), ..Default::default() };
    let (arrived, networks) = without_network(pod.arrives(&kata, &bare).await?);
    ensure!(networks == [pod.network()], "{networks:?}");
    ensure!(arrived.container_id == "bare");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sandbox_loses_its_dns_and_nothing_else() -> Result<()> {
    let (pod, kata) = Pod::with_kata_agent().await?;
    let runtime = pod.runtime().await?;
    for dns in [&["nameserver 10.0.0.10", "search a.b c.d", ""][..], &[]] {
        let mut sent = CreateSandboxRequest {
            hostname: "pod".into(),
            storages: vec![Storage { driver: "blk".into(), ..Storage::default() }, Storage::new()],
            sandbox_pidns: true,
            sandbox_id: pod.scene.pod.clone(),
            ..CreateSandboxRequest::default()
        };
        sent.storages[0].special_fields.mut_unknown_fields().add_length_delimited(7, b"/run".to_vec());
        sent.special_fields.mut_unknown_fields().add_length_delimited(6, b"/hooks".to_vec());
        let expected = sent.clone();
        sent.dns = dns.iter().map(|&entry| entry.to_owned()).collect();
        pod.within("CreateSandbox", runtime.create_sandbox(&sent)).await??;
        let arrived = kata.requests().pop();
        ensure!(arrived == Some(Request::CreateSandbox(expected)), "{sent}\nbecame\n{arrived:?}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn only_missing_sources_of_bind_mounts_are_made() -> Result<()> {
    let (pod, kata) = Pod::with_kata_agent().await?;
    let (missing, file) = (pod.scene.path("volumes/a/b"), pod.scene.path("resolv.conf"));
    let other = pod.scene.path("not-a-bind-mount");
    std::fs::write(&file, "nameserver 10.0.0.10\n")?;
    let mut sent = container("mounts", vec![]);
    sent.OCI.mut_or_insert_default().Mounts.extend([
        bind(&missing),
        bind(&file),
        Mount { type_: "tmpfs".into(), ..bind(&other) },
    ]);
    let (arrived, _) = without_network(pod.arrives(&kata, &sent).await?);
    ensure!(arrived == sent, "{sent}\nbecame\n{arrived}");
    ensure!(missing.is_dir(), "{} was not made", missing.display());
    ensure!(!other.exists(), "{} was made, and is the source of no bind mount", other.display());
    ensure!(std::fs::read_to_string(&file)? == "nameserver 10.0.0.10\n", "a file that was there has changed");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_cannot_be_made_refuses_only_its_container() -> Result<()> {
    let (pod, kata) = Pod::with_kata_agent().await?;
    let file = pod.scene.path("file");
    std::fs::write(&file, "")?;
    let mut sent = container("refused", vec![]);
    sent.OCI.mut_or_insert_default().Mounts.push(bind(&file.join("below")));
    let runtime = pod.runtime().await?;
    match pod.within("CreateContainer", runtime.create_container(&sent)).await? {
        Err(Error::RpcStatus(status)) => {
            ensure!(status.message.contains("file/below"), "it does not say which: {}", status.message);
        }
        other => bail!("expected a refusal, found {other:?}"),
    }
    ensure!(!kata.has_container("refused"), "it was refused and arrived");
    pod.within("Check", runtime.check()).await??;
    pod.within("CreateContainer", runtime.create_container(&container("good", vec![]))).await??;
    ensure!(kata.has_container("good"));
    Ok(())
}

/// A mounted tmpfs; unmounted when dropped.
struct Mounted(PathBuf);

impl Mounted {
    fn at(path: &Path) -> Result<Self> {
        mount(Some("tmpfs"), path, Some("tmpfs"), MsFlags::empty(), Some("size=64k"))
            .with_context(|| format!("mounting at {}: needs root", path.display()))?;
        Ok(Self(path.to_owned()))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if let Err(error) = umount2(&self.0, MntFlags::MNT_DETACH) {
            eprintln!("unmounting {}: {error}: unmount it by hand", self.0.display());
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_that_waits_for_volumes_delays_no_other() -> Result<()> {
    let (pod, kata) = Pod::with_kata_agent().await?;
    let volumes = [pod.scene.path("volume-1"), pod.scene.path("volume-2")];
    volumes.iter().try_for_each(std::fs::create_dir)?;
    let mut sent = container("waits", vec![]);
    let spec = sent.OCI.mut_or_insert_default();
    spec.Mounts.extend(volumes.iter().map(|volume| bind(volume)));
    let listed = volumes.each_ref().map(|volume| volume.display().to_string()).join(",");
    spec.Annotations.insert(VOLUMES.into(), listed);
    let runtime = pod.runtime().await?;
    let waiting = tokio::spawn({
        let (runtime, sent) = (runtime.clone(), sent.clone());
        async move { runtime.create_container(&sent).await }
    });
    // Other requests on the same connection are served before and after the first volume exists.
    let mut mounted = Vec::new();
    for (round, volume) in volumes.iter().enumerate() {
        for _ in 0..20 {
            pod.within("Check during a container that waits", runtime.check()).await??;
        }
        let other = container(&format!("other-{round}"), vec![]);
        pod.within("CreateContainer during one that waits", runtime.create_container(&other)).await??;
        ensure!(!waiting.is_finished(), "answered without {}: {:?}", volume.display(), waiting.await);
        ensure!(!kata.has_container("waits"), "it arrived without {}", volume.display());
        mounted.push(Mounted::at(volume)?);
    }
    pod.within("the container that waits", waiting).await???;
    let arrived = kata.container("waits").await.context("it was answered and did not arrive")?;
    ensure!(without_network(arrived.clone()).0 == sent, "{sent}\nbecame\n{arrived}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn parallel_requests_each_get_their_own_answer() -> Result<()> {
    let (pod, kata) = Pod::with_kata_agent().await?;
    let mut calls = JoinSet::new();
    for connection in 0..4 {
        let runtime = pod.runtime().await?;
        for call in 0..16_u32 {
            let (runtime, id) = (runtime.clone(), format!("{connection}-{call}"));
            calls.spawn(async move {
                let length = 1 + call * 16_411;
                let data = output(&id, usize::try_from(length)?);
                ensure!(runtime.write_stdin(&id, data.clone()).await? == length);
                runtime.create_container(&container(&id, vec![])).await?;
                ensure!(runtime.read_stdout(&id, length).await? == data, "{id}: another's answer");
                Ok(id)
            });
        }
    }
    let all = async {
        while let Some(done) = calls.join_next().await {
            let id = done??;
            let (arrived, networks) = without_network(kata.container(&id).await.unwrap());
            ensure!(networks == [pod.network()], "{id}: {networks:?}");
            ensure!(arrived == container(&id, vec![]), "{id} became {arrived}");
        }
        Ok(())
    };
    pod.within("a call", all).await?
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kata_agent_that_comes_late_is_waited_for() -> Result<()> {
    let pod = Pod::up().await?;
    let mut early = JoinSet::new();
    for id in ["early-1", "early-2"] {
        let runtime = pod.runtime().await?;
        early.spawn(async move { runtime.create_container(&container(id, vec![])).await });
    }
    // This later request is answered, so the others are very unlikely to have reached a kata agent.
    let mut other = client(endpoint(&pod.adaptor, "VMSERVICE").await?).await?;
    secure_comms_tests::simulators::kata::client::echo_roundtrip(&mut other, 200, 1).await?;
    // It is not waited for in silence.
    let socket = pod.scene.kata_socket.display().to_string();
    says(&pod.agent, &format!("tunnel KATAAGENT: waiting for {socket}: No such file or directory")).await?;
    let kata = pod.kata_agent().await?;
    says(&pod.agent, &format!("tunnel KATAAGENT: {socket} answered after")).await?;
    while let Some(answer) = pod.within("an early runtime", early.join_next()).await? {
        answer??;
    }
    ensure!(kata.has_container("early-1") && kata.has_container("early-2"));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_kata_agent_serves_new_connections() -> Result<()> {
    let (pod, kata) = Pod::with_kata_agent().await?;
    let runtime = pod.runtime().await?;
    pod.within("Check", runtime.check()).await??;
    kata.stop().await?;
    let kata = pod.kata_agent().await?;
    ensure!(
        pod.within("Check of the old one", runtime.check()).await?.is_err(),
        "a connection outlived its server"
    );
    let runtime = pod.runtime().await?;
    pod.within("Check", runtime.check()).await??;
    ensure!(kata.requests().len() == 1, "{:?}", kata.requests());
    Ok(())
}

/// A frame's header.
fn header(length: u32, stream: u32, kind: u8) -> Vec<u8> {
    [&length.to_be_bytes()[..], &stream.to_be_bytes(), &[kind, 0]].concat()
}

/// The tunnel ends without an answer, by end of file or by a reset.
async fn ends(pod: &Pod, what: &str, stream: &mut TcpStream) -> Result<()> {
    let end = pod.within(what, stream.read(&mut [0; 16])).await?;
    ensure!(matches!(end, Ok(0) | Err(_)), "{what}: it was answered");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_malformed_frame_of_a_runtime_ends_only_its_tunnel() -> Result<()> {
    let (pod, kata) = Pod::with_kata_agent().await?;
    let bystander = pod.runtime().await?;
    pod.within("Check", bystander.check()).await??;
    // Only where the end of a frame is unknown: no frame begins with these bytes.
    for (what, bytes) in [
        ("a frame of no type that is too long", header(4 * MIB + 1, 1, 4)),
        ("no ttrpc", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec()),
    ] {
        let mut stream = pod.stream().await?;
        stream.write_all(&bytes).await?;
        ends(&pod, what, &mut stream).await?;
        pod.within("Check", bystander.check()).await??;
    }
    for (what, bytes) in [
        ("half a header", vec![0; 5]),
        ("a header without its data", header(100, 1, 1)),
        ("half of the data", [header(100, 1, 1), vec![10; 50]].concat()),
        ("half of a data frame", [header(100, 1, 3), vec![10; 50]].concat()),
    ] {
        let mut stream = pod.stream().await?;
        stream.write_all(&bytes).await?;
        stream.shutdown().await?;
        ends(&pod, what, &mut stream).await?;
        pod.within("Check", bystander.check()).await??;
    }
    ensure!(
        kata.requests().iter().all(|request| matches!(request, Request::Check(_))),
        "{:?}",
        kata.requests()
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_malformed_frame_of_the_kata_agent_ends_only_its_tunnel() -> Result<()> {
    let pod = Pod::up().await?;
    for bytes in
        [header(4 * MIB + 1, 1, 2), header(u32::MAX, 1, 0), [header(100, 1, 2), vec![10; 50]].concat()]
    {
        let listener = UnixListener::bind(&pod.scene.kata_socket)?;
        let runtime = pod.runtime().await?;
        let call = tokio::spawn(async move { runtime.check().await });
        let (mut stream, _) = pod.within("the agent's connection", listener.accept()).await??;
        stream.write_all(&bytes).await?;
        stream.shutdown().await?;
        // The agent ends the tunnel, and does not wait for the rest of a frame that it will not forward.
        let mut rest = Vec::new();
        drop(pod.within("the agent's end of it", stream.read_to_end(&mut rest)).await?);
        ensure!(pod.within("Check", call).await??.is_err(), "an answer was made of {bytes:?}");
        std::fs::remove_file(&pod.scene.kata_socket)?;
    }
    let _kata = pod.kata_agent().await?;
    let runtime = pod.runtime().await?;
    pod.within("Check", runtime.check()).await??;
    Ok(())
}

/// The stream ids and codes of the next answers; code 0 is none.
async fn answers(pod: &Pod, stream: &mut TcpStream, count: usize) -> Result<Vec<(u32, i32)>> {
    use secure_comms_tests::simulators::kata_api::ttrpc::Response;
    let mut all = Vec::new();
    for _ in 0..count {
        let mut head = [0; 10];
        pod.within("an answer", stream.read_exact(&mut head)).await??;
        let mut body = vec![0; usize::try_from(u32::from_be_bytes(head[..4].try_into()?))?];
        pod.within("an answer", stream.read_exact(&mut body)).await??;
        let code = Response::parse_from_bytes(&body)?.status.code.value();
        all.push((u32::from_be_bytes(head[4..8].try_into()?), code));
    }
    all.sort_unstable();
    Ok(all)
}

fn check(stream: u32) -> Result<Vec<u8>> {
    use secure_comms_tests::simulators::kata_api::ttrpc::Request;
    let check = Request { service: "grpc.Health".into(), method: "Check".into(), ..Default::default() };
    let data = check.write_to_bytes()?;
    Ok([header(u32::try_from(data.len())?, stream, 1), data].concat())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frame_that_is_too_long_ends_only_its_call() -> Result<()> {
    let (pod, _kata) = Pod::with_kata_agent().await?;
    let mut stream = pod.stream().await?;
    let long = [header(4 * MIB + 1, 3, 1), vec![10; 4 * 1024 * 1024 + 1]].concat();
    let cut = [header(2, 5, 1), vec![10, 100]].concat();
    stream.write_all(&[check(1)?, long, cut, check(7)?].concat()).await?;
    let answered = answers(&pod, &mut stream, 4).await?;
    ensure!(answered == [(1, 0), (3, 8), (5, 3), (7, 0)], "{answered:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_is_too_long_ends_only_its_call() -> Result<()> {
    let pod = Pod::up().await?;
    let listener = UnixListener::bind(&pod.scene.kata_socket)?;
    let mut stream = pod.stream().await?;
    stream.write_all(&check(1)?).await?;
    let (mut server, _) = pod.within("the agent's connection", listener.accept()).await??;
    let long = [header(4 * MIB + 1, 1, 2), vec![10; 4 * 1024 * 1024 + 1], header(0, 3, 2)].concat();
    server.write_all(&long).await?;
    let answered = answers(&pod, &mut stream, 2).await?;
    ensure!(answered == [(1, 8), (3, 0)], "{answered:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn no_container_is_made_for_a_runtime_that_gave_up() -> Result<()> {
    let (pod, kata) = Pod::with_kata_agent().await?;
    let mut volumes = Vec::new();
    for (id, leaves) in [("late", false), ("left", true)] {
        let volume = pod.scene.path(id);
        std::fs::create_dir(&volume)?;
        let mut sent = container(id, vec![]);
        let spec = sent.OCI.mut_or_insert_default();
        spec.Mounts.push(bind(&volume));
        spec.Annotations.insert(VOLUMES.into(), volume.display().to_string());
        let runtime = pod.runtime().await?;
        // Long enough for the agent's reminder, which comes after a second, also while other tests run.
        let time = if leaves { PATIENCE } else { Duration::from_secs(8) };
        // The runtime keeps its connection, so that the agent does not see it leave at the moment at which it gives up itself.
        let call = tokio::spawn(async move { (runtime.create_container_within(&sent, time).await, runtime) });
        says(&pod.agent, &format!("a container waits for its volume {}", volume.display())).await?;
        if leaves {
            call.abort();
            says(&pod.agent, "the runtime closed its connection; dropping 1 held requests").await?;
        } else {
            let (made, _runtime) = pod.within("CreateContainer", call).await??;
            ensure!(made.is_err(), "it was made without its volume");
            // How long exactly depends on when the agent got to run.
            let refused =
                format!("waiting for the volume {}: nothing was mounted there within", volume.display());
            says(&pod.agent, &refused).await?;
        }
        volumes.push(Mounted::at(&volume)?);
    }
    // A later container arrives, so the others would have.
    let runtime = pod.runtime().await?;
    pod.within("CreateContainer", runtime.create_container(&container("next", vec![]))).await??;
    ensure!(kata.has_container("next") && !kata.has_container("late") && !kata.has_container("left"));
    Ok(())
}

fn copy(length: usize) -> CopyFileRequest {
    // With its envelope a frame of 1,048,811 bytes, as the runtime sends them.
    CopyFileRequest {
        path: "/run/kata-containers/shared/containers/resolv.conf".into(),
        file_size: 3_000_000,
        data: vec![7; length],
        ..CopyFileRequest::default()
    }
}

/// A container's start, and the calls that stay open as long as it runs.
async fn start(pod: &Pod, runtime: &Runtime, id: &str, files: usize) -> Result<JoinSet<()>> {
    let agent = runtime.agent();
    for _ in 0..files {
        pod.within("CopyFile", agent.copy_file(Context::default(), &copy(MIB as usize))).await??;
    }
    pod.within("CreateContainer", runtime.create_container(&container(id, vec![]))).await??;
    let request = StartContainerRequest { container_id: id.into(), ..Default::default() };
    pod.within("StartContainer", agent.start_container(Context::default(), &request)).await??;
    let mut open = JoinSet::new();
    let request = WaitProcessRequest { container_id: id.into(), ..Default::default() };
    let (caller, wait) = (agent.clone(), request.clone());
    open.spawn(async move { drop(caller.wait_process(Context::default(), &wait).await.unwrap()) });
    let (caller, request) =
        (agent.clone(), ReadStreamRequest { container_id: id.into(), ..Default::default() });
    open.spawn(async move {
        let error = caller.read_stderr(Context::default(), &request).await.unwrap_err().to_string();
        assert!(error.len() > 5000, "an error of {} bytes", error.len());
    });
    Ok(open)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_whole_pod_lives_on_one_connection() -> Result<()> {
    let pod = Pod::up().await?;
    let directory = pod.scene.kata_socket.parent().context("its directory")?.to_owned();
    let mut kata = pod.kata_agent().await?;
    let runtime = pod.runtime().await?;
    let agent = runtime.agent().clone();
    pod.within("Check", runtime.check()).await??;
    let sandbox = CreateSandboxRequest { sandbox_id: pod.scene.pod.clone(), ..Default::default() };
    pod.within("CreateSandbox", runtime.create_sandbox(&sandbox)).await??;
    ensure!(!directory.exists(), "the kata agent kept its directory");
    let request = GuestDetailsRequest::new();
    let details = agent.get_guest_details(Context::default(), &request);
    pod.within("GetGuestDetails", details).await??;
    let mut pause = start(&pod, &runtime, "pause", 1).await?;
    let caller = agent.clone();
    let oom =
        tokio::spawn(
            async move { caller.get_oom_event(Context::default(), &GetOOMEventRequest::new()).await },
        );
    let mut app = start(&pod, &runtime, "app", 3).await?;
    for _ in 0..20 {
        pod.within("Check", runtime.check()).await??;
        for id in ["pause", "app"] {
            pod.within("StatsContainer", runtime.stats_container(id)).await??;
        }
        let taken = pod.within("WriteStdin", runtime.write_stdin("app", vec![1; 32 * 1024])).await??;
        ensure!(taken == 32 * 1024);
        pod.within("ReadStdout", runtime.read_stdout("app", 32 * 1024)).await??;
    }
    let absent = StartContainerRequest { container_id: "absent".into(), ..Default::default() };
    let error = pod.within("StartContainer", agent.start_container(Context::default(), &absent)).await?;
    let error = error.err().context("a container was started that is not there")?.to_string();
    ensure!(error.len() > 5000, "{error}");
    // Nobody can reach the kata agent a second time, and the agent says what it waits for.
    let second = pod.runtime().await?;
    let second = tokio::spawn(async move { second.check().await });
    let text = format!("waiting for {}: No such file or directory", pod.scene.kata_socket.display());
    says(&pod.agent, &text).await?;
    ensure!(!second.is_finished());
    ensure!(app.try_join_next().is_none() && pause.try_join_next().is_none() && !oom.is_finished());
    for (id, mut open) in [("app", app), ("pause", pause)] {
        let request = SignalProcessRequest { container_id: id.into(), signal: 9, ..Default::default() };
        pod.within("SignalProcess", agent.signal_process(Context::default(), &request)).await??;
        while let Some(ended) = pod.within("a call that was open", open.join_next()).await? {
            ended?;
        }
        let request = RemoveContainerRequest { container_id: id.into(), ..Default::default() };
        pod.within("RemoveContainer", agent.remove_container(Context::default(), &request)).await??;
    }
    let request = RemoveStaleVirtiofsShareMountsRequest::new();
    let stale = agent.remove_stale_virtiofs_share_mounts(Context::default(), &request);
    pod.within("RemoveStaleVirtiofsShareMounts", stale).await??;
    let request = DestroySandboxRequest::new();
    pod.within("DestroySandbox", agent.destroy_sandbox(Context::default(), &request)).await??;
    ensure!(pod.within("GetOOMEvent", oom).await??.is_err(), "an event after the end");
    pod.within("the kata agent's exit", kata.exited()).await??;
    says(&pod.agent, "the kata agent closed the connection after DestroySandbox").await?;
    ensure!(pod.within("Check", runtime.check()).await?.is_err(), "it outlived the kata agent");
    ensure!(!pod.agent.log().contains("the pod will end"), "{}", pod.agent.log());
    second.abort();
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_connection_works_where_the_image_has_the_socket() -> Result<()> {
    let pod = Pod::up().await?;
    // As in the image; and the directory that the kata agent removes exists as well.
    std::fs::create_dir(pod.scene.path("kata-agent"))?;
    let socket = pod.scene.path("kata-agent/agent.sock");
    std::os::unix::fs::symlink(&socket, &pod.scene.kata_socket)?;
    let _kata = KataServer::start(&socket).await?;
    let first = pod.runtime().await?;
    pod.within("CreateSandbox", first.create_sandbox(&CreateSandboxRequest::new())).await??;
    let second = pod.runtime().await?;
    pod.within("Check", second.check()).await??;
    pod.within("Check", first.check()).await??;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_connection_of_a_pod_says_what_it_costs() -> Result<()> {
    let (pod, kata) = Pod::with_kata_agent().await?;
    let runtime = pod.runtime().await?;
    pod.within("CreateSandbox", runtime.create_sandbox(&CreateSandboxRequest::new())).await??;
    kata.stop().await?;
    says(&pod.agent, "a runtime connection was lost: the pod will end").await
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_arrive_before_a_close_between_two_frames() -> Result<()> {
    use secure_comms_tests::simulators::kata_api::ttrpc;
    let (pod, _kata) = Pod::with_kata_agent().await?;
    let request =
        ttrpc::Request { service: "grpc.Health".into(), method: "Check".into(), ..Default::default() };
    let data = request.write_to_bytes()?;
    let mut stream = pod.stream().await?;
    let mut bytes = Vec::new();
    for id in [1, 3, 5] {
        bytes.extend([header(u32::try_from(data.len())?, id, 1), data.clone()].concat());
    }
    // Split inside of frames, into pieces that arrive one by one.
    stream.set_nodelay(true)?;
    for piece in bytes.chunks(7) {
        stream.write_all(piece).await?;
    }
    let mut answered = Vec::new();
    for _ in 0..3 {
        let mut head = [0; 10];
        pod.within("an answer", stream.read_exact(&mut head)).await??;
        let mut body = vec![0; usize::try_from(u32::from_be_bytes(head[..4].try_into()?))?];
        pod.within("an answer", stream.read_exact(&mut body)).await??;
        ensure!(head[8] == 2, "type {} is no response", head[8]);
        answered.push(u32::from_be_bytes(head[4..8].try_into()?));
    }
    answered.sort_unstable();
    ensure!(answered == [1, 3, 5], "{answered:?}");
    stream.shutdown().await?;
    ends(&pod, "the end", &mut stream).await
}
