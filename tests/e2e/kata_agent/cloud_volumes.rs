//! Cloud volumes: the agent has them mounted by `podvm-volumes` before their container is made. A script stands in for that
//! program here, and mounts nothing.

use std::path::Path;

use anyhow::{Context as _, Result, bail, ensure};
use secure_comms_protocol::volumes::{Answer, Failure, FailureKind, LINE_MAX, Request as Asked, Volume};
use secure_comms_tests::harness::scene::says;
use secure_comms_tests::simulators::kata_api::VOLUMES;
use secure_comms_tests::simulators::kata_api::api::agent::{CreateContainerRequest, DestroySandboxRequest};
use secure_comms_tests::simulators::kata_api::api::oci::Mount;
use secure_comms_tests::simulators::kata_api::protobuf::Message as _;
use secure_comms_tests::simulators::kata_api::server::{KataServer, Request};
use secure_comms_tests::simulators::kata_api::ttrpc::context::Context;
use secure_comms_tests::simulators::kata_api::ttrpc::{Code, Error, Request as RawRequest};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};

use crate::{Pod, answers, container, header, without_network};

const CLOUD_VOLUMES: &str = "io.confidentialcontainers.org.cloud_volumes";
const TWO: &str = r#"{"vol-1":{"mount_point":"/logs","fs_type":"xfs","lun":"1","disk_id":"vol-0abc"},
    "vol-0":{"mount_point":"/data/","fs_type":"ext4","lun":"0","encrypt_type":"luks","key_id":"a/b/c"}}"#;

/// A `podvm-volumes` that has taken a request.
struct Taken {
    stream: BufReader<UnixStream>,
    asked: Asked,
}

impl Taken {
    async fn answer(&mut self, bytes: &[u8]) {
        // The agent closes once it has read enough.
        drop(self.stream.write_all(bytes).await);
    }

    async fn mounted(&mut self) -> Result<()> {
        let Asked::Mount(volumes) = &self.asked else { bail!("{:?} is no request to mount", self.asked) };
        let paths = volumes.iter().map(|volume| format!("/run/cloud-volumes/{}", volume.name)).collect();
        self.answer(&line(&Answer::Mounted(paths))?).await;
        Ok(())
    }

    /// The agent gives the request up.
    async fn closed(&mut self) -> Result<()> {
        let mut rest = Vec::new();
        self.stream.read_to_end(&mut rest).await?;
        ensure!(rest.is_empty(), "{} more bytes", rest.len());
        Ok(())
    }
}

fn line(answer: &Answer) -> Result<Vec<u8>> {
    Ok([serde_json::to_vec(answer)?, b"\n".into()].concat())
}

fn socket(pod: &Pod) -> Result<UnixListener> {
    Ok(UnixListener::bind(pod.scene.path("volumes.sock"))?)
}

/// The next request.
async fn takes(pod: &Pod, listener: &UnixListener) -> Result<Taken> {
    let take = async {
        let mut stream = BufReader::new(listener.accept().await?.0);
        let mut line = String::new();
        stream.read_line(&mut line).await?;
        let asked = serde_json::from_str(&line).with_context(|| line)?;
        Ok(Taken { stream, asked })
    };
    pod.within("a request to podvm-volumes", take).await?
}

fn mount(destination: &str, source: &str, kind: &str) -> Mount {
    Mount {
        destination: destination.into(),
        source: source.into(),
        type_: kind.into(),
        options: vec!["rbind".into(), "ro".into(), "rprivate".into()],
        ..Mount::default()
    }
}

/// A container with mounts of the node, its cloud volumes, and the sources among them that it waits for.
fn with_volumes(id: &str, cloud_volumes: &str) -> CreateContainerRequest {
    let mut sent = container(id, vec![]);
    let spec = sent.OCI.mut_or_insert_default();
    let mut data = mount("/data", "/node/csi/a", "bind");
    data.special_fields.mut_unknown_fields().add_varint(88, 8);
    spec.Mounts.extend([data, mount("/logs", "/node/csi/b", "none"), mount("/tmp", "tmpfs", "tmpfs")]);
    spec.Annotations.insert(CLOUD_VOLUMES.into(), cloud_volumes.into());
    // As cloud-api-adaptor lists them: nothing will ever be mounted there.
    spec.Annotations.insert(VOLUMES.into(), ",/node/csi/a,/node/csi/b".into());
    sent
}

