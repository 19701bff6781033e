use std::fs;
use std::net::Ipv4Addr;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::os::unix::net::UnixListener;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use serde_json::json;
use tokio::sync::watch;
use tokio::time::timeout;

use super::*;
use crate::caa::directory::Change;
use crate::caa::identity::STRICT_SERVER_NAME as SERVER_NAME;
use crate::health::Health;

const LIMIT: Duration = Duration::from_secs(60);

#[test]
fn certificates_are_made_once_and_fit() {
    let dir = tempfile::tempdir().unwrap();
    let directory = dir.path().join("caa");
    let text = make(&directory, false).unwrap().to_string();
    for said in ["existingTlsSecretName", "CACERT_FILE: /etc/certificates/ca.crt", "client.key", "3653 days"]
    {
        assert!(text.contains(said), "{text}");
    }
    let mut names: Vec<_> =
        fs::read_dir(&directory).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort_unstable();
    assert_eq!(names, ["ca.crt", "client.crt", "client.key", "server.crt", "server.key"]);
    for name in &names {
        assert_eq!(fs::metadata(directory.join(name)).unwrap().permissions().mode() & 0o7777, 0o600);
    }
    let identity = load(&directory).unwrap();
    assert_eq!(identity.server_name, SERVER_NAME);
    let before = fs::read(directory.join("server.key")).unwrap();
    let error = make(&directory, false).unwrap_err().to_string();
    assert!(error.contains("ca.crt is there already") && error.contains("--overwrite"), "{error}");
    assert_eq!(fs::read(directory.join("server.key")).unwrap(), before);
    make(&directory, true).unwrap();
    assert_ne!(load(&directory).unwrap().certificate, identity.certificate);
}

#[test]
fn certificates_of_two_sets_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (one, two) = (dir.path().join("one"), dir.path().join("two"));
    make(&one, false).unwrap();
    make(&two, false).unwrap();
    fs::copy(one.join("ca.crt"), two.join("ca.crt")).unwrap();
    let error = load(&two).unwrap_err().to_string();
    assert!(error.contains("would refuse server.crt") && error.contains("--overwrite"), "{error}");
    fs::copy(two.join("server.key"), one.join("server.key")).unwrap();
    let error = load(&one).unwrap_err().to_string();
    assert!(error.contains("does not fit its certificate"), "{error}");
    fs::remove_file(one.join("client.crt")).unwrap();
    assert!(load(&one).unwrap_err().to_string().contains("client.crt"));
}

#[test]
fn a_mounted_secret_is_read_if_it_is_private() {
    let dir = tempfile::tempdir().unwrap();
    let (data, mount) = (dir.path().join("..data"), dir.path().join("mount"));
    make(&data, false).unwrap();
    fs::create_dir(&mount).unwrap();
    for name in ["ca.crt", "client.crt", "server.crt", "server.key"] {
        symlink(data.join(name), mount.join(name)).unwrap();
    }
    load(&mount).unwrap();
    fs::set_permissions(data.join("server.key"), fs::Permissions::from_mode(0o644)).unwrap();
    assert!(load(&mount).unwrap_err().to_string().contains("chmod 0600"));
}

fn ip(arguments: &[&str]) {
    let output =
        Command::new("ip").args(arguments).output().expect("this test needs iproute2's `ip`: install it");
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "this test needs root (CAP_SYS_ADMIN): ip {arguments:?}: {error}");
}

/// Namespaces of pods, removed when dropped, and a directory with those only.
struct Namespaces {
    directory: tempfile::TempDir,
    names: Vec<String>,
}

impl Namespaces {
    fn new() -> Self {
        Self { directory: tempfile::tempdir().unwrap(), names: Vec::new() }
    }