fn status(result: Result<(), Error>) -> Result<(Code, String)> {
    match result {
        Err(Error::RpcStatus(status)) => Ok((status.code.enum_value_or_default(), status.message)),
        other => bail!("expected a refusal, found {other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_gets_its_cloud_volumes() -> Result<()> {
    let (pod, kata) = Pod::with_kata_agent().await?;
    let listener = socket(&pod)?;
    let runtime = pod.runtime().await?;
    let sent = with_volumes("volumes", TWO);
    let call = tokio::spawn({
        let (runtime, sent) = (runtime.clone(), sent.clone());
        async move { runtime.create_container(&sent).await }
    });
    let mut taken = takes(&pod, &listener).await?;
    let volume = |name: &str, fs_type: &str, lun: &str| Volume {
        name: name.into(),
        fs_type: fs_type.into(),
        lun: lun.into(),
        ..Volume::default()
    };
    let encrypted =
        Volume { encrypt_type: "luks".into(), key_id: "a/b/c".into(), ..volume("vol-0", "ext4", "0") };
    let plain = Volume { disk_id: "vol-0abc".into(), ..volume("vol-1", "xfs", "1") };
    ensure!(taken.asked == Asked::Mount(vec![encrypted, plain]), "{:?}", taken.asked);
    // Nothing else waits for it.
    for (id, annotation) in [("none", "{}"), ("empty", "")] {
        let mut other = with_volumes(id, annotation);
        other.OCI.mut_or_insert_default().Annotations.remove(VOLUMES);
        let (arrived, _) = without_network(pod.arrives(&kata, &other).await?);
        ensure!(arrived == other, "{other}\nbecame\n{arrived}");
        pod.within("Check", runtime.check()).await??;
    }
    ensure!(!call.is_finished() && !kata.has_container("volumes"), "it did not wait for its volumes");
    taken.mounted().await?;
    pod.within("CreateContainer", call).await???;
    let arrived = kata.container("volumes").await.context("it was answered and did not arrive")?;
    let mut expected = sent;
    let mounts = &mut expected.OCI.mut_or_insert_default().Mounts;
    for (at, name) in [(1, "vol-0"), (2, "vol-1")] {
        mounts[at].source = format!("/run/cloud-volumes/{name}");
        mounts[at].type_ = "bind".into();
    }
    let (arrived, _) = without_network(arrived);
    ensure!(arrived == expected, "{expected}\nbecame\n{arrived}");
    ensure!(!Path::new("/run/cloud-volumes/vol-0").exists(), "a directory was made in place of the volume");
    says(&pod.agent, "a container has the cloud volumes vol-0, vol-1; asking podvm-volumes").await?;
    says(&pod.agent, "the cloud volumes vol-0, vol-1 are mounted after").await?;
    ends_after_its_volumes(&pod, &kata, &listener).await
}

/// `DestroySandbox` reaches the kata agent once the volumes are unmounted.
async fn ends_after_its_volumes(pod: &Pod, kata: &KataServer, listener: &UnixListener) -> Result<()> {
    let runtime = pod.runtime().await?;
    let destroyed =
        || kata.requests().iter().any(|request| matches!(request, Request::Other("DestroySandbox")));
    let agent = runtime.agent().clone();
    let end = tokio::spawn(async move {
        agent.destroy_sandbox(Context::default(), &DestroySandboxRequest::new()).await
    });
    let mut taken = takes(pod, listener).await?;
    ensure!(taken.asked == Asked::UnmountAll, "{:?}", taken.asked);
    pod.within("Check", runtime.check()).await??;
    ensure!(!end.is_finished() && !destroyed(), "the sandbox ended before its volumes");
    taken.answer(&line(&Answer::Unmounted)?).await;
    pod.within("DestroySandbox", end).await???;
    ensure!(destroyed());
    says(&pod.agent, "the pod ends, its cloud volumes are unmounted after").await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_without_its_volumes_is_refused() -> Result<()> {
    let (pod, kata) = Pod::with_kata_agent().await?;
    let runtime = pod.runtime().await?;
    // No podvm-volumes: not waited for.
    let refused = with_volumes("refused", TWO);
    let call = runtime.create_container(&refused);
    let (code, text) = status(pod.within("CreateContainer", call).await?)?;
    ensure!(code == Code::FAILED_PRECONDITION && text.contains("its service must run in the VM"), "{text}");
    let listener = socket(&pod)?;
    let mounted = |paths: [&str; 2]| line(&Answer::Mounted(paths.map(Into::into).into()));
    let failed = |kind| {
        let message = format!("volume vol-1: a reason\n{}", "x".repeat(4000));
        line(&Answer::Failed(Failure { kind, message }))
    };
    let (good, bad) = ("/run/cloud-volumes/vol-0", "/run/cloud-volumes/../../etc");
    for (answer, expected, reason) in [
        (failed(FailureKind::Invalid)?, Code::INVALID_ARGUMENT, "vol-1: a reason x"),
        (failed(FailureKind::NoDisk)?, Code::NOT_FOUND, "vol-1: a reason x"),
        (failed(FailureKind::Refused)?, Code::FAILED_PRECONDITION, "vol-1: a reason x"),
        (failed(FailureKind::Internal)?, Code::INTERNAL, "vol-1: a reason x"),
        (vec![], Code::INTERNAL, "gave no answer"),
        (b"{\"mounted\"".into(), Code::INTERNAL, "gave no answer"),
        (vec![b'['; LINE_MAX + 1], Code::INTERNAL, "too long an answer"),
        (b"no JSON\n".into(), Code::INTERNAL, "gave an answer that is not in its protocol"),
        (line(&Answer::Mounted(vec![good.into()]))?, Code::INTERNAL, "somewhere else"),
        (mounted([good, bad])?, Code::INTERNAL, "somewhere else"),
        (line(&Answer::Unmounted)?, Code::INTERNAL, "unmounted volumes instead"),
    ] {
        let call = tokio::spawn({
            let runtime = runtime.clone();
            async move { runtime.create_container(&with_volumes("refused", TWO)).await }
        });
        takes(&pod, &listener).await?.answer(&answer).await;
        let (code, text) = status(pod.within("CreateContainer", call).await??)?;
        ensure!(code == expected && text.contains(reason) && text.len() < 1024, "{code:?} {text}");
        pod.within("Check", runtime.check()).await??;
    }
    ensure!(!kata.has_container("refused"), "it was refused and arrived");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_annotation_that_is_wrong_is_refused_at_once() -> Result<()> {
    let (pod, kata) = Pod::with_kata_agent().await?;
    let runtime = pod.runtime().await?;
    // There is no podvm-volumes, and none is asked.
    let good = r#""mount_point":"/data","lun":"0""#;
    for (annotation, reason) in [
        ("{".to_owned(), "it ends within its JSON"),
        ("[]".to_owned(), "it has a value of another type"),
        (format!(r#"{{"vol-0":{{{good},"x":{}"#, "[".repeat(20_000)), "it ends within its JSON"),
        (" ".repeat(MIB), "it has 1048576 bytes"),
        (format!(r#"{{"../vol-0":{{{good}}}}}"#), "the volume '../vol-0' has another name than"),
        (format!(r#"{{"vol-0":{{{good}}},"vol-0":{{{good}}}}}"#), "the volume 'vol-0' comes twice"),
        (r#"{"vol-0":{"mount_point":"/data"}}"#.to_owned(), "has no lun"),
        (r#"{"vol-0":{"lun":"0"}}"#.to_owned(), "has no absolute mount_point"),
        (
            format!(r#"{{"vol-0":{{{good},"fs_type":"btrfs"}}}}"#),
            "has another fs_type than ext4, ext3 and xfs",
        ),
    ] {
        let refused = with_volumes("refused", &annotation);
        let call = runtime.create_container(&refused);
        let (code, text) = status(pod.within("CreateContainer", call).await?)?;
        ensure!(code == Code::INVALID_ARGUMENT && text.contains(reason), "{code:?} {text}");
    }
    pod.within("CreateContainer", runtime.create_container(&container("good", vec![]))).await??;
    ensure!(kata.has_container("good") && !kata.has_container("refused"));
    Ok(())
}

const MIB: usize = 1024 * 1024;

/// The agent closes its request. `podvm-volumes` sees that, and mounts nothing more; what it says then is too late.
async fn gives_up(pod: &Pod, listener: &UnixListener) -> Result<()> {
    let mut taken = takes(pod, listener).await?;
    pod.within("the end of the request", taken.closed()).await??;
    taken.mounted().await
}

#[tokio::test(flavor = "multi_thread")]
async fn no_volume_is_mounted_for_a_runtime_that_gave_up() -> Result<()> {
    let (pod, kata) = Pod::with_kata_agent().await?;
    let listener = socket(&pod)?;
    // A timeout that the agent counts, from when it has the request: this client has no clock of its own.
    let mut late = pod.stream().await?;
    let data = RawRequest {
        service: "grpc.AgentService".into(),
        method: "CreateContainer".into(),
        payload: with_volumes("late", TWO).write_to_bytes()?,
        timeout_nano: 3_000_000_000,
        ..RawRequest::default()
    }
    .write_to_bytes()?;
    late.write_all(&[header(u32::try_from(data.len())?, 1, 1), data].concat()).await?;
    gives_up(&pod, &listener).await?;
    ensure!(answers(&pod, &mut late, 1).await? == [(1, 4)], "no DEADLINE_EXCEEDED");
    says(&pod.agent, "mounting the cloud volumes: podvm-volumes did not answer within").await?;
    let runtime = pod.runtime().await?;
    let call = tokio::spawn(async move { runtime.create_container(&with_volumes("left", TWO)).await });
    let mut taken = takes(&pod, &listener).await?;
    call.abort();
    pod.within("the end of the request", taken.closed()).await??;
    taken.mounted().await?;
    says(&pod.agent, "the runtime closed its connection; dropping 1 held requests").await?;
    let runtime = pod.runtime().await?;
    pod.within("CreateContainer", runtime.create_container(&container("next", vec![]))).await??;
    ensure!(kata.has_container("next") && !kata.has_container("late") && !kata.has_container("left"));
    // A podvm-volumes that can't unmount does not keep the sandbox.
    let agent = runtime.agent().clone();
    let end = tokio::spawn(async move {
        agent.destroy_sandbox(Context::default(), &DestroySandboxRequest::new()).await
    });
    takes(&pod, &listener).await?.answer(b"busy\n").await;
    pod.within("DestroySandbox", end).await???;
    says(
        &pod.agent,
        "its cloud volumes are not unmounted: podvm-volumes gave an answer that is not in its protocol",
    )
    .await
}