    /// A pod as cloud-api-adaptor leaves it: `eth0` with the pod's address, and `vxlan1` to the VM.
    fn add(&mut self, pod: &str, vni: u32, vm: &str) {
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        let name = format!("sc-strict-{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        ip(&["netns", "add", &name]);
        self.names.push(name.clone());
        ip(&["-n", &name, "link", "add", "eth0", "type", "veth", "peer", "name", "peer0"]);
        ip(&["-n", &name, "address", "add", &format!("{pod}/24"), "dev", "eth0"]);
        let vni = vni.to_string();
        ip(&[
            "-n",
            &name,
            "link",
            "add",
            "vxlan1",
            "type",
            "vxlan",
            "id",
            &vni,
            "remote",
            vm,
            "dstport",
            "4789",
            "nolearning",
        ]);
        symlink(PathBuf::from("/run/netns").join(&name), self.directory.path().join(&name)).unwrap();
    }
}

impl Drop for Namespaces {
    fn drop(&mut self) {
        for name in &self.names {
            // Best effort: the test may have failed for want of it.
            Command::new("ip").args(["netns", "del", name]).status().ok();
        }
    }
}

struct World {
    _dir: tempfile::TempDir,
    pods: PathBuf,
    strict: Strict,
    directory: PodsDirectory,
    _stop: watch::Sender<bool>,
}

impl World {
    fn new(namespaces: &Path) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (pods, certificates) = (dir.path().join("pods"), dir.path().join("certificates"));
        fs::create_dir(&pods).unwrap();
        make(&certificates, false).unwrap();
        let directory = PodsDirectory::open(&pods);
        let strict = Strict::with(load(&certificates).unwrap(), directory.clone(), namespaces.to_owned());
        let (stop, followed) = (watch::Sender::new(false), directory.clone());
        let stopped = stop.subscribe();
        tokio::spawn(async move { followed.run(Health::default(), stopped).await });
        Self { _dir: dir, pods, strict, directory, _stop: stop }
    }

    async fn pod(&self, id: &str, address: &str, vni: u32) {
        let apf = json!({
            "pod-name": id, "pod-namespace": "shop",
            "pod-network": {"podip": format!("{address}/24"), "vxlan-id": vni, "vxlan-port": 4789},
        });
        let mut changes = self.directory.changes();
        fs::create_dir(self.pods.join(id)).unwrap();
        fs::write(self.pods.join(id).join("apf.json"), apf.to_string()).unwrap();
        let appears = async {
            while !matches!(changes.next().await, Change::Appeared(sandbox) if sandbox.id.as_str() == id) {}
        };
        timeout(LIMIT, appears).await.unwrap();
    }

    async fn of(&self, vm: &str) -> Result<String, VmLookupError> {
        let found = timeout(LIMIT, self.strict.by_vm(vm.parse().unwrap())).await.unwrap();
        found.map(|sandbox| sandbox.id.to_string())
    }
}

#[tokio::test]
async fn a_sandbox_is_found_by_its_vms_address() {
    let mut namespaces = Namespaces::new();
    namespaces.add("10.244.3.5", 555_001, "192.0.2.1");
    namespaces.add("10.244.3.6", 555_002, "192.0.2.2");
    namespaces.add("fd00:244::7", 555_003, "2001:db8::3");
    namespaces.add("10.244.3.8", 555_004, "192.0.2.4");
    fs::write(namespaces.directory.path().join("no-namespace"), "").unwrap();
    symlink("/nowhere", namespaces.directory.path().join("gone")).unwrap();
    let world = World::new(namespaces.directory.path());
    world.pod("one", "10.244.3.5", 555_001).await;
    world.pod("two", "10.244.3.6", 555_002).await;
    // A pod of earlier times with the address of "two".
    world.pod("earlier", "10.244.3.6", 555_099).await;
    world.pod("three", "fd00:244::7", 555_003).await;
    assert!(world.strict.answers("podvm-server") && world.strict.answers("PODVM-server"));
    assert!(!world.strict.answers("podvm-web-0-aaaaaaaa"));
    assert_eq!(world.of("192.0.2.1").await.unwrap(), "one");
    assert_eq!(world.of("::ffff:192.0.2.1").await.unwrap(), "one");
    assert_eq!(world.of("192.0.2.2").await.unwrap(), "two");
    assert_eq!(world.of("2001:db8::3").await.unwrap(), "three");
    let error = world.of("192.0.2.9").await.unwrap_err();
    assert!(matches!(error, VmLookupError::NoLink(vm) if vm == IpAddr::from(Ipv4Addr::new(192, 0, 2, 9))));
    let error = world.of("192.0.2.4").await.unwrap_err().to_string();
    assert!(error.contains("10.244.3.8") && error.contains("no apf.json"), "{error}");
    // Two with all the same: the one that lives.
    world.pod("twin", "10.244.3.5", 555_001).await;
    assert!(
        matches!(world.of("192.0.2.1").await, Err(VmLookupError::Ambiguous { ids, .. }) if ids.len() == 2)
    );
    let _listener = UnixListener::bind(world.pods.join("twin/agent.ttrpc")).unwrap();
    while world.of("192.0.2.1").await.ok().as_deref() != Some("twin") {}
}

#[tokio::test]
async fn a_dial_is_answered_by_its_name_or_its_vm() {
    let mut namespaces = Namespaces::new();
    namespaces.add("10.244.3.5", 555_006, "192.0.2.1");
    let (world, caa) = (World::new(namespaces.directory.path()), crate::caa::testing::Caa::new());
    fs::create_dir(world.pods.join("named")).unwrap();
    fs::write(world.pods.join("named/apf.json"), caa.text("podvm-web-0-aaaaaaaa")).unwrap();
    let vm = "192.0.2.1".parse().unwrap();
    let strict = Identities { directory: world.directory.clone(), strict: Some(world.strict.clone()) };
    let auto = Identities::open(world.directory.clone(), None).unwrap();
    for identities in [&strict, &auto] {
        let sandbox = identities.sandbox("podvm-web-0-aaaaaaaa", vm).await.unwrap();
        assert_eq!(
            identities.identity("podvm-web-0-aaaaaaaa", &sandbox).unwrap().server_name,
            "podvm-web-0-aaaaaaaa"
        );
    }
    let sandbox = strict.sandbox(SERVER_NAME, vm).await.unwrap();
    assert_eq!(strict.identity(SERVER_NAME, &sandbox).unwrap().server_name, SERVER_NAME);
    assert!(auto.sandbox(SERVER_NAME, vm).await.unwrap_err().contains("no sandbox in the pods directory"));
    world.pod("bare", "10.244.3.9", 555_009).await;
    let bare = world.directory.by_id(&"bare".parse().unwrap()).unwrap();
    assert!(auto.identity("podvm-bare", &bare).unwrap_err().contains("caa-certs"));
    let missing = Identities::open(world.directory.clone(), Some(Path::new("/nowhere")));
    assert!(missing.unwrap_err().to_string().contains("/nowhere/server.key"));
}

#[tokio::test]
async fn a_burst_of_dials_looks_twice_at_most() {
    let mut namespaces = Namespaces::new();
    namespaces.add("10.244.3.5", 555_001, "192.0.2.1");
    let world = World::new(namespaces.directory.path());
    world.pod("one", "10.244.3.5", 555_001).await;
    let dials = (0..200).map(|_| {
        let strict = world.strict.clone();
        tokio::spawn(async move { strict.links().await.unwrap() })
    });
    let mut looks = Vec::new();
    for dial in dials.collect::<Vec<_>>() {
        looks.push(Arc::as_ptr(&timeout(LIMIT, dial).await.unwrap().unwrap()) as usize);
    }
    looks.sort_unstable();
    looks.dedup();
    assert!(looks.len() <= 2, "{} looks", looks.len());
}

#[tokio::test]
async fn without_namespaces_no_vm_is_found() {
    let dir = tempfile::tempdir().unwrap();
    let world = World::new(&dir.path().join("netns"));
    assert!(matches!(world.of("192.0.2.1").await, Err(VmLookupError::NoLink(_))));
    fs::write(dir.path().join("netns"), "").unwrap();
    let error = world.of("192.0.2.1").await.unwrap_err().to_string();
    assert!(error.contains("netns") && error.contains("CAP_SYS_ADMIN"), "{error}");
}
